"""Whatever lies in the place of a file of a run, a job or a retraining is read, passed over with a word, or refused by
name in one line."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from controlbooth.data.inspection.ledger import read_ledgers
from controlbooth.data.inspection.quarantine import read_run
from controlbooth.deploy.retrain import audit
from controlbooth.deploy.retrain.lease import Lease, holder
from controlbooth.deploy.retrain.rounds import Round, State, read_state, write_state
from controlbooth.launch.commands.train import failures, is_finished
from controlbooth.launch.job import job as jobs
from controlbooth.launch.job.outcome import of_run
from controlbooth.launch.progress import folder_lines, run_lines, step_records
from controlbooth.trainer.config.loading import build_config, dump, load_config
from controlbooth.trainer.dreambooth.manifest import read_record as read_subjects
from controlbooth.trainer.evaluation.record import read_result, read_samples
from controlbooth.trainer.evaluation.verdict import Event, Validation, Verdict, as_tree, read_verdict
from controlbooth.trainer.run.continuing import read_record
from controlbooth.trainer.tracking.mlflow_address import how_to_open_saved
from controlbooth.trainer.tracking.spool import Spool, read_metrics

TIME = 1.7e9
CONFIG = build_config(
    dict(
        name="run", max_steps=9, global_batch_size=1, micro_batch_size=1, model=dict(base="miniature"),
        data=dict(shards="s", condition="edges"),
    )
)  # fmt: skip
JOB = dict(
    engine="slurm", name="run", submission=1, submitted=TIME, folder="/r", working_directory="/", subjects=0,
    subjects_per_task=0, id="7",
)  # fmt: skip
SUBJECT = dict(
    name="rex", images=["a.png"], class_noun="dog", identifier="sks", instance_prompt="a sks dog", class_prompt="a dog",
    steps=9, learning_rate=1e-4, rank=4, held_out=[],
)  # fmt: skip
VERDICT = Verdict(
    "validation/edge_f1", 8, 3, 0, Validation(9, 0.5, 0.6, 0.5, 0.7),
    (Event("announced", 6, 3, 9, 0.4, 0.6, 0.5, float("nan")),),
)  # fmt: skip
FIGURE = dict(mean=0.5, low=0.4, high=0.6)
EVALUATION = dict(
    step=9, digest="d", samples=8, resolution=64, data_fingerprint="f", encoders={}, told=None,
    figures={"with control": {"edge_f1": FIGURE | dict(chance=FIGURE, share=FIGURE)}},
    sets={"FID": dict(values={"with control": 1.0}, note="")}, sampler=dict(scheduler="ddim", steps=2, guidance=1.0),
)  # fmt: skip
LEDGER = dict(
    position=3, attempt=0, shard="s", byte=512, key="k", part="png", error="cut", contents="c", substitute_shard="s",
    substitute_byte=0,
)  # fmt: skip
ROUND = Round(1, "training", "/run", "by hand", TIME, "i", "f", 8, "scratch", "/", host="n", process=7)
SENT = dict(uri="http://h:1", experiment="e", key="0" * 32, created=TIME, experiment_id="1", run_id="2", params={})


def spooled(folder: Path) -> None:
    Spool(folder, "http://h:1", "e").close()


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


FILES: dict[str, tuple[str, list[Callable[[Path], object]]]] = {  # name -> what it holds, and who reads it
    "status.json": (
        json.dumps(dict(state="finished", step=9, attempt=1, time=TIME)),
        [run_lines, lambda folder: of_run(folder, 0.0), lambda folder: is_finished(folder, 0.0)],
    ),
    "failed-0.json": (
        json.dumps(dict(state="failed", rank=0, error="ValueError: x", attempt=1, time=TIME)),
        [lambda folder: of_run(folder, 0.0), lambda folder: failures(folder, 0.0)],
    ),
    "attempt.json": (
        json.dumps(dict(number=2, identity="a", given=None, host="n", process=7, time=TIME)), [read_record]
    ),
    "tracking.json": (
        json.dumps(SENT | dict(description={}, acknowledged=dict(metrics=0, artifacts=0))), [how_to_open_saved, spooled]
    ),
    "metrics.jsonl": (
        lines(
            dict(step=1, time=TIME, metrics=dict(loss=0.5, norm="NaN")), dict(time=TIME, system=dict(cpu=1.0)),
            dict(time=TIME, params=dict(a="b")), dict(time=TIME, status="RUNNING"), dict(time=TIME, artifact="a.png"),
            dict(step=2, time=TIME, checkpoint=dict(digest="d", uri="u", metrics=dict(loss=[0.5, TIME]))),
        ),
        [step_records, run_lines, lambda folder: list(read_metrics(folder)), spooled],
    ),
    "control.json": (json.dumps(as_tree(VERDICT)), [read_verdict, run_lines]),
    "config.yaml": (dump(CONFIG), [lambda folder: load_config(folder / "config.yaml"), read_run, run_lines]),
    "bad-samples-0.jsonl": (lines(LEDGER, LEDGER | dict(position=4)), [read_ledgers]),
    "subjects.json": (json.dumps([SUBJECT]), [folder_lines]),
    "job/job.json": (json.dumps(JOB), [jobs.read_record]),
    "job/submitting.json": (json.dumps(JOB), [jobs.read_intent]),
    "evaluation.json": (json.dumps(EVALUATION), [lambda folder: read_result(folder, *EVALUATION)]),
    "samples.jsonl": (lines(dict(way="w", place=[0, 1], edge_f1=0.5, chance=dict(edge_f1=0.1))), [read_samples]),
    "state.json": ("", [lambda folder: read_state(folder, TIME)]),
    "lease-00000001.json": (json.dumps(asdict(Lease(1, "o", "h", 7, TIME, 60.0))), [holder]),
    "audit.jsonl": (
        lines(dict(time=TIME, lease=1, round=None, decision="nothing", reason="none")),
        [lambda folder: audit.describe(audit.read(folder))],
    ),
}  # fmt: skip
HOSTILE = [
    b"", b"{", b"[]", b"{}", b"null", b"7", b'"text"', b"[[]]", b"[{}]", b'{"number": 1e400}', b"[" * 1_500,
    b"\xff\xfe\x00",
    b'{"state": "\\ud800", "time": NaN}', b'{"time": "yesterday"}', b"\x00" * 64, b"- - - -", b"a: !!timestamp b",
    b'{"state": 5, "step": "x", "time": [], "number": {}, "rounds": {}, "events": 3, "run_id": 3, "metrics": 1}',
]  # fmt: skip


@pytest.fixture(params=FILES)
def file(request, tmp_path):
    """(the folder, the file, what it holds, who reads it)"""
    content, readers = FILES[request.param]
    path = tmp_path / "run" / request.param
    path.parent.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump(CONFIG))
    if request.param == "subjects.json":
        readers = [*readers, read_subjects_of]
    if request.param == "state.json":
        write_state(path.parent, State(TIME, "f", (ROUND,)))
    else:
        path.write_text(content)
    return tmp_path / "run", path, path.read_bytes(), readers


def read_subjects_of(folder: Path) -> object:
    (folder / "config.yaml").write_text("name: run\nmodel: {base: miniature}\n")
    return read_subjects(folder)


def told(read: Callable[[Path], object], folder: Path, path: Path) -> None:
    """Fails unless the reader answers, or refuses in one line that names the file, or the line of it."""
    try:
        read(folder)
    except (ValueError, OSError) as error:
        said = str(error)
        assert path.name in said or isinstance(error, OSError), said
        assert len(said.splitlines()) == 1, said
        said.encode()


def test_what_was_written_is_read(file):
    folder, path, _, readers = file
    for read in readers:
        if read is not read_subjects_of:
            read(folder)


def test_hostile_contents_are_told(file, capsys):
    folder, path, _, readers = file
    for content in HOSTILE:
        for read in readers:
            path.write_bytes(content)
            told(read, folder, path)
    assert "Traceback" not in capsys.readouterr().err


def test_changed_and_cut_bytes_are_told(file):
    folder, path, data, readers = file
    draws = random.Random(path.name)
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(draws.choice((1, 1, 1, 3))):
            changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
        if draws.random() < 0.2:
            del changed[draws.randrange(len(changed)) :]
        for read in readers:
            path.write_bytes(changed)
            told(read, folder, path)


@pytest.mark.parametrize("what", ["folder", "pipe", "link to nothing", "link to a pipe", "link to itself"])
def test_what_is_no_file_is_told_and_not_waited_for(file, what):
    folder, path, _, readers = file
    for read in readers:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        pipe = path.with_name("pipe")
        if what == "folder":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "link to a pipe":
            os.mkfifo(pipe)
            path.symlink_to(pipe)
        else:
            path.symlink_to(path if what == "link to itself" else pipe)
        told(read, folder, path)
        pipe.unlink(missing_ok=True)
