"""The training program: `torchrun ... -m controlbooth.trainer.train run.yaml [section.key=value ...]`.

Every rank runs this file. It reads the run, builds what the run names, goes on from the latest whole checkpoint where
there is one, and loops: step, log, validate, save, stop. Started again after whatever happened, it continues the run.
"""

import argparse
import json
import logging
import math
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; nothing here may reach a hub
os.environ.setdefault("DS_LOG_LEVEL", "error")

import torch
import yaml
from tqdm import tqdm

from controlbooth.data.arguments import quoted
from controlbooth.data.buckets import Buckets
from controlbooth.data.cache import Cache
from controlbooth.data.columns import Columns, open_columns
from controlbooth.data.condition_sizes import shrunk_lines
from controlbooth.data.loader import Loader, StepBatch
from controlbooth.data.long_captions import cut_captions
from controlbooth.data.manifest import Dataset, join_datasets, open_dataset, same_place
from controlbooth.data.plan import (
    check_version,
    continued_history,
    order_state,
    plan_order,
    resume_position,
    source_weights,
)
from controlbooth.data.readable import check_readable
from controlbooth.data.records import is_mapping, is_text, maybe, read_note
from controlbooth.data.secrets import error_text, shown
from controlbooth.data.tokens import told_of_cut
from controlbooth.models.attention import (
    KERNELS,
    AttentionChoice,
    AttentionShape,
    apply_attention,
    attention_shapes,
    choose_attention,
)
from controlbooth.models.base import Base
from controlbooth.models.controlnet import build_controlnet, denoise, keep_only_mid_control, parameter_report
from controlbooth.models.decoder import UnlockedNetwork
from controlbooth.models.families import encode_with_dropout
from controlbooth.models.pretrained import load_base, load_controlnet
from controlbooth.trainer import checkpoint as checkpoints
from controlbooth.trainer import engine as engines
from controlbooth.trainer import unlock as unlocking
from controlbooth.trainer.accelerators import device_name
from controlbooth.trainer.attempt import (
    Attempt,
    Superseded,
    check_still_ours,
    is_superseded,
    only_run,
    write_text,
)
from controlbooth.trainer.config import (
    ConfigError,
    OptimizerConfig,
    RunConfig,
    base_path,
    changes,
    dump,
    load_config,
    order_settings,
    run_folder,
    sources,
    tracking_uri,
)
from controlbooth.trainer.continuing import (
    SHAPING,
    check_position,
    check_same_run,
    check_unlocked,
    compared_with,
    describe_finished,
    is_finished,
)
from controlbooth.trainer.distributed import (
    DistError,
    World,
    all_max,
    all_sum,
    barrier,
    end_process,
    from_first_rank,
    gather_objects,
    join,
    leave,
)
from controlbooth.trainer.encoding import column_identities, computed_here
from controlbooth.trainer.evaluate.extract import Extract, extractor, tells_control
from controlbooth.trainer.evaluate.held_out import HeldOutSet, load_held_out
from controlbooth.trainer.evaluate.prompted import draw_prompts
from controlbooth.trainer.evaluate.validate import told, validate
from controlbooth.trainer.evaluate.verdict import (
    CONTROL,
    USUAL_STEPS,
    Verdict,
    as_tree,
    cannot_announce,
    describe,
    judge_run,
    read_verdict,
)
from controlbooth.trainer.failures import (
    FAILED,
    STATUS,
    RankFailed,
    end_superseded,
    failure_noted,
    note_refusal,
)
from controlbooth.trainer.network_check import network_problems
from controlbooth.trainer.run_page import describe_control, describe_training, inputs, training_tags
from controlbooth.trainer.same_base import back_or_anew, base_facts, check_same_base, told_of_base
from controlbooth.trainer.spool import read_metrics
from controlbooth.trainer.starting import refusals, refuse
from controlbooth.trainer.step import controlnet_step
from controlbooth.trainer.stragglers import Pace, slowest
from controlbooth.trainer.tracking import Status, Tracker
from controlbooth.trainer.watchdog import Watchdog, watching

IN_MLFLOW: dict[str, Status] = {"failed": "FAILED", "stopped": "KILLED", "finished": "FINISHED"}


ATTENTION = {
    "name": lambda name: name in ("xformers", *KERNELS),
    "reason": maybe(is_text),
    "by_shape": maybe(lambda chosen: is_mapping(chosen) and all(name in KERNELS for name in chosen.values())),
}
"""Fields of attention.json."""


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
    average: engines.Average | None
    dataset: Dataset
    loader: Loader
    held: HeldOutSet | None
    extract: Extract | None
    """Finds the trained kind of condition in pictures, where something does."""
    tracker: Tracker | None
    """On rank 0 only."""
    step: int
    """Optimizer steps taken; the next batch is the global batch of this number."""
    saving: checkpoints.Save | None = None
    """The checkpoint that is being written while training goes on; on every rank or on none."""
    saved_times: dict[str, float] = field(default_factory=dict)
    """When the metrics of the step that is being saved were logged, by name; on rank 0."""
    verdict: Verdict | None = None
    """On its control, as of the last validation, on every rank; None without held-out samples."""
    warned: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m controlbooth.trainer.train",
        description="One rank of a training. Start it with torchrun, deepspeed --module, or `controlbooth train`.",
    )
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from deepspeed; the environment has it too
    options = parser.parse_intermixed_args(argv)
    stop = StopRequest()
    rank = int(os.environ.get("RANK", "0"))
    quiet_libraries()
    try:
        config = load_config(options.run, options.overrides)
        return train(config, join(), stop)
    except Superseded as error:
        end_superseded(error, rank)
    except (ValueError, OSError, TrainingStopped, RankFailed, DistError) as error:
        print(f"rank {rank}: {error_text(error)}", file=sys.stderr, flush=True)
        note_refusal(rank, error)
        os._exit(FAILED)  # the other ranks may be inside a collective; torchrun ends them when this one is gone
    finally:
        leave()


def train(config: RunConfig, world: World, stop: "StopRequest") -> int:
    """Runs to max_steps, to its early stop or to a stop request. Returns 0 in all cases; status.json says which."""
    folder = run_folder(config)
    # Before the run's folder is taken, and by one rank: of a thousand, each would read the headers of the base.
    refuse(from_first_rank([*network_problems(config), *refusals(config)] if world.rank == 0 else []))
    with (
        only_run(folder, world) as attempt,
        failure_noted(attempt, config, world),
        watching(attempt, world, config.engine.hang_timeout_seconds) as watchdog,
    ):
        latest = checkpoints.latest_checkpoint(folder, world, partial(say, world))
        if latest is not None and is_finished(before := compared_with(latest, config), config):
            if world.rank == 0:
                send_what_is_left(attempt, config)
            say(world, describe_finished(before, config))
            return 0
        run = build(config, world, attempt, watchdog, latest)
        if world.rank == 0:
            write_text(attempt, folder / "config.yaml", dump(config))  # only now: it is the run's, and was accepted
            write_own_status(attempt, state="running", step=run.step)
        state = "failed"
        try:
            if run.held:
                note_verdict(run, validated=False)
            if run.held and not run.step and config.validation.at_start:
                validate_and_log(run)
            loop(run, stop)
            done = run.step >= config.max_steps or converged_long_ago(run)
            state = "finished" if done else "stopped"
        finally:
            run.loader.close()
            if world.rank == 0 and state != "failed":
                device = {"device_kind": world.device.type, "device": device_name(world.device)}
                own = {"precision": run.precision, "attention": run.attention, "world_size": world.world_size}
                write_speed(attempt, **own, **device)
                write_own_status(attempt, state=state, step=run.step)  # before MLflow, which may take its time
            if run.tracker is not None and not is_superseded(attempt):  # else the MLflow run is the other's too
                run.tracker.finish(IN_MLFLOW[state])
                run.tracker.close(timeout_seconds=30.0)
    say(world, f"{state} at step {run.step} of {config.max_steps}: {folder}")
    return 0


def send_what_is_left(attempt: Attempt, config: RunConfig) -> None:
    """Of a finished run whose server did not answer at its end, or which was killed on its very last line."""
    folder, tracker = attempt.run, open_tracker(attempt.run, config, {}, attempt)
    tracker.finish("FINISHED")
    tracker.close(timeout_seconds=30.0)
    state = checkpoints.read_state(checkpoints.complete_checkpoints(folder)[-1])
    if not (folder / "speed.json").exists():
        write_speed(attempt, precision=state["precision"], attention=state["attention"], world_size=state["world_size"])
    write_own_status(attempt, state="finished", step=state["step"])


def loop(run: Run, stop: "StopRequest") -> None:
    config, world = run.config, run.world
    bar = progress_bar(run)
    pace = Pace(world)
    backward = pace.before(lambda loss: engines.accumulate(run.engine, loss))
    skipped_in_a_row, first = 0, run.step
    started = time.perf_counter()
    while run.step < config.max_steps and not converged_long_ago(run):
        if unlocking.unlocks_now(config, run.step, run.engine):
            run.watchdog.begin("unlocking the decoder", run.step)
            if run.saving is not None:  # its thread writes through the engine that is about to go
                commit(run)
            unlock_decoder(run)
            first, started = run.step, time.perf_counter()
        run.watchdog.begin("the step" if run.step > first else "the first step", run.step + 1)
        pace.begin()
        batch = next(run.loader)

        # One optimizer step. Everything random about it was drawn from (seed, position).
        rates = unlocking.learning_rates(config, run.step, run.engine)
        losses = controlnet_step(
            run.base,
            run.engine,
            backward,
            batch.micro_batches,
            config.seed,
            config.optimizer.min_snr_gamma,
            world.device,
        )
        norm, skipped = engines.apply_gradients(run.engine, *rates.values())
        if run.average is not None and not skipped:
            run.average.update(run.step)
        run.step += 1

        # What it was worth and what it cost, over all ranks: the loss is the mean over ranks and micro-batches.
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        mean_loss = sum(losses) / len(losses) / world.world_size
        unwritten = float(run.saving is not None and not checkpoints.is_written(run.saving))
        counted = [mean_loss, float(stop.requested), float(batch.substitutions), float(batch.cache_hits), unwritten]
        loss, stops, substitutions, cache_hits, unwritten, *busy = all_sum([*counted, *pace.shares()])
        check_still_ours(run.attempt)
        waited, depth_short, fetch, decode, memory = all_max(
            [
                batch.wait_seconds,
                -float(batch.queue_depth),
                batch.fetch_seconds,
                batch.decode_seconds,
                peak_memory_gib(world),
            ]
        )
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        if skipped:
            report_skipped(run, batch, losses, norm, skipped_in_a_row)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            **rates,
            "samples_per_second": config.global_batch_size / seconds,
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
        if line := pace.note(busy, seconds):
            say(world, line)
        if run.tracker is not None:
            run.tracker.log(run.step, {name: value for name, value in metrics.items() if math.isfinite(value)})
        bar.set_postfix(
            loss=f"{loss:.4f}",
            samples_s=f"{metrics['samples_per_second']:.1f}",
            stall=f"{metrics['stall_percent']:.0f}%",
            refresh=False,
        )
        bar.update(1)

        if run.saving is not None and not unwritten:
            began = time.perf_counter()
            commit(run)
            note_stall(run, began)
            started = time.perf_counter()
        last = run.step == config.max_steps or converged_long_ago(run)
        figures = {"loss": loss}
        if run.held and not stops and (run.step % config.validation.every_steps == 0 or last):
            figures |= validate_and_log(run)
            started = time.perf_counter()
            last = last or converged_long_ago(run)
        if stops or last or run.step % config.checkpoint.every_steps == 0:
            began = time.perf_counter()
            save(run, figures)
            if stops or last:
                commit(run)
            note_stall(run, began)
            started = time.perf_counter()
        if stops:
            break
    bar.close()


def build(config: RunConfig, world: World, attempt: Attempt, watchdog: Watchdog, latest: Path | None) -> Run:
    """Everything that the run names, checked, on this rank's device, and at the latest checkpoint if there is one."""
    folder = attempt.run
    saved = checkpoints.read_state(latest) if latest else None
    if saved and latest:
        check_version(saved["order"], str(latest))
    request = config.engine.precision
    if saved and request == "auto":
        request = saved["precision"]  # a resume goes on in what the run was started with
    precision = engines.resolve_precision(request, world.device, config.engine.zero_stage)
    base = load_base(base_path(config), config.model.family, engines.DTYPES[precision], world.device)
    dataset, held = open_data(config, world)
    if world.rank == 0 and (cut := cut_captions(dataset, base.tokenizers, config.validation.prompts)):
        say(world, f"warning: {cut}")
    extract = extractor(held, {}, str(world.device)) if held else None
    if held is not None:
        check_told(config, held, extract, world)
        if world.rank == 0 and (line := told_of_cut(base.tokenizers, held.captions, "held-out captions")):
            say(world, f"warning: {line}")
    columns = open_run_columns(config, world, base, dataset)

    chosen = choose_once(config.model.attention, world, precision, attempt, lambda: unet_attention_shapes(config, base))
    torch.manual_seed(config.seed)  # the hint network, alike on every rank
    controlnet = make_controlnet(config, base)
    for module in (base.unet, controlnet):
        apply_attention(module, chosen)
    if config.model.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
        base.unet.enable_gradient_checkpointing()
    identity = dict(
        zero_stage=config.engine.zero_stage,
        precision=precision,
        base_digest=base.digest,
        condition=config.data.condition,
        model=config.model.model_dump(mode="json", include=SHAPING),
    )
    universal = unlocked = False
    if saved and latest:
        begun = f"at step {saved['step']}"
        check_same_base(saved, base, begun, back_or_anew(latest))
        for line in told_of_base(saved, begun):
            say(world, line)
        check_same_run(saved, identity, latest)
        unlocked = check_unlocked(saved, config, latest)
        universal = checkpoints.needs_universal(saved, world.world_size)
    report = parameter_report(controlnet)
    sizes = engines.batch_sizes(config, world.world_size)
    network = (UnlockedNetwork(controlnet, base) if unlocked else controlnet).to(world.device)
    groups = unlocking.parameter_groups(network)
    engine = engines.initialize(network, config.engine, config.optimizer, sizes, precision, universal, groups)

    checkpoints.check_space(engine, folder, world)  # now, and not after all steps up to the first checkpoint
    average = None if config.optimizer.ema_decay is None else engines.Average(engine, config.optimizer.ema_decay)
    step = 0
    if saved and latest:
        read = unlocking.read_networks if unlocked else checkpoints.read_controlnet
        checkpoints.load_checkpoint(engine, latest, average, world, attempt, read)
        engines.apply_settings(engine, config.optimizer)
        if unlocked:
            unlocking.restore_moment_steps(engine, saved["moment_steps"])
        step = saved["step"]
    loader = make_loader(config, world, base, dataset, step, folder, saved and saved["order"], columns)
    if saved:
        check_position(resume_position(saved["order"], loader.order, dataset.fingerprint), step, config)
    say(
        world,
        f"ControlNet {report.total:,} parameters (copy {report.copy:,}, zero convolutions "
        f"{report.zero_convolutions:,}, hint {report.hint:,}) on {base.family.title}; "
        f"{precision}, ZeRO-{config.engine.zero_stage}, "
        f"{world.world_size} ranks on {world.device.type}; attention {chosen.name}: {chosen.reason}",
    )
    if precision == "fp32" and config.engine.precision == "auto" and world.device.type == "cpu":
        say(
            world,
            "engine.precision=auto: this processor has no bf16 units, so the run is in fp32 (bf16 would be slower)",
        )
    if latest:
        say(world, f"going on from {latest} at step {step}")
        say_changes(world, config, (latest / "config.yaml").read_text(), step)
    run = Run(
        config,
        world,
        attempt,
        watchdog,
        folder,
        precision,
        chosen.name,
        base,
        engine,
        average,
        dataset,
        loader,
        held,
        extract,
        tracker=None,
        step=step,
    )
    if world.rank == 0:
        run.tracker = make_tracker(run, report.total)
        run.tracker.cut_back(step if latest else -1)
    return run


def choose_once(
    request: str, world: World, precision: str, attempt: Attempt, shapes: Callable[[], Sequence[AttentionShape]]
) -> AttentionChoice:
    """The kernels, chosen on rank 0, and with `auto` only at the run's first start: others round otherwise.

    attention.json is a note of that choice: where it is damaged, it is told, and chosen anew.
    """
    remembered = attempt.run / "attention.json"
    chosen = None
    if world.rank == 0:
        before = read_note(remembered, "The kernels are chosen anew", ATTENTION) if request == "auto" else {}
        dtype = engines.DTYPES[precision]
        chosen = asdict(choose_attention(before.get("name", request), world.device, dtype, shapes()))
        if before:
            chosen |= {"by_shape": before.get("by_shape") or {}, "reason": "as at the run's first start"}
        write_text(attempt, remembered, json.dumps({**chosen, "reason": before.get("reason") or chosen["reason"]}))
    return AttentionChoice(**from_first_rank(chosen))


def say_changes(world: World, config: RunConfig, before: str, step: int) -> None:
    """What was set anew since the checkpoint, as that holds from here on. before: the configuration that it holds."""
    if changed := changes(before, dump(config)):
        say(world, f"changed since step {step}: {'; '.join(changed)}")
    saved = yaml.safe_load(before)
    old = OptimizerConfig(**{name: saved["optimizer"][name] for name in ("learning_rate", "schedule", "warmup_steps")})
    was = engines.learning_rate(old, step, saved["max_steps"])
    now = engines.learning_rate(config.optimizer, step, config.max_steps)
    if not math.isclose(was, now):
        say(world, f"warning: by that the learning rate of step {step} is {now:.4g}, and was to be {was:.4g}")


def unet_attention_shapes(config: RunConfig, base: Base) -> tuple[AttentionShape, ...]:
    """Those of one micro-batch's pass, for choosing the kernel by timing it."""
    resolution = config.data.resolution
    size = resolution // base.family.vae_factor
    latents = torch.zeros(config.micro_batch_size, base.unet.config["in_channels"], size, size, device=base.device)
    text = encode_with_dropout(base, [""] * len(latents), picture_size=(resolution, resolution))
    timesteps = torch.zeros(len(latents), dtype=torch.int64, device=base.device)
    return attention_shapes(base.unet, lambda: denoise(base.unet, latents, timesteps, text))


def open_data(config: RunConfig, world: World) -> tuple[Dataset, HeldOutSet | None]:
    """The training shards and the held-out set, checked to be apart. Rank 0 indexes what has no index yet."""
    locations = [source.shards for source in sources(config)]
    if world.rank == 0:
        for location in [*locations, config.data.held_out]:
            if location:
                open_dataset(location, index_missing=True)
    barrier()
    dataset = join_datasets([open_dataset(location) for location in locations])
    check_readable(dataset, config.data.condition, config.data.max_pixels, pictures=config.data.columns is None)
    if world.rank == 0 and (lines := shrunk_lines(dataset, config.data.condition, config.data.resolution)):
        say(world, f"warning: {lines}")
    if not config.data.held_out:
        return dataset, None
    held_out = open_dataset(config.data.held_out)
    check_held_out(dataset, held_out)
    data = config.data
    held = load_held_out(held_out, config.validation.samples, data.condition, data.resolution, data.max_pixels)
    return dataset, held


def check_held_out(dataset: Dataset, held_out: Dataset) -> None:
    """Raises ConfigError where a shard is in both sets, or a copy of it is, under whatever name."""
    if shared := set(map(same_place, dataset.paths)) & set(map(same_place, held_out.paths)):
        raise ConfigError(f"data.held_out and the training data share {shown(min(shared))}: hold other shards out")
    trained = {row.index_hash: row.uri for row in dataset.rows}
    if copies := [row for row in held_out.rows if row.index_hash in trained]:
        raise ConfigError(
            f"{shown(copies[0].uri)} of data.held_out holds the same samples as "
            f"{shown(trained[copies[0].index_hash])}, which is "
            "trained on: hold other shards out"
        )


def check_told(config: RunConfig, held: HeldOutSet, extract: Extract | None, world: World) -> None:
    """Says where control can never be announced. Raises ConfigError where the run is to end by that."""
    patience = config.validation.stop_after_convergence
    if why := cannot_announce(config):
        if patience is not None:
            raise ConfigError(f"validation.stop_after_convergence={patience} would never end the run: {why}")
        say(world, f"warning: {why}")
    elif patience is not None and not tells_control(held, extract):
        raise ConfigError(
            f"validation.stop_after_convergence={patience} would never end the run: no figure tells control of "
            f"{held.kind} in pictures of {config.data.held_out}. Leave it out, or put edges there too, which are "
            f"always measured: `controlbooth data annotate {quoted(config.data.held_out)} -o FOLDER --condition canny`"
        )


def make_controlnet(config: RunConfig, base: Base) -> Any:
    model = config.model
    if model.controlnet == "unet":
        return build_controlnet(
            base.unet,
            model.hint_channels,
            trainable_copy=model.trainable_copy,
            connections=model.connections,
            hint_network=model.hint_network,
            only_mid_control=model.only_mid_control,
        ).float()
    controlnet = load_controlnet(model.controlnet, base.unet)
    if model.only_mid_control:
        keep_only_mid_control(controlnet)
    return controlnet


def make_loader(
    config: RunConfig,
    world: World,
    base: Base,
    dataset: Dataset,
    step: int,
    folder: Path,
    order: dict[str, Any] | None = None,
    columns: Columns | None = None,
) -> Loader:
    """order: the data order of the checkpoint that the run goes on from."""
    data = config.data
    size = data.resolution // base.family.vae_factor
    check_aspect_step(config, base)
    mixed = sources(config)
    weights = source_weights(
        dataset, data.condition, [source.weight for source in mixed], [source.repeat for source in mixed]
    )
    history = continued_history(order, weights)
    if order is not None and len(history) > len(order["weights"]):
        say(world, f"from step {step} on the sources have the weights {weights}, before {order['weights'][-1][1]}")
    return Loader(
        dataset,
        **order_settings(config),
        micro_batch_size=config.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        condition_kind=data.condition,
        prompt_dropout=data.prompt_dropout,
        random_flip=data.random_flip,
        random_crop=data.random_crop,
        num_train_timesteps=int(base.noise_scheduler.config["num_train_timesteps"]),
        latent_shape=(base.unet.config["in_channels"], size, size),
        threads=data.threads,
        prefetch_steps=data.prefetch_steps,
        start_step=step,
        max_bad_rate=data.max_bad_rate,
        ledger_path=folder / f"bad-samples-{world.rank}.jsonl",
        cache=Cache(data.cache, int(data.cache_gib * 2**30)) if data.cache else None,
        ranks_per_node=world.ranks_per_node,
        history=history,
        columns=columns,
        max_pixels=data.max_pixels,
    )


def run_buckets(config: RunConfig, dataset: Dataset) -> Buckets:
    """The picture shapes of the run's order, and which samples have which."""
    return plan_order(dataset, config.data.condition, **order_settings(config))[1]


def open_run_columns(config: RunConfig, world: World, base: Base, dataset: Dataset) -> Columns | None:
    """The columns that the run names, all there and of its encoders, pictures and shards; None where it names none."""
    folder = config.data.columns
    if folder is None:
        return None
    buckets = run_buckets(config, dataset)
    columns = open_columns(folder, dataset, buckets, column_identities(config, base, buckets.shapes))
    here, there = computed_here(config, world.device), columns.computed
    if list(there) == [here]:
        say(world, f"columns of {folder}: bitwise what this run would compute")
    else:
        facts = f"computed with {', '.join(map(str, there))}, where this run would compute with {here}"
        say(world, f"columns of {folder}: {facts}; last bits may differ")
    return columns


def check_aspect_step(config: RunConfig, base: Base) -> None:
    """Raises ConfigError where the U-Net cannot halve the latents of the planned shapes as often as it does."""
    needed = base.family.vae_factor * 2 ** (len(base.unet.config["block_out_channels"]) - 1)
    if config.data.max_aspect_ratio > 1.0 and config.data.aspect_step % needed:
        raise ConfigError(
            f"data.aspect_step={config.data.aspect_step} is not a multiple of {needed}, by which {base.family.title} "
            f"shrinks a picture. Set data.aspect_step={needed}"
        )


def unlock_decoder(run: Run) -> None:
    """From here on the base's decoder learns too. Called by every rank, between two steps."""
    controlnet, shares = unlocking.take_out(run.engine, run.average)
    run.engine = run.average = None
    run.engine, run.average = unlocking.unlocked_engine(
        controlnet, shares, run.base, run.config, run.precision, run.world.world_size
    )
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.decoder.parameters())
    rate = run.config.optimizer.decoder_learning_rate
    say(run.world, f"step {run.step}: the base's decoder learns from here on, {parameters:,} parameters at {rate:g}")


def validate_and_log(run: Run) -> dict[str, float]:
    """Samples and measures on all ranks; rank 0 logs the figures and the picture. Returns the figures."""
    assert run.held is not None
    run.watchdog.begin("the validation", run.step)
    grid = run.folder / "samples" / f"step-{run.step:08d}.png"
    prompted = grid.parent / "prompts" / grid.name
    began = time.perf_counter()
    with engines.averaged_weights(run.engine, run.average):
        figures = validate(
            run.base,
            run.engine.module,
            run.held,
            run.config.validation,
            run.world,
            grid,
            run.extract,
            run.attempt,
        )
        if run.config.validation.prompts:
            draw_prompts(run.base, run.engine.module, run.held, run.config.validation, run.world, prompted, run.attempt)
    if run.tracker is not None:
        run.tracker.log(run.step, {f"validation/{name}": value for name, value in figures.items()})
        run.tracker.log_image(grid, "samples", run.step)
        if run.config.validation.prompts:
            run.tracker.log_image(prompted, "prompts", run.step)
    say(run.world, f"step {run.step}: {told(figures)} ({time.perf_counter() - began:.0f} s)")
    note_verdict(run, validated=True)
    return figures


def note_verdict(run: Run, validated: bool) -> None:
    """Judges the validations up to now, on rank 0's disk; writes, says and tags what is new. Called by every rank.

    validated: this step was just validated, so that it gets a point in the curves of MLflow. Without, it is a start,
    whose validations may have been cut back to its checkpoint's step, and the verdict with them.
    """
    assert run.held is not None
    verdict = None
    if run.world.rank == 0:
        before = run.verdict if validated else read_verdict(run.folder)
        verdict = judge_run(run.folder, len(run.held.keys))
        write_text(run.attempt, run.folder / CONTROL, json.dumps(as_tree(verdict), indent=1))
        if validated and verdict.announced and run.tracker is not None:
            run.tracker.log(run.step, {"convergence/step": verdict.announced.step})
        changed = verdict.events != (before.events if before else ())
        if changed or (verdict.events and not validated):
            tell_verdict(run, verdict, "" if validated or not changed else f"as of step {run.step}: ")
        elif not verdict.events and run.step > USUAL_STEPS and not run.warned:
            say(run.world, "warning: " + describe(verdict))
            run.warned = True
        if verdict.figure and run.tracker is not None:
            run.tracker.describe(control=describe_control(describe(verdict)))
    run.verdict = from_first_rank(verdict)


def tell_verdict(run: Run, verdict: Verdict, since: str) -> None:
    """Says it, and tags it in MLflow. since: what is said before it."""
    say(run.world, since + describe(verdict))
    if run.tracker is not None:
        step = str(verdict.announced.step) if verdict.announced else "withdrawn" if verdict.events else "not yet"
        run.tracker.set_tags({"converged_at_step": step})


def converged_long_ago(run: Run) -> bool:
    """Whether the run was asked to end now, because control came long enough ago."""
    patience = run.config.validation.stop_after_convergence
    announced = run.verdict.announced if run.verdict else None
    return patience is not None and announced is not None and run.step >= announced.step + patience


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
        precision=run.precision,
        attention=run.attention,
        world_size=run.world.world_size,
        metrics={name: value for name, value in figures.items() if math.isfinite(value)},  # JSON has no others
        unlocked=unlocking.is_unlocked(run.engine),
    )
    write = checkpoints.write_controlnet
    if unlocking.is_unlocked(run.engine):
        write = unlocking.write_networks
        state |= dict(unlocked_at=run.config.model.unlock_decoder_at, moment_steps=unlocking.moment_steps(run.engine))
    run.saved_times = {} if run.tracker is None else run.tracker.times(run.step)
    run.saving = checkpoints.begin_save(
        run.engine, run.folder, state, dump(run.config), run.average, run.world, run.attempt, write_weights=write
    )


def note_stall(run: Run, began: float) -> None:
    """began: of time.perf_counter(), when training stood still for a checkpoint."""
    if run.tracker is not None:
        run.tracker.log(run.step, {"checkpoint_stall_seconds": time.perf_counter() - began})


def commit(run: Run) -> None:
    """Makes a checkpoint of what has been written, on every rank; then rank 0 tells of it and deletes older ones."""
    assert run.saving is not None
    run.watchdog.begin("the checkpoint", run.step)
    folder = checkpoints.finish_save(run.saving, run.world)
    run.saving = None
    if run.tracker is not None:
        saved = checkpoints.read_state(folder)
        named = {name if name == "loss" else f"validation/{name}": value for name, value in saved["metrics"].items()}
        run.tracker.log_checkpoint(saved["step"], saved["digest"], folder.absolute().as_uri(), named, run.saved_times)
        keep = run.config.checkpoint
        checkpoints.prune(run.folder, keep.keep, keep.keep_best, run.attempt, folder)
        write_own_status(run.attempt, state="running", step=saved["step"])
    barrier()


def report_skipped(run: Run, batch: StepBatch, losses: list[float], norm: float, in_a_row: int) -> None:
    """Says which samples made a step without finite gradients; raises TrainingStopped when that goes on."""
    suspects = [
        f"{run.dataset.paths[shard]}:{key}"  # as `data explain` takes it: keys may repeat
        for loss, micro in zip(losses, batch.micro_batches, strict=True)
        if not math.isfinite(loss)
        for key, (shard, row) in zip(micro.keys, micro.places.tolist(), strict=True)
        if row >= 0
    ]
    everyone = [name for names in gather_objects(suspects, run.world) for name in names]
    where = f"the loss of {', '.join(everyone[:8])} is not finite" if everyone else "all losses are finite"
    say(run.world, f"step {run.step} skipped: gradient norm {norm}; {where} ({in_a_row} in a row)")
    if in_a_row > run.config.optimizer.max_skipped_steps:
        raise TrainingStopped(
            f"{in_a_row} steps in a row had no finite gradient, up to step {run.step}; {where}. Look at these samples, "
            f"lower optimizer.learning_rate={run.config.optimizer.learning_rate}, or use engine.precision=fp32 or bf16"
        )


def make_tracker(run: Run, parameters: int) -> Tracker:
    config, world = run.config, run.world
    held_out = open_dataset(config.data.held_out) if config.data.held_out else None
    device = device_name(world.device)
    tags = training_tags(
        config,
        run.base.family.name,
        {
            "dataset_fingerprint": run.dataset.fingerprint,
            "base_digest": run.base.digest,
            "attention": run.attention,
            "precision": run.precision,
            "world_size": world.world_size,
            "zero_stage": config.engine.zero_stage,
            "device": device,
            "controlnet_parameters": parameters,
        },
    )
    tracker = open_tracker(run.folder, config, tags, run.attempt, partial(tell_page, world))
    tracker.log_inputs(inputs(config, run.dataset, held_out))
    machine = (
        f"{world.world_size} rank{'s' * (world.world_size > 1)} on {device}, {run.precision}, "
        f"ZeRO-{config.engine.zero_stage}, attention {run.attention}; {parameters:,} parameters"
    )
    title = run.base.family.title
    tracker.describe(**describe_training(config, run.folder, title, run.dataset, held_out, machine))
    return tracker


def tell_page(world: World, ways: Sequence[str]) -> None:
    say(world, f"MLflow: {', then '.join(ways)}")


def open_tracker(
    folder: Path,
    config: RunConfig,
    tags: dict[str, str],
    attempt: Attempt | None = None,
    tell: Callable[[Sequence[str]], None] | None = None,
) -> Tracker:
    """attempt: the start that has taken the run; without one, what is logged goes beside what a training may log.

    tell: as Tracker has it.
    """
    return Tracker(
        folder,
        tracking_uri(config),
        config.tracking.experiment,
        config.name,
        params=config.model_dump(mode="json"),
        tags=tags,
        system_metrics_seconds=config.tracking.system_metrics_seconds,
        made_in=attempt.folder if attempt else None,
        tell=tell,
    )


class StopRequest:
    """Set by SIGTERM (and SIGINT of a rank that runs by hand): the loop ends after its step, with a checkpoint."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True


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


def say(world: World, message: str) -> None:
    if world.rank == 0:
        tqdm.write(message, file=sys.stderr)


def write_own_status(attempt: Attempt, **fields: Any) -> None:
    write_text(attempt, attempt.run / STATUS, json.dumps(fields | {"attempt": attempt.number, "time": time.time()}))


def peak_memory_gib(world: World) -> float:
    """The most that this rank has held: of the GPU where there is one, else of its process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def write_speed(attempt: Attempt, **facts: Any) -> None:
    """speed.json: medians over the run's logged steps, the first three of which still warm up. Without any, as of a
    run whose metrics.jsonl is gone, there is none."""
    told = ("step_seconds", "samples_per_second", "stall_percent", "peak_memory_gib")
    steps = [metrics for _, _, metrics in read_metrics(attempt.run) if metrics.keys() >= {*told}]
    steps = steps[3:] or steps
    if not steps:
        return
    medians = {name: median(m[name] for m in steps) for name in ("step_seconds", "samples_per_second", "stall_percent")}
    peak = max(m["peak_memory_gib"] for m in steps)
    text = json.dumps(medians | {"peak_memory_gib": peak, "steps": len(steps)} | facts)
    write_text(attempt, attempt.run / "speed.json", text)


def quiet_libraries() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


if __name__ == "__main__":
    end_process(main())
