"""A base model of random weights and real structure, and shards of scenes, in a folder: what training tests run on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from controlbooth.launch.commands import data_pack
from controlbooth.trainer.miniature.text import CAPTION_TOKENS, build_tokenizer
from controlbooth.trainer.miniature.unet import SCHEDULER, UNET
from controlbooth.trainer.miniature.vae import VAE

WORKERS = Path(__file__).parents[1] / "distributed" / "workers"


def write_base(folder: Path) -> None:
    """The miniature's structure at a tenth of its widths."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CAPTION_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    vae = VAE | dict(block_out_channels=(8, 8, 8, 8), latent_channels=4, scaling_factor=1.0)
    AutoencoderKL(**vae).save_pretrained(folder / "vae")
    unet = UNET | dict(
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        cross_attention_dim=32,
        norm_num_groups=4,
        attention_head_dim=2,
        addition_embed_type_num_heads=4,
    )
    UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
    DDPMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    parts = dict(
        scheduler=["diffusers", "DDPMScheduler"],
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"],
        unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
        safety_checker=[None, None],
        feature_extractor=[None, None],
    )
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index | parts))


def write_shards(folder: Path) -> None:
    """train/: 60 scenes in 5 shards; held/: 8 others."""
    for name, seed, count in (("train", 0, 60), ("held", 1_000_003, 8)):
        conditions = ["--condition", "edges", "--condition", "segmentation"]
        arguments = ["--scenes", str(count), "--seed", str(seed), *conditions, "--samples-per-shard", "12"]
        assert data_pack.main([*arguments, "--workers", "1", "-o", str(folder / name)]) == 0


def write_model(folder: Path, **fields: Any) -> None:
    """Says what runs of this folder have in their section `model` beside the base."""
    (folder / "model.json").write_text(json.dumps(fields))


def run_tree(folder: Path, name: str) -> dict:
    """A run of 6 steps with accumulation, as a tree for build_config."""
    said = folder / "model.json"
    model = json.loads(said.read_text()) if said.is_file() else dict(hint_channels=[8, 8, 8, 8])
    return dict(
        name=name,
        output=str(folder / "runs"),
        max_steps=6,
        global_batch_size=8,
        micro_batch_size=2,
        model=dict(base=str(folder / "base"), attention="math") | model,
        data=dict(
            shards=str(folder / "train"), condition="edges", resolution=64, held_out=str(folder / "held"), threads=1
        ),
        optimizer=dict(learning_rate=1e-3, ema_decay=0.5),
        engine=dict(precision="fp32", zero_stage=2),
        checkpoint=dict(every_steps=2, keep=10),
        validation=dict(every_steps=100, samples=4, grid=2, sampling_steps=2, at_start=False),
    )


def torchrun(processes: int, scenario: str, folder: Path, *arguments: str, forks: bool = True) -> dict:
    """Runs worker.py's scenario on ranks of torchrun and returns what rank 0 wrote. Raises with the ranks' output.

    forks: from a process that has imported everything; else they import what they need themselves.
    """
    result = folder / f"{scenario}-{processes}.json"
    words = list(map(str, [WORKERS / "worker.py", scenario, folder, result, *arguments]))
    if forks:
        done = forked.run(processes, words, **forked.BEFORE_IMPORTS)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = os.environ | forked.BEFORE_IMPORTS
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise AssertionError(f"{words} exited with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return json.loads(result.read_text())


def weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """What a checkpoint gives to others: the moving average, since the runs keep one."""
    return load_file(checkpoint / "controlnet" / "diffusion_pytorch_model.safetensors")
