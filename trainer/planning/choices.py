"""What a run will take: the footprint of its step, for every ZeRO stage and micro-batch on given cards."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from controlbooth.data.shards.manifest import join_datasets, open_dataset
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import EngineConfig, RunConfig, activation_problems, sources
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.engine.deepspeed import check_fits, cpu_multiplies_bf16
from controlbooth.trainer.planning.accelerators import STORAGE_GBIT, Accelerator, Layout
from controlbooth.trainer.planning.calibration import (
    COUNTED,
    SHIPPED,
    Measured,
    config_of_row,
    nearest,
    planned_facts,
    rows_for,
)
from controlbooth.trainer.planning.footprint import Footprint, footprint, scaled
from controlbooth.trainer.planning.rank_memory import RankMemory, needed, rank_memory
from controlbooth.trainer.planning.scaling import (
    COUNTERS,
    DECODED_PER_CORE,
    Data,
    Point,
    Step,
    communication_seconds,
    gloo_seconds,
    optimizer_seconds,
    scaling_curve,
    step_time,
)
from controlbooth.trainer.planning.speed import UNMEASURED, Speed, fitted_speed

MICRO_BATCHES = tuple(2**power for power in range(8))
STORED_BYTES_PER_PIXEL = 0.35
"""Of a sample whose shards are not here: a JPEG of a photograph, quality 90, and a PNG of its edges. An assumption."""
ALIKE = 0.01
"""Share of the speed by which choices are taken for equally fast, since a plan knows it no better."""
WRITE_BYTES = 1e9
"""Bytes a second that a checkpoint is written with. An assumption."""


@dataclass(frozen=True)
class Choice:
    """One way to run it."""

    zero_stage: int
    offload_optimizer: bool
    micro_batch_size: int
    memory: RankMemory
    needed_bytes: float
    """Of the device, with what its allocator does not see."""
    fits: bool
    step: Step

    @property
    def name(self) -> str:
        return f"ZeRO-{self.zero_stage}" + (" + offload" if self.offload_optimizer else "")


@dataclass(frozen=True)
class Plan:
    """Everything that is printed."""

    config: RunConfig
    precision: str
    shapes: str
    """What the modules' shapes were taken from."""
    layout: Layout
    one: Footprint
    """Of the run's own micro-batch."""
    variants: dict[str, Footprint]
    """Of the same with gradient checkpointing, or another attention, the other way."""
    choices: list[Choice]
    asked: Choice
    """The run as it is written."""
    recommended: Choice | None
    speed: Speed
    measured: Measured | None
    """What it was fitted to; None where nothing is known."""
    data: Data
    data_is_measured: bool
    curve: list[Point]
    checkpoint_bytes: int


def planned_precision(config: RunConfig, card: Accelerator) -> str:
    """Resolves the precision as engine.resolve_precision does, for a device that is not here.

    Every card of the table multiplies in bf16.
    """
    if config.engine.precision != "auto":
        return config.engine.precision
    return "bf16" if card.kind == "cuda" or cpu_multiplies_bf16() else "fp32"


def make_plan(
    config: RunConfig,
    layout: Layout,
    shapes: str | None = None,
    calibration: Path | None = None,
    storage_bandwidth: float = STORAGE_GBIT * 1e9 / 8,
    say: Callable[[str], None] = lambda message: None,
) -> Plan:
    """Plans a run on given cards: the footprint of its step, all choices, the recommended one and the scaling curve.

    layout: of `plan.layout_of`, among whose ranks the global batch can be divided. storage_bandwidth: bytes a second.
    say: is called with each stage of the planning. Raises ConfigError for a base or a calibration that cannot be
    planned with.
    """
    card = layout.accelerator
    check_fits(config.optimizer, layout.ranks, flat=True)
    for problem in activation_problems(config.engine, card.kind == "cuda"):
        raise ConfigError(problem)
    precision = planned_precision(config, card)
    asked_size = min(config.micro_batch_size, config.global_batch_size // layout.ranks)
    facts = planned_facts(config, precision, asked_size, shapes)
    measured = nearest(rows_for(card, calibration), facts, card) if calibration else None
    known = nearest(rows_for(card, SHIPPED), facts, card) if card.kind == "cuda" else None
    say(f"a step of {asked_size} samples on fake tensors")
    attention = config.model.attention
    one = footprint(config, precision, asked_size, attention, shapes)
    variants = {}
    for name, changed, kernel in alternatives(config):
        say(f"the same with {name}")
        variants[name] = footprint(changed, precision, asked_size, kernel, shapes)
    speed = UNMEASURED[card.kind]
    if known:
        say("the measured steps that are known of GPUs")
        speed = measured_speed(known_footprint(known), known, speed)
    if measured:
        say(f"the measured step of {calibration}")
        speed = measured_speed(footprint_of_row(config, measured.rows[0]), measured, speed)
    data, counted = data_of(config, one, storage_bandwidth)
    choices = all_choices(config, one, layout, precision, speed)
    asked = one_choice(config, one, config.engine, layout, precision, speed)
    recommended = fastest(choices)
    engine = config.engine if recommended is None else engine_of(config, recommended)
    at = fitting(config, one, engine, layout, precision)
    curve = scaling_curve(at, layout, engine, precision, config.global_batch_size, data, speed)
    return Plan(
        config=config,
        precision=precision,
        shapes=shapes or config.model.base,
        layout=layout,
        one=one,
        variants=variants,
        choices=choices,
        asked=asked,
        recommended=recommended,
        speed=speed,
        measured=measured or known,
        data=data,
        data_is_measured=counted,
        curve=curve,
        checkpoint_bytes=checkpoint_bytes(one, precision, config.optimizer.ema_decay is not None),
    )


def alternatives(config: RunConfig) -> list[tuple[str, RunConfig, str]]:
    """Lists what else activations depend on: (name, run, attention) of the run with each such setting the other way."""
    other = not config.model.gradient_checkpointing
    model = config.model.model_copy(update={"gradient_checkpointing": other})
    named = "gradient checkpointing" if other else "all activations kept"
    return [
        (named, config.model_copy(update={"model": model}), config.model.attention),
        ("attention that keeps scores (math)", config, "math"),
    ]


def engine_of(config: RunConfig, choice: Choice) -> EngineConfig:
    update = {"zero_stage": choice.zero_stage, "offload_optimizer": choice.offload_optimizer}
    return config.engine.model_copy(update=update | {"offload_parameters": False})


def all_choices(config: RunConfig, one: Footprint, layout: Layout, precision: str, speed: Speed) -> list[Choice]:
    """Makes the choices of ZeRO 0 to 3, and of 2 and 3 with offload, at every micro-batch that is possible.

    Micro-batches are those of MICRO_BATCHES that divide the samples of a rank. ZeRO 0 is left out in fp16, which it
    does not support, and with optimizers besides AdamW, which have 1 and 2 alone.
    """
    samples = config.global_batch_size // layout.ranks
    sizes = [size for size in MICRO_BATCHES if samples % size == 0]
    engines = [(stage, False) for stage in range(4)] + [(stage, True) for stage in (2, 3)]
    if config.optimizer.name != "adamw":
        engines = [(1, False), (2, False)]  # of the others optimizer_problem refuses what is left
    if precision == "fp16" and (0, False) in engines:
        engines.remove((0, False))  # which engine.resolve_precision refuses
    return [
        one_choice(
            config,
            scaled(one, size),
            config.engine.model_copy(
                update={"zero_stage": stage, "offload_optimizer": offload, "offload_parameters": False}
            ),
            layout,
            precision,
            speed,
        )
        for stage, offload in engines
        for size in sizes
    ]


def fastest(choices: Sequence[Choice]) -> Choice | None:
    """Chooses the best of the choices that fit and whose speed is within ALIKE of the fastest; None where none fits.

    It is one without offload if possible, and of those the one with the least memory.
    """
    fitting = [choice for choice in choices if choice.fits]
    best = max((choice.step.samples_per_second for choice in fitting), default=0.0)
    close = [choice for choice in fitting if choice.step.samples_per_second >= (1 - ALIKE) * best]
    return min(close, key=lambda choice: (choice.offload_optimizer, choice.needed_bytes), default=None)


def one_choice(
    config: RunConfig, one: Footprint, engine: EngineConfig, layout: Layout, precision: str, speed: Speed
) -> Choice:
    memory = memory_of(config, one, engine, layout, precision)
    bytes_needed = needed(memory, layout.accelerator.kind)
    step = step_time(one, layout, engine, precision, config.global_batch_size, speed)
    fits = bytes_needed <= layout.accelerator.memory_bytes
    return Choice(engine.zero_stage, engine.offload_optimizer, one.micro_batch_size, memory, bytes_needed, fits, step)


def memory_of(config: RunConfig, one: Footprint, engine: EngineConfig, layout: Layout, precision: str) -> RankMemory:
    return rank_memory(
        one,
        engine,
        precision,
        layout.ranks,
        layout.accelerator.kind,
        global_batch_size=config.global_batch_size,
        averaged=config.optimizer.ema_decay is not None,
        loader_bytes=loader_bytes(config, one, layout.ranks),
        frozen=config.model.frozen,
        sharers={"none": 1, "node": layout.processes_per_node, "world": layout.ranks}[config.model.frozen.shards],
    )


def loader_bytes(config: RunConfig, one: Footprint, ranks: int) -> int:
    """Computes the bytes of decoded batches that each rank's loader holds ready.

    They are pictures as uint8, a quarter of the bytes of the floats on the device.
    """
    per_sample = one.batch_bytes / one.micro_batch_size / 4
    return round(per_sample * config.global_batch_size / ranks * (config.data.prefetch_steps + 1))


def fitting(
    config: RunConfig, one: Footprint, engine: EngineConfig, layout: Layout, precision: str
) -> dict[int, Footprint]:
    """Finds the micro-batches of MICRO_BATCHES that divide the global batch and fit; where none does, it is 1.

    Returns the footprint of each.
    """
    sizes = (size for size in MICRO_BATCHES if config.global_batch_size % size == 0)
    at = {size: scaled(one, size) for size in sizes}
    card = layout.accelerator
    fits = {
        size: footprint
        for size, footprint in at.items()
        if needed(memory_of(config, footprint, engine, layout, precision), card.kind) <= card.memory_bytes
    }
    return fits or {1: at[1]}


def measured_speed(one: Footprint, measured: Measured, otherwise: Speed) -> Speed:
    """Fits the speed to measured steps.

    one: the footprint of one of them. otherwise: as `unmeasured` of `fitted_speed`.
    """
    card = measured.measured_card
    at = [(row, scaled(one, row["micro_batch_size"])) for row in measured.rows]
    steps = [(footprint, measured_seconds(footprint, row, card)) for row, footprint in at]
    return fitted_speed(steps, card, measured.rows[0]["precision"], otherwise)


def footprint_of_row(config: RunConfig, row: Mapping[str, Any]) -> Footprint:
    """Computes the footprint of a measured step. config: a run, whose base is taken where the row is of its family."""
    same, shapes = config_of_row(config, row)
    return footprint(same, row["precision"], row["micro_batch_size"], row.get("attention", "auto"), shapes)


def known_footprint(known: Measured) -> Footprint:
    """Computes the footprint of a step that tests/benchmarks/gpu.py has measured with published shapes.

    It is computed once in a process.
    """
    row = known.rows[0]
    return _published_footprint(tuple((name, row[name]) for name in COUNTED if name in row))


@cache
def _published_footprint(items: tuple[tuple[str, Any], ...]) -> Footprint:
    row = dict(items)
    size = row["micro_batch_size"]
    config = build_config(
        dict(
            name="measured",
            max_steps=1,
            global_batch_size=size,
            micro_batch_size=size,
            model=dict(base="published"),
            data=dict(shards="none", condition="edges"),
        )
    )
    return footprint_of_row(config, row)


def measured_seconds(one: Footprint, row: Mapping[str, Any], card: Accelerator) -> float:
    """Computes the seconds of forward and backward of one micro-batch of a measured step.

    They are what is left of the step without communication and optimizer as they are planned, but at least half of it.
    """
    ranks, times = row.get("ranks", 1), row.get("accumulation_steps", 1)
    engine, layout = EngineConfig(zero_stage=row.get("zero_stage", 2)), Layout(card, 1, ranks)
    whole = times * row["micro_batch_size"] / row["samples_per_second"]
    other = communication_seconds(one, layout, engine, row["precision"], times) + COUNTERS * gloo_seconds(ranks)
    other += optimizer_seconds(one, layout, engine, row["precision"])
    return max(whole - other, whole / 2) / times


def data_of(config: RunConfig, one: Footprint, storage_bandwidth: float) -> tuple[Data, bool]:
    """Computes what data a run reads, and tells whether the size of a sample was counted in shards that are here.

    storage_bandwidth: bytes a second.
    """
    size, counted = sample_size(config, one)
    decoded = config.data.threads * DECODED_PER_CORE * (512 / config.data.resolution) ** 2
    return Data(size, storage_bandwidth, math.inf if config.data.latent_cache else decoded), counted


def sample_size(config: RunConfig, one: Footprint) -> tuple[float, bool]:
    """Computes the bytes of a sample that come over the network.

    Tells also whether they were counted in shards that are here.
    """
    picture = STORED_BYTES_PER_PIXEL * config.data.resolution**2
    if config.data.latent_cache is not None:  # beside a condition's picture, about a third of both pictures
        return one.cached_bytes / one.micro_batch_size + (picture / 3 if one.reads_conditions else 0.0), False
    try:
        dataset = join_datasets([open_dataset(source.shards) for source in sources(config)])
    except FileNotFoundError:
        return picture, False
    rows = dataset.rows
    return sum(row.bytes for row in rows) / max(1, sum(row.samples for row in rows)), True


def checkpoint_bytes(one: Footprint, precision: str, averaged: bool) -> int:
    """Computes the bytes of a checkpoint.

    It holds fp32 masters and the optimizer's state, weights in the run's precision (none in fp32), the trained
    weights in fp32 for diffusers, and, where there is one, the moving average.
    """
    width = 0 if precision == "fp32" else 2
    states = sum(size for _, size in one.states) if one.states else 8 * one.trained_parameters
    return one.trained_parameters * (4 + width + 4 + (4 if averaged else 0)) + states


def days_and_price(plan: Plan, step: Step) -> tuple[float, float]:
    """Computes the days and the dollars of all steps and the checkpoints between them; validations come on top."""
    saves = plan.config.max_steps // plan.config.checkpoint.every_steps
    hours = (plan.config.max_steps * step.seconds + saves * plan.checkpoint_bytes / WRITE_BYTES) / 3600
    return hours / 24, hours * plan.layout.ranks * plan.layout.accelerator.price
