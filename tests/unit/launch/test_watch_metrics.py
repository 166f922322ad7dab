"""metrics.jsonl read as it grows: the same in any pieces, bounded in memory, begun anew where the file is another."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.launch.watch import growing
from controlbooth.launch.watch import metrics as reading
from controlbooth.launch.watch.metrics import Curve, Metrics


def step_line(step, loss=None, **more):
    metrics = {"loss": 1.0 / step if loss is None else loss, **more}
    return json.dumps({"time": 1.7e9 + step, "step": step, "metrics": metrics}, separators=(",", ":"))


def told(one):
    """Everything that a page is made of, as text: NaN is not equal to itself."""
    curves = {name: (curve.width, curve.points) for name, curve in one.curves.items()}
    rest = (one.validated, one.statuses, one.changed, one.system, one.unreadable, one.offset)
    return repr((curves, [*one.recent], rest))


LINES = st.one_of(
    st.integers(1, 10_000).map(step_line),
    st.floats(-1e3, 1e3).map(lambda value: step_line(7, value)),
    st.just('{"time":1.0,"step":3,"metrics":{"validation/edge_f1":0.5,"validation/edge_f1_chance":"NaN"}}'),
    st.sampled_from(["RUNNING", "FINISHED", "KILLED"]).map(lambda one: json.dumps({"time": 2.0, "status": one})),
    st.just('{"time":2.0,"tags":{"changed.max_steps":"40","state":"x"}}'),
    st.just('{"time":3.0,"system":{"cpu_percent":93.0},"group":"system"}'),
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=30),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LINES, max_size=60), st.lists(st.integers(0, 2**31), max_size=12), st.sampled_from([7, 64, 2**20]))
def test_what_is_read_in_any_pieces_is_what_is_read_at_once(tmp_path_factory, lines, cuts, chunk):
    folder = tmp_path_factory.mktemp("run")
    content = "".join(f"{line}\n" for line in lines).encode()
    ends = sorted({cut % (len(content) + 1) for cut in cuts} | {len(content)})
    in_pieces = Metrics(folder, most=8)
    with pytest.MonkeyPatch.context() as patch, (folder / "metrics.jsonl").open("wb", buffering=0) as file:
        patch.setattr(growing, "CHUNK", chunk)
        for begin, end in zip([0, *ends], ends, strict=False):
            file.write(content[begin:end])
            in_pieces.update()
    at_once = Metrics(folder, most=8)
    at_once.update()
    assert told(in_pieces) == told(at_once)


def test_a_last_line_without_its_end_is_left_until_it_has_one(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(step_line(1) + "\n" + step_line(2)[:20])
    one = Metrics(tmp_path)
    one.update()
    assert [record["step"] for record in one.recent] == [1] and one.unreadable == 0
    with file.open("a") as more:
        more.write(step_line(2)[20:] + "\n")
    assert one.update()
    assert [record["step"] for record in one.recent] == [1, 2] and one.unreadable == 0
    assert not one.update()


@pytest.mark.parametrize("how", ["by another file", "by another file of equal length", "in place", "deleted"])
def test_a_file_that_was_cut_back_or_replaced_is_read_anew(tmp_path, how):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f"{step_line(step)}\n" for step in range(1, 31)))
    one = Metrics(tmp_path)
    one.update()
    other = "".join(f"{step_line(step, 0.5)}\n" for step in range(1, 11))
    if how == "by another file of equal length":
        other = file.read_text()
    if how == "in place":
        file.write_text(other)
    elif how == "deleted":
        file.unlink()
        other = ""
    else:
        made = tmp_path / "made"
        made.write_text(other)
        os.replace(made, file)
    assert one.update()
    fresh = Metrics(tmp_path)
    fresh.update()
    assert told(one) == told(fresh) and len(one.curves["loss"].points if other else []) in (0, 10, 30)


def test_a_file_that_grew_again_beyond_what_was_read_of_an_earlier_one_is_known_by_its_last_bytes(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f"{step_line(step)}\n" for step in range(1, 21)))
    one = Metrics(tmp_path)
    one.update()
    with file.open("r+") as same:  # the same inode, as some network disks have it
        same.truncate()
        same.write("".join(f"{step_line(step, 0.25)}\n" for step in range(1, 61)))
    one.update()
    assert one.curves["loss"].points[0][1] == 0.25 and one.recent[-1]["step"] == 60


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_a_curve_keeps_the_extremes_and_the_mean_of_all_values_in_few_points(values):
    curve = Curve(8)
    for step, value in enumerate(values):
        curve.add(step, value)
    assert len(curve.points) <= 8 and curve.points[-1][0] == len(values) - 1
    assert min(point[2] for point in curve.points) == min(values)
    assert max(point[3] for point in curve.points) == max(values)
    counts = [curve.width] * (len(curve.points) - 1)
    counts.append(len(values) - sum(counts))
    mean = sum(count * point[1] for count, point in zip(counts, curve.points, strict=True)) / len(values)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-3)


def test_what_is_not_finite_leaves_a_curve_as_it_is(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(step_line(1) + "\n" + step_line(2, "NaN") + "\n")
    one = Metrics(tmp_path)
    one.update()
    assert [point[0] for point in one.curves["loss"].points] == [1]


def test_a_glance_at_a_long_file_reads_little_and_tells_the_end_the_loss_and_the_newest_validation(tmp_path):
    validated = '{"time":1.0,"step":900,"metrics":{"validation/edge_f1":0.625}}'
    lines = [step_line(step, padding=1.0) for step in range(1, 20_001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:9000], validated, *lines[9000:]]) + "\n")
    one = Metrics(tmp_path, glance=True)
    one.update()
    assert one.recent[-1]["step"] == 20_000 and one.validated == (900, {"validation/edge_f1": 0.625})
    steps = [point[0] for point in one.curves["loss"].points]
    assert steps[0] < 1000 and steps[-1] == 20_000 and steps == sorted(steps)
    assert sum(len(curve.points) for curve in one.curves.values()) < 1000
    with (tmp_path / "metrics.jsonl").open("a") as more:
        more.write(step_line(20_001) + "\n")
    one.update()
    assert one.recent[-1]["step"] == 20_001 and one.curves["loss"].points[-1][0] == 20_001


def test_of_a_very_long_file_steps_are_thinned_and_validations_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "THIN_BYTES", 10_000)
    validations = [f'{{"time":1.0,"step":{step},"metrics":{{"validation/edge_f1":0.5}}}}' for step in range(1, 101)]
    lines = [line for step, one in enumerate(validations) for line in [*[step_line(1 + step)] * 10, one]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    one = Metrics(tmp_path)
    one.update()
    assert len(one.curves["validation/edge_f1"].points) == 100
    assert 0 < len(one.curves["loss"].points) < 500


def test_reading_takes_about_as_long_as_it_may_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "CHUNK", 4096)
    (tmp_path / "metrics.jsonl").write_text("".join(f"{step_line(step)}\n" for step in range(1, 1001)))
    one, rounds = Metrics(tmp_path), 0
    one.update(seconds=0.0)
    assert one.is_left and one.offset < one.size
    while one.is_left:
        one.update(seconds=0.0)
        rounds += 1
    whole = Metrics(tmp_path)
    whole.update()
    assert told(one) == told(whole) and rounds > 5
