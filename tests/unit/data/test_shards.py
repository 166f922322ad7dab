import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import webdataset

from controlbooth.data.order.draws import hash64
from controlbooth.data.pictures.images import BadSample
from controlbooth.data.shards import reader as shards
from controlbooth.data.shards.index import ensure_index
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.reader import ShardReader
from controlbooth.data.shards.sidecar import index_path, load_index

PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452") + (5).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
LONG = "folder/" * 30


def parts(key):
    conditions = {"cond.edges.png": PNG + b"edges", "cond.zoo.png": b"z" * 700}
    return {"png": PNG + key.encode(), **conditions, "txt": key.encode()}


@pytest.fixture
def folder(tmp_path):
    """Six shards of five samples; every other shard has long keys, and one sample of each has no caption."""
    for i in range(6):
        with webdataset.TarWriter(str(tmp_path / f"{i}.tar"), encoder=False) as writer:
            for j in range(5):
                key = f"{LONG if i % 2 else ''}k{i}-{j}"
                sample = parts(key)
                if j == 2:
                    del sample["txt"]
                writer.write({"__key__": key, **sample})
        ensure_index(tmp_path / f"{i}.tar")
    return tmp_path


def damage(folder, shard, row, extension):
    """Flips one byte of a part."""
    path = folder / f"{shard}.tar"
    index = load_index(index_path(path))
    part = index.parts[row][index.extensions.index(extension)]
    data = bytearray(path.read_bytes())
    data[int(index.samples[row]["offset"]) + int(part["offset"]) + 3] ^= 1
    path.write_bytes(data)


def test_a_read_gives_the_parts_of_the_usable_sample(folder):
    reader = ShardReader(open_dataset(folder), "edges")
    for shard in range(6):
        for ordinal, number in enumerate([0, 1, 3, 4]):
            sample = reader.read(shard, ordinal)
            key = f"{LONG if shard % 2 else ''}k{shard}-{number}"
            assert (sample.key, sample.key_hash) == (key, hash64(key))
            assert sample.image == parts(key)["png"] and sample.caption == key.encode()
            assert (sample.condition, sample.condition_extension) == (PNG + b"edges", "cond.edges.png")
    reader.close()


def test_a_sample_is_named_by_the_byte_at_which_it_begins_and_by_what_is_in_it(folder):
    reader = ShardReader(open_dataset(folder), None)
    index = load_index(index_path(folder / "1.tar"))
    named = [(int(index.samples["offset"][row]), index.contents(row)) for row in (0, 1, 3, 4)]
    assert [reader.noted(1, ordinal) for ordinal in range(4)] == named
    assert len({contents for _, contents in named}) == 4
    reader.close()


def test_without_a_condition_kind_none_is_read(folder):
    reader = ShardReader(open_dataset(folder), None)
    assert reader.read(0, 0).condition is None


def test_a_changed_byte_is_a_bad_sample_with_key_and_part(folder):
    damage(folder, 2, 1, "txt")
    reader = ShardReader(open_dataset(folder), "edges")
    with pytest.raises(BadSample, match=r"sample 'k2-1', part 'txt'.*CRC"):
        reader.read(2, 1)
    assert reader.read(2, 0).key == "k2-0" and reader.read(2, 2).key == "k2-3"


def test_a_part_that_is_not_used_may_be_damaged(folder):
    damage(folder, 2, 1, "cond.zoo.png")
    assert ShardReader(open_dataset(folder), "edges").read(2, 1).key == "k2-1"


def test_a_header_that_is_not_the_indexed_one_is_a_bad_sample(folder):
    path = folder / "0.tar"
    path.write_bytes(path.read_bytes().replace(b"k0-1", b"q0-1"))
    with pytest.raises(BadSample, match="not the one that was indexed"):
        ShardReader(open_dataset(folder), "edges").read(0, 1)


def test_open_files_stay_below_the_limit_with_many_threads(folder):
    reader = ShardReader(open_dataset(folder), "edges", most_open=2)

    def opened() -> int:
        """Files of the folder; others of this process come and go as other tests' remains are collected."""
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.lexists(link))

    with ThreadPoolExecutor(8) as pool:
        places = [(i % 6, i % 4) for i in range(300)]
        keys = list(pool.map(lambda place: reader.read(*place).key, places))
    assert [key.split("/")[-1] for key in keys] == [f"k{shard}-{[0, 1, 3, 4][at]}" for shard, at in places]
    assert 0 < opened() <= 2
    reader.close()
    assert opened() == 0


def test_short_reads_are_continued(folder, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(shards.os, "pread", lambda descriptor, count, at: pread(descriptor, min(count, 100), at))
    assert ShardReader(open_dataset(folder), "edges").read(0, 0).caption == b"k0-0"


def test_a_shard_that_shrinks_while_it_is_open_stops_the_run_and_is_no_bad_sample(folder):
    reader = ShardReader(open_dataset(folder), "edges")
    reader.read(0, 0)
    os.truncate(folder / "0.tar", 700)
    with pytest.raises(ValueError, match="0.tar ends at byte 700") as raised:
        reader.read(0, 3)
    assert not isinstance(raised.value, BadSample)


def test_a_shard_that_was_replaced_after_opening_the_data_set_is_refused(folder):
    dataset = open_dataset(folder)
    with webdataset.TarWriter(str(folder / "0.tar"), encoder=False) as writer:
        writer.write({"__key__": "new", **parts("new")})
    with pytest.raises(ValueError, match=r"0.tar has \d+ bytes, its index says"):
        ShardReader(dataset, "edges").read(0, 0)
    ensure_index(folder / "0.tar")
    with pytest.raises(ValueError, match="0.tar.idx was replaced while the data set is in use"):
        ShardReader(dataset, "edges").read(0, 0)


def test_a_shard_that_is_gone_is_an_oserror(folder):
    dataset = open_dataset(folder)
    (folder / "3.tar").unlink()
    with pytest.raises(FileNotFoundError, match="3.tar"):
        ShardReader(dataset, "edges").read(3, 0)
