"""The networks of a base that learn a subject, and the adapters of many subjects in them.

Networks go by the folders that they have in a base, so an adapted layer is called as in the file that diffusers'
load_lora_weights reads: unet.down_blocks.0..., transformer.transformer_blocks.0..., text_encoder....
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from controlbooth.models.base import Base
from controlbooth.models.lora import TEXT, StackedAdapter, attach_adapters, chosen_subjects, layers_of
from controlbooth.trainer.config.subjects import SubjectRunConfig

Adapters = dict[str, StackedAdapter]


def trained_encoders(base: Base) -> dict[str, Any]:
    """Returns the text encoders that can learn a subject, by their folders: those of CLIP, and never T5.

    What a subject teaches a text encoder is a word, of 3 to 5 pictures. T5 has 4.8 billion parameters to spoil by them
    and no counterpart in what others train: loaders of LoRA files, such as those of diffusers, have no place for it.
    """
    parts = zip(base.family.text_encoders, base.text_encoders, strict=True)
    return {part.folder: encoder for part, encoder in parts if part.kind != "T5EncoderModel"}


def attach(config: SubjectRunConfig, base: Base, subjects: int, rank: int) -> tuple[nn.ModuleDict, Adapters]:
    """Puts stacked adapters into the networks of a base that a run trains; -> these networks, and the adapters."""
    encoders = trained_encoders(base) if config.train_text_encoder else {}
    networks = nn.ModuleDict({base.family.denoiser.folder: base.denoiser} | encoders)
    base.text_by_row = bool(encoders)
    layers = {name: layers_of(config.adapter.layers, base.family.is_transformer) for name in networks}
    layers |= dict.fromkeys(encoders, TEXT)
    adapters = {
        f"{folder}.{name}": adapter
        for folder, network in networks.items()
        for name, adapter in attach_adapters(network, layers[folder], subjects, rank).items()
    }
    return networks, adapters


def by_part(adapters: Mapping[str, StackedAdapter]) -> tuple[Adapters, Adapters]:
    """Returns the adapters of what denoises and those of text encoders.

    With guidance the first sees each row twice in a batch, and the others see the rows of either half by themselves.
    """
    texts = {name: adapter for name, adapter in adapters.items() if name.startswith("text_encoder")}
    return {name: adapter for name, adapter in adapters.items() if name not in texts}, texts


@contextmanager
def drawn_subjects(adapters: Mapping[str, StackedAdapter], slots: Sequence[int], branches: int) -> Iterator[None]:
    """Opens a context in which the base draws these subjects, each `branches` times over in a step."""
    denoising, texts = by_part(adapters)
    with chosen_subjects(denoising, list(slots) * branches), chosen_subjects(texts, slots):
        yield
