"""Memory of one rank for a frozen base that is held in fewer bits, split over ranks or streamed."""

from collections.abc import Sequence
from dataclasses import dataclass

from controlbooth.trainer.config.run import FrozenConfig
from controlbooth.trainer.planning.footprint import Footprint


@dataclass(frozen=True)
class FrozenMemory:
    """Bytes of the base on one rank."""

    device: int
    """All the time."""
    passing: int
    """Besides, in a forward or backward pass: blocks that are here for it, and a weight that is brought back."""
    host: int


def frozen_memory(one: Footprint, frozen: FrozenConfig, sharers: int) -> FrozenMemory:
    """Computes what the base takes on a rank. sharers: ranks that a block is split over.

    Of split or streamed blocks two are on the device at once, the one that works and the next one.
    """
    streams, splits = frozen.stream == "cpu", frozen.shards != "none" and sharers > 1
    device, host, passing = one.frozen_bytes, 0, 0
    if streams or splits:
        here, kept = both_sums(one.denoiser_blocks)
        kept = -(-kept // (sharers if splits else 1))
        passing = largest_pair(one.denoiser_blocks)
        if splits and streams:
            passing += -(-passing // sharers)  # the shares on their way to the others
        device += (0 if streams else kept) - here
        host += kept if streams else 0
    if streams:
        here, kept = both_sums(one.encoder_blocks)
        device, host = device - here, host + kept
        passing = max(passing, largest_pair(one.encoder_blocks))
    return FrozenMemory(device, passing + one.restoring_bytes, host)


def both_sums(blocks: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(plain for plain, _ in blocks), sum(aligned for _, aligned in blocks)


def largest_pair(blocks: Sequence[tuple[int, int]]) -> int:
    """Computes the most bytes of two neighbours, in aligned places."""
    sizes = [aligned for _, aligned in blocks]
    return max((first + second for first, second in zip(sizes, sizes[1:], strict=False)), default=sum(sizes))
