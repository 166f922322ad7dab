"""A base and captioned pairs that both we and diffusers' scripts read, so that both can be timed on the same work.

    .venv/bin/python tests/benchmarks/equal_work.py OUT [--channels 64,128,256,256] [--count 512]

OUT/base: a Stable Diffusion 1.x folder of random weights, of whose U-Net 35.0M parameters are by default. OUT/pairs:
drawn circles and their outlines at 512 px, as files, and OUT/pairs/parquet/train.parquet, which names image,
conditioning_image and text as Hugging Face's `datasets` do.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from controlbooth.trainer.miniature.text import build_tokenizer

CHANNELS = (64, 128, 256, 256)
COLOURS = {"red": (40, 40, 220), "green": (60, 170, 60), "blue": (200, 90, 30), "white": (245, 245, 245)}


def small_unet(channels: Sequence[int] = CHANNELS) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=tuple(channels),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=256, attention_head_dim=8, norm_num_groups=32,
    )  # fmt: skip


def write_base(folder: Path, channels: Sequence[int] = CHANNELS) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder / "tokenizer")
    text = CLIPTextConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=49408,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    small_unet(channels).save_pretrained(folder / "unet")
    AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=128,
    ).save_pretrained(folder / "vae")  # fmt: skip
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    parts = dict(
        scheduler=["diffusers", "DDPMScheduler"], text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"], unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"], safety_checker=[None, None], feature_extractor=[None, None],
    )  # fmt: skip
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.40.0", "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index | parts))
    return folder


def write_pairs(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for name in ("images", "conditions", "parquet"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows: dict[str, list] = {"image": [], "conditioning_image": [], "text": []}
    for number in range(count):
        fill, back = rng.permutation(list(COLOURS))[:2]
        radius = int(rng.integers(60, 180))
        centre = tuple(int(c) for c in rng.integers(radius, 512 - radius, 2))
        picture = np.full((512, 512, 3), COLOURS[back], np.uint8)
        cv2.circle(picture, centre, radius, COLOURS[fill], -1)
        outline = cv2.circle(np.zeros_like(picture), centre, radius, (255, 255, 255), 3)
        for column, path, pixels in (
            ("image", folder / "images" / f"{number:06d}.jpg", picture),
            ("conditioning_image", folder / "conditions" / f"{number:06d}.png", outline),
        ):
            cv2.imwrite(str(path), pixels)
            rows[column].append({"bytes": None, "path": str(path.resolve())})
        rows["text"].append(f"{fill} circle with {back} background")
    features = {name: {"_type": "Image"} for name in ("image", "conditioning_image")}
    features["text"] = {"dtype": "string", "_type": "Value"}
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", picture), ("conditioning_image", picture), ("text", pa.string())])
    table = pa.table(rows, schema=schema).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, folder / "parquet" / "train.parquet")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", default=",".join(map(str, CHANNELS)), help="block_out_channels of the U-Net")
    parser.add_argument("--count", type=int, default=512, help="pairs")
    options = parser.parse_args()
    write_base(options.out / "base", [int(width) for width in options.channels.split(",")])
    write_pairs(options.out / "pairs", options.count)


if __name__ == "__main__":
    main()
