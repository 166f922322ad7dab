"""Opens the shards that a run names, and plans the shapes of their pictures."""

from controlbooth.data.conditions.sizes import shrunk_lines
from controlbooth.data.inspection.readable import check_readable
from controlbooth.data.loading.plan import plan_order
from controlbooth.data.order.buckets import Buckets
from controlbooth.data.secrets import shown
from controlbooth.data.shards.manifest import (
    Dataset,
    check_unchanged,
    dataset_of,
    join_datasets,
    open_dataset,
    same_place,
)
from controlbooth.trainer.config.run import RunConfig, order_settings, sources
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.engine.distributed import World, on_first_rank
from controlbooth.trainer.evaluation.held_out import HeldOutSet, load_held_out
from controlbooth.trainer.run.process import say


def open_data(config: RunConfig, world: World) -> tuple[Dataset, HeldOutSet | None]:
    """Opens the training shards and the held-out set (None where there is none), and checks that they do not overlap.

    The held-out samples are read by rank 0 for all: to choose them it looks into every sidecar. Raises ConfigError
    where the two overlap.
    """
    data = config.data
    dataset = join_datasets([open_once(source.shards, world) for source in sources(config)])
    if world.local_rank == 0:
        check_readable(dataset, data.condition, data.max_pixels, pictures=data.latent_cache is None)
    if world.rank == 0 and (lines := shrunk_lines(dataset, data.condition, data.resolution)):
        say(world, f"warning: {lines}")
    if not data.held_out:
        return dataset, None
    held_out = open_once(data.held_out, world)
    on_first_rank(lambda: check_held_out(dataset, held_out), world)
    count = config.validation.samples
    held = on_first_rank(
        lambda: load_held_out(held_out, count, data.condition, data.resolution, data.max_pixels), world
    )
    return dataset, held


def open_once(location: str, world: World) -> Dataset:
    """Opens shards on rank 0, which indexes those that have no index yet, and gives every rank what it has found.

    On each other machine one rank looks whether the shards are there too, and the same. A thousand ranks that each
    looked at a hundred thousand shards would keep a shared disk busy for longer than they wait for each other.
    """
    rows = on_first_rank(lambda: open_dataset(location, index_missing=True).rows, world)
    if world.rank and world.local_rank == 0:
        check_unchanged(rows, location)
    return dataset_of(location, rows)


def check_held_out(dataset: Dataset, held_out: Dataset) -> None:
    """Raises ConfigError where a shard is in both sets, or a copy of it is, under whatever name."""
    if shared := set(map(same_place, dataset.paths)) & set(map(same_place, held_out.paths)):
        raise ConfigError(f"data.held_out and the training data share {shown(min(shared))}: hold other shards out")
    trained = {row.index_hash: row.uri for row in dataset.rows}
    if copies := [row for row in held_out.rows if row.index_hash in trained]:
        raise ConfigError(
            f"{shown(copies[0].uri)} of data.held_out holds the same samples as "
            f"{shown(trained[copies[0].index_hash])}, which is "
            "trained on: hold other shards out"
        )


def run_buckets(config: RunConfig, dataset: Dataset) -> Buckets:
    """Plans the picture shapes of the run, and which samples have which."""
    return plan_order(dataset, order_settings(config))[1]
