import csv
import errno
import json
import os
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from webdataset.writer import TarWriter

from controlbooth.data.packing import pack as pack_module
from controlbooth.data.packing.pack import JOURNAL, PackError, pack
from controlbooth.data.packing.sources import SEGMENTATION_STEP, open_folder, open_scenes
from controlbooth.data.packing.text_tables import text_rows
from controlbooth.data.pictures.images import decode_image, encode_png
from controlbooth.data.scenes import render
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.launch.commands.data_pack import main

RNG = np.random.default_rng(0)
PICTURE = cv2.resize(RNG.integers(0, 256, (4, 4, 3), np.uint8), (24, 16))


def encoded(extension, pixels=PICTURE):
    return cv2.imencode(extension, pixels)[1].tobytes()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.fixture
def photos(tmp_path):
    """images/, conditions/edges/ and captions beside the images, five of each."""
    root = tmp_path / "photos"
    for i, extension in enumerate([".jpg", ".png", ".webp", ".jpg", ".bmp"]):
        write(root / "images" / f"p{i}{extension}", encoded(extension))
        write(root / "images" / f"p{i}.txt", f"caption {i}\n")
        write(root / "conditions" / "edges" / f"p{i}.jpg", encoded(".jpg", np.full((16, 24, 3), 50 * i, np.uint8)))
    return root


def run(*arguments):
    return main([str(argument) for argument in [*arguments, "--workers", 1]])


def contents(folder):
    """{key: {extension: bytes}} as plain webdataset reads it."""
    shards = sorted(map(str, folder.glob("*.tar")))
    samples = webdataset.WebDataset(shards, shardshuffle=False)
    return {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("__")} for s in samples}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_packed_and_plain_webdataset_reads_equal_bytes(photos, tmp_path):
    out = tmp_path / "out"
    assert run(photos, "-o", out, "--samples-per-shard", 2) == 0
    packed = contents(out)
    assert list(packed) == [f"p{i}" for i in range(5)]
    for i, extension in enumerate(["jpg", "png", "webp", "jpg"]):
        assert packed[f"p{i}"][extension] == (photos / "images" / f"p{i}.{extension}").read_bytes()
        assert packed[f"p{i}"]["txt"] == f"caption {i}".encode()
    assert np.array_equal(decode_image(packed["p4"]["png"], "", ""), PICTURE[..., ::-1])  # from .bmp
    edges = [decode_image(parts["cond.edges.png"], "", "") for parts in packed.values()]
    assert [int(condition.mean()) for condition in edges] == [0, 50, 100, 150, 200]
    assert all(condition.ndim == 2 for condition in edges)  # one channel says it all
    dataset = open_dataset(out)
    assert dataset.samples_per_shard("edges").tolist() == [2, 2, 1]


def test_conditions_are_computed_where_there_are_none(photos, tmp_path):
    assert run(photos, "-o", tmp_path / "out", "--condition", "canny", "--condition", "edges") == 0
    assert {"cond.canny.png", "cond.edges.png", "txt"} < contents(tmp_path / "out")["p0"].keys()


def test_class_folders_take_a_caption_template(tmp_path):
    for name in ("golden_retriever/a.jpg", "golden_retriever/b.v2.jpg", "cat/a.jpg"):
        write(tmp_path / "pets" / name, encoded(".jpg"))
    assert run(tmp_path / "pets", "-o", tmp_path / "out", "--caption", "a photo of a {folder}") == 0
    captions = {key: parts["txt"].decode() for key, parts in contents(tmp_path / "out").items()}
    assert captions == {
        "cat/a": "a photo of a cat",
        "golden_retriever/a": "a photo of a golden retriever",
        "golden_retriever/b_v2": "a photo of a golden retriever",
    }
    assert open_dataset(tmp_path / "out").samples_per_shard().tolist() == [3]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", "image,caption\nimages/p0.jpg,first\np1.png,second\n"),
        ("metadata.jsonl", '{"file_name": "p0.jpg", "text": "first"}\n{"file_name": "p1.png", "text": "second"}\n'),
    ],
)
def test_captions_come_from_a_table(photos, tmp_path, name, text):
    for i in (0, 1):
        (photos / "images" / f"p{i}.txt").unlink()
    write(photos / name, text)
    assert run(photos, "-o", tmp_path / "out") == 0
    assert [parts["txt"] for parts in contents(tmp_path / "out").values()][:3] == [b"first", b"second", b"caption 2"]


def test_missing_captions_and_conditions_are_named_before_anything_is_written(photos, tmp_path):
    (photos / "images" / "p1.txt").unlink()
    (photos / "images" / "p3.txt").unlink()
    with pytest.raises(ValueError, match=r"2 of 5 samples have no caption: p1, p3\. To mend it, put a .txt beside"):
        run(photos, "-o", tmp_path / "out")
    (photos / "conditions" / "edges" / "p2.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 5 samples have no edges condition: p2\. .*under the image's name"):
        run(photos, "-o", tmp_path / "out", "--caption", "x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--condition", "pose"], "there is no folder .*/conditions/ pose, and only canny"),
        (["--condition", "Edges!"], "condition 'Edges!' becomes a file extension"),
        (["--condition", "edges=column"], "is for tables; folders have conditions/edges/"),
        (["--caption", "a {thing}"], r"may hold \{folder\} and \{name\}"),
        (["--scenes", "5"], "name one source"),
    ],
)
def test_arguments_that_cannot_work_are_refused(photos, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(photos, "-o", tmp_path / "out", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples-per-shard", "0"], "argument --samples-per-shard: 0 is less than 1"),
        (["--seed", "-1"], "argument --seed: -1 is less than 0"),
        (["--workers", "many"], "argument --workers: 'many' is not a whole number"),
        (["-o", "FILE"], "is a file, and a folder is wanted: give another name"),
    ],
)
def test_numbers_and_names_that_cannot_be_meant_are_refused(photos, tmp_path, arguments, message, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        run(photos, "-o", tmp_path / "out", *[tmp_path / "file" if one == "FILE" else one for one in arguments])
    assert message in capsys.readouterr().err


def test_names_that_collide_are_refused(photos, tmp_path):
    write(photos / "images" / "p0.png", encoded(".png"))
    with pytest.raises(ValueError, match="p0.jpg and .*p0.png have the same name"):
        run(photos, "-o", tmp_path / "out")
    (photos / "images" / "p0.png").unlink()
    for name in ("a.b", "a_b"):
        write(photos / "images" / f"{name}.jpg", encoded(".jpg"))
    with pytest.raises(ValueError, match="would both be the sample 'a_b'"):
        open_folder(photos, ["canny"], "x")


def test_an_empty_or_absent_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images .* below"):
        run(tmp_path / "empty", "-o", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no .*absent"):
        run(tmp_path / "absent", "-o", tmp_path / "out")


def test_unreadable_images_are_all_listed_and_mending_them_keeps_the_rest(photos, tmp_path, capsys):
    out, good = tmp_path / "out", (photos / "images" / "p0.jpg").read_bytes()
    write(photos / "images" / "p0.jpg", good[:200])
    write(photos / "conditions" / "edges" / "p4.jpg", encoded(".jpg", np.zeros((16, 16), np.uint8)))
    assert run(photos, "-o", out, "--samples-per-shard", 2) == 1
    error = capsys.readouterr().err
    assert f"{photos}/images/p0.jpg: image: the image cannot be decoded" in error
    assert "p4.bmp: cond.edges: its aspect ratio is not the image's (24x16, 16x16)" in error
    assert "2 samples cannot be packed" in error and "--skip-bad" in error
    assert sorted(path.name for path in out.iterdir()) == [JOURNAL, "shards-000001.tar", "shards-000001.tar.idx"]

    kept = (out / "shards-000001.tar").stat().st_mtime_ns
    write(photos / "images" / "p0.jpg", good)
    assert run(photos, "-o", out, "--samples-per-shard", 2, "--skip-bad") == 0
    assert "1 left out" in capsys.readouterr().out
    assert list(contents(out)) == ["p0", "p1", "p2", "p3"] and len(open_dataset(out).rows) == 3
    assert (out / "shards-000001.tar").stat().st_mtime_ns == kept


def write_table(path, rows):
    """In the form that the suffix says: .csv, .jsonl or .parquet. Returns the path."""
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_tables_are_packed(photos, tmp_path, form):
    rows = [{"file": f"images/p{i}.jpg", "text": f"row, {i}", "drawn": f"conditions/edges/p{i}.jpg"} for i in (0, 3)]
    table = write_table(photos / f"table.{form}", rows)
    columns = ["--image-column", "file", "--caption-column", "text", "--condition", "edges=drawn"]
    assert run(table, "-o", tmp_path / "out", *columns, "--condition", "canny") == 0
    packed = contents(tmp_path / "out")
    assert [parts["txt"] for parts in packed.values()] == [b"row, 0", b"row, 3"]
    assert packed["00000001"]["jpg"] == (photos / "images" / "p3.jpg").read_bytes()
    assert {"cond.edges.png", "cond.canny.png"} < packed["00000000"].keys()


def test_random_parts_of_a_condition_go_with_the_picture_whatever_its_number_in_a_table(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", encode_png(render.render(render.scene(2, i), 48).image))
    kinds = ["--condition", "canny_random", "--condition", "scribble"]
    found = []
    for name, order in (("first", (0, 1, 2, 3)), ("second", (3, 0, 1, 2))):
        table = write(tmp_path / f"{name}.csv", "image,caption\n" + "".join(f"{i}.png,x\n" for i in order))
        assert run(table, "-o", tmp_path / name, *kinds) == 0
        found.append({parts["png"]: parts for parts in contents(tmp_path / name).values()})
    assert found[0] == found[1] and len(found[0]) == 4


def test_faults_of_a_table_are_named_before_anything_is_written(photos, tmp_path):
    table = write(photos / "t.csv", "image,caption\nimages/p0.jpg,a\nimages/gone.jpg,b\nimages/p1.png,\n")
    with pytest.raises(ValueError, match=r"1 of 3 samples have no image \(empty cell, or no such file\): row 2 .*gone"):
        run(table, "-o", tmp_path / "out")
    with pytest.raises(ValueError, match="has no column 'text' but image, caption: name it with"):
        run(table, "-o", tmp_path / "out", "--caption-column", "text")
    with pytest.raises(ValueError, match="--caption is for folders"):
        run(table, "-o", tmp_path / "out", "--caption", "x")
    assert not (tmp_path / "out").exists()


def hugging_face_rows(count=150):
    image = {"bytes": encoded(".png"), "path": None}
    rows = [{"image": image, "hint": image, "text": [f"c{i}", "same"] if i == 1 else [f"c{i}"]} for i in range(count)]
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_folders_of_hugging_face_datasets_are_packed(tmp_path, form):
    root, table = tmp_path / "set", hugging_face_rows()
    (root / "data").mkdir(parents=True)
    if form == "arrow":
        for i, part in enumerate([table.slice(0, 70), table.slice(70)]):
            with pa.OSFile(str(root / f"data-{i:05d}-of-00002.arrow"), "wb") as sink:
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(part, max_chunksize=30)
        names = [{"filename": path.name} for path in sorted(root.glob("*.arrow"))]
        write(root / "state.json", json.dumps({"_data_files": names}))
    else:
        for i, part in enumerate([table.slice(0, 70), table.slice(70)]):
            pq.write_table(part, root / "data" / f"train-{i:05d}-of-00002.parquet", row_group_size=25)
    columns = ["--caption-column", "text", "--condition", "fill=hint", "--samples-per-shard", 40]
    assert run(root, "-o", tmp_path / "out", *columns) == 0
    packed = contents(tmp_path / "out")
    assert list(packed) == [f"{i:08d}" for i in range(150)]
    assert all(packed[f"{i:08d}"]["txt"] == f"c{i}".encode() for i in range(150) if i != 1)
    assert json.loads(packed["00000001"]["json"]) == {"captions": ["c1", "same"]}
    assert packed["00000149"]["png"] == encoded(".png")
    assert open_dataset(tmp_path / "out").samples_per_shard("fill").tolist() == [40, 40, 40, 30]


def test_a_split_has_to_be_named_where_there_are_several(tmp_path):
    for split in ("train", "test"):
        path = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(hugging_face_rows(3), path)
    arguments = ["-o", tmp_path / "out", "--caption-column", "text"]
    with pytest.raises(ValueError, match="holds the splits test, train: name one, such as '.*test-[*].parquet'"):
        run(tmp_path / "set", *arguments)
    assert run(f"{tmp_path}/set/data/train-*.parquet", *arguments) == 0
    assert len(contents(tmp_path / "out")) == 3


def test_scenes_are_packed_with_exact_conditions(tmp_path):
    kinds = ("edges", "segmentation", "depth", "normals", "keypoints")
    conditions = [word for kind in (*kinds, "canny") for word in ("--condition", kind)]
    assert run("--scenes", 3, "--seed", 7, "--start", 40, "--size", 32, *conditions, "-o", tmp_path / "out") == 0
    packed = contents(tmp_path / "out")
    assert list(packed) == ["scene-7-00000040", "scene-7-00000041", "scene-7-00000042"]
    parts, what = packed["scene-7-00000041"], render.scene(7, 41)
    drawn = render.render(what, 32)
    assert parts["txt"].decode() == what.caption
    assert np.array_equal(decode_image(parts["png"], "", ""), drawn.image)
    for kind in kinds:
        expected = getattr(drawn, kind) * (SEGMENTATION_STEP if kind == "segmentation" else 1)
        assert np.array_equal(decode_image(parts[f"cond.{kind}.png"], "", ""), expected)
    assert len(render.CLASSES) * SEGMENTATION_STEP < 256
    assert "cond.canny.png" in parts


def test_packing_elsewhere_writes_the_same_bytes(tmp_path):
    source = open_scenes(10, 0, 0, 16, ["edges"])
    assert pack(source, tmp_path / "one", 4) == pack(source, tmp_path / "two", 4) == []
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_finished_shards_are_kept_and_unfinished_ones_written(tmp_path, monkeypatch):
    source = open_scenes(12, 0, 0, 16, ["edges"])
    pack(source, tmp_path / "whole", 4)
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    lines = (out / JOURNAL).read_text().splitlines(keepends=True)
    (out / JOURNAL).write_text("".join(lines[:3]) + lines[3][:20])  # killed while noting the last one
    (out / "manifest.jsonl").unlink()
    (out / "shards-000001.tar.idx").unlink()
    write(out / "shards-000002.tar.4711.tmp", b"half a shard")
    written = []
    monkeypatch.setattr(pack_module, "write_shard", _spy(pack_module.write_shard, written))
    pack(source, out, 4)
    assert written == ["shards-000001.tar", "shards-000002.tar"]
    assert files(out) == files(tmp_path / "whole")


def _spy(function, written):
    def call(source, job, *options):
        written.append(job.path.name)
        return function(source, job, *options)

    return call


def test_shards_whose_samples_changed_are_written_again_and_spare_ones_removed(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(photos, "-o", out, "--samples-per-shard", 2)
    write(photos / "images" / "p2.txt", "another caption")
    for name in ("images/p4.bmp", "images/p4.txt", "conditions/edges/p4.jpg"):
        (photos / name).unlink()
    written = []
    monkeypatch.setattr(pack_module, "write_shard", _spy(pack_module.write_shard, written))
    assert run(photos, "-o", out, "--samples-per-shard", 2) == 0
    assert written == ["shards-000001.tar"]
    assert list(contents(out)) == ["p0", "p1", "p2", "p3"] and contents(out)["p2"]["txt"] == b"another caption"


def edit(path, old, new):
    """Another content of the same length, at a time that is surely another."""
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    changed = path.stat().st_mtime_ns + 10**9
    path.write_bytes(data.replace(old, new))
    os.utime(path, ns=(changed, changed))


def test_edits_that_keep_a_files_length_are_packed_and_nothing_else_is(photos, tmp_path, monkeypatch):
    out, captions = tmp_path / "out", photos / "images" / "p2.txt"
    run(photos, "-o", out, "--samples-per-shard", 2)
    written = []
    monkeypatch.setattr(pack_module, "write_shard", _spy(pack_module.write_shard, written))
    before = captions.stat().st_mtime_ns
    edit(captions, b"caption 2", b"CAPTION 2")
    os.utime(captions, ns=(before, before))  # text is read, so its time does not matter
    edit(photos / "images" / "p4.bmp", PICTURE[0].tobytes(), bytes(PICTURE[0].nbytes))
    assert run(photos, "-o", out, "--samples-per-shard", 2) == 0
    assert written == ["shards-000001.tar", "shards-000002.tar"]
    assert contents(out)["p2"]["txt"] == b"CAPTION 2"
    assert not decode_image(contents(out)["p4"]["png"], "", "")[0].any()
    assert run(photos, "-o", out, "--samples-per-shard", 2) == 0 and len(written) == 2


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_edits_of_a_table_and_of_images_that_it_names_are_packed(photos, tmp_path, monkeypatch, form):
    table, out = photos / f"table.{form}", tmp_path / "out"
    names = ["p0.jpg", "p1.png", "p3.jpg", "p4.bmp"]

    def pack_table(words):
        rows = [{"image": f"images/{name}", "caption": word} for name, word in zip(names, words, strict=True)]
        write_table(table, rows)
        text_rows.cache_clear()  # a file is read once in a process, and every pack is one
        assert run(table, "-o", out, "--samples-per-shard", 1) == 0
        return [parts["txt"].decode() for parts in contents(out).values()]

    assert pack_table("abcd") == list("abcd")
    size, written = table.stat().st_size, []
    monkeypatch.setattr(pack_module, "write_shard", _spy(pack_module.write_shard, written))
    assert pack_table("abXd") == list("abXd") and table.stat().st_size == size
    assert written == ["shards-000002.tar"]
    edit(photos / "images" / "p4.bmp", PICTURE[0].tobytes(), bytes(PICTURE[0].nbytes))
    pack_table("abXd")
    assert written == ["shards-000002.tar", "shards-000003.tar"]
    assert not decode_image(contents(out)["00000003"]["png"], "", "")[0].any()


def test_a_table_that_holds_its_images_is_packed_again_when_it_was_written_again(tmp_path, monkeypatch):
    rows, table, out = hugging_face_rows(3), tmp_path / "t.parquet", tmp_path / "out"
    pq.write_table(rows, table)
    arguments = [table, "-o", out, "--caption-column", "text"]
    assert run(*arguments) == 0
    written = []
    monkeypatch.setattr(pack_module, "write_shard", _spy(pack_module.write_shard, written))
    assert run(*arguments) == 0 and written == []
    os.utime(table, ns=(0, 10**18))
    assert run(*arguments) == 0 and written == ["shards-000000.tar"]


def test_a_folder_of_another_pack_is_refused(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, "-o", out)
    with pytest.raises(ValueError, match=r"holds a pack of another source .*folder .*photos.*this is scenes of seed 0"):
        run("--scenes", 2, "-o", out)
    with pytest.raises(ValueError, match="another source or with other options"):
        run(photos, "-o", out, "--samples-per-shard", 2)
    (out / JOURNAL).unlink()
    with pytest.raises(ValueError, match="holds 1 shards that no pack wrote"):
        run(photos, "-o", out)


def test_two_packs_do_not_write_to_one_folder(tmp_path):
    source = open_scenes(2, 0, 0, 16, ["edges"])
    out = tmp_path / "out"
    out.mkdir()
    with open(out / JOURNAL, "a+") as journal:
        pack_module._lock(journal, out)
        with pytest.raises(PackError, match="another pack is writing to"):
            pack(source, out, 4)


def test_a_full_disk_is_said_and_leaves_only_finished_shards(tmp_path, monkeypatch):
    write_sample = TarWriter.write
    source = open_scenes(12, 0, 0, 16, ["edges"])

    def fail_late(self, sample):
        if sample["__key__"].endswith("6"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_sample(self, sample)

    monkeypatch.setattr(TarWriter, "write", fail_late)
    with pytest.raises(PackError, match=r"the disk is full.*shards-000001\.tar\. Free some space and run the same"):
        pack(source, tmp_path / "out", 4)
    assert sorted(os.listdir(tmp_path / "out")) == [JOURNAL, "shards-000000.tar", "shards-000000.tar.idx"]
    monkeypatch.undo()
    pack(source, tmp_path / "out", 4)
    pack(source, tmp_path / "whole", 4)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_dry_run_shows_the_plan_and_writes_nothing(photos, tmp_path, capsys):
    assert run(photos, "-o", tmp_path / "out", "--condition", "canny", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "computed ('canny',)" in text and "5 samples -> 1 shards" in text and "p0" in text and "'caption 0'" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "bits"), [("edges", 1), ("depth", 8), ("image", 8)])
def test_black_and_white_pictures_are_stored_with_one_bit_a_pixel_and_come_back_as_they_were(kind, bits):
    pixels = getattr(render.render(render.scene(0, 1), 50), kind)
    data = encode_png(pixels)
    assert data[24] == bits  # the bit depth in the IHDR chunk
    assert np.array_equal(decode_image(data, "k", kind), pixels)
    by_webdataset = webdataset.autodecode.imagehandler("rgb8")("x.png", data)
    assert np.array_equal(by_webdataset, cv2.merge([pixels] * 3) if pixels.ndim == 2 else pixels)


def test_a_table_that_names_conditions_too_is_refused_with_the_command_that_packs_them(tmp_path, capsys):
    for place in ("images", "conditioning_images"):
        (tmp_path / place).mkdir()
        cv2.imwrite(str(tmp_path / place / "0.png"), np.full((8, 8, 3), 90, np.uint8))
    row = {"file_name": "images/0.png", "conditioning_image": "conditioning_images/0.png", "text": "gray"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="names a second picture .* 'conditioning_image'") as refused:
        main([str(tmp_path), "-o", str(tmp_path / "shards")])
    command = str(refused.value).split("controlbooth data pack ")[1].split(" (without")[0].replace("KIND", "outline")
    assert main([*shlex.split(command), "-o", str(tmp_path / "shards")]) == 0
    assert open_dataset(tmp_path / "shards").rows[0].conditions == {"outline": 1}
