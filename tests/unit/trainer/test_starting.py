"""Runs that cannot work: refused before anything is written, in the same words by the dry run and by the start."""

import json
import os
import shutil

import pytest

from controlbooth.launch.commands.train import train as command
from controlbooth.trainer.config.loading import build_config, dump
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.controlnet.starting import refusals
from controlbooth.trainer.engine.distributed import join, leave
from controlbooth.trainer.run.continuing import checkpoint_folders
from controlbooth.trainer.run.integrity import write_marker
from controlbooth.trainer.tracking.mlflow_address import unusable

REACHED = 4


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    from controlbooth.launch.commands.data_pack import main as pack

    folder = tmp_path_factory.mktemp("shards")
    assert pack(["--scenes", "8", "--condition", "edges", "-o", str(folder), "--workers", "1"]) == 0
    return folder


@pytest.fixture
def tree(tmp_path, packed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return dict(
        name="run", output="runs", max_steps=10, global_batch_size=2, micro_batch_size=2,
        model=dict(base="miniature", hint_channels=[16, 32, 64, 96]),
        data=dict(shards=str(packed), condition="edges", resolution=64),
    )  # fmt: skip


def begun(tree, step=REACHED):
    """A checkpoint as the run of `tree` would have written it, but for its weights."""
    from controlbooth.data.loading.plan import order_state, plan_order
    from controlbooth.data.order.settings import OrderSettings
    from controlbooth.data.shards.manifest import open_dataset

    config = build_config(tree)
    dataset = open_dataset(config.data.shards or "")
    order, _ = plan_order(dataset, OrderSettings(config.seed, 2, 2, 2, condition="edges", resolution=64))
    checkpoint = config.output / config.name / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    state = dict(step=step, order=order_state(order, dataset.fingerprint, step * 2), zero_stage=2, precision="fp32")
    (checkpoint / "state.json").write_text(json.dumps(state | dict(condition="edges", base_digest="")))
    (checkpoint / "config.yaml").write_text(dump(config))
    write_marker(checkpoint)
    return checkpoint


def changed(tree, **changes):
    made = json.loads(json.dumps(tree))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        (made.setdefault(section, {}) if name else made)[name or section] = value
    return made


BAD_ADDRESSES = {
    "./mlruns": "MLflow keeps nothing in folders any more: write sqlite:///./mlruns/mlflow.db",
    "file:///data/mlruns": "write sqlite:////data/mlruns/mlflow.db",
    "localhost:5000": "it has no http:// in front: write http://localhost:5000",
    "10.0.0.7:5000/prefix": "write http://10.0.0.7:5000/prefix",
    "htpp://host:5000": "MLflow knows no htpp://. Did you mean http://host:5000",
    "postgres://me@host/db": "Did you mean postgresql://me@host/db",
    "sqlite:mlflow.db": "write sqlite:///",
    "sqlite://mlflow.db": "SQLite has no host: write sqlite:///mlflow.db",
    "sqlite://": "a store in memory is gone when the run ends",
    "sqlite:///:memory:": "a store in memory is gone",
    "http://": "it names no host",
    "http://host:port": "write http://HOST:5000",
    "http://host:99999": "write http://HOST:5000",
    "http://a host:5000": "it names no host",
    "mysql://me@host/db": "install its driver here",
    "sqlite:///folder": "folder is a folder: write sqlite:///folder/mlflow.db",
    "sqlite:///text.db": "text.db is no SQLite database",
    "sqlite:///text.db/mlflow.db": "text.db is a file, and the store's folder would lie in it",
    "uc:catalog": "MLflow knows no uc: here. Write http://HOST:5000 or sqlite:///FILE",
}
GOOD_ADDRESSES = (
    "http://host:5000", "https://host/prefix", "http://[::1]:5000", "sqlite:///new/folder/mlflow.db",
    "sqlite:////tmp/mlflow.db", "sqlite:///empty.db", "postgresql://me@host/db", "postgresql+psycopg://host/db",
    "databricks", "databricks://profile", "http://host-that-is-down.example:5000",
)  # fmt: skip


@pytest.mark.parametrize(("uri", "said"), BAD_ADDRESSES.items())
def test_an_address_that_can_never_work_is_refused_with_what_was_meant(tree, tmp_path, uri, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text("this is no database")
    (problem,) = refusals(build_config(changed(tree, tracking__uri=uri)))
    assert problem.startswith(f"tracking.uri is {uri!r}, where MLflow can keep nothing: ") and said in problem


@pytest.mark.parametrize("uri", GOOD_ADDRESSES)
def test_an_address_that_may_work_is_taken_whether_or_not_anybody_answers(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.db").touch()
    assert unusable(uri) is None and not (tmp_path / "new").exists()


def test_a_run_that_can_begin_go_on_or_is_finished_is_not_refused_and_nothing_is_written(tree, tmp_path):
    assert refusals(build_config(tree)) == [] and list(tmp_path.iterdir()) == []
    begun(tree)
    before = sorted(tmp_path.rglob("*"))
    for change in ({}, dict(max_steps=20), dict(optimizer__learning_rate=1e-4), dict(tracking__uri="http://other:1")):
        assert refusals(build_config(changed(tree, **change))) == []
    begun(tree, step=10)
    for change in ({}, dict(tracking__uri="http://other:1"), dict(data__threads=7), dict(micro_batch_size=1)):
        assert refusals(build_config(changed(tree, **change))) == []
    assert [path for path in before if not path.exists()] == []


BAD_RUNS = {  # name -> changes, what was done to the folder before, and what is said
    "tracking": (dict(tracking__uri="localhost:5000"), None, "it has no http:// in front"),
    "output is a file": (dict(output="file"), lambda run: None, "file is a file. Change output or name"),
    "run is a file": ({}, lambda run: (run.parent.mkdir(), run.write_text("")), "run is a file. Change output or name"),
    "finished, other rate": (dict(optimizer__learning_rate=1e-4), 10, "is not trained with these: optimizer.learning"),
    "finished, fewer steps": (dict(max_steps=5), 10, "is finished at step 10. Raise max_steps=5 above 10 to go on"),
    "fewer steps than reached": (dict(max_steps=3), 4, "is finished at step 4. Raise max_steps=3 above 4 to go on"),
    "another stage": (dict(engine__zero_stage=1), 4, "was saved with engine.zero_stage 2, and this run has 1"),
    "another precision": (dict(engine__precision="bf16"), 4, "was saved with engine.precision 'fp32'"),
    "another condition": (dict(data__condition="depth"), 4, "was saved with data.condition 'edges'"),
    "another network": (dict(model__only_mid_control=True), 4, "was saved with model.only_mid_control False"),
    "another seed": (dict(seed=1), 4, "has seed=0, this run has 1, so the samples would not continue"),
    "another batch": (dict(global_batch_size=4), 4, "has lanes=2, this run has 4"),
    "other blocks": (dict(data__shards_per_block=1), 4, "has shards_per_block=2, this run has 1"),
    "a damaged attempt.json": ({}, lambda run: write(run / "attempt.json", "{"), "attempt.json cannot be read"),
    "a damaged tracking.json": ({}, lambda run: write(run / "tracking.json", "[]"), "tracking.json cannot be read"),
    "a pipe for lines": ({}, lambda run: (run.mkdir(parents=True), os.mkfifo(run / "metrics.jsonl")), "is no file"),
    "all damaged": ({}, lambda run: write(run / "checkpoints/step-00000002/state.json", "{"), "There is no other"),
}  # fmt: skip


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("name", BAD_RUNS)
def test_the_dry_run_and_the_start_refuse_the_same_in_the_same_words(tree, tmp_path, monkeypatch, capsys, name):
    from controlbooth.trainer.controlnet import train  # torch, which the others do without

    changes, before, said = BAD_RUNS[name]
    (tmp_path / "file").write_text("")
    if isinstance(before, int):
        begun(tree, before)
    elif before is not None:
        before(tmp_path / "runs" / "run")
    asked = changed(tree, **changes)
    (tmp_path / "run.yaml").write_text(json.dumps(asked))
    there = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}

    assert command(str(tmp_path / "run.yaml"), dry_run=True) == 2
    dry = capsys.readouterr().err
    assert said in dry and "Traceback" not in dry

    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    world = join()
    try:
        with pytest.raises(ConfigError) as refused:
            train.train(build_config(asked), world, stop=None)  # type: ignore[arg-type]
    finally:
        leave()
    assert f"controlbooth train: {refused.value}\n" in dry
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == there


def test_data_that_have_changed_since_are_refused_by_both(tree, tmp_path, packed, capsys):
    begun(tree)
    shutil.copytree(packed, tmp_path / "other")
    from controlbooth.launch.commands.data_pack import main as pack

    shutil.rmtree(tmp_path / "other")
    assert pack(["--scenes", "6", "--condition", "edges", "-o", str(tmp_path / "other"), "--workers", "1"]) == 0
    (problem,) = refusals(build_config(changed(tree, data__shards=str(tmp_path / "other"))))
    assert "point the run at the data set it began with" in problem


def test_a_newer_damaged_checkpoint_is_passed_over_for_an_older_whole_one(tree):
    begun(tree, 2)
    newer = begun(tree, 4)
    (newer / "state.json").write_text((newer / "state.json").read_text().replace('"step": 4', '"step": 5'))
    assert refusals(build_config(tree)) == []
    assert len(checkpoint_folders(newer.parents[1])) == 2
