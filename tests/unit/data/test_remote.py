"""Indexing and training on shards in an S3 store: the same data set, order and draws as from a disk."""

import contextlib
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset
from loaders import make_loader
from stores import MotoStore, forget_stores

from controlbooth.data.loading.held_out import held_out
from controlbooth.data.order.order import Order
from controlbooth.data.pictures.images import BadSample, encode_png
from controlbooth.data.scenes import render
from controlbooth.data.shards import index as indexing
from controlbooth.data.shards import storage
from controlbooth.data.shards.cache import Cache
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.prefetch import upcoming_shards
from controlbooth.data.shards.reader import ShardReader
from controlbooth.data.shards.sidecar import index_path, load_index
from controlbooth.data.shards.storage import StorageError
from controlbooth.launch.commands import data_index
from controlbooth.launch.commands.data_bench import main as bench_main
from controlbooth.launch.commands.data_order import main as order_main
from controlbooth.launch.commands.data_show import main as show_main

SHARDS, PER_SHARD, SIZE, G = 8, 12, 16, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shards on a disk, indexed."""
    root = tmp_path_factory.mktemp("shards")
    for number in range(SHARDS):
        with webdataset.TarWriter(str(root / f"{number}.tar"), encoder=False, mtime=0) as writer:
            for i in range(number * PER_SHARD, (number + 1) * PER_SHARD):
                what = render.scene(5, i)
                drawn = render.render(what, SIZE)
                parts = {"png": encode_png(drawn.image), "cond.edges.png": encode_png(drawn.edges)}
                writer.write({"__key__": f"k{i:04d}", **parts, "txt": what.caption.encode()})
    assert data_index.main([str(root), "--workers", "1"]) == 0
    return root


@pytest.fixture(scope="module")
def moto():
    store = MotoStore()
    store.start()
    yield store
    store.kill()


@pytest.fixture
def store(moto, monkeypatch):
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "FIRST_DELAY_SECONDS", 0.02)
    forget_stores()
    yield moto
    forget_stores()


@pytest.fixture
def remote(store, folder, tmp_path):
    """The manifest of the same shards in a store."""
    uri = store.put_folder(folder, "bucket/train")
    manifest = tmp_path / "sets" / "train.jsonl"
    manifest.parent.mkdir()
    assert data_index.main([uri, "--manifest", str(manifest), "--workers", "1"]) == 0
    return manifest


def make(location, **changes):
    arguments = dict(
        seed=1, lanes=G, shards_per_block=1, global_batch_size=G, micro_batch_size=4, rank=0, world_size=1,
        condition="edges", resolution=SIZE, prompt_dropout=0.5, random_flip=True, random_crop=False,
        num_train_timesteps=1000, latent_shape=(4, 2, 2), threads=2, prefetch_steps=1,
    )  # fmt: skip
    return make_loader(open_dataset(location), **(arguments | changes))


def contents(step):
    """Everything of a step that training sees."""
    arrays = ("positions", "pixel_values", "conditioning", "timesteps", "noise", "weights", "dropped")
    return [
        (batch.keys, batch.captions, *(getattr(batch, name).tobytes() for name in arrays))
        for batch in step.micro_batches
    ]


def test_a_remote_data_set_is_the_one_on_the_disk(folder, remote):
    here, there = open_dataset(folder), open_dataset(remote)
    assert there.fingerprint == here.fingerprint
    assert [str(shard) for shard in there.paths] == [f"s3://bucket/train/{i}.tar" for i in range(SHARDS)]
    assert all(load_index(index_path(shard)).digest for shard in there.paths)
    assert {index_path(shard).parent for shard in there.paths} == {remote.with_suffix(".indexes")}


def test_the_manifest_moves_with_its_indexes(remote, tmp_path):
    shutil.move(remote.parent, tmp_path / "elsewhere")
    dataset = open_dataset(tmp_path / "elsewhere" / "train.jsonl")
    assert all(index_path(shard).is_file() for shard in dataset.paths)


def test_indexing_again_reads_nothing_and_a_new_version_is_indexed(remote, store, folder, monkeypatch, tmp_path):
    arguments = ["s3://bucket/train/{0..7}.tar", "--manifest", str(remote), "--workers", "1"]
    before = open_dataset(remote).fingerprint
    indexed = []
    index_shard = indexing.index_shard
    monkeypatch.setattr(indexing, "index_shard", lambda path: indexed.append(str(path)) or index_shard(path))
    assert data_index.main(arguments) == 0 and indexed == []
    assert open_dataset(remote).fingerprint == before
    store.put("bucket/train/3.tar", (folder / "4.tar").read_bytes())
    assert data_index.main(arguments) == 0
    assert indexed == ["s3://bucket/train/3.tar"] and open_dataset(remote).fingerprint != before


def test_damaged_and_missing_remote_shards_are_named(store, folder, tmp_path, capsys):
    store.put("broken/0.tar", (folder / "0.tar").read_bytes()[:7000])
    manifest = tmp_path / "broken.jsonl"
    assert data_index.main(["s3://broken/0.tar", "--manifest", str(manifest), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert "s3://broken/0.tar: byte 7000" in error and "no manifest was written" in error and not manifest.exists()
    with pytest.raises(FileNotFoundError, match="2 of the 3 shards .* do not exist.*s3://broken/1.tar, s3://broken/2"):
        data_index.main(["s3://broken/{0..2}.tar", "--manifest", str(manifest)])
    with pytest.raises(ValueError, match="s3://broken/0.tar is remote, .*add --manifest"):
        data_index.main(["s3://broken/0.tar"])


@pytest.mark.parametrize("limit_shards", [SHARDS, 100])
def test_order_keys_and_draws_are_those_of_the_disk(folder, remote, tmp_path, limit_shards):
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    cache = Cache(tmp_path / "cache", limit_shards * largest)
    with make(folder) as here, make(remote, cache=cache) as there:
        for _ in range(20):  # 12 make an epoch
            one, other = next(here), next(there)
            assert contents(one) == contents(other)
            assert one.cache_hits == 0 and 0 <= other.cache_hits <= G
        assert other.cache_hits == G


def bytes_in(folder) -> int:
    """Other threads may replace files meanwhile."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.slow
def test_two_ranks_share_a_cache_that_is_smaller_than_the_data_set(folder, remote, tmp_path):
    sizes = sorted(path.stat().st_size for path in folder.glob("*.tar"))
    limit = 5 * sizes[-1]  # of 8: two ranks with two lanes each read from up to 4 at once
    shape = dict(lanes=4, global_batch_size=4, micro_batch_size=2)
    ranks = [
        make(remote, cache=Cache(tmp_path / "cache", limit), rank=rank, world_size=2, ranks_per_node=2, **shape)
        for rank in range(2)
    ]
    keys = []
    with make(folder, lanes=4, global_batch_size=4, micro_batch_size=4) as whole, ranks[0], ranks[1]:
        for _ in range(30):
            parts = [key for rank in ranks for batch in next(rank).micro_batches for key in batch.keys]
            assert parts == [key for batch in next(whole).micro_batches for key in batch.keys]
            keys += parts
            assert bytes_in(tmp_path / "cache") <= limit
    assert len(set(keys[: SHARDS * PER_SHARD])) == SHARDS * PER_SHARD


def test_the_next_shard_of_a_lane_is_there_before_the_lane_reaches_it(folder, remote, tmp_path):
    cache = Cache(tmp_path / "cache", 10**9)
    with make(remote, lanes=2, global_batch_size=2, micro_batch_size=2, cache=cache, prefetch_steps=0) as batches:
        hits = []
        for step in range(40):
            hits.append(next(batches).cache_hits)
            blocks = batches.order.upcoming_blocks(step + 1, np.arange(2))
            ahead = [shard for when, shards in blocks if when == 0 for shard in shards]
            until = time.monotonic() + 10
            while not all(cache.holds(batches.dataset.paths[shard]) for shard in ahead):
                assert time.monotonic() < until
                time.sleep(0.005)
        assert hits[1:] == [2] * 39


def test_the_blocks_of_a_lane_follow_each_other():
    order = Order([10, 3, 7, 12, 5, 9, 4], seed=3, lanes=4, shards_per_block=2)
    for lane in range(4):
        position = lane
        for _ in range(60):
            shards, following = order.block_shards(position)
            assert following % 4 == lane and following > position
            seen = {order.locate(at).shard for at in range(position, following, 4)}
            assert seen <= set(shards)
            assert order.block_shards(following - 4) == (shards, following)
            position = following


def test_what_to_fetch_is_the_current_blocks_then_the_nearest_next_ones_within_the_budget():
    blocks = [(0, [4]), (7, [9, 2]), (0, [1, 4]), (3, [5, 1])]
    for budget, expected in ((0, []), (300, [4, 1, 5]), (450, [4, 1, 5, 9]), (10**6, [4, 1, 5, 9, 2])):
        assert upcoming_shards(blocks, [100] * 12, budget) == expected


@pytest.mark.slow
def test_a_store_that_dies_in_mid_epoch_and_comes_back_loses_nothing(folder, remote, store, tmp_path):
    with make(folder) as here:
        expected = [contents(next(here)) for _ in range(24)]
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    cache = Cache(tmp_path / "cache", SHARDS * largest)
    with make(remote, cache=cache, prefetch_steps=0) as there:
        seen = [contents(next(there)) for _ in range(3)]
        store.kill()
        for shard in there.dataset.paths:
            cache.discard(shard)  # so that the next step needs the store
        back = threading.Timer(1.0, store.start)
        back.start()
        seen += [contents(next(there)) for _ in range(21)]
        back.join()
    assert seen == expected


@pytest.mark.slow
def test_a_store_that_stays_away_stops_the_run_with_the_shard_named(folder, remote, store, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    cache = Cache(tmp_path / "cache", 10**9)
    batches = make(remote, cache=cache, prefetch_steps=0)
    next(batches)
    store.kill()
    try:
        for shard in batches.dataset.paths:
            cache.discard(shard)
        with pytest.raises(
            StorageError, match=r"s3://bucket/train/\d.tar: .* in 3 attempts .*Check the network"
        ) as raised:
            for _ in range(5):
                next(batches)
        assert "for position" in raised.value.__notes__[0] and batches.ledger == []
        with pytest.raises(RuntimeError, match="closed"):
            next(batches)
    finally:
        store.start()


@pytest.mark.slow
def test_closing_does_not_wait_for_a_store_that_is_away(folder, remote, store, tmp_path, monkeypatch):
    for delay in ("FIRST_DELAY_SECONDS", "LONGEST_DELAY_SECONDS"):
        monkeypatch.setattr(storage, delay, 1e6)
    store.kill()
    try:
        batches = make(remote, cache=Cache(tmp_path / "cache", 10**9))
        time.sleep(0.5)
        closing = threading.Thread(target=batches.close, daemon=True)
        closing.start()
        closing.join(60.0)
        assert not closing.is_alive()  # else it waits for days
    finally:
        store.start()


def test_a_copy_that_was_changed_on_the_disk_is_fetched_again_and_not_replaced_by_another_sample(
    folder, remote, tmp_path
):
    cache = Cache(tmp_path / "cache", 10**9)
    with make(folder) as here:
        expected = [contents(next(here)) for _ in range(12)]
    with make(remote, cache=cache, prefetch_steps=0) as there:
        seen = [contents(next(there)) for _ in range(4)]
        for path in (tmp_path / "cache").glob("*.tar"):
            path.write_bytes(bytes(path.stat().st_size))
        seen += [contents(next(there)) for _ in range(8)]
        assert there.ledger == []
    assert seen == expected


HURT = (2, 3)
"""Shard and ordinal of the sample that is bad in the store itself."""


@pytest.fixture
def hurt(folder, store, tmp_path):
    """A folder in which a byte of one sample was changed after indexing, and the manifest of the same in a store."""
    own, manifest = tmp_path / "own", tmp_path / "own.jsonl"
    shutil.copytree(folder, own)
    uri = store.put_folder(own, "own/train")
    assert data_index.main([uri, "--manifest", str(manifest), "--workers", "1"]) == 0
    path = own / f"{HURT[0]}.tar"
    data = bytearray(path.read_bytes())
    data[int(load_index(index_path(path)).samples[HURT[1]]["offset"]) + 600] ^= 1
    path.write_bytes(data)
    old = open_dataset(manifest).rows[HURT[0]].etag
    new = storage.stat(store.put(f"own/train/{path.name}", bytes(data))).etag
    manifest.write_text(manifest.read_text().replace(old, new))
    return own, manifest


def test_a_sample_that_is_bad_in_the_store_is_replaced_as_it_is_on_a_disk(hurt, tmp_path):
    own, manifest = hurt
    with make(own) as here, make(manifest, cache=Cache(tmp_path / "cache", 10**9)) as there:
        for _ in range(12):
            assert contents(next(here)) == contents(next(there))
        assert [fault["key"] for fault in there.ledger] == [fault["key"] for fault in here.ledger] == ["k0027"]
        assert there.ledger[0]["shard"] == "s3://own/train/2.tar"


def damage(copy):
    """All bytes of a copy in the cache."""
    copy.write_bytes(bytes(copy.stat().st_size))


def test_a_bad_sample_of_the_store_keeps_the_copy_and_damaged_copies_change_no_other_sample(hurt, tmp_path):
    cache = Cache(tmp_path / "cache", 10**9)
    reader = ShardReader(open_dataset(hurt[1]), "edges", cache=cache)
    shard, ordinal = HURT
    reader.read(shard, 0)
    copy = cache.path(reader.dataset.paths[shard])
    fetched = copy.stat().st_ino
    with pytest.raises(BadSample, match="CRC"):
        reader.read(shard, ordinal)
    assert copy.stat().st_ino == fetched
    for _ in range(3):  # a disk that damages whatever is fetched
        damage(copy)
        assert [reader.read(shard, at).key for at in (0, 1, 2, 4)] == [f"k{24 + at:04d}" for at in (0, 1, 2, 4)]
        with pytest.raises(BadSample):
            reader.read(shard, ordinal)
    reader.close()


def test_threads_that_read_a_damaged_copy_at_once_all_get_the_sample_of_the_store(remote, tmp_path, monkeypatch):
    cache = Cache(tmp_path / "cache", 10**9)
    reader = ShardReader(open_dataset(remote), "edges", cache=cache)
    reader.read(0, 0)
    damage(cache.path(reader.dataset.paths[0]))
    pread, both = reader._pread, threading.Barrier(2)

    def read_together(*arguments):
        data = pread(*arguments)
        if not any(data):
            both.wait(20)  # so that neither has dropped the copy before the other has read it
        return data

    monkeypatch.setattr(reader, "_pread", read_together)
    with ThreadPoolExecutor(2) as pool:
        assert [sample.key for sample in pool.map(lambda at: reader.read(0, at), (1, 2))] == ["k0001", "k0002"]
    assert reader.read(0, 3).key == "k0003" and any(cache.path(reader.dataset.paths[0]).read_bytes())
    reader.close()


def test_a_damaged_copy_of_a_shard_that_was_replaced_in_the_store_stops_the_run(folder, remote, store, tmp_path):
    cache = Cache(tmp_path / "cache", 10**9)
    reader = ShardReader(open_dataset(remote), "edges", cache=cache)
    reader.read(5, 0)
    damage(cache.path(reader.dataset.paths[5]))
    store.put("bucket/train/5.tar", (folder / "4.tar").read_bytes())
    with pytest.raises(ValueError, match="5.tar has .* it was indexed with .*Put that version back") as raised:
        reader.read(5, 1)
    assert not isinstance(raised.value, BadSample)
    reader.close()


def test_a_shard_that_was_replaced_in_the_store_stops_the_run(folder, remote, store, tmp_path):
    store.put("bucket/train/5.tar", (folder / "4.tar").read_bytes())
    with pytest.raises(ValueError, match="s3://bucket/train/5.tar has .* it was indexed with .*Put that version back"):
        with make(remote, cache=Cache(tmp_path / "cache", 10**9)) as batches:
            for _ in range(12):
                next(batches)


def test_remote_shards_need_a_cache_that_holds_what_is_read_at_once(folder, remote, tmp_path):
    with pytest.raises(ValueError, match="8 shards in a store.*a folder on a local disk, data.cache"):
        make(remote)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="data.cache_gib=.* is less than what 2 ranks .* read from at once"):
        make(remote, cache=Cache(tmp_path / "cache", 10_000), rank=0, world_size=2, ranks_per_node=2)
    assert threading.active_count() == threads


@pytest.mark.slow
def test_samples_are_looked_at_without_a_cache(folder, remote, tmp_path, capsys):
    samples = [
        list(held_out(open_dataset(where), 15, condition="edges", resolution=SIZE)) for where in (folder, remote)
    ]
    assert [sample.key for sample in samples[0]] == [sample.key for sample in samples[1]]
    assert all(np.array_equal(a.pixel_values, b.pixel_values) for a, b in zip(*samples, strict=True))
    assert show_main([str(remote), "-o", str(tmp_path / "sheet.png"), "--count", "4"]) == 0
    assert order_main([str(remote), "--global-batch-size", "8"]) == 0
    assert "k00" in capsys.readouterr().out and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_speed_of_a_store_is_measured_through_a_cache(remote, tmp_path, capsys):
    arguments = [str(remote), "--resolution", "16", "--batch-size", "8", "--threads", "1", "--seconds", "0.2"]
    with pytest.raises(ValueError, match="give a folder"):
        bench_main(arguments)
    assert bench_main([*arguments, "--cache", str(tmp_path / "cache")]) == 0
    assert list((tmp_path / "cache").glob("*.tar")) and "samples/s" in capsys.readouterr().out
