"""What a study asks: frozen, balanced, the same for a rater who comes back, and told before anything is made."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import studies
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from controlbooth.data.errors import MissingFile, Occupied, UserError
from controlbooth.data.files.records import Damaged
from controlbooth.launch.commands import study_new
from controlbooth.trainer.study.pictures import level, spoil
from controlbooth.trainer.study.plan import (
    CHECK,
    JUDGED,
    REPEAT,
    Item,
    Plan,
    judged_trials,
    read_plan,
    screens_each,
    screens_of,
)
from controlbooth.trainer.study.questions import usual_questions


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    studies.write_methods(folder)
    return folder


@pytest.fixture(scope="module")
def study(root):
    return studies.make_study(root)


def make_plan(methods=2, items=12, form="pairs", judged=None, repeats=3):
    names, places = [f"m{n}" for n in range(methods)], [f"i{n}" for n in range(items)]
    trials = judged_trials("00" * 16, form, ("quality", "prompt"), names, places)
    each = judged or len(trials) // 2
    known = tuple(Item(name, "a text", {}) for name in places)
    return Plan("00" * 16, "t", form, ("quality", "prompt"), tuple(names), known, tuple(trials), each, 0, repeats)


def new(root, out, *options, methods=("crisp", "hazy")):
    return study_new.main([str(root / out), "--methods", *(f"{one}={root / one}" for one in methods), *options])


def test_a_plan_is_read_back_as_it_was_frozen_and_not_if_anything_in_it_has_changed(study):
    folder, plan = study
    assert read_plan(folder) == plan and plan.questions == ("quality", "fidelity")
    tree = json.loads((folder / "plan.json").read_text())
    tree["trials"][0]["methods"].reverse()
    changed = folder.parent / "changed"
    changed.mkdir()
    (changed / "plan.json").write_text(json.dumps(tree))
    with pytest.raises(Damaged, match="not what was frozen.*copy its folder back"):
        read_plan(changed)
    with pytest.raises(UserError, match="holds no study: make one by"):
        read_plan(folder.parent)


def test_a_study_is_not_made_over_another_one(root, study):
    with pytest.raises(Occupied, match="frozen: give another folder"):
        studies.make_study(root)


def test_every_item_is_asked_once_under_each_question_of_each_pair(study):
    _, plan = study
    judged = [(one.question, one.item, one.methods) for one in plan.trials if one.kind == JUDGED]
    assert len(judged) == len(set(judged)) == 2 * 6
    assert len({one.id for one in plan.by_id.values()}) == len(plan.by_id) == 2 * 12 + 2


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(1, 13), st.sampled_from(["pairs", "rankings"]), st.text("abc", min_size=1))
def test_a_rater_sees_each_trial_once_and_each_method_at_each_place_equally_often(methods, items, form, rater):
    plan = make_plan(methods, items, form, repeats=min(items, 3))
    screens = screens_of(plan, rater)
    assert screens == screens_of(plan, rater) and len(screens) == screens_each(plan)
    assert len({one.trial.id for one in screens}) == len(screens)
    for question in plan.questions:
        own = [one for one in screens if one.trial.question == question and one.trial.kind == JUDGED]
        for group in {one.trial.methods for one in own}:
            places = Counter(
                (place, one.trial.pictures.index(name))
                for one in own
                if one.trial.methods == group
                for place, name in enumerate(one.pictures)
            )
            counts = [places[place, method] for place in range(len(group)) for method in range(len(group))]
            assert max(counts) - min(counts) <= 1


def test_a_repeat_comes_later_than_what_it_repeats_and_with_the_sides_changed():
    screens = screens_of(make_plan(items=20), "somebody")
    place = {one.trial.id: number for number, one in enumerate(screens)}
    repeats = [one for one in screens if one.trial.kind == REPEAT]
    assert len(repeats) == 6
    for one in repeats:
        before = screens[place[one.trial.of]]
        assert place[one.trial.id] - place[one.trial.of] > 5 and before.pictures == one.pictures[::-1]


def test_questions_are_not_mixed_and_raters_differ_in_all_that_is_drawn():
    plan = make_plan(items=30)
    orders = {tuple(one.trial.id for one in screens_of(plan, f"rater {n}")) for n in range(20)}
    assert len(orders) == 20
    asked = [one.trial.question for one in screens_of(plan, "somebody")]
    assert sum(one != other for one, other in zip(asked, asked[1:], strict=False)) == 1
    first = Counter(screens_of(plan, f"rater {n}")[0].trial.question for n in range(60))
    assert min(first[question] for question in plan.questions) > 15


def test_a_rater_of_few_screens_judges_others_than_the_next_one():
    plan = make_plan(items=40, judged=5)
    seen = [{one.trial.id for one in screens_of(plan, f"rater {n}") if one.trial.kind == JUDGED} for n in range(30)]
    assert {len(one) for one in seen} == {10} and len(set().union(*seen)) > 60


def test_all_pictures_of_an_item_have_one_size_and_nothing_but_pixels(root, study):
    folder, plan = study
    files = sorted((folder / "pictures").iterdir())
    assert {path.stem for path in files} == plan.pictures
    for path in files:
        with Image.open(path) as picture:
            assert picture.size == (64, 64) and picture.info.keys() <= {"interlace"}
        assert b"drawn by" not in path.read_bytes()
    with Image.open(root / "crisp" / "scene0000.png") as picture:
        assert "drawn by crisp" in picture.info["parameters"]  # so the test could have failed


def test_pictures_of_different_sizes_are_brought_to_the_smallest_and_other_shapes_are_refused():
    large, small = np.zeros((96, 128, 3), np.uint8), np.zeros((48, 64, 3), np.uint8)
    assert {one.shape for one in level({"a": large, "b": small}, "x").values()} == {(48, 64, 3)}
    with pytest.raises(UserError, match="item 'x': the picture of a has 128 x 96 pixels.*Cut them alike"):
        level({"a": large, "b": np.zeros((64, 64, 3), np.uint8)}, "x")


def test_the_wrong_answer_of_a_check_about_the_condition_is_a_whole_picture_of_something_else(root, study):
    folder, plan = study
    (check,) = (one for one in plan.trials if one.kind == CHECK and one.question == "fidelity")
    right, wrong = (np.asarray(Image.open(folder / "pictures" / f"{name}.png")) for name in check.pictures)
    targets = {path.stem: np.asarray(Image.open(path)) for path in (root / "targets").iterdir()}
    assert (right == targets[check.item]).all()
    assert [name for name, one in targets.items() if one.shape == wrong.shape and (one == wrong).all()] != [check.item]
    (check,) = (one for one in plan.trials if one.kind == CHECK and one.question == "quality")
    wrong = np.asarray(Image.open(folder / "pictures" / f"{check.pictures[1]}.png"))
    assert not any((one == wrong).all() for one in targets.values())


def test_a_spoiled_picture_is_another_one_of_the_same_shape_and_the_same_each_time():
    picture = np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8)
    assert spoil(picture, 3).shape == picture.shape and (spoil(picture, 3) == spoil(picture, 3)).all()
    assert np.abs(spoil(picture, 3).astype(int) - picture).mean() > 20
    assert spoil(picture[:3, :5], 1).shape == (3, 5, 3)


def test_questions_follow_from_what_items_have():
    assert usual_questions({"condition", "prompt"}) == ("quality", "fidelity")
    assert usual_questions({"references", "prompt"}) == ("subject", "prompt")
    assert usual_questions({"prompt"}) == ("quality", "prompt") and usual_questions(set()) == ("quality",)


def test_the_dry_run_says_what_raters_would_do_and_makes_nothing(root, capsys):
    assert (
        new(root, "dry", "--dry-run", "--prompts", str(root / "prompts.yaml"), methods=("crisp", "hazy", "smeared"))
        == 0
    )
    told = capsys.readouterr().out
    assert "3 methods (crisp, hazy, smeared), 6 items; questions: quality, prompt" in told
    assert "16 screens, about 4.0 min: 12 rankings of 3, 2 checks with a known answer, 2 repeats" in told
    assert "1 rater ±40 %" in told and not (root / "dry").exists()


def test_pictures_that_a_method_lacks_are_left_out_and_told(root, tmp_path, capsys):
    studies.write_methods(tmp_path, items=3, methods=("hazy",))
    (tmp_path / "hazy" / "scene0002.png").rename(tmp_path / "hazy" / "other.png")
    assert study_new.main([str(tmp_path / "s"), "--methods", f"a={root / 'crisp'}", f"b={tmp_path / 'hazy'}"]) == 0
    assert "left out: 5 names of pictures that some method lacks" in capsys.readouterr().out
    assert [item.name for item in read_plan(tmp_path / "s").items] == ["scene0000", "scene0001"]


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["crisp"], [], "at least two methods"),
        (["crisp", "crisp"], [], "two methods have the same name"),
        (["crisp", "hazy"], ["--questions", "fidelity"], "needs a condition of every item: give --conditions FOLDER"),
        (["crisp", "hazy"], ["--questions", "subject"], "give --references FOLDER"),
        (["crisp", "hazy"], ["--prompts", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["crisp", "nowhere"], [], "there is no such folder"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_remedy(root, methods, options, message):
    with pytest.raises((UserError, MissingFile), match=message):
        new(root, "refused", *options, methods=methods)
    assert not (root / "refused").exists()


@pytest.mark.parametrize("word", ["crisp", "=x", "a b=x", "a/b=x", "a=", "x" * 41 + "=y"])
def test_a_method_that_is_not_understood_is_refused_by_its_word(word):
    with pytest.raises(UserError, match="write NAME=PATH"):
        study_new.main(["s", "--methods", word, word])


def test_photographs_of_a_subject_stand_beside_its_pictures(root, tmp_path):
    studies.write_methods(tmp_path, items=2)
    beside = ["--references", str(tmp_path / "targets"), "--prompts", str(tmp_path / "prompts.yaml")]
    assert new(tmp_path, "s", *beside) == 0
    plan = read_plan(tmp_path / "s")
    assert plan.questions == ("subject", "prompt")
    assert all(len(item.given["references"]) == 2 for item in plan.items)


def test_runs_of_subjects_bring_what_was_drawn_of_them_with_their_photographs_and_no_identifier(root, tmp_path):
    photographs = [str(path) for path in sorted((root / "targets").iterdir())[:3]]
    subject = dict(name="rex", images=photographs, class_noun="dog", identifier="sks", instance_prompt="a sks dog")
    subject |= dict(class_prompt="a dog", steps=1, learning_rate=1e-4, rank=4)
    black = np.zeros((8, 8, 3), np.uint8)
    for run in ("lora", "full"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "subjects.json").write_text(json.dumps([subject]))
        (tmp_path / run / "config.yaml").write_text("name: pets\nmodel: {base: miniature}\n")
        for file in ("00-0", "00-1", "class-0"):
            studies.save(tmp_path / run / "subjects" / "rex" / "pictures" / f"{file}.png", black)
    assert new(tmp_path, "s", methods=("lora", "full")) == 0
    plan = read_plan(tmp_path / "s")
    assert plan.questions == ("subject", "prompt") and [item.name for item in plan.items] == ["rex/00-0", "rex/00-1"]
    assert all(item.prompt.startswith("a dog on a ") and len(item.given["references"]) == 3 for item in plan.items)
    shutil.rmtree(tmp_path / "lora" / "subjects")
    with pytest.raises(UserError, match="dreambooth measure .*/lora` draws them"):
        new(tmp_path, "t", methods=("lora", "full"))
