"""`data pack --held-out`: two sets at once, apart by content, of all folders, and the same ones at every attempt."""

import json
import shutil
from collections import Counter

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.order.draws import content_hash
from controlbooth.data.packing.split import NOTES, choose_rows, held_out_count
from controlbooth.data.pictures.likeness import NEAR_BITS, perceptual_hash
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.reader import ShardReader
from controlbooth.launch.commands.data_pack import main

CLASSES, EACH = 5, 12


def picture(*numbers):
    """Coarse noise: pictures of other numbers have hashes that differ in half of their bits."""
    coarse = np.random.default_rng(numbers).integers(0, 256, (12, 12, 3), np.uint8)
    return cv2.resize(coarse, (48, 48), interpolation=cv2.INTER_CUBIC)


def encoded(pixels, *options):
    return cv2.imencode(".jpg" if options else ".png", pixels, list(options))[1].tobytes()


@pytest.fixture
def pictures(tmp_path):
    """60 pictures in five folders; of the first of each folder a near and an exact copy in another folder."""
    root = tmp_path / "pictures"
    for kind in range(CLASSES):
        for number in range(EACH):
            folder = root / f"class{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02d}.png").write_bytes(encoded(picture(kind, number)))
        other = root / f"class{(kind + 1) % CLASSES}"
        other.mkdir(exist_ok=True)
        (other / "near.jpg").write_bytes(encoded(picture(kind, 0), cv2.IMWRITE_JPEG_QUALITY, 60))
        (other / "exact.png").write_bytes(encoded(picture(kind, 0)))
    return root


def run(*arguments):
    return main([str(argument) for argument in (*arguments, "--workers", 1, "--caption", "x")])


def images(folder):
    """Of a packed set: key -> bytes of the target."""
    dataset = open_dataset(folder)
    reader = ShardReader(dataset, None)
    try:
        counts = enumerate(dataset.samples_per_shard().tolist())
        samples = [reader.read(shard, ordinal) for shard, count in counts for ordinal in range(count)]
    finally:
        reader.close()
    return {sample.key: sample.image for sample in samples}


def hashes(data):
    pixels = [cv2.imdecode(np.frombuffer(one, np.uint8), cv2.IMREAD_COLOR_RGB) for one in data]
    return np.stack([perceptual_hash(one) for one in pixels])


def test_both_sets_are_written_and_apart_by_content_near_copies_too(pictures, tmp_path):
    assert run(pictures, "-o", tmp_path / "out", "--held-out", "20%") == 0
    train, held = images(tmp_path / "out/train"), images(tmp_path / "out/held-out")
    assert len(train) + len(held) == CLASSES * (EACH + 2) and train.keys().isdisjoint(held)
    assert 12 <= len(held) <= 14
    distances = np.bitwise_count(hashes(train.values())[:, None] ^ hashes(held.values())).sum(axis=2)
    assert distances.min() > NEAR_BITS
    assert len({key.split("/")[0] for key in held}) == CLASSES
    assert max(Counter(key.split("/")[0] for key in held).values()) <= 5


def test_a_dry_run_says_how_many_go_where_and_writes_nothing(pictures, tmp_path, capsys):
    assert run(pictures, "-o", tmp_path / "out", "--held-out", "10", "--dry-run") == 0
    assert "70 samples: 60 to train on, 10 held out" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_same_pictures_are_held_out_wherever_they_lie_and_whatever_they_are_called(pictures, tmp_path):
    assert run(pictures, "-o", tmp_path / "out", "--held-out", "9") == 0
    for kind in range(CLASSES):  # the folders keep what is in them, all under other names
        for number, path in enumerate(sorted((pictures / f"class{kind}").iterdir(), reverse=True)):
            place = tmp_path / f"moved/z{kind}/{number}{path.suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    assert run(tmp_path / "moved", "-o", tmp_path / "again", "--held-out", "9") == 0
    one, other = (
        {content_hash(data) for data in images(tmp_path / name / "held-out").values()} for name in ("out", "again")
    )
    assert one == other


@pytest.mark.parametrize("form", ["paths", "bytes"])
def test_rows_of_tables_and_data_sets_are_divided_alike(pictures, tmp_path, form):
    paths = sorted(pictures.rglob("*.*g"))
    cells = [str(path) if form == "paths" else {"bytes": path.read_bytes(), "path": None} for path in paths]
    table = tmp_path / "data" / "train-00000-of-00001.parquet"
    table.parent.mkdir()
    pq.write_table(pa.table({"image": cells, "caption": [path.parent.name for path in paths]}), table, row_group_size=9)
    arguments = [str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--held-out", "15%", "--workers", "1"]
    assert main(arguments) == 0
    train, held = images(tmp_path / "out/train"), images(tmp_path / "out/held-out")
    everything = Counter(path.read_bytes() for path in paths)
    assert Counter(train.values()) + Counter(held.values()) == everything
    assert not set(train.values()) & set(held.values()) and len(held) in (9, 10)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert main(arguments) == 0 and {path: path.stat().st_mtime_ns for path in written} == written  # nothing anew


def test_scenes_are_divided_too(tmp_path):
    arguments = ["--scenes", "40", "--size", "32", "-o", str(tmp_path), "--held-out", "4", "--workers", "1"]
    assert main(arguments) == 0
    assert len(images(tmp_path / "held-out")) == 4 and len(images(tmp_path / "train")) == 36


def test_a_command_that_was_killed_goes_on_and_ends_alike(pictures, tmp_path):
    arguments = (pictures, "--held-out", "10%", "--samples-per-shard", 10)
    assert run(*arguments, "-o", tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    notes = tmp_path / "killed" / NOTES
    notes.write_text(notes.read_text()[:-40])  # cut short while it was written
    for path in sorted((tmp_path / "killed/train").glob("*.tar"))[2:]:
        path.unlink()
    (tmp_path / "killed/train/manifest.jsonl").unlink()
    assert run(*arguments, "-o", tmp_path / "killed") == 0
    files = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_of_a_source_that_grows_nothing_changes_sides(pictures, tmp_path):
    assert run(pictures, "-o", tmp_path / "out", "--held-out", "10%") == 0
    before = [set(images(tmp_path / "out" / part)) for part in ("train", "held-out")]
    for number in range(40):
        (pictures / "class1" / f"more{number}.png").write_bytes(encoded(picture(77, number)))
    assert run(pictures, "-o", tmp_path / "out", "--held-out", "10%") == 0
    after = [set(images(tmp_path / "out" / part)) for part in ("train", "held-out")]
    assert before[0] <= after[0] and before[1] < after[1] and len(after[1]) in (10, 11)


@pytest.mark.parametrize("asked", ["0%", "100%", "0", "70", "-3", "5%%", "x", "nan%", "200%", "1.5"])
def test_what_leaves_nothing_on_one_side_is_refused_by_value(pictures, tmp_path, asked):
    with pytest.raises(ValueError, match=rf"--held-out {asked} of 70 samples: .* or a number from 1 to 69"):
        run(pictures, "-o", tmp_path / "out", f"--held-out={asked}")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_shards_or_another_share_is_refused(pictures, tmp_path):
    assert run(pictures, "-o", tmp_path / "plain") == 0
    with pytest.raises(ValueError, match="plain holds shards itself.*choose another folder"):
        run(pictures, "-o", tmp_path / "plain", "--held-out", "5%")
    assert run(pictures, "-o", tmp_path / "out", "--held-out", "5%") == 0
    with pytest.raises(ValueError, match="divides its samples with --held-out 5%, and this is 6%"):
        run(pictures, "-o", tmp_path / "out", "--held-out", "6%")


def test_pictures_that_cannot_be_read_are_told_once_and_may_be_left_out(pictures, tmp_path, capsys):
    (pictures / "class0" / "broken.png").write_bytes(encoded(picture(1, 1))[:-30])
    assert run(pictures, "-o", tmp_path / "out", "--held-out", "10%") == 1
    assert capsys.readouterr().err.count("broken.png") == 1
    assert run(pictures, "-o", tmp_path / "out", "--held-out", "10%", "--skip-bad") == 0
    assert len(images(tmp_path / "out/train")) + len(images(tmp_path / "out/held-out")) == 70


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=60), st.data()
)
def test_equal_pictures_are_on_one_side_and_no_more_are_held_out_than_asked(samples, data):
    """samples: content, folder and caption of each."""
    facts = [[content, [0] * 4, f"folder{folder}", caption] for content, folder, caption in samples]
    wanted = data.draw(st.integers(1, len(facts) - 1))
    out = choose_rows(facts, wanted, {})
    assert out.sum() <= wanted
    sides = {}
    for (content, _, _), side in zip(samples, out.tolist(), strict=True):
        assert sides.setdefault(content, side) == side
    order = data.draw(st.permutations(range(len(facts))))
    assert [bool(out[row]) for row in order] == choose_rows([facts[row] for row in order], wanted, {}).tolist()
    if len({content for content, _, _ in samples}) == len(samples):
        assert out.sum() == wanted


def test_shares_are_of_all_samples():
    assert [held_out_count(asked, 400) for asked in ("5%", "0.1%", "399", "12.5%")] == [20, 1, 399, 50]


def test_the_notes_say_on_which_side_each_sample_is(pictures, tmp_path):
    assert run(pictures, "-o", tmp_path / "out", "--held-out", "7") == 0
    line = json.loads((tmp_path / "out" / NOTES).read_text())
    held = {content_hash(data) for data in images(tmp_path / "out/held-out").values()}
    assert {one[0] for one, side in zip(line["samples"], line["out"], strict=True) if side} == held
