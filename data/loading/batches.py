"""What a loader gives: the samples of a micro-batch, and the micro-batches of a step."""

from dataclasses import dataclass

import numpy as np

from controlbooth.data.shards.latent_cache import EncodedBatch


@dataclass(frozen=True)
class MicroBatch:
    """B samples of one forward pass; all arrays are numpy, pixels RGB in [0, 255]."""

    positions: np.ndarray
    """(B,) int64"""
    keys: list[str]
    """Of the samples used, which are the substitutes where there are any. Several samples may have one key."""
    places: np.ndarray
    """(B, 2) int64: the number of each one's shard, and its row in the index of that; -1 where no sample could be read.
    No two samples of a data set have one place."""
    pixel_values: np.ndarray | None
    """(B, 3, H, W) uint8; None with a latent cache, which stands for them."""
    conditioning: np.ndarray | None
    """(B, 3, H, W) uint8; None without a condition kind, and with a latent cache that holds its latents."""
    encoded: EncodedBatch | None
    """What the encoders made of pictures and prompts, from the latent cache; None without one."""
    captions: list[str]
    """The prompts to train on, "" where dropped."""
    dropped: np.ndarray
    """(B,) bool"""
    timesteps: np.ndarray
    """(B,) int64"""
    noise: np.ndarray
    """(B, *latent_shape) float32"""
    posterior_noise: np.ndarray
    """(B, *latent_shape) float32, for the sample that is taken of the VAE's posterior."""
    weights: np.ndarray
    """(B,) float32, factors on the samples' losses: 1, or 0 where no sample could be read."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of a global batch and what it took to have it."""

    step: int
    micro_batches: list[MicroBatch]
    wait_seconds: float
    """The consumer stood still for so long."""
    fetch_seconds: float
    """Of reading, summed over the threads."""
    decode_seconds: float
    queue_depth: int
    """Later steps that were complete when this one was asked for."""
    bytes_read: int
    cache_hits: int
    """Samples whose shard lay in the cache already; of shards on a disk there are none."""
    substitutions: int
