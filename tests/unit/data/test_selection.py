"""Which samples stand for a data set: of all folders and captions, by what they hold, and always the same ones."""

import shutil
from collections import Counter

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.data.loading.held_out import held_out
from controlbooth.data.packing.pack import pack
from controlbooth.data.packing.sources import open_folder
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.reader import ShardReader
from controlbooth.data.shards.selection import choose, in_turns
from controlbooth.launch.commands.data_index import main as index_main

CLASSES, EACH = 20, 9


def write_pictures(root, name):
    """name: (class, number) -> file name without its suffix."""
    for kind in range(CLASSES):
        for number in range(EACH):
            path = root / f"{name(kind, number)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.random.default_rng([kind, number]).integers(0, 256, (8, 8, 3), np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    write_pictures(root, lambda kind, number: f"class{kind:02d}/{number}")
    pack(open_folder(root, [], "a picture of {folder}"), root / "shards", 50)
    return root


def names(dataset, places, kind=None):
    reader = ShardReader(dataset, kind)
    try:
        return [reader.read(*place).key for place in places]
    finally:
        reader.close()


def chosen(where, count):
    dataset = open_dataset(where)
    return names(dataset, choose(dataset, count, None))


def test_24_samples_of_20_folders_are_of_all_20(pictures):
    counts = Counter(key.split("/")[0] for key in chosen(pictures / "shards", 24))
    assert len(counts) == 20 and max(counts.values()) == 2


def test_without_folders_captions_take_turns(tmp_path):
    write_pictures(tmp_path, lambda kind, number: f"{kind:02d}_{number}")
    for path in tmp_path.glob("*.png"):
        path.with_suffix(".txt").write_text(f"a thing of kind {path.stem[:2]}")
    pack(open_folder(tmp_path, [], None), tmp_path / "shards", 1000)
    counts = Counter(key.split("_")[0] for key in chosen(tmp_path / "shards", 2 * CLASSES))
    assert set(counts.values()) == {2} and len(counts) == CLASSES


def test_fewer_samples_are_among_more_and_in_the_same_order(pictures):
    all_of_them = chosen(pictures / "shards", CLASSES * EACH)
    assert len(set(all_of_them)) == CLASSES * EACH
    for count in (1, 8, 64):
        assert chosen(pictures / "shards", count) == all_of_them[:count]


def test_the_choice_survives_moving_renaming_indexing_and_other_shards(pictures, tmp_path):
    before = chosen(pictures / "shards", 64)
    moved = tmp_path / "elsewhere"
    shutil.copytree(pictures / "shards", moved)
    for number, path in enumerate(sorted(moved.glob("*.tar"))):
        path.rename(moved / f"{9 - number}.tar")  # in the other order
    for path in (*moved.glob("*.idx"), *moved.glob("*.jsonl")):
        path.unlink()
    assert index_main([str(moved)]) == 0
    assert chosen(moved, 64) == before
    pack(open_folder(pictures, [], "a picture of {folder}"), tmp_path / "again", 17)
    assert chosen(tmp_path / "again", 64) == before


def test_pictures_decide_and_not_their_names(tmp_path):
    """The keys of two packs of equal pictures have nothing in common."""
    for part, name in (("one", "{:02d}{}"), ("other", "x{1}{0:02d}")):
        write_pictures(tmp_path / part, lambda kind, number, name=name: name.format(kind, number))
        pack(open_folder(tmp_path / part, [], "a picture"), tmp_path / part / "shards", 40)
    picked = [
        [one.pixel_values.tobytes() for one in held_out(open_dataset(where), 30, condition=None, resolution=8)]
        for where in (tmp_path / "one/shards", tmp_path / "other/shards")
    ]
    assert picked[0] == picked[1] and len(set(picked[0])) == 30


@given(st.lists(st.integers(0, 5), max_size=40))
def test_in_turns_no_group_is_ahead_of_one_that_has_more_to_give(groups):
    items = list(enumerate(groups))
    found = in_turns(items, lambda item: item[1])
    assert sorted(found) == items
    for end in range(len(found) + 1):
        taken = Counter(group for _, group in found[:end])
        for group, total in Counter(groups).items():
            assert all(taken[group] == total or taken[group] >= other - 1 for other in taken.values())
