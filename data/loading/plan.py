"""A run's order, from its data sets and its numbers; and what a checkpoint keeps of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controlbooth.data.arguments import quoted
from controlbooth.data.condition_names import stored_kind
from controlbooth.data.errors import UserError
from controlbooth.data.order.buckets import Buckets, bucket_shapes, plan_buckets
from controlbooth.data.order.mixture import History, Mixture
from controlbooth.data.order.settings import OrderSettings
from controlbooth.data.secrets import shown
from controlbooth.data.shards.manifest import Dataset

STATE_VERSION = 3
"""Of a saved order and of the draws that go with it: from 3 on prompts are dropped by position and not by key."""


def source_weights(
    dataset: Dataset, condition_kind: str | None, weights: Sequence[float | None], repeats: Sequence[int]
) -> list[int]:
    """Returns integers in proportion to the share of each source in each batch.

    weights: the shares, rounded to a millionth, of all sources or of none. None stands for a source's samples times its
    repeats, so that while a sample with 1 repeat is seen once, one with 3 is seen three times.
    """
    if weights[0] is not None:
        return [round(1e6 * (weight or 0.0)) for weight in weights]
    samples = [int(source.samples_per_shard(condition_kind).sum()) for source in dataset.sources or (dataset,)]
    return [count * repeat for count, repeat in zip(samples, repeats, strict=True)]


def plan_order(dataset: Dataset, settings: OrderSettings, history: History | None = None) -> tuple[Mixture, Buckets]:
    """Plans the order of a run. history: weights of the sources; None weighs each by its samples.

    Raises ValueError with what to change where lanes, buckets and samples do not fit each other.
    """
    sources = dataset.sources or (dataset,)
    counts = [source.samples_per_shard(settings.condition) for source in sources]
    shapes = bucket_shapes(settings.resolution, settings.max_aspect_ratio, settings.aspect_step)
    if len(shapes) == 1:
        buckets, by_bucket = Buckets(shapes, ({},) * len(sources)), [counts]
    else:
        histograms = [_histograms(source, settings.condition) for source in sources]
        totals = [sum(map(Counter, shards), Counter()) for shards in histograms]
        buckets, _ = plan_buckets(shapes, totals, settings.lanes)
        by_bucket = [
            [_counts(shards, table, bucket) for shards, table in zip(histograms, buckets.assigned, strict=True)]
            for bucket in range(len(buckets.shapes))
        ]
    order = Mixture(
        by_bucket,
        history or [(0, [int(shards.sum()) for shards in counts])],
        seed=settings.seed,
        lanes=settings.lanes,
        shards_per_block=settings.shards_per_block,
        global_batch_size=settings.global_batch_size,
        names=[source.location for source in sources],
        shapes=buckets.shapes,
    )
    return order, buckets


def _histograms(dataset: Dataset, condition_kind: str | None) -> list[dict[int, int]]:
    """Returns for each shard a table: aspect bin -> how many usable samples with this condition it has.

    Raises ValueError where the manifest does not count samples by aspect ratio.
    """
    old = [shown(row.uri) for row in dataset.rows if row.usable and not row.aspects]
    if old:
        raise UserError(
            f"the manifest of {dataset.location} does not count samples by aspect ratio ({old[0]}), which "
            f"data.max_aspect_ratio needs: write it again with `controlbooth data index {quoted(dataset.location)}`"
        )
    return [
        {int(bin): count for bin, count in row.aspects.get(stored_kind(condition_kind) or "", {}).items()}
        for row in dataset.rows
    ]


def _counts(shards: Sequence[Mapping[int, int]], table: Mapping[int, int], bucket: int) -> np.ndarray:
    """Counts the samples of each shard that are in this bucket: (shards,) int64."""
    return np.array([sum(n for bin, n in shard.items() if table[bin] == bucket) for shard in shards], np.int64)


def order_state(order: Mixture, dataset_fingerprint: str, position: int) -> dict[str, Any]:
    """Returns what a checkpoint keeps of the data order. position: the first one not yet consumed, over all ranks."""
    return {
        "version": STATE_VERSION,
        "dataset_fingerprint": dataset_fingerprint,
        "seed": order.seed,
        "lanes": order.lanes,
        "shards_per_block": order.shards_per_block,
        "shapes": [list(shape) for shape in order.shapes] if len(order.shapes) > 1 else [],  # one decides no order
        "weights": [[since, list(weights)] for since, weights in order.history],
        "position": position,
    }


def continued_history(state: Mapping[str, Any] | None, weights: Sequence[int]) -> list[tuple[int, Sequence[int]]]:
    """Returns the weights of a run so far, and the new ones from the position where it resumes if they have changed."""
    if state is None:
        return [(0, weights)]
    history = [(since, past) for since, past in state["weights"]]
    if list(history[-1][1]) == list(weights):
        return history
    return [entry for entry in history if entry[0] < state["position"]] + [(state["position"], weights)]


def check_version(state: Mapping[str, Any], checkpoint: str) -> None:
    """Raises ValueError for a saved order of a version that drew otherwise. checkpoint: the folder that has it."""
    if state.get("version") != STATE_VERSION:
        raise UserError(
            f"the data order of {checkpoint} has version {state.get('version')}, and this controlbooth draws by "
            f"version {STATE_VERSION}: up to 2, prompts were dropped by the names of samples, and those of one name "
            "together. Go on with the controlbooth that wrote it, or start a run of another name from its "
            f"weights: model.controlnet={checkpoint}/controlnet"
        )


def resume_position(state: Mapping[str, Any], order: Mixture, dataset_fingerprint: str) -> int:
    """Returns the position at which a saved order resumes. Raises ValueError where this run's order is another one."""
    check_version(state, "CHECKPOINT")
    now = order_state(order, dataset_fingerprint, 0)
    remedies = {
        "dataset_fingerprint": "point the run at the data set it began with, or start a new run from these weights",
        "seed": "set the seed back",
        "lanes": "set global_batch_size back, or data.lanes where the run has it",
        "shards_per_block": "set shards_per_block back",
        "shapes": "set resolution and max_aspect_ratio back",
    }
    for name, remedy in remedies.items():
        if state.get(name) != now[name]:
            raise UserError(
                f"the checkpoint's data order has {name}={state.get(name)!r}, this run has {now[name]!r}, so the "
                f"samples would not continue where they stopped: {remedy}."
            )
    if now["weights"][: len(state["weights"])] != state["weights"] and state["weights"][-1][0] < state["position"]:
        raise UserError(f"the order forgets the weights that the checkpoint's samples had: {state['weights']}")
    return int(state["position"])
