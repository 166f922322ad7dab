import json
import resource
from dataclasses import fields

import numpy as np
import pytest
import webdataset
from loaders import make_loader
from repeated import write_repeated

from controlbooth.data.order import draws
from controlbooth.data.order.buckets import Buckets
from controlbooth.data.order.draws import hash64
from controlbooth.data.packing.pack import pack
from controlbooth.data.packing.sources import open_scenes
from controlbooth.data.pictures.images import BadSample
from controlbooth.data.shards import latent_cache as caches
from controlbooth.data.shards.latent_cache import (
    LatentCacheReader,
    check_stated,
    condition_parts,
    damaged,
    latents_parts,
    missing,
    open_latent_cache,
    plan_latent_cache,
    state,
    stored_bytes,
    text_parts,
    written_cache_shard,
)
from controlbooth.data.shards.manifest import Dataset, join_datasets, open_dataset
from controlbooth.data.shards.sidecar import index_path, load_index

G, SIZE = 8, 16
SQUARE = Buckets(((SIZE, SIZE),), ({},))
HERE = {"batch": 4, "device": "cpu", "threads": 1, "torch": "2"}


def identities(condition=None, **latents):
    pictures = {"vae": "v", "dtype": "bfloat16", "shapes": [[SIZE, SIZE]], "flips": False, **latents}
    return {
        "latents": pictures,
        "text": {"text_encoders": ["t"], "dtype": "float32", "pooled": True},
        **({} if condition is None else {f"condition.{condition}": pictures | {"values": "binary"}}),
    }


@pytest.fixture
def shards(tmp_path):
    """Three shards of eight scenes."""
    out = tmp_path / "shards"
    assert pack(open_scenes(24, 0, 0, SIZE, ["edges"]), out, 8) == []
    return out


def values(kind, row, shard, flipped=False):
    """Arrays that tell where they belong."""
    number = 1000 * shard + 10 * row + flipped
    if kind.startswith("condition."):
        return [np.full((4, 2, 2), number + 7, "<u2")]
    if kind == "latents":
        return [np.full((4, 2, 2), number + i, "<u2") for i in (0, 5)]
    return [np.full((3, 5), number, "<f4"), np.full(6, number, "<f4")]


def write(shards, folder, known, without=(), buckets=SQUARE):
    """Writes the cache of all shards, in an order of their own; `without` some (shard, row). -> LatentCache"""
    dataset = open_dataset(shards)
    folder.mkdir(exist_ok=True)
    state(folder, known, HERE)
    latent_cache = plan_latent_cache(folder, dataset, buckets, known)
    for kind, shard in missing(latent_cache):
        index = load_index(index_path(dataset.paths[shard]))
        with written_cache_shard(latent_cache.paths[kind][shard], index, {}) as add:
            for row in reversed(index.usable().tolist()):
                if (shard, row) not in without:
                    add(row, f"scene-0-{shard * 8 + row:08d}", arrays_of(kind, known, row, shard))
    return latent_cache


def arrays_of(kind, known, row, shard):
    if kind == "text":
        return dict(zip(text_parts("float32", 0, True), values("text", row, shard), strict=True))
    flips = (False, True)[: 1 + known["latents"]["flips"]]
    parts = latents_parts if kind == "latents" else condition_parts
    return {
        name: array
        for flipped in flips
        for name, array in zip(parts("bfloat16", flipped), values(kind, row, shard, flipped), strict=True)
    }


def batches(shards, latent_cache=None, **changes):
    arguments = dict(
        seed=1, lanes=G, shards_per_block=2, global_batch_size=G, micro_batch_size=4, rank=0, world_size=1,
        condition="edges", resolution=SIZE, prompt_dropout=0.5, random_flip=False, random_crop=False,
        num_train_timesteps=1000, latent_shape=(4, 2, 2), threads=2, prefetch_steps=1, latent_cache=latent_cache,
    )  # fmt: skip
    return make_loader(shards if isinstance(shards, Dataset) else open_dataset(shards), **(arguments | changes))


def take(shards, steps, latent_cache=None, **changes):
    with batches(shards, latent_cache, **changes) as loader:
        return [batch for _ in range(steps) for batch in next(loader).micro_batches], loader.ledger


def place_of(key):
    return divmod(int(key[-8:]), 8)


def test_each_sample_gets_its_own_latents_and_only_kept_prompts_have_text(shards, tmp_path):
    found, _ = take(shards, 6, write(shards, tmp_path / "c", identities()))
    kept = 0
    for batch in found:
        assert batch.pixel_values is None
        told = []
        for i, key in enumerate(batch.keys):
            shard, row = place_of(key)
            mean, std = values("latents", row, shard)
            assert np.array_equal(batch.encoded.mean[i], mean) and np.array_equal(batch.encoded.std[i], std)
            told += [] if batch.dropped[i] else [values("text", row, shard)]
        kept += len(told)
        if told:
            assert np.array_equal(batch.encoded.hidden_states, [hidden for hidden, _ in told])
            assert np.array_equal(batch.encoded.pooled, [pooled for _, pooled in told])
        else:
            assert batch.encoded.hidden_states is None and batch.encoded.pooled is None
    assert 0 < kept < 48  # some prompts were dropped and some were not


def test_samples_of_one_key_get_their_own_latents_and_equal_shards_of_two_sources_the_same(tmp_path):
    """Names of samples repeat in every shard, and names of shards from source to source."""
    for name, seed in (("a", 1), ("b", 2)):
        write_repeated(tmp_path / name, shards=3, size=SIZE, seed=seed)
    dataset = join_datasets([open_dataset(tmp_path / name) for name in "aba"])
    latent_cache = plan_latent_cache(tmp_path / "c", dataset, Buckets(((SIZE, SIZE),), ({}, {}, {})), identities())
    (tmp_path / "c").mkdir()
    for kind in latent_cache.paths:
        assert latent_cache.paths[kind][:3] == latent_cache.paths[kind][6:] and len(set(latent_cache.paths[kind])) == 6
        for shard in range(6):
            index = load_index(index_path(dataset.paths[shard]))
            with written_cache_shard(latent_cache.paths[kind][shard], index, {}) as add:
                for row in range(6):
                    add(row, f"{row:09d}", arrays_of(kind, identities(), row, shard))
    found, _ = take(dataset, 9, latent_cache)
    for batch in found:
        for i, (shard, row) in enumerate(batch.places.tolist()):
            assert np.array_equal(batch.encoded.mean[i], values("latents", row, shard % 6)[0])


def test_all_but_the_pictures_is_as_it_is_without_a_latent_cache(shards, tmp_path):
    plain, _ = take(shards, 6)
    cached, _ = take(shards, 6, write(shards, tmp_path / "c", identities()))
    names = [item.name for item in fields(plain[0]) if item.name not in ("pixel_values", "encoded")]
    assert {"dropped", "captions", "timesteps", "noise", "conditioning", "keys", "weights"} <= set(names)
    for one, other in zip(plain, cached, strict=True):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_a_mirrored_sample_gets_the_latents_of_its_mirrored_picture(shards, tmp_path):
    latent_cache = write(shards, tmp_path / "c", identities(flips=True))
    found, _ = take(shards, 3, latent_cache, random_flip=True)
    flips = draws.flips(1, np.concatenate([batch.positions for batch in found]))
    assert 0 < flips.sum() < len(flips)
    for batch in found:
        for i, (key, flipped) in enumerate(zip(batch.keys, draws.flips(1, batch.positions), strict=True)):
            shard, row = place_of(key)
            assert np.array_equal(batch.encoded.mean[i], values("latents", row, shard, bool(flipped))[0])


def test_each_sample_gets_the_latents_of_its_own_condition_in_place_of_the_picture_of_it(shards, tmp_path):
    latent_cache = write(shards, tmp_path / "c", identities("edges", flips=True), without={(1, 4)})
    plain, _ = take(shards, 6, random_flip=True, max_bad_rate=1.0)
    found, _ = take(shards, 6, latent_cache, random_flip=True, max_bad_rate=1.0)
    for one, other in zip(plain, found, strict=True):
        assert other.conditioning is None and one.conditioning is not None
        assert other.captions == one.captions or (1, 4) in map(place_of, one.keys)
        for i, (key, flipped) in enumerate(zip(other.keys, draws.flips(1, other.positions), strict=True)):
            shard, row = place_of(key)
            assert np.array_equal(other.encoded.mean[i], values("latents", row, shard, bool(flipped))[0])
            assert np.array_equal(other.encoded.condition[i], values("condition.edges", row, shard, bool(flipped))[0])
    without, _ = take(shards, 1, write(shards, tmp_path / "d", identities()))
    assert all(batch.encoded.condition is None and batch.conditioning is not None for batch in without)


@pytest.mark.parametrize("changes", [{"random_flip": True}, {"random_crop": True}])
def test_crops_and_flips_that_have_no_latents_are_refused(shards, tmp_path, changes):
    latent_cache = write(shards, tmp_path / "c", identities())
    with pytest.raises(ValueError, match="cut at the centre, not mirrored"):
        batches(shards, latent_cache, **changes)


def test_a_sample_that_could_not_be_encoded_is_replaced_as_a_bad_one(shards, tmp_path):
    without = {(0, 3), (2, 1)}
    latent_cache = write(shards, tmp_path / "c", identities(), without)
    found, ledger = take(shards, 9, latent_cache, max_bad_rate=1.0)
    assert {place_of(fault["key"]) for fault in ledger} == without
    assert not without & {place_of(key) for batch in found for key in batch.keys}
    assert all(batch.encoded.mean.any() for batch in found)


def test_webdataset_reads_latents_beside_their_samples(shards, tmp_path):
    latent_cache = write(shards, tmp_path / "c", identities())
    read = {}
    for path in latent_cache.paths["text"]:
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
            read[place_of(sample["__key__"])] = sample["hidden_states.0.float32.npy"]
    assert len(read) == 24
    assert all(np.array_equal(array, values("text", row, shard)[0]) for (shard, row), array in read.items())


def test_what_is_reckoned_is_what_is_written(shards, tmp_path):
    latent_cache = write(shards, tmp_path / "c", identities())
    for kind in ("latents", "text"):
        path = latent_cache.paths[kind][0]
        reckoned = 8 * stored_bytes(values(kind, 0, 0))
        assert reckoned < path.stat().st_size + index_path(path).stat().st_size < reckoned + 20_000  # tars are padded


def test_a_shard_without_its_index_is_computed_again_and_others_are_not(shards, tmp_path):
    """As after kill -9 between the two names, with what a killed writer leaves."""
    known = identities()
    latent_cache = write(shards, tmp_path / "c", known)
    index_path(latent_cache.paths["latents"][1]).unlink()
    leftover = latent_cache.paths["latents"][1].with_name(f"{latent_cache.paths['latents'][1].name}.123.tmp")
    leftover.write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.tar")}
    assert missing(latent_cache) == [("latents", 1)]
    write(shards, tmp_path / "c", known)
    assert missing(latent_cache) == [] and not leftover.exists()
    changed = {path for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert changed == {latent_cache.paths["latents"][1]}


def test_damaged_cache_shards_are_found_by_their_size_their_index_and_their_contents(shards, tmp_path):
    latent_cache = write(shards, tmp_path / "latents", identities())
    assert damaged(latent_cache) == {}
    cut, changed, unindexed = (
        latent_cache.paths["latents"][0],
        latent_cache.paths["latents"][2],
        latent_cache.paths["text"][1],
    )
    cut.write_bytes(cut.read_bytes()[:1000])
    data = bytearray(changed.read_bytes())
    index = load_index(index_path(changed))
    at = int(index.samples[3]["offset"]) + int(index.parts[3, 1]["offset"]) + int(index.parts[3, 1]["size"]) - 1
    data[at] ^= 255
    changed.write_bytes(data)
    index_path(unindexed).write_bytes(b"")
    found = damaged(latent_cache)
    assert set(found) == {("latents", 0), ("latents", 2), ("text", 1)} and missing(latent_cache) == []
    shares = [damaged(latent_cache, rank, 2) for rank in range(2)]
    assert shares[0] | shares[1] == found and not shares[0].keys() & shares[1].keys()
    assert f"{cut} has 1000 bytes, its index says" in found["latents", 0]
    assert f"{changed}: the bytes from" in found["latents", 2]
    assert f"{index_path(unindexed)} is not a whole index: run `controlbooth data precompute`" in found["text", 1]


def test_a_damaged_cache_shard_has_no_index_until_it_is_whole_again(shards, tmp_path, monkeypatch):
    latent_cache = write(shards, tmp_path / "latents", identities())
    path, index = latent_cache.paths["text"][0], load_index(index_path(open_dataset(shards).paths[0]))
    path.write_bytes(b"")
    monkeypatch.setattr(caches, "write_index", lambda index, path: 1 / 0)
    with pytest.raises(ZeroDivisionError), written_cache_shard(path, index, {}):
        pass
    assert missing(latent_cache) == [("text", 0)]


def test_a_writer_that_fails_leaves_nothing(shards, tmp_path):
    dataset = open_dataset(shards)
    latent_cache = plan_latent_cache(tmp_path, dataset, SQUARE, identities())
    path, index = latent_cache.paths["text"][0], load_index(index_path(dataset.paths[0]))
    with pytest.raises(KeyboardInterrupt), written_cache_shard(path, index, {}) as add:
        add(0, "000000000", arrays_of("text", identities(), 0, 0))
        raise KeyboardInterrupt
    assert list(tmp_path.glob("*.tar*")) == []


def test_a_full_disk_says_what_to_do_and_keeps_nothing_half(shards, tmp_path):
    """A limit on the size of files stands for the disk: the same write fails, with another number."""
    dataset = open_dataset(shards)
    path = plan_latent_cache(tmp_path, dataset, SQUARE, identities()).paths["text"][0]
    index = load_index(index_path(dataset.paths[0]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="make room and start again"), written_cache_shard(path, index, {}) as add:
            add(0, "000000000", {"hidden_states.0.float32.npy": np.zeros((1024, 1024), np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.glob("*.tar*")) == []


def test_a_replaced_shard_wants_new_latents_of_its_own_only(shards, tmp_path):
    known = identities()
    before = plan_latent_cache(tmp_path / "c", open_dataset(shards), SQUARE, known)
    write(shards, tmp_path / "c", known)
    again = tmp_path / "again"
    assert pack(open_scenes(8, 7, 0, SIZE, ["edges"]), again, 8) == []
    for name in ("shards-000000.tar", "shards-000000.tar.idx"):
        (shards / name.replace("000000", "000001")).write_bytes((again / name).read_bytes())
    (shards / "manifest.jsonl").unlink()
    now = plan_latent_cache(tmp_path / "c", open_dataset(shards), SQUARE, known)
    assert missing(now) == [("latents", 1), ("text", 1)]
    assert now.paths["latents"][0] == before.paths["latents"][0]
    with pytest.raises(ValueError, match="2 of 6 shards of the latent cache are missing.*precompute"):
        open_latent_cache(tmp_path / "c", open_dataset(shards), SQUARE, known)


def test_a_latent_cache_of_other_encoders_is_refused_with_what_differs(shards, tmp_path):
    write(shards, tmp_path / "c", identities())
    other = identities(vae="w", flips=True)
    with pytest.raises(ValueError, match="flips=False there, and here True; latents have vae='v' there, and here 'w'"):
        open_latent_cache(tmp_path / "c", open_dataset(shards), SQUARE, other)
    with pytest.raises(ValueError, match="holds a latent cache of something else: latents have flips"):
        check_stated(tmp_path / "c", other)
    with pytest.raises(ValueError, match="holds no latent cache.*controlbooth data precompute"):
        open_latent_cache(tmp_path / "nowhere", open_dataset(shards), SQUARE, other)


def test_machines_that_computed_are_named_once_each(shards, tmp_path):
    known = identities()
    write(shards, tmp_path / "c", known)
    state(tmp_path / "c", known, HERE)
    assert open_latent_cache(tmp_path / "c", open_dataset(shards), SQUARE, known).computed == (HERE,)
    state(tmp_path / "c", known, HERE | {"threads": 2})
    assert len(open_latent_cache(tmp_path / "c", open_dataset(shards), SQUARE, known).computed) == 2


def test_latents_have_other_names_where_samples_go_to_other_buckets(shards):
    dataset, known = open_dataset(shards), identities()
    one = plan_latent_cache(shards, dataset, Buckets(((16, 16), (8, 32)), ({0: 0, 32: 1},)), known)
    other = plan_latent_cache(shards, dataset, Buckets(((16, 16), (8, 32)), ({0: 0, 32: 0},)), known)
    assert one.paths["latents"] != other.paths["latents"] and one.paths["text"] == other.paths["text"]


def test_damaged_latents_stop_a_run_instead_of_replacing_samples(shards, tmp_path):
    latent_cache = write(shards, tmp_path / "c", identities())
    path = latent_cache.paths["latents"][0]
    index = load_index(index_path(path))
    data = bytearray(path.read_bytes())
    part = index.parts[2][index.extensions.index("mean.bfloat16.npy")]
    data[int(index.samples[2]["offset"]) + int(part["offset"]) + 130] ^= 1
    path.write_bytes(data)
    reader = LatentCacheReader(latent_cache)
    assert reader.latents(0, 1, "k", int(index.samples[1]["key_hash"]), False)[0].shape == (4, 2, 2)
    with pytest.raises(ValueError, match="have changed since they were written: run `controlbooth data precompute`"):
        reader.latents(0, 2, "k", int(index.samples[2]["key_hash"]), False)
    with pytest.raises(ValueError, match="row 1 is not of 'k'"):
        reader.latents(0, 1, "k", hash64("another"), False)
    path.write_bytes(data[:-512])
    with pytest.raises(ValueError, match="bytes, its index says"):
        LatentCacheReader(latent_cache).latents(0, 1, "k", int(index.samples[1]["key_hash"]), False)


def test_a_caption_without_an_embedding_is_a_bad_sample(shards, tmp_path):
    latent_cache = write(shards, tmp_path / "c", identities())
    index = load_index(index_path(latent_cache.paths["text"][0]))
    with pytest.raises(BadSample, match="could not be encoded"):
        LatentCacheReader(latent_cache).text(0, 1, "k", int(index.samples[1]["key_hash"]), caption=1)


def test_fewer_open_cache_shards_than_shards_read_the_same(shards, tmp_path):
    latent_cache = write(shards, tmp_path / "c", identities())
    reader = LatentCacheReader(latent_cache, most_open=1)
    for shard in (0, 1, 2, 0):
        hashes = load_index(index_path(latent_cache.paths["latents"][shard])).samples["key_hash"]
        assert np.array_equal(reader.latents(shard, 5, "k", int(hashes[5]), False), values("latents", 5, shard))
    reader.close()


def test_what_is_stated_can_be_read_by_people(shards, tmp_path):
    write(shards, tmp_path / "c", identities())
    tree = json.loads((tmp_path / "c" / caches.STATED).read_text())
    assert tree["identities"]["latents"]["vae"] == "v" and tree["computed"] == [HERE]
