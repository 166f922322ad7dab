"""Real damaged bytes through all of reading: what is delivered is right, and what is not delivered is named."""

from dataclasses import dataclass

import pytest
from damage import HURT, SAMPLES, Damage, damages, key
from loaders import make_loader

from controlbooth.data.shards.index import ensure_index, index_shard
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.sidecar import index_path

DAMAGES = {damage.what: damage for damage in damages()}
ALL = [key(number) for number in range(SAMPLES)]
OTHERS = [name for name in ALL if name != key(HURT)]


@dataclass
class Delivered:
    keys: list[str]
    ledger: list[dict]


def read_all(folder) -> Delivered:
    """An epoch, one sample a step."""
    dataset = open_dataset(folder)
    with make_loader(
        dataset, seed=0, lanes=1, shards_per_block=1, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1,
        condition="edges", resolution=32, prompt_dropout=0.0, random_flip=False, random_crop=False,
        num_train_timesteps=1000, latent_shape=(4, 4, 4), threads=1, max_bad_rate=1.0,
    ) as loader:  # fmt: skip
        steps = [next(loader) for _ in range(int(dataset.samples_per_shard("edges").sum()))]
        return Delivered([name for step in steps for batch in step.micro_batches for name in batch.keys], loader.ledger)


def put(folder, damage: Damage):
    path = folder / "x.tar"
    if damage.indexed is not None:
        path.write_bytes(damage.indexed)
        assert ensure_index(path) == []
    path.write_bytes(damage.shard)
    return path


@pytest.mark.parametrize(
    ("what", "kinds", "message"),
    [
        ("cut in a header", ["truncated"], "the file ends inside a header, 412 bytes short"),
        ("cut in a payload", ["truncated"], "the file ends inside a member"),
        ("cut between members", ["end", "missing"], "the file ends without the two zero blocks"),
        ("corrupt header in mid-shard", ["header"], "the checksum of this header is wrong"),
        ("missing end blocks", ["end"], "the file ends without the two zero blocks"),
        ("trailing bytes (two tars joined)", ["trailing"], "bytes follow the end of the tar"),
    ],
)
def test_a_shard_whose_structure_is_damaged_is_refused_whole_with_the_byte(tmp_path, what, kinds, message):
    path = put(tmp_path, DAMAGES[what])
    problems = index_shard(path)[1]
    assert [problem.kind for problem in problems] == kinds and message in problems[0].message
    assert 0 < problems[0].byte <= path.stat().st_size and problems[0].key
    with pytest.raises(ValueError, match=f"1 damaged shards.*x.tar: byte {problems[0].byte}"):
        open_dataset(tmp_path, index_missing=True)
    assert not index_path(path).exists()


@pytest.mark.parametrize(
    ("what", "kinds", "keys"),
    [
        ("duplicate key", ["duplicate"], ALL),
        ("members not adjacent", ["adjacent", "missing"], OTHERS),
        ("missing part", ["missing"], OTHERS),
        ("picture is an error page", ["image"], OTHERS),
    ],
)
def test_a_faulty_sample_is_named_and_left_out_and_all_others_come_once(tmp_path, what, kinds, keys):
    path = put(tmp_path, DAMAGES[what])
    problems = ensure_index(path)
    assert sorted(problem.kind for problem in problems) == kinds
    assert {problem.key for problem in problems} == {key(HURT)}
    delivered = read_all(tmp_path)
    assert sorted(delivered.keys) == keys and delivered.ledger == []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("picture cut short", "the image cannot be decoded"),
        ("byte flipped after indexing", "its bytes have changed since they were indexed (CRC)"),
    ],
)
def test_a_fault_that_only_reading_shows_is_replaced_and_noted(tmp_path, what, message):
    path = put(tmp_path, DAMAGES[what])
    assert ensure_index(path) == []
    delivered = read_all(tmp_path)
    assert len(delivered.keys) == SAMPLES and set(delivered.keys) == set(OTHERS)
    assert [(entry["key"], entry["part"]) for entry in delivered.ledger] == [(key(HURT), "png")]
    assert message in delivered.ledger[0]["error"] and delivered.ledger[0]["substitute"] in OTHERS


def test_a_shard_that_was_replaced_after_indexing_is_refused(tmp_path):
    put(tmp_path, DAMAGES["replaced after indexing"])
    with pytest.raises(ValueError, match=r"1 of 1 shards are not as they were indexed: .*x.tar has \d+ bytes"):
        open_dataset(tmp_path)


def test_every_damage_is_tested_above():
    tested = {
        mark.args[1][at][0]
        for test in (
            test_a_shard_whose_structure_is_damaged_is_refused_whole_with_the_byte,
            test_a_faulty_sample_is_named_and_left_out_and_all_others_come_once,
            test_a_fault_that_only_reading_shows_is_replaced_and_noted,
        )
        for mark in test.pytestmark
        for at in range(len(mark.args[1]))
    }
    assert tested | {"replaced after indexing"} == set(DAMAGES)
