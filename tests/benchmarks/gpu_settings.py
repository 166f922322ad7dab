"""The settings that a row of gpu.py may have, by name: what the trainer does not do, to see what it would bring."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from controlbooth.models.base import Base


@contextmanager
def nothing(base: Base, engine: Any) -> Iterator[None]:
    yield


@contextmanager
def free_order(base: Base, engine: Any) -> Iterator[None]:
    """Lifts the demand that the same work gives the same bits."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def cudnn_benchmark(base: Base, engine: Any) -> Iterator[None]:
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


@contextmanager
def channels_last(base: Base, engine: Any) -> Iterator[None]:
    """Gives frozen weights this layout, and the ControlNet's input: its own weights lie in DeepSpeed's flat buffers."""
    modules = [base.denoiser, base.vae]
    for module in modules:
        module.to(memory_format=torch.channels_last)
    hook = engine.module.conv_in.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(memory_format=torch.channels_last),)
    )
    try:
        yield
    finally:
        hook.remove()
        for module in modules:
            module.to(memory_format=torch.contiguous_format)


def in_fp32(products: str, convolutions: str) -> Callable[[Base, Any], AbstractContextManager[None]]:
    """Makes a setting of how fp32 is multiplied: `ieee` or `tf32`."""

    @contextmanager
    def set_both(base: Base, engine: Any) -> Iterator[None]:
        matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before = matmul.fp32_precision, conv.fp32_precision
        matmul.fp32_precision, conv.fp32_precision = products, convolutions
        try:
            yield
        finally:
            matmul.fp32_precision, conv.fp32_precision = before

    return set_both


@contextmanager
def all_of_these(base: Base, engine: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for one in (channels_last, free_order, cudnn_benchmark):
            stack.enter_context(one(base, engine))
        yield


@dataclass(frozen=True)
class Setting:
    """What is done around the steps of a row, and before them."""

    around: Callable[[Base, Any], AbstractContextManager[None]] = nothing
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the run's section `engine`, with which the engine is made."""
    needs_gpu: bool = False
    """A row with it is left out elsewhere."""


SETTINGS = {
    "default": Setting(),
    "not deterministic": Setting(free_order),
    "channels_last": Setting(channels_last),
    "cudnn.benchmark": Setting(cudnn_benchmark),
    "all of these": Setting(all_of_these),
    "no TF32": Setting(in_fp32("ieee", "ieee")),
    "TF32": Setting(in_fp32("tf32", "tf32")),
}
"""PyTorch's default, with which `default` runs, is TF32 in convolutions alone."""
