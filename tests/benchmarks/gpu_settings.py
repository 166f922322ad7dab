"""The settings that a row of gpu.py may have, by name: what the trainer does not do, to see what it would bring."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from controlbooth.models.base import Base
from controlbooth.trainer.engine.compiling import compile_blocks, run_plainly
from controlbooth.trainer.engine.distributed import set_arithmetic


@contextmanager
def nothing(base: Base, engine: Any) -> Iterator[None]:
    yield


def arithmetic(deterministic: bool, tf32: bool) -> Callable[[Base, Any], AbstractContextManager[None]]:
    """Makes a setting of engine.deterministic and engine.tf32."""

    @contextmanager
    def set_both(base: Base, engine: Any) -> Iterator[None]:
        set_arithmetic(deterministic, tf32)
        try:
            yield
        finally:
            set_arithmetic(deterministic=True, tf32=False)

    return set_both


@contextmanager
def compiled(base: Base, engine: Any) -> Iterator[None]:
    """Compiles repeated blocks, without the proof of their gradients that a run begins with."""
    for network in (base.denoiser, engine.module):
        compile_blocks(network)
    try:
        yield
    finally:
        for network in (base.denoiser, engine.module):
            run_plainly(network)


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


@contextmanager
def all_of_these(base: Base, engine: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for one in (channels_last, arithmetic(deterministic=False, tf32=True), compiled):
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
    "not deterministic": Setting(arithmetic(deterministic=False, tf32=False)),
    "TF32": Setting(arithmetic(deterministic=True, tf32=True)),
    "channels_last": Setting(channels_last),
    "compile": Setting(compiled, needs_gpu=True),
    "all of these": Setting(all_of_these, needs_gpu=True),
}
"""`default` is deterministic and without TF32. A row with compile is left out on a CPU, where it takes minutes."""
