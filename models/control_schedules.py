"""How much each residual of a ControlNet counts: the published schedules.

Residuals come shallow to deep: those of the skip connections, then the middle block's. For Stable Diffusion 1.5 at 512
pixels there are 13, of heights 64, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8 and 8. For other networks and sizes the
rules are the same: the heights are those that the residuals have, and powers count from the middle block.
"""

from collections.abc import Callable, Sequence

from controlbooth.data.errors import UserError

Heights = Sequence[int]


def uniform(heights: Heights) -> list[float]:
    """Returns the weight 1 for all residuals, which leaves them as they are."""
    return [1.0] * len(heights)


def resolution(heights: Heights) -> list[float]:
    """Returns w_i = 64 / h_i (arXiv 2302.05543, section 3.4), but with the shallowest residual's height in place of 64.

    SD 1.5: 1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8.
    """
    return [heights[0] / height for height in heights]


def resolution_normalised(heights: Heights) -> list[float]:
    """Returns the weights of `resolution` divided by the largest of them, so that the deepest residuals count as they
    were trained and the others less.

    SD 1.5: 1/8, 1/8, 1/8, 1/4, 1/4, 1/4, 1/2, 1/2, 1/2, 1, 1, 1, 1.
    """
    weights = resolution(heights)
    return [weight / max(weights) for weight in weights]


def powers(heights: Heights) -> list[float]:
    """Returns 0.825 ** (12 - i) for 13 residuals, as the released code's guess mode has it; the last is always 1."""
    last = len(heights) - 1
    return [0.825 ** (last - number) for number in range(len(heights))]


def logarithmic(heights: Heights) -> list[float]:
    """Returns logspace(-1, 0, 13) for 13 residuals, as diffusers' guess_mode does: weights from 0.1 to 1, each larger
    than the one before it by the same factor."""
    last = max(1, len(heights) - 1)
    return [10.0 ** (number / last - 1.0) for number in range(len(heights))]


SCHEDULES: dict[str, Callable[[Heights], list[float]]] = {
    "uniform": uniform,
    "resolution": resolution,
    "resolution/8": resolution_normalised,
    "0.825": powers,
    "logspace": logarithmic,
}
"""name -> weights of residuals with these heights."""

BY_HEIGHT = ("resolution", "resolution/8")
"""Those that have a meaning where residuals have different heights, as a U-Net's have."""
CONDITIONAL = ("resolution", "resolution/8")
"""Those that were published for control of the conditional branch alone."""


def weights_of(schedule: str, heights: Heights) -> list[float]:
    """Returns the weights of a schedule for residuals of these heights. Raises ValueError for an unknown schedule."""
    if schedule not in SCHEDULES:
        raise UserError(f"control schedule {schedule!r} is not known. Use {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule](heights)
