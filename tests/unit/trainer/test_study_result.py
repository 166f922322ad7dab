"""Scripted raters of known reliability, and what a study says of them: the truth, chance beside it, who is left out."""

import html
import json

import pytest
import studies

from controlbooth.launch.commands import study_result
from controlbooth.trainer.evaluation.opinions import between, read_opinions, write_opinion
from controlbooth.trainer.study.answers import Answers, read_answers
from controlbooth.trainer.study.figures import study_figures
from controlbooth.trainer.study.plan import CHECK, REPEAT, Plan, screens_of
from controlbooth.trainer.study.publish import opinion
from controlbooth.trainer.study.result import study_result as result_of

RELIABILITY = dict(anna=0.95, ben=0.85, cleo=0.8)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    studies.write_methods(root, items=12, side=16)
    return studies.make_study(root, "--checks", "0.25", "--repeats", "0.4")


@pytest.fixture
def study(asked, tmp_path):
    folder, plan = asked
    (tmp_path / "plan.json").symlink_to(folder / "plan.json")
    return tmp_path, plan


def store(folder, plan: Plan, *given) -> None:
    opened = Answers(folder, plan.digest)
    for answers in given:
        opened.add(answers)
    opened.close()


def test_raters_of_different_reliability_show_the_truth_beside_chance_and_what_can_be_reached(study, capsys):
    folder, plan = study
    store(folder, plan, *(studies.answers_of(plan, name, right) for name, right in RELIABILITY.items()))
    assert study_result.main([str(folder)]) == 0
    told = capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    counting = [name for name, one in result["raters"].items() if one["counts"]]
    for name in ("quality", "fidelity"):
        own = result["questions"][name]
        (preference,) = own["preferences"]
        share = preference["share"]
        assert (preference["first"], preference["second"]) == ("smeared", "crisp")
        wrong = 1 - sum(RELIABILITY[rater] for rater in counting) / len(counting)
        assert share["high"] < 0.5 and share["low"] <= wrong <= share["high"]
        crisp = own["methods"]["crisp"]
        assert crisp["rank"]["mean"] == pytest.approx(1 + share["mean"])
        assert crisp["points"]["mean"] == pytest.approx(5 - 4 * share["mean"])
        assert crisp["score"]["low"] > 0 > own["methods"]["smeared"]["score"]["high"]
        assert preference["needed"] > 0 and 0.3 < own["alpha"]["mean"] < 0.95
    assert "crisp is preferred" in told and "chance 50%" in told and "perfect" in told
    page = html.unescape((folder / "report.html").read_text())
    assert "Which picture follows the guide picture more closely?" in page and "chance" in page
    assert "http://" not in page and "https://" not in page


def test_a_rater_who_fails_the_checks_is_left_out_of_the_figures_and_named(study):
    folder, plan = study
    store(folder, plan, studies.answers_of(plan, "careful"), studies.answers_of(plan, "blind", 0.0))
    result = result_of(plan, folder, 0.05)
    assert [name for name, one in result["raters"].items() if not one["counts"]] == ["blind"]
    assert result["raters"]["blind"]["failed"] == result["raters"]["blind"]["checks"] > 2
    for own in result["questions"].values():
        assert own["raters"] == 1 and own["preferences"][0]["share"]["mean"] == 0.0
        assert own["methods"]["crisp"]["all_alike"] == "won all"
        assert 0.0 < own["preferences"][0]["share"]["high"] < 0.35


def test_checks_and_repeats_are_no_answers_about_methods(study):
    folder, plan = study
    given = studies.answers_of(plan, "careful")
    kinds = [one.trial.kind for one in screens_of(plan, "careful")]
    store(folder, plan, given)
    result = result_of(plan, folder, 0.05)
    assert result["answers"] == len(given) and CHECK in kinds and REPEAT in kinds
    judged = sum(own["answers"] for own in result["questions"].values())
    assert judged == len(given) - kinds.count(CHECK) - kinds.count(REPEAT)
    assert result["raters"]["careful"]["same"] == 1.0
    assert result["questions"]["quality"]["repeats"] == dict(count=5, same=1.0, ceiling=None)  # too few to bound it
    store(folder, plan, studies.answers_of(plan, "other"))
    assert result_of(plan, folder, 0.05)["questions"]["quality"]["repeats"]["ceiling"] == 1.0


def test_a_rater_who_closes_the_page_half_way_counts_as_far_as_he_came(study):
    folder, plan = study
    store(folder, plan, studies.answers_of(plan, "careful"), studies.answers_of(plan, "usual", 1.0, most=15))
    result = result_of(plan, folder, 0.05)
    assert result["raters"]["usual"]["answers"] == 15 and result["answers"] == 15 + result["screens"]


def test_the_last_of_a_raters_answers_counts(study):
    folder, plan = study
    given = studies.answers_of(plan, "careful", 0.0)
    corrected = [
        type(one)(f"again-{n:06d}", one.rater, one.trial, one.pictures, one.ranks[::-1], 1.0, replaces=one.id)
        for n, one in enumerate(given)
    ]
    store(folder, plan, given, corrected)
    result = result_of(plan, folder, 0.05)
    assert len(read_answers(folder, plan.digest)) == 2 * len(given) == 2 * result["answers"]
    assert result["questions"]["quality"]["preferences"][0]["share"]["mean"] == 0.0  # of smeared before crisp


def test_a_study_without_answers_says_so(study, capsys):
    folder, _ = study
    assert study_result.main([str(folder)]) == 0
    assert "0 answers of 0 raters" in capsys.readouterr().out
    assert "No answers count yet" in (folder / "report.html").read_text()


def test_raters_who_all_prefer_one_method_throughout_agree(study):
    folder, plan = study
    figures = study_figures(plan, studies.answers_of(plan, "careful") + studies.answers_of(plan, "other"), 0.05)
    assert figures["questions"]["quality"]["alpha"]["mean"] == 1.0


def test_rankings_of_three_give_the_papers_average_rank(tmp_path):
    studies.write_methods(tmp_path, items=5, side=16)
    folder, plan = studies.make_study(tmp_path, methods=("hazy", "smeared", "crisp"))
    figures = study_figures(plan, studies.answers_of(plan, "careful") + studies.answers_of(plan, "other"), 0.05)
    for own in figures["questions"].values():
        means = {name: one["rank"]["mean"] for name, one in own["methods"].items()}
        assert means == pytest.approx(dict(crisp=1.0, hazy=2.0, smeared=3.0))
        assert own["alpha"]["mean"] == 1.0
    assert figures["raters"]["careful"]["agrees_with_others"] == 1.0


def test_runs_are_told_what_people_said_and_compare_says_it_of_two(study):
    folder, plan = study
    store(folder, plan, *(studies.answers_of(plan, name, right) for name, right in RELIABILITY.items()))
    result = result_of(plan, folder, 0.05)
    runs = {name: folder / name for name in plan.methods}
    for name, run in runs.items():
        run.mkdir()
        write_opinion(run, opinion(folder, plan, result, name))
    (said,) = read_opinions(runs["crisp"])
    mine, theirs = (read_opinions(runs[name])[0]["questions"]["quality"]["against"][0] for name in ("crisp", "smeared"))
    assert said["method"] == "crisp" and mine["share"]["mean"] == pytest.approx(1 - theirs["share"]["mean"])
    assert mine["share"]["low"] == pytest.approx(1 - theirs["share"]["high"])
    lines = between(runs["crisp"], runs["smeared"])
    assert len(lines) == 2 and lines[0].startswith("people, quality: crisp preferred to smeared in ")
    assert between(runs["crisp"], folder) == []
