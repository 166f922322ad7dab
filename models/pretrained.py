"""Reading base models and ControlNets in the formats that others use: diffusers folders and single .safetensors files.

Nothing here opens a network connection: what a base lacks is an error that says which file to put where.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from controlbooth.models import original_layout
from controlbooth.models.base import Base, check_parts_fit, vae_dtype
from controlbooth.models.controlnet import build_controlnet, check_fits
from controlbooth.models.families import Family, check_family, identify
from controlbooth.models.variants import VariantControlNet
from controlbooth.models.weights import save_pretrained

MINIATURE = Path(__file__).parent / "miniature"
"""The base that is shipped with controlbooth, a diffusers folder; `load_base("miniature")` reads it."""
DECODER_FILE = "decoder.safetensors"
"""In the ControlNet's folder of a checkpoint: the U-Net's decoder that has learned with the ControlNet, in float32."""
UNET_FOLDER = "unet"
"""In the folder of an export: the whole U-Net with that decoder, as diffusers reads it."""


def load_base(
    path: str | os.PathLike[str],
    family: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Base:
    """Reads a base model, frozen.

    path: a diffusers folder (its full-precision files, or where there are none a variant such as *.fp16.safetensors),
    a single .safetensors file in the original layout with a tokenizer/ folder beside it, or "miniature".
    Under fp16 a VAE that asks for it (SDXL's overflows) stays in float32.
    Raises FileNotFoundError for what is missing and ValueError for a base of another or an unknown family.
    """
    path = MINIATURE if os.fspath(path) == "miniature" else Path(path)
    if path.is_dir():
        with _without_bars():
            base = _load_folder(path, family, dtype)
    elif path.is_file():
        base = _load_single_file(path, family, dtype)
    else:
        raise FileNotFoundError(
            f"base model {path} does not exist. Give a diffusers folder, a single .safetensors file, or 'miniature'."
        )
    check_parts_fit(base)
    modules: list[Any] = [base.vae, base.unet, *base.text_encoders]
    for module in modules:
        module.requires_grad_(False).eval().to(device)
    return base


@contextlib.contextmanager
def _without_bars():
    """transformers draws a progress bar for each module that it reads, on every rank."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _load_folder(folder: Path, requested: str, dtype: torch.dtype) -> Base:
    unet_config = _read_unet_config(folder)
    family = check_family(requested, identify(unet_config), str(folder))
    suffixes = [""] if family.text_encoder_count == 1 else ["", "_2"]
    names = ["unet", "vae", *(f"text_encoder{suffix}" for suffix in suffixes)]
    weights = {name: _weights_files(folder / name) for name in names}

    def load(cls: Any, name: str, keyword: str) -> Any:
        options: dict[str, Any] = dict(use_safetensors=True, local_files_only=True)
        config = json.loads((folder / name / "config.json").read_text())
        options[keyword] = vae_dtype(config, dtype) if name == "vae" else dtype
        return cls.from_pretrained(folder / name, variant=_variant(weights[name]), **options)

    encoder_classes = (CLIPTextModel, CLIPTextModelWithProjection)
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text()) if index_path.exists() else {}
    return Base(
        family=family,
        path=folder,
        vae=load(AutoencoderKL, "vae", "torch_dtype"),
        text_encoders=tuple(
            load(cls, f"text_encoder{suffix}", "dtype") for cls, suffix in zip(encoder_classes, suffixes, strict=False)
        ),
        tokenizers=tuple(_load_tokenizer(folder, f"tokenizer{suffix}") for suffix in suffixes),
        unet=load(UNet2DConditionModel, "unet", "torch_dtype"),
        noise_scheduler=_load_noise_scheduler(folder / "scheduler"),
        digest=_digest(folder, [file for files in weights.values() for file in files]),
        zero_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", family.name == "sdxl")),
    )


def _read_unet_config(folder: Path) -> dict[str, Any]:
    config = folder / "unet" / "config.json"
    if config.exists():
        return json.loads(config.read_text())
    transformer = folder / "transformer" / "config.json"
    if transformer.exists():
        return json.loads(transformer.read_text())  # SD3, Flux and others: `identify` names the class it cannot take
    if (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds one module, not a base model. Give the folder that holds unet/, vae/, text_encoder/, "
            "tokenizer/ and scheduler/."
        )
    raise FileNotFoundError(f"{config} does not exist, so {folder} is no diffusers folder of a base model")


def _weights_files(folder: Path) -> list[Path]:
    """The safetensors of a module: the full-precision ones, or else those of its only variant."""
    files = sorted(folder.glob("*.safetensors"))
    variants: dict[str | None, list[Path]] = {}
    for file in files:
        variants.setdefault(_variant([file]), []).append(file)
    if None in variants:
        return variants[None]
    if len(variants) == 1:
        return next(iter(variants.values()))
    if variants:
        raise ValueError(f"{folder} holds the variants {', '.join(map(str, variants))}; keep the one to be used")
    pickled = next(folder.glob("*.bin"), None)
    if pickled:
        raise FileNotFoundError(
            f"{pickled} is a pickle, which can run code when it is read, and there is no .safetensors beside it. "
            "Convert it with save_pretrained(..., safe_serialization=True), or download the safetensors files."
        )
    raise FileNotFoundError(f"{folder} holds no .safetensors file")


def _variant(files: Iterable[Path]) -> str | None:
    """diffusion_pytorch_model.fp16.safetensors and diffusion_pytorch_model.fp16-00001-of-00002.safetensors -> fp16."""
    parts = next(iter(files)).name.removesuffix(".safetensors").split(".")
    return parts[1].split("-")[0] if len(parts) > 1 else None


def load_tokenizers(path: str | os.PathLike[str]) -> tuple[Any, ...]:
    """The tokenizers of a base and nothing else of it: one, or two of SDXL. path: as for `load_base`."""
    path = MINIATURE if os.fspath(path) == "miniature" else Path(path)
    folder = path if path.is_dir() else path.parent
    names = [name for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()]
    return tuple(_load_tokenizer(folder, name) for name in names or ["tokenizer"])


def _load_tokenizer(folder: Path, name: str) -> Any:
    if not (folder / name).is_dir():
        raise FileNotFoundError(
            f"there is no {name}/ in {folder}. A base needs its tokenizer: copy the folder {name}/ (vocab.json, "
            "merges.txt, tokenizer_config.json, special_tokens_map.json) of the base's diffusers release there."
        )
    return AutoTokenizer.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)


def _load_noise_scheduler(folder: Path) -> DDPMScheduler:
    """The training view of whatever scheduler the folder names: same betas and prediction type.

    Predicted latents are never clipped to [-1, 1] as pixels would be; diffusers' pipelines enforce the same.
    """
    if not (folder / "scheduler_config.json").exists():
        raise FileNotFoundError(
            f"{folder / 'scheduler_config.json'} does not exist. It says how noise is added and what the U-Net "
            "predicts: copy it from the base's diffusers release."
        )
    options: dict[str, Any] = dict(clip_sample=False, thresholding=False, local_files_only=True)
    scheduler: Any = DDPMScheduler.from_pretrained(folder, **options)
    return scheduler


def _digest(root: Path, files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            total.update(f"{file.relative_to(root).as_posix()} ".encode())
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _load_single_file(path: Path, requested: str, dtype: torch.dtype) -> Base:
    """A checkpoint in the original layout. Its tokenizer, and a scheduler_config.json if any, lie beside it."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file. A .ckpt can run code when it is read: convert it first.")
    with safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        metadata = file.metadata() or {}
    family = check_family(requested, identify(shapes), str(path))
    suffixes = [""] if family.text_encoder_count == 1 else ["", "_2"]
    tokenizers = tuple(_load_tokenizer(path.parent, f"tokenizer{suffix}") for suffix in suffixes)
    noise_scheduler = _single_file_scheduler(path, family, shapes, metadata)
    assert family.architecture is not None  # `identify` finds only families whose single files can be read
    unet, vae, text_encoders = original_layout.build_base(load_file(path), family.architecture, dtype, str(path))
    return Base(
        family=family,
        path=path,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=tokenizers,
        unet=unet,
        noise_scheduler=noise_scheduler,
        digest=_digest(path.parent, [path]),
        zero_empty_prompt=family.name == "sdxl",
    )


def _single_file_scheduler(
    path: Path, family: Family, shapes: Mapping[str, Any], metadata: Mapping[str, str]
) -> DDPMScheduler:
    folder = path.parent / "scheduler"
    if (folder / "scheduler_config.json").exists():
        return _load_noise_scheduler(folder)
    assert family.architecture is not None
    config = dict(family.architecture.noise_scheduler)
    stated = metadata.get("modelspec.prediction_type")  # Stability AI's ModelSpec: "epsilon" or "v"
    if "v_pred" in shapes or stated in ("v", "v_prediction"):  # SDXL files say it by empty tensors: v_pred, ztsnr
        config["prediction_type"] = "v_prediction"
    elif stated == "epsilon":
        config["prediction_type"] = "epsilon"
    elif family.name == "sd21":
        raise ValueError(
            f"{path} is Stable Diffusion 2.x, which comes in two kinds with equal keys: 512 pixels predicts epsilon, "
            f"768 pixels predicts v. Put the scheduler_config.json of its diffusers release into {folder}."
        )
    if "ztsnr" in shapes:
        config["rescale_betas_zero_snr"] = True
    return DDPMScheduler(**config)


def load_controlnet(
    path: str | os.PathLike[str], unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32
) -> ControlNetModel:
    """A ControlNet to continue from: a diffusers folder, or a single .safetensors file in either layout.

    It is on the CPU and trainable. Raises ValueError if it was not made for such a U-Net, and if a decoder has learned
    with it: `decoder.load_networks` reads both.
    """
    path = Path(path)
    if (path / DECODER_FILE).exists() or ((path / UNET_FOLDER).exists() and (path / "config.json").exists()):
        raise ValueError(
            f"the ControlNet in {path} was trained with an unlocked decoder, and is worth nothing on the base's own. "
            "Go on with its run by raising max_steps, or take one that was trained with the decoder locked"
        )
    return read_controlnet(path, unet, dtype)


def read_controlnet(path: Path, unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32) -> ControlNetModel:
    """`load_controlnet` for those who read the decoder too."""
    if path.is_dir():
        files = _weights_files(path)
        controlnet = controlnet_class(path).from_pretrained(
            path, variant=_variant(files), torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
        check_fits(controlnet, unet, str(path))
        return controlnet.train()
    if not path.is_file():
        raise FileNotFoundError(f"ControlNet {path} does not exist. Give a diffusers folder or a .safetensors file.")
    weights = load_file(path)
    controlnet = build_controlnet(unet, original_layout.hint_channels(weights, str(path)), device="meta")
    original_layout.fill(controlnet, original_layout.to_diffusers(weights, controlnet), dtype, str(path))
    return controlnet


def controlnet_class(folder: Path) -> type[ControlNetModel]:
    """Of what a folder holds, as its config.json names it. Raises ValueError for anything but a ControlNet."""
    classes = {cls.__name__: cls for cls in (ControlNetModel, VariantControlNet)}
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} does not exist, so {folder} is no ControlNet's folder")
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    if name not in classes:
        raise ValueError(f"{folder} holds a {name}, which is no ControlNet that is known: {', '.join(classes)}")
    return classes[name]


def save_controlnet(controlnet: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes a diffusers folder: config.json and diffusion_pytorch_model.safetensors, in the module's dtype."""
    save_pretrained(_unwrapped(controlnet), folder)


def save_single_file(controlnet: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes one .safetensors in the layout of the released ControlNet 1.0 code, which image UIs read.

    Raises ValueError for a ControlNet of the miniature, whose pooled text has no name in that layout, and for one of
    `variants`.
    """
    if isinstance(_unwrapped(controlnet), VariantControlNet):
        raise ValueError("a ControlNet-lite, or one with the paper's hint network, has no names in the original layout")
    original_layout.save(_unwrapped(controlnet), Path(path))


def _unwrapped(controlnet: nn.Module) -> ControlNetModel:
    """A DeepSpeed engine or DistributedDataParallel holds the network as `.module`."""
    module = getattr(controlnet, "module", controlnet)
    if not isinstance(module, ControlNetModel):
        raise TypeError(f"expected a ControlNetModel, or an engine around one, and got {type(module).__name__}")
    return module
