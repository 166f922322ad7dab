"""Optimizers that want whole tensors, on the flat shares of ZeRO's stages 1 and 2.

A rank's share of the masters is cut anywhere, also through a tensor. A tensor that lies in one share is a view of it,
in its shape. One that is cut is put together on every rank that has a part of it, gradient and master, before each
step; each of these ranks moves the whole of it, by the same state, and keeps its own part of the result. There are
fewer such tensors than ranks. So the state of a tensor depends on no number of ranks, and goes over from one to
another bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controlbooth.trainer.config.run import OptimizerConfig
from controlbooth.trainer.engine.distributed import gather_shares, own_share, sum_tensor
from controlbooth.trainer.engine.optimizers import ESTIMATE, make_optimizers, matrix_shape, state_bytes


@dataclass(frozen=True)
class Piece:
    """A tensor of which this rank's share holds something."""

    name: str
    place: slice
    """In the flat tensor of all parameters."""
    tensor: nn.Parameter
    """The whole of it, float32, as a matrix: a view of the share where it is not cut."""
    cut: slice | None
    """Where the whole of it is put together, among all tensors that are cut."""


class WholeTensors:
    """Moves the masters of a DeepSpeedZeroOptimizer of DeepSpeed 0.19, with one group, by a library's optimizers."""

    def __init__(self, zero: Any, network: nn.Module, config: OptimizerConfig) -> None:
        self.zero, self.config = zero, config
        (self.weights,), (self.share,) = zero.bit16_groups_flat, zero.single_partition_of_fp32_groups
        self.first = own_share(self.weights).storage_offset() - self.weights.storage_offset()
        """Where this rank's share begins in the flat tensor."""
        self.cut_elements = 0
        """Of all tensors that are cut, on all ranks."""
        self.pieces: list[Piece] = []
        self.cuts: list[tuple[slice, slice]] = []
        """Of each tensor that is cut: its place in the flat tensor, and where it is put together."""
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        self.planned_bytes = sum(state_bytes(config.name, name, p.shape) for name, p in network.named_parameters())
        """What the optimizers will keep, of all ranks together."""
        for parameter in zero.bit16_groups[0]:
            self._add(names[id(parameter)], parameter)
        self.optimizers = make_optimizers(config, {piece.name: piece.tensor for piece in self.pieces})
        owners = [{id(p): one for group in one.param_groups for p in group["params"]} for one in self.optimizers]
        self.optimizer_of = {key: one for owned in owners for key, one in owned.items()}

    def _add(self, name: str, parameter: nn.Parameter) -> None:
        start, size = parameter.storage_offset() - self.weights.storage_offset(), self.share.numel()
        place, cut = slice(start, start + parameter.numel()), None
        if place.start // size != (place.stop - 1) // size:
            cut = slice(self.cut_elements, self.cut_elements + parameter.numel())
            self.cut_elements = cut.stop
            self.cuts.append((place, cut))
        if place.stop <= self.first or place.start >= self.first + size:
            return
        if cut is None:
            whole = self.share.detach()[place.start - self.first : place.stop - self.first]
        else:
            whole = torch.empty(parameter.numel(), dtype=torch.float32, device=self.share.device)
        self.pieces.append(Piece(name, place, nn.Parameter(whole.view(matrix_shape(parameter.shape))), cut))

    @torch.no_grad()
    def move(self, shares: Sequence[Tensor], scale: Tensor, not_finite: Tensor) -> None:
        """Takes a step, unless `not_finite` is 1: then nothing changes. Every rank calls this.

        shares: this rank's share of the gradients, in a list of one. scale: what they are divided by. Unlike the fused
        AdamW this waits for the answer: none of the libraries takes it as a tensor.
        """
        if bool(not_finite):
            return
        gradients = shares[0].div_(scale)
        whole_gradients, whole_masters = self._put_together(gradients), self._put_together(self.share)
        for piece in self.pieces:
            if piece.cut is None:
                own = gradients[piece.place.start - self.first : piece.place.stop - self.first]
            else:
                own = whole_gradients[piece.cut]
                piece.tensor.view(-1).copy_(whole_masters[piece.cut])
            piece.tensor.grad = own.view_as(piece.tensor)
        del whole_masters
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.zero.optimizer.param_groups[0]["lr"]
            optimizer.step()
        for piece in self.pieces:
            piece.tensor.grad = None
            if piece.cut is not None:
                share, part = self._overlap(piece.place)
                self.share[share] = piece.tensor.view(-1)[part]

    def _put_together(self, flat: Tensor) -> Tensor:
        """Returns the tensors that are cut, (cut_elements,), each whole, of every rank's share of a flat tensor."""
        wholes = torch.zeros(self.cut_elements, dtype=torch.float32, device=flat.device)
        for place, cut in self.cuts:
            share, part = self._overlap(place)
            if share.start < share.stop:
                wholes[cut][part] = flat[share]
        return sum_tensor(wholes) if self.cuts else wholes

    def _overlap(self, place: slice) -> tuple[slice, slice]:
        """Returns what of a place lies in this rank's share: as a part of the share, and as a part of the place."""
        start, stop = max(place.start, self.first), min(place.stop, self.first + self.share.numel())
        return slice(start - self.first, stop - self.first), slice(start - place.start, stop - place.start)

    def states(self) -> dict[str, Any]:
        """Returns what this rank saves: the state of the tensors that begin in its share, by name, and Prodigy's
        estimate, which is empty for others. The tensors are those in use."""
        own = [piece for piece in self.pieces if piece.place.start >= self.first]
        group = self.optimizers[0].param_groups[0] if self.optimizers else {}
        return {
            "optimizer": self.config.name,
            "tensors": {piece.name: dict(self._state(piece)) for piece in own},
            "estimate": {name: group[name] for name in ESTIMATE if name in group},
        }

    def _state(self, piece: Piece) -> Mapping[str, Any]:
        return self.optimizer_of[id(piece.tensor)].state.get(piece.tensor, {})

    def state_bytes(self) -> int:
        """Counts the bytes of tensors that this rank's optimizers keep."""
        tensors = [value for piece in self.pieces for value in self._state(piece).values() if torch.is_tensor(value)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    @torch.no_grad()
    def take_over(self, masters: Tensor, tensors: Mapping[str, Mapping[str, Any]], estimate: Mapping[str, Any]) -> None:
        """Goes on from what ranks of any number have saved. Every rank calls this.

        masters: of all parameters, flat, without padding. tensors, estimate: of `states` of all ranks together.
        """
        part = masters[self.first : self.first + self.share.numel()]
        self.share[: len(part)].copy_(part)
        own_share(self.weights).copy_(self.share)
        gather_shares(self.weights)
        for piece in self.pieces:
            optimizer = self.optimizer_of[id(piece.tensor)]
            saved = {
                key: self._placed(value, key, optimizer) if torch.is_tensor(value) else value
                for key, value in tensors[piece.name].items()
            }
            if saved:
                optimizer.state[piece.tensor] = saved
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group |= estimate

    def _placed(self, value: Tensor, key: str, optimizer: torch.optim.Optimizer) -> Tensor:
        """Copies a saved tensor to where the optimizer wants it: counts of steps stay on the host, but for the fused
        AdamW."""
        on_host = key == "step" and not isinstance(optimizer, torch.optim.AdamW)
        return value.to("cpu" if on_host else self.share.device, copy=True)

    def release(self) -> list[Tensor]:
        """Lets go of the states, and returns the tensors that are this object's own."""
        for optimizer in self.optimizers:
            optimizer.state.clear()
        return [piece.tensor for piece in self.pieces]
