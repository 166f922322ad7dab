"""Which pictures are copies, nearly copies or blank, by perceptual hashes."""

import cv2
import numpy as np

from controlbooth.data.order.draws import hash64, permutation

HASH_BITS = 256


NEAR_BITS = 20
"""Hashes of near copies differ in at most so many bits. Copies of 260 photographs (JPEG at quality 50, half the size,
brighter, less contrast) differed in 22 at most and mostly below 8, different photographs in 76 at least."""


BANDS = 16
"""Of 16 bits each. Hashes that differ in at most 15 bits agree in one at least; at 20 bits, in 99 of 100 cases."""


MOST_NEIGHBOURS = 512
"""Hashes of one band that each hash is compared with; reached only where thousands of pictures are nearly the same."""


BLANK_LEVELS = 4


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """Computes pHash: the signs of the 256 lowest frequencies of the cosine transform, against their median.

    pixels: (H, W) or (H, W, 3) RGB uint8 -> (4,) uint64. Scaling, recompression and brightness change few bits of it;
    mirroring and cropping change many.
    """
    gray = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:16, :16].ravel()
    low[0] = 0.0  # the mean, which is brightness
    return np.packbits(low > np.median(low)).view("<u8")


def is_blank(pixels: np.ndarray) -> bool:
    """Tells whether all values lie within BLANK_LEVELS, so that nothing can be seen. pixels: uint8 of any shape."""
    return int(pixels.max()) - int(pixels.min()) <= BLANK_LEVELS


def equal_groups(values: np.ndarray) -> list[np.ndarray]:
    """Finds equal values: (n,) -> a group of ascending indices for each value that comes more than once, in the order
    of their first indices."""
    order = np.argsort(values, kind="stable")
    edges = np.flatnonzero(np.diff(values[order])) + 1
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
    several = np.flatnonzero(ends - starts > 1)
    groups = [order[start:end] for start, end in zip(starts[several], ends[several], strict=True)]
    return sorted(groups, key=lambda group: int(group[0]))


def near_pairs(hashes: np.ndarray, most_bits: int = NEAR_BITS) -> np.ndarray:
    """Finds pairs of perceptual hashes that differ in at most `most_bits` bits.

    (n, 4) uint64 -> (m, 2) int64, each pair once. Only hashes that agree in a whole band are compared. A band is 16
    bits from all over the hash, in an order that is fixed: neighbouring frequencies are often alike, and a band of them
    would hold all pictures with a plain background.
    """
    bands = _bands(hashes)
    found: list[np.ndarray] = []
    for band in range(BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        keys = bands[order, band]
        first = np.arange(len(keys))
        for distance in range(1, MOST_NEIGHBOURS + 1):
            first = first[first + distance < len(keys)]
            first = first[keys[first] == keys[first + distance]]
            if not len(first):
                break
            one, other = order[first], order[first + distance]
            near = np.bitwise_count(hashes[one] ^ hashes[other]).sum(axis=1) <= most_bits
            found.append(np.sort(np.stack([one[near], other[near]], axis=1), axis=1))
    pairs = np.concatenate(found) if found else np.empty((0, 2), np.int64)
    return np.unique(pairs, axis=0)


def _bands(hashes: np.ndarray, chunk: int = 1 << 16) -> np.ndarray:
    """Cuts hashes into bands: (n, 4) uint64 -> (n, BANDS) uint16. It takes `chunk` hashes at a time, as single bits
    take eight times the memory."""
    order = permutation(hash64("bands of perceptual hashes"), HASH_BITS)
    bands = np.empty((len(hashes), BANDS), np.uint16)
    for start in range(0, len(hashes), chunk):
        bits = np.unpackbits(np.ascontiguousarray(hashes[start : start + chunk]).view(np.uint8), axis=1)
        bands[start : start + chunk] = np.packbits(np.ascontiguousarray(bits[:, order]), axis=1).view("<u2")
    return bands


def connected_groups(pairs: np.ndarray) -> list[np.ndarray]:
    """Groups the items that pairs connect, directly or through others. (m, 2) -> ascending index arrays."""
    parent: dict[int, int] = {}

    def root(item: int) -> int:
        while parent.setdefault(item, item) != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for one, other in pairs.tolist():
        first, second = sorted((root(one), root(other)))
        parent[second] = first
    groups: dict[int, list[int]] = {}
    for item in sorted(parent):
        groups.setdefault(root(item), []).append(item)
    return [np.array(group) for group in groups.values()]
