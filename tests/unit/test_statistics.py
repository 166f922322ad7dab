import json

import numpy as np
import pytest

from controlbooth.trainer.config import ConfigError
from controlbooth.trainer.evaluate.compare import compare, main, read_evaluation
from controlbooth.trainer.evaluate.statistics import mean_and_interval


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


def evaluation(folder, values, data="held", **others):
    """The files of an evaluation with one figure."""
    (folder / "evaluation").mkdir(parents=True)
    facts = dict(data=data, condition="edges", base="miniature", sampler=dict(steps=10)) | others
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(facts))
    rows = [dict(way="with control", row=i, key=f"k{i}", caption="", edge_f1=float(v)) for i, v in enumerate(values)]
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


def test_evaluations_that_were_not_made_alike_are_not_compared(tmp_path):
    a = evaluation(tmp_path / "a", [0.5, 0.6])
    b = evaluation(tmp_path / "b", [0.5, 0.6], sampler=dict(steps=20))
    with pytest.raises(ConfigError, match="sampler is {'steps': 10} in A and {'steps': 20} in B"):
        compare(read_evaluation(a), read_evaluation(b))
    with pytest.raises(ConfigError, match="controlbooth evaluate"):
        read_evaluation(tmp_path)
