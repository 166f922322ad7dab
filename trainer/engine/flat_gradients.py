"""Gradients in one flat tensor, and the optimizer's step on it, in place of DeepSpeed's at stages 1 and 2.

DeepSpeed copies each gradient into a bucket, out of it again after the reduction, together into a flat tensor and that
to fp32, for every micro-batch; its step asks for the gradients' norm and waits for the answer three times. Here each
gradient is added in fp32 to its place in a flat tensor as soon as it is there, and let go. At the end of a step one
reduce-scatter gives each rank the sum of its share, one collective tells all ranks the norm and whatever else they tell
each other of the step, and nothing waits: the fused optimizer takes the clipping and the skipping as tensors. Other
optimizers than AdamW move whole tensors instead (whole_tensors.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from controlbooth.trainer.engine.distributed import gather_rows, gather_shares, own_share, sum_into_shares

ROW = 2**14
"""Elements of a sum of squares in float32."""


Move = Callable[[Sequence[Tensor], Tensor, Tensor], None]
"""Takes a step with this rank's share of the gradients of each group, what they are divided by, and whether they are
not finite: both as of `clipping`."""


@dataclass(frozen=True)
class Taken:
    """What is known of an optimizer step that was taken, on the device: to read it is to wait for the step."""

    norm: Tensor
    """Of all gradients before clipping, () float64; not finite where the step was skipped."""
    skipped: Tensor
    """Whether weights and optimizer stayed as they were, since a gradient was not finite, () bool."""
    told: Tensor
    """What each rank told the others, (ranks, values) float64."""


def clipping(norm: Tensor, most: float, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns what gradients are to be divided by, and whether they are not finite (0 or 1): () float32 each, as
    PyTorch's fused optimizers take them.

    norm: of the gradients, (). most: the norm above which they are scaled down to it; 0 is never.
    """
    scale = ((norm + 1e-6) / most).clamp(min=1.0) if most else torch.ones_like(norm)
    return (scale * loss_scale).float(), (~norm.isfinite()).float()


def sum_of_squares(flat: Tensor) -> Tensor:
    """Computes the sum of squares of a flat float32 tensor, () float64.

    In float32 a long sum loses digits, 1 % of it over a hundred million, so the sums are short ones, and only they are
    added up in float64: all of it would cost a CPU 15 ms for 15 million.
    """
    rows = flat[: flat.numel() // ROW * ROW].view(-1, ROW)
    rest = flat[rows.numel() :]
    parts = torch.cat([torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(rest).reshape(1)])
    return torch.linalg.vector_norm(parts, dtype=torch.float64).square()


class FlatGradients:
    """Takes over from a DeepSpeedZeroOptimizer of DeepSpeed 0.19 what happens between a backward pass and the weights.

    Replaces its `process_gradients`, called with each parameter whose gradient has been computed, its
    `reduce_gradients` (stage 1) and `independent_gradient_partition_epilogue` (stage 2), called after a backward pass,
    and its `step`. Its flat weights, masters and their shares are read; checkpoints are DeepSpeed's own.
    """

    def __init__(self, optimizer: Any, move: Move | None = None) -> None:
        self.optimizer = optimizer
        self.move: Move = partial(_move_fused, optimizer) if move is None else move
        self.flats: list[Tensor] = []
        """For each group of parameters the gradients of all, (parameters and padding,) float32: ranks' shares in
        turn, of equal size. After the step's reduction a rank's own share holds the sum over ranks."""
        self.places: dict[nn.Parameter, Tensor] = {}
        """Views of the flat tensors, in the shapes of the parameters."""
        self.written: set[nn.Parameter] = set()
        """Parameters that have a gradient in `places` from this optimizer step."""
        self.row: Tensor = torch.zeros(0, dtype=torch.float64, device=optimizer.device)
        """What this rank tells the others of the step that is about to be taken, (values,) float64."""
        self.taken: Taken | None = None
        """Of the last step."""
        self.hooks: list[Any] = []
        for weights, group in zip(optimizer.bit16_groups_flat, optimizer.bit16_groups, strict=True):
            flat = torch.zeros(weights.numel(), dtype=torch.float32, device=optimizer.device)
            for parameter in group:
                start = parameter.storage_offset() - weights.storage_offset()
                self.places[parameter] = flat.narrow(0, start, parameter.numel()).view(parameter.shape)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(self.add))
            self.flats.append(flat)
        optimizer.process_gradients = _nothing
        optimizer.reduce_gradients = _nothing
        optimizer.independent_gradient_partition_epilogue = partial(
            setattr, optimizer, "_epilogue_ran_this_backward", True
        )
        optimizer.step = self.step

    @torch.no_grad()
    def add(self, parameter: Tensor) -> None:
        """Takes over a gradient that has just been computed."""
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        if parameter in self.written:
            self.places[parameter].add_(parameter.grad)
        else:
            self.places[parameter].copy_(parameter.grad)
            self.written.add(parameter)
        parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Makes one step of the optimizer with the gradients of all ranks, unless one is not finite, and notes in
        `taken` what came of it."""
        optimizer, shares = self.optimizer, self.reduced()
        squares = torch.stack([sum_of_squares(share) for share in shares]).sum()
        rows = gather_rows(torch.cat([squares.reshape(1), self.row]))
        loss_scale = float(optimizer.loss_scale)
        norm = rows[:, 0].sum().sqrt() / loss_scale
        scale, not_finite = clipping(norm, optimizer.clip_grad, loss_scale)
        if optimizer.dtype == torch.float16:  # its scale is the host's, and depends on the answer
            optimizer.overflow = bool(not_finite)
            optimizer._update_scale(optimizer.overflow)
        self.move(shares, scale, not_finite)
        optimizer._lazy_init_hp_params_optimizer_state()
        masters = optimizer.single_partition_of_fp32_groups
        for weights, master in zip(optimizer.bit16_groups_flat, masters, strict=True):
            own_share(weights).copy_(master)
            gather_shares(weights)
        self.taken = Taken(norm, not_finite.bool(), rows[:, 1:])

    def release(self) -> list[Tensor]:
        """Lets go of the parameters, which may be trained on by another engine, and returns the flat tensors."""
        for hook in self.hooks:
            hook.remove()
        self.places.clear()
        return self.flats

    def reduced(self) -> list[Tensor]:
        """Returns this rank's share of the gradients, for each group: the mean over ranks, as DeepSpeed has it."""
        for parameter, place in self.places.items():
            if parameter not in self.written:  # no loss depends on it, and an earlier step's gradient may be there
                place.zero_()
        self.written.clear()
        shares = [sum_into_shares(flat) for flat in self.flats]
        for flat, share in zip(self.flats, shares, strict=True):
            if (ranks := flat.numel() // share.numel()) > 1:
                share.div_(ranks)
        return shares


def _move_fused(optimizer: Any, shares: Sequence[Tensor], scale: Tensor, not_finite: Tensor) -> None:
    """Moves the masters of a DeepSpeedZeroOptimizer by the fused optimizer in it, without waiting for anything."""
    masters = optimizer.single_partition_of_fp32_groups
    for master, share in zip(masters, shares, strict=True):
        master.grad = share
    with scaled_by(optimizer.optimizer, scale, not_finite):
        optimizer.optimizer.step()
    for master in masters:
        master.grad = None


@contextmanager
def scaled_by(optimizer: Any, scale: Tensor, not_finite: Tensor) -> Iterator[None]:
    """Has a fused optimizer of PyTorch divide gradients by `scale` and leave out a step where `not_finite` is 1, within
    the block: as torch.amp.GradScaler does, without waiting for either."""
    optimizer.grad_scale, optimizer.found_inf = scale, not_finite
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def _nothing(*_: Any, **__: Any) -> None:
    """Stands where DeepSpeed would reduce gradients that it does not have."""
