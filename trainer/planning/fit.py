"""The fastest setting of a run that fits given cards: a search over what saves memory, by the plan's own arithmetic.

What is searched: ZeRO's stage and offload, the micro-batch (the global batch stays), which activations are kept,
recomputed or held by the host, and how the frozen base is held. Two or three steps are followed on fake tensors; all
else is arithmetic on them. The optimizer is only changed where nothing fits otherwise.

Costs that were never measured on a GPU are bounds: blocks that are streamed or gathered come ahead of use, so that a
step takes its work or its transfers, whichever is longer; a quantized weight is read, written and forgotten in each
pass; activations of the host cross the bus twice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from controlbooth.models.architectures import PUBLISHED
from controlbooth.models.families import FAMILIES
from controlbooth.trainer.config.run import EngineConfig, FrozenConfig, RunConfig, optimizer_problem
from controlbooth.trainer.planning.accelerators import Layout
from controlbooth.trainer.planning.calibration import SHIPPED, family_of, nearest, planned_facts, rows_for
from controlbooth.trainer.planning.choices import (
    ALIKE,
    Choice,
    all_choices,
    known_footprint,
    measured_speed,
    planned_precision,
)
from controlbooth.trainer.planning.footprint import OTHER_PRECISIONS, Footprint, footprint, held_as
from controlbooth.trainer.planning.frozen_memory import both_sums
from controlbooth.trainer.planning.scaling import HOST_BANDWIDTH, NETWORK
from controlbooth.trainer.planning.speed import BANDWIDTH, UNMEASURED, Speed

NEAR = 0.1
"""Share of the speed that is given up for a base in more bits, and for costs that were measured: a plan of the others
is no surer than that."""
SEARCHED = (
    "micro_batch_size",
    "model.gradient_checkpointing",
    "model.frozen.precision",
    "model.frozen.shards",
    "model.frozen.stream",
    "engine.zero_stage",
    "engine.offload_optimizer",
    "engine.offload_parameters",
    "engine.activations",
    "optimizer.name",
)
"""Fields of a run that the search may change."""
LIGHT_OPTIMIZER = "adamw8bit"


@dataclass(frozen=True)
class Setting:
    """One way to run it on the given cards."""

    config: RunConfig
    """The run with this setting."""
    choice: Choice
    seconds: float
    """Of an optimizer step, with what holding the base and activations otherwise costs."""
    changes: tuple[str, ...]
    """The overrides that make the setting of the run as it is written."""
    estimated: tuple[str, ...]
    """What of its time was never measured on a GPU."""

    @property
    def fits(self) -> bool:
        return self.choice.fits

    @property
    def samples_per_second(self) -> float:
        return self.config.global_batch_size / self.seconds

    @property
    def largest_item(self) -> tuple[str, int]:
        """Returns what takes most of the device at the peak: its category and bytes."""
        return max(self.choice.memory.device.items(), key=lambda item: item[1])

    @property
    def kind_changes(self) -> tuple[str, ...]:
        """Returns the overrides besides those of the micro-batch and of ZeRO's stage."""
        return tuple(one for one in self.changes if one.split("=")[0] not in ("micro_batch_size", "engine.zero_stage"))

    @property
    def kind(self) -> tuple[Any, ...]:
        """Returns all of the setting but its micro-batch and ZeRO stage."""
        config = self.config
        frozen, engine = config.model.frozen, config.engine
        return (
            config.optimizer.name,
            frozen.precision,
            frozen.shards,
            frozen.stream,
            engine.activations,
            engine.offload_optimizer,
            config.model.gradient_checkpointing,
        )


@dataclass(frozen=True)
class Fit:
    """What the search has found."""

    config: RunConfig
    layout: Layout
    precision: str
    shapes: str
    settings: list[Setting]
    chosen: Setting | None
    """None where nothing fits."""
    least: Setting
    """What needs the least memory of all."""
    speed_source: str
    """By what measurement speeds are reckoned."""
    is_transformer: bool
    """Whether its base is one, and no U-Net."""


def find_fit(
    config: RunConfig,
    layout: Layout,
    shapes: str | None = None,
    say: Callable[[str], None] = lambda message: None,
    follow: Callable[..., Footprint] = footprint,
) -> Fit:
    """Finds the fastest setting of a run that fits the cards of a layout.

    layout: among whose ranks the global batch can be divided. say: is called with each stage. follow: `footprint`, or
    what has its results from before. Raises ConfigError and
    UserError as `choices.make_plan`.
    """
    precision = planned_precision(config, layout.accelerator)
    speed, source = speed_of(config, layout, precision, shapes)
    found: list[Setting] = []
    for number, way in enumerate(ways(config, layout)):
        if number >= 2 and any(setting.fits for setting in found):
            break  # only what keeps activations on the device and AdamW's moments whole is searched where it is enough
        say(f"a step on fake tensors{told_of(way, config)}")
        one = follow(way, precision, 1, way.model.attention, shapes)
        found += settings_of(config, way, one, layout, precision, speed)
    chosen = best(found)
    least = min(found, key=lambda setting: (setting.choice.needed_bytes, setting.seconds))
    name = shapes or family_of(config)
    family = FAMILIES[PUBLISHED[name].family if name in PUBLISHED else name]
    where = shapes or config.model.base
    return Fit(config, layout, precision, where, found, chosen, least, source, family.is_transformer)


def speed_of(config: RunConfig, layout: Layout, precision: str, shapes: str | None) -> tuple[Speed, str]:
    """Returns the speed that settings are compared by, and by what it is known."""
    card = layout.accelerator
    if card.kind == "cpu":
        return UNMEASURED["cpu"], "not measured, but assumed"
    known = nearest(rows_for(card, SHIPPED), planned_facts(config, precision, 1, shapes), card)
    return measured_speed(known_footprint(known), known, UNMEASURED["cuda"]), f"by {known.describe()}"


def ways(config: RunConfig, layout: Layout) -> Iterator[RunConfig]:
    """Lists the runs whose steps have to be followed: with activations kept, recomputed, or held by the host, and
    recomputed with light moments."""
    model, engine = config.model, config.engine
    recomputing = model.model_copy(update={"gradient_checkpointing": True})
    own = model.gradient_checkpointing
    first = model.model_copy(update={"gradient_checkpointing": False if own is True else own})
    engine = engine.model_copy(update={"activations": "device"})
    yield config.model_copy(update={"model": first, "engine": engine})
    yield config.model_copy(update={"model": recomputing, "engine": engine})
    light = config.optimizer.name == "adamw" and model.method == "full" and model.unlock_decoder_at is None
    if layout.accelerator.kind == "cuda" and not engine.compile:
        moved = engine.model_copy(update={"activations": "cpu"})
        yield config.model_copy(update={"model": recomputing, "engine": moved})
    if light:
        optimizer = config.optimizer.model_copy(update={"name": LIGHT_OPTIMIZER})
        yield config.model_copy(update={"model": recomputing, "engine": engine, "optimizer": optimizer})


def told_of(way: RunConfig, config: RunConfig) -> str:
    """Says in words which of the runs of `ways` it is."""
    words = ["with gradient checkpointing"] if way.model.gradient_checkpointing else ["with all activations kept"]
    words += ["activations in host memory"] if way.engine.activations == "cpu" else []
    words += [f"optimizer.name={way.optimizer.name}"] if way.optimizer.name != config.optimizer.name else []
    return " " + ", ".join(words)


def held_ways(config: RunConfig, layout: Layout) -> list[FrozenConfig]:
    """Lists the ways in which the base of a run may be held on these cards.

    One that the run asks for itself stays among them. Low-rank differences and a decoder that learns need it whole.
    """
    if config.model.method == "lora" or config.model.unlock_decoder_at is not None or config.engine.compile:
        return [config.model.frozen]
    shards = ["none"] if layout.ranks == 1 else ["none", "node"] if layout.nodes == 1 else ["none", "node", "world"]
    return [
        FrozenConfig(precision=precision, shards=split, stream=stream)  # pyright: ignore[reportArgumentType]
        for precision in dict.fromkeys((*OTHER_PRECISIONS, config.model.frozen.precision))
        for split in shards
        for stream in (("none", "cpu") if layout.accelerator.kind == "cuda" else ("none",))
    ]


def settings_of(
    config: RunConfig, way: RunConfig, one: Footprint, layout: Layout, precision: str, speed: Speed
) -> list[Setting]:
    """Makes all settings of one followed step. config: as it is written; way: the run that was followed."""
    settings = []
    for frozen in held_ways(way, layout):
        held = held_as(one, frozen.precision) if frozen.precision != way.model.frozen.precision else one
        model = way.model.model_copy(update={"frozen": frozen})
        here = way.model_copy(update={"model": model})
        for choice in all_choices(here, held, layout, precision, speed):
            engine = engine_with(way.engine, choice)
            if engine.zero_stage == 0 and config.engine.zero_stage:
                continue  # it sums a step's gradients in the weights' precision, where others do in fp32
            if engine.activations == "cpu" and engine.zero_stage == 3:
                continue
            if engine.compile and engine.zero_stage == 3:
                continue
            if optimizer_problem(way.optimizer.name, "optimizer.name", engine):
                continue
            made = here.model_copy(update={"engine": engine, "micro_batch_size": choice.micro_batch_size})
            seconds, estimated = whole_seconds(one, held, made, choice, layout)
            settings.append(Setting(made, choice, seconds, changes(config, made), estimated))
    return settings


def engine_with(engine: EngineConfig, choice: Choice) -> EngineConfig:
    return engine.model_copy(
        update={
            "zero_stage": choice.zero_stage,
            "offload_optimizer": choice.offload_optimizer,
            "offload_parameters": False,
        }
    )


def whole_seconds(
    one: Footprint, held: Footprint, made: RunConfig, choice: Choice, layout: Layout
) -> tuple[float, tuple[str, ...]]:
    """Computes the seconds of a step with what holding the base otherwise costs, and lists the costs that are bounds.

    one, held: the footprint of a sample with the base in the engine's precision, and as it is held.
    """
    step, frozen, card = choice.step, made.model.frozen, layout.accelerator
    passes = step.accumulation_steps
    sharers = {"none": 1, "node": layout.processes_per_node, "world": layout.ranks}[frozen.shards]
    denoiser, encoders = both_sums(held.denoiser_blocks)[1], both_sums(held.encoder_blocks)[1]
    estimated, device = [], step.device_seconds
    if frozen.precision != "engine":
        times = 3 if made.model.gradient_checkpointing else 2  # forward, again where it is recomputed, and backward
        whole = dict(one.otherwise)["engine"]
        moved = times * (both_sums(held.denoiser_blocks)[0] + both_sums(whole.denoiser_blocks)[0])
        if made.data.latent_cache is None:
            moved += both_sums(held.encoder_blocks)[0] + both_sums(whole.encoder_blocks)[0]
        device += passes * moved / (BANDWIDTH * card.memory_bandwidth)
        estimated.append("bringing weights back")
    streamed, gathered = 0.0, 0.0
    if frozen.stream == "cpu":
        once = 0 if made.data.latent_cache else encoders
        streamed = passes * (2 * denoiser / sharers + once) / HOST_BANDWIDTH
        estimated.append("streaming")
    if sharers > 1:
        bandwidth = card.node_bandwidth
        if sharers > layout.processes_per_node:
            bandwidth = min(bandwidth, layout.processes_per_node * card.network_bandwidth)
        gathered = passes * 2 * denoiser * (sharers - 1) / sharers / (NETWORK * bandwidth)
        estimated.append("gathering")
    if made.engine.activations == "cpu":
        device += passes * choice.micro_batch_size * 2 * one.host_activation_bytes / HOST_BANDWIDTH
        estimated.append("activations over the bus")
    if made.engine.offload_optimizer:
        estimated.append("the optimizer on the host")
    seconds = step.seconds - step.device_seconds + max(device, streamed, gathered)
    return seconds, tuple(estimated)


def best(settings: Sequence[Setting]) -> Setting | None:
    """Chooses the best of the settings that fit; None where none does.

    Of bases in more bits the first whose fastest setting is within NEAR of the fastest of all, and of its settings
    likewise those with the fewest costs that were never measured. Of these within ALIKE of each other it is the one
    that changes fewest fields of the run, and of those the one with the least memory.
    """
    fitting = [setting for setting in settings if setting.fits]
    if not fitting:
        return None
    top = max(setting.samples_per_second for setting in fitting)
    order = (*OTHER_PRECISIONS, "bf16", "fp8")
    by_precision = sorted(fitting, key=lambda setting: order.index(setting.config.model.frozen.precision))
    near = next(one for one in by_precision if one.samples_per_second >= (1 - NEAR) * top)
    tier = [one for one in fitting if one.config.model.frozen.precision == near.config.model.frozen.precision]
    top = max(setting.samples_per_second for setting in tier)
    near_all = [one for one in tier if one.samples_per_second >= (1 - NEAR) * top]
    fewest = min(len(one.estimated) for one in near_all)
    tier = [one for one in near_all if len(one.estimated) == fewest]
    top = max(setting.samples_per_second for setting in tier)
    close = [one for one in tier if one.samples_per_second >= (1 - ALIKE) * top]
    return min(close, key=lambda one: (len(one.changes), one.choice.needed_bytes))


def value_of(config: RunConfig, field: str) -> Any:
    """Returns the value of a field by its name in a run, such as model.frozen.stream."""
    value: Any = config
    for name in field.split("."):
        value = getattr(value, name)
    return value


def changes(config: RunConfig, made: RunConfig) -> tuple[str, ...]:
    """Lists the overrides that make one run of another."""

    def written(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return tuple(
        f"{field}={written(value_of(made, field))}"
        for field in SEARCHED
        if value_of(made, field) != value_of(config, field)
    )
