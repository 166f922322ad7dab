"""What the steps of a run are worth and what they cost, counted over all ranks and logged step by step."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controlbooth.data.loading.batches import StepBatch
from controlbooth.trainer.controlnet.session import Run, progress_bar, report_skipped
from controlbooth.trainer.engine.distributed import all_max, all_sum
from controlbooth.trainer.run import saving as savings
from controlbooth.trainer.run.attempt import check_still_ours
from controlbooth.trainer.run.process import peak_memory_gib, say
from controlbooth.trainer.run.stragglers import Pace, slowest


@dataclass(frozen=True)
class Counted:
    """What all ranks know of a step after it."""

    loss: float
    """The mean over ranks and micro-batches."""
    stop: bool
    """Whether any rank was asked to stop."""
    written: bool
    """Whether all ranks have written the checkpoint that was begun, if there is one."""


class Meter:
    """Counts steps for one start of a run; `close` ends its progress bar."""

    def __init__(self, run: Run):
        self.run = run
        self.pace = Pace(run.world)
        self._bar = progress_bar(run)
        self._first = run.step
        self._skipped_in_a_row = 0
        self._started = time.perf_counter()

    def begin(self) -> None:
        """Begins a step."""
        is_first = self.run.step == self._first
        self.run.watchdog.begin("the first step" if is_first else "the step", self.run.step + 1)
        self.pace.begin()

    def restart(self, with_a_first_step: bool = False) -> None:
        """Leaves what happened since the last step out of the next one's time.

        with_a_first_step: whether the next one takes as long as a first one may.
        """
        if with_a_first_step:
            self._first = self.run.step
        self._started = time.perf_counter()

    def count(
        self,
        batch: StepBatch,
        losses: Sequence[float],
        norm: float,
        skipped: bool,
        rates: Mapping[str, float],
        stop_requested: bool,
    ) -> Counted:
        """Counts the step that was just taken, and logs it. Called by every rank.

        Raises Superseded where another start has taken the run, and TrainingStopped when too many steps were skipped.
        """
        run, world = self.run, self.run.world
        seconds = time.perf_counter() - self._started
        self.restart()
        mean_loss = sum(losses) / len(losses) / world.world_size
        unwritten = float(run.saving is not None and not savings.is_written(run.saving))
        counted = [mean_loss, float(stop_requested), float(batch.substitutions), float(batch.cache_hits), unwritten]
        loss, stops, substitutions, cache_hits, unwritten, *busy = all_sum([*counted, *self.pace.shares()])
        check_still_ours(run.attempt)
        longest = [batch.wait_seconds, -float(batch.queue_depth), batch.fetch_seconds, batch.decode_seconds]
        waited, depth_short, fetch, decode, memory = all_max([*longest, peak_memory_gib(world)])
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if skipped:
            report_skipped(run, batch, losses, norm, self._skipped_in_a_row)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            **rates,
            "samples_per_second": run.config.global_batch_size / seconds,
            "step_seconds": seconds,
            "stall_percent": 100.0 * min(1.0, waited / seconds),
            "queue_depth": -depth_short,
            "fetch_seconds": fetch,
            "decode_seconds": decode,
            "substitutions": substitutions,
            "cache_hits": cache_hits,
            "peak_memory_gib": memory,
            "skipped": float(skipped),
        }
        if world.world_size > 1:
            metrics["slowest_rank"], metrics["slowest_rank_ratio"] = slowest(busy)
        if line := self.pace.note(busy, seconds):
            say(world, line)
        if run.tracker is not None:
            run.tracker.log(run.step, {name: value for name, value in metrics.items() if math.isfinite(value)})
        self._show(metrics)
        return Counted(loss, bool(stops), not unwritten)

    def _show(self, metrics: Mapping[str, float]) -> None:
        """Moves the progress bar on by a step."""
        self._bar.set_postfix(
            loss=f"{metrics['loss']:.4f}",
            samples_s=f"{metrics['samples_per_second']:.1f}",
            stall=f"{metrics['stall_percent']:.0f}%",
            refresh=False,
        )
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()
