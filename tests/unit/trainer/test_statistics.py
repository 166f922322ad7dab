import json

import numpy as np
import pytest

from controlbooth.launch.commands.compare import main
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.evaluation.compare import compare, read_evaluation, table
from controlbooth.trainer.evaluation.statistics import mean_and_interval


def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    draw = np.random.default_rng(3)
    inside = 0
    for _ in range(60):
        found = mean_and_interval(draw.normal(0.5, 0.1, 40))
        inside += found["low"] <= 0.5 <= found["high"]
    assert 52 <= inside <= 60


def test_the_interval_is_the_same_each_time_and_shrinks_with_more_samples():
    values = np.random.default_rng(0).random(400)
    assert mean_and_interval(values) == mean_and_interval(values.copy())
    few, many = mean_and_interval(values[:25]), mean_and_interval(values)
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 2


def evaluation(folder, values, chances=None, **others):
    """The files of an evaluation with one figure; real pictures, if chances are given, all have .9 of it."""
    (folder / "evaluation").mkdir(parents=True)
    facts = dict(data="held", data_fingerprint="f" * 32, base="miniature", base_digest="b" * 64, condition="edges")
    facts |= dict(where=str(folder), resolution=64, networks={}, sampler=dict(steps=10), metrics_version=2)
    facts |= dict(base_identity={"scheduler": {"prediction_type": "epsilon"}}) | others
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(facts))
    rows = [
        dict(way="with control", row=i, key="00000000", place=[i // 2, i % 2], caption="") for i in range(len(values))
    ]
    told = [{} for _ in rows] if chances is None else [dict(edge_f1=float(chance)) for chance in chances]
    reals = [] if chances is None else [row | dict(way="real pictures", edge_f1=0.9, chance={}) for row in rows]
    rows = [row | dict(edge_f1=float(v), chance=own) for row, v, own in zip(rows, values, told, strict=True)] + reals
    (folder / "evaluation" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_gain_that_is_lost_among_samples_is_found_by_pairing_them(tmp_path, capsys):
    draw = np.random.default_rng(1)
    hard = draw.random(40)  # some conditions are harder than others, for both
    a = evaluation(tmp_path / "a", hard)
    b = evaluation(tmp_path / "b", hard + 0.02 + draw.normal(0, 0.01, 40))
    found = compare(read_evaluation(a), read_evaluation(b))["with control"]["edge_f1"]
    assert found["difference_low"] > 0.01 and found["difference_high"] < 0.03
    assert mean_and_interval(hard)["high"] - mean_and_interval(hard)["low"] > 0.15
    assert main([str(a), str(b), "--json", str(tmp_path / "difference.json")]) == 0
    assert "*" in capsys.readouterr().out
    assert json.loads((tmp_path / "difference.json").read_text())["with control"]["edge_f1"] == found


def test_samples_of_one_key_are_paired_by_their_places_in_the_data_set(tmp_path):
    """All keys of `evaluation` are equal; B has measured every second sample, as one with fewer samples may."""
    values = np.arange(8) / 10
    a, b = evaluation(tmp_path / "a", values), evaluation(tmp_path / "b", values + 0.05)
    rows = (b / "evaluation" / "samples.jsonl").read_text().splitlines(keepends=True)
    (b / "evaluation" / "samples.jsonl").write_text("".join(rows[::-2]))
    found = compare(read_evaluation(a), read_evaluation(b))["with control"]["edge_f1"]
    assert found["samples"] == 4 and found["better"] == 1.0
    assert found["difference_low"] == pytest.approx(0.05) and found["difference_high"] == pytest.approx(0.05)


def test_an_evaluation_that_tells_samples_by_keys_alone_says_what_to_run_again(tmp_path):
    a = evaluation(tmp_path / "a", [0.5, 0.6])
    written = a / "evaluation" / "samples.jsonl"
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    written.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "place"}) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=f"keys that may repeat. Measure it by `controlbooth evaluate {a}` again"):
        read_evaluation(a)


def test_what_is_gained_of_what_is_possible_stands_beside_what_is_gained(tmp_path):
    draw = np.random.default_rng(1)
    hard = draw.uniform(0, 0.1, 40)
    a = evaluation(tmp_path / "a", 0.2 + hard, chances=0.1 + hard)
    b = evaluation(tmp_path / "b", 0.6 + hard, chances=0.3 + hard)  # denser pictures, which gain by chance too
    found = compare(read_evaluation(a), read_evaluation(b))["with control"]
    assert found["edge_f1"]["difference_mean"] == pytest.approx(0.4)
    assert found["edge_f1"]["chance_a"] == pytest.approx(0.1 + hard.mean())
    assert found["edge_f1"]["chance_b"] == pytest.approx(0.3 + hard.mean())
    share = found["edge_f1_share"]
    assert share["a"] == pytest.approx(0.1 / (0.8 - hard.mean()))
    assert share["b"] == pytest.approx(0.3 / (0.6 - hard.mean()))
    assert share["difference_mean"] == pytest.approx(share["b"] - share["a"])
    assert share["difference_low"] < share["difference_mean"] < share["difference_high"] < share["b"]
    shown = table({"with control": found}, tmp_path, tmp_path).splitlines()
    assert shown[3].startswith("with control, edge f1 ") and shown[4].startswith("with control, edge f1 share ")
    assert f"{0.1 + hard.mean():.3f}" in shown[3] and shown[-1].startswith("chance: the same pictures under")


def test_a_share_that_cannot_be_told_is_not_compared(tmp_path):
    at_chance = np.random.default_rng(1).uniform(0.8, 1.0, 12)  # real pictures are no better
    a, b = (evaluation(tmp_path / name, at_chance, chances=at_chance) for name in "ab")
    assert compare(read_evaluation(a), read_evaluation(b))["with control"].keys() == {"edge_f1"}


def test_the_columns_of_a_comparison_stand_under_each_other_however_long_the_names(tmp_path):
    one = dict(a=0.1, b=0.2, difference_mean=0.1, difference_low=0.05, difference_high=0.15, better=1.0)
    figures = {"edge_f1": one, "says_object_colour": one}
    _, _, head, short, long, *_ = table({"with control, no prompt": figures}, tmp_path, tmp_path).splitlines()
    assert short.startswith("with control, no prompt, edge f1 ")
    assert long.startswith("with control, no prompt, object colour  ")
    assert short[-70:] == long[-70:] and head.index("B - A") + len("B - A") == short.index("+0.100") + len("+0.100")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sampler=dict(steps=20)), "sampler is {'steps': 10} in A and {'steps': 20} in B"),
        (dict(resolution=32), "resolution is 64 in A and 32 in B"),
        (
            dict(base_digest="c" * 64),
            r"base_digest is bbbbbbbbbbbb \(miniature\) in A and cccccccccccc \(miniature\) in B",
        ),
        (
            dict(data_fingerprint="e" * 32),
            r"data_fingerprint is ffffffffffff \(held\) in A and eeeeeeeeeeee \(held\) in B",
        ),
        (
            dict(base_identity={"scheduler": {"prediction_type": "v_prediction"}}),
            "the base's prediction_type was epsilon in A and in B it is v_prediction",
        ),
        (dict(metrics_version=3), "metrics_version is 2 in A and 3 in B"),
        (dict(networks=dict(depth="/dpt")), "networks is {} in A and {'depth': '/dpt'} in B"),
    ],
)
def test_evaluations_that_were_not_made_alike_are_not_compared(change, message, tmp_path):
    a = evaluation(tmp_path / "a", [0.5, 0.6])
    b = evaluation(tmp_path / "b", [0.5, 0.6], **change)
    with pytest.raises(ConfigError, match=message):
        compare(read_evaluation(a), read_evaluation(b))


def test_shards_and_a_base_are_the_same_under_any_path(tmp_path):
    a = evaluation(tmp_path / "a", [0.5, 0.6])
    b = evaluation(tmp_path / "b", [0.5, 0.6], data=str(tmp_path / "held"), base="/models/miniature")
    assert compare(read_evaluation(a), read_evaluation(b))["with control"]["edge_f1"]["difference_mean"] == 0.0


def test_an_evaluation_of_an_older_version_says_what_to_run_again(tmp_path):
    a = evaluation(tmp_path / "a", [0.5, 0.6])
    b = evaluation(tmp_path / "b", [0.5, 0.6])
    written = b / "evaluation" / "evaluation.json"
    facts = json.loads(written.read_text())
    written.write_text(json.dumps({key: facts[key] for key in facts if key not in ("base_digest", "networks")}))
    with pytest.raises(ConfigError, match=f"B was .* note base_digest, networks. .*`controlbooth evaluate {b}`"):
        compare(read_evaluation(a), read_evaluation(b))


def test_a_folder_without_an_evaluation_says_what_to_run(tmp_path):
    with pytest.raises(ConfigError, match="controlbooth evaluate"):
        read_evaluation(tmp_path)
