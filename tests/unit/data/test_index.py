import io
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.files.whole import write_whole
from controlbooth.data.order.draws import hash64
from controlbooth.data.shards import sidecar
from controlbooth.data.shards.index import ensure_index, ensure_indexes, index_shard, split_name
from controlbooth.data.shards.sidecar import index_path, load_index, write_index
from controlbooth.data.shards.tar import TarDamage, first_name, members


def png(width=6, height=4, value=0):
    return cv2.imencode(".png", np.full((height, width, 3), value, np.uint8))[1].tobytes()


def sample(number, **extra):
    return {"png": png(value=number), "cond.edges.png": png(value=255), "txt": f"caption {number}".encode(), **extra}


def write_tar(path, files, tar_format=tarfile.USTAR_FORMAT):
    """files: (name, bytes) in order."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def flat(samples):
    return [(f"{key}.{extension}", data) for key, parts in samples.items() for extension, data in parts.items()]


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "x.tar", flat({f"key{i}": sample(i) for i in range(10)}))


def parts_of(path, index, row):
    data = path.read_bytes()
    offset = int(index.samples[row]["offset"])
    return {
        extension: data[offset + part["offset"] : offset + part["offset"] + part["size"]]
        for extension, part in zip(index.extensions, index.parts[row], strict=True)
        if part["offset"]
    }


def kinds(problems):
    return [problem.kind for problem in problems]


def test_every_part_lies_where_the_index_says(shard):
    index, problems = index_shard(shard)
    assert problems == [] and len(index.samples) == 10
    assert index.extensions == ("cond.edges.png", "png", "txt")
    for row in range(10):
        assert parts_of(shard, index, row) == sample(row)
        assert index.samples[row]["key_hash"] == hash64(f"key{row}")
        assert (index.samples[row]["width"], index.samples[row]["height"]) == (6, 4)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "a/b.c/", "long" * 20 + "/" + "folder" * 12 + "/"])
def test_all_tar_formats_and_long_names_are_read(tmp_path, tar_format, folder):
    keys = [f"{folder}key{i}" for i in range(3)]
    path = write_tar(tmp_path / "x.tar", flat({key: sample(i) for i, key in enumerate(keys)}), tar_format)
    index, problems = index_shard(path)
    assert problems == []
    assert index.samples["key_hash"].tolist() == [hash64(key) for key in keys]
    assert parts_of(path, index, 2) == sample(2)
    for row, key in enumerate(keys):
        header = path.read_bytes()[index.samples[row]["offset"] :][:4096]
        assert split_name(first_name(header))[0] == key


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_not_ascii_are_read(tmp_path, tar_format):
    path = write_tar(tmp_path / "x.tar", flat({"größe-数": sample(0)}), tar_format)
    assert index_shard(path)[0].samples["key_hash"].tolist() == [hash64("größe-数")]


def test_shards_of_webdataset_are_read(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"dir/k{i}", "jpg": np.full((8, 8, 3), i, np.uint8), "json": {"caption": f"c{i}"}})
    indexes = [index_shard(path) for path in sorted(tmp_path.glob("*.tar"))]
    assert [len(index.samples) for index, _ in indexes] == [4, 4, 2]
    assert all(problems == [] for _, problems in indexes)
    assert indexes[1][0].samples["key_hash"][0] == hash64("dir/k4")
    assert len(indexes[0][0].usable()) == 4 and len(indexes[0][0].usable("edges")) == 0


def test_what_webdataset_does_not_see_is_no_sample(tmp_path):
    noise = [("README", b"x"), (".hidden.png", png()), ("__meta__/a.json", b"{}")]
    path = write_tar(tmp_path / "x.tar", noise + flat({"a": sample(0)}))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("folder.d")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    index, problems = index_shard(path)
    seen = [one["__key__"] for one in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)]
    assert seen == ["a"] and len(index.samples) == 1 and problems == []


@given(st.text(st.sampled_from("ab./_"), max_size=8))
@settings(max_examples=200, deadline=None)
def test_keys_are_those_of_webdataset(name):
    key, extension = webdataset.tariterators.base_plus_ext(name)
    if not name.startswith("__"):
        hidden = key is None or key.endswith("/")  # webdataset makes samples named "dir/" of dir/.hidden files
        assert split_name(name) == (None if hidden else (key, extension))


def test_hidden_files_that_a_mac_put_into_a_folder_are_no_samples(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("dir/._a.png", b"junk"), *flat({"dir/a": sample(0)})])
    index, problems = index_shard(path)
    assert len(index.samples) == 1 and problems == []


def test_the_index_is_the_same_from_disk(shard):
    index, _ = index_shard(shard)
    write_index(index, index_path(shard))
    loaded = load_index(index_path(shard))
    assert (loaded.digest, loaded.extensions, loaded.shard_bytes) == (index.digest, index.extensions, index.shard_bytes)
    assert np.array_equal(loaded.samples, index.samples) and np.array_equal(loaded.parts, index.parts)
    assert len(index_path(shard).read_bytes()) < 10 * 75 + 150


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_index_is_refused_with_the_command_that_helps(shard, damage):
    ensure_index(shard)
    path = index_path(shard)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[100] ^= 1
    written = {"cut": data[:-7], "flipped": data, "empty": b"", "foreign": b"not an index of this kind at all" * 9}
    path.write_bytes(written[damage])
    with pytest.raises(ValueError, match=r"not a whole index.*controlbooth data index .*x\.tar"):
        load_index(path)
    assert ensure_index(shard) == [] and len(load_index(path).samples) == 10


def test_an_index_of_another_version_is_refused(shard, monkeypatch):
    monkeypatch.setattr(sidecar, "VERSION", 99)
    ensure_index(shard)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 99, this is version 1"):
        load_index(index_path(shard))


def test_a_damaged_header_is_reported_with_its_byte_and_not_skipped(shard):
    data = bytearray(shard.read_bytes())
    header = int(index_shard(shard)[0].samples[5]["offset"])
    data[header + 10] ^= 0xFF
    shard.write_bytes(data)
    index, problems = index_shard(shard)
    assert [(problem.kind, problem.byte, problem.key) for problem in problems] == [("header", header, "key4")]
    assert "checksum" in problems[0].message and str(shard) in str(problems[0])
    silently_short = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len(silently_short) == len(index.samples) == 5


def test_a_shard_cut_in_a_payload_is_reported(shard):
    part = index_shard(shard)[0].samples[5]
    cut = int(part["offset"]) + 520
    os.truncate(shard, cut)
    index, problems = index_shard(shard)
    assert [(problem.kind, problem.byte, problem.key) for problem in problems] == [("truncated", cut, "key4")]
    assert "bytes of 'key5.png' are missing" in problems[0].message and len(index.samples) == 5


def test_a_shard_cut_in_a_header_is_reported(shard):
    header = int(index_shard(shard)[0].samples[5]["offset"])
    os.truncate(shard, header + 100)
    problem = index_shard(shard)[1][0]
    assert (problem.kind, problem.byte, problem.key) == ("truncated", header, "key4")
    assert "412 bytes short" in problem.message


def test_a_shard_cut_between_members_is_reported_and_the_torn_sample_too(shard):
    index, _ = index_shard(shard)
    second = int(index.samples[5]["offset"]) + 512 + 512  # key5.png is one block
    os.truncate(shard, second)
    _, problems = index_shard(shard)
    assert kinds(problems) == ["end", "missing"]
    assert problems[0].byte == second and "two zero blocks" in problems[0].message
    assert problems[1].key == "key5" and "no caption" in problems[1].message


def test_one_zero_block_is_no_end(shard):
    index, _ = index_shard(shard)
    last = index.samples[-1]
    end = -(-int(last["offset"] + last["size"]) // 512) * 512
    os.truncate(shard, end + 512)
    assert kinds(index_shard(shard)[1]) == ["end"]


def test_bytes_behind_the_end_are_reported(shard):
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() * 2)
    problem = index_shard(shard)[1][0]
    assert (problem.kind, problem.byte) == ("trailing", size) and "joined with cat" in problem.message


def test_a_compressed_tar_says_so(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        info = tarfile.TarInfo("a.txt")
        tar.addfile(info, io.BytesIO(b""))
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes() + bytes(1024))
    assert "compressed: unpack it" in index_shard(tmp_path / "x.tar")[1][0].message


def test_an_empty_file_is_no_shard(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    assert kinds(index_shard(tmp_path / "x.tar")[1]) == ["end"]


def test_a_duplicate_key_is_reported_and_used_once(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*flat({"a": sample(0)}), *flat({"b": sample(1)}), *flat({"a": sample(2)})])
    index, problems = index_shard(path)
    assert [(problem.kind, problem.key) for problem in problems] == [("duplicate", "a")]
    assert index.usable().tolist() == [0, 1]
    assert parts_of(path, index, 0)["txt"] == b"caption 0"


def test_duplicates_side_by_side_are_reported(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*flat({"a": sample(0)}), *flat({"a": sample(1)})])
    index, problems = index_shard(path)
    assert kinds(problems) == ["duplicate"] and index.usable().tolist() == [0]


def test_members_that_are_not_adjacent_are_reported(tmp_path):
    files = [("a.png", png()), ("b.png", png()), ("b.txt", b"b"), ("a.txt", b"a")]
    index, problems = index_shard(write_tar(tmp_path / "x.tar", files))
    assert [(problem.kind, problem.key) for problem in problems] == [("adjacent", "a"), ("missing", "a")]
    assert index.usable().tolist() == [1]


@pytest.mark.parametrize(
    ("part", "message", "left"),
    [
        ("png", "no target image", [0, 2]),
        ("txt", "no caption", [0, 2]),
        ("cond.edges.png", "no condition edges", [0, 1, 2]),
    ],
)
def test_a_missing_part_is_reported_and_flagged(tmp_path, part, message, left):
    samples = {f"k{i}": sample(i) for i in range(3)}
    del samples["k1"][part]
    index, problems = index_shard(write_tar(tmp_path / "x.tar", flat(samples)))
    assert [(problem.kind, problem.key) for problem in problems] == [("missing", "k1")]
    assert message in problems[0].message
    assert index.usable().tolist() == left and index.usable("edges").tolist() == [0, 2]


def test_a_target_without_an_image_header_is_flagged(tmp_path):
    path = write_tar(tmp_path / "x.tar", flat({"a": sample(0), "b": sample(1, png=b"<html>404</html>")}))
    index, problems = index_shard(path)
    assert kinds(problems) == ["image"] and index.usable().tolist() == [0]


def test_captions_in_json_and_conditions_of_others_are_found(tmp_path):
    parts = {"jpg": png(), "canny.png": png(), "json": b'"x"'}
    index, problems = index_shard(write_tar(tmp_path / "x.tar", flat({"a": parts})))
    assert problems == [] and index.condition_kinds == ("canny",) and len(index.usable("canny")) == 1


def test_a_structurally_damaged_shard_gets_no_index(shard):
    ensure_index(shard)
    os.truncate(shard, 3000)
    assert kinds(ensure_index(shard))[0] == "truncated"
    assert not index_path(shard).exists()


def test_an_index_that_fits_is_kept_and_one_of_another_size_is_not(shard):
    ensure_index(shard)
    before = index_path(shard).stat().st_mtime_ns
    assert ensure_index(shard) == [] and index_path(shard).stat().st_mtime_ns == before
    write_tar(shard, flat({f"key{i}": sample(i) for i in range(40)}))
    assert ensure_index(shard) == [] and len(load_index(index_path(shard)).samples) == 40


def test_writers_of_one_file_with_one_process_id_do_not_rename_each_others_temporary(tmp_path, monkeypatch):
    """As in containers, where the first process of each has the same id."""
    path, replace, waiting = tmp_path / "file", os.replace, ["the other"]

    def replace_after_the_other(source, target):
        while waiting:
            write_whole(path, waiting.pop().encode())
            assert path.read_bytes() == b"the other"
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_after_the_other)
    write_whole(path, b"this one")
    assert path.read_bytes() == b"this one" and os.listdir(tmp_path) == ["file"]


def test_processes_index_as_one_does(tmp_path):
    paths = [write_tar(tmp_path / f"{i}.tar", flat({f"k{i}": sample(i)})) for i in range(2)]
    os.truncate(paths[1], 2000)
    problems = ensure_indexes(paths, workers=2)
    assert [Path(problem.shard).name for problem in problems if problem.kind == "truncated"] == ["1.tar"]
    assert index_path(paths[0]).exists() and not index_path(paths[1]).exists()


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_no_flipped_byte_is_taken_for_another_member(position, bits):
    """Any damage of a header is found: its checksum covers all 512 bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in flat({f"key{i}": sample(i) for i in range(3)}):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = bytearray(buffer.getvalue())
    whole = list(members(io.BytesIO(data), len(data)))
    data[position % len(data)] ^= bits
    seen = []
    try:
        seen.extend(members(io.BytesIO(data), len(data)))
    except TarDamage as damage:
        assert seen == whole[: len(seen)] and 0 <= damage.byte <= len(data)
    else:
        assert seen == whole


def test_names_with_dots_are_told_once_with_what_to_rename_and_the_index_grows_with_the_samples(tmp_path):
    sizes = []
    for count in (100, 200, 400):
        path = tmp_path / f"{count}.tar"
        with webdataset.TarWriter(str(path), encoder=False) as writer:
            for number in range(count):
                writer.write({"__key__": f"a/{number:06d}", f"{number}.7.jpg": b"x", f"{number}.7.txt": b"y"})
        (problem,) = ensure_index(path)
        assert problem.kind == "names" and len(str(problem)) < 500
        assert f"{count} samples have parts of {2 * count} different names, as a/000000.0.7.jpg" in problem.message
        assert "Rename the files so that the only dot is that of the ending, as a/000000_0_7.jpg" in problem.message
        sizes.append(index_path(path).stat().st_size)
    assert sizes[2] < 4.1 * sizes[0]


def test_a_shard_of_few_samples_with_many_parts_keeps_them_all(tmp_path):
    parts = {f"part{number}": b"x" for number in range(100)}
    with webdataset.TarWriter(str(tmp_path / "x.tar"), encoder=False) as writer:
        for key in ("a", "b"):
            writer.write({"__key__": key, "png": png(), "txt": b"y", **parts})
    assert ensure_index(tmp_path / "x.tar") == []
    assert len(load_index(index_path(tmp_path / "x.tar")).extensions) == 102


@pytest.mark.parametrize("size", ["²", "٣", "-1", "+3", " 3", "1_0", "3.0", "0x3", "nan", "9" * 5000])
def test_a_size_in_pax_records_that_is_no_number_is_told_with_its_byte(tmp_path, size):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size, info.pax_headers = 3, {"size": size}
        tar.addfile(info, io.BytesIO(b"abc"))
    _, (problem,) = index_shard(tmp_path / "x.tar")
    assert problem.kind == "header" and problem.byte == 0
    assert problem.message.startswith(f"the PAX header at this byte states the size {size[:40]!r}"[:60])


@pytest.mark.parametrize("field", [b"-7\0", b"0o17\0", b"1_0\0", b"9\0", b"\xff" * 12, b"+7\0"])
def test_a_size_field_that_is_no_number_is_told(field):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as writer:
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        writer.addfile(info, io.BytesIO(b"abc"))
    data = bytearray(tar.getvalue())
    data[124:136] = field.ljust(12, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    with pytest.raises(TarDamage, match="is not a number"):
        list(members(io.BytesIO(bytes(data)), len(data)))


def test_one_dot_too_many_is_told_with_the_name_that_would_do(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "x.tar"), encoder=False) as writer:
        writer.write({"__key__": "photo_v1", "0.jpg": b"x", "0.txt": b"y"})
    (problem,) = ensure_index(tmp_path / "x.tar")
    assert problem.message.endswith("rename photo_v1.0.txt to photo_v1_0.txt, and others likewise")
