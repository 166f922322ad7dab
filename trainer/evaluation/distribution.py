"""What sets of pictures are worth: FID, KID, CLIP score, aesthetic score, diversity.

Features come from encoders that lie in folders, or from the embedded substitute, by its own name: figures of two
encoders never compare. FID and KID are torchmetrics'.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.engine.distributed import World, gather_objects
from controlbooth.trainer.evaluation.encoders import Encoder, Encoders, open_encoders
from controlbooth.trainer.evaluation.held_out import AT_ONCE, HeldOutSet

LEAST_FOR_FID = 2048
"""Pictures below which the covariance of 2,048 features has no full rank; KID has no such bias (arXiv 1801.01401)."""
LEAST_FOR_KID = 16
KID_SUBSET, KID_SUBSETS = 1000, 100
DIVERSITY_PICTURES = 16


@dataclass(frozen=True)
class Measures:
    encoders: Encoders
    aesthetic: tuple[Tensor, Tensor] | None
    """Weight (1, D) and bias (1,) of the linear head on CLIP's embedding."""
    what: dict[str, str]
    """Title of each encoder -> in words."""


def open_measures(folders: Mapping[str, Path], aesthetic: Path | None, device: torch.device) -> Measures:
    """Opens the encoders and the aesthetic head by which sets of pictures are measured.

    folders: of `clip` and `dino`, as far as they are given. aesthetic: a safetensors file, which needs `clip`. Raises
    ConfigError for what cannot be opened, and says what to give.
    """
    encoders = open_encoders(folders, device)
    head = None
    if aesthetic is not None:
        if encoders.clip is None:
            raise ConfigError("--aesthetic is a head on CLIP's embedding: give --encoder clip=FOLDER (ViT-L/14) too")
        head = read_head(aesthetic)
    what = {encoders.subject.title: encoders.subject.what, encoders.div_title: encoders.div_what}
    if encoders.clip is not None:
        what[encoders.clip.title] = encoders.clip.what
    return Measures(encoders, head, what)


def read_head(path: Path) -> tuple[Tensor, Tensor]:
    """Reads the weight (1, D) and bias (1,), float32, of a linear layer with one output.

    Raises ConfigError for anything else.
    """
    try:
        tensors = load_file(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--aesthetic {path} cannot be read as safetensors: {error}") from error
    named = {name.rpartition(".")[2]: tensor.float() for name, tensor in tensors.items()}
    if set(named) != {"weight", "bias"} or named["weight"].ndim != 2 or len(named["weight"]) != 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ConfigError(f"--aesthetic {path} holds {shapes}, and a linear head has a weight (1, D) and a bias (1,)")
    return named["weight"], named["bias"]


def measure_sets(
    measures: Measures, images: dict[str, np.ndarray], held: HeldOutSet, mine: Sequence[int], world: World
) -> dict[str, dict[str, Any]]:
    """Measures whole sets of pictures: figure -> {"values": {variant: value}, "note": text}.

    images: for each variant of the pictures, this rank's (n, H, W, 3) uint8; the last variant is the real pictures,
    with which the others are compared. Each rank encodes its own rows, and every rank gets the whole result.
    """
    subject, clip = measures.encoders.subject, measures.encoders.clip
    variants = list(images)
    real = variants[-1]
    features = {variant: gathered(subject, images[variant], mine, world) for variant in variants}
    count = len(features[real])
    result: dict[str, dict[str, Any]] = {}
    if count >= LEAST_FOR_KID:
        result[f"KID by {subject.title}"] = dict(
            values={variant: kid(widened(features[variant]), widened(features[real])) for variant in variants[:-1]},
            note="lower is better, 0 for pictures of the same distribution",
        )
    if count >= LEAST_FOR_FID:
        values = {variant: fid(widened(features[variant]), widened(features[real])) for variant in variants[:-1]}
        result[f"FID by {subject.title}"] = dict(values=values, note="lower is better")
    else:
        instead = ": see KID" if count >= LEAST_FOR_KID else ""
        result["FID"] = dict(values={}, note=f"needs {LEAST_FOR_FID:,} pictures and there are {count}{instead}")
    if clip is not None:
        assert clip.texts is not None
        texts = clip.texts(held.captions)
        embedded = {variant: gathered(clip, images[variant], mine, world) for variant in variants}
        result["CLIP score"] = dict(
            values={
                variant: float((one.double() * texts.double()).sum(dim=1).mean()) for variant, one in embedded.items()
            },
            note="mean cosine of picture and prompt; higher is better",
        )
        if measures.aesthetic is not None:
            weight, bias = measures.aesthetic
            result["CLIP aesthetic score"] = dict(
                values={variant: float((one @ weight.T + bias).mean()) for variant, one in embedded.items()},
                note="higher is better",
            )
    few = {variant: gathered_pictures(images[variant], mine, world) for variant in variants}
    result[measures.encoders.div_title] = dict(
        values={
            variant: off_diagonal(measures.encoders.distances(one)) for variant, one in few.items() if len(one) > 1
        },
        note="mean distance of two pictures of different prompts; higher is more diverse",
    )
    return result


def gathered(encoder: Encoder, images: np.ndarray, mine: Sequence[int], world: World) -> Tensor:
    """Encodes this rank's pictures, and gathers all embeddings on every rank: (N, D) float32, in the set's order."""
    own: dict[int, Tensor] = {}
    for first in range(0, len(mine), AT_ONCE):  # the same pictures in each batch at every world size
        part = slice(first, first + AT_ONCE)
        own |= dict(zip(mine[part], encoder.images(images[part]), strict=True))
    everyone = {row: one for part in gather_objects(own, world) for row, one in part.items()}
    return torch.stack([everyone[row] for row in sorted(everyone)])


def gathered_pictures(images: np.ndarray, mine: Sequence[int], world: World) -> np.ndarray:
    """Gathers the set's first DIVERSITY_PICTURES pictures on every rank, in the set's order: (n, H, W, 3) uint8."""
    own = {row: image for row, image in zip(mine, images, strict=True) if row < DIVERSITY_PICTURES}
    everyone = {row: one for part in gather_objects(own, world) for row, one in part.items()}
    return np.stack([everyone[row] for row in sorted(everyone)])


def off_diagonal(square: Tensor) -> float:
    count = len(square)
    return float(square.double().sum() - square.double().diagonal().sum()) / (count * (count - 1))


class Passed(nn.Module):
    """torchmetrics asks for a network; features are computed before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def widened(features: Tensor) -> Tensor:
    """Scales features of unit length, (N, D), to (N, D) float64 of length sqrt(D).

    Features that no encoder has normalised are about as long. KID's kernel, (x . y / D + 1)^3, is then (cosine + 1)^3.
    """
    return features.double() * features.shape[1] ** 0.5


def kid(generated: Tensor, real: Tensor) -> float:
    """Computes the kernel inception distance (KID, arXiv 1801.01401) of (N, D) and (M, D) features.

    It is the mean over KID_SUBSETS subsets of KID_SUBSET features, drawn from a fixed seed; where the smaller set has
    no more features than that, one subset of its size is taken.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(generated), len(real))
    whole = size <= KID_SUBSET
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that features are kept, which they are anyway
        torch.manual_seed(0)
        metric: Any = KernelInceptionDistance(
            feature=Passed(generated.shape[1]),
            subsets=1 if whole else KID_SUBSETS,
            subset_size=min(size, KID_SUBSET),
            sync_on_compute=False,  # each rank has all features already, and they would count once a rank
        )
        metric.update(real, real=True)
        metric.update(generated, real=False)
        return float(metric.compute()[0])


def fid(generated: Tensor, real: Tensor) -> float:
    """Computes the Frechet inception distance (FID, arXiv 1706.08500) of (N, D) and (M, D) features.

    Raises UserError where N or M is below LEAST_FOR_FID.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(generated), len(real)) < LEAST_FOR_FID:
        raise UserError(f"FID needs {LEAST_FOR_FID:,} pictures on each side, and these are {len(generated)}; use KID")
    metric: Any = FrechetInceptionDistance(feature=Passed(generated.shape[1]), sync_on_compute=False)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())
