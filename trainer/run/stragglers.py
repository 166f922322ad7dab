"""Which rank keeps the others waiting.

Ranks wait for each other in every backward pass, so all have the same time for a step. What differs is when each comes
to its first backward pass: after waiting for data, encoding, and one forward pass. These seconds travel with the
counters of the step. Under ZeRO-3 ranks wait for each other in the forward pass too, so that only the
waiting for data tells them apart.
"""

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from controlbooth.trainer.engine.distributed import World, gather_objects

WINDOW = 20
"""Steps that are looked at together."""
MOSTLY = 16
"""In so many of them a rank must have been the slowest by FACTOR to be called persistently slow."""
FACTOR = 1.5
"""Times the median of the other ranks."""
WORTH = 0.05
"""Share of the step's seconds below which a difference does not matter."""


class Pace:
    """Of one rank: how long it works before it waits for others. Every rank makes one, at the same time."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.hosts = gather_objects(socket.gethostname(), world)
        self._slow: deque[int | None] = deque(maxlen=WINDOW)
        self._told: int | None = None
        self._new_event: Callable[[], Any] | None = None
        if world.device.type == "cuda":
            self._new_event = partial(torch.cuda.Event, enable_timing=True)
        self._events: list[Any] = []
        self._past: list[Any] = []
        """Those of the step before, both recorded; none before the second step."""
        self._seconds: float | None = None
        self.begin()

    def begin(self) -> None:
        """Begins a step."""
        if self._seconds is not None:
            self._past = self._events
        self._started, self._seconds = time.perf_counter(), None
        if self._new_event is not None:
            self._events = [self._new_event(), self._new_event()]
            self._events[0].record()

    def before(self, backward: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """Returns `backward` wrapped so that its first call in a step ends the time of this rank's own work."""

        def call(loss: Tensor) -> None:
            if self._seconds is None:
                self._seconds = time.perf_counter() - self._started
                if self._events:
                    self._events[1].record()
            backward(loss)

        return call

    def seconds(self) -> float:
        """Tells after the backward passes how long this rank worked in the step before it waited for others.

        A GPU's own time is that of the step before, as far as it is known without waiting for it.
        """
        seconds = self._seconds or 0.0
        if self._past and all(event.query() for event in self._past):
            seconds = max(seconds, self._past[0].elapsed_time(self._past[1]) / 1000.0)
        return seconds

    def note(self, seconds: Sequence[float], step_seconds: float) -> str | None:
        """Returns a line for people when a rank has become persistently slow, or no longer is; else None.

        seconds: of each rank, as its `seconds` tells them. step_seconds: of the whole step.
        """
        if self.world.world_size == 1:
            return None
        rank, ratio = slowest(seconds)
        lag = seconds[rank] * (1.0 - 1.0 / ratio)
        self._slow.append(rank if ratio >= FACTOR and lag >= WORTH * step_seconds else None)
        held_up_by = next((r for r in set(self._slow) if r is not None and self._slow.count(r) >= MOSTLY), None)
        before, self._told = self._told, held_up_by
        if held_up_by is not None and held_up_by != before:
            return (
                f"rank {held_up_by} on {self.hosts[held_up_by]} holds the others up in {MOSTLY} of {WINDOW} steps: "
                f"{seconds[held_up_by]:.2f} s before its first backward pass, {ratio:.1f} times the median of "
                "the others. Look at its load, its clock rate and its disk"
            )
        if before is not None and held_up_by is None:
            return f"rank {before} on {self.hosts[before]} keeps up again"
        return None


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """Returns the slowest of two or more ranks, and how many times the median of the others it takes (at least 1)."""
    rank = max(range(len(seconds)), key=lambda r: seconds[r])
    others = median(value for r, value in enumerate(seconds) if r != rank)
    return rank, seconds[rank] / others if others > 0 else 1.0
