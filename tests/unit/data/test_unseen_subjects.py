"""Subjects that the built-in base has never seen, and words that mean nothing to it."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.data.scenes.render import CLASSES, COLOURS
from controlbooth.data.scenes.unseen_subjects import PATTERNS, patterned_subject, subject_picture
from controlbooth.launch.commands import dreambooth_identifiers
from controlbooth.launch.commands.dreambooth_subjects import main
from controlbooth.models.pretrained import load_tokenizers
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.manifest import Task, load_subjects
from controlbooth.trainer.dreambooth.measuring import identifiers
from controlbooth.trainer.dreambooth.words import check_words


def share_of(picture, colour):
    """Of pixels whose hue of shading this colour explains: within a factor of light on all channels."""
    wanted = np.array(COLOURS[colour], float)
    light = (picture @ wanted) / (wanted @ wanted)
    return float((np.abs(picture - light[..., None] * wanted).max(axis=2) < 6).mean())


@given(seed=st.integers(0, 2**40), index=st.integers(0, 10**6))
def test_a_subject_is_a_function_of_seed_and_index_in_two_colours(seed, index):
    one = patterned_subject(seed, index)
    assert one == patterned_subject(seed, index)
    assert one.class_name in CLASSES and one.pattern in PATTERNS and len({*one.colours} & {*COLOURS}) == 2


def test_each_class_comes_once_before_one_comes_again():
    names = [patterned_subject(3, index).class_name for index in range(3 * len(CLASSES))]
    for first in range(0, len(names), len(CLASSES)):
        assert sorted(names[first : first + len(CLASSES)]) == sorted(CLASSES)


def test_pictures_show_both_colours_on_backgrounds_that_have_neither():
    for index in range(8):
        subject = patterned_subject(0, index)
        pictures = [subject_picture(subject, 0, number) for number in range(4)]
        assert len({picture.tobytes() for picture in pictures}) == 4
        for picture in pictures:
            assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
            corners = np.array([picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1]], float)
            for colour in subject.colours:
                assert (np.abs(corners - COLOURS[colour]).max(axis=1) > 12).all()
        # Black and white can be shades of other colours, so they are left out here.
        plain = [colour for colour in subject.colours if colour not in ("black", "white", "gray")]
        assert all(share_of(pictures[0], colour) > 0.01 for colour in plain), subject


def test_the_manifest_that_is_written_is_one_that_can_be_trained(tmp_path, capsys):
    assert main(["-o", str(tmp_path), "--count", "3", "--images", "2"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    subjects, faults = load_subjects(tmp_path / "subjects.yaml")
    assert len(subjects) == 3 and not faults
    assert all(len(list(subject.images.glob("*.png"))) == 2 for subject in subjects)
    main(["-o", str(tmp_path), "--count", "3", "--images", "2"])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert cv2.imread(str(next(iter(before)))).shape == (64, 64, 3)


def task(name, identifier, class_noun, prompt="a {} {}"):
    return Task(name, (), class_noun, identifier, prompt.format(identifier, class_noun), "a star", 1, 1.0, 1)


def test_split_identifiers_are_faults_and_unknown_nouns_are_told():
    tasks = [task("good", "sks", "star"), task("split", "zwxq", "star"), task("odd", "sks", "xylophone")]
    faults, warnings = check_words(tasks, SubjectRunConfig(name="x", model={"base": "miniature"}))
    assert faults.keys() == {"split"} and warnings.keys() == {"odd"}
    assert "splits the identifier 'zwxq' into " in faults["split"] and "dreambooth identifiers" in faults["split"]
    assert "does not know 'xylophone'" in warnings["odd"]


@pytest.mark.slow
def test_identifiers_are_single_rare_tokens_without_a_meaning():
    tokenizers = load_tokenizers("miniature")
    found = identifiers.candidates(tokenizers)
    assert len(found) > 26 and len(set(found)) == len(found)
    assert all(len(tokenizers[0].tokenize(word)) == 1 and 3 <= len(word) <= 4 for word in found)
    assert not {"red", "box", "star", "fish", "toy", "dog", "mug"} & {*found}
    vowels = [bool({*"aeiouy"} & {*word}) for word in found]
    assert vowels == sorted(vowels)


@pytest.mark.slow
def test_the_base_is_asked_for_words_whose_pictures_are_alike(capsys):
    arguments = ["miniature", "--count", "1", "--draw", "--class-noun", "star", "--images", "2", "--steps", "1"]
    assert dreambooth_identifiers.main(arguments) == 0
    told = capsys.readouterr()
    assert told.out.startswith("identifiers: [") and "a star: pictures alike 0." in told.err
    kept = told.out.removeprefix("identifiers: [").rstrip("]\n").split(", ")
    assert all(f"kept      a {word} " in told.err for word in kept if word)
    with pytest.raises(ValueError, match="give --class-noun"):
        dreambooth_identifiers.main(["miniature", "--draw"])
