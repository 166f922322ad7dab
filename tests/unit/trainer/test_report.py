"""The page of a run, and of several side by side."""

import html
import json
import re

import numpy as np
import pytest

from controlbooth.launch.commands.report import main
from controlbooth.trainer.config.loading import build_config, dump
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.evaluation.drawing import write_png
from controlbooth.trainer.evaluation.report import shown_steps, write_report
from controlbooth.trainer.evaluation.strips import STRIPS, write_strip
from controlbooth.trainer.evaluation.verdict import CONTROL, as_tree, describe, judge_run

OBEYS = [0.02, 0.05, 0.41, 0.70, 0.78, 0.83]
NOTHING = [0.06, 0.05, 0.07, 0.06, 0.05, 0.06]


def make_run(root, name, shares, chance=True, evaluated=True):
    run = root / name
    run.mkdir()
    tree = dict(
        name=name, output=str(root), max_steps=250, global_batch_size=1, micro_batch_size=1,
        model=dict(base="miniature"), data=dict(shards="t", held_out="h", condition="edges", resolution=64),
    )  # fmt: skip
    (run / "config.yaml").write_text(dump(build_config(tree)))
    rows = [dict(step=step, time=0.0, metrics=dict(loss=0.1)) for step in range(1, 251, 10)]
    for number, share in enumerate(shares):
        figures = {"edge_f1": 0.2 + 0.7 * share, "edge_f1_empty_prompt": 0.2 + 0.5 * share, "fixed_noise_loss": 0.3}
        if chance:
            figures |= {"edge_f1_chance": 0.2, "edge_f1_real": 0.9, "edge_f1_share": share}
            figures |= {"edge_f1_share_low": share - 0.05, "edge_f1_share_high": share + 0.05}
        rows.append(dict(step=50 * number, time=0.0, metrics={f"validation/{n}": v for n, v in figures.items()}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if chance:
        (run / CONTROL).write_text(json.dumps(as_tree(judge_run(run, 16))))
    if evaluated:
        (run / "evaluation").mkdir()
        (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation(shares[-1], chance)))
    return run


def evaluation(share, chance):
    figures = {}
    for way, one in {"without control": 0.08, "with control": share, "random noise": 0.0, "real pictures": 1.0}.items():
        figures[way] = {"edge_f1": dict(mean=0.2 + 0.7 * one, low=0.1, high=0.95)}
        if chance:
            beside = dict(
                chance=dict(mean=0.21, low=0.2, high=0.22), share=dict(mean=one, low=one - 0.03, high=one + 0.03)
            )
            figures[way]["edge_f1"] |= beside
    sampler = dict(scheduler="unipc", steps=10, guidance=2.0)
    return dict(figures=figures, samples=64, step=250, sampler=sampler, sets={}, encoders={})


def page(runs, path):
    write_report(runs, path)
    return html.unescape(re.sub(r"<svg.*?</svg>", "<svg>", path.read_text(), flags=re.S))


def test_a_run_that_obeys_says_so_first_with_the_words_of_its_verdict(tmp_path):
    run = make_run(tmp_path, "obeys", OBEYS)
    text = page([run], tmp_path / "page.html")
    told = describe(judge_run(run, 16))
    assert "It obeys, from step 100 on" in text and told[1:] in text
    assert (
        "Evaluated at step 250 on 64 held-out samples: 83% (80% to 86%) of what is possible in edge F1: it obeys."
        in text
    )
    assert text.index("It obeys") < text.index("Over the steps") < text.index("Fidelity")


def test_the_table_has_chance_share_and_noise_beside_each_figure(tmp_path):
    text = page([make_run(tmp_path, "obeys", OBEYS)], tmp_path / "page.html")
    row = text[text.index('<tr class="with"><td>with control') :]
    row = row[: row.index("<tr>")]
    assert "<b>0.781</b>" in row and "chance 0.210" in row and "83% <small>80% to 86%" in row
    assert "<td>random noise" in text and "<td>real pictures" in text


@pytest.mark.slow
def test_a_run_without_control_and_one_with_stand_side_by_side(tmp_path):
    runs = [make_run(tmp_path, "without", NOTHING), make_run(tmp_path, "with", OBEYS)]
    assert main([str(run) for run in runs]) == 0
    text = page(runs, runs[0] / "report-with.html")
    first, second = text.index("It does not obey"), text.index("It obeys, from step 100 on")
    assert first < second and text.index("<h1>without") < text.index("<h1>with<")
    assert text.count('<div class="told not">') == text.count('<div class="told obeys">') == 1
    assert text.count("<h2>Over the steps") == text.count("<h2>Fidelity") == 1
    assert text.count("<svg>") == 2 * (1 + 3)  # where it stands, shares, edge F1, loss


def test_control_that_was_lost_is_called_a_correction(tmp_path):
    run = make_run(tmp_path, "lost", [*OBEYS, 0.1, 0.1], evaluated=False)
    text = page([run], tmp_path / "page.html")
    assert "It obeyed, and does no longer" in text and "Correction: control was announced for step 100" in text
    assert "controlbooth evaluate" in text  # is what measures it


def test_a_run_from_before_chance_was_measured_has_a_page_that_announces_nothing(tmp_path):
    text = page([make_run(tmp_path, "old", OBEYS, chance=False)], tmp_path / "page.html")
    assert (
        "Not known whether it obeys" in text
        and "Control cannot be told: validated before chance" in text
        and "<code>controlbooth" in text
    )
    assert "Measured before chance was" in text and "It obeys" not in text


def add_pictures(run, caption):
    """Strips of three steps, and one picture at either end of the evaluation, all with this caption."""
    (run / STRIPS).mkdir(parents=True)
    (run / STRIPS / "captions.json").write_text(json.dumps([caption]))
    for name in ("conditions", "targets", "step-00000000", "step-00000050", "step-00000100"):
        write_strip(run / STRIPS / f"{name}.png", np.zeros((1, 8, 8, 3), np.uint8))
    (run / "evaluation" / "ends").mkdir()
    write_png(run / "evaluation" / "ends" / "one.png", np.zeros((8, 8, 3), np.uint8))
    one = dict(pictures=["one.png"], figure="edge_f1", value=0.5, caption=caption)
    (run / "evaluation" / "ends.json").write_text(json.dumps(dict(best=[one], worst=[one])))


def test_pictures_are_in_the_page_and_captions_are_shown_letter_by_letter(tmp_path):
    runs = [make_run(tmp_path, "drawn", OBEYS), make_run(tmp_path, "bare", OBEYS)]
    add_pictures(runs[0], "<script>alert('{{ 1 }}')</script>")
    for shown in (runs[:1], runs):
        write_report(shown, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text()
        assert text.count('src="data:image/png;base64,') == 5 + 2
        assert "<script" not in text and text.count("&lt;script&gt;alert(&#39;{{ 1 }}&#39;)&lt;/script&gt;") == 1 + 2
        assert text.count("Pictures over the steps") == 1 and '<th class="mark">step 100</th>' in text
        assert text.index("Best samples") < text.index("Worst samples") < text.index("Configuration")


def test_sets_of_pictures_stand_below_the_figures(tmp_path):
    run = make_run(tmp_path, "obeys", OBEYS)
    measured = evaluation(0.8, True)
    measured["sets"] = {"with control": {"values": {"FID": 12.34567, "KID": 0.1}, "note": "of few"}}
    measured["encoders"] = {"one": "which it is", "two": "another"}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(measured))
    text = page([run], tmp_path / "page.html")
    assert "<td>FID 12.3457, KID 0.1000</td>" in text and "<small>of few</small>" in text
    assert re.search(r"one: which it is\s*<br>\s*two: another", text)


def test_a_run_without_any_validation_has_a_page(tmp_path):
    text = page([make_run(tmp_path, "bare", [], chance=False, evaluated=False)], tmp_path / "page.html")
    assert "Nothing was validated." in text


def test_the_page_fetches_nothing(tmp_path):
    write_report([make_run(tmp_path, "obeys", OBEYS)], tmp_path / "page.html")
    found = set(re.findall(r"https?://[\w.]+", (tmp_path / "page.html").read_text()))
    assert found <= {"http://www.w3.org", "http://purl.org", "http://creativecommons.org"}  # names of vocabularies


def test_a_folder_that_is_no_run_is_refused_by_its_name(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}/none holds no config.yaml"):
        write_report([make_run(tmp_path, "obeys", OBEYS), tmp_path / "none"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_steps_between_which_control_came_are_among_those_shown():
    assert shown_steps([0, 50, 100], [], 10) == [0, 50, 100]
    assert {50, 100} < set(shown_steps(list(range(0, 2000, 50)), [50, 100], 5))
    assert len(shown_steps(list(range(0, 2000, 50)), [50, 100], 5)) == 5
