import os
import shutil

import cv2
import numpy as np
import pytest
import webdataset

from controlbooth.data.shards.index import ensure_index
from controlbooth.data.shards.manifest import (
    NAME,
    describe_shard,
    find_shards,
    fingerprint,
    open_dataset,
    write_manifest,
)
from controlbooth.data.shards.sidecar import index_path
from controlbooth.launch.commands.data_index import main as index_main

PNG = cv2.imencode(".png", np.zeros((5, 5, 3), np.uint8))[1].tobytes()


def write_shard(path, keys, kinds=("edges",)):
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for key in keys:
            conditions = {f"cond.{kind}.png": PNG for kind in kinds}
            writer.write({"__key__": key, "png": PNG, "txt": b"caption", **conditions})
    return path


@pytest.fixture
def folder(tmp_path):
    """Three shards of 2, 3 and 4 samples, with indexes but without a manifest."""
    root = tmp_path / "set"
    root.mkdir()
    for i in range(3):
        ensure_index(write_shard(root / f"s-{i:03d}.tar", [f"k{i}-{j}" for j in range(i + 2)]))
    return root


def with_manifest(folder):
    write_manifest([describe_shard(path) for path in find_shards(folder)], folder / NAME)
    return folder


def test_a_folder_a_manifest_a_glob_and_a_range_are_the_same_data_set(folder):
    locations = [folder, f"{folder}/*.tar", f"{folder}/s-{{000..002}}.tar", f"{folder}/s-00[0-2].tar"]
    found = {open_dataset(location).fingerprint for location in locations}
    with_manifest(folder)
    found |= {open_dataset(location).fingerprint for location in (folder, folder / NAME, str(folder / NAME))}
    assert len(found) == 1
    assert open_dataset(folder).samples_per_shard().tolist() == [2, 3, 4]


def test_the_manifest_moves_with_its_folder(folder, tmp_path):
    before = open_dataset(with_manifest(folder))
    shutil.move(folder, tmp_path / "elsewhere")
    after = open_dataset(tmp_path / "elsewhere")
    assert after.fingerprint == before.fingerprint
    assert all(path.exists() and path.parent.name == "elsewhere" for path in after.paths)


def test_a_manifest_may_lie_apart_from_its_shards(folder, tmp_path):
    write_manifest([describe_shard(path) for path in find_shards(folder)], tmp_path / "train.jsonl")
    assert '"../' not in (tmp_path / "train.jsonl").read_text()
    assert open_dataset(tmp_path / "train.jsonl").paths[0] == folder / "s-000.tar"


def test_the_fingerprint_changes_with_the_order_and_the_content_only(folder):
    rows = [describe_shard(path) for path in find_shards(folder)]
    assert fingerprint(rows) != fingerprint(rows[::-1])
    write_shard(folder / "s-001.tar", ["k1-0", "k1-1", "other"])
    index_path(folder / "s-001.tar").unlink()
    ensure_index(folder / "s-001.tar")
    assert open_dataset(folder).fingerprint != fingerprint(rows)


def test_conditions_are_counted_by_kind(tmp_path):
    for i, kinds in enumerate([("edges",), ("edges", "depth")]):
        ensure_index(write_shard(tmp_path / f"{i}.tar", ["a", "b"], kinds))
    dataset = open_dataset(tmp_path)
    assert dataset.samples_per_shard("depth").tolist() == [0, 2]
    assert dataset.samples_per_shard("edges").dtype == np.int64
    with pytest.raises(ValueError, match="condition 'pose'; conditions there are: depth, edges.*--condition pose"):
        dataset.samples_per_shard("pose")


def test_shards_without_an_index_name_the_command(folder):
    index_path(folder / "s-001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 3 shards have no index .*controlbooth data index {folder}"):
        open_dataset(folder)
    assert len(open_dataset(folder, index_missing=True).rows) == 3


def test_damaged_shards_of_others_are_refused_when_indexing(folder):
    index_path(folder / "s-001.tar").unlink()
    os.truncate(folder / "s-001.tar", 700)
    with pytest.raises(ValueError, match="1 damaged shards.*s-001.tar: byte 700.*fetch|fetch.*s-001.tar: byte 700"):
        open_dataset(folder, index_missing=True)


@pytest.mark.parametrize("manifest", [False, True])
def test_a_changed_shard_is_refused(folder, manifest):
    if manifest:
        with_manifest(folder)
    with open(folder / "s-002.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"1 of 3 shards are not as they were.*s-002.tar has \d+ bytes.*--rebuild"):
        open_dataset(folder)


def test_a_shard_or_index_that_is_gone_is_refused(folder):
    with_manifest(folder)
    (folder / "s-000.tar").unlink()
    index_path(folder / "s-001.tar").unlink()
    with pytest.raises(ValueError, match="2 of 3 shards .*s-000.tar is missing.*s-001.tar.idx is missing"):
        open_dataset(folder)


def test_an_index_that_is_empty_is_refused_with_what_to_do(folder):
    with_manifest(folder)
    index_path(folder / "s-001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 3 shards .*s-001.tar.idx is not a whole index.*controlbooth data index"):
        open_dataset(folder)


def test_an_index_written_after_the_manifest_is_refused(folder):
    with_manifest(folder)
    write_shard(folder / "s-000.tar", ["aa-0", "aa-1"])  # of equal size
    index_path(folder / "s-000.tar").unlink()
    ensure_index(folder / "s-000.tar")
    with pytest.raises(ValueError, match="s-000.tar.idx was written anew after the manifest"):
        open_dataset(folder)


def test_shards_that_the_manifest_of_a_folder_leaves_out_are_noticed(folder):
    with_manifest(folder)
    ensure_index(write_shard(folder / "s-003.tar", ["x"]))
    with pytest.raises(ValueError, match=r"lists 3 shards, and the folder holds 1 more .*s-003.tar.*data index"):
        open_dataset(folder)
    assert len(open_dataset(folder / NAME).rows) == 3  # named itself, it means what it says


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"uri": "a.tar"}\n', "line 1 is not a shard row"),
        ("not json\n", "line 1 is not a shard row"),
        ("", "lists no shards"),
    ],
)
def test_a_bad_manifest_names_the_line_and_the_command(tmp_path, text, message):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match=f"{message}.*controlbooth data index"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nothing/*.tar", "no .tar shards at"),
        ("s-{000..004}.tar", "2 of the 5 shards of .* do not exist: .*s-003.tar.*s-004.tar"),
        ("s-{000..002.tar", "braces of .* do not match"),
        ("s-{000..009999999999}.tar", "stands for 10,000,000,000 names, and may for 1,000,000"),
        ("absent", "do not exist"),
        ("absent.jsonl", "absent.jsonl"),
    ],
)
def test_locations_that_name_nothing_are_refused(folder, location, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        open_dataset(f"{folder}/{location}")


def test_remote_shards_without_a_manifest_are_refused_with_the_command_that_writes_one():
    with pytest.raises(ValueError, match=r"s3://bucket/x.tar is remote.*controlbooth data index s3://bucket/x.tar "):
        open_dataset("s3://bucket/x.tar")
    with pytest.raises(ValueError, match="not from ftp://"):
        open_dataset("ftp://host/x.tar")


def test_an_empty_folder_is_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .tar shards.*controlbooth data pack"):
        open_dataset(tmp_path)


def test_the_index_command_writes_indexes_and_a_manifest(folder, capsys):
    index_path(folder / "s-001.tar").unlink()
    assert index_main([str(folder), "--workers", "1"]) == 0
    assert len(open_dataset(folder).rows) == 3
    assert "all 3 shards" in capsys.readouterr().out


def test_the_index_command_notices_a_newer_shard_of_the_same_size(folder):
    before, size = open_dataset(folder).fingerprint, (folder / "s-001.tar").stat().st_size
    write_shard(folder / "s-001.tar", ["other-0", "other-1", "other-2"])
    assert (folder / "s-001.tar").stat().st_size == size
    assert index_main([str(folder), "--workers", "1"]) == 0
    assert open_dataset(folder).fingerprint != before


def test_the_index_command_reads_all_again_when_told_to(folder):
    write_shard(folder / "s-001.tar", ["other-0", "other-1", "other-2"])
    os.utime(folder / "s-001.tar", (0, 0))
    before = open_dataset(folder).fingerprint
    assert index_main([str(folder), "--workers", "1"]) == 0 and open_dataset(folder).fingerprint == before
    assert index_main([str(folder), "--workers", "1", "--rebuild"]) == 0 and open_dataset(folder).fingerprint != before


def test_the_index_command_reports_damage_and_writes_no_manifest(folder, capsys):
    os.truncate(folder / "s-001.tar", 700)
    assert index_main([str(folder), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert "s-001.tar: byte 700, key ''" in error and "1 of 3 shards are damaged, so no manifest was written" in error
    assert not (folder / NAME).exists()


def test_the_index_command_counts_flagged_samples_every_time(folder, capsys):
    with webdataset.TarWriter(str(folder / "s-001.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "png": PNG})
        writer.write({"__key__": "b", "png": PNG, "txt": b""})
    assert index_main([str(folder), "--workers", "1"]) == 1
    assert "key 'a': has png but no caption" in capsys.readouterr().err
    assert index_main([str(folder), "--workers", "1"]) == 1  # now from the index alone
    assert open_dataset(folder).samples_per_shard().tolist() == [2, 1, 4]
