"""What the steps of a run are worth and what they cost, counted over all ranks and logged step by step.

A step's values stay on the device until the next one is under way, so that the host never waits for a step that it has
just begun; `settle` waits, where a validation or a checkpoint has to anyway.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from controlbooth.data.loading.batches import StepBatch
from controlbooth.trainer.controlnet.session import Run, progress_bar, report_skipped
from controlbooth.trainer.engine.flat_gradients import Taken
from controlbooth.trainer.engine.late import Late
from controlbooth.trainer.run import saving as savings
from controlbooth.trainer.run.attempt import check_still_ours
from controlbooth.trainer.run.process import peak_memory_gib, say
from controlbooth.trainer.run.stragglers import Pace, slowest


@dataclass(frozen=True)
class Counted:
    """What all ranks know of the latest step whose values were read."""

    loss: float = math.nan
    """The mean over ranks and micro-batches."""
    stop: bool = False
    """Whether any rank was asked to stop."""
    written: bool = False
    """Whether all ranks have written the checkpoint that was begun, if there is one."""


@dataclass(frozen=True)
class Pending:
    """A step that was taken and whose values have not been read."""

    step: int
    batch: StepBatch
    values: Late
    """Norm, whether it was skipped, this rank's losses, and what all ranks told, flat."""
    rates: Mapping[str, float]


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
        self._pending: Pending | None = None
        self._counted = Counted()
        self._started = time.perf_counter()

    def begin(self) -> None:
        """Begins a step."""
        is_first = self.run.step == self._first
        self.run.watchdog.begin("the first step" if is_first else "the step", self.run.step + 1)
        self.pace.begin()

    def restart(self, with_a_first_step: bool = False) -> None:
        """Leaves what happened since the last step out of the next one's time. To be called after `settle`.

        with_a_first_step: whether the next one takes as long as a first one may.
        """
        if with_a_first_step:
            self._first = self.run.step
        self._started = time.perf_counter()

    def row(self, batch: StepBatch, losses: Tensor, stop_requested: bool) -> Tensor:
        """Returns what this rank tells the others of the step that is about to be taken, an OfRank, float64 on the
        device. losses: of its micro-batches, (micro-batches,), on the device."""
        run = self.run
        own = OfRank(
            loss=0.0,
            stop=float(stop_requested),
            unwritten=float(run.saving is not None and not savings.is_written(run.saving)),
            substitutions=batch.substitutions,
            cache_hits=batch.cache_hits,
            wait_seconds=batch.wait_seconds,
            queue_depth=batch.queue_depth,
            fetch_seconds=batch.fetch_seconds,
            decode_seconds=batch.decode_seconds,
            memory_gib=peak_memory_gib(run.world),
            busy_seconds=self.pace.seconds(),
        )
        pinned = run.world.device.type == "cuda"
        row = torch.tensor(own, dtype=torch.float64, pin_memory=pinned).to(run.world.device, non_blocking=True)
        row[0] = losses.double().mean()
        return row

    def count(self, batch: StepBatch, losses: Tensor, taken: Taken, rates: Mapping[str, float]) -> Counted:
        """Counts the step that was just taken, and logs the one before. Called by every rank.

        Raises Superseded where another start has taken the run, and TrainingStopped when too many steps were skipped.
        """
        known = [taken.norm.reshape(1), taken.skipped.reshape(1), losses, taken.told.flatten()]
        values = Late(torch.cat([tensor.to(torch.float64) for tensor in known]))
        before, self._pending = self._pending, Pending(self.run.step, batch, values, rates)
        check_still_ours(self.run.attempt)
        return Counted() if before is None else self._log(before)

    def settle(self) -> Counted:
        """Reads and logs the step that was taken last, if it was not yet. Called by every rank."""
        if self._pending is not None:
            before, self._pending = self._pending, None
            self._log(before)
        return self._counted

    def _log(self, taken: Pending) -> Counted:
        run, world, batch, rates = self.run, self.run.world, taken.batch, taken.rates
        norm, skipped, *rest = taken.values.read()
        seconds, self._started = taken.values.known_at - self._started, taken.values.known_at
        losses, told = rest[: len(batch.micro_batches)], rest[len(batch.micro_batches) :]
        fields = len(OfRank._fields)
        ranks = [OfRank(*told[at : at + fields]) for at in range(0, len(told), fields)]
        busy = [one.busy_seconds for one in ranks]
        loss = math.fsum(one.loss for one in ranks) / world.world_size
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if skipped:
            report_skipped(run, taken.step, batch, losses, norm, self._skipped_in_a_row)
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
            "skipped": skipped,
        }
        if world.world_size > 1:
            metrics["slowest_rank"], metrics["slowest_rank_ratio"] = slowest(busy)
        if line := self.pace.note(busy, seconds):
            say(world, line)
        if run.tracker is not None:
            run.tracker.log(taken.step, {name: value for name, value in metrics.items() if math.isfinite(value)})
        self._show(metrics)
        self._counted = Counted(loss, any(one.stop for one in ranks), not any(one.unwritten for one in ranks))
        return self._counted

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
