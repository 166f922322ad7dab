"""ControlNets of Stable Diffusion 1.5 and XL on H100: the plan for 1, 8, 64 and 512 cards, and how it fits what others
have published.

    .venv/bin/python tests/benchmarks/plan_table.py [--calibration ROWS.jsonl] [--quick]

Nothing is downloaded or trained. --calibration takes rows of tests/benchmarks/throughput.py: the table then rests on
them, and every row's own step is planned and compared, memory and samples/s. Minutes on one core, with --quick one.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from controlbooth.models.architectures import SD15, SD21
from controlbooth.models.attention import AttentionChoice, apply_attention
from controlbooth.models.controlnet import denoise
from controlbooth.models.families import TextEncoding
from controlbooth.trainer.accelerators import ACCELERATORS, Layout
from controlbooth.trainer.calibration import config_of_row, nearest, planned_facts, read_rows
from controlbooth.trainer.config import RunConfig, build_config
from controlbooth.trainer.footprint import (
    Footprint,
    LiveStorages,
    footprint,
    modules_with_weights,
    tensors_of,
    without_memory,
    worst_moments,
)
from controlbooth.trainer.planning import all_choices, fastest, measured_factor, one_choice
from controlbooth.trainer.scaling import micro_batch_seconds

GLOBAL_BATCH, SAMPLES = 2048, 1_000_000
GIB = 2**30


def run_of(resolution: int, checkpointing: bool = False, precision: str = "bf16", cached: bool = False) -> RunConfig:
    return build_config(
        dict(
            name="table",
            max_steps=1000,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=4,
            model=dict(base="published", family="sd15", gradient_checkpointing=checkpointing),
            data=dict(shards="none", condition="edges", resolution=resolution, columns="columns" if cached else None),
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
            kept, factor = None, 1.0
            for checkpointing in (False, True):
                config = run_of(resolution, checkpointing, cached=cached)
                if rows:
                    row = nearest(rows, planned_facts(config, "bf16", 4, family), card)
                    factor = measured_factor(config, row, card)
                one = footprint(config, "bf16", 4, "auto", family)
                whole = all_choices(config, one, Layout(card, 1, 1), "bf16", factor)
                if any(choice.fits and choice.micro_batch_size >= 4 for choice in whole):
                    kept = config, one
                    break
            assert kept is not None, "four samples fit no H100 even with gradient checkpointing"
            table_rows(family, resolution, cached, *kept, factor)


def table_rows(family: str, px: int, cached: bool, config: RunConfig, one: Footprint, factor: float) -> None:
    single = 0.0
    for cards in (1, 8, 64, 512):
        layout = Layout(ACCELERATORS["h100"], -(-cards // 8), min(cards, 8))
        best = fastest(all_choices(config, one, layout, "bf16", factor))
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


def unet_training(architecture: Any, precision: torch.dtype, size: int, resolution: int, attention: str) -> Footprint:
    """A U-Net that is trained whole from cached latents and text, as mosaicml/diffusion does."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(architecture.unet))
    torch.nn.Module.to(unet, precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_memory(unet)
        apply_attention(unet, AttentionChoice(attention, "planned"))
        live, counter = LiveStorages(), FlopCounterMode(display=False)
        live.ignore(tensors_of(unet))
        for parameter in unet.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: live.is_gradient(p.grad))
        with counter, live:
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
        training_flops=counter.get_total_flops(),
        traffic_bytes=live.traffic,
        operations=live.operations,
        batch_bytes=0,
        column_bytes=0,
    )


def published() -> None:
    """Figures of others beside what the plan says of the same, uncalibrated."""
    a100, a100_80 = ACCELERATORS["a100-40"], ACCELERATORS["a100-80"]
    alone = unet_training(SD21, torch.bfloat16, 8, 512, "flash")
    rate = alone.micro_batch_size / micro_batch_seconds(alone, a100, "bf16")
    print("\nagainst published figures, without calibration")
    said("SD2 U-Net trained from cached latents, images/s of an A100 (mosaicml)", rate, 36.3)
    eight, many = (step_rate(alone, cards) for cards in (8, 128))
    said("the same on 128 A100, share of 16 times 8 (mosaicml: 98.9 %)", 100 * many / 16 / eight, 98.9)

    one = footprint(run_of(512, precision="fp32"), "fp32", 4, "math", "sd15")
    fp32 = run_of(512, precision="fp32").engine.model_copy(update={"zero_stage": 0})
    config = run_of(512, precision="fp32").model_copy(update={"engine": fp32})
    memory = one_choice(config, one, fp32, Layout(a100_80, 1, 1), "fp32", 1.0)
    said("ControlNet SD1.5 at 512 px, batch 4, fp32, scores kept, GB (diffusers)", memory.memory.peak / 1e9, 38)
    sd15 = unet_training(SD15, torch.float32, 4, 512, "math")
    online = micro_batch_seconds(one, a100_80, "fp32") / micro_batch_seconds(sd15, a100_80, "fp32")
    said("its step against training the U-Net from cached latents, ratio of times (paper: 1.34)", online, 1.34)
    whole = one_choice(config, sd15, fp32, Layout(a100_80, 1, 1), "fp32", 1.0)
    said("the same, ratio of memory (paper: 1.23)", memory.memory.peak / whole.memory.peak, 1.23)
    tf32 = replace(a100, single_flops=a100.half_flops / 2)
    rate = 4 / micro_batch_seconds(one, tf32, "fp32")
    said("ControlNet fill50k, 512 px, images/s of a 40 GB card in fp32 (lllyasviel; products in TF32)", rate, 5.3)


def step_rate(one: Footprint, cards: int) -> float:
    config = run_of(512)
    layout = Layout(ACCELERATORS["a100-40"], cards // 8, 8)
    return one_choice(config, one, config.engine, layout, "bf16", 1.0).step.samples_per_second


def said(what: str, planned: float, figure: float) -> None:
    print(f"  {what:<92}{planned:8.2f} planned, {figure:g} published: {100 * (planned / figure - 1):+.0f} %")


def compare(rows: list[dict[str, Any]]) -> None:
    """The plan of every measured row, uncalibrated: memory as PyTorch's allocator counts it, and samples/s."""
    print("\nagainst measured steps (one rank, ZeRO-2), speed without calibration")
    print(f"{'row':<60}{'GiB':>8}{'measured':>10}{'error':>8}{'samples/s':>11}{'measured':>10}{'ratio':>7}")
    for row in rows:
        card = ACCELERATORS["h200" if "H200" in row.get("device", "") else "h100"]
        config, family = config_of_row(run_of(512), row)
        one = footprint(config, row["precision"], row["micro_batch_size"], row.get("attention", "auto"), family)
        planned = one_choice(
            config.model_copy(update={"global_batch_size": row["micro_batch_size"]}),
            one, config.engine, Layout(card, 1, 1), row["precision"], 1.0,
        )  # fmt: skip
        facts = (row["family"], f"{row['resolution']} px", f"batch {row['micro_batch_size']}", row.get("attention", ""))
        name = ", ".join((*facts, "ckpt" * bool(row.get("gradient_checkpointing")), "cached" * bool(row.get("cached"))))
        peak, measured = planned.memory.peak / GIB, row.get("peak_memory_gib") or float("nan")
        seconds = row["micro_batch_size"] / micro_batch_seconds(one, card, row["precision"])
        print(
            f"{name:<60}{peak:8.2f}{measured:10.2f}{100 * (peak / measured - 1):7.1f}%{seconds:11.1f}"
            f"{row['samples_per_second']:10.1f}{seconds / row['samples_per_second']:7.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="rows of tests/benchmarks/throughput.py")
    parser.add_argument("--quick", action="store_true", help="without the rows of cached latents and text")
    options = parser.parse_args()
    rows = read_rows(options.calibration) if options.calibration else []
    if rows:
        compare(rows)
    table(rows, options.quick)
    published()


if __name__ == "__main__":
    main()
