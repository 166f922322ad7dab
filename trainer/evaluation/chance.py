"""The conditions of other held-out samples, against which pictures are measured too: what obeying nothing scores."""

import numpy as np

METRICS_VERSION = 2
"""Of what the figures of control and their chance are. Evaluations of two versions are not compared; those made before
there was a version counted every pixel above 0 of a shrunk condition as an edge, and had no chance."""
NEGATIVES = 8
"""Other samples for each one, so that chance is no matter of luck where only few samples are held out."""


def negatives(count: int) -> np.ndarray:
    """Draws S other samples for each of `count` samples: (count, S) int64, the same at every call and on every rank.

    Each column is a permutation without a fixed point (a derangement): all samples in one fixed random order, moved on
    by 1, 2, ... S places, so that every sample is in negative pairs equally often. S is NEGATIVES, or count - 1 where
    there are not so many others; a single sample has none.
    """
    order = np.random.default_rng(0).permutation(count)
    place = np.argsort(order)
    shifts = np.arange(1, min(NEGATIVES, count - 1) + 1)
    return order[(place[:, None] + shifts) % max(count, 1)]
