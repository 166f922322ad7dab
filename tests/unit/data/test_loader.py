import itertools
import json
import os
import shutil
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset
from loaders import make_loader
from repeated import write_repeated

from controlbooth.data.conditions.functions import CONDITIONS
from controlbooth.data.loading import loader
from controlbooth.data.loading.held_out import held_out
from controlbooth.data.loading.loader import Loader
from controlbooth.data.loading.plan import plan_order
from controlbooth.data.order import draws
from controlbooth.data.order.settings import OrderSettings
from controlbooth.data.scenes import render
from controlbooth.data.shards.index import ensure_index
from controlbooth.data.shards.manifest import Dataset, join_datasets, open_dataset
from controlbooth.data.shards.reader import ShardReader
from controlbooth.data.shards.sidecar import index_path, load_index
from controlbooth.launch.commands.data_info import main as info_main

SHARDS, PER_SHARD, SIZE = 6, 17, 24
G = 8


def encode_png(pixels):
    return cv2.imencode(".png", pixels if pixels.ndim == 2 else pixels[..., ::-1])[1].tobytes()


@pytest.fixture(scope="module")
def scene_parts():
    """The parts of 102 small scenes; every fifth has two captions."""
    samples = []
    for i in range(SHARDS * PER_SHARD):
        what = render.scene(5, i)
        drawn = render.render(what, SIZE)
        captions = [what.caption, "a scene"]
        caption = {"json": json.dumps({"captions": captions}).encode()} if i % 5 == 0 else {"txt": captions[0].encode()}
        samples.append({"png": encode_png(drawn.image), "cond.edges.png": encode_png(drawn.edges), **caption})
    return samples


def write_shards(folder, samples):
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard}.tar"), encoder=False, mtime=0) as writer:
            for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                writer.write({"__key__": f"k{i:04d}", **samples[i]})
        ensure_index(folder / f"{shard}.tar")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scene_parts):
    return write_shards(tmp_path_factory.mktemp("shards"), scene_parts)


@pytest.fixture
def own_folder(tmp_path, scene_parts):
    """Shards to damage."""
    return write_shards(tmp_path, scene_parts)


def make(folder, **changes):
    arguments = dict(
        seed=1, lanes=G, shards_per_block=2, global_batch_size=G, micro_batch_size=2, rank=0, world_size=1,
        condition="edges", resolution=16, prompt_dropout=0.5, random_flip=True, random_crop=True,
        num_train_timesteps=1000, latent_shape=(4, 2, 2), threads=3, prefetch_steps=2,
    )  # fmt: skip
    return make_loader(folder if isinstance(folder, Dataset) else open_dataset(folder), **(arguments | changes))


def take(folder, steps, **changes):
    """Steps of one rank -> [{position: everything about its sample}]."""
    with make(folder, **changes) as batches:
        return [by_position(next(batches)) for _ in range(steps)]


def by_position(step):
    rows = {}
    for batch in step.micro_batches:
        for i, position in enumerate(batch.positions.tolist()):
            values = {item.name: getattr(batch, item.name) for item in fields(batch)}
            rows[position] = {name: value[i] for name, value in values.items() if value is not None}
    return rows


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for position, row in one.items():
        for name, value in row.items():
            assert np.array_equal(value, other[position][name]), (position, name)


def test_every_world_size_sees_the_same_samples_and_draws(folder):
    whole = take(folder, 15)
    for world_size, micro in [(2, 4), (4, 1)]:
        ranks = [take(folder, 15, rank=r, world_size=world_size, micro_batch_size=micro) for r in range(world_size)]
        for step in range(15):
            together: dict = {}
            for rank in ranks:
                assert len(rank[step]) == G // world_size
                together |= rank[step]
            assert_equal(whole[step], together)


def test_each_sample_comes_once_an_epoch(folder):
    steps = take(folder, 24)  # epochs of 96 of 102 samples
    for epoch in range(2):
        keys = [row["keys"] for step in steps[epoch * 12 : (epoch + 1) * 12] for row in step.values()]
        assert len(keys) == len(set(keys)) == 96
    seen = [{row["keys"] for step in steps[at : at + 12] for row in step.values()} for at in (0, 12)]
    assert seen[0] != seen[1]


def test_a_run_is_the_same_whatever_its_threads_and_prefetch(folder):
    one, other = take(folder, 6, threads=1, prefetch_steps=0), take(folder, 6, threads=4, prefetch_steps=5)
    for a, b in zip(one, other, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("stops", [[5], [3, 7], [12], [11, 12, 13]])  # 12 is exactly an epoch's end
def test_resumes_equal_an_uninterrupted_run(folder, stops):
    whole = take(folder, 16)
    parts = []
    for start, stop in zip([0, *stops], [*stops, 16], strict=True):
        parts += take(folder, stop - start, start_step=start)
    for a, b in zip(whole, parts, strict=True):
        assert_equal(a, b)


def test_a_resume_may_change_the_world_size(folder):
    whole = take(folder, 8)
    later = [take(folder, 4, start_step=4, rank=rank, world_size=2) for rank in range(2)]
    for step in range(4):
        assert_equal(whole[4 + step], later[0][step] | later[1][step])


def test_the_position_counts_what_was_consumed_and_not_what_was_prefetched(folder):
    with make(folder, prefetch_steps=4, start_step=3) as batches:
        assert batches.position == 3 * G
        for expected in (3, 4, 5):
            time.sleep(0.05)
            assert next(batches).step == expected
            assert batches.position == (expected + 1) * G


def test_prefetching_is_bounded(folder, monkeypatch):
    started = []
    start = Loader._start

    def count(self, number, positions):
        started.append(number)
        return start(self, number, positions)

    monkeypatch.setattr(Loader, "_start", count)
    with make(folder, prefetch_steps=3) as batches:
        time.sleep(0.1)
        assert started == [0, 1, 2, 3]  # before anything was asked for
        next(batches)
        next(batches)
        assert started == [0, 1, 2, 3, 4]


def test_shapes_and_types_are_as_stated(folder):
    with make(folder, rank=1, world_size=2) as batches:
        step = next(batches)
    assert len(step.micro_batches) == 2 and step.substitutions == 0 and step.bytes_read > 0
    assert step.wait_seconds >= 0 and step.fetch_seconds > 0 and step.decode_seconds > 0
    batch = step.micro_batches[0]
    assert batch.positions.tolist() == [4, 5] and batch.positions.dtype == np.int64
    assert batch.pixel_values.shape == batch.conditioning.shape == (2, 3, 16, 16)
    assert batch.pixel_values.dtype == batch.conditioning.dtype == np.uint8
    assert batch.noise.shape == (2, 4, 2, 2) and batch.noise.dtype == np.float32
    assert batch.timesteps.dtype == np.int64 and batch.dropped.dtype == bool
    assert batch.weights.tolist() == [1.0, 1.0] and batch.weights.dtype == np.float32


def test_draws_are_those_of_the_position(folder):
    for step in take(folder, 14):
        for position, row in step.items():
            at = np.array([position])
            assert row["timesteps"] == draws.timesteps(1, at, 1000)[0]
            assert np.array_equal(row["noise"], draws.noise(1, at, (4, 2, 2))[0])
            assert row["dropped"] == draws.prompt_dropped(1, at, 0.5)[0]
            assert (row["captions"] == "") == row["dropped"]


def test_the_names_of_shards_and_samples_change_nothing_but_themselves(folder, tmp_path, scene_parts):
    """The same samples under equal names in each shard, in shards of other names: all but the names is as it was."""
    for shard in range(SHARDS):
        path = tmp_path / f"part-{(7 * shard + 3) % 10}-{shard}.tar"
        with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
            for number in range(PER_SHARD):
                writer.write({"__key__": f"{number:09d}", **scene_parts[shard * PER_SHARD + number]})
        ensure_index(path)
    by_shard = join_datasets([open_dataset(path) for path in sorted(tmp_path.glob("*.tar"), key=lambda p: p.stem[-1])])
    renamed = replace(by_shard, sources=())
    with make(folder) as named, make(renamed) as numbered:
        for _ in range(14):
            one, other = by_position(next(named)), by_position(next(numbered))
            for position in one:
                assert int(other[position]["keys"]) == int(one[position]["keys"][1:]) % PER_SHARD
                one[position]["keys"] = other[position]["keys"]
            assert_equal(one, other)


def test_a_data_set_that_was_moved_and_indexed_anew_gives_the_same_batches(tmp_path):
    """Two sources with equal names of shards and samples."""

    def batches():
        return take(join_datasets([open_dataset(tmp_path / name) for name in names]), 12)

    names = ["a", "b"]
    for name, seed in (("a", 1), ("b", 2)):
        write_repeated(tmp_path / name, seed=seed)
    before = batches()
    for name in names:
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / f"{name}-moved")
        for path in (tmp_path / "elsewhere" / f"{name}-moved").glob("*.idx"):
            path.unlink()
    names = [f"elsewhere/{name}-moved" for name in names]
    for name in names:
        for path in (tmp_path / name).glob("*.tar"):
            ensure_index(path)
    for one, other in zip(before, batches(), strict=True):
        assert_equal(one, other)


def test_each_place_comes_once_an_epoch_where_all_keys_are_equal(tmp_path):
    steps = take(write_repeated(tmp_path / "a", shards=24, per_shard=1), 6)  # two epochs of all 24 samples
    for epoch in (steps[:3], steps[3:]):
        rows = [row for step in epoch for row in step.values()]
        assert {row["keys"] for row in rows} == {"000000000"} and len({tuple(row["places"]) for row in rows}) == 24


def test_a_source_with_the_same_names_leaves_the_draws_of_a_step_independent(tmp_path):
    """By the sum over each step, whose spread would be that of pairs if samples of one name drew together."""
    sets = [open_dataset(write_repeated(tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 2))]
    for dataset in (sets[0], join_datasets(sets)):
        with make(dataset, prompt_dropout=0.5, condition=None) as batches:
            steps = [by_position(next(batches)).values() for _ in range(150)]
        dropped = np.array([[2.0 * row["dropped"] - 1 for row in step] for step in steps])
        late = np.array([[2.0 * (row["timesteps"] >= 500) - 1 for row in step] for step in steps])
        for drawn in (dropped, late):
            assert abs((drawn.sum(axis=1) ** 2).mean() / G - 1) < 5 * (2 / len(steps)) ** 0.5
        same = [(one["dropped"], other["dropped"]) for step in steps for one, other in itertools.combinations(step, 2)
                if one["keys"] == other["keys"]]  # fmt: skip
        assert len(same) > 300 and 0.35 < np.mean([one == other for one, other in same]) < 0.65


def test_captions_are_chosen_anew_and_dropping_is_exact_at_its_ends(folder):
    rows = [row for step in take(folder, 36, prompt_dropout=0.0) for row in step.values()]
    assert not any(row["dropped"] for row in rows)
    second = [row["captions"] == "a scene" for row in rows if int(row["keys"][1:]) % 5 == 0]
    assert 0.2 < np.mean(second) < 0.8
    assert all(row["captions"] == "" for step in take(folder, 3, prompt_dropout=1.0) for row in step.values())


def test_flip_and_crop_move_target_and_condition_together(tmp_path):
    columns = np.tile(np.arange(0, 160, 2, dtype=np.uint8), (40, 1))  # 80 x 40, each column a level of its own
    parts = {"png": encode_png(np.repeat(columns[..., None], 3, axis=2)), "cond.edges.png": encode_png(columns)}
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as writer:
        for i in range(G):
            writer.write({"__key__": f"k{i}", **parts, "txt": b""})
    ensure_index(tmp_path / "0.tar")
    rows = [row for step in take(tmp_path, 10, resolution=40) for row in step.values()]
    assert all(np.array_equal(row["pixel_values"], row["conditioning"]) for row in rows)
    left = {int(row["pixel_values"].min()) for row in rows}
    assert len(left) > 15 and max(left) <= 80
    rising = [row["pixel_values"][0, 0, 0] < row["pixel_values"][0, 0, -1] for row in rows]
    assert 0.25 < np.mean(rising) < 0.75
    plain = take(tmp_path, 2, resolution=40, random_flip=False, random_crop=False)
    assert all(np.array_equal(row["pixel_values"][0], columns[:, 20:60]) for step in plain for row in step.values())


def test_without_a_condition_there_is_none(folder):
    with make(folder, condition=None) as batches:
        assert next(batches).micro_batches[0].conditioning is None


def test_a_computed_condition_is_that_of_the_cut_and_mirrored_picture(folder):
    canny = take(folder, 6, condition="computed:canny")
    plain = take(folder, 6, condition=None)
    for step, other in zip(canny, plain, strict=True):
        for position, row in step.items():
            assert np.array_equal(row["pixel_values"], other[position]["pixel_values"])
            expected = CONDITIONS["canny"](np.ascontiguousarray(row["pixel_values"].transpose(1, 2, 0)))
            assert all(np.array_equal(plane, expected) for plane in row["conditioning"])
    assert any(row["conditioning"].any() for step in canny for row in step.values())


def test_random_parts_of_computed_conditions_are_new_in_each_epoch_and_equal_on_all_ranks_and_resumes(folder):
    changes = dict(condition="computed:canny_random", random_flip=False, random_crop=False)
    whole = take(folder, 24, **changes)
    by_key = [{row["keys"]: row["conditioning"] for step in whole[at : at + 12] for row in step.values()}
              for at in (0, 12)]  # fmt: skip
    both = by_key[0].keys() & by_key[1].keys()
    assert sum(not np.array_equal(by_key[0][key], by_key[1][key]) for key in both) > len(both) / 4
    second = take(folder, 2, rank=1, world_size=2, start_step=13, **changes)
    for at, step in zip((13, 14), second, strict=True):
        assert_equal(step, {position: whole[at][position] for position in step})


def test_a_condition_that_cannot_be_computed_names_those_that_can(folder):
    with pytest.raises(ValueError, match="'depth' cannot be computed.*these can: canny, .*data annotate"):
        make(folder, condition="computed:depth")


def test_held_out_conditions_are_computed_too(folder):
    one, two = (list(held_out(open_dataset(folder), 8, condition="computed:scribble", resolution=32))
                for _ in range(2))  # fmt: skip
    assert all(np.array_equal(a.conditioning, b.conditioning) for a, b in zip(one, two, strict=True))
    assert any(sample.conditioning.any() for sample in one)


def test_random_parts_of_held_out_conditions_come_from_the_picture_and_not_from_its_name(tmp_path):
    dataset = open_dataset(write_repeated(tmp_path / "a", shards=8, per_shard=1, size=48))
    samples = list(held_out(dataset, 8, condition="computed:canny_random", resolution=48))
    assert {sample.key for sample in samples} == {"000000000"} and len({sample.place for sample in samples}) == 8
    by_name = []
    for sample in samples:
        picture = np.ascontiguousarray(sample.pixel_values.transpose(1, 2, 0))
        expected = CONDITIONS["canny_random"](picture, draws.content_hash(encode_png(picture)))
        assert np.array_equal(sample.conditioning[0], expected)
        by_name.append(CONDITIONS["canny_random"](picture, draws.hash64(sample.key)))
    assert any(not np.array_equal(sample.conditioning[0], one) for sample, one in zip(samples, by_name, strict=True))


def test_given_positions_are_repeated_and_then_it_ends(folder):
    whole = take(folder, 4)
    with make(folder, positions=[*range(24, 32), *range(8, 16)]) as batches:
        steps = [by_position(step) for step in batches]
    assert len(steps) == 2
    assert_equal(steps[0], whole[3])
    assert_equal(steps[1], whole[1])


def damage(folder, rows, extension="png"):
    """Flips a byte in a part of each of these samples, numbered over all shards."""
    for row in rows:
        path = folder / f"{row // PER_SHARD}.tar"
        index = load_index(index_path(path))
        part = index.parts[row % PER_SHARD][index.extensions.index(extension)]
        data = bytearray(path.read_bytes())
        data[int(index.samples[row % PER_SHARD]["offset"]) + int(part["offset"]) + 30] ^= 1
        path.write_bytes(data)


def test_a_bad_sample_is_replaced_and_no_other_one_moves(folder, own_folder):
    whole = take(folder, 12)
    bad = {whole[step][step * G + 3]["keys"] for step in (2, 9)}
    damage(own_folder, [int(key[1:]) for key in bad], "cond.edges.png")
    with make(own_folder, ledger_path=own_folder / "ledger.jsonl") as batches:
        steps = [next(batches) for _ in range(12)]
        ledger = batches.ledger
    replaced = {fault["position"]: fault for fault in ledger}
    for step, expected in zip(steps, whole, strict=True):
        got = by_position(step)
        for position, row in expected.items():
            if row["keys"] in bad:
                assert got[position]["keys"] == replaced[position]["substitute"] != row["keys"]
                assert got[position]["weights"] == 1 and got[position]["pixel_values"].any()
                assert np.array_equal(got[position]["noise"], row["noise"])
            else:
                assert_equal({0: row}, {0: got[position]})
    assert {fault["key"] for fault in ledger} == bad
    assert sum(step.substitutions for step in steps) == len(replaced) == 2
    lines = [json.loads(line) for line in (own_folder / "ledger.jsonl").read_text().splitlines()]
    assert lines == ledger and "CRC" in lines[0]["error"] and lines[0]["part"] == "cond.edges.png"
    assert lines[0]["shard"].endswith(".tar") and {"position", "ordinal", "attempt"} <= lines[0].keys()
    index = load_index(index_path(Path(lines[0]["shard"])))
    [row] = np.flatnonzero(index.samples["offset"] == lines[0]["byte"]).tolist()
    assert index.samples["key_hash"][row] == draws.hash64(lines[0]["key"])
    assert index.contents(row) == lines[0]["contents"]
    other = load_index(index_path(Path(lines[0]["substitute_shard"])))
    [row] = np.flatnonzero(other.samples["offset"] == lines[0]["substitute_byte"]).tolist()
    assert other.samples["key_hash"][row] == draws.hash64(lines[0]["substitute"])


def test_substitutes_are_the_same_on_every_world_size_and_rerun(own_folder):
    damage(own_folder, range(0, 102, 4))
    whole = take(own_folder, 12, max_bad_rate=1.0)
    ranks = [take(own_folder, 12, max_bad_rate=1.0, rank=rank, world_size=4) for rank in range(4)]
    for step in range(12):
        assert_equal(whole[step], {k: v for rank in ranks for k, v in rank[step].items()})


def test_where_all_stand_ins_are_bad_too_a_black_sample_of_weight_zero_is_given(own_folder):
    damage(own_folder, range(PER_SHARD, PER_SHARD * SHARDS))
    with make(own_folder, max_bad_rate=1.0, lanes=1, shards_per_block=1, global_batch_size=102) as batches:
        step = next(batches)
        assert sum(fault["attempt"] == loader.SUBSTITUTE_ATTEMPTS for fault in batches.ledger) == 85
    weights = np.concatenate([batch.weights for batch in step.micro_batches])
    for batch in step.micro_batches:
        unread = batch.weights == 0
        assert not batch.pixel_values[unread].any() and not batch.conditioning[unread].any()
        assert np.abs(batch.noise[unread]).sum(axis=(1, 2, 3)).all()
    assert (weights == 0).sum() == 85 and (weights == 1).sum() == 17


def test_where_no_sample_at_all_can_be_read_the_run_stops_and_names_the_first(own_folder):
    damage(own_folder, range(PER_SHARD * SHARDS))
    where = own_folder / "ledger.jsonl"
    with make(own_folder, max_bad_rate=1.0, ledger_path=where) as batches, pytest.raises(ValueError) as stopped:
        next(batches)
    first = json.loads(where.read_text().splitlines()[0])
    assert f"no sample can be read: none of the {G} first" in str(stopped.value)
    assert f"The first is {first['key']!r} in {first['shard']}: part 'png'" in str(stopped.value)


def test_images_that_cannot_be_decoded_and_frames_that_differ_are_bad_too(tmp_path, scene_parts):
    samples = list(scene_parts)
    samples[3] = {**samples[3], "png": samples[3]["png"][:60] + b"junk"}
    samples[4] = {**samples[4], "cond.edges.png": encode_png(np.zeros((24, 60), np.uint8))}
    samples[6] = {**samples[6], "txt": b"\xff"}
    with make(write_shards(tmp_path, samples), lanes=1, global_batch_size=1, micro_batch_size=1) as batches:
        for _ in range(102):
            next(batches)
    assert {(fault["key"], fault["part"]) for fault in batches.ledger} == {
        ("k0003", "png"),
        ("k0004", "cond.edges.png"),
        ("k0006", "txt"),
    }


def test_too_many_bad_samples_stop_the_run_with_the_last_one_named(own_folder):
    damage(own_folder, range(0, 102, 2))
    with pytest.raises(ValueError, match=r"3 of \d+ samples were bad, more than max_bad_rate=0.002 allows.*'k00.*CRC"):
        take(own_folder, 12, max_bad_rate=0.002, global_batch_size=1, lanes=1, micro_batch_size=1)


PARTS = ((1.0, range(0, 40)), (1.5, range(40, 80)), (0.6, range(80, 102)))
"""Width over height of the pictures, and which scenes are drawn so."""


@pytest.fixture(scope="module")
def shapely(tmp_path_factory):
    """Two sources of pictures of three shapes: 0 has four shards of mixed shapes, 1 two of wide and tall ones."""
    folder = tmp_path_factory.mktemp("shapes")
    pictures = []
    for ratio, numbers in PARTS:
        for i in numbers:
            drawn = render.render(render.scene(5, i), 48)
            size = (48, 48) if ratio == 1 else (48, 32) if ratio > 1 else (30, 50)
            parts = {
                "png": encode_png(cv2.resize(drawn.image, size)),
                "cond.edges.png": encode_png(cv2.resize(drawn.edges, size)),
                "txt": f"ratio {ratio}".encode(),
            }
            pictures.append((f"k{i:04d}", parts))
    mixed = [pictures[i] for i in np.random.default_rng(0).permutation(len(pictures))]
    for name, samples, shards in (("a", mixed, 4), ("b", pictures[40:], 2)):
        (folder / name).mkdir()
        for shard in range(shards):
            with webdataset.TarWriter(str(folder / name / f"{shard}.tar"), encoder=False, mtime=0) as writer:
                for key, parts in samples[shard::shards]:
                    writer.write({"__key__": name + key, **parts})
            ensure_index(folder / name / f"{shard}.tar")
    return folder


def mix(folder, **changes):
    dataset = join_datasets([open_dataset(folder / "a"), open_dataset(folder / "b")])
    arguments = dict(
        seed=1, lanes=4, shards_per_block=2, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1,
        condition="edges", resolution=32, prompt_dropout=0.0, random_flip=False, random_crop=True,
        num_train_timesteps=1000, latent_shape=(4, 4, 4), threads=3, prefetch_steps=1,
        history=[(0, [1, 1])], max_aspect_ratio=2.0, aspect_step=8,
    )  # fmt: skip
    return make_loader(dataset, **(arguments | changes))


def test_every_step_has_one_shape_the_nearest_to_its_pictures_with_latents_to_match(shapely):
    shapes = {}
    with mix(shapely) as batches:
        for _ in range(60):
            step = next(batches)
            for batch in step.micro_batches:
                assert batch.conditioning is not None and batch.conditioning.shape == batch.pixel_values.shape
                height, width = batch.pixel_values.shape[2:]
                assert batch.noise.shape == (2, 4, height // 8, width // 8)
                for caption in batch.captions:
                    shapes.setdefault(caption, set()).add((step.step, height, width))
    steps = {}
    for caption, seen in shapes.items():
        assert len({(height, width) for _, height, width in seen}) == 1, caption
        for number, height, width in seen:
            assert steps.setdefault(number, (height, width)) == (height, width)
    assert {caption: next(iter(seen))[1:] for caption, seen in shapes.items()} == {
        "ratio 1.0": (32, 32), "ratio 1.5": (24, 40), "ratio 0.6": (40, 24)
    }  # fmt: skip


def test_a_mixture_gives_each_world_size_the_same_batches_and_each_source_its_weight(shapely):
    with mix(shapely) as whole, mix(shapely, rank=0, world_size=2) as one, mix(shapely, rank=1, world_size=2) as two:
        keys = []
        for _ in range(60):
            expected = [key for batch in next(whole).micro_batches for key in batch.keys]
            assert [key for part in (one, two) for batch in next(part).micro_batches for key in batch.keys] == expected
            keys += expected
    share = np.mean([key.startswith("a") for key in keys])
    assert 0.4 < share < 0.6
    with mix(shapely, start_step=17) as resumed:
        assert [key for batch in next(resumed).micro_batches for key in batch.keys] == keys[17 * 4 : 18 * 4]


def test_a_source_is_read_once_an_epoch_in_all_its_shapes_together(shapely):
    with mix(shapely, history=[(0, [1, 0])]) as batches:
        keys = [key for _ in range(100) for batch in next(batches).micro_batches for key in batch.keys]
    first = keys[: len(keys) // 4]
    assert all(key.startswith("a") for key in keys) and len(set(keys)) == 102
    assert len(set(first)) >= len(first) - 12  # shapes end their epochs at different steps


def test_info_shows_the_shapes_that_a_run_would_train_on(shapely, capsys):
    plan = ["--max-aspect-ratio", "2", "--resolution", "32", "--aspect-step", "8", "--lanes", "4"]
    assert info_main([str(shapely / "a"), *plan]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [(row[0], row[2], row[4]) for row in rows] == [("24", "40", "22"), ("32", "32", "40"), ("40", "24", "40")]
    for name, value, said in [
        ("--max-aspect-ratio", "0.5", "0.5 is less than 1"),
        ("--max-aspect-ratio", "nan", "nan is not finite"),
        ("--aspect-step", "0", "0 is less than 1"),
    ]:
        with pytest.raises(SystemExit):
            info_main([str(shapely / "a"), *plan, name, value])
        assert f"argument {name}: {said}" in capsys.readouterr().err


def test_aspect_ratios_that_an_old_manifest_lacks_are_asked_for(shapely):
    dataset = open_dataset(shapely / "a")
    old = replace(dataset, rows=tuple(replace(row, aspects={}) for row in dataset.rows))
    with pytest.raises(ValueError, match="does not count samples by aspect ratio.*controlbooth data index"):
        plan_order(old, OrderSettings(0, 4, 4, 2, "edges", resolution=32, max_aspect_ratio=2.0, aspect_step=8))


def test_a_failing_disk_is_raised_and_never_replaced(folder, monkeypatch):
    def fail(self, shard, ordinal, bucket):
        raise OSError(5, "Input/output error")

    with make(folder, prefetch_steps=0) as batches:
        next(batches)
        monkeypatch.setattr(ShardReader, "read", fail)
        with pytest.raises(OSError, match="Input/output error") as raised:
            next(batches)
            next(batches)
        assert batches.ledger == [] and "for position" in raised.value.__notes__[0]
        with pytest.raises(RuntimeError, match="closed"):
            next(batches)


def test_closing_ends_the_threads_and_closes_the_files(folder):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    batches = make(folder, prefetch_steps=8)
    next(batches)
    assert threading.active_count() > threads
    batches.close()
    batches.close()
    assert threading.active_count() == threads and len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 3}, "is 8 samples, which is not a multiple of micro_batch_size=3"),
        ({"world_size": 3}, "do not divide among world_size=3"),
        ({"lanes": 3}, "lanes=3 and global_batch_size=8"),
        ({"condition": "depth"}, "condition 'depth'; conditions there are: edges"),
        ({"positions": [1, 2, 3]}, "3 positions do not fill whole batches"),
        ({"threads": 0}, "threads=0"),
        ({"lanes": 128, "global_batch_size": 128}, "102 usable samples for lanes=128"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_a_thread_starts(folder, changes, message):
    threads = threading.active_count()
    with pytest.raises(ValueError, match=message):
        make(folder, **changes)
    assert threading.active_count() == threads


def test_held_out_samples_are_unaugmented(folder, scene_parts):
    samples = list(held_out(open_dataset(folder), 20, condition="edges", resolution=SIZE))
    assert len({sample.key for sample in samples}) == 20
    for sample in samples:
        parts = scene_parts[int(sample.key[1:])]
        target = cv2.imdecode(np.frombuffer(parts["png"], np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.array_equal(sample.pixel_values, target.transpose(2, 0, 1))
        captions = [parts["txt"].decode()] if "txt" in parts else json.loads(parts["json"])["captions"]
        assert sample.caption == captions[0]
    with pytest.raises(ValueError, match="102 usable samples, 103 are asked for"):
        next(held_out(open_dataset(folder), 103, condition=None, resolution=SIZE))
