"""Files that nobody meant, for every reader of data, and what each reader may make of them.

A `Fuzz` has a strategy of hypothesis and a check. The check passes where the reader uses the file as its format says,
or refuses it with the error that says so by name; anything else, a traceback of a library above all, fails it.
tests/unit/data/test_hostile.py runs a few seeded ones, tests/benchmarks/fuzz_data.py as many as it has minutes for.
"""

import csv
import functools
import io
import json
import struct
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from controlbooth.data.packing.tables import open_rows
from controlbooth.data.packing.text_tables import text_rows
from controlbooth.data.pictures.headers import read_header
from controlbooth.data.pictures.images import BadSample, decode_image, encode_png
from controlbooth.data.shards import sidecar
from controlbooth.data.shards.captions import MAX_CHARACTERS, read_captions
from controlbooth.data.shards.index import index_shard
from controlbooth.data.shards.manifest import describe_shard, open_dataset, read_manifest, write_manifest
from controlbooth.data.shards.tar import TarDamage, first_name, members


@dataclass(frozen=True)
class Fuzz:
    name: str
    files: st.SearchStrategy
    check: Callable[[Any], None]


# Bytes


@st.composite
def spoiled(draw, originals: Sequence[bytes], most: int = 3) -> bytes:
    """One of the files with up to `most` things done to it: bits, bytes, cuts, zeros, copies of other places."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, most))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        end = min(len(data), at + draw(st.sampled_from((1, 2, 4, 16, 512))))
        what = draw(st.sampled_from(("bit", "bytes", "cut", "zero", "insert", "copy", "remove")))
        if what == "bit":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "bytes":
            data[at:end] = draw(st.binary(min_size=end - at, max_size=end - at))
        elif what == "cut":
            del data[at:]
        elif what == "zero":
            data[at:end] = bytes(end - at)
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=32))
        elif what == "copy":
            data[at:end] = data[: end - at]
        else:
            del data[at:end]
    return bytes(data)


def small_picture() -> np.ndarray:
    return cv2.resize(np.random.default_rng(0).integers(0, 256, (4, 5, 4), np.uint8), (20, 16))


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """One file of each format and kind of it."""
    rgba = Image.fromarray(small_picture())
    rgb = rgba.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6

    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return (
        saved(rgb, "JPEG", exif=exif),
        saved(rgb, "JPEG", progressive=True),
        saved(rgb.convert("CMYK"), "JPEG"),
        saved(rgb, "PNG", exif=exif),
        saved(rgba.quantize(8), "PNG"),
        saved(rgb.convert("L"), "PNG", transparency=9),
        saved(rgba, "WEBP", lossless=True, exif=exif),
        saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(180)]),
        saved(rgba, "TIFF", tiffinfo={0x0112: 6}),
        saved(rgb, "TIFF", compression="tiff_lzw"),
        saved(rgb, "BMP"),
        saved(rgb, "GIF", save_all=True, append_images=[rgb.rotate(180)]),
        saved(rgba, "AVIF"),
        saved(rgb, "HEIF"),
    )


def check_picture(data: bytes) -> None:
    header, began = read_header(data), time.process_time()
    try:
        pixels = decode_image(data, "k", "p", max_pixels=1_000_000)
    except BadSample as bad:
        assert bad.key == "k" and bad.part == "p" and bad.reason
        return
    finally:  # what takes long here makes room for gigabytes
        assert time.process_time() - began < 2
    assert pixels.dtype == np.uint8 and pixels.ndim in (2, 3) and pixels.shape[2:] in ((), (3,))
    assert header is not None and pixels.shape[:2] == (header.height, header.width)


# Tars

NUMBERS = (b"0000000000\0", b"77777777777\0", b"\x80" + bytes(10) + b"\x07", b"\xff" * 12, b"\x80" + b"\xff" * 11)
NUMBERS += ("²".encode() + bytes(9), b" 12 \0", b"-7\0", b"0o17\0", b"1_0\0", b"9\0", b"")
NAMES = (b"a.png", b"a.txt", b"b/c.png", b"b/c.txt", b"a.b.txt", b".h", b"__meta__", b"x" * 120, b"\xff.txt")
WORDS = ("0", "3", "512", "²", "٣", "-1", "+3", " 3", "1_0", "9" * 19, "9" * 5000, "", "3.0", "0x3", "\0", "nan")


def tar_header(name: bytes, size: bytes, kind: bytes, prefix: bytes = b"", checksum: bytes = b"") -> bytes:
    block = bytearray(512)
    block[: len(name[:100])] = name[:100]
    block[100:108], block[124:136] = b"0000644\0", size[:12].ljust(12, b"\0")
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[345 : 345 + len(prefix[:155])] = prefix[:155]
    block[148:156] = b" " * 8
    block[148:156] = checksum[:8].ljust(8, b"\0") if checksum else b"%06o\0 " % sum(block)
    return bytes(block)


def pax_record(key: str, value: str, length: bytes = b"") -> bytes:
    text = f" {key}={value}\n".encode("utf-8", "surrogatepass")
    count = len(text) + 1
    while len(str(count)) + len(text) != count:
        count += 1
    return (length or str(count).encode()) + text


@st.composite
def tars(draw) -> bytes:
    """Members and headers in any order, of which each field may hold anything, its checksum right most often."""
    tar = b""
    names = st.sampled_from(
        (b"a.png", b"a.txt", b"b/c.png", b"b/c.txt", b"a.b.txt", b".h", b"__meta__", b"x" * 120, b"\xff.txt")
    )
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(
            st.sampled_from((b"0", b"0", b"0", b"\0", b"x", b"x", b"g", b"L", b"K", b"S", b"5", b"2", b"D", b"?"))
        )
        if kind in b"xg":
            keys = st.sampled_from(("size", "path", "mtime", "GNU.sparse.major", "linkpath", ""))
            lengths = st.sampled_from((b"", b"", b"", b"0", b"5", b"-5", b"999999", b"1" * 5000, "²".encode()))
            payload = b"".join(
                pax_record(draw(keys), draw(st.sampled_from(WORDS)), draw(lengths))
                for _ in range(draw(st.integers(0, 3)))
            )
        elif kind in b"LK":
            payload = draw(names) * draw(st.integers(1, 3)) + b"\0"
        else:
            payload = draw(st.sampled_from((b"", b"abc", b"a dog", pictures()[3], b"[" * 3000)))
        size = draw(st.sampled_from((b"%011o\0" % len(payload),) * 6 + NUMBERS))
        checksum = draw(st.sampled_from((b"",) * 8 + (b"0", b"\x80", b"777777")))
        tar += tar_header(draw(names), size, kind, draw(st.sampled_from((b"",) * 4 + (b"p/q",))), checksum)
        tar += payload + bytes(-len(payload) % 512)
    return tar + bytes(draw(st.sampled_from((1024, 1024, 1024, 512, 0, 10240, 1000))))


@functools.cache
def whole_tars() -> tuple[bytes, ...]:
    found = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            names = ["a.png", "a.txt", "b.png", "b.json"]
            if kind != tarfile.USTAR_FORMAT:
                names += ["ü" * 60 + ".png", "ü" * 60 + ".txt"]
            for name in names:
                data = pictures()[3] if name.endswith("png") else b'"a dog"'
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        found.append(buffer.getvalue())
    return tuple(found)


def check_tar(data: bytes) -> None:
    found, damage = [], None
    try:
        for member in members(io.BytesIO(data), len(data)):
            found.append(member)
    except TarDamage as told:
        damage = told
        assert told.message and 0 <= told.byte <= len(data)
    for member in found:
        assert 0 <= member.start < member.payload and member.size >= 0 and member.payload + member.size <= len(data)
    if damage is None and found:
        check_against_tarfile(data, [(one.payload, one.size) for one in found])
    try:
        first_name(data)
    except TarDamage:
        pass
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        path.write_bytes(data)
        index, problems = index_shard(path)
        assert len(index.samples) >= len(index.usable()) and all(str(problem) for problem in problems)
        assert (damage is not None) <= any(problem.byte == damage.byte for problem in problems if damage)


def check_against_tarfile(data: bytes, found: list[tuple[int, int]]) -> None:
    """Of a tar with nothing wrong `tarfile` finds the same members, unless it gives up or reads what we refuse."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", errorlevel=2) as tar:
            theirs = [(one.offset_data, one.size) for one in tar if one.type in (b"0", b"\0", b"7")]
            globals_used = bool(tar.pax_headers)
    except (tarfile.TarError, ValueError, OSError):
        return
    if not globals_used and len(theirs) >= len(found):
        assert theirs == found


# Captions

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("caption", "captions", "text", "a")), inner, max_size=3)
    ),
    max_leaves=6,
)
ODD_TEXTS = (
    b'"\\ud800"',
    b'{"captions": ["a", "\\udc00\\ud800"]}',
    b"[" * 100_000,
    b'"' + b"a" * 150_000 + b'"',
    b"\0",
)
ODD_TEXTS += (
    b"\xef\xbb\xbfa",
    b"\xff\xfea\0",
    b"",
    b"   ",
    b"9" * 5000,
    b'{"caption": NaN}',
    b'{"a":' * 50_000,
    b"\xed\xa0\x80",
)
CAPTIONS = st.tuples(
    st.one_of(
        JSON.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=64),
        st.text(max_size=32).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.sampled_from(ODD_TEXTS),
        spoiled((b'{"captions": ["a dog", "ein B\xc3\xa4r"]}', b'"a \\u00e4 dog"', "a dog \U0001f415".encode())),
    ),
    st.sampled_from(("txt", "json")),
)


def check_caption(given: tuple[bytes, str]) -> None:
    data, extension = given
    try:
        captions = read_captions(data, extension, "k")
    except BadSample as bad:
        assert (bad.key, bad.part) == ("k", extension) and len(str(bad)) < 1000
        return
    assert captions
    for caption in captions:
        assert isinstance(caption, str) and caption.encode() is not None and len(caption) <= MAX_CHARACTERS
    if extension == "txt":
        assert captions == [data.decode("utf-8-sig").strip()]


# Tables

CELLS = st.sampled_from(
    (
        "0.png",
        "1.png",
        "absent.png",
        "",
        "a dog",
        'a "big" dog',
        "a, b",
        "line\nline",
        '"',
        "'",
        " ",
        "\ufeff",
        "\0",
        "ü",
        "5",
        "\r",
    )
)


@st.composite
def csv_files(draw) -> tuple[str, bytes]:
    """Cells that are quoted as they should be, or not, in rows that are as long as the header, or not."""
    header = draw(
        st.sampled_from(
            (["image", "caption"],) * 5 + (["image", "caption", "caption"], ["image"], ["caption", "image", ""])
        )
    )
    rows = [header, *(draw(st.lists(CELLS, min_size=1, max_size=4)) for _ in range(draw(st.integers(0, 4))))]
    if draw(st.booleans()):
        rows = [row if len(row) == len(header) else (row + ["a"] * 4)[: len(header)] for row in rows]
    if draw(st.booleans()):
        buffer = io.StringIO()
        csv.writer(buffer).writerows(rows)
        text = buffer.getvalue()
    else:
        text = "\n".join(",".join(row) for row in rows)
    encoding = draw(st.sampled_from(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "latin-1")))
    return ".csv", text.encode(encoding, "replace")


LINES = st.one_of(
    st.fixed_dictionaries(
        {"image": st.sampled_from(("0.png", "1.png", "absent.png")) | JSON, "caption": JSON | st.text(max_size=9)}
    ),
    JSON,
)
JSONL = st.lists(LINES, max_size=4).map(lambda rows: (".jsonl", "\n".join(map(json.dumps, rows)).encode()))
TYPES = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.binary(),
    pa.large_binary(),
)
TYPES += (
    pa.int64(),
    pa.float64(),
    pa.bool_(),
    pa.null(),
    pa.list_(pa.string()),
    pa.list_(pa.int8()),
    pa.large_list(pa.string()),
)
TYPES += (
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    pa.struct([("path", pa.large_string())]),
    pa.date32(),
)
TYPES += (pa.struct([("bytes", pa.string())]), pa.map_(pa.string(), pa.string()), pa.decimal128(5, 2), pa.binary_view())


def cell_of(kind: pa.DataType) -> st.SearchStrategy:
    names, data = st.sampled_from(("0.png", "1.png", "absent.png", "")), st.sampled_from((pictures()[3], b"", b"junk"))
    if pa.types.is_dictionary(kind) or kind in (pa.string(), pa.large_string(), pa.string_view()):
        return st.none() | names | st.text(max_size=9).filter(lambda text: text.isprintable())
    if kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        return st.none() | data
    if pa.types.is_struct(kind):
        parts = {
            kind.field(number).name: st.none() | (names if kind.field(number).type != pa.binary() else data)
            for number in range(kind.num_fields)
        }
        return st.none() | st.fixed_dictionaries(parts)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return st.none() | st.lists(cell_of(kind.value_type), max_size=2)
    if pa.types.is_integer(kind):
        return st.none() | st.integers(-9, 9)
    return {pa.float64(): st.none() | st.floats(), pa.bool_(): st.none() | st.booleans()}.get(kind, st.none())


@st.composite
def arrow_files(draw) -> tuple[str, bytes]:
    """Columns of any type, with nulls, as Parquet or as Arrow's own."""
    count = draw(st.integers(0, 4))
    columns = {}
    for name in ("image", "caption"):
        kind = draw(st.sampled_from((*TYPES, pa.string(), pa.string())))
        values = [draw(cell_of(kind)) for _ in range(count)]
        columns[name] = (
            pa.array(values, pa.string()).dictionary_encode()
            if pa.types.is_dictionary(kind)
            else pa.array(values, kind)
        )
    table = pa.table(columns)
    if draw(st.booleans()):
        buffer = io.BytesIO()
        try:
            pq.write_table(table, buffer, row_group_size=draw(st.integers(1, 3)), write_statistics=draw(st.booleans()))
            return ".parquet", buffer.getvalue()
        except pa.ArrowException:  # of a type that Parquet does not have
            pass
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return ".arrow", sink.getvalue().to_pybytes()


@functools.cache
def whole_tables() -> tuple[bytes, ...]:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": ["0.png", "1.png"], "caption": ["a", "b"]}), buffer)
    return (buffer.getvalue(),)


TABLES = st.one_of(
    csv_files(),
    JSONL,
    arrow_files(),
    spoiled((b"image,caption\n0.png,a dog\n1.png,\"a, b\"\n",)).map(lambda data: (".csv", data)),
    spoiled((b'{"image": "0.png", "caption": "a"}\n{"image": "1.png", "caption": ["b"]}\n',)).map(
        lambda data: (".jsonl", data)
    ),
    st.deferred(lambda: spoiled(whole_tables())).map(lambda data: (".parquet", data)),
)  # fmt: skip


def check_table(given: tuple[str, bytes]) -> None:
    """Refused by name; or else every row is a sample with a picture and captions, or with the fault that it has."""
    suffix, data = given
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            (Path(folder) / f"{number}.png").write_bytes(encode_png(small_picture()[..., :3]))
        path = Path(folder) / f"t{suffix}"
        path.write_bytes(data)
        for skip_bad in (False, True):
            text_rows.cache_clear()
            try:
                source = open_rows(path, {}, skip_bad=skip_bad)
                identity = source.identity(0, source.count)
                samples = list(source.read(0, source.count))
            except ValueError as error:
                assert f"t{suffix}" in str(error), error
                continue
            except FileNotFoundError as error:
                raise AssertionError(str(error)) from error
            assert len(samples) == source.count > 0 and len(identity) == 32
            for sample in samples:
                if sample.fault is not None:
                    # bytes that are no picture, none at all included, are found when they are packed
                    assert all(sample.fault) and (skip_bad or suffix in (".arrow", ".parquet"))
                    continue
                assert sample.image and sample.captions
                assert all(isinstance(text, str) and text.encode() is not None for text in sample.captions)
            if suffix == ".csv" and not skip_bad:
                rows = [
                    row for row in csv.reader(io.StringIO(path.read_text("utf-8-sig"), newline=""), strict=True) if row
                ]
                where = rows[0].index("caption")
                assert [sample.captions for sample in samples] == [[row[where]] for row in rows[1:]]


# Indexes and manifests


@functools.cache
def whole_set() -> tuple[bytes, bytes, bytes]:
    """A shard, its index and a manifest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        path.write_bytes(whole_tars()[0])
        index, _ = index_shard(path)
        sidecar.write_index(index, sidecar.index_path(path))
        write_manifest([describe_shard(path)], Path(folder) / "manifest.jsonl")
        return path.read_bytes(), sidecar.index_path(path).read_bytes(), (Path(folder) / "manifest.jsonl").read_bytes()


@st.composite
def index_files(draw) -> bytes:
    """A spoiled index, half of them with a digest that vouches for what is there now, as a program's fault would."""
    data = draw(spoiled(whole_set()[1:2]))
    if draw(st.booleans()) and len(data) > sidecar.DIGEST_BYTES:
        body = data[: -sidecar.DIGEST_BYTES]
        if draw(st.booleans()):
            fields = [
                draw(st.sampled_from((0, 1, 2**31, 2**32 - 1))),
                draw(st.integers(0, 2**64 - 1)),
                draw(st.integers(0, 2**40)),
            ]
            body = body[:12] + struct.pack("<IQQ", *fields) + body[32:]
        data = body + sidecar._digest(body)
    return data


def check_index(data: bytes) -> None:
    shard, whole, _ = whole_set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        path.write_bytes(shard)
        sidecar.index_path(path).write_bytes(data)
        try:
            index = sidecar.load_index(sidecar.index_path(path))
        except ValueError as error:
            assert "x.tar.idx" in str(error) and "controlbooth data index" in str(error)
        else:
            assert index.parts.shape == (len(index.samples), len(index.extensions))
            assert len(index.usable()) <= len(index.samples)
            describe_shard(path)
        try:
            open_dataset(path)
        except (ValueError, FileNotFoundError) as error:
            assert "x.tar" in str(error)


@st.composite
def manifests(draw) -> bytes:
    row = json.loads(whole_set()[2])
    for _ in range(draw(st.integers(0, 2))):
        field = draw(st.sampled_from(sorted(row)))
        row[field] = draw(
            JSON | st.sampled_from(("../x.tar", "/", "", "s3://b/x.tar", "\0", -1, 1e400, "x.tar", 10**30))
        )
    if draw(st.booleans()):
        row.pop(draw(st.sampled_from(sorted(row))))
    lines = [
        json.dumps(row),
        *draw(st.lists(st.sampled_from(("", "{}", "[]", "null", "[" * 50_000, '"x"')), max_size=2)),
    ]
    return "\n".join(lines).encode()


MANIFESTS = st.one_of(manifests(), st.deferred(lambda: spoiled(whole_set()[2:])))


def check_manifest(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in zip(("x.tar", "x.tar.idx", "manifest.jsonl"), (*whole_set()[:2], data), strict=True):
            (Path(folder) / name).write_bytes(content)
        path = Path(folder) / "manifest.jsonl"
        try:
            rows = read_manifest(path)
        except ValueError as error:
            assert "manifest.jsonl" in str(error)
            return
        for row in rows:
            assert isinstance(row.uri, str) and all(
                isinstance(n, int) and n >= 0 for n in (row.bytes, row.samples, row.usable)
            )
        try:
            dataset = open_dataset(path)
        except (ValueError, FileNotFoundError) as error:
            assert str(error)
            return
        dataset.samples_per_shard()


FUZZES = (
    Fuzz("pictures", st.deferred(lambda: spoiled(pictures())), check_picture),
    Fuzz("tars", tars(), check_tar),
    Fuzz("spoiled tars", st.deferred(lambda: spoiled(whole_tars())), check_tar),
    Fuzz("captions", CAPTIONS, check_caption),
    Fuzz("tables", TABLES, check_table),
    Fuzz("indexes", index_files(), check_index),
    Fuzz("manifests", MANIFESTS, check_manifest),
)
