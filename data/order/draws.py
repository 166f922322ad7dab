"""Everything random about a sample, as pure functions of (seed, purpose, position).

A position p counts samples over the whole run, so a draw needs no state, does not change with the world size, and is
new in every epoch. No two samples of a step have one, so their draws are independent whatever the samples are called:
names repeat in most data sets, and are part of no draw. Seeds are mixed by a hash and never added to a counter: with
`seed + epoch`, epoch 1 of one run would equal epoch 0 of its neighbour. Only integer arithmetic decides anything but
the noise, so the draws are the same on every machine and numpy version; golden vectors in the tests pin them.
"""

import hashlib
import operator
from collections.abc import Sequence

import numpy as np

from controlbooth.data.errors import UserError
from controlbooth.data.order.settings import DrawSettings

_MASK = 2**64 - 1


def hash64(*parts: int | str) -> int:
    """Hashes integers and strings to an integer in [0, 2**64): 64-bit blake2b of a canonical encoding.

    Each part is written as its type, its length and its bytes, so ("a", "bc") and ("ab", "c"), or 1 and "1", differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            kind, data = b"s", part.encode("utf-8", "surrogateescape")
        else:
            number = operator.index(part)
            kind, data = b"i", number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        digest.update(kind + len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def content_hash(data: bytes) -> int:
    """Hashes bytes to [0, 2**64) by 64-bit blake2b, for draws that depend on a picture but not on its name or place."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Applies SplitMix64's output function (Steele, Lea and Flood 2014), a bijection on uint64 that avalanches."""
    z = np.asarray(values).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_bits(key: int, values: np.ndarray) -> np.ndarray:
    """Draws 64 random bits for each of `values` (any shape, non-negative integers) under a key from `hash64`: uint64.

    The draw is a bijection of the values, so the bits of different values never tie.
    """
    return splitmix64(splitmix64(values) ^ np.uint64(key))


def permutation(key: int, count: int) -> np.ndarray:
    """Returns a permutation of range(count), int64: the order of `count` bijective hashes, which never tie.

    Takes O(count log count).
    """
    return np.argsort(random_bits(key, np.arange(count, dtype=np.uint64)))


def prompt_dropped(seed: int, positions: np.ndarray, rate: float) -> np.ndarray:
    """Tells which prompts become the empty one: those with H(seed, "prompt_dropout", position) < rate * 2**64.

    positions: (B,) int64. rate: in [0, 1]; 0 drops none and 1 drops all, exactly. Returns (B,) bool. Raises ValueError
    for another rate.
    """
    if not 0.0 <= rate <= 1.0:
        raise UserError(f"the prompt dropout rate is {rate}, but it is a probability: use a number from 0 to 1")
    threshold = int(rate * 2.0**64)
    if threshold > _MASK:
        return np.ones(np.shape(positions), bool)
    return random_bits(hash64(seed, "prompt_dropout"), positions) < np.uint64(threshold)


def flips(seed: int, positions: np.ndarray) -> np.ndarray:
    """Tells whether each sample is mirrored left to right, with probability 1/2: (B,) int64 positions -> (B,) bool."""
    return random_bits(hash64(seed, "flip"), positions) >> np.uint64(63) == 1


def crops(seed: int, positions: np.ndarray, slack: np.ndarray) -> np.ndarray:
    """Draws top left corners of random crops: (B, 2) int64, each uniform over 0 .. slack, both ends included.

    positions: (B,) int64. slack: (B, 2) free pixels (rows, columns), >= 0.
    """
    slack = np.asarray(slack)
    rows = _below(random_bits(hash64(seed, "crop", "row"), positions), slack[:, 0] + 1)
    columns = _below(random_bits(hash64(seed, "crop", "column"), positions), slack[:, 1] + 1)
    return np.stack([rows, columns], axis=1)


def caption_choice(seed: int, positions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Draws which of its captions each sample uses. counts: (B,) integers >= 1 -> (B,) int64 in [0, counts)."""
    return _below(random_bits(hash64(seed, "caption"), positions), counts)


def conditions(seed: int, positions: np.ndarray) -> np.ndarray:
    """Draws 64 bits for the random parts of each condition computed at loading: (B,) int64 -> (B,) uint64."""
    return random_bits(hash64(seed, "condition"), positions)


def timesteps(seed: int, positions: np.ndarray, num_train_timesteps: int) -> np.ndarray:
    """Draws diffusion timesteps, uniform over 0 .. num_train_timesteps - 1: (B,) int64 positions -> (B,) int64.

    Raises ValueError where num_train_timesteps is below 1.
    """
    if num_train_timesteps < 1:
        raise UserError(f"num_train_timesteps is {num_train_timesteps}; use the noise scheduler's number, mostly 1000")
    return _below(random_bits(hash64(seed, "timestep"), positions), np.int64(num_train_timesteps))


def levels_by_density(seed: int, positions: np.ndarray, thresholds: Sequence[int]) -> np.ndarray:
    """Draws noise levels by a density: (B,) int64 positions -> (B,) int64.

    The level is how many of `thresholds` are at most equal to 64 random bits. thresholds: of each level but the last,
    the share of draws at or below it times 2**64, ascending.
    """
    bits = random_bits(hash64(seed, "level"), positions)
    return np.searchsorted(np.asarray(thresholds, np.uint64), bits, side="right").astype(np.int64)


def noise_levels(seed: int, positions: np.ndarray, drawn: DrawSettings) -> np.ndarray:
    """Draws the noise level at each position, uniform or by the run's density: (B,) int64 -> (B,) int64."""
    if drawn.level_thresholds is None:
        return timesteps(seed, positions, drawn.num_train_timesteps)
    return levels_by_density(seed, positions, drawn.level_thresholds)


def noise(seed: int, positions: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Draws standard normal noise, (B, *shape) float32, from one independent Philox stream per position.

    Row b depends on (seed, positions[b], shape) alone, so it is the same in every batch composition. The generator is
    Philox4x64 (Salmon et al. 2011) with its two key words set to H(seed, "noise") and the position; numpy's ziggurat
    method makes its bits normal.
    """
    key = hash64(seed, "noise")
    rows = np.empty((len(positions), *shape), np.float32)
    for row, position in zip(rows, np.asarray(positions).tolist(), strict=True):
        stream = np.random.Generator(np.random.Philox(key=np.array([key, position], np.uint64)))
        stream.standard_normal(dtype=np.float32, out=row)
    return rows


def posterior_noise(seed: int, positions: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Draws the standard normal noise by which a sample is taken of the VAE's posterior, as `noise` does, apart from
    it. Returns (B, *shape) float32."""
    return noise(hash64(seed, "vae posterior"), positions, shape)


def noise_hash(values: np.ndarray) -> str:
    """Hashes an array of noise, to log it and to compare it across ranks: 64-bit blake2b of shape and bits, in hex."""
    header = f"{values.shape}".encode()
    return hashlib.blake2b(header + np.ascontiguousarray(values, "<f4").tobytes(), digest_size=8).hexdigest()


def _below(bits: np.ndarray, bounds: np.ndarray | np.int64) -> np.ndarray:
    """Maps uint64 bits to int64 in [0, bounds) by multiplying the upper 32 bits; the bias is at most bounds / 2**32."""
    upper = np.asarray(bits, np.uint64) >> np.uint64(32)
    return ((upper * np.asarray(bounds).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
