"""What the parts of the recipe share while they train: a clock, mixed precision, files written whole."""

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from controlbooth.data.files.whole import replaced


class Clock:
    """Stops a stage after its minutes, and says now and then how it goes."""

    def __init__(self, minutes: float, every_seconds: float = 30.0) -> None:
        self.start = self.last = time.monotonic()
        self.seconds = minutes * 60.0
        self.every_seconds = every_seconds

    @property
    def share(self) -> float:
        return min(1.0, (time.monotonic() - self.start) / self.seconds)

    def due(self) -> bool:
        if time.monotonic() - self.last < self.every_seconds:
            return False
        self.last = time.monotonic()
        return True


def save_atomically(state: dict, path: Path) -> None:
    with replaced(path) as temporary:
        torch.save(state, temporary)


def mixed_precision(device: str = "cpu") -> torch.autocast:
    """Returns an autocast to bfloat16, enabled where the device multiplies in it; elsewhere it would take ten times as
    long as float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or torch.cpu._is_avx512_bf16_supported())


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def follow(average: dict[str, Tensor], module: nn.Module, step: int) -> None:
    """Moves an exponential average of parameters after a step; it warms up, so that it never lags for long."""
    decay = min(0.999, (step + 1) / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in module.parameters()], 1.0 - decay)
