"""torch.compile of the blocks that networks repeat, after a proof that their gradients are those of plain PyTorch.

Compiled code has computed wrong gradients without a word: of a frozen U-Net that inductor compiled as a whole on a CPU,
those of the ControlNet's residuals were off by their own size (torch 2.13). So one step is taken in both ways first, on
random input and with connections that are not zero, and what differs is not compiled.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controlbooth.models.blocks import repeated_blocks

NOTHING = 1e-5
"""Share of the norm of all gradients below which one of a parameter is rounding."""
SHAPES = 256
"""In how many shapes a block may be compiled: each resolution and width of a U-Net has its own. PyTorch stops at 8."""
MOST_APART = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far compiled gradients of a parameter may be from plain ones, as a share of their norm. What is wrong is off by
about 1; what is right is apart by rounding, of which half precision has some per cent in small gradients."""


@dataclass(frozen=True)
class Proof:
    """What a step in both ways has shown."""

    compared: int
    """Parameters whose gradients were compared."""
    worst: float
    """The largest distance of a parameter's gradients, as a share of their norm."""
    wrong: list[str]
    """Parameters whose gradients are too far apart, or whose compiling failed with the error that is named."""


def compile_blocks(network: nn.Module, backend: Any = "inductor") -> int:
    """Has the repeated blocks of a network compiled when they are first called; returns how many there are."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)  # pyright: ignore
    blocks = repeated_blocks(network)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


def run_plainly(network: nn.Module) -> None:
    """Undoes `compile_blocks`."""
    for block in repeated_blocks(network):
        block._compiled_call_impl = None


def prove(
    loss_of: Callable[[nn.Module], Tensor],
    trained: nn.Module,
    frozen: Sequence[nn.Module],
    dtype: torch.dtype,
    zero_parts: Sequence[str],
    backend: Any = "inductor",
) -> Proof:
    """Compares the gradients of one step with and without compiled blocks, on a copy of the network that is trained.

    loss_of(network) computes a loss from the same input each time. frozen: networks that it calls too, whose blocks are
    left compiled. dtype: that the network is trained in. zero_parts: names of its layers that begin at zero, which get
    small random weights in the copy: what comes after a zero has no gradient to compare.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    trial = copy.deepcopy(trained).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trial.named_parameters():
            if any(part in name for part in zero_parts):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.02 * noise.to(parameter))
    plain = _gradients(loss_of, trial)
    for network in (trial, *frozen):
        compile_blocks(network, backend)
    try:
        compiled = _gradients(loss_of, trial)
    except TorchDynamoException as error:  # as where there is no compiler
        return Proof(0, float("inf"), [str(error).strip().splitlines()[0]])
    return compare(plain, compiled, MOST_APART[dtype])


def compare(plain: Mapping[str, Tensor], compiled: Mapping[str, Tensor], most: float) -> Proof:
    """Compares gradients by the names of their parameters. most: the share of the norm that they may be apart.

    A gradient that is zero but for rounding, as that of a key's bias in attention, is measured against that of all.
    """
    norms = {name: gradient.double().norm() for name, gradient in plain.items()}
    least = NOTHING * torch.stack(list(norms.values())).norm()
    apart = {}
    for name, gradient in plain.items():
        difference = (compiled[name].double() - gradient.double()).norm()
        apart[name] = float(difference / norms[name].clamp(min=least))
    wrong = [name for name, share in apart.items() if not share <= most]
    return Proof(len(apart), max(apart.values()), wrong)


def _gradients(loss_of: Callable[[nn.Module], Tensor], network: nn.Module) -> dict[str, Tensor]:
    network.zero_grad()
    loss_of(network).backward()
    return {name: p.grad.detach().clone() for name, p in network.named_parameters() if p.grad is not None}
