"""Builds all that a ControlNet run names, checked, on this rank's device, at its latest checkpoint if it has one."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from controlbooth.data.arguments import quoted
from controlbooth.data.condition_names import Values
from controlbooth.data.conditions.values import ConditionValues
from controlbooth.data.loading.loader import Loader
from controlbooth.data.loading.long_captions import cut_captions
from controlbooth.data.loading.plan import check_version, continued_history, resume_position, source_weights
from controlbooth.data.loading.tokens import describe_cut
from controlbooth.data.order.settings import DrawSettings
from controlbooth.data.shards.cache import Cache
from controlbooth.data.shards.latent_cache import LatentCache, open_latent_cache
from controlbooth.data.shards.manifest import Dataset, open_dataset
from controlbooth.models.attention import AttentionChoice, apply_attention, kernels_for
from controlbooth.models.base import Base
from controlbooth.models.denoisers import flux_control_lora
from controlbooth.models.denoisers.control_lora import share_weights
from controlbooth.models.denoisers.registry import (
    ParameterReport,
    denoiser_of,
    parameter_report,
    predicts_alone,
    reads_latents,
)
from controlbooth.models.denoisers.unet import build_controlnet, keep_only_mid_control
from controlbooth.models.families import identify
from controlbooth.models.pretrained import load_control_lora, load_controlnet, read_controlnet_folder
from controlbooth.models.recomputing import recompute
from controlbooth.models.unlocked_decoder import UnlockedNetwork
from controlbooth.trainer.config.loading import changes, dump
from controlbooth.trainer.config.run import (
    FrozenConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    activation_problems,
    order_settings,
    sources,
)
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.controlnet import unlock as unlocking
from controlbooth.trainer.controlnet.data import open_data, run_buckets
from controlbooth.trainer.controlnet.rates import parameter_groups
from controlbooth.trainer.controlnet.session import Run
from controlbooth.trainer.controlnet.trial import base_attention_shapes, compile_where_right
from controlbooth.trainer.encoding import computed_here, latent_cache_identities
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine import ema
from controlbooth.trainer.engine.device import device_name
from controlbooth.trainer.engine.distributed import World, on_first_rank
from controlbooth.trainer.evaluation.extract import Extract, extractor, measures_control
from controlbooth.trainer.evaluation.held_out import HeldOutSet
from controlbooth.trainer.evaluation.verdict import cannot_announce
from controlbooth.trainer.run import checkpoint as checkpoints
from controlbooth.trainer.run import saving as savings
from controlbooth.trainer.run.attempt import Attempt
from controlbooth.trainer.run.attention import choose_once
from controlbooth.trainer.run.base import once_a_machine, open_base, with_usual_guidance
from controlbooth.trainer.run.continuing import check_position, check_same_run, check_unlocked, shaping
from controlbooth.trainer.run.frozen import describe_frozen, hold_base, loading_device, quantize_encoders
from controlbooth.trainer.run.process import say
from controlbooth.trainer.run.same_base import back_or_anew, check_same_base, describe_base_changes
from controlbooth.trainer.run.watchdog import Watchdog
from controlbooth.trainer.tracking.open import open_tracker, report_page
from controlbooth.trainer.tracking.run_page import describe_training, inputs, training_tags
from controlbooth.trainer.tracking.tracker import Tracker


def build(config: RunConfig, world: World, attempt: Attempt, watchdog: Watchdog, latest: Path | None) -> Run:
    """Builds everything that the run names, checked, on this rank's device, and at the latest checkpoint if any."""
    saved = on_first_rank(lambda: checkpoints.read_state(latest), world) if latest else None
    if saved and latest:
        check_version(saved["order"], str(latest))
    for problem in activation_problems(config.engine, world.device.type == "cuda"):
        raise ConfigError(problem)
    precision = settle_precision(config, world, saved)
    base = open_base(config, engines.DTYPES[precision], loading_device(config, world.device), once_a_machine(world))
    quantize_encoders(config, base)
    config = with_usual_guidance(config, base)
    dataset, held, extract = open_inputs(config, world, base)
    latent_cache = open_run_latent_cache(config, world, base, dataset)
    controlnet, chosen = load_networks(config, world, attempt, base, precision)
    report = parameter_report(controlnet)
    unlocked = bool(saved and latest and check_saved(saved, latest, config, world, base, precision))
    engine, average = make_engine(config, world, attempt, base, controlnet, precision, saved, latest, unlocked)
    step = saved["step"] if saved else 0
    loader = make_loader(config, world, base, dataset, step, attempt.run, saved and saved["order"], latent_cache)
    if saved:
        check_position(resume_position(saved["order"], loader.order, dataset.fingerprint), step, config)
    run = Run(
        config, world, attempt, watchdog, attempt.run, precision, chosen.name, base, engine, average, dataset, loader,
        held, extract, tracker=None, step=step,
    )  # fmt: skip
    announce(run, report, chosen, latest)
    if world.rank == 0:
        run.tracker = make_tracker(run, report.total)
        run.tracker.cut_back(step if latest else -1)
    return run


def settle_precision(config: RunConfig, world: World, saved: Mapping[str, Any] | None) -> str:
    """Settles fp32, fp16 or bf16. saved: of the checkpoint; a resume goes on in what the run was started with."""
    request = config.engine.precision
    if saved and request == "auto":
        request = saved["precision"]
    return engines.resolve_precision(request, world.device, config.engine.zero_stage)


def open_inputs(config: RunConfig, world: World, base: Base) -> tuple[Dataset, HeldOutSet | None, Extract | None]:
    """Opens what the run trains on and what it is measured on, and tells of captions that the base cuts."""
    dataset, held = open_data(config, world)
    if world.rank == 0 and (cut := cut_captions(dataset, base.tokenizers, config.validation.prompts)):
        say(world, f"warning: {cut}")
    if held is None:
        return dataset, None, None
    extract = extractor(held, {}, str(world.device))
    check_measurable(config, held, extract, world)
    if world.rank == 0 and (line := describe_cut(base.tokenizers, held.captions, "held-out captions")):
        say(world, f"warning: {line}")
    return dataset, held, extract


def load_networks(
    config: RunConfig, world: World, attempt: Attempt, base: Base, precision: str
) -> tuple[Any, AttentionChoice]:
    """Makes the ControlNet, holds the base as the run asks, and sets the attention kernels of both networks, alike on
    every rank."""
    torch.manual_seed(config.seed)  # the hint network, alike on every rank
    controlnet = make_controlnet(config, base)
    hold_base(config, base, world)
    if predicts_alone(controlnet):  # with the base's weights, as they are held now
        share_weights(controlnet, base.denoiser)
    kernels = kernels_for(base.family.is_transformer)
    shapes = partial(base_attention_shapes, config, base)
    if config.model.frozen.shards != "none":  # a pass through the base is for all ranks, and rank 0 alone chooses
        found = shapes()
        shapes = partial(tuple, found)
    chosen = choose_once(config.model.attention, world, precision, attempt, shapes, kernels)
    for module in (base.denoiser, controlnet):
        apply_attention(module, chosen)
        recompute(module, config.model.gradient_checkpointing)
    if config.engine.compile:
        compile_where_right(config, world, base, controlnet, engines.DTYPES[precision])
    return controlnet, chosen


def check_saved(
    saved: Mapping[str, Any], latest: Path, config: RunConfig, world: World, base: Base, precision: str
) -> bool:
    """Raises ConfigError where a checkpoint is of another run or base; -> whether the decoder learns in it already."""
    begun = f"at step {saved['step']}"
    check_same_base(saved, base, begun, back_or_anew(latest))
    for line in describe_base_changes(saved, begun):
        say(world, line)
    identity = dict(
        zero_stage=config.engine.zero_stage,
        precision=precision,
        base_digest=base.digest,
        condition=config.data.condition,
        optimizer=config.optimizer.name,
        model=shaping(config),
    )
    check_same_run(saved, identity, latest)
    return check_unlocked(saved, config, latest)


def make_engine(
    config: RunConfig,
    world: World,
    attempt: Attempt,
    base: Base,
    controlnet: Any,
    precision: str,
    saved: Mapping[str, Any] | None,
    latest: Path | None,
    unlocked: bool,
) -> tuple[Any, ema.Average | None]:
    """Makes DeepSpeed's engine and the weights' average, both as the checkpoint has them where there is one."""
    universal = bool(saved) and checkpoints.needs_universal(saved, world.world_size)
    sizes = engines.batch_sizes(config, world.world_size)
    network = (UnlockedNetwork(controlnet, base) if unlocked else controlnet).to(world.device)
    groups = parameter_groups(network)
    engine = engines.initialize(network, config.engine, config.optimizer, sizes, precision, universal, groups)
    savings.check_space(engine, attempt.run, world)  # now, and not after all steps up to the first checkpoint
    average = None if config.optimizer.ema_decay is None else ema.Average(engine, config.optimizer.ema_decay)
    if saved and latest:
        read = unlocking.read_networks if unlocked else checkpoints.read_controlnet
        checkpoints.load_checkpoint(engine, latest, average, world, attempt, read)
        engines.apply_settings(engine, config.optimizer)
        if unlocked:
            unlocking.restore_moment_steps(engine, saved["moment_steps"])
    return engine, average


def announce(run: Run, report: ParameterReport, chosen: AttentionChoice, latest: Path | None) -> None:
    """Says what is trained, how, and from where it goes on."""
    config, world = run.config, run.world
    say(
        world,
        f"{describe_trained(config, report, run.base)} on {run.base.family.title}; "
        f"{run.precision}, ZeRO-{config.engine.zero_stage}, "
        f"{world.world_size} ranks on {world.device.type}; attention {chosen.name}: {chosen.reason}",
    )
    if line := describe_frozen(config, run.base, world):
        say(world, line)
    if run.precision == "fp32" and config.engine.precision == "auto" and world.device.type == "cpu":
        say(
            world,
            "engine.precision=auto: this processor has no bf16 units, so the run is in fp32 (bf16 would be slower)",
        )
    if latest:
        say(world, f"going on from {latest} at step {run.step}")
        if world.rank == 0:
            report_changes(world, config, (latest / "config.yaml").read_text(), run.step)


def describe_trained(config: RunConfig, report: ParameterReport, base: Base) -> str:
    """Says how many parameters are trained, and of what."""
    rank = config.model.rank
    if config.model.method == "lora" and base.family.is_transformer:
        whole = sum(getattr(one, "ds_numel", one.numel()) for one in base.denoiser.parameters())
        share = f", {report.total / whole:.1%} of the base's" if config.model.frozen == FrozenConfig() else ""
        return (
            f"control-LoRA {report.total:,} parameters{share} (differences of rank {rank} in the blocks "
            f"{report.copy:,}, where the condition enters {report.hint:,})"
        )
    copy = "copy" if config.model.method == "full" else f"differences from the copy, of rank {rank},"
    return (
        f"ControlNet {report.total:,} parameters ({copy} {report.copy:,}, zero convolutions "
        f"{report.zero_convolutions:,}, hint {report.hint:,})"
    )


def report_changes(world: World, config: RunConfig, before: str, step: int) -> None:
    """Prints which settings have changed since the checkpoint, and warns where they change the learning rate of this
    step.

    before: the configuration that the checkpoint holds, as YAML.
    """
    if changed := changes(before, dump(config)):
        say(world, f"changed since step {step}: {'; '.join(changed)}")
    saved = yaml.safe_load(before)
    old = OptimizerConfig(**{name: saved["optimizer"][name] for name in ("learning_rate", "schedule", "warmup_steps")})
    was = engines.learning_rate(old, step, saved["max_steps"])
    now = engines.learning_rate(config.optimizer, step, config.max_steps)
    if not math.isclose(was, now):
        say(world, f"warning: by that the learning rate of step {step} is {now:.4g}, and was to be {was:.4g}")


def check_measurable(config: RunConfig, held: HeldOutSet, extract: Extract | None, world: World) -> None:
    """Says where control can never be announced. Raises ConfigError where the run is to end by that."""
    patience = config.validation.stop_after_convergence
    if why := cannot_announce(config):
        if patience is not None:
            raise ConfigError(f"validation.stop_after_convergence={patience} would never end the run: {why}")
        say(world, f"warning: {why}")
    elif patience is not None and not measures_control(held, extract):
        raise ConfigError(
            f"validation.stop_after_convergence={patience} would never end the run: no figure tells control of "
            f"{held.kind} in pictures of {config.data.held_out}. Leave it out, or put edges there too, which are "
            f"always measured: `controlbooth data annotate {quoted(config.data.held_out)} -o FOLDER --condition canny`"
        )


def make_controlnet(config: RunConfig, base: Base) -> Any:
    model = config.model
    if model.controlnet == "unet":
        return new_controlnet(base.denoiser, model)
    controlnet = continued_controlnet(base.denoiser, model)
    if model.only_mid_control:
        keep_only_mid_control(controlnet)
    return controlnet


def continued_controlnet(network: Any, model: ModelConfig) -> Any:
    """Reads the ControlNet that a run goes on from, in float32. Raises as `load_controlnet` and `load_control_lora`."""
    if model.method == "lora":
        return load_control_lora(model.controlnet, network, model.rank)
    controlnet = load_controlnet(model.controlnet, network)
    if predicts_alone(controlnet):
        raise ConfigError(
            f"model.controlnet={model.controlnet} is a control-LoRA of FLUX.1, which has no whole form: go on with "
            f"model.method=lora and model.rank={controlnet.config['rank']}, or begin anew with model.controlnet=base"
        )
    return controlnet


def new_controlnet(network: Any, model: ModelConfig, device: str | torch.device | None = None) -> Any:
    """Makes the ControlNet that a run begins with, on the device of the base's network unless another is named."""
    if (denoiser := denoiser_of(network)).is_transformer:
        if model.method == "lora":
            return flux_control_lora.build_controlnet(network, model.rank, device)
        family = identify({**network.config, "_class_name": type(network).__name__})
        entry = model.condition_entry or family.condition_entry
        widths = model.hint_channels if entry == "pixels" else None
        return denoiser.file.build_controlnet(network, model.copied_blocks, device, hint_channels=widths)
    return build_controlnet(
        network,
        model.hint_channels,
        device,
        trainable_copy=model.trainable_copy,
        connections=model.connections,
        hint_network=model.hint_network,
        only_mid_control=model.only_mid_control,
        rank=model.rank if model.method == "lora" else None,
    )


def make_loader(
    config: RunConfig,
    world: World,
    base: Base,
    dataset: Dataset,
    step: int,
    folder: Path,
    order: dict[str, Any] | None = None,
    latent_cache: LatentCache | None = None,
) -> Loader:
    """Makes the loader of the training data, which begins at `step`.

    order: the data order in the checkpoint that the run goes on from; None in a new run. Raises ConfigError as
    `check_aspect_step` does.
    """
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
        order_settings(config),
        DrawSettings(
            data.prompt_dropout,
            data.random_flip,
            data.random_crop,
            base.process.levels,
            base.process.thresholds,
        ),
        micro_batch_size=config.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        latent_shape=(base.latent_channels, size, size),
        threads=data.threads,
        prefetch_steps=data.prefetch_steps,
        start_step=step,
        max_bad_rate=data.max_bad_rate,
        ledger_path=folder / f"bad-samples-{world.rank}.jsonl",
        cache=Cache(data.cache, int(data.cache_gib * 2**30)) if data.cache else None,
        ranks_per_node=world.ranks_per_node,
        history=history,
        latent_cache=latent_cache,
        max_pixels=data.max_pixels,
    )


def open_run_latent_cache(config: RunConfig, world: World, base: Base, dataset: Dataset) -> LatentCache | None:
    """Opens the latent cache of the run, whole and of its encoders, pictures and shards; None where it names none."""
    folder = config.data.latent_cache
    if folder is None:
        return None
    buckets = run_buckets(config, dataset)
    identities = latent_cache_identities(config, base, buckets.shapes, cached_values(config, base, dataset))
    latent_cache = open_latent_cache(folder, dataset, buckets, identities)
    here, there = computed_here(config, world.device), latent_cache.computed
    if list(there) == [here]:
        say(world, f"latent cache in {folder}: bitwise what this run would compute")
    else:
        facts = f"computed with {', '.join(map(str, there))}, where this run would compute with {here}"
        say(world, f"latent cache in {folder}: {facts}; last bits may differ")
    return latent_cache


def cached_values(config: RunConfig, base: Base, dataset: Dataset) -> Values | None:
    """Returns what the run's condition is resized as where its ControlNet reads latents, which the latent cache then
    holds too; None where it reads pixels."""
    if not base.family.is_transformer:
        return None
    model = config.model
    controlnet = (
        new_controlnet(base.denoiser, model, "meta")
        if model.controlnet == "unet"
        else read_controlnet_folder(Path(model.controlnet), empty=True)
    )
    if not reads_latents(controlnet):
        return None
    return ConditionValues(dataset, config.data.condition, max_pixels=config.data.max_pixels).get()


def check_aspect_step(config: RunConfig, base: Base) -> None:
    """Raises ConfigError where the U-Net cannot halve the latents of the planned shapes as often as it does."""
    needed = base.pixel_multiple
    if config.data.max_aspect_ratio > 1.0 and config.data.aspect_step % needed:
        raise ConfigError(
            f"data.aspect_step={config.data.aspect_step} is not a multiple of {needed}, by which {base.family.title} "
            f"shrinks a picture. Set data.aspect_step={needed}"
        )


def unlock_decoder(run: Run) -> None:
    """Makes the base's decoder learn too from here on, in a new engine. Every rank calls this, between two steps."""
    controlnet, shares = unlocking.take_out(run.engine, run.average)
    run.engine = run.average = None
    run.engine, run.average = unlocking.unlocked_engine(
        controlnet, shares, run.base, run.config, run.precision, run.world.world_size
    )
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.decoder.parameters())
    rate = run.config.optimizer.decoder_learning_rate
    say(run.world, f"step {run.step}: the base's decoder learns from here on, {parameters:,} parameters at {rate:g}")


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
    tracker = open_tracker(run.folder, config, tags, run.attempt, partial(report_page, world))
    tracker.log_inputs(inputs(config, run.dataset, held_out))
    machine = (
        f"{world.world_size} rank{'s' * (world.world_size > 1)} on {device}, {run.precision}, "
        f"ZeRO-{config.engine.zero_stage}, attention {run.attention}; {parameters:,} parameters"
    )
    title = run.base.family.title
    tracker.describe(**describe_training(config, run.folder, title, run.dataset, held_out, machine))
    return tracker
