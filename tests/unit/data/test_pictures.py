"""Pictures of every kind that people have: upright, opaque, whole, and of a size that a machine can hold."""

import io
import resource
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pillow_heif
import pytest
import webdataset
from PIL import Image, ImageOps

from controlbooth.data.loading.held_out import held_out
from controlbooth.data.packing.annotate import conditions_of
from controlbooth.data.packing.folders import IMAGE_SUFFIXES, files_below, is_picture, left_out
from controlbooth.data.packing.pack import encode_parts
from controlbooth.data.packing.sources import SourceSample
from controlbooth.data.pictures.headers import ORIENTATION, image_size, read_header
from controlbooth.data.pictures.images import BadSample, decode_image
from controlbooth.data.shards.index import ensure_index
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.trainer.dreambooth.images import read_picture
from controlbooth.trainer.dreambooth.manifest import find_images

pillow_heif.register_heif_opener()
RNG = np.random.default_rng(0)
PIXELS = cv2.resize(RNG.integers(0, 256, (5, 7, 4), np.uint8), (96, 64), interpolation=cv2.INTER_CUBIC)
"""(64, 96, 4): soft, so that lossy formats keep it, and no two sides alike."""
RGB = Image.fromarray(PIXELS[..., :3])


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(pixels, orientation):
    """What viewers show of stored pixels, (H, W, 3), by Pillow's own turning."""
    image = Image.fromarray(pixels)
    image.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def exif(orientation, order="<", kind=3):
    """A TIFF header with the tag alone. kind: 1 a byte, 3 a short, 4 a long."""
    value = struct.pack(order + {1: "Bxxx", 3: "Hxx", 4: "I"}[kind], orientation)
    entry = struct.pack(order + "HHI", ORIENTATION, kind, 1) + value
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def with_png_chunk(data, kind, contents, before=b"IEND"):
    at = data.rindex(before) - 4
    chunk = struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))
    return data[:at] + chunk + data[at:]


def in_container(name, orientation):
    """The picture in a file that says how it is to be turned."""
    if name.startswith("jpeg"):
        _, order, kind = name.split()
        return saved(RGB, "JPEG", quality=95, exif=b"Exif\0\0" + exif(orientation, order, int(kind)))
    if name == "png, exif at the end":
        return with_png_chunk(saved(RGB, "PNG"), b"eXIf", exif(orientation, ">"))
    if name == "png of ImageMagick":
        profile = (b"Exif\0\0" + exif(orientation)).hex().encode()
        text = b"Raw profile type exif\0\nexif\n%8d\n" % (len(profile) // 2) + profile + b"\n"
        return with_png_chunk(saved(RGB, "PNG"), b"tEXt", text, before=b"IDAT")
    if name.startswith("tiff"):
        return saved(RGB, "TIFF", tiffinfo={ORIENTATION: orientation}, compression=name.partition(" ")[2] or None)
    if name == "heic":
        image = RGB.copy()
        image.info["exif"] = b"Exif\0\0" + exif(orientation)  # from which the encoder makes the container's own turn
        return saved(image, "HEIF", quality=90)
    options = {"webp": {"lossless": True}, "avif": {"quality": 90}}.get(name, {})
    return saved(RGB, name.upper(), exif=b"Exif\0\0" + exif(orientation), **options)


CONTAINERS = (
    *(f"jpeg {order} {kind}" for order in "<>" for kind in (1, 3, 4)),
    *("png", "png, exif at the end", "png of ImageMagick", "webp", "tiff", "tiff tiff_lzw", "avif", "heic"),
)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_whatever_container_says_how_they_were_taken(container, orientation):
    data = in_container(container, orientation)
    expected = turned(PIXELS[..., :3], orientation)
    pixels = decode_image(data, "k", "image")
    assert pixels.shape == expected.shape and np.abs(pixels.astype(int) - expected).mean() < 4
    assert image_size(data) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize(
    "contents", [b"II*\0", b"XX*\0\x08\0\0\0", b"", exif(0), exif(9), b"MM\0*\xff\xff\xff\xff\0\1"]
)
@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_exif_that_cannot_be_read_turns_nothing(name, contents):
    image = saved(RGB, name.upper(), exif=b"Exif\0\0" + contents) if name != "png" else saved(RGB, "PNG")
    data = with_png_chunk(image, b"eXIf", contents, b"IDAT") if name == "png" else image
    assert decode_image(data, "k", name).shape == (64, 96, 3) and read_header(data).orientation == 1


@pytest.mark.parametrize("orientation", [6, 7])
def test_every_way_of_reading_a_picture_turns_it_alike(tmp_path, orientation):
    data = in_container("webp", orientation)
    upright = turned(PIXELS[..., :3], orientation)
    packed = encode_parts(SourceSample("a", "a", data, {"blur": data}, ["a"]), ["gray"])
    gray, blur = (decode_image(packed[f"cond.{kind}.png"], "a", kind) for kind in ("gray", "blur"))
    assert np.array_equal(blur, upright) and np.array_equal(gray, cv2.cvtColor(upright, cv2.COLOR_RGB2GRAY))
    annotated = conditions_of("a", {"webp": data}, {"same": lambda image, bits: image})
    assert np.array_equal(decode_image(annotated["cond.same.png"], "a", "same"), upright)
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "webp": data, "cond.blur.webp": data, "txt": b"a"})
    assert ensure_index(tmp_path / "a.tar") == []
    (sample,) = held_out(open_dataset(tmp_path), 1, condition="blur", resolution=64)
    middle = upright[16:80]
    assert np.array_equal(sample.pixel_values.transpose(1, 2, 0), middle)
    assert np.array_equal(sample.conditioning.transpose(1, 2, 0), middle)
    (tmp_path / "a.webp").write_bytes(data)
    assert np.array_equal(read_picture(tmp_path / "a.webp", 64).transpose(1, 2, 0), middle)


def translucent():
    """name -> (file, (H, W, 4) what it shows): every way of transparency that a file can have."""
    rgba = Image.fromarray(PIXELS)
    palette = rgba.quantize(16)
    gray, keyed = RGB.convert("L"), RGB.quantize(16)
    level, colour = int(np.asarray(gray)[5, 5]), tuple(PIXELS[5, 5, :3].tolist())
    two_bits = (np.indices((64, 96)).sum(axis=0) // 16 % 4).astype(np.uint8)
    files = {
        "rgba png": saved(rgba, "PNG"),
        "gray and alpha png": saved(rgba.convert("LA"), "PNG"),
        "palette png": saved(palette, "PNG"),
        "palette png, one colour": saved(keyed, "PNG", transparency=3),
        "rgb png, one colour": saved(RGB, "PNG", transparency=colour),
        "gray png, one level": saved(gray, "PNG", transparency=level),
        "rgba webp": saved(rgba, "WEBP", lossless=True, exact=True),
        "gif": saved(keyed, "GIF", transparency=2),
        "rgba tiff": saved(rgba, "TIFF"),
        "rgba tiff, packed": saved(rgba, "TIFF", compression="tiff_lzw"),
        "gray and alpha tiff": saved(rgba.convert("LA"), "TIFF"),
    }
    shown = {name: np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")) for name, data in files.items()}
    # what Pillow does not read as it is meant
    files["rgba png of 16 bits"] = cv2.imencode(".png", PIXELS[..., [2, 1, 0, 3]].astype(np.uint16) * 257)[1].tobytes()
    shown["rgba png of 16 bits"] = PIXELS
    packed = np.packbits(np.unpackbits(two_bits[..., None], axis=2)[..., 6:].reshape(64, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    png = b"\x89PNG\r\n\x1a\n" + bytes.fromhex("00000000") + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    for kind, contents in (
        (b"IHDR", struct.pack(">IIBBBBB", 96, 64, 2, 0, 0, 0, 0)),
        (b"tRNS", b"\0\2"),
        (b"IDAT", zlib.compress(rows)),
    ):
        png = with_png_chunk(png, kind, contents)
    files["gray png of 2 bits, one level"] = png
    levels = np.repeat(two_bits[..., None] * 85, 4, axis=2)
    levels[..., 3] = np.where(two_bits == 2, 0, 255)
    shown["gray png of 2 bits, one level"] = levels
    return {name: (data, shown[name]) for name, data in files.items()}


TRANSLUCENT = translucent()


@pytest.mark.parametrize("background", [255, 0])
@pytest.mark.parametrize("name", TRANSLUCENT)
def test_transparency_is_applied_once_in_every_mode(name, background):
    data, shown = TRANSLUCENT[name]
    share = shown[..., 3:].astype(float) / 255
    expected = shown[..., :3] * share + background * (1 - share)
    pixels = decode_image(data, "k", "image", background)
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    assert np.abs(pixels - expected).max() <= 0.51


@pytest.mark.parametrize("background", [255, 0])
def test_colours_that_are_multiplied_already_are_not_multiplied_again(background):
    """ExtraSamples 1 of TIFF: alpha belongs to colours that are stored multiplied by it."""
    multiplied = np.asarray(Image.fromarray(PIXELS).convert("RGBa"))
    data = saved(Image.fromarray(multiplied), "TIFF")
    data = data.replace(struct.pack("<HHII", 338, 3, 1, 2), struct.pack("<HHII", 338, 3, 1, 1))
    share = PIXELS[..., 3:].astype(float) / 255
    expected = PIXELS[..., :3] * share + background * (1 - share)
    assert np.abs(decode_image(data, "k", "tiff", background) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_gray_of_16_bits_keeps_its_upper_8(kind):
    deep = np.arange(0, 65536, 17, dtype=np.uint16)[: 60 * 64].reshape(60, 64)
    assert np.array_equal(decode_image(saved(Image.fromarray(deep), kind), "k", "image"), deep >> 8)


@pytest.mark.parametrize("values", [np.int32, np.float32])
def test_values_without_a_known_range_are_refused(values):
    with pytest.raises(BadSample, match="store the image with 8 or 16 bits a channel"):
        decode_image(saved(Image.fromarray(PIXELS[..., 0].astype(values)), "TIFF"), "k", "tiff")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_taken(kind):
    others = [RGB.transpose(Image.Transpose.ROTATE_180), Image.new("RGB", RGB.size)]
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    data = saved(RGB, kind, save_all=True, append_images=others, **options)
    assert np.abs(decode_image(data, "k", "image").astype(int) - PIXELS[..., :3]).mean() < (
        8 if kind == "GIF" else 0.01
    )


JPEG = {
    "baseline": saved(RGB, "JPEG", quality=90),
    "progressive": saved(RGB, "JPEG", quality=90, progressive=True),
    "gray": saved(RGB.convert("L"), "JPEG", quality=90),
    "cmyk": saved(RGB.convert("CMYK"), "JPEG", quality=90),
}


@pytest.mark.parametrize("kind", JPEG)
def test_bytes_too_many_in_a_jpeg_harm_nothing(kind):
    data = JPEG[kind]
    whole, end, scan = decode_image(data, "k", "jpg"), data.rindex(b"\xff\xd9"), data.index(b"\xff\xda")
    others = [
        data[:end] + b"\x12" * 258 + data[end:],
        data[:end] + b"\0" * 3 + data[end:],
        data[:scan] + b"\x55" * 40 + data[scan:],
        data + b"after the end",
        data if kind == "progressive" else data[:end],  # nothing but the end marker is missing
        data[:scan] + b"\x55" * 40 + data[scan:end] + b"\x12" * 100 + data[end:],
    ]
    for number, other in enumerate(others):
        assert np.array_equal(decode_image(other, "k", "jpg"), whole), number
        assert image_size(other) == (96, 64)


@pytest.mark.parametrize("kind", JPEG)
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_a_jpeg_of_which_pixels_are_missing_is_damaged_with_or_without_stray_bytes(kind, share):
    data = JPEG[kind]
    scan = data.index(b"\xff\xda") + 14
    cut = data[: scan + int((len(data) - scan) * share)]
    others = (
        [cut] if kind == "progressive" else [cut, cut + b"\xff\xd9", cut + b"\x12" * 3 + b"\xff\xd9", cut + bytes(3)]
    )
    for other in others:  # the end of a progressive one is a scan of its own, of which nothing need be there
        with pytest.raises(BadSample, match="cannot be decoded"):
            decode_image(other, "k", "jpg")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF"])
def test_files_that_were_cut_are_damaged_in_every_format(kind):
    data = saved(RGB, kind)
    for length in (12, len(data) // 3, len(data) * 2 // 3, len(data) - len(data) // 10):
        with pytest.raises(BadSample, match="sample 'k', part 'p': the image cannot be decoded"):
            decode_image(data[:length], "k", "p")


def test_a_png_that_states_a_chunk_of_gigabytes_is_damaged_and_takes_no_room(tmp_path):
    data = with_png_chunk(saved(RGB, "PNG"), b"tEXt", b"a\0b", before=b"IDAT")
    at = data.index(b"tEXt") - 4
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSample, match=r"bytes of its chunk b'tEXt' are missing"):
        decode_image(data[:at] + struct.pack(">I", 2**31 - 5) + data[at + 4 :], "k", "png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def blank_png(width, height):
    """A bomb: its header alone says how large it is."""
    packed = zlib.compress(bytes((1 + width) * 10))
    header = with_png_chunk(saved(RGB, "PNG")[:8] + bytes(4) + b"IEND" + bytes(4), b"IDAT", packed)
    return with_png_chunk(header, b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), before=b"IDAT")


def test_a_picture_over_the_limit_is_bad_by_its_header_with_the_figure():
    with pytest.raises(BadSample, match=r"30000 x 30000 pixels, 900\.0 million, and the limit is 200 million"):
        decode_image(blank_png(30_000, 30_000), "k", "png")
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF"):
        data = saved(RGB, kind)
        assert decode_image(data, "k", "p", max_pixels=64 * 96).shape[:2] == (64, 96)
        with pytest.raises(BadSample, match=r"96 x 64 pixels.*raise data\.max_pixels"):
            decode_image(data, "k", "p", max_pixels=64 * 96 - 1)


SHORT_OF_MEMORY = """
import ctypes, io, resource
import cv2, numpy as np
from PIL import Image
from controlbooth.data.pictures.images import BadSample, OutOfMemory, decode_image
cv2.setNumThreads(1)
pixels = np.kron(np.random.default_rng(0).integers(0, 256, (20, 20, 4), np.uint8), np.ones((100, 100, 1), np.uint8))
image = Image.fromarray(pixels)
def saved(kind, mode="RGB", **options):
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()
files = {
    "progressive": saved("JPEG", progressive=True), "png": saved("PNG", compress_level=1), "gif": saved("GIF", "L"),
    "webp": saved("WEBP", "RGBA", method=0, lossless=True, quality=0), "tiff": saved("TIFF", compression="tiff_lzw"),
    "avif": saved("AVIF", speed=10),
}
def size():
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for name, data in files.items():
    decode_image(data, name, "p")  # what libraries need once is there
    for mebibytes in (1, 6, 20, 500):
        resource.setrlimit(resource.RLIMIT_AS, (size() + mebibytes * 2**20, resource.RLIM_INFINITY))
        try:
            decode_image(data, name, "p")
            told = "read"
        except OutOfMemory as error:
            told = "short" if name in str(error) and "2000 x 2000" in str(error) else str(error)
        except BadSample as error:
            told = f"damaged: {error}"
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(name, told, sep=":")
"""


@pytest.mark.slow
def test_a_lack_of_memory_is_never_taken_for_damage():
    settings = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], env=settings, capture_output=True, text=True)
    told = [tuple(line.split(":", 1)) for line in done.stdout.splitlines()]
    assert {what for _, what in told} == {"read", "short"}, (told, done.stderr)
    assert len({name for name, what in told if what == "short"}) >= 4
    assert told[3::4] == [(name, "read") for name, _ in told[3::4]] and len(told) == 6 * 4


RUN_SHORT_OF_MEMORY = """
import ctypes, resource, sys
from pathlib import Path
from controlbooth.data.pictures.images import OutOfMemory
from controlbooth.data.loading.loader import Loader
from controlbooth.data.order.settings import DrawSettings, OrderSettings
from controlbooth.data.shards.manifest import open_dataset
folder = Path(sys.argv[1])
loader = Loader(
    open_dataset(folder), OrderSettings(0, 1, 1, 1, condition=None, resolution=64),
    DrawSettings(0.0, False, False, 1000),
    micro_batch_size=1, rank=0, world_size=1, latent_shape=(4, 8, 8), threads=1, max_bad_rate=1.0, prefetch_steps=0,
    ledger_path=folder / "ledger.jsonl", positions=range(2),
)
next(loader)
ctypes.CDLL(None).malloc_trim(0)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 30 * 2**20, resource.RLIM_INFINITY))
try:
    next(loader)
except OutOfMemory as error:
    print(error)
"""


@pytest.mark.slow
def test_a_run_that_is_short_of_memory_ends_with_the_picture_and_nothing_in_the_ledger(tmp_path):
    """Both samples are of 6000 x 6000 pixels, 100 MiB: the first is read before the limit is set."""
    rows = zlib.compress(bytes(1 + 3 * 6000) * 6000)
    png = with_png_chunk(saved(RGB, "PNG")[:8] + bytes(4) + b"IEND" + bytes(4), b"IDAT", rows)
    png = with_png_chunk(png, b"IHDR", struct.pack(">IIBBBBB", 6000, 6000, 8, 2, 0, 0, 0), before=b"IDAT")
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for key in ("a", "b"):
            writer.write({"__key__": key, "png": png, "txt": b"a"})
    assert ensure_index(tmp_path / "a.tar") == []
    settings = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", RUN_SHORT_OF_MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert "part 'png': there is no memory left for this picture of 6000 x 6000 pixels (103 MiB" in done.stdout, (
        done.stderr
    )
    assert "Nothing is wrong with it" in done.stdout and not (tmp_path / "ledger.jsonl").exists()


def test_suffixes_are_pictures_hidden_files_are_none_and_links_are_followed_once(tmp_path):
    for name in ("dog/a.JPG", "dog/b.heic", "dog/._b.heic", ".cache/c.png", "dog/notes.txt", "dog/d.psd", "dog/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "f.webp").touch()
    (tmp_path / "elsewhere" / "around").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to("dog")
    files = list(files_below(tmp_path))
    assert sorted(str(path.relative_to(tmp_path)) for path in files if is_picture(path)) == [
        "dog/a.JPG", "dog/b.heic", "elsewhere/f.webp",
    ]  # fmt: skip
    assert left_out(files) == "1 .psd, 1 without a suffix" and ".avif" in IMAGE_SUFFIXES


def test_pictures_of_subjects_are_those_that_are_packed_and_others_are_counted(tmp_path):
    for name, data in (("a.HEIC", "heic"), ("b.gif", "gif"), ("c.avif", "avif")):
        (tmp_path / name).write_bytes(saved(RGB, {"heic": "HEIF"}.get(data, data.upper())))
    for name in ("._a.heic", "d.psd", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = find_images(tmp_path)
    assert [path.name for path in found] == ["a.HEIC", "b.gif", "c.avif"]
    for path in found:
        shown = np.asarray(Image.open(path).convert("RGB"))[:, 16:80]
        assert np.array_equal(read_picture(path, 64).transpose(1, 2, 0), shown)
    assert left_out(tmp_path.iterdir()) == "1 .psd"
