"""Averages weights over the steps (EMA) and lends the average to validations and exports."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from controlbooth.trainer.engine.deepspeed import _names_of_masters, full_state, masters


class Average:
    """Exponential moving average of the masters, which warms up: the decay is min(decay, (1 + step) / (10 + step)).

    Each rank averages its own share in fp32. Averaging the half-precision weights would miss updates below their
    rounding, and gathering whole ones would cost a collective a step.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.shares = [share.detach().clone() for share in masters(engine)]

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Moves the average towards the masters after an optimizer step, unless that was skipped, () bool."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        weights = torch.where(skipped, 0.0, weight).to(torch.float32)
        for mean, share in zip(self.shares, masters(self.engine), strict=True):
            mean.lerp_(share.detach(), weights.to(mean.device))

    def full_state(self) -> dict[str, Tensor]:
        """Gathers the average by parameter name, whole, in fp32, on the CPU of every rank. Every rank calls this."""
        with self._instead_of_masters():
            return full_state(self.engine)

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `full_state` returned, at whatever world size. Every rank calls this."""
        from deepspeed.utils import safe_set_full_fp32_param

        with self._instead_of_masters(), torch.no_grad():
            if self.engine.zero_optimization_stage() == 0:
                for name, master in zip(_names_of_masters(self.engine), masters(self.engine), strict=True):
                    master.copy_(state[name])
            else:
                for name, parameter in self.engine.module.named_parameters():
                    safe_set_full_fp32_param(parameter, state[name].to(self.engine.device))

    @contextmanager
    def _instead_of_masters(self) -> Iterator[None]:
        """Keeps the average in the masters within the block; what is written there is the average afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mean, share in zip(self.shares, masters(self.engine), strict=True):
            kept = share.detach().clone()
            share.copy_(mean)
            mean.copy_(kept)


@contextmanager
def averaged_weights(engine: Any, average: Average | None) -> Iterator[None]:
    """Keeps the averaged weights, if there are any, in the network within the block, and puts its own back afterwards.
    Under ZeRO-3 the parameters are gathered for both changes, after which rank 0's values are scattered again."""
    if average is None:
        yield
        return
    means = average.full_state()
    with _writable(engine), torch.no_grad():
        kept = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
        for name, parameter in engine.module.named_parameters():
            parameter.copy_(means[name].to(parameter))
    try:
        yield
    finally:
        with _writable(engine), torch.no_grad():
            for name, parameter in engine.module.named_parameters():
                parameter.copy_(kept[name])


@contextmanager
def _writable(engine: Any) -> Iterator[None]:
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        yield
