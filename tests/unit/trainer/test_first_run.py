"""`controlbooth init`: what it writes is a run that the trainer takes, with a reason in each line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from controlbooth.data.errors import UserError
from controlbooth.launch.commands import data_pack, train
from controlbooth.launch.commands.init import main
from controlbooth.trainer.config.loading import build_config, load_config
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.planning.commented import Line, commented
from controlbooth.trainer.planning.first_base import Base, base_of
from controlbooth.trainer.planning.first_run import Data, batch_and_steps, data_of, first_lines, tries
from controlbooth.trainer.planning.first_subjects import subject_lines

SMALL = Base("miniature", "miniature", 64, None)
DATA = Data("shards/train", "shards/held-out", "edges", 5000, "the shards hold it")


def pictures(folder, count=3):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((64, 64, 3), number, np.uint8)).save(folder / f"{number}.png")
    return folder


@settings(max_examples=60, deadline=None)
@given(
    tree=st.dictionaries(
        st.sampled_from(["name", "data.shards", "data.resolution", "model.frozen.stream", "optimizer.learning_rate"]),
        st.one_of(st.integers(), st.booleans(), st.floats(1e-9, 1e9), st.text(max_size=20), st.lists(st.integers())),
        min_size=1,
    )
)
def test_what_is_written_with_reasons_is_read_as_it_was_meant(tree):
    lines = commented([Line(field, value, "because: it # is") for field, value in tree.items()])
    read = yaml.safe_load(lines)
    for field, value in tree.items():
        place = read
        for name in field.split("."):
            place = place[name]
        assert place == value and type(place) is type(value)


@settings(deadline=None)
@given(samples=st.integers(1, 10**8), gpus=st.integers(1, 64), small=st.booleans())
def test_batches_can_be_shared_by_the_cards_and_steps_are_within_what_the_papers_say(samples, gpus, small):
    batch, steps, *_ = batch_and_steps(samples, gpus, small)
    assert batch % gpus == 0 and 0 < batch <= 64 + gpus
    assert (100 if small else 1000) <= steps <= (1000 if small else 10_000)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "miniature"])
def test_the_first_lines_are_a_run_of_each_family_by_the_papers_numbers(family):
    base = Base("b", family, 64 if family == "miniature" else 1024, None)
    for side, method in tries(base):
        config = build_config(
            yaml.safe_load(commented(first_lines("r", DATA, base, side, method, batch_and_steps(5000, 1, False))))
        )
        assert config.data.prompt_dropout == 0.5 and config.data.resolution == side
        assert config.optimizer.learning_rate == (3e-4 if family == "miniature" else 1e-5)
        assert config.model.method == method and (method == "full" or family in ("sd15", "sdxl", "miniature"))
    subjects = SubjectRunConfig.model_validate(yaml.safe_load(commented(subject_lines("r", base))))
    assert subjects.steps == (400 if family == "miniature" else 1000) and subjects.prior.weight == 1.0


def test_pictures_are_to_be_packed_first_and_the_command_says_how(tmp_path, monkeypatch):
    data = data_of(pictures(tmp_path / "my photos" / "cats", 40).parent)
    assert data.samples == 24 and data.condition == "computed:canny" and data.shards == "my photos-shards/train"
    assert data.pack is not None and data.pack.endswith("--held-out 16 --caption 'a photo of a {folder}'")
    monkeypatch.chdir(tmp_path)
    import shlex

    words = shlex.split(data.pack)
    assert words[:3] == ["controlbooth", "data", "pack"]
    assert data_pack.command_line().parse_args(words[3:]).source == tmp_path / "my photos"


def test_what_is_held_out_is_enough_for_validations_or_they_are_told_how_many_there_are(tmp_path):
    lines = first_lines("r", replace(DATA, held_out_samples=8), SMALL, 64, "full", batch_and_steps(50, 1, True))
    assert build_config(yaml.safe_load(commented(lines))).validation.samples == 8
    lines = first_lines("r", replace(DATA, held_out_samples=500), SMALL, 64, "full", batch_and_steps(50, 1, True))
    assert build_config(yaml.safe_load(commented(lines))).validation.samples == 16
    with pytest.raises(UserError, match="holds 16 pictures, and 16 are held out to measure control: give more"):
        data_of(pictures(tmp_path / "cats", 16))


def test_places_without_shards_or_pictures_and_unknown_bases_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        data_of(tmp_path / "none")
    with pytest.raises(UserError, match="neither tar shards nor pictures"):
        data_of(tmp_path)
    with pytest.raises(UserError, match="name its shapes by --shapes sd15 or"):
        base_of(str(tmp_path / "none"), None)
    assert base_of("/models/flux", "flux-dev") == Base("/models/flux", "flux", 1024, "flux-dev")


def test_a_file_is_never_overwritten_and_one_source_is_wanted(tmp_path):
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(UserError, match="is not overwritten"):
        main([str(tmp_path), "-o", str(tmp_path / "run.yaml")])
    assert (tmp_path / "run.yaml").read_text() == "mine"
    with pytest.raises(UserError, match="and not both"):
        main(["-o", str(tmp_path / "new.yaml")])


@pytest.mark.slow
def test_the_file_that_is_written_passes_the_dry_run_of_the_trainer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shards"
    scenes = ["--condition", "edges", "--workers", "1", "--size", "64"]
    assert data_pack.main(["--scenes", "64", "-o", str(folder / "train"), *scenes]) == 0
    assert data_pack.main(["--scenes", "16", "--seed", "7", "-o", str(folder / "held-out"), *scenes]) == 0
    capsys.readouterr()
    assert main([str(folder), "-o", "run.yaml", "--card", "24GiB"]) == 0
    told = capsys.readouterr().out
    assert "wrote run.yaml: miniature, edges, 64 px, 64 samples" in told and "hours" in told
    config = load_config("run.yaml")
    assert config.data.held_out == str(folder / "held-out") and config.name == "run"
    for line in Path("run.yaml").read_text().splitlines():
        assert not line or line.endswith(":") or "  # " in line, line
    assert train.main(["run.yaml", "--dry-run"]) == 0
