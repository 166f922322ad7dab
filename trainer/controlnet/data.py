"""Opens the shards that a run names, and plans the shapes of their pictures."""

from controlbooth.data.conditions.sizes import shrunk_lines
from controlbooth.data.inspection.readable import check_readable
from controlbooth.data.loading.plan import plan_order
from controlbooth.data.order.buckets import Buckets
from controlbooth.data.secrets import shown
from controlbooth.data.shards.manifest import Dataset, join_datasets, open_dataset, same_place
from controlbooth.trainer.config.run import RunConfig, order_settings, sources
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.engine.distributed import World, barrier
from controlbooth.trainer.evaluation.held_out import HeldOutSet, load_held_out
from controlbooth.trainer.run.process import say


def open_data(config: RunConfig, world: World) -> tuple[Dataset, HeldOutSet | None]:
    """Opens the training shards and the held-out set (None where there is none), and checks that they do not overlap.

    Rank 0 first indexes the shards that have no index yet. Raises ConfigError where the two overlap.
    """
    locations = [source.shards for source in sources(config)]
    if world.rank == 0:
        for location in [*locations, config.data.held_out]:
            if location:
                open_dataset(location, index_missing=True)
    barrier()
    dataset = join_datasets([open_dataset(location) for location in locations])
    check_readable(dataset, config.data.condition, config.data.max_pixels, pictures=config.data.latent_cache is None)
    if world.rank == 0 and (lines := shrunk_lines(dataset, config.data.condition, config.data.resolution)):
        say(world, f"warning: {lines}")
    if not config.data.held_out:
        return dataset, None
    held_out = open_dataset(config.data.held_out)
    check_held_out(dataset, held_out)
    data = config.data
    held = load_held_out(held_out, config.validation.samples, data.condition, data.resolution, data.max_pixels)
    return dataset, held


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
