"""All conditions of a kind in a data set are resized by one rule, which its name or some of its pictures decide."""

import cv2
import numpy as np
import pytest
from loaders import make_loader

from controlbooth.data.conditions.values import ConditionValues, common_values
from controlbooth.data.loading.held_out import held_out
from controlbooth.data.packing.pack import pack
from controlbooth.data.packing.sources import open_folder
from controlbooth.data.shards.manifest import open_dataset

SIDE = 96


def label_map(rng, classes):
    picture = np.zeros((SIDE, SIDE), np.uint8)
    for value in classes:
        left, top = rng.integers(0, SIDE - 40, 2)
        picture[top : top + 40, left : left + 40] = value
    return picture


def outline(rng):
    return cv2.circle(np.zeros((SIDE, SIDE), np.uint8), rng.integers(30, 60, 2).tolist(), 20, 255, 1)


KINDS = {
    "regions": lambda rng, number: label_map(rng, (40, 90) if number % 4 else (40,)),  # some show two values only
    "semantic": lambda rng, number: label_map(rng, (1, 2, 3)),
    "foo": lambda rng, number: outline(rng),
    "matte": lambda rng, number: cv2.GaussianBlur(outline(rng), (0, 0), 2) if number == 5 else outline(rng),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(24):
        places = {"images": rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)}
        places |= {f"conditions/{kind}": draw(rng, number) for kind, draw in KINDS.items()}
        for place, pixels in places.items():
            (root / place).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / place / f"{number:02d}.png"), pixels)
    pack(open_folder(root, [], "a picture"), root / "shards", 10)
    return open_dataset(root / "shards")


def conditions(dataset, kind, side=40):
    return [one.conditioning[0] for one in held_out(dataset, 24, condition=kind, resolution=side)]


@pytest.mark.parametrize(
    ("kind", "values"), [("regions", "labels"), ("semantic", "labels"), ("foo", "binary"), ("matte", "levels")]
)
def test_one_rule_holds_for_all_pictures_of_a_kind(dataset, kind, values):
    assert ConditionValues(dataset, kind).get() == values
    levels = {int(value) for one in conditions(dataset, kind) for value in np.unique(one)}
    if values != "levels":
        assert levels <= {"regions": {0, 40, 90}, "semantic": {0, 1, 2, 3}, "foo": {0, 255}}[kind]
    else:  # also those of the outlines that are sharp
        assert all(len(np.unique(one)) > 2 for one in conditions(dataset, kind))


def test_a_computed_condition_is_looked_at_in_no_shard(dataset):
    assert ConditionValues(dataset, "computed:canny").get() == ConditionValues(dataset, None).get() == "levels"


def test_one_picture_of_levels_speaks_against_lines_and_labels():
    assert common_values(["binary", "binary"]) == "binary"
    assert common_values(["binary", "labels"]) == "labels"
    assert common_values(["labels", "levels", "binary"]) == common_values([]) == "levels"


def test_training_reads_lines_as_validation_does(dataset):
    settings = dict(seed=0, lanes=8, shards_per_block=2, rank=0, world_size=1, condition="foo", resolution=40)
    settings |= dict(prompt_dropout=0.0, random_flip=False, random_crop=False, num_train_timesteps=1000)
    by_key = {one.key: one.conditioning for one in held_out(dataset, 24, condition="foo", resolution=40)}
    with make_loader(dataset, global_batch_size=8, micro_batch_size=8, latent_shape=(4, 5, 5), **settings) as loader:
        for batch in (next(loader).micro_batches[0] for _ in range(3)):
            for key, condition in zip(batch.keys, batch.conditioning, strict=True):
                assert np.array_equal(condition, by_key[key])
                assert cv2.connectedComponents(condition[0], connectivity=8)[0] == 2  # the whole circle
