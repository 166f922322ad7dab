"""`controlbooth mirror`: what TensorBoard and Weights & Biases get is what metrics.jsonl says, once."""

import importlib.util
import json
import math
import os
import struct
import time

import pytest

from controlbooth.data.errors import UserError
from controlbooth.launch import mirror as mirrors
from controlbooth.launch.cli import main as controlbooth
from controlbooth.launch.mirror import Mirror, update
from controlbooth.launch.watch.finding import Finder

NEEDED = {
    kind: pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"pip install 'controlbooth[{kind}]', which is optional"
    )
    for kind, package in mirrors.KINDS.items()
}


def record(step, **figures):
    return {"time": 1.7e9 + step / 4, "step": step, "metrics": figures}


def write(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "made"
    made.write_text("".join(json.dumps(one) + "\n" for one in records))
    os.replace(made, folder / "metrics.jsonl")
    (folder / "config.yaml").write_text("max_steps: 9")


def add(folder, *records):
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in records)


RECORDS = (
    {"time": 1.0, "status": "RUNNING"},
    record(1, loss=0.5, grad_norm=0.25),
    record(1, **{"validation/edge_f1": 0.125}),
    {"time": 2.0, "system": {"cpu_percent": 5.0}},
    record(2, loss=0.375, grad_norm="NaN"),
)
TOLD = [(1, 1.7e9 + 0.25, {"loss": 0.5, "grad_norm": 0.25}), (1, 1.7e9 + 0.25, {"validation/edge_f1": 0.125})]


def of_tensorboard(folder):
    """-> (step, time, figures) of each entry of the event files, in order."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.*")
    events = [Event.FromString(content) for content in RawEventFileLoader(str(path)).Load()]
    found = [
        (one.step, one.wall_time, {value.tag: value.simple_value for value in one.summary.value}) for one in events
    ]
    return [one for one in found if one[2]]


def of_wandb(folder):
    """-> (step, time, figures) of each entry of an offline run, which another process of W&B's writes to its end."""
    end = time.monotonic() + 60
    while not (told := wandb_entries(folder))[1]:
        assert time.monotonic() < end, "the offline run has no end"
        time.sleep(0.2)
    return told[0]


def wandb_entries(folder):
    """-> the entries of a file in the format of LevelDB's logs, and whether it has its end."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, at, rest, found, has_end = path.read_bytes(), 7, b"", [], False
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, size, part = struct.unpack("<IHB", content[at : at + 7])
        rest += content[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # whole, or the last part
            one, rest = Record.FromString(rest), b""
            has_end |= one.WhichOneof("record_type") in ("exit", "footer")
            if one.WhichOneof("record_type") == "history":
                items = {(item.key or "/".join(item.nested_key)): item.value_json for item in one.history.item}
                values = {name: float(json.loads(text)) for name, text in items.items() if not name.startswith("_")}
                found.append((int(values.pop("step")), values.pop("time"), values))
    return found, has_end


def same(found, expected):
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    for (_, _, ours), (_, _, theirs) in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == value or (math.isnan(value) and math.isnan(ours[name]))


READERS = [
    pytest.param("tensorboard", of_tensorboard, marks=NEEDED["tensorboard"]),
    pytest.param("wandb", of_wandb, marks=[NEEDED["wandb"], pytest.mark.slow]),
]


@pytest.mark.parametrize(("kind", "read"), READERS)
def test_a_mirror_has_every_figure_of_every_step_once_also_after_a_resume(tmp_path, kind, read):
    write(tmp_path / "run", *RECORDS)
    last = (2, 1.7e9 + 0.5, {"loss": 0.375, "grad_norm": math.nan})
    one = Mirror(tmp_path / "run", "run", tmp_path / "out", kind)
    one.update()
    add(tmp_path / "run", record(3, loss=0.75))
    one.update()
    one.close()
    same(read(tmp_path / "out"), [*TOLD, last, (3, 1.7e9 + 0.75, {"loss": 0.75})])
    one.update()
    write(tmp_path / "run", *RECORDS)  # as a start that goes on from the checkpoint of step 2
    add(tmp_path / "run", record(3, loss=1.5))
    one.update()
    one.close()
    same(read(tmp_path / "out"), [*TOLD, last, (3, 1.7e9 + 0.75, {"loss": 1.5})])
    again = Mirror(tmp_path / "run", "run", tmp_path / "out", kind)
    again.update()
    again.close()
    same(read(tmp_path / "out"), [*TOLD, last, (3, 1.7e9 + 0.75, {"loss": 1.5})])


@NEEDED["tensorboard"]
def test_a_run_of_subjects_has_a_mirror_for_the_job_and_for_each_subject(tmp_path, capsys):
    runs = tmp_path / "runs"
    write(runs / "pets", record(1, **{"train/step_seconds": 0.5}))
    (runs / "pets" / "subjects.json").write_text('[{"name": "rex"}]')
    write(runs / "pets" / "subjects" / "rex", record(1, **{"train/instance_loss": 0.25}))
    write(runs / "first", *RECORDS)
    words = ["mirror", str(runs), "--to", "tensorboard", "--out", str(tmp_path / "out")]
    assert controlbooth(words) == 0 and controlbooth(words) == 0
    assert "3 mirrors with 5 records" in capsys.readouterr().out
    assert of_tensorboard(tmp_path / "out" / "pets" / "job")[0][2] == {"train/step_seconds": 0.5}
    assert of_tensorboard(tmp_path / "out" / "pets" / "subjects" / "rex")[0][2] == {"train/instance_loss": 0.25}
    assert len(of_tensorboard(tmp_path / "out" / "first")) == 3


def test_without_the_package_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mirrors, "KINDS", {"tensorboard": "no_such_package"})
    write(tmp_path / "run", *RECORDS)
    assert controlbooth(["mirror", str(tmp_path / "run"), "--to", "tensorboard", "-o", str(tmp_path / "out")]) == 2
    assert "pip install 'controlbooth[tensorboard]'" in capsys.readouterr().err


def test_a_folder_with_something_else_in_it_is_left_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else than a mirror"):
        Mirror(tmp_path, "run", tmp_path / "out", "tensorboard")
    assert (tmp_path / "out" / "thesis.tex").is_file()


def test_mirrors_are_not_written_into_the_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mirrors, "KINDS", {"tensorboard": "json"})
    write(tmp_path / "run", *RECORDS)
    assert controlbooth(["mirror", str(tmp_path), "--to", "tensorboard", "-o", str(tmp_path / "out")]) == 2
    assert "whose runs are only read" in capsys.readouterr().err


def test_two_runs_of_one_name_are_refused(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "run").mkdir(parents=True)
        (tmp_path / place / "run" / "config.yaml").write_text("max_steps: 9")
    finder = Finder([tmp_path / "here" / "run", tmp_path / "there" / "run"])
    with pytest.raises(UserError, match="two runs are called run"):
        update(finder, {}, tmp_path / "out", "tensorboard")
