"""A plan as text, as a tree for other programs, and as a curve."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from controlbooth.data.files.whole import replaced
from controlbooth.trainer.config.run import FrozenConfig, RunConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.planning.accelerators import PRICES_OF, Layout
from controlbooth.trainer.planning.choices import ALIKE, WRITE_BYTES, Choice, Plan, days_and_price, memory_of
from controlbooth.trainer.planning.rank_memory import CATEGORIES, FRAGMENTATION, HIDDEN_BYTES, RUNTIME_BYTES
from controlbooth.trainer.planning.scaling import (
    COUNTERS,
    DECODED_PER_CORE,
    GLOO_HOP_SECONDS,
    LIMIT,
    NETWORK,
    first_limits,
)
from controlbooth.trainer.planning.speed import BANDWIDTH, GATHER_SECONDS, PRODUCTS

GIB = 2**30


def as_tree(plan: Plan) -> dict[str, Any]:
    """Makes a tree of the plan for other programs, which is written as JSON."""

    def choice(one: Choice | None) -> dict[str, Any] | None:
        if one is None:
            return None
        days, price = days_and_price(plan, one.step)
        extra = {"samples_per_second": one.step.samples_per_second, "step_seconds": one.step.seconds}
        return asdict(one) | {"memory": dict(one.memory.device), "host": dict(one.memory.host)} | extra | {
            "days": days, "price": price,
        }  # fmt: skip

    return {
        "run": plan.config.name,
        "precision": plan.precision,
        "shapes": plan.shapes,
        "accelerator": asdict(plan.layout.accelerator),
        "nodes": plan.layout.nodes,
        "processes_per_node": plan.layout.processes_per_node,
        "trained_parameters": plan.one.trained_parameters,
        "flops_per_sample": plan.one.flops / plan.one.micro_batch_size,
        "operations_per_micro_batch": plan.one.operations,
        "speed": asdict(plan.speed),
        "calibration": plan.measured and plan.measured.describe(),
        "calibration_warning": plan.measured and plan.measured.warning(),
        "asked": choice(plan.asked),
        "recommended": choice(plan.recommended),
        "choices": [choice(one) for one in plan.choices],
        "sample_bytes": plan.data.sample_bytes,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "curve": [
            {"cards": p.ranks, "samples_per_second": p.limited_samples_per_second, "limit": p.limit} for p in plan.curve
        ],
    }


def print_plan(plan: Plan) -> None:
    """Prints the whole plan as text."""
    print(_heading(plan))
    print("\nmemory of one rank at its peak, GiB")
    print("\n".join(memory_lines([plan.asked, *_by_stage(plan)], plan)))
    print(
        "\nwhat else changes it, at the run's own ZeRO stage and micro-batch, GiB: activations at that peak, as above,"
    )
    print("and the most that a step holds, which is at another moment where gradients or the optimizer make the peak")
    print("\n".join(saving_lines(plan)))
    print(f"\nsamples/s of {_cards(plan.layout)} by ZeRO stage and micro-batch (- does not fit)")
    print("\n".join(speed_lines(plan)))
    print("\n" + "\n".join(recommendation_lines(plan)))
    print("\n" + "\n".join(storage_lines(plan)))
    print("\nscaling" + "\n" + "\n".join(curve_lines(plan)))
    print("\n" + "\n".join(assumption_lines(plan)))


def _heading(plan: Plan) -> str:
    one, config = plan.one, plan.config
    size = one.micro_batch_size
    parts = [
        f"{config.name}: {config.data.resolution} px, {plan.precision}, shapes of {plan.shapes}",
        "latent cache" if config.data.latent_cache else "online encoders",
        recomputed(config),
        f"{_cards(plan.layout)}, {plan.layout.accelerator.title}",
    ]
    work = (
        f"ControlNet {one.trained_parameters:,} parameters; a sample takes {one.flops / size / 1e12:.3f} TFLOP "
        f"(encoders {one.encoder_flops / size / 1e12:.3f}) and moves {one.traffic_bytes / size / 1e9:.1f} GB in "
        f"memory; a micro-batch takes {one.operations:,} operations"
    )
    return ", ".join(parts) + "\n" + work


def recomputed(config: RunConfig) -> str:
    """Says what becomes of activations until the backward pass."""
    which = config.model.gradient_checkpointing
    told = "gradient checkpointing" if which is True else f"gradient checkpointing of {100 * which:g} % of the blocks"
    told = told if which else "all activations kept"
    return told + (" in host memory" if config.engine.activations == "cpu" else "")


def _cards(layout: Layout) -> str:
    return f"{layout.nodes} x {layout.processes_per_node} {layout.accelerator.name}"


def _by_stage(plan: Plan) -> list[Choice]:
    """Picks one choice of each stage and offload, at the run's micro-batch or the nearest that was tried."""
    size = min((c.micro_batch_size for c in plan.choices), key=lambda one: abs(one - plan.asked.micro_batch_size))
    return [choice for choice in plan.choices if choice.micro_batch_size == size]


def memory_lines(choices: Sequence[Choice], plan: Plan) -> list[str]:
    """Writes the memory in GiB: a row for each choice, and a column for each category.

    The first choice is the run as it is written.
    """
    shown = [name for name in CATEGORIES if any(choice.memory.device[name] for choice in choices)]
    lines = [
        f"{'':<20}{'batch':>6}" + "".join(f"{name.split()[0]:>14}" for name in shown) + f"{'peak':>8}{'needed':>8}"
    ]
    for number, choice in enumerate(choices):
        name = f"as written, {choice.name}"[:20] if number == 0 else choice.name
        cells = "".join(f"{choice.memory.device[category] / GIB:14.2f}" for category in shown)
        total = f"{choice.memory.peak / GIB:8.2f}{choice.needed_bytes / GIB:8.2f}"
        full = "" if choice.fits else f"  does not fit {plan.layout.accelerator.memory_bytes / GIB:.1f}"
        host = sum(choice.memory.host.values()) / GIB
        lines.append(
            f"{name:<20}{choice.micro_batch_size:>6}{cells}{total}{full}" + (f"  host {host:.2f}" if host else "")
        )
    return lines


def saving_lines(plan: Plan) -> list[str]:
    config, engine, layout = plan.config, plan.config.engine, plan.layout
    lines = [f"{'':<40}{'activations':>12}{'most':>9}{'peak':>9}{'work':>9}"]
    for name, one in {"as written": plan.one, **plan.variants}.items():
        memory = memory_of(config, one, engine, layout, plan.precision)
        sizes = (one.activation_bytes, memory.peak)
        lines.append(
            f"{name:<40}{memory.device['activations'] / GIB:12.2f}"
            + "".join(f"{size / GIB:9.2f}" for size in sizes)
            + f"{one.flops / plan.one.flops:8.2f}x"
        )
    return lines


def speed_lines(plan: Plan) -> list[str]:
    sizes = sorted({choice.micro_batch_size for choice in plan.choices})
    lines = [f"{'micro-batch':<20}" + "".join(f"{size:>10}" for size in sizes)]
    for name in dict.fromkeys(choice.name for choice in plan.choices):
        row = {c.micro_batch_size: c for c in plan.choices if c.name == name}
        cells = [f"{row[size].step.samples_per_second:10.1f}" if row[size].fits else f"{'-':>10}" for size in sizes]
        lines.append(f"{name:<20}" + "".join(cells))
    return lines


def recommendation_lines(plan: Plan) -> list[str]:
    lines = [f"as written    {_worth(plan, plan.asked)}" + ("" if plan.asked.fits else "; DOES NOT FIT")]
    best = plan.recommended
    if best is None:
        remedy = ": try model.gradient_checkpointing=true"
        if plan.config.model.gradient_checkpointing is True:
            remedy = ": try engine.activations=cpu" if plan.config.engine.activations == "device" else ""
        return [*lines, f"recommended   nothing fits {plan.layout.accelerator.title}{remedy}"]
    overrides = f"engine.zero_stage={best.zero_stage} micro_batch_size={best.micro_batch_size}"
    if best.offload_optimizer or plan.config.engine.offload_optimizer:
        overrides += f" engine.offload_optimizer={str(best.offload_optimizer).lower()}"
    lines += [
        f"recommended   {_worth(plan, best)}",
        f"              {overrides}",
        f"              {_why(plan, best)}",
    ]
    largest = max(row["micro_batch_size"] for row in plan.measured.rows) if plan.measured else math.inf
    if best.micro_batch_size > largest:
        lines.append(
            f"              micro-batch {best.micro_batch_size} is larger than any that was measured, {largest}: its "
            "speed is extrapolated"
        )
    return lines


def _why(plan: Plan, best: Choice) -> str:
    """Explains in words why `choices.fastest` chose this one."""
    first = max((choice for choice in plan.choices if choice.fits), key=lambda one: one.step.samples_per_second)
    if first is best:
        return f"the fastest that fits; nothing within {100 * ALIKE:g} % of it needs less memory"
    return (
        f"needs the least memory of what fits within {100 * ALIKE:g} % of the fastest, {first.name} with micro-batch "
        f"{first.micro_batch_size}: {first.step.samples_per_second:.1f} samples/s, {first.needed_bytes / GIB:.1f} GiB"
    )


def _worth(plan: Plan, choice: Choice) -> str:
    days, price = days_and_price(plan, choice.step)
    step = choice.step
    return (
        f"{choice.name}, micro-batch {choice.micro_batch_size} x {step.accumulation_steps}: "
        f"{choice.needed_bytes / GIB:.1f} GiB, {step.samples_per_second:.1f} samples/s, {step.seconds:.3f} s a step "
        f"({100 * step.communication_share:.0f} % communication); {plan.config.max_steps:,} steps take {days:.2f} days "
        f"and ${price:,.0f}"
    )


def storage_lines(plan: Plan) -> list[str]:
    step = (plan.recommended or plan.asked).step
    size, data = plan.checkpoint_bytes, plan.data
    a_second = step.samples_per_second * data.sample_bytes
    cores = step.samples_per_second / plan.layout.ranks * (plan.config.data.resolution / 512) ** 2 / DECODED_PER_CORE
    where = "counted in the shards" if plan.data_is_measured else "assumed"
    decoding = "" if plan.config.data.latent_cache else f"; decoding keeps {cores:.2f} cores of each rank busy"
    network, storage = first_limits(plan.curve, data.storage_bandwidth)
    return [
        f"checkpoint    {size / GIB:.2f} GiB, {size / WRITE_BYTES:.0f} s at {WRITE_BYTES / 1e9:g} GB/s, every "
        f"{plan.config.checkpoint.every_steps} steps",
        f"data          {data.sample_bytes / 1e3:.0f} kB a sample ({where}), {a_second / 1e6:.0f} MB/s from storage"
        + decoding,
        f"limits        communication takes over {100 * LIMIT:.0f} % of a step "
        + (f"from {network} cards on" if network else "at no number up to 1,024 cards")
        + f"; storage of {data.storage_bandwidth * 8 / 1e9:g} Gbit/s limits "
        + (f"from {storage} cards on" if storage else "at no number up to 1,024 cards"),
    ]


def curve_lines(plan: Plan) -> list[str]:
    lines = [
        f"{'cards':>6}{'batch':>8}{'micro':>7}{'samples/s':>12}{'efficiency':>12}{'comm.':>8}{'data MB/s':>11}"
        f"{'$ / M samples':>15}  limited by"
    ]
    first = plan.curve[0]
    for point in plan.curve:
        rate = point.limited_samples_per_second
        efficiency = rate / point.ranks / first.limited_samples_per_second
        price = 1e6 / rate / 3600 * point.ranks * plan.layout.accelerator.price
        lines.append(
            f"{point.ranks:>6}{point.step.global_batch_size:>8}{point.step.micro_batch_size:>7}{rate:>12.1f}"
            f"{100 * efficiency:>11.1f}%{100 * point.step.communication_share:>7.1f}%"
            f"{point.data_bytes_per_second / 1e6:>11.0f}{price:>15.2f}  {point.limit}"
        )
    return lines


def assumption_lines(plan: Plan) -> list[str]:
    card, speed = plan.layout.accelerator, plan.speed
    if plan.measured:
        told = f"by {plan.measured.describe()}"
    else:
        told = "not measured, but assumed; --calibration replaces this by what was measured"
    lines = [
        "assumptions",
        f"  speed: {told}",
        f"  the device takes {speed.device:.2f} times as long as products at {100 * PRODUCTS:.0f} % of its peak and "
        f"other operations at {100 * BANDWIDTH:.0f} % of its memory's bandwidth would",
        f"  its host takes {1e6 * speed.launch_seconds:.0f} us for each operation, beside which the device waits, and "
        f"under ZeRO-3 {1e3 * GATHER_SECONDS[card.kind]:g} ms for each trained module",
    ]
    if plan.measured and (warning := plan.measured.warning()):
        lines.append(f"  warning: {warning}")
    lines.append(
        f"  network: {card.node_bandwidth / 1e9:g} GB/s in a node, {card.network_bandwidth * 8 / 1e9:g} Gbit/s a card "
        f"between nodes, of which {100 * NETWORK:.0f} % is reached; not overlapped with the backward pass; {COUNTERS} "
        f"collectives a step of counters through gloo, {1e6 * GLOO_HOP_SECONDS:g} us for each of 2 (ranks - 1) hops"
    )
    if plan.config.model.frozen != FrozenConfig():
        lines.append(
            "  frozen base: gathering and streaming its blocks, and bringing quantized weights back, is in the memory, "
            "not in the times"
        )
    if card.price:
        lines.append(
            f"  price: ${card.price:.2f} an hour of one card, list prices of {PRICES_OF}; validations come on top"
        )
    if card.kind == "cpu":
        held = RUNTIME_BYTES["cpu"] / GIB
        lines.append(f"  memory: {held:.2f} GiB of each rank are the interpreter, its libraries and scratch, as fitted")
    if card.kind == "cuda":
        lines.append(
            f"  memory: needed = peak + {100 * FRAGMENTATION:.0f} % fragmentation + {HIDDEN_BYTES / GIB:.1f} GiB for "
            "the CUDA context, NCCL and workspaces"
        )
    return lines


def draw_curve(plan: Plan, path: Path) -> None:
    """Draws samples/s against the number of cards as a PNG, and what as many times one card would reach.

    Raises ConfigError where matplotlib (the `measure` extra) is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError('--simulate draws with matplotlib: pip install "controlbooth[measure]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cards = [point.ranks for point in plan.curve]
    rates = [point.limited_samples_per_second for point in plan.curve]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.loglog(cards, [rates[0] * count for count in cards], ":", color="0.5", label="as many times one card")
    axes.loglog(cards, rates, "o-", label="planned")
    axes.set_xlabel(f"cards ({plan.layout.accelerator.title})")
    axes.set_ylabel("samples a second")
    source = "calibrated by a measurement" if plan.measured else "speed is assumed, not measured"
    axes.set_title(f"{plan.config.name}, {plan.config.data.resolution} px; {source}", fontsize=10)
    axes.set_xticks(cards, [str(count) for count in cards])
    axes.legend()
    axes.grid(alpha=0.3)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    pyplot.close(figure)
