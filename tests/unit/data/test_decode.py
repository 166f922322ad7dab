import io

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from controlbooth.data.conditions.networks import normals_of_depth
from controlbooth.data.pictures.headers import image_size, read_header
from controlbooth.data.pictures.images import BadSample, crop_slack, decode_image, prepare, same_frame, write_planes
from controlbooth.data.scenes.render import render, scene

RNG = np.random.default_rng(0)
PICTURE = cv2.resize(RNG.integers(0, 256, (6, 8, 3), np.uint8), (40, 30), interpolation=cv2.INTER_CUBIC)


def encode(pixels, extension, *options):
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    return cv2.imencode(extension, bgr, list(options))[1].tobytes()


def pil_bytes(image, extension, **options):
    buffer = io.BytesIO()
    image.save(buffer, extension, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [encode(PICTURE, ".png"), encode(PICTURE, ".webp", cv2.IMWRITE_WEBP_QUALITY, 101)])
def test_lossless_formats_come_back_exactly_and_in_rgb(data):
    assert np.array_equal(decode_image(data, "k", "png"), PICTURE)
    assert image_size(data) == (40, 30)


def test_jpeg_comes_back_in_rgb_and_nearly():
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(PICTURE), quality=95, colorsubsampling="444")
    assert np.abs(decode_image(data, "k", "jpg").astype(int) - PICTURE).mean() < 3
    assert image_size(data) == (40, 30)


def test_one_channel_stays_one_channel():
    gray = PICTURE[..., 0].copy()
    assert np.array_equal(decode_image(encode(gray, ".png"), "k", "png"), gray)
    assert decode_image(simplejpeg.encode_jpeg(gray[..., None], colorspace="GRAY"), "k", "jpg").shape == (30, 40)


def test_palette_bit_and_sixteen_bit_images_are_read():
    palette = Image.fromarray(PICTURE).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decode_image(pil_bytes(palette, "PNG"), "k", "png"), expected)
    bits = Image.fromarray(np.eye(8, dtype=bool))
    assert np.array_equal(decode_image(pil_bytes(bits, "PNG"), "k", "png"), np.eye(8, dtype=np.uint8) * 255)
    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    assert decode_image(encode(deep, ".png"), "k", "png").tolist() == [[0, 0, 1, 255]]


def test_transparent_pixels_show_the_background():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    data = pil_bytes(Image.fromarray(pixels), "PNG")
    assert decode_image(data, "k", "png")[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert decode_image(data, "k", "png", background=0)[1, 1].tolist() == [0, 0, 0]


def test_cmyk_photographs_are_read():
    image = Image.fromarray(PICTURE).convert("CMYK")
    pixels = decode_image(pil_bytes(image, "JPEG", quality=95), "k", "jpg")
    assert pixels.shape == (30, 40, 3)
    assert np.abs(pixels.astype(int) - PICTURE).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
    image = Image.fromarray(PICTURE)
    image.getexif()[0x0112] = orientation
    data = pil_bytes(image, "JPEG", quality=95, exif=image.getexif())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert read_header(data).orientation == orientation
    pixels = decode_image(data, "k", "jpg")
    assert pixels.shape == expected.shape and np.abs(pixels.astype(int) - expected).mean() < 1
    assert image_size(data) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_webp_sizes_are_read_from_all_three_headers(lossless, alpha):
    image = Image.fromarray(PICTURE).convert("RGBA" if alpha else "RGB")
    if alpha:
        image.putalpha(128)
    assert image_size(pil_bytes(image, "WEBP", lossless=lossless)) == (40, 30)


JPEG, PNG, WEBP = (encode(PICTURE, extension) for extension in (".jpg", ".png", ".webp"))


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", JPEG[:3], JPEG[:-20], PNG[:-30], PNG[:20], WEBP[:-30]])
def test_damaged_images_name_the_key_and_the_part(data):
    with pytest.raises(BadSample, match="sample 'some/key', part 'cond.x.png'"):
        decode_image(data, "some/key", "cond.x.png")


def test_a_flipped_byte_in_a_png_is_noticed():
    damaged = bytearray(PNG)
    damaged[len(PNG) // 2] ^= 1
    with pytest.raises(BadSample):
        decode_image(bytes(damaged), "k", "png")


@pytest.mark.parametrize("data", [b"", b"GIF89a", JPEG[:3], PNG[:10], WEBP[:20], b"\xff\xd8\xff\xe1\xff\xff"])
def test_a_size_that_cannot_be_told_is_zero(data):
    assert image_size(data) == (0, 0)


def test_target_and_condition_are_cut_alike():
    condition = PICTURE[..., 0].copy()
    for crop, flip in [((0, 0), False), ((0, 10), True), (None, False), (None, True)]:
        pixels, conditioning = prepare(PICTURE, condition, "edges", (30, 30), crop, flip)
        left = 5 if crop is None else crop[1]
        expected = PICTURE[:, left : left + 30]
        assert np.array_equal(pixels, expected[:, ::-1] if flip else expected)
        assert np.array_equal(conditioning, pixels[..., 0])


def test_mirrored_normals_are_the_normals_of_the_mirrored_relief():
    nearness = cv2.resize(RNG.random((5, 7), np.float32), (40, 30), interpolation=cv2.INTER_CUBIC)
    normals = normals_of_depth(nearness)
    _, mirrored = prepare(PICTURE, normals, "normals", (30, 40), flip=True)
    expected = normals_of_depth(np.ascontiguousarray(nearness[:, ::-1]))
    assert np.abs(mirrored.astype(int) - expected).max() <= 1  # 0 is between two levels
    assert np.abs(normals[:, ::-1].astype(int) - expected).max() > 50


def test_pixels_that_face_the_viewer_or_have_no_normal_stay_what_they_are_when_mirrored():
    what = scene(0, 1)
    normals = render(what, 30).normals
    normals[:, :3] = 0
    _, mirrored = prepare(normals, normals, "normals", (30, 30), flip=True)
    assert not mirrored[:, -3:].any()
    flat = (normals == (128, 128, 255)).all(axis=2)
    assert flat.sum() > 100 and (mirrored[:, ::-1][flat] == (128, 128, 255)).all()
    black = np.zeros((30, 30), np.uint8)  # as it is stored: one channel
    assert not prepare(normals, black, "normals", (30, 30), flip=True)[1].any()


def test_planes_are_filled_in_place_with_one_channel_three_times():
    batch = np.zeros((2, 3, 30, 30), np.uint8)
    write_planes(PICTURE[:, 5:35], batch[0])
    write_planes(PICTURE[:, 5:35, 1], batch[1])
    assert np.array_equal(batch[0], PICTURE[:, 5:35].transpose(2, 0, 1))
    assert all(np.array_equal(plane, PICTURE[:, 5:35, 1]) for plane in batch[1])


@pytest.mark.parametrize("wanted", [(8, 8), (15, 15), (64, 64), (16, 48), (48, 16), (7, 11)])
@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (31, 33), (30, 30), (10, 90)])
def test_every_crop_within_the_slack_fits(shape, wanted):
    picture = cv2.resize(PICTURE, shape[::-1])
    down, right = crop_slack(*shape, wanted)
    assert min(down, right) == 0
    for crop in [(0, 0), (down, right)]:
        pixels, _ = prepare(picture, None, None, wanted, crop)
        assert pixels.shape == (*wanted, 3)


def test_a_condition_of_another_scale_fits_and_of_another_shape_does_not():
    small = cv2.resize(PICTURE, (20, 15))
    assert prepare(PICTURE, small, "blur", (30, 30))[1].shape == (30, 30, 3)
    with pytest.raises(ValueError, match=r"different aspect ratios \(40x30 and 30x30\)"):
        prepare(PICTURE, PICTURE[:, :30], "blur", (30, 30))


def test_labels_are_not_mixed_when_resized():
    labels = np.kron(RNG.choice([0, 31, 248], (10, 10)), np.ones((3, 3))).astype(np.uint8)
    image = np.zeros((30, 30, 3), np.uint8)
    for resolution in (17, 64):
        assert set(np.unique(prepare(image, labels, "segmentation", (resolution, resolution))[1])) == {0, 31, 248}
        assert len(np.unique(prepare(image, labels, "depth", (resolution, resolution))[1])) > 3


def test_sizes_that_were_rounded_are_the_same_frame():
    for one, other in [((375, 500), (384, 512)), ((333, 500), (683, 1024)), ((64, 64), (512, 512))]:
        assert same_frame(one, other) and same_frame(other, one)
    assert not same_frame((375, 500), (500, 375)) and not same_frame((512, 512), (512, 500))
