"""What `controlbooth plan --fit` prints: the setting chosen, its runners-up, and what keeps others out."""

from collections.abc import Sequence
from typing import Any

from controlbooth.data.arguments import quoted
from controlbooth.trainer.planning.fit import LIGHT_OPTIMIZER, Fit, Setting

GIB = 2**30
RUNNERS_UP, LEFT_OUT = 4, 4


def fit_lines(fit: Fit, run: str, overrides: Sequence[str] = ()) -> list[str]:
    """Writes the report. run, overrides: as the command line has them, for the command that it ends with."""
    layout, config = fit.layout, fit.config
    card = layout.accelerator
    heading = (
        f"{config.name}: {config.data.resolution} px, {fit.precision}, shapes of {fit.shapes}, global batch "
        f"{config.global_batch_size}; {layout.ranks} x {card.memory_bytes / GIB:.1f} GiB, {card.title}"
    )
    lines = [heading, f"speed: {fit.speed_source}; estimated where a cost was never measured on a GPU", ""]
    if fit.chosen is None:
        return [*lines, *_nothing_fits(fit)]
    lines.append(_columns())
    lines.append(_row("chosen", fit.chosen))
    lines += [_row("", setting) for setting in runners_up(fit)]
    if simpler := left_out(fit):
        lines += ["", "does not fit, with the smallest micro-batch"]
        lines += [f"  {_short_of(setting, card.memory_bytes)}" for setting in simpler]
    lines += ["", *_advice(fit.chosen, run, overrides)]
    return lines


def runners_up(fit: Fit) -> list[Setting]:
    """Picks the fastest settings of other kinds than the chosen one, one of each kind."""
    assert fit.chosen is not None
    kinds: dict[Any, Setting] = {}
    for setting in sorted(fit.settings, key=lambda one: (-one.samples_per_second, len(one.changes))):
        if setting.fits and setting.kind != fit.chosen.kind:
            kinds.setdefault(setting.kind, setting)
    return list(kinds.values())[:RUNNERS_UP]


def left_out(fit: Fit) -> list[Setting]:
    """Picks the kinds that do not fit and change only a part of what the chosen one changes, each where it needs least.

    So each of its changes is seen to be needed.
    """
    assert fit.chosen is not None
    wanted = set(fit.chosen.kind_changes)
    kinds: dict[Any, Setting] = {}
    for setting in sorted(fit.settings, key=lambda one: one.choice.needed_bytes):
        kinds.setdefault(setting.kind, setting)
    simpler = [one for one in kinds.values() if not one.fits and wanted > set(one.kind_changes)]
    return sorted(simpler, key=lambda one: one.choice.needed_bytes)[:LEFT_OUT]


def _columns() -> str:
    return f"{'':<8}{'GiB':>7}{'host':>7}{'samples/s':>11}{'micro':>7}  setting"


def _row(name: str, setting: Setting) -> str:
    host = sum(setting.choice.memory.host.values()) / GIB
    told = f" (estimated: {', '.join(setting.estimated)})" if setting.estimated else ""
    return (
        f"{name:<8}{setting.choice.needed_bytes / GIB:7.1f}{host:7.1f}{setting.samples_per_second:11.2f}"
        f"{setting.config.micro_batch_size:7}  {in_words(setting)}{told}"
    )


def in_words(setting: Setting) -> str:
    """Describes a setting but for its micro-batch."""
    config, frozen = setting.config, setting.config.model.frozen
    words = [setting.choice.name]
    if config.model.gradient_checkpointing:
        words.append("gradient checkpointing")
    if config.engine.activations == "cpu":
        words.append("activations on the host")
    if frozen.precision != "engine":
        words.append(f"base in {frozen.precision}")
    if frozen.shards != "none":
        words.append(f"base split over the {frozen.shards}")
    if frozen.stream == "cpu":
        words.append("base streamed")
    if config.optimizer.name != "adamw":
        words.append(config.optimizer.name)
    return ", ".join(words)


def _short_of(setting: Setting, memory_bytes: float) -> str:
    name, size = setting.largest_item
    return (
        f"{in_words(setting)}: {setting.choice.needed_bytes / GIB:.1f} GiB of {memory_bytes / GIB:.1f}, of which "
        f"{name} {size / GIB:.1f}"
    )


def _advice(setting: Setting, run: str, overrides: Sequence[str]) -> list[str]:
    lines = []
    if setting.config.optimizer.name == LIGHT_OPTIMIZER and f"optimizer.name={LIGHT_OPTIMIZER}" in setting.changes:
        lines.append("nothing fits with AdamW's own moments: those of 8 bits change the result slightly")
    if setting.config.model.frozen.precision not in ("engine", "bf16"):
        lines.append('a quantized base changes the result slightly; pip install "controlbooth[quantized]"')
    command = ["controlbooth", "train", run, *overrides, *setting.changes]
    return [*lines, " ".join(map(quoted, command))]


def _nothing_fits(fit: Fit) -> list[str]:
    least, card, config = fit.least, fit.layout.accelerator, fit.config
    remedies = ["more cards (--gpus), over which weights and moments are split"]
    if config.model.method == "full" and not fit.is_transformer:
        remedies.append("model.method=lora, which trains a few per cent of the parameters")
    if fit.is_transformer:
        remedies.append("fewer model.copied_blocks")
    if config.data.resolution > 512:
        remedies.append("data.resolution=512")
    return [
        f"nothing fits: the least that was reached is {_short_of(least, card.memory_bytes)}",
        f"  by {' '.join(least.changes) or 'the run as it is written'}",
        f"what would help: {'; '.join(remedies)}",
    ]


def fit_tree(fit: Fit) -> dict[str, Any]:
    """Makes a tree of what was found for other programs, which is written as JSON."""

    def setting(one: Setting | None) -> dict[str, Any] | None:
        return one and {
            "setting": in_words(one),
            "overrides": list(one.changes),
            "needed_bytes": one.choice.needed_bytes,
            "host_bytes": sum(one.choice.memory.host.values()),
            "samples_per_second": one.samples_per_second,
            "estimated": list(one.estimated),
        }

    return {
        "run": fit.config.name,
        "memory_bytes": fit.layout.accelerator.memory_bytes,
        "cards": fit.layout.ranks,
        "chosen": setting(fit.chosen),
        "runners_up": [setting(one) for one in runners_up(fit)] if fit.chosen else [],
        "least": setting(fit.least),
    }
