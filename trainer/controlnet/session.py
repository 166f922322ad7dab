"""A ControlNet run while it trains: what outlives a step, checkpoints, and steps that are skipped."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from controlbooth.data.loading.batches import StepBatch
from controlbooth.data.loading.loader import Loader
from controlbooth.data.loading.plan import order_state
from controlbooth.data.shards.manifest import Dataset
from controlbooth.models.base import Base
from controlbooth.trainer.config.loading import dump
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.controlnet import unlock as unlocking
from controlbooth.trainer.engine import ema
from controlbooth.trainer.engine.device import device_name
from controlbooth.trainer.engine.distributed import World, barrier, gather_objects
from controlbooth.trainer.evaluation.extract import Extract
from controlbooth.trainer.evaluation.held_out import HeldOutSet
from controlbooth.trainer.evaluation.verdict import Verdict
from controlbooth.trainer.run import checkpoint as checkpoints
from controlbooth.trainer.run import saving as savings
from controlbooth.trainer.run.attempt import Attempt, is_superseded
from controlbooth.trainer.run.process import say
from controlbooth.trainer.run.same_base import base_facts
from controlbooth.trainer.run.status import write_own_status
from controlbooth.trainer.run.watchdog import Watchdog
from controlbooth.trainer.tracking.open import IN_MLFLOW, open_tracker
from controlbooth.trainer.tracking.speed import write_speed
from controlbooth.trainer.tracking.tracker import Tracker


class TrainingStopped(RuntimeError):
    """The run cannot go on by itself: too many steps in a row had no finite gradient."""


@dataclass
class Run:
    """What outlives a step."""

    config: RunConfig
    world: World
    attempt: Attempt
    watchdog: Watchdog
    folder: Path
    precision: str
    attention: str
    base: Base
    engine: Any
    average: ema.Average | None
    dataset: Dataset
    loader: Loader
    held: HeldOutSet | None
    extract: Extract | None
    """Finds the trained kind of condition in pictures, where something does."""
    tracker: Tracker | None
    """On rank 0 only."""
    step: int
    """Optimizer steps taken; the next batch is the global batch of this number."""
    saving: savings.Save | None = None
    """The checkpoint that is being written while training goes on; on every rank or on none."""
    saved_times: dict[str, float] = field(default_factory=dict)
    """When the metrics of the step that is being saved were logged, by name; on rank 0."""
    verdict: Verdict | None = None
    """On its control, as of the last validation, on every rank; None without held-out samples."""
    warned: bool = False


def send_what_is_left(attempt: Attempt, config: RunConfig) -> None:
    """Sends MLflow the rest of a finished run whose server did not answer at its end, or that was killed on its very
    last line. Writes its speed.json, unless it is there, and status.json."""
    folder, tracker = attempt.run, open_tracker(attempt.run, config, {}, attempt)
    tracker.finish("FINISHED")
    tracker.close(timeout_seconds=30.0)
    state = checkpoints.read_state(checkpoints.complete_checkpoints(folder)[-1])
    if not (folder / "speed.json").exists():
        write_speed(attempt, precision=state["precision"], attention=state["attention"], world_size=state["world_size"])
    write_own_status(attempt, state="finished", step=state["step"])


def finish(run: Run, state: str) -> None:
    """Ends this start of the run. state: "finished", "stopped" or "failed"."""
    run.loader.close()
    if run.world.rank == 0 and state != "failed":
        device = {"device_kind": run.world.device.type, "device": device_name(run.world.device)}
        own = {"precision": run.precision, "attention": run.attention, "world_size": run.world.world_size}
        write_speed(run.attempt, **own, **device)
        write_own_status(run.attempt, state=state, step=run.step)  # before MLflow, which may take its time
    if run.tracker is not None and not is_superseded(run.attempt):  # else the MLflow run is the other's too
        run.tracker.finish(IN_MLFLOW[state])
        run.tracker.close(timeout_seconds=30.0)


def save(run: Run, figures: dict[str, float]) -> None:
    """Begins a checkpoint of this step, on every rank, after the one before is committed."""
    run.watchdog.begin("the checkpoint", run.step)
    if run.saving is not None:
        commit(run)
    state = dict(
        step=run.step,
        order=order_state(run.loader.order, run.dataset.fingerprint, run.loader.position),
        dataset_fingerprint=run.dataset.fingerprint,
        condition=run.config.data.condition,
        base_digest=run.base.digest,
        **base_facts(run.base),
        zero_stage=run.config.engine.zero_stage,
        optimizer=run.config.optimizer.name,
        precision=run.precision,
        attention=run.attention,
        world_size=run.world.world_size,
        metrics={name: value for name, value in figures.items() if math.isfinite(value)},  # JSON has no others
        unlocked=unlocking.is_unlocked(run.engine),
    )
    write = savings.write_controlnet
    if unlocking.is_unlocked(run.engine):
        write = unlocking.write_networks
        state |= dict(unlocked_at=run.config.model.unlock_decoder_at, moment_steps=unlocking.moment_steps(run.engine))
    run.saved_times = {} if run.tracker is None else run.tracker.times(run.step)
    run.saving = savings.begin_save(
        run.engine, run.folder, state, dump(run.config), run.average, run.world, run.attempt, write_weights=write
    )


def note_stall(run: Run, began: float) -> None:
    """Logs for how many seconds training stood still for a checkpoint. began: the time.perf_counter() at which that
    began."""
    if run.tracker is not None:
        run.tracker.log(run.step, {"checkpoint_stall_seconds": time.perf_counter() - began})


def commit(run: Run) -> None:
    """Makes a checkpoint of what has been written, on every rank; then rank 0 tells of it and deletes older ones."""
    assert run.saving is not None
    run.watchdog.begin("the checkpoint", run.step)
    folder = savings.finish_save(run.saving, run.world)
    run.saving = None
    if run.tracker is not None:
        saved = checkpoints.read_state(folder)
        named = {name if name == "loss" else f"validation/{name}": value for name, value in saved["metrics"].items()}
        run.tracker.log_checkpoint(saved["step"], saved["digest"], folder.absolute().as_uri(), named, run.saved_times)
        keep = run.config.checkpoint
        checkpoints.prune(run.folder, keep.keep, keep.keep_best, run.attempt, folder)
        write_own_status(run.attempt, state="running", step=saved["step"])
    barrier()


def report_skipped(run: Run, step: int, batch: StepBatch, losses: Sequence[float], norm: float, in_a_row: int) -> None:
    """Says which samples made step `step` one without finite gradients; raises TrainingStopped when that goes on."""
    suspects = [
        f"{run.dataset.paths[shard]}:{key}"  # as `data explain` takes it: keys may repeat
        for loss, micro in zip(losses, batch.micro_batches, strict=True)
        if not math.isfinite(loss)
        for key, (shard, row) in zip(micro.keys, micro.places.tolist(), strict=True)
        if row >= 0
    ]
    everyone = [name for names in gather_objects(suspects, run.world) for name in names]
    where = f"the loss of {', '.join(everyone[:8])} is not finite" if everyone else "all losses are finite"
    say(run.world, f"step {step} skipped: gradient norm {norm}; {where} ({in_a_row} in a row)")
    if in_a_row > run.config.optimizer.max_skipped_steps:
        raise TrainingStopped(
            f"{in_a_row} steps in a row had no finite gradient, up to step {step}; {where}. Look at these samples, "
            f"lower optimizer.learning_rate={run.config.optimizer.learning_rate}, or use engine.precision=fp32 or bf16"
        )


def progress_bar(run: Run) -> tqdm:
    terminal = sys.stderr.isatty()
    return tqdm(
        total=run.config.max_steps,
        initial=run.step,
        unit="step",
        disable=run.world.rank != 0,
        mininterval=0.5 if terminal else 15.0,
        ascii=None if terminal else True,
        dynamic_ncols=terminal,
        desc=run.config.name,
        smoothing=0.1,
    )
