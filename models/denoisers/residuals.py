"""What a ControlNet adds to its base, whatever the base's architecture."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds to its base, in the ControlNet's dtype. Several ControlNets' residuals are summed."""

    groups: tuple[tuple[Tensor, ...], ...]
    """Shallow to deep. Of a U-Net: one for each skip connection (SD1.5: 12), and the middle block's. Of SD3: one for
    each copied block, (B, tokens, D). Of FLUX.1: for each double block, and for each single one."""
    repeated: bool = False
    """Of FLUX.1: whether block i of the base adds number i modulo their count, and not each one to a run of blocks."""

    def each(self) -> tuple[Tensor, ...]:
        """Returns all of them, shallow to deep."""
        return tuple(one for group in self.groups for one in group)

    def with_each(self, others: Iterable[Tensor]) -> "Residuals":
        """Returns residuals in the same groups, with `others` in place of these: as many, in the same order."""
        left = iter(others)
        return replace(self, groups=tuple(tuple(next(left) for _ in group) for group in self.groups))
