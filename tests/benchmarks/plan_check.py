"""The plan against real trainings on this machine: peak memory and samples/s, predicted and measured.

    .venv/bin/python tests/benchmarks/plan_check.py [--json FILE] [--only NAME] [--steps 8]

Two ranks train a few steps for each of 28 configurations: the built-in base, one of 35 million parameters with random
weights, and one each of SD3's and FLUX.1's classes with some 40 million, ZeRO 0 to 3, several micro-batches, eleven of
them with gradient checkpointing. Memory is a rank's
resident size, which begins with the interpreter and its libraries: RUNTIME_BYTES, beside which the size after the
imports alone is printed. Speed is calibrated with one configuration of each base and precision, the first. About ten
minutes on 2 quiet cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
import yaml
from bases import t5_tokenizer
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from controlbooth.launch.commands import data_pack
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.miniature.text import CAPTION_TOKENS, build_tokenizer
from controlbooth.trainer.miniature.unet import SCHEDULER
from controlbooth.trainer.planning.accelerators import Accelerator, Layout, this_processor
from controlbooth.trainer.planning.choices import one_choice
from controlbooth.trainer.planning.footprint import footprint
from controlbooth.trainer.planning.rank_memory import RUNTIME_BYTES
from controlbooth.trainer.planning.speed import UNMEASURED, Speed, fitted_speed

RANKS = 2
GIB = 2**30


@dataclass(frozen=True)
class Case:
    base: str
    zero_stage: int
    micro_batch_size: int
    precision: str = "fp32"
    checkpointing: bool = False

    @property
    def name(self) -> str:
        name = f"{self.base}-zero{self.zero_stage}-batch{self.micro_batch_size}-{self.precision}"
        return name + "-checkpointing" * self.checkpointing


CASES = (
    *(Case("35M", stage, 8) for stage in range(4)),
    Case("35M", 2, 2),
    *(Case("35M", stage, 8, "bf16") for stage in (0, 2)),
    Case("35M", 2, 2, "bf16"),
    *(Case("miniature", stage, 32) for stage in range(4)),
    Case("miniature", 2, 8),
    *(Case("35M", stage, 8, checkpointing=True) for stage in (0, 2, 3)),
    Case("35M", 2, 16, checkpointing=True),
    Case("35M", 2, 8, "bf16", checkpointing=True),
    Case("miniature", 0, 32, checkpointing=True),
    Case("miniature", 2, 64, checkpointing=True),
    *(Case(base, 2, 8, checkpointing=cheap) for base in ("sd3", "flux") for cheap in (False, True)),
    *(Case(base, 0, 4, "bf16", checkpointing=cheap) for base in ("sd3", "flux") for cheap in (False, True)),
)


def write_base(folder: Path) -> None:
    """35.0M parameters in Stable Diffusion's layout, for 128 px."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    text: Any = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CAPTION_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=128,
    ).save_pretrained(folder / "vae")
    UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(64, 128, 256, 256),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=256,
        attention_head_dim=8,
        norm_num_groups=32,
    ).save_pretrained(folder / "unet")
    DDPMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")


SD3: dict[str, Any] = dict(
    sample_size=16,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=8,
    attention_head_dim=64,
    num_attention_heads=6,
    joint_attention_dim=512,
    caption_projection_dim=384,
    pooled_projection_dim=512,
    pos_embed_max_size=96,
    qk_norm="rms_norm",
    dual_attention_layers=(0, 1, 2, 3),
)
FLUX: dict[str, Any] = dict(
    in_channels=64,
    num_layers=4,
    num_single_layers=8,
    attention_head_dim=64,
    num_attention_heads=6,
    joint_attention_dim=512,
    pooled_projection_dim=256,
    guidance_embeds=True,
    axes_dims_rope=(8, 28, 28),
)


def write_transformer(folder: Path, family: str) -> None:
    """Writes a base of SD3's or FLUX.1's classes for 128 px: 45.9M or 40.3M parameters, and small encoders."""
    torch.manual_seed(0)
    network: Any = SD3Transformer2DModel(**SD3) if family == "sd3" else FluxTransformer2DModel(**FLUX)
    network.save_pretrained(folder / "transformer")
    AutoencoderKL(
        latent_channels=16,
        layers_per_block=1,
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=128,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
    tokenizer = build_tokenizer()
    text: Any = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=256,
        max_position_embeddings=CAPTION_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kinds = [CLIPTextModelWithProjection] * 2 if family == "sd3" else [CLIPTextModel]
    words = t5_tokenizer()
    sizes: Any = dict(d_model=512, d_kv=64, d_ff=1024, num_layers=4, num_heads=8, feed_forward_proj="gated-gelu")
    long = T5EncoderModel(T5Config(vocab_size=len(words), **sizes))
    for place, (encoder, beside) in enumerate([*((kind(text), tokenizer) for kind in kinds), (long, words)], 1):
        suffix = "" if place == 1 else f"_{place}"
        encoder.save_pretrained(folder / f"text_encoder{suffix}")
        beside.save_pretrained(folder / f"tokenizer{suffix}")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=family == "flux")
    scheduler.save_pretrained(folder / "scheduler")


RESOLUTION = {"35M": 128, "miniature": 64, "sd3": 128, "flux": 128}
"""By base."""


def model_of(case: Case, folder: Path) -> dict[str, Any]:
    """Returns what its run says of the base and the ControlNet."""
    if case.base == "miniature":
        return dict(base="miniature", hint_channels=[16, 32, 64, 96])
    if case.base == "35M":
        return dict(base=str(folder / "35M"), hint_channels=[16, 32, 96, 256])
    return dict(base=str(folder / case.base), text_tokens=32)


def run_of(case: Case, folder: Path, steps: int) -> RunConfig:
    resolution = RESOLUTION[case.base]
    return build_config(
        dict(
            name=case.name,
            output=str(folder / "runs"),
            max_steps=steps,
            global_batch_size=RANKS * case.micro_batch_size,
            micro_batch_size=case.micro_batch_size,
            model=model_of(case, folder) | dict(attention="flash", gradient_checkpointing=case.checkpointing),
            data=dict(
                shards=str(folder / f"shards-{resolution}"),
                condition="edges",
                resolution=resolution,
                threads=1,
                prefetch_steps=2,
            ),
            engine=dict(precision=case.precision, zero_stage=case.zero_stage),
            checkpoint=dict(every_steps=1000),
        )
    )


def train(config: RunConfig, folder: Path) -> dict[str, Any]:
    """speed.json of a real training."""
    run_file = folder / f"{config.name}.yaml"
    run_file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "controlbooth.trainer.controlnet.train", str(run_file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads((config.output / config.name / "speed.json").read_text())


IMPORTS = """
import resource
import controlbooth.trainer.controlnet.train, deepspeed, mlflow, diffusers, transformers, torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel, AutoTokenizer
from controlbooth.trainer.engine.distributed import join, leave
join()
import deepspeed.runtime.engine
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
leave()
"""


def runtime_bytes() -> int:
    """Resident size of a rank before its first tensor."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "error"}
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="configurations whose name contains this")
    parser.add_argument("--steps", type=int, default=8, help="of each training; 3 are enough for its memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    held = runtime_bytes()
    print(f"interpreter and libraries {held / GIB:.3f} GiB here; the plan counts with {RUNTIME_BYTES['cpu'] / GIB:.3f}")
    print(
        f"{'configuration':<30}{'memory GiB':>12}{'measured':>10}{'error':>8}"
        f"{'samples/s':>11}{'measured':>10}{'error':>8}"
    )
    rows: list[dict[str, Any]] = []
    speeds: dict[str, Speed] = {}
    cards: dict[str, Accelerator] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_base(folder / "35M")
        for family in ("sd3", "flux"):
            write_transformer(folder / family, family)
        for size in sorted(set(RESOLUTION.values())):
            arguments = ["--scenes", "128", "--size", str(size), "--condition", "edges", "--workers", "1"]
            data_pack.main([*arguments, "-o", str(folder / f"shards-{size}")])
        for case in CASES:
            if options.only and options.only not in case.name:
                continue
            config = run_of(case, folder, options.steps)
            one = footprint(config, case.precision, case.micro_batch_size, "flash")
            if case.precision not in cards:  # once: a second measurement would not be that of the calibration
                cards[case.precision] = this_processor(case.precision)
            layout = Layout(cards[case.precision], 1, RANKS)
            measured = train(config, folder)
            like = f"{case.base} {case.precision}"
            speed = speeds.get(like, UNMEASURED["cpu"])
            planned = one_choice(config, one, config.engine, layout, case.precision, speed)
            if like not in speeds:
                seconds = planned.step.global_batch_size / measured["samples_per_second"]
                computing = seconds - planned.step.seconds + planned.step.compute_seconds
                speeds[like] = fitted_speed([(one, computing)], layout.accelerator, case.precision, speed)
                planned = one_choice(config, one, config.engine, layout, case.precision, speeds[like])
            row = {
                "name": case.name,
                "predicted_gib": planned.memory.peak / GIB,
                "measured_gib": measured["peak_memory_gib"],
                "predicted_samples_per_second": planned.step.samples_per_second,
                "measured_samples_per_second": measured["samples_per_second"],
                "parts": {name: round(size / GIB, 3) for name, size in planned.memory.device.items()},
                "moment": planned.memory.moment,
            }
            rows.append(row)
            print(line(row), flush=True)
            if options.json:
                options.json.write_text(
                    json.dumps({"speeds": {name: asdict(one) for name, one in speeds.items()}, "rows": rows}, indent=1)
                )
    errors = [abs(row["predicted_gib"] / row["measured_gib"] - 1) for row in rows]
    print(f"memory: largest error {100 * max(errors):.1f} %, mean {100 * sum(errors) / len(errors):.1f} %")


def line(row: dict[str, Any]) -> str:
    memory, speed = (
        (row["predicted_gib"], row["measured_gib"]),
        (row["predicted_samples_per_second"], row["measured_samples_per_second"]),
    )
    return (
        f"{row['name']:<30}{memory[0]:12.2f}{memory[1]:10.2f}{100 * (memory[0] / memory[1] - 1):7.1f}%"
        f"{speed[0]:11.2f}{speed[1]:10.2f}{100 * (speed[0] / speed[1] - 1):7.1f}%"
    )


if __name__ == "__main__":
    main()
