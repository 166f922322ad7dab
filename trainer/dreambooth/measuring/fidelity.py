"""How well subjects are learnt (arXiv 2208.12242, section 4): pure functions of embeddings, whoever computed them.

Embeddings are (N, D) float32 of unit length, so that a product is a cosine similarity in [-1, 1].
"""

import torch
from torch import Tensor

from controlbooth.data.errors import UserError


def similarity(ours: Tensor, theirs: Tensor) -> float:
    """Returns the mean cosine over all pairs of a row of (N, D) and a row of (M, D).

    Of generated and real pictures of a subject it is subject fidelity (DINO, CLIP-I; higher is better). Of generated
    pictures of the class and real ones of the subject it is PRES (lower is better: the class is not to become the
    subject). Raises ValueError where N or M is 0.
    """
    if not len(ours) or not len(theirs):
        raise UserError(f"{len(ours)} pictures against {len(theirs)} have no similarity; give at least one of each")
    return float((ours.double() @ theirs.double().T).mean())


def prompt_similarity(images: Tensor, texts: Tensor) -> float:
    """Returns the mean cosine of row i of (N, D) images and row i of (N, D) texts: CLIP-T, higher is better.

    Raises ValueError where their shapes differ.
    """
    if images.shape != texts.shape:
        raise UserError(f"images {tuple(images.shape)} and texts {tuple(texts.shape)} belong together row by row")
    return float((images.double() * texts.double()).sum(dim=1).mean())


def diversity(distances: list[Tensor]) -> float:
    """Returns DIV: the mean distance of two pictures of one prompt, then the mean over prompts. Higher is better.

    distances: for each prompt (M, M), symmetric; the diagonal is left out.
    """
    return sum(mean_off_diagonal(one) for one in distances) / len(distances)


def mean_off_diagonal(square: Tensor) -> float:
    """Returns the mean of an (M, M) tensor without its diagonal. Raises ValueError for M < 2."""
    count = len(square)
    if count < 2:
        raise UserError("one picture has no pair to compare; at least two are needed")
    double = square.double()
    return float((double.sum() - double.diagonal().sum()) / (count * (count - 1)))


def separation(embeddings: Tensor, subjects: list[str]) -> dict[str, float]:
    """Measures how well an encoder tells real subjects apart.

    Its figures for generated pictures can mean no more than these allow. within: mean over subjects of the mean cosine
    of two pictures of it, the paper's row of real images. between: mean cosine of pictures of two subjects.
    nearest_neighbour: share of pictures whose most similar other picture is of the same subject. embeddings: (N, D);
    subjects: N names. Raises ValueError for one subject, or one with one picture.
    """
    names = sorted(set(subjects))
    label = torch.tensor([names.index(subject) for subject in subjects])
    cosines = (embeddings.double() @ embeddings.double().T).cpu()
    same = label[:, None] == label[None, :]
    if len(names) < 2:
        raise UserError(f"there is one subject ({', '.join(names)}) and nothing to tell it from; give at least two")
    if lonely := [name for number, name in enumerate(names) if int((label == number).sum()) < 2]:
        raise UserError(f"{', '.join(lonely[:3])} has one picture; at least two of each subject are compared")
    within = [mean_off_diagonal(cosines[label == n][:, label == n]) for n in range(len(names))]
    others = cosines.clone().fill_diagonal_(-2.0)
    return {
        "within": sum(within) / len(within),
        "between": float(cosines[~same].mean()),
        "nearest_neighbour": float((label[others.argmax(dim=1)] == label).double().mean()),
    }
