"""Tables and captions as people's programs write them: used as they are meant, or refused with file, row and remedy."""

import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from controlbooth.data.inspection.readable import check_readable, problem
from controlbooth.data.inspection.scan import scan
from controlbooth.data.packing.sources import open_folder
from controlbooth.data.packing.tables import open_rows
from controlbooth.data.packing.text_tables import text_rows
from controlbooth.data.pictures.images import BadSample
from controlbooth.data.shards.captions import MAX_CHARACTERS, read_captions
from controlbooth.data.shards.index import index_shard
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.reader import ShardReader
from controlbooth.launch.commands.data_pack import main as pack_main


def png(number):
    pixels = np.full((64, 64, 3), number * 20, np.uint8)
    pixels[number * 5 :, 20:] = 255
    return cv2.imencode(".png", pixels)[1].tobytes()


@pytest.fixture(autouse=True)
def fresh():
    text_rows.cache_clear()  # a file is read once in a process, and here every test writes its own


@pytest.fixture
def pictures(tmp_path):
    """A folder with 0.png to 4.png in images/."""
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
    return tmp_path


def table(pictures, name, text):
    path = pictures / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def captions(source):
    return [sample.captions for sample in source.read(0, source.count)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image,caption\nimages/0.png,a dog, on grass\n",
            "line 2 has 3 cells, the header 2: put quotes around",
        ),
        ("image,caption\n\nimages/0.png,a dog\nimages/1.png\n", "line 4 has 1 cells, the header 2"),
        ('image,caption\nimages/0.png,"a\nb"\nimages/1.png,"c\nimages/2.png,d\n', "line 4: the quote that opens there"),
        ('image,caption\nimages/0.png,"a ""b"" c"\nimages/1.png,"d" e\n', "line 3: the quote that opens there"),
        ('image,caption\nimages/0.png,"the big one\nimages/1.png,"a dog"\n', "line 2: the quote that opens there"),
        ("image,caption,caption\nimages/0.png,a,b\n", "line 1 names the column 'caption' twice"),
        ("image,caption\n".encode("utf-16"), "is not UTF-8"),
        (b"image,caption\nimages/0.png,\xff\n", r"is not UTF-8 \(invalid start byte at byte 27\): save it as UTF-8"),
    ],
)
def test_a_row_of_csv_that_does_not_fit_is_refused_with_its_line(pictures, text, message):
    with pytest.raises(ValueError, match=message) as refused:
        open_rows(table(pictures, "t.csv", text), {})
    assert "t.csv" in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffimage,caption\r\nimages/0.png,a dog\r\n",
        ",image,caption\n0,images/0.png,a dog\n",  # of pandas, with its index
        'image,caption,,\n"images/0.png","a dog",,\n\n',  # of spreadsheets
        "caption,image\na dog,images/0.png",
    ],
)
def test_tables_of_other_programs_are_read(pictures, text):
    for name in ("t.csv", "T.CSV"):
        assert captions(open_rows(table(pictures, name, text), {})) == [["a dog"]]


@pytest.mark.parametrize("name", ["t.jsonl", "prompt.json", "t.ndjson", "T.JSONL"])
def test_objects_a_line_are_read_under_every_name_that_is_used(pictures, name):
    text = '\ufeff{"target": "images/0.png", "prompt": "a dog", "more": [1]}\r\n'
    text += '\r\n{"prompt": "b", "target": "images/1.png"}'
    source = open_rows(table(pictures, name, text), {}, "target", "prompt")
    assert captions(source) == [["a dog"], ["b"]]


def test_quotes_commas_and_lines_inside_of_quoted_cells_are_text(pictures):
    text = 'image,caption\nimages/0.png,"a ""big"" dog,\non grass"\nimages/1.png,5\' 6"" tall\n'
    assert captions(open_rows(table(pictures, "t.csv", text), {})) == [['a "big" dog,\non grass'], ['5\' 6"" tall']]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "images/0.png", "caption": 5}', r"row 2 of .*t.jsonl \(5 is a number and no text"),
        ('{"image": "images/0.png", "caption": NaN}', "nan is a number"),
        ('{"image": "images/0.png", "caption": true}', "True is a truth value"),
        ('{"image": "images/0.png", "caption": {"en": "a"}}', "is an object"),
        ('{"image": "images/0.png", "caption": ["a", null]}', "None, number 2 of 2, is null"),
        ('{"image": "images/0.png", "caption": []}', "1 of 2 samples have no caption"),
        ('{"image": "images/0.png", "caption": null}', "1 of 2 samples have no caption"),
        ('{"image": "images/0.png"}', "1 of 2 samples have no caption"),
        ('{"image": "images/0.png", "caption": "a \\ud800 b"}', r"half of a surrogate pair, \\ud800, at character 3"),
        ('{"image": "images/0.png", "caption": "a\\u0000"}', "holds a NUL at character 2"),
        ('{"image": 7, "caption": "a"}', r"row 2 of .* \(7 is no image"),
        ('{"image": ["a"], "caption": "a"}', "is no image"),
        ('{"image": "images/absent.png", "caption": "a"}', r"row 2 of .*\(images/absent.png\)"),
        ('{"image": "' + "a dog " * 100 + '", "caption": "a"}', r"row 2 of .*\(a dog a dog"),
        ('{"image": "images/1.png/x", "caption": "a"}', r"row 2 of .*\(images/1.png/x\)"),
        ('{"image": "a\\u0000b", "caption": "a"}', "row 2 of "),
        ('{"image": "images", "caption": "a"}', r"row 2 of .*\(images\)"),
        (
            '{"image": "images/0.png", "caption": "a", "caption": "b"}',
            "line 2 .* it has 'caption' twice",
        ),
        ('[["image", "images/0.png"], ["caption", "a"]]', "line 2 is not a JSON object but list"),
        ("[" * 200_000, "line 2 is not a JSON object: maximum recursion depth"),
        ('{"image": "images/0.png", "caption": "a"', "line 2 is not a JSON object"),
    ],
)
def test_cells_of_json_that_are_no_captions_or_pictures_are_refused_with_their_row(pictures, line, message):
    first = '{"image": "images/1.png", "caption": "a cube"}\n'
    with pytest.raises(ValueError, match=message):
        open_rows(table(pictures, "t.jsonl", first + line + "\n"), {})


TEXTS = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
IMAGES = {
    "bytes": pa.binary(),
    "large bytes": pa.large_binary(),
    "struct": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "large struct": pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
}


def write_arrow(path, tree):
    if path.suffix == ".parquet":
        pq.write_table(tree, path, row_group_size=2)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, tree.schema) as writer:
            writer.write_table(tree)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", TEXTS, ids=str)
def test_text_of_every_type_of_arrow_names_files_and_is_told_when_one_changes_or_is_missing(pictures, kind, suffix):
    path = pictures / f"t{suffix}"
    names = pa.array([f"images/{number}.png" for number in range(3)], pa.string()).cast(kind)
    write_arrow(path, pa.table({"image": names, "caption": pa.array(["a", "b", "c"], pa.string()).cast(kind)}))
    before = open_rows(path, {})
    identity = before.identity(0, 3)
    assert captions(before) == [["a"], ["b"], ["c"]]
    assert [sample.image for sample in before.read(0, 3)] == [png(number) for number in range(3)]
    (pictures / "images" / "1.png").write_bytes(png(4) + b"longer")
    assert open_rows(path, {}).identity(0, 3) != identity
    (pictures / "images" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 samples have no image .*row 3 of .*images/2.png"):
        open_rows(path, {})


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", IMAGES)
def test_pictures_inside_of_a_table_are_read_and_null_ones_are_told_with_their_row(pictures, kind, suffix):
    cells = [png(0), png(1), png(2)]
    if "struct" in kind:
        cells = [
            {"bytes": cells[0], "path": "0"},
            {"bytes": None, "path": "images/1.png"},
            {"bytes": cells[2], "path": None},
        ]
    whole = pa.table({"image": pa.array(cells, IMAGES[kind]), "caption": ["a", "b", "c"]})
    write_arrow(pictures / f"t{suffix}", whole)
    source = open_rows(pictures / f"t{suffix}", {})
    identity = source.identity(0, 3)
    assert [sample.image for sample in source.read(0, 3)] == [png(number) for number in range(3)]
    if "struct" in kind:  # what it names is part of what it is made from
        (pictures / "images" / "1.png").write_bytes(png(3) + b"longer")
        assert open_rows(pictures / f"t{suffix}", {}).identity(0, 3) != identity
    cells[1] = None
    broken = pa.table({"image": pa.array(cells, IMAGES[kind]), "caption": ["a", "b", "c"]})
    write_arrow(pictures / f"null{suffix}", broken)
    with pytest.raises(ValueError, match="1 of 3 samples have no image .*: row 2 of "):
        open_rows(pictures / f"null{suffix}", {})


@pytest.mark.parametrize(
    "column", [pa.array([1, 2]), pa.array([[1], [2]]), pa.array([1.0, 2.0])], ids=lambda c: str(c.type)
)
def test_columns_that_cannot_be_pictures_or_captions_are_refused(pictures, column):
    pq.write_table(pa.table({"image": column, "caption": ["a", "b"]}), pictures / "t.parquet")
    with pytest.raises(ValueError, match=r"column image is .*, which is no image"):
        open_rows(pictures / "t.parquet", {})
    pq.write_table(pa.table({"image": ["images/0.png"] * 2, "caption": column}), pictures / "u.parquet")
    with pytest.raises(ValueError, match=r"2 of 2 samples have no caption .*row 1 of .*is a number"):
        open_rows(pictures / "u.parquet", {})


def test_skip_bad_leaves_out_rows_that_cannot_be_packed_and_lists_each(pictures, capsys):
    rows = [
        {"image": "images/0.png", "caption": "a"},
        {"image": None, "caption": "b"},
        {"image": "images/absent.png", "caption": "c"},
        {"image": "images/1.png", "caption": 5},
        {"image": "images/2.png", "caption": "a \ud800 b"},
        {"image": "images/3.png", "caption": ["d", "e"]},
    ]
    path = table(pictures, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    out = pictures / "out"
    arguments = [str(path), "-o", str(out), "--condition", "gray", "--workers", "1"]
    with pytest.raises(ValueError):
        pack_main(arguments)
    assert not out.exists()
    text_rows.cache_clear()
    assert pack_main([*arguments, "--skip-bad"]) == 0
    said = capsys.readouterr()
    assert "2 samples in 1 shards, 4 left out" in said.out
    for row, part in ((2, "image"), (3, "image"), (4, "caption"), (5, "caption")):
        assert f"t.jsonl, row {row}: {part}: " in said.err
    assert "there is no file" in said.err and "half of a surrogate pair" in said.err


def test_where_every_row_is_left_out_there_is_no_pack(pictures, capsys):
    path = table(pictures, "t.jsonl", '{"image": null, "caption": "a"}\n')
    assert pack_main([str(path), "-o", str(pictures / "out"), "--skip-bad", "--workers", "1"]) == 1
    assert "no sample could be packed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("train/0.parquet", "validation/0.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("pets_train.parquet", "pets_val.parquet"),
    ],
)
def test_files_of_two_splits_are_not_mixed(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        pq.write_table(pa.table({"image": [png(0)], "caption": ["a"]}), tmp_path / name)
    with pytest.raises(ValueError, match="holds the splits .*train.*: name one, such as"):
        open_rows(tmp_path, {})


def test_files_of_one_split_and_files_without_one_are_one_data_set(tmp_path):
    for folder, names in (("one", ("train-0.parquet", "train-1.parquet")), ("none", ("0.parquet", "more/1.parquet"))):
        for name in (*names, ".hidden.parquet"):
            (tmp_path / folder / name).parent.mkdir(exist_ok=True, parents=True)
            pq.write_table(pa.table({"image": [png(0)], "caption": ["a"]}), tmp_path / folder / name)
        assert open_rows(tmp_path / folder, {}).count == 2


def test_folders_of_two_splits_are_not_mixed_and_classes_are(tmp_path):
    for folder in ("train/cat", "test/cat", "cat", "dog"):
        for root in ("both", "classes"):
            if root == "both" or "/" not in folder:
                (tmp_path / root / folder).mkdir(parents=True)
                (tmp_path / root / folder / "0.png").write_bytes(png(0))
    with pytest.raises(ValueError, match="holds the splits test, train, which would become one data set: name one"):
        open_folder(tmp_path / "both", ["gray"], "a {folder}")
    assert open_folder(tmp_path / "both" / "train", ["gray"], "a {folder}").count == 1
    assert open_folder(tmp_path / "classes", ["gray"], "a {folder}").count == 2


def test_all_rows_of_a_picture_and_lists_are_its_captions(pictures):
    rows = "file_name,text\n" + "".join(
        f"{number}.png,caption {number}-{one}\n" for number in range(5) for one in range(3)
    )
    table(pictures, "images/metadata.csv", rows)
    source = open_folder(pictures, ["gray"], None)
    assert captions(source) == [[f"caption {number}-{one}" for one in range(3)] for number in range(5)]
    (pictures / "images" / "metadata.csv").unlink()
    lines = [{"file_name": f"{number}.png", "text": ["a", "b"] if number else "c"} for number in range(5)]
    table(pictures, "images/metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    text_rows.cache_clear()
    assert captions(open_folder(pictures, ["gray"], None)) == [["c"], *[["a", "b"]] * 4]


def test_what_a_folder_holds_besides_is_told_and_unused_rows_too(pictures, capsys):
    rows = "image,caption\n" + "".join(f"images/{number}.png,a\n" for number in range(5)) + "images/9.png,b\n"
    table(pictures, "captions.csv", rows)
    for name in ("a.psd", "b.PSD", "c.mp4", "notes.txt"):
        (pictures / "images" / name).touch()
    assert pack_main([str(pictures), "-o", str(pictures / "out"), "--condition", "gray", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "left out 1 .mp4, 2 .psd: they are no pictures that can be read" in said
    assert "1 of its names are no pictures of this folder, as 'images/9.png'" in said


def test_a_number_among_the_captions_of_a_folder_is_refused_with_file_and_row(pictures):
    table(pictures, "metadata.jsonl", '{"file_name": "images/0.png", "text": 5}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl, row 1, column text: the caption 5 is a number and no text"):
        open_folder(pictures, ["gray"], None)


@pytest.mark.parametrize("name", ["t.tsv", "t.xlsx", "t"])
def test_a_table_of_another_kind_is_refused_by_its_name(pictures, name):
    with pytest.raises(ValueError, match=f"{name} is no table that can be read, by its name: .csv, .jsonl, "):
        open_rows(table(pictures, name, "image\tcaption\n"), {})


def test_a_link_to_nothing_that_is_named_like_a_picture_is_refused(pictures):
    (pictures / "images" / "9.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match="9.png is a link to nothing"):
        open_folder(pictures, ["gray"], "a")


def test_a_caption_file_that_is_no_text_is_one_bad_sample(pictures, capsys):
    for number in range(5):
        (pictures / "images" / f"{number}.txt").write_bytes(b"\xff\xfe" if number == 3 else b"a dog")
    arguments = [str(pictures), "-o", str(pictures / "out"), "--condition", "gray", "--workers", "1"]
    assert pack_main(arguments) == 1 and "3.png: caption: " in capsys.readouterr().err
    assert pack_main([*arguments, "--skip-bad"]) == 0 and "4 samples in 1 shards, 1 left out" in capsys.readouterr().out


HOSTILE = {
    "deep": (b"[" * 200_000 + b"]" * 200_000, "json"),
    "surrogate": (b'"a \\ud800 dog"', "json"),
    "surrogate in a list": (b'{"captions": ["a", "\\udfff"]}', "json"),
    "long": (b"a" * (MAX_CHARACTERS + 1), "txt"),
    "long json": (json.dumps({"caption": "a " * MAX_CHARACTERS}).encode(), "json"),
    "nul": (b"a\0dog", "txt"),
    "zeros": (bytes(4096), "txt"),
    "utf-16": ("a dog".encode("utf-16"), "txt"),
    "latin-1": ("ein Bär".encode("latin-1"), "txt"),
    "number": (b"5", "json"),
    "large number": (b"9" * 5000, "json"),
    "nan": (b'{"caption": NaN}', "json"),
    "null": (b'{"captions": ["a", null]}', "json"),
    "empty list": (b'{"captions": []}', "json"),
    "other name": (b'{"text": "a"}', "json"),
    "nothing": (b"", "json"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_caption_that_is_none_is_a_bad_sample_in_every_verb(tmp_path, name):
    data, extension = HOSTILE[name]
    with pytest.raises(BadSample, match=f"sample 'key', part '{extension}'"):
        read_captions(data, extension, "key")
    write_set(tmp_path, [(b"a", "txt"), (data, extension), (b"b", "txt")])
    _, problems = index_shard(tmp_path / "0.tar")
    assert [(one.kind, one.key) for one in problems] == [("caption", "k1")]
    (fault,) = scan(open_dataset(tmp_path), (), decode=False, workers=1).faults
    assert fault[:2] == (1, "broken") and fault[2].startswith(f"{extension}: the caption ")


@pytest.mark.parametrize(
    ("data", "extension", "expected"),
    [
        (b"", "txt", [""]),
        ("\ufeffein Bär \U0001f43b\r\n".encode(), "txt", ["ein Bär \U0001f43b"]),
        (b'"\\ud83d\\udc3b"', "json", ["\U0001f43b"]),
        (b"a" * MAX_CHARACTERS, "txt", ["a" * MAX_CHARACTERS]),
        (b'{"captions": ["a", ""], "width": NaN}', "json", ["a", ""]),
    ],
)
def test_captions_that_are_unusual_and_whole_are_kept(data, extension, expected):
    assert read_captions(data, extension, "key") == expected


def write_set(folder, given, image=None):
    import webdataset

    with webdataset.TarWriter(str(folder / "0.tar"), encoder=False, mtime=0) as writer:
        for number, (data, extension) in enumerate(given):
            writer.write({"__key__": f"k{number}", "png": image or png(number), extension: data})
    if not (folder / "0.tar.idx").exists():
        from controlbooth.data.shards.index import ensure_index

        ensure_index(folder / "0.tar")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_data_set_of_which_nothing_can_be_read_is_told_with_its_first_sample(tmp_path, indexed):
    write_set(tmp_path, [(b'{"text": "a"}', "json")] * 3)
    if indexed:
        with pytest.raises(ValueError, match=r"none of its 3 samples can be read.*is sample 'k0', part 'json'"):
            check_readable(open_dataset(tmp_path), None)
    else:
        (tmp_path / "0.tar.idx").unlink()
    told = problem(str(tmp_path), None, 10**8)
    assert told is not None and "can be read, so there is nothing to train on. The first is sample 'k0'" in told


@pytest.mark.parametrize("indexed", [True, False])
def test_one_sample_that_can_be_read_is_enough(tmp_path, indexed):
    write_set(tmp_path, [(b'{"text": "a"}', "json")] * 3 + [(b"a", "txt")])
    if not indexed:
        (tmp_path / "0.tar.idx").unlink()
    assert problem(str(tmp_path), None, 10**8) is None
    reader = ShardReader(open_dataset(tmp_path, index_missing=True), None)
    assert reader.read(0, 3).caption == b"a"
    reader.close()


def test_pictures_that_are_cut_short_or_too_large_everywhere_are_told_too(tmp_path):
    write_set(tmp_path, [(b"a", "txt")] * 3, image=png(1)[:60])
    assert "part 'png': the image cannot be decoded" in str(problem(str(tmp_path), None, 10**8))
    write_set(tmp_path, [(b"a", "txt")] * 3)
    (tmp_path / "0.tar.idx").unlink()
    assert "64 x 64 pixels" in str(problem(str(tmp_path), None, 100))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("column", ["image", "caption"])
def test_text_that_is_no_utf_8_is_refused_with_the_tables_name(tmp_path, column, suffix):
    """Arrow takes the bytes of its text on trust, and only Python's decoder says no, without a word of the file."""
    cells = pa.array([b"\xe3(", b"b"], pa.binary())
    broken = pa.StringArray.from_buffers(2, cells.buffers()[1], cells.buffers()[2])
    table = pa.table({"image": ["0.png", "1.png"], "caption": ["a", "b"]} | {column: broken})
    path = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(b"a picture")
    with pytest.raises(ValueError, match=f"table{suffix} is damaged, or no file of Arrow or Parquet"):
        source = open_rows(path, {})
        list(source.read(0, source.count))
