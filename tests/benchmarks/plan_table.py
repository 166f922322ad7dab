"""ControlNets of Stable Diffusion 1.5 and XL on H100: the plan for 1, 8, 64 and 512 cards, and how it fits what others
have published. ControlNets of Stable Diffusion 3, 3.5 and FLUX.1-dev: what memory they take, and on which cards.

    .venv/bin/python tests/benchmarks/plan_table.py [--calibration ROWS.jsonl] [--quick]
    .venv/bin/python tests/benchmarks/plan_table.py --transformers [NAME ...]
    .venv/bin/python tests/benchmarks/plan_table.py --fit [NAME ...]     what `controlbooth plan --fit` chooses by card

Nothing is downloaded or trained. The table of speeds rests on the measured rows that `controlbooth plan` takes by
itself, or on those of --calibration, as tests/benchmarks/gpu.py writes them; tests/benchmarks/plan_measured.py
compares the rows themselves. What others have published is compared with a program that wastes nothing. Minutes on one
core, with --quick one; the transformers take six minutes.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from controlbooth.models.architectures import PUBLISHED, SD15, SD21
from controlbooth.models.attention import AttentionChoice, apply_attention
from controlbooth.models.denoisers.registry import denoise
from controlbooth.models.families import FAMILIES
from controlbooth.models.text import TextEncoding
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.planning.accelerators import ACCELERATORS, Layout, card_to_fit, with_nodes
from controlbooth.trainer.planning.calibration import SHIPPED, nearest, planned_facts, rows_for
from controlbooth.trainer.planning.choices import all_choices, fastest, footprint_of_row, measured_speed, one_choice
from controlbooth.trainer.planning.fit import find_fit
from controlbooth.trainer.planning.fit_report import in_words
from controlbooth.trainer.planning.footprint import (
    Footprint,
    LiveStorages,
    footprint,
    modules_with_weights,
    scaled,
    tensors_of,
    without_memory,
    worst_moments,
)
from controlbooth.trainer.planning.speed import UNMEASURED, Speed, micro_batch_seconds
from controlbooth.trainer.planning.subjects import best_stack, stack_choices, stack_footprint
from controlbooth.trainer.planning.subjects_report import base_in_words, subject_speed

GLOBAL_BATCH, SAMPLES = 2048, 1_000_000
GIB = 2**30


def run_of(resolution: int, checkpointing: bool = False, precision: str = "bf16", cached: bool = False) -> RunConfig:
    return build_config(
        dict(
            name="table",
            max_steps=1000,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=4,
            model=dict(base="published", gradient_checkpointing=checkpointing),
            data=dict(
                shards="none", condition="edges", resolution=resolution, latent_cache="latents" if cached else None
            ),
            engine=dict(precision=precision),
        )
    )


def table(rows: list[dict[str, Any]], quick: bool) -> None:
    print(f"{GLOBAL_BATCH} samples a step in bf16, online encoders unless cached; days and price of a million samples")
    print(
        f"{'base':<5}{'px':>5} {'cached':<7}{'cards':>6}  {'ZeRO':<17}{'micro':>6}{'ckpt':>6}{'GiB':>7}"
        f"{'samples/s':>11}{'eff.':>7}{'comm.':>7}{'hours':>8}{'$':>7}"
    )
    card = ACCELERATORS["h100"]
    for family, resolution in (("sd15", 512), ("sd15", 1024), ("sdxl", 512), ("sdxl", 1024)):
        for cached in (False,) if quick else (False, True):
            kept, speed = None, UNMEASURED["cuda"]
            for checkpointing in (False, True):
                config = run_of(resolution, checkpointing, cached=cached)
                measured = nearest(rows, planned_facts(config, "bf16", 4, family), card)
                speed = measured_speed(footprint_of_row(config, measured.rows[0]), measured, UNMEASURED["cuda"])
                one = footprint(config, "bf16", 4, "auto", family)
                whole = all_choices(config, one, Layout(card, 1, 1), "bf16", speed)
                if any(choice.fits and choice.micro_batch_size >= 4 for choice in whole):
                    kept = config, one
                    break
            assert kept is not None, "four samples fit no H100 even with gradient checkpointing"
            table_rows(family, resolution, cached, *kept, speed)


def table_rows(family: str, px: int, cached: bool, config: RunConfig, one: Footprint, speed: Speed) -> None:
    single = 0.0
    for cards in (1, 8, 64, 512):
        layout = Layout(ACCELERATORS["h100"], -(-cards // 8), min(cards, 8))
        best = fastest(all_choices(config, one, layout, "bf16", speed))
        assert best is not None, "table() has chosen what fits one card"
        rate = best.step.samples_per_second
        single = single or rate
        hours = SAMPLES / rate / 3600
        print(
            f"{family:<5}{px:>5} {'yes' if cached else 'no':<7}{cards:>6}  {best.name:<17}{best.micro_batch_size:>6}"
            f"{'yes' if config.model.gradient_checkpointing else 'no':>6}{best.needed_bytes / GIB:7.1f}{rate:11.1f}"
            f"{100 * rate / cards / single:6.1f}%{100 * best.step.communication_share:6.1f}%{hours:8.2f}"
            f"{hours * cards * layout.accelerator.price:7.0f}",
            flush=True,
        )


FITTED = ("sd15", "sdxl", "sd3-medium", "sd35-large", "flux-dev")
SIZES = (("24GiB", 1), ("48GiB", 1), ("80GiB", 1), ("141GiB", 1), ("80GiB", 8))


def fitted(names: list[str]) -> None:
    """Prints what `controlbooth plan --fit` chooses for each base, resolution, method and size of card.

    ControlNets with a global batch of 64; of subjects, on each card, how many are trained together. A row is printed as
    soon as it is known: a base of transformers takes minutes.
    """
    print("| base | px | trained | " + " | ".join(f"{count} x {size}" for size, count in SIZES) + " |")
    print("| --- " * (3 + len(SIZES)) + "|")
    for resolution in (512, 1024):
        for name in names:
            is_transformer = FAMILIES[PUBLISHED[name].family].is_transformer
            for method in ("full",) if is_transformer else ("full", "lora"):
                cells = fitted_controlnet(name, resolution, method)
                what = {"full": "ControlNet", "lora": "control-LoRA"}[method]
                print(f"| {name} | {resolution} | {what} | " + " | ".join(cells) + " |", flush=True)
            print(f"| {name} | {resolution} | LoRA subjects | " + " | ".join(fitted_subjects(name, resolution)) + " |")


def fitted_controlnet(name: str, resolution: int, method: str) -> list[str]:
    follow, cells = once(footprint), []
    for size, count in SIZES:
        config = build_config(
            dict(
                name="table",
                max_steps=1000,
                global_batch_size=64,
                micro_batch_size=8,
                model=dict(base="published", method=method),
                data=dict(shards="none", condition="edges", resolution=resolution),
                engine=dict(precision="bf16"),
            )
        )
        found = find_fit(config, with_nodes(Layout(card_to_fit(size), 1, 1), count), name, follow=follow)
        if found.chosen is None:
            cells.append(f"no: {found.least.choice.needed_bytes / GIB:.0f} GiB at least")
        else:
            chosen = found.chosen
            cells.append(
                f"{in_words(chosen)}, micro-batch {chosen.config.micro_batch_size}: "
                f"{chosen.choice.needed_bytes / GIB:.0f} GiB"
            )
    return cells


def fitted_subjects(name: str, resolution: int) -> list[str]:
    follow, cells = once(stack_footprint), []
    config = SubjectRunConfig.model_validate(dict(name="table", model=dict(base="published"), resolution=resolution))
    for size, count in SIZES:
        card = card_to_fit(size)
        speed, _ = subject_speed(card)
        best = best_stack(stack_choices(config, card, "bf16", speed, name, follow=follow))
        if best is None:
            cells.append("no")
        else:
            again = ", gradient checkpointing" if best.gradient_checkpointing else ""
            again += "" if best.frozen.precision == "engine" else f", base in {base_in_words(best)}"
            each = " on each" if count > 1 else ""
            cells.append(f"{best.subjects} together{each}{again}: {best.needed_bytes / GIB:.0f} GiB")
    return cells


def once(follow: Callable[..., Footprint]) -> Callable[..., Footprint]:
    """Returns a function that follows each step once, and has its footprint from then on."""
    known: dict[Any, Footprint] = {}

    def followed(config: RunConfig | SubjectRunConfig, *rest: Any) -> Footprint:
        asked = config.model_dump_json(), *rest
        if asked not in known:
            known[asked] = follow(config, *rest)
        return known[asked]

    return followed


CARDS = ("rtx4090", "a100-40", "l40s", "a100-80", "h100", "h200", "mi300x")
"""In the order of their memory."""


def transformers(names: list[str]) -> None:
    """Prints the peak of one card and the micro-batches that fit, of the default ControlNet of each base. The speed of
    none of them has been measured."""
    print("bf16, ZeRO-2, encoders in the step and loaded, default number of copied blocks; GiB of one card alone at")
    print("micro-batch 1, with what its allocator does not see; then the largest micro-batch that fits one card alone,")
    print("each of 8, and each of 8 with the optimizer's states on the host; - where none does")
    print(
        f"{'base':<12}{'px':>5}{'ckpt':>6}{'frozen':>8}{'trained':>8}{'a sample':>9}{'peak':>7}{'TFLOP':>7}  "
        + "".join(f"{name:>12}" for name in CARDS)
    )
    for name in names:
        for resolution in (512, 1024):
            for checkpointing in (False, True):
                transformer_row(name, run_of(resolution, checkpointing))


def transformer_row(name: str, config: RunConfig) -> None:
    """Prints one row. config: a run with its resolution and gradient checkpointing."""
    one = footprint(config, "bf16", 1, "auto", name)
    speed, engine, offload = (
        UNMEASURED["cuda"],
        config.engine,
        config.engine.model_copy(update={"offload_optimizer": True}),
    )
    fits = []
    for card in (ACCELERATORS[key] for key in CARDS):
        layouts = ((Layout(card, 1, 1), engine), (Layout(card, 1, 8), engine), (Layout(card, 1, 8), offload))
        largest = [
            max(
                (
                    size
                    for size in (1, 2, 4, 8, 16, 32)
                    if one_choice(config, scaled(one, size), way, layout, "bf16", speed).fits
                ),
                default="-",
            )
            for layout, way in layouts
        ]
        fits.append("/".join(map(str, largest)))
    alone = one_choice(config, one, engine, Layout(ACCELERATORS["h200"], 1, 1), "bf16", speed)
    trained = sum(alone.memory.device[key] for key in ("trained weights", "gradients", "optimizer"))
    print(
        f"{name:<12}{config.data.resolution:>5}{'yes' if config.model.gradient_checkpointing else 'no':>6}"
        f"{one.frozen_bytes / GIB:8.1f}{trained / GIB:8.1f}{one.activation_bytes / GIB:9.2f}"
        f"{alone.needed_bytes / GIB:7.1f}{one.flops / 1e12:7.1f}  " + "".join(f"{text:>12}" for text in fits),
        flush=True,
    )


def unet_training(architecture: Any, precision: torch.dtype, size: int, resolution: int, attention: str) -> Footprint:
    """A U-Net that is trained whole from cached latents and text, as mosaicml/diffusion does."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(architecture.denoiser))
    torch.nn.Module.to(unet, precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_memory(unet)
        apply_attention(unet, AttentionChoice(attention, "planned"))
        live = LiveStorages()
        live.ignore(tensors_of(unet))
        for parameter in unet.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: live.is_gradient(p.grad))
        with live:
            latents = torch.zeros(size, 4, resolution // 8, resolution // 8)
            text = TextEncoding(torch.zeros(size, 77, unet.config["cross_attention_dim"]))
            prediction = denoise(unet, latents, torch.zeros(size, dtype=torch.int64), text)
            (prediction.float() - latents).square().mean().backward()
    return Footprint(
        micro_batch_size=size,
        frozen_bytes=0,
        trained_parameters=sum(p.numel() for p in unet.parameters()),
        largest_parameter=max(p.numel() for p in unet.parameters()),
        trained_modules=modules_with_weights(unet),
        profile=worst_moments(live.moments),
        encoder_flops=0,
        training_flops=live.flops,
        traffic_bytes=live.traffic,
        operations=live.operations,
        batch_bytes=0,
        cached_bytes=0,
    )


def published() -> None:
    """Figures of others beside what the plan says of the same, uncalibrated."""
    a100, a100_80 = ACCELERATORS["a100-40"], ACCELERATORS["a100-80"]
    alone = unet_training(SD21, torch.bfloat16, 8, 512, "flash")
    rate = alone.micro_batch_size / micro_batch_seconds(alone, a100, "bf16", UNMEASURED["cuda"])
    print("\nagainst published figures of other programs, for one that wastes nothing")
    said("SD2 U-Net trained from cached latents, images/s of an A100 (mosaicml)", rate, 36.3)
    eight, many = (step_rate(alone, cards) for cards in (8, 128))
    said("the same on 128 A100, share of 16 times 8 (mosaicml: 98.9 %)", 100 * many / 16 / eight, 98.9)

    one = footprint(run_of(512, precision="fp32"), "fp32", 4, "math", "sd15")
    fp32 = run_of(512, precision="fp32").engine.model_copy(update={"zero_stage": 0})
    config = run_of(512, precision="fp32").model_copy(update={"engine": fp32})
    memory = one_choice(config, one, fp32, Layout(a100_80, 1, 1), "fp32", UNMEASURED["cuda"])
    said("ControlNet SD1.5 at 512 px, batch 4, fp32, scores kept, GB (diffusers)", memory.memory.peak / 1e9, 38)
    sd15 = unet_training(SD15, torch.float32, 4, 512, "math")
    seconds = [micro_batch_seconds(step, a100_80, "fp32", UNMEASURED["cuda"]) for step in (one, sd15)]
    online = seconds[0] / seconds[1]
    said("its step against training the U-Net from cached latents, ratio of times (paper: 1.34)", online, 1.34)
    whole = one_choice(config, sd15, fp32, Layout(a100_80, 1, 1), "fp32", UNMEASURED["cuda"])
    said("the same, ratio of memory (paper: 1.23)", memory.memory.peak / whole.memory.peak, 1.23)
    tf32 = replace(a100, single_flops=a100.half_flops / 2)
    rate = 4 / micro_batch_seconds(one, tf32, "fp32", UNMEASURED["cuda"])
    said("ControlNet fill50k, 512 px, images/s of a 40 GB card in fp32 (lllyasviel; products in TF32)", rate, 5.3)


def step_rate(one: Footprint, cards: int) -> float:
    config = run_of(512)
    layout = Layout(ACCELERATORS["a100-40"], cards // 8, 8)
    return one_choice(config, one, config.engine, layout, "bf16", UNMEASURED["cuda"]).step.samples_per_second


def said(what: str, planned: float, figure: float) -> None:
    print(f"  {what:<92}{planned:8.2f} planned, {figure:g} published: {100 * (planned / figure - 1):+.0f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="rows of tests/benchmarks/gpu.py")
    parser.add_argument("--quick", action="store_true", help="without the rows of cached latents and text")
    names = [name for name, one in PUBLISHED.items() if FAMILIES[one.family].is_transformer]
    parser.add_argument("--transformers", nargs="*", metavar="NAME", help=f"only these: {', '.join(names)}")
    parser.add_argument("--fit", nargs="*", metavar="NAME", help=f"only these: {', '.join(FITTED)}")
    options = parser.parse_args()
    if options.fit is not None:
        return fitted(options.fit or list(FITTED))
    if options.transformers is not None:
        return transformers(options.transformers or names)
    table(rows_for(ACCELERATORS["h100"], options.calibration or SHIPPED), options.quick)
    published()
    return None


if __name__ == "__main__":
    main()
