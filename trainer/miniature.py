"""The recipe of the embedded base model: from the scenes of data/scenes.py to a folder that diffusers' pipelines read.

    python -m controlbooth.trainer.miniature STAGE --work FOLDER [--minutes N]

    scenes   draws the pictures that the other stages learn from
    vae      AutoencoderKL, factor 8, 12 latent channels: first on 32-pixel crops, then on whole pictures
    judge    a small network that reads scenes: object classes, colours and sizes from left to right, and backgrounds
    reader   a small network that finds depth, normals, classes and key points in pictures of scenes
    text     a CLIP text encoder, taught to know what a caption says before it sees a picture; frozen afterwards
    unet     v-prediction on cached latents; prompts reach it by cross-attention and, pooled, beside the timestep.
             On two ranks: torchrun --standalone --nproc-per-node 2 -m controlbooth.trainer.miniature unet --work FOLDER
    export   writes the diffusers folder;   score   samples 128 held-out captions and has the judge read them
    unpack   the reverse of export: fills an empty work folder from the shipped weights, so that `unet` trains them on

`vae` and `unet` go on from what they saved. MINUTES of each stage of the shipped weights are in its model card.
"""

import argparse
import json
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from controlbooth.data.parent import end_with_parent
from controlbooth.data.scenes import CLASSES, COLOURS, HELD_OUT_SEED, LANDMARK_COLOURS, SIZES, Scene, render, scene
from controlbooth.models.pretrained import MINIATURE, load_base
from controlbooth.models.sampling import sample, to_uint8
from controlbooth.models.weights import save_pretrained, save_weights
from controlbooth.trainer.distributed import World, barrier, gather_objects, join, sum_tensor
from controlbooth.trainer.evaluate.control import control_fidelity
from controlbooth.trainer.evaluate.grids import draw_grid
from controlbooth.trainer.evaluate.judge import ATTRIBUTES, NONE, Judge, facts, load_judge, obedience, read, split
from controlbooth.trainer.evaluate.kinds import NEAR, agreement
from controlbooth.trainer.evaluate.reader import KINDS, Reader, Reading, load_reader
from controlbooth.trainer.evaluate.reader import read as read_condition

SIZE = 64
VAE: dict[str, Any] = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=12,
    layers_per_block=1,
    block_out_channels=(16, 32, 64, 96),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=1,  # with 2 channels a group, a flat colour is normalised away
    sample_size=SIZE,
)

CAPTION_TOKENS = 24
UNET: dict[str, Any] = dict(
    sample_size=SIZE // 8,
    in_channels=12,
    out_channels=12,
    block_out_channels=(96, 160),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=128,
    attention_head_dim=5,  # which in a U-Net of this age is the number of heads
    norm_num_groups=16,
    resnet_time_scale_shift="scale_shift",
    addition_embed_type="text",  # prompts, pooled, join the timestep: classes are learned in a tenth of the time
)
SCHEDULER: dict[str, Any] = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.02,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    clip_sample=False,
    timestep_spacing="trailing",
    steps_offset=0,
)
BATCH = 32  # on each of two ranks
GUIDANCE = 3.0
SAMPLING_STEPS = 25
LEARNING_RATE = 5e-4


class Clock:
    """Stops a stage after its minutes, and says now and then how it goes."""

    def __init__(self, minutes: float, every_seconds: float = 30.0) -> None:
        self.start = self.last = time.monotonic()
        self.seconds = minutes * 60.0
        self.every_seconds = every_seconds

    @property
    def share(self) -> float:
        return min(1.0, (time.monotonic() - self.start) / self.seconds)

    def due(self) -> bool:
        if time.monotonic() - self.last < self.every_seconds:
            return False
        self.last = time.monotonic()
        return True


def save_atomically(state: dict, path: Path) -> None:
    temporary = path.with_name(path.name + ".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _picture(index: int) -> np.ndarray:
    return render(scene(0, index), SIZE).image


def draw_scenes(work: Path, count: int) -> None:
    temporary = work / "images.partial.npy"
    images = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, SIZE, SIZE, 3))
    with ProcessPoolExecutor(initializer=end_with_parent) as processes:
        drawn = processes.map(_picture, range(count), chunksize=64)
        for i, image in enumerate(tqdm(drawn, total=count, unit="scene")):
            images[i] = image
    images.flush()
    temporary.replace(work / "images.npy")


def pictures(work: Path) -> np.ndarray:
    return np.load(work / "images.npy")  # whole: random rows of a mapped file wait for the disk


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], channels last."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def mixed_precision(device: str = "cpu") -> torch.autocast:
    """bfloat16 where the device multiplies in it; elsewhere it would cost ten times the time of float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or torch.cpu._is_avx512_bf16_supported())


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def start_linear(module: nn.Module) -> None:
    """Variance-preserving weights, and residual branches that begin at zero: the network starts as a linear one.

    With PyTorch's default weights each of the 20 layers shrinks its input to 0.58, and a small autoencoder spends its
    first thousand steps on growing out of that.
    """
    for name, inner in module.named_modules():
        if isinstance(inner, nn.Conv2d | nn.Linear):
            nn.init.normal_(inner.weight, std=inner.weight[0].numel() ** -0.5)
            if inner.bias is not None:
                nn.init.zeros_(inner.bias)
            if name.endswith(("conv2", "to_out.0", "proj_out", "ff.net.2")):
                nn.init.zeros_(inner.weight)


def train_vae(work: Path, minutes: float) -> None:
    torch.manual_seed(0)
    images = pictures(work)
    vae: Any = AutoencoderKL(**VAE)
    start_linear(vae)
    with torch.no_grad():  # quiet latents at first
        vae.quant_conv.weight[12:].zero_()
        vae.quant_conv.bias[12:].fill_(-4.0)
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    step, path = 0, work / "vae.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        vae.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    draw = np.random.default_rng(step)
    clock, losses = Clock(minutes), []
    while clock.share < 1.0:
        whole = clock.share > 0.75
        batch = 8 if whole else 16
        rows = np.sort(draw.choice(len(images) - 256, batch, replace=False))
        x = to_tensor(images[rows])
        if not whole:
            corners = draw.integers(0, SIZE - 32 + 1, size=(batch, 2))
            x = torch.stack([x[i, :, top : top + 32, left : left + 32] for i, (top, left) in enumerate(corners)])
        x = x.contiguous(memory_format=torch.channels_last)
        warmup = min(1.0, (step + 1) / 100)
        set_learning_rate(optimizer, 1.5e-3 * warmup * min(1.0, 4.0 * (1.0 - clock.share) + 0.02))
        with mixed_precision():
            posterior = vae.encode(x).latent_dist
            restored = vae.decode(posterior.sample()).sample
        error = restored.float() - x
        loss = error.square().mean() + 0.1 * error.abs().mean() + 2e-5 * posterior.kl().float().mean() / 64
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(error.detach().square().mean().item())
        if clock.due():
            save_atomically(dict(model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step), path)
            psnr = 10 * math.log10(4.0 / np.mean(losses[-50:]))
            kl = posterior.kl().mean().item() / (x.shape[2] * x.shape[3] / 64)
            print(f"vae step {step} whole {whole} psnr {psnr:.2f} dB kl/position {kl:.1f} nats", flush=True)
    save_atomically(dict(model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step), path)
    vae.eval()
    with torch.no_grad():
        x = to_tensor(images[-256:])
        latents = vae.encode(x).latent_dist.mode()
        error = (vae.decode(latents).sample - x).square().mean(dim=(1, 2, 3))
    print(
        f"held out: {(10 * torch.log10(4.0 / error)).mean():.2f} dB; latents {latents.std():.3f}",
        latents.std(dim=(0, 2, 3)),
    )


def train_judge(work: Path, minutes: float) -> None:
    torch.manual_seed(0)
    images = pictures(work)
    truth = torch.tensor([facts(scene(0, i)) for i in range(len(images))])
    judge: Any = Judge()
    judge.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    draw = np.random.default_rng(0)
    clock, step = Clock(minutes), 0
    while clock.share < 1.0:
        rows = draw.choice(len(images) - 1024, 128, replace=False)
        x = spoil(to_tensor(images[rows]))
        set_learning_rate(optimizer, 2e-3 * min(1.0, (step + 1) / 50) * min(1.0, 2.0 * (1.0 - clock.share) + 0.01))
        with mixed_precision():
            logits = split(judge(x).float())
        loss = torch.stack([F.cross_entropy(one, truth[rows, i]) for i, one in enumerate(logits)]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if clock.due():
            print(f"judge step {step} loss {loss.item():.4f}", flush=True)
    judge.eval()
    held_out = [scene(HELD_OUT_SEED, i) for i in range(1024)]
    seen = read(judge, np.stack([render(what).image for what in held_out]))
    print("real held-out scenes:", {k: round(v, 4) for k, v in obedience(seen, held_out).items()})
    save_weights({k: v.half() for k, v in judge.state_dict().items()}, work / "judge.safetensors")


def train_reader(work: Path, minutes: float) -> None:
    """Its scenes have another seed than the judge's, and their conditions with them; they are drawn anew here.

    The one stage that takes a GPU where there is one: it needs some 20,000 steps, half an hour on two cores.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, batch = 16_384, 32
    with ProcessPoolExecutor(initializer=end_with_parent) as processes:
        drawn = list(tqdm(processes.map(_conditions, range(count), chunksize=64), total=count, unit="scene"))
    truth = {name: torch.from_numpy(np.stack([one[name] for one in drawn])).to(device) for name in drawn[0]}
    network: Any = Reader()
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    draw = np.random.default_rng(0)
    clock, step = Clock(minutes), 0
    while clock.share < 1.0:
        rows = torch.from_numpy(draw.choice(count, batch, replace=False)).to(device)
        own = {name: values[rows] for name, values in truth.items()}
        set_learning_rate(optimizer, 2e-3 * min(1.0, (step + 1) / 50) * min(1.0, 2.0 * (1.0 - clock.share) + 0.01))
        pixels = own["image"].permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with mixed_precision(device):
            reading = Reading(*(one.float() for one in network(spoil(pixels))))
        normals = own["normals"].permute(0, 3, 1, 2).float() / 127.5 - 1.0
        heat = own["heat"].float() / 255.0
        loss = (
            F.l1_loss(reading.depth, own["depth"].float() / 255.0)
            + (reading.normals - normals).square().mean()
            + 0.2 * F.cross_entropy(reading.classes, own["segmentation"].long())
            # key points are two in a thousand pixels: unweighted, to find none is nearly right
            + 20.0 * ((1.0 + 10.0 * heat) * (reading.heat - heat).square()).mean()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if clock.due():
            print(f"reader step {step} loss {loss.item():.4f}", flush=True)
    print(f"reader: {step} steps of {batch} scenes")
    network.eval()
    save_weights({k: v.half() for k, v in network.state_dict().items()}, work / "reader.safetensors")
    for name, value in reading_real(load_reader(work / "reader.safetensors")).items():
        print(f"  {name:<32}{value:.3f}")


def _conditions(index: int) -> dict[str, np.ndarray]:
    """A scene's picture and what the reader is to find in it; heat is 255 at key points and falls within 2 pixels."""
    drawn = render(scene(1, index), SIZE)
    heat = np.zeros((len(LANDMARK_COLOURS), SIZE, SIZE), np.float32)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for points in drawn.landmarks:
        for own, (x, y) in zip(heat, points, strict=True):
            np.maximum(own, np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 4.5), out=own)
    names = ("image", "depth", "normals", "segmentation")
    return {name: getattr(drawn, name) for name in names} | {"heat": np.round(heat * 255).astype(np.uint8)}


def reading_real(reader: Reader, count: int = 256) -> dict[str, float]:
    """How well the reader reads real held-out scenes: what the figures for generated ones are bounded by."""
    drawn = [render(scene(HELD_OUT_SEED, i), SIZE) for i in range(count)]
    images = np.stack([one.image for one in drawn])
    figures: dict[str, list[float]] = {}
    for kind in KINDS:
        for found, one in zip(read_condition(reader, kind, images), drawn, strict=True):
            for name, value in agreement(kind, found, getattr(one, kind)).items():
                figures.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in figures.items()}


def spoil(x: Tensor) -> Tensor:
    """Blur and noise of random strength, for a judge that is not put off by what a generator leaves behind."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(x.shape[0], 1, 1, 1, device=x.device)
    noise = torch.randn_like(x) * torch.rand(x.shape[0], 1, 1, 1, device=x.device) * 0.12
    return (x + share * (blurred - x) + noise).contiguous(memory_format=torch.channels_last)


OTHER_WORDS = (
    "photo picture image painting drawing sketch of the in with at to under over near behind striped dotted "
    "spotted wooden metal glass paper toy plate table garden beach snow city forest street night day front "
    "left right top bottom one two big tiny huge shiny old new dark bright colour color thing object animal "
    "plush clock cup cat dog bear boot can bowl"
).split()


def rare_words(count: int = 48) -> list[str]:
    """Three consonants each, which no word of the captions holds: names for subjects that the base knows nothing of."""
    consonants = "bcdfghjklmnpqrstvwxz"
    draw = np.random.default_rng(7)
    words: dict[str, None] = {"sks": None}
    while len(words) < count:
        words["".join(consonants[i] for i in draw.choice(len(consonants), 3, replace=False))] = None
    return list(words)


def build_tokenizer() -> Any:
    """A byte-pair vocabulary of CLIP's kind in which each word of the captions is one token.

    The merges are learned from the words rather than listed: a hand-written list lets the merges of one word split
    another ("r a" of "rabbit" takes "orange" apart).
    """
    caption_words = ["a", "and", "on", "background", *SIZES, *COLOURS, *CLASSES]
    corpus = {word: 1000 for word in caption_words} | {word: 50 for word in OTHER_WORDS} | {w: 5 for w in rare_words()}
    model = Tokenizer(BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = WhitespaceSplit()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=2000, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator([" ".join([word] * times) for word, times in corpus.items()], trainer)
    merges: Any = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CAPTION_TOKENS)
    for word in corpus:
        pieces = tokenizer.tokenize(word)
        if len(pieces) != 1:
            raise AssertionError(f"{word!r} became {pieces}")
    return tokenizer


def vary(what: Scene, draw: np.random.Generator) -> tuple[str, list[int]]:
    """A caption of the scene, in part of the cases one that says less, and the facts that it states (others: NONE)."""
    with_sizes, with_background, with_photo = draw.random() < 0.8, draw.random() < 0.9, draw.random() < 0.15
    named = [
        f"a {t.size} {t.colour} {t.class_name}" if with_sizes else f"a {t.colour} {t.class_name}" for t in what.objects
    ]
    text = " and ".join(named)
    stated = facts(what)
    names = list(ATTRIBUTES)
    if not with_sizes:
        for which in ("left_size", "right_size"):
            stated[names.index(which)] = ATTRIBUTES[which].index(NONE)
    if with_background:
        text += f" on a {' and '.join(what.background)} background"
    else:
        for which in ("background", "lower_background"):
            stated[names.index(which)] = ATTRIBUTES[which].index(NONE)
    return ("a photo of " + text if with_photo else text), stated


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def train_text(work: Path, minutes: float) -> None:
    """Teaches the text encoder what captions say: every attribute is read from its hidden states by a linear layer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(work / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    readout = nn.Linear(2 * 128, sum(map(len, ATTRIBUTES.values())))
    parameters = [*text_encoder.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
    draw = np.random.default_rng(0)
    clock, step = Clock(minutes), 0
    while clock.share < 1.0:
        varied = [vary(scene(2, int(i)), draw) for i in draw.integers(0, 2**40, size=128)]
        truth = torch.tensor([stated for _, stated in varied])
        hidden = text_encoder(tokens(tokenizer, [text for text, _ in varied])).last_hidden_state  # (B, L, 128)
        set_learning_rate(optimizer, 1e-3 * min(1.0, (step + 1) / 50) * min(1.0, 2.0 * (1.0 - clock.share) + 0.01))
        logits = split(readout(torch.cat([hidden.mean(dim=1), hidden[:, -1]], dim=1)))
        loss = torch.stack([F.cross_entropy(one, truth[:, i]) for i, one in enumerate(logits)]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if clock.due():
            right = torch.stack([one.argmax(dim=1) == truth[:, i] for i, one in enumerate(logits)]).float().mean()
            print(f"text step {step} loss {loss.item():.4f} right {right.item():.4f}", flush=True)
    save_pretrained(text_encoder, work / "text_encoder")


def load_vae(work: Path) -> Any:
    vae: Any = AutoencoderKL(**VAE, scaling_factor=1.0)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["model"])
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def cache_latents(work: Path, world: World) -> None:
    """latents.pt: those of all pictures, (N, 12, 8, 8) float32, each rank encoding its share."""
    path = work / "latents.pt"
    if not all(gather_objects(path.exists(), world)):
        vae, images = load_vae(work), pictures(work)
        raw = torch.zeros(len(images), VAE["latent_channels"], SIZE // 8, SIZE // 8)
        mine = range(64 * world.rank, len(images), 64 * world.world_size)
        with torch.inference_mode(), mixed_precision():
            for i in tqdm(mine, desc="latents", disable=world.rank != 0):
                raw[i : i + 64] = vae.encode(to_tensor(images[i : i + 64])).latent_dist.mode().float()
        raw = sum_tensor(raw)
        if world.rank == 0:
            save_atomically(dict(raw=raw), path)
        barrier()


def read_latents(work: Path) -> tuple[Tensor, Any]:
    """The cached latents and the VAE, both with channels of mean 0 and variance 1.

    The scale goes into the 1x1 convolutions on both sides of the latents, so that `scaling_factor` is 1.
    """
    vae = load_vae(work)
    raw = torch.load(work / "latents.pt", weights_only=True)["raw"]
    mean, std = raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3))
    print("latent std by channel:", [round(v, 2) for v in std.tolist()])
    with torch.no_grad():
        count = len(mean)
        vae.quant_conv.weight[:count] /= std[:, None, None, None]
        vae.quant_conv.bias[:count] = (vae.quant_conv.bias[:count] - mean) / std
        vae.quant_conv.bias[count:] -= 2.0 * std.log()
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]
    return ((raw - mean[:, None, None]) / std[:, None, None]), vae


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**UNET)
    for name, inner in unet.named_modules():  # residual branches begin at zero, as in ADM
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(inner.weight)
            nn.init.zeros_(inner.bias)
    return unet


def average_gradients(module: nn.Module, share: float, world: World) -> float:
    """Replaces gradients by their mean over ranks. Returns the mean of `share`, so that all ranks end together."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = sum_tensor(torch.cat([*(g.flatten() for g in gradients), torch.tensor([share])])) / world.world_size
    for gradient, mean in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return flat[-1].item()


def train_unet(work: Path, minutes: float, final: bool) -> None:
    """v-prediction, uniform timesteps, an exponential average that warms up. `final`: the learning rate ends at 0."""
    world = join()  # two ranks with a thread each: small operations do not gain from two threads
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.world_size))
    torch.manual_seed(0)
    cache_latents(work, world)
    latents, _ = read_latents(work)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(work / "text_encoder").eval().requires_grad_(False)
    unet: Any = build_unet()
    unet.to(memory_format=torch.channels_last)
    average = {name: p.detach().clone() for name, p in unet.named_parameters()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    noise_scheduler: Any = DDPMScheduler(**SCHEDULER)
    step, path = 0, work / "unet.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        unet.load_state_dict(saved["model"])
        average, step = saved["average"], saved["step"]
        if saved["optimizer"] is not None:  # none after `unpack`
            optimizer.load_state_dict(saved["optimizer"])
    draw = np.random.default_rng([step, world.rank])
    torch.manual_seed(step * world.world_size + world.rank)
    clock, losses, share = Clock(minutes, every_seconds=60.0), [], 0.0

    def save() -> None:
        state = dict(model=unet.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step)
        save_atomically(state, path)

    started, first = time.monotonic(), step
    while share < 1.0:
        rows = draw.integers(0, len(latents) - 256, size=BATCH)
        captions = ["" if draw.random() < 0.1 else vary(scene(0, int(i)), draw)[0] for i in rows]
        with torch.inference_mode():
            hidden = text_encoder(tokens(tokenizer, captions)).last_hidden_state
        hidden = hidden.clone()
        x = latents[rows]
        noise = torch.randn_like(x)
        timesteps = (torch.rand(BATCH) + torch.arange(BATCH)) / BATCH  # stratified: one from each range
        timesteps = (timesteps * noise_scheduler.config.num_train_timesteps).long()
        noisy = noise_scheduler.add_noise(x, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = noise_scheduler.get_velocity(x, noise, timesteps)
        rate = LEARNING_RATE * min(1.0, (step - first + 1) / 200)
        set_learning_rate(optimizer, rate * (min(1.0, 3.0 * (1.0 - share) + 0.02) if final else 1.0))
        with mixed_precision(), sdpa_kernel(SDPBackend.MATH):  # for so few tokens faster than the fused kernel
            predicted = unet(noisy, timesteps, hidden).sample
        loss = F.mse_loss(predicted.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        share = average_gradients(unet, clock.share, world)
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in unet.parameters()], 1.0 - decay)
        losses.append(loss.item())
        if clock.due() and world.rank == 0:
            save()
            speed = (step - first) * BATCH * world.world_size / (time.monotonic() - started)
            print(
                f"unet step {step} loss {np.mean(losses[-200:]):.4f} {speed:.0f} samples/s",
                flush=True,
            )
    if world.rank == 0:
        save()


def export(work: Path, out: Path) -> None:
    """Writes the diffusers folder in fp16: averaged U-Net, VAE with unit-variance latents, text encoder, tokenizer."""
    _, vae = read_latents(work)
    unet: Any = build_unet()
    saved = torch.load(work / "unet.pt", weights_only=True)
    unet.load_state_dict(saved["average"])
    text_encoder: Any = CLIPTextModel.from_pretrained(work / "text_encoder")
    build_pipeline: Any = StableDiffusionPipeline
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline = build_pipeline(
        vae=vae.to(memory_format=torch.contiguous_format).half(),
        text_encoder=text_encoder.half(),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=unet.half(),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(temporary)
    config = temporary / "text_encoder" / "config.json"  # else transformers loads it in fp16, beside a U-Net in fp32
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for network in ("judge", "reader"):
        shutil.copy(work / f"{network}.safetensors", temporary)
    (temporary / "training.json").write_text(json.dumps({"unet_steps": saved["step"], "batch": 2 * BATCH}))
    for kept in ("README.md", "samples.png"):
        if (out / kept).exists():
            shutil.copy(out / kept, temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB, after {saved['step']} steps")


def unpack(work: Path, out: Path) -> None:
    """Fills a work folder from the exported one. The optimizer's moments are not shipped: they warm up again."""
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(out / name, work / name, dirs_exist_ok=True)
    for network in ("judge", "reader"):
        shutil.copy(out / f"{network}.safetensors", work)
    vae: Any = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32)
    save_atomically(dict(model=vae.state_dict(), optimizer=None, step=0), work / "vae.pt")
    unet: Any = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)
    average = {name: p.detach().clone() for name, p in unet.named_parameters()}
    steps = json.loads((out / "training.json").read_text())["unet_steps"]
    save_atomically(dict(model=unet.state_dict(), optimizer=None, average=average, step=steps), work / "unet.pt")


def score(out: Path, count: int = 128) -> dict[str, float]:
    """Samples held-out captions, has the judge read the pictures, and draws some of them."""
    base = load_base(out)
    judge = load_judge(out / "judge.safetensors")
    scenes = [scene(HELD_OUT_SEED, i) for i in range(count)]
    captions = [what.caption for what in scenes]
    batches = [range(first, min(first + 32, count)) for first in range(0, count, 32)]
    pictures = np.concatenate(
        [
            sample(base, [captions[i] for i in rows], seeds=rows, steps=SAMPLING_STEPS, guidance_scale=GUIDANCE).numpy()
            for rows in batches
        ]
    )
    real = np.stack([render(what).image for what in scenes])
    restored = to_uint8(
        torch.cat([base.decode_latents(base.encode_latents(to_tensor(real[list(rows)]))) for rows in batches])
    ).numpy()
    error = np.square(restored.astype(float) - real).mean(axis=(1, 2, 3))
    figures = {f"samples_{k}": v for k, v in obedience(read(judge, pictures), scenes).items()}
    figures |= {f"real_{k}": v for k, v in obedience(read(judge, real), scenes).items()}
    figures |= {f"restored_{k}": v for k, v in obedience(read(judge, restored), scenes).items()}
    figures |= {f"reader_{k}": v for k, v in reading_real(load_reader(out / "reader.safetensors")).items()}
    figures["vae_psnr"] = float((10 * np.log10(255.0**2 / error)).mean())
    figures |= {f"restored_{k}": float(v.mean()) for k, v in _control_of(restored, scenes).items()}
    columns = {"sample": pictures[:12], "real": real[:12], "through the VAE": restored[:12]}
    draw_grid(out / "samples.png", columns, captions[:12])
    for name, value in figures.items():
        print(f"  {name:<32}{value:.3f}")
    (out / "README.md").write_text(card(out, figures, count))
    return figures


def card(out: Path, figures: dict[str, float], count: int) -> str:
    """The model card: what it is, how it was made, what it can do."""
    asked = ("background", "object_colour", "object_class", "object_size", "count")
    rows = [
        f"| {name.replace('_', ' ')} | "
        + " | ".join(f"{100 * figures[f'{what}_{name}']:.1f} %" for what in ("samples", "restored", "real"))
        + " |"
        for name in asked
    ]
    parts = {
        "U-Net": build_unet(),
        "VAE": AutoencoderKL(**VAE),
    }
    steps = json.loads((out / "training.json").read_text())["unet_steps"]
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [controlbooth, latent-diffusion, text-to-image]
---
# The miniature: a latent diffusion model for CPUs

64 x 64 pictures of one or two objects ({", ".join(CLASSES)}) in {len(COLOURS)} colours
on plain or two-tone backgrounds, from captions such as "a large red mug and a small yellow star on a teal background".
It is what controlbooth's main job, tests and figures run on; it draws nothing else. Parameters: {sizes};
factor 8, 12 latent channels, v-prediction.

```python
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("models/miniature")
pipeline("a large red mug on a teal background", guidance_scale={GUIDANCE}).images[0].save("mug.png")
```

## Figures

{count} held-out captions, {SAMPLING_STEPS} DDIM steps, guidance {GUIDANCE}; read by the judge, whose own errors are in
the last column. `python -m controlbooth.trainer.miniature score --work FOLDER` prints them and writes this page.

| | samples | real pictures through the VAE | real pictures |
| --- | --- | --- | --- |
{chr(10).join(rows)}

The VAE restores real pictures at {figures["vae_psnr"]:.1f} dB (edge F1 {figures["restored_edge_f1"]:.3f}, mask IoU
{figures["restored_mask_iou"]:.3f}), which bounds what control can score on this base.

Conditions are found again in pictures by the reader; in real held-out ones it finds depth (ratio below 1.25 in
{100 * figures["reader_depth_delta"]:.1f} % of pixels), normals ({figures["reader_normals_angle"]:.1f} degrees off),
segmentation (mean IoU {figures["reader_segmentation_miou"]:.3f}) and key points
({100 * figures["reader_pose_pck"]:.1f} % within {NEAR:.0%} of the side).

![samples beside real pictures](samples.png)

## Recipe

Trained by `trainer/miniature.py` from random weights on scenes of `data/scenes.py` (seed 0), and on nothing else:

```
python -m controlbooth.trainer.miniature scenes --work FOLDER
python -m controlbooth.trainer.miniature vae    --work FOLDER --minutes 22
python -m controlbooth.trainer.miniature judge  --work FOLDER --minutes 7
python -m controlbooth.trainer.miniature reader --work FOLDER --minutes 30
python -m controlbooth.trainer.miniature text   --work FOLDER --minutes 4
torchrun --standalone --nproc-per-node 2 -m controlbooth.trainer.miniature unet --work FOLDER --minutes 170 --final
python -m controlbooth.trainer.miniature export --work FOLDER
python -m controlbooth.trainer.miniature score  --work FOLDER
```

The U-Net has seen {2 * BATCH * steps:,} samples. To train it on: stages `unpack` and `scenes` into an empty folder,
then `unet`.
"""


def _control_of(pictures: np.ndarray, scenes: list[Scene]) -> dict[str, np.ndarray]:
    rendered = [render(what) for what in scenes]
    return control_fidelity(
        pictures, np.stack([r.edges for r in rendered]), np.stack([r.segmentation for r in rendered])
    )


STAGES = {"vae": train_vae, "judge": train_judge, "reader": train_reader, "text": train_text, "unet": train_unet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("scenes", *STAGES, "export", "score", "unpack"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the training's own files")
    parser.add_argument("--out", type=Path, default=MINIATURE, help="the diffusers folder (default: models/miniature)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the stage trains")
    parser.add_argument("--scenes", type=int, default=64_000, help="how many the stage `scenes` draws")
    parser.add_argument("--final", action="store_true", help="let the U-Net's learning rate end at 0 (the last run)")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "scenes":
        draw_scenes(options.work, options.scenes)
    elif options.stage == "export":
        export(options.work, options.out)
    elif options.stage == "score":
        score(options.out)
    elif options.stage == "unpack":
        unpack(options.work, options.out)
    elif options.stage == "unet":
        train_unet(options.work, options.minutes, options.final)
    else:
        STAGES[options.stage](options.work, options.minutes)


if __name__ == "__main__":
    main()
