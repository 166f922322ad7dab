"""From a scan to findings: which samples a person should look at before training on them, and why."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from controlbooth.data.inspection.hygiene import SEPARABLE, judge_pairing
from controlbooth.data.inspection.scan import Scan
from controlbooth.data.pictures.likeness import connected_groups, equal_groups, near_pairs
from controlbooth.data.shards.manifest import Dataset
from controlbooth.data.shards.sidecar import FLAG_NAMES, QUARANTINED, index_path, load_index

MEANINGS = {
    "flagged": "left out of training by the index",
    "broken": "cannot be read or decoded; training would replace it",
    "frame": "condition and target have different aspect ratios; training would replace it",
    "unpaired": "the condition's edges agree with the target's no better than those of another picture's condition",
    "pairing": "the conditions of a kind do not agree with their targets at all",
    "shrunk lines": "lines that were packed larger than they are read run into each other",
    "blank condition": "the condition shows nothing",
    "blank image": "the target has one colour",
    "small": "the target has fewer pixels than asked for",
    "empty caption": "the caption is empty: every visit trains the empty prompt",
    "cut captions": "the tokenizer cuts them off; what stands last is not learned",
    "exact copy": "several samples have the same target, byte for byte",
    "near copy": "several samples have nearly the same target",
}
"""Every kind of finding, the most harmful first."""


KINDS_WITHOUT_EDGES = ("keypoints", "pose", "openpose")
"""Conditions that may be right and agree with no edge of their target, so they are not judged by them."""


@dataclass(frozen=True)
class Finding:
    """kind: one of MEANINGS. samples: their numbers in the order of the shards; empty where it is about all of them."""

    kind: str
    samples: tuple[int, ...]
    message: str
    condition: str | None = None
    """Kind of condition that it is about, to show it."""


def find(dataset: Dataset, scanned: Scan, min_side: int) -> list[Finding]:
    """Finds what a person should look at, in the order of MEANINGS. min_side: targets whose shorter side has fewer
    pixels are small."""
    findings = list(_flagged(dataset))
    findings += [Finding(kind, (sample,), message, condition) for sample, kind, message, condition in scanned.faults]
    findings += _pairing(scanned)
    for sample in np.flatnonzero(scanned.sizes.min(axis=1, initial=2**31) < min_side).tolist():
        width, height = scanned.sizes[sample].tolist()
        findings.append(Finding("small", (sample,), f"{width} x {height} pixels, asked for are {min_side}"))
    empty = np.unique(scanned.caption_owners[scanned.caption_characters == 0]).tolist()
    findings += [Finding("empty caption", (sample,), "its caption is empty") for sample in empty]
    findings += _copies(scanned)
    return sorted(findings, key=lambda finding: list(MEANINGS).index(finding.kind))


def _flagged(dataset: Dataset) -> Iterator[Finding]:
    for row, path in zip(dataset.rows, dataset.paths, strict=True):
        if row.usable == row.samples:
            continue
        index = load_index(index_path(path))
        for flag, name in FLAG_NAMES.items():
            at = np.flatnonzero((index.samples["flags"] & flag) > 0)
            if len(at) and flag != QUARANTINED:
                first = int(index.samples["offset"][at[0]])
                yield Finding("flagged", (), f"{path.name}: {len(at)} samples: {name} (the first at byte {first})")


def _pairing(scanned: Scan) -> Iterator[Finding]:
    for kind, scores in scanned.scores.items():
        pairing = judge_pairing(scores, scanned.negatives[kind])
        if pairing is None or kind in KINDS_WITHOUT_EDGES:
            continue
        if pairing.standing_out < SEPARABLE:
            message = (
                f"condition {kind}: only {pairing.standing_out:.0%} of the pairs agree better than 95 % of "
                "negative pairs"
            )
            yield Finding("pairing", (), message)
        for sample in pairing.weak.tolist():
            least = pairing.threshold
            message = f"condition {kind} agrees {scores[sample]:.2f} with its target; negative pairs {least:.2f}"
            yield Finding("unpaired", (sample,), message, kind)


def _copies(scanned: Scan) -> Iterator[Finding]:
    readable = np.flatnonzero(scanned.digests)
    for group in equal_groups(scanned.digests[readable]):
        samples = tuple(readable[group].tolist())
        yield Finding("exact copy", samples, f"{len(samples)} samples have this target")
    # Of each picture one sample is enough: exact copies have been told already.
    _, first = np.unique(scanned.digests, return_index=True)
    seen = first[scanned.hashes[first].any(axis=1)]
    for group in connected_groups(near_pairs(scanned.hashes[seen])):
        samples = tuple(sorted(seen[group].tolist()))
        yield Finding("near copy", samples, f"{len(samples)} samples have nearly this target")
