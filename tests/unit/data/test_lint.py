import base64
import re

import cv2
import numpy as np
import pytest
import webdataset

from controlbooth.data.inspection.scan import read_sample, scan
from controlbooth.data.scenes.render import render, scene
from controlbooth.data.shards.index import ensure_index
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.sidecar import index_path, load_index
from controlbooth.launch.commands.data_lint import main
from controlbooth.launch.commands.data_stats import main as stats_main

PER_SHARD, SHARDS = 30, 2


def png(pixels):
    return cv2.imencode(".png", pixels if pixels.ndim == 2 else pixels[..., ::-1])[1].tobytes()


def jpeg(pixels, quality):
    return cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def clean(number):
    drawn = render(scene(0, number), 96)
    return {"png": png(drawn.image), "cond.edges.png": png(drawn.edges), "txt": f"scene {number} of many".encode()}


@pytest.fixture(scope="module")
def clean_samples():
    return {f"k{number:03d}": clean(number) for number in range(PER_SHARD * SHARDS)}


def write(folder, samples):
    folder.mkdir(exist_ok=True)
    keys = list(samples)
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"s{shard}.tar"), encoder=False) as writer:
            for key in keys[shard * PER_SHARD : (shard + 1) * PER_SHARD]:
                writer.write({"__key__": key.split("#")[0], **samples[key]})
        ensure_index(folder / f"s{shard}.tar")
    return folder


def image_of(sample):
    return cv2.imdecode(np.frombuffer(sample["png"], np.uint8), cv2.IMREAD_COLOR_RGB)


def lint(capsys, folder, *arguments):
    """-> status, and kind of finding -> its lines."""
    status = main([str(folder), "--workers", "1", *arguments])
    sections = re.split(r"\n\n(?=[a-z ]+: \d+  \()", capsys.readouterr().out)
    return status, {section.split(":")[0]: section for section in sections[1:]}


def test_a_clean_data_set_has_no_findings(tmp_path, clean_samples, capsys):
    folder = write(tmp_path, clean_samples)
    assert lint(capsys, folder, "--decode") == (0, {})
    assert main([str(folder), "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "nothing was found" in shown.out and "--decode finds broken" in shown.err


def spoil(samples, what):
    """One fault in a copy of the samples."""
    spoiled = dict(samples)
    own = dict(samples["k007"])
    if what == "exact copy":
        spoiled["k040"] = samples["k040"] | {"png": own["png"], "cond.edges.png": own["cond.edges.png"]}
    elif what == "near copy":
        smaller = cv2.resize(image_of(own), (80, 80), interpolation=cv2.INTER_AREA)
        condition = cv2.resize(cv2.imdecode(np.frombuffer(own["cond.edges.png"], np.uint8), 0), (80, 80))
        spoiled["k040"] = {"jpg": jpeg(smaller, 98), "cond.edges.png": png(condition), "txt": b"nearly"}
    elif what == "unpaired":
        spoiled["k007"] = own | {"cond.edges.png": samples["k050"]["cond.edges.png"]}
    elif what == "frame":
        spoiled["k007"] = own | {"cond.edges.png": png(np.zeros((96, 40), np.uint8))}
    elif what == "blank condition":
        spoiled["k007"] = own | {"cond.edges.png": png(np.zeros((96, 96), np.uint8))}
    elif what == "blank image":
        spoiled["k007"] = own | {"png": png(np.full((96, 96, 3), 255, np.uint8))}
    elif what == "small":
        small = cv2.resize(image_of(own), (40, 40), interpolation=cv2.INTER_AREA)
        spoiled["k007"] = own | {"png": png(small)}
    elif what == "broken":
        spoiled["k007"] = own | {"png": own["png"][:-400]}
    elif what == "empty caption":
        spoiled["k007"] = own | {"txt": b" \n"}
    elif what == "flagged":
        spoiled["k007"] = {extension: data for extension, data in own.items() if extension != "txt"}
    return spoiled


@pytest.mark.parametrize(
    ("what", "decoded", "where"),
    [
        ("exact copy", False, "s0.tar:k007, s1.tar:k040: 2 samples have this target"),
        ("near copy", True, "s0.tar:k007, s1.tar:k040: 2 samples have nearly this target"),
        ("unpaired", True, "s0.tar:k007: condition edges agrees "),
        ("frame", False, "s0.tar:k007: target and condition edges have different aspect ratios (96x96 and 40x96)"),
        ("blank condition", True, "s0.tar:k007: condition edges shows nothing"),
        ("blank image", True, "s0.tar:k007: all of it has one colour"),
        ("small", False, "s0.tar:k007: 40 x 40 pixels, asked for are 64"),
        ("broken", True, "s0.tar:k007: png: the image cannot be decoded"),
        ("empty caption", False, "s0.tar:k007: its caption is empty"),
        ("flagged", False, "s0.tar: 1 samples: no caption (the first at byte "),
    ],
)
def test_each_fault_is_found_and_named(tmp_path, clean_samples, capsys, what, decoded, where):
    folder = write(tmp_path, spoil(clean_samples, what))
    status, found = lint(capsys, folder, "--decode")
    assert status == 1 and where in found[what] and found[what].startswith(f"{what}: 1  (")
    assert set(found) == {what}
    status, found = lint(capsys, folder)
    assert (status, set(found)) == ((0, set()) if decoded else (1, {what}))


def test_equal_keys_in_different_shards_are_no_fault(tmp_path, clean_samples, capsys):
    samples = {("k007#2" if key == "k050" else key): sample for key, sample in clean_samples.items()}
    assert lint(capsys, write(tmp_path, samples), "--decode") == (0, {})


def test_samples_in_shards_of_one_name_are_told_by_where_these_lie(tmp_path, clean_samples, capsys):
    for name in "ab":
        write(tmp_path / name, clean_samples)
    _, found = lint(capsys, f"{tmp_path}/*/s0.tar")
    assert f"{tmp_path}/a/s0.tar:k000, {tmp_path}/b/s0.tar:k000: 2 samples have this target" in found["exact copy"]


def test_bytes_that_changed_since_indexing_are_found_without_decoding(tmp_path, clean_samples, capsys):
    folder = write(tmp_path, clean_samples)
    index = load_index(index_path(folder / "s1.tar"))
    data = bytearray((folder / "s1.tar").read_bytes())
    at = int(index.samples["offset"][4]) + int(index.parts[4][index.extensions.index("png")]["offset"])
    data[at + 60] ^= 4
    (folder / "s1.tar").write_bytes(data)
    status, found = lint(capsys, folder)
    assert status == 1 and "s1.tar:k034: png: its bytes have changed since they were indexed" in found["broken"]


def test_conditions_that_all_belong_to_other_pictures_are_one_finding(tmp_path, clean_samples, capsys):
    keys = list(clean_samples)
    moved = dict(zip(keys, keys[7:] + keys[:7], strict=True))
    samples = {k: v | {"cond.edges.png": clean_samples[moved[k]]["cond.edges.png"]} for k, v in clean_samples.items()}
    status, found = lint(capsys, write(tmp_path, samples), "--decode")
    assert status == 1 and set(found) == {"pairing"} and "condition edges: only " in found["pairing"]


def test_processes_find_what_one_does(tmp_path, clean_samples):
    dataset = open_dataset(write(tmp_path, spoil(clean_samples, "broken")))
    one, two = (scan(dataset, ["edges"], decode=True, workers=workers) for workers in (1, 2))
    for name in ("digests", "sizes", "hashes", "caption_hashes", "caption_owners", "caption_words"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert np.allclose(one.scores["edges"], two.scores["edges"], atol=1e-5, equal_nan=True)
    assert one.faults == two.faults and len(one.faults) == 1
    assert np.isnan(one.scores["edges"]).sum() == 1 and len(one.negatives["edges"]) > 200


def test_samples_are_read_again_by_their_number(tmp_path, clean_samples):
    samples = {key: dict(sample) for key, sample in clean_samples.items()}
    del samples["k005"]["cond.edges.png"]
    dataset = open_dataset(write(tmp_path, samples))
    assert read_sample(dataset, 5, "edges").condition is None
    for number in (0, 29, 30, 59):
        assert read_sample(dataset, number).key == f"k{number:03d}"
        assert read_sample(dataset, number, "edges").condition == clean_samples[f"k{number:03d}"]["cond.edges.png"]


def test_the_report_is_one_file_with_the_pictures_in_it(tmp_path, clean_samples):
    samples = spoil(spoil(clean_samples, "exact copy"), "empty caption")
    samples["k020"] = samples["k020"] | {"png": samples["k020"]["png"][:-400], "txt": b"<script>alert(1)</script>"}
    folder = write(tmp_path / "set", samples)
    page = tmp_path / "report.html"
    assert main([str(folder), "--decode", "--workers", "1", "--report", str(page)]) == 1
    text = page.read_text()
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(pictures) == 3  # two copies and the empty caption; of the broken one there is no picture
    assert text.count('class="missing"') == 1
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(pictures[0]), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (160, 160, 3)
    assert "<b>s1.tar:k040</b> scene 40 of many" in text and "&lt;script&gt;" in text
    assert open_dataset(folder).fingerprint in text


def test_stats_tell_captions_and_sizes(tmp_path, clean_samples, capsys):
    samples = {key: dict(sample) for key, sample in clean_samples.items()}
    for number in range(10, 16):
        samples[f"k{number:03d}"] = samples[f"k{number:03d}"] | {"txt": b"the same words"}
    samples["k020"] = samples["k020"] | {"txt": b""}
    del samples["k021"]["txt"]
    samples["k021"]["json"] = b'{"captions": ["one", "two words"]}'
    folder = write(tmp_path, samples)
    assert stats_main([str(folder), "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "captions      61 of 60 samples; 56 different, 6 (9.8%) come more than once" in text
    assert "6 (9.8%)  'the same words'" in text and "empty       1 (1.6%)" in text
    assert "words       least 0, 5 % 3, median 4, 95 % 4, most 4" in text
    assert "60 (100.0%)  96 x 96" in text and "cond.edges.png               60" in text
