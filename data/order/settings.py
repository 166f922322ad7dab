"""What a run decides about its data, in two values that are passed on as they are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OrderSettings:
    """Decides, beside the data set and the weights of its sources, which sample comes when, and in which shape."""

    seed: int
    global_batch_size: int
    lanes: int
    shards_per_block: int
    condition: str | None
    """The kind that a sample must have: one that shards hold, one that is "computed:", or None for any sample."""
    resolution: int
    """Pixels of a side of a square picture."""
    max_aspect_ratio: float = 1.0
    aspect_step: int = 64
    """Sides of other shapes are multiples of it, in pixels: see `bucket_shapes`."""


@dataclass(frozen=True)
class DrawSettings:
    """Decides what is drawn for each visit of a sample, from the seed and its position in the order."""

    prompt_dropout: float
    random_flip: bool
    random_crop: bool
    num_train_timesteps: int
    """How many levels of noise there are, of which one is drawn uniformly..."""
    level_thresholds: tuple[int, ...] | None = None
    """...or by these, as `draws.levels_by_density` takes them."""
