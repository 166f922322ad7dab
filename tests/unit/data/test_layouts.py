"""Layouts of other trainers are read whole: each picture is packed, or left out with a reason."""

import json

import foreign
import pytest
import yaml

from controlbooth.data.errors import UserError
from controlbooth.data.layouts.recognise import subjects_of, understand
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.launch.cli import main


@pytest.mark.parametrize("name", foreign.LAYOUTS)
def test_a_layout_is_packed_with_its_captions_and_conditions(name, tmp_path):
    source, out = foreign.LAYOUTS[name](tmp_path / "source"), tmp_path / "shards"
    assert main(["import", "data", str(source), "-o", str(out)]) == 0
    data = yaml.safe_load((out / "data.yaml").read_text())["data"]
    places = [one["shards"] for one in data.get("sources", ())] or [data["shards"]]
    rows = [row for place in places for row in open_dataset(place).rows]
    assert sum(row.samples for row in rows) == foreign.COUNT * len(places)
    has_conditions = name not in ("kohya_folders", "img2dataset")
    assert all(("conditioning" in row.conditions) == has_conditions for row in rows)


def test_a_dry_run_writes_nothing_and_names_what_is_left_out(tmp_path, capsys):
    source = foreign.image_folder(tmp_path / "source")
    foreign.write(source / "images/unnamed.png", 9)
    before = sorted(tmp_path.rglob("*"))
    assert main(["import", "data", str(source), "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert "left out 1: no row of the table names it" in capsys.readouterr().out


def test_repeats_of_folders_become_repeats_of_sources(tmp_path):
    found = understand(foreign.kohya_folders(tmp_path))
    assert {part.name: (part.repeat, part.is_class) for part in found.parts} == {
        "10_sks dog": (10, False),
        "3_kcz bär": (3, False),
        "1_dog": (1, True),
    }
    assert found.parts[0].rows[0].captions == ("sks dog, sitting",)
    assert found.parts[1].rows[0].captions == ("kcz bär",)
    assert len(found.left_out) == foreign.COUNT  # the second lines of captions


def test_wildcards_become_captions_to_choose_from(tmp_path):
    (part,) = understand(foreign.kohya_toml(tmp_path)).parts
    assert part.rows[0].captions == ("a red dog", "a blue dog") and part.repeat == 2


def test_folders_without_repeats_nested_pictures_and_dead_links_are_left_out(tmp_path):
    foreign.write(tmp_path / "5_sks dog/1.png", 1)
    foreign.write(tmp_path / "5_sks dog/inner/2.png", 2)
    foreign.write(tmp_path / "0_sks cat/3.png", 3)
    foreign.write(tmp_path / "plain/4.png", 4)
    (tmp_path / "5_sks dog/dead.png").symlink_to(tmp_path / "nowhere.png")
    foreign.write(tmp_path / "5_sks dog/empty.png", 5).with_suffix(".txt").write_text("\ufeff\r\n")
    found = understand(tmp_path)
    assert [row.image.name for part in found.parts for row in part.rows] == ["1.png"]
    reasons = " ".join(why for _, why in found.left_out)
    for reason in ("a folder in a folder", "its repeats are 0", "does not begin with repeats", "a link", "is empty"):
        assert reason in reasons
    assert len(found.left_out) == 5


def test_rows_without_a_caption_a_picture_or_a_condition_are_left_out(tmp_path):
    image = foreign.write(tmp_path / "far/ü 1.png", 1)
    rows = [
        {"file_name": str(image), "text": "absolute", "conditioning_image": str(image)},
        {"file_name": "none.png", "text": "no picture", "conditioning_image": str(image)},
        {"file_name": str(image), "text": " ", "conditioning_image": str(image)},
        {"file_name": str(image), "text": "no condition"},
        {"file_name": None, "text": "no name"},
        {"file_name": "x" * 5000, "text": "too long", "conditioning_image": str(image)},
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    found = understand(tmp_path)
    assert [row.captions for row in found.parts[0].rows] == [("absolute",)]
    assert len(found.left_out) == 5


def test_backends_elsewhere_and_keys_that_nobody_knows_are_told(tmp_path, capsys):
    assert main(["import", "data", str(foreign.simpletuner(tmp_path)), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "its type is aws" in told and "made_up: unknown" in told and "dogs: 4 pictures, 2 times each" in told


def test_folders_of_subjects_become_rows_with_identifier_and_class(tmp_path):
    found = understand(foreign.kohya_folders(tmp_path))
    rows, lost = subjects_of(found, None)
    assert [row.get("identifier") for row in subjects_of(found, "dog")[0]] == ["sks", None]  # the other is no dog
    assert [(row["name"], row["identifier"], row["class_noun"]) for row in rows] == [
        ("sks-dog", "sks", "dog"),
        ("kcz-b-r", "kcz", "bär"),
    ]
    assert any("repeats" in line for line in lost) and any("class pictures" in line for line in lost)


def test_a_folder_of_pictures_with_a_class_is_a_subject_that_runs_read(tmp_path):
    from controlbooth.trainer.dreambooth.manifest import load_subjects

    source, out = foreign.dreambooth(tmp_path / "rex"), tmp_path / "subjects.yaml"
    assert main(["import", "data", str(source), "--class", "dog", "-o", str(out)]) == 0
    (subject,), faults = load_subjects(out)
    assert (subject.name, subject.class_noun, subject.images, faults) == ("rex", "dog", source, {})


def test_a_list_of_subjects_is_written_where_out_names_one_and_no_folder_of_shards(tmp_path):
    source, out = foreign.kohya_folders(tmp_path / "kohya"), tmp_path / "subjects.yaml"
    assert main(["import", "data", str(source), "-o", str(out)]) == 0 and out.is_file()
    assert main(["import", "data", str(source), "-o", str(out), "--to", "shards"]) == 2


def test_a_folder_without_class_is_no_subject(tmp_path):
    with pytest.raises(UserError, match="--class"):
        subjects_of(understand(foreign.dreambooth(tmp_path / "rex"), "x"), None)


def test_tars_are_indexed_where_they_lie(tmp_path):
    assert main(["import", "data", str(foreign.img2dataset(tmp_path / "files")), "-o", str(tmp_path / "tars")]) == 0
    for extra in ("manifest.jsonl", "pack.jsonl", "data.yaml"):
        (tmp_path / "tars" / extra).unlink()
    assert main(["import", "data", str(tmp_path / "tars"), "-o", str(tmp_path / "out")]) == 0
    data = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["data"]
    assert data == {"shards": str(tmp_path / "tars")}
    assert sum(row.samples for row in open_dataset(data["shards"]).rows) == foreign.COUNT
