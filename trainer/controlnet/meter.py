"""What the steps of a run are worth and what they cost, counted over all ranks and logged step by step."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from controlbooth.data.loading.batches import StepBatch
from controlbooth.trainer.controlnet.session import Run, progress_bar, report_skipped
from controlbooth.trainer.engine.distributed import all_rows
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


class OfRank(NamedTuple):
    """What a rank tells all others of a step."""

    loss: float
    """The mean over its micro-batches."""
    stop: float
    """1 where it was asked to stop."""
    unwritten: float
    """1 where it is still writing the checkpoint that was begun."""
    substitutions: float
    cache_hits: float
    wait_seconds: float
    queue_depth: float
    fetch_seconds: float
    decode_seconds: float
    memory_gib: float
    busy_seconds: float


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
        own = OfRank(
            loss=sum(losses) / len(losses),
            stop=float(stop_requested),
            unwritten=float(run.saving is not None and not savings.is_written(run.saving)),
            substitutions=batch.substitutions,
            cache_hits=batch.cache_hits,
            wait_seconds=batch.wait_seconds,
            queue_depth=batch.queue_depth,
            fetch_seconds=batch.fetch_seconds,
            decode_seconds=batch.decode_seconds,
            memory_gib=peak_memory_gib(world),
            busy_seconds=self.pace.seconds(),
        )
        ranks = [OfRank(*row) for row in all_rows(own)]
        check_still_ours(run.attempt)
        busy = [one.busy_seconds for one in ranks]
        loss = math.fsum(one.loss for one in ranks) / world.world_size
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if skipped:
            report_skipped(run, batch, losses, norm, self._skipped_in_a_row)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            **rates,
            "samples_per_second": run.config.global_batch_size / seconds,
            "step_seconds": seconds,
            "stall_percent": 100.0 * min(1.0, max(one.wait_seconds for one in ranks) / seconds),
            "queue_depth": min(one.queue_depth for one in ranks),
            "fetch_seconds": max(one.fetch_seconds for one in ranks),
            "decode_seconds": max(one.decode_seconds for one in ranks),
            "substitutions": sum(one.substitutions for one in ranks),
            "cache_hits": sum(one.cache_hits for one in ranks),
            "peak_memory_gib": max(one.memory_gib for one in ranks),
            "skipped": float(skipped),
        }
        if world.world_size > 1:
            metrics["slowest_rank"], metrics["slowest_rank_ratio"] = slowest(busy)
        if line := self.pace.note(busy, seconds):
            say(world, line)
        if run.tracker is not None:
            run.tracker.log(run.step, {name: value for name, value in metrics.items() if math.isfinite(value)})
        self._show(metrics)
        return Counted(loss, any(one.stop for one in ranks), not any(one.unwritten for one in ranks))

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
