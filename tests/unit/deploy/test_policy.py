"""A policy is refused with what is wrong and what to do, and the shipped one is complete."""

import datetime
from pathlib import Path

import pytest
import yaml

from controlbooth.deploy.retrain.policy import cluster_of, load_policy, round_config, zone
from controlbooth.launch import cli
from controlbooth.launch.job.cluster import Cluster
from controlbooth.trainer.config.section import ConfigError

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "launch" / "configs" / "retrain.yaml"
RUN = dict(
    name="template",
    max_steps=10,
    global_batch_size=4,
    micro_batch_size=2,
    model=dict(base="miniature"),
    data=dict(shards="old", condition="edges"),
)
POLICY = dict(
    name="edges",
    run="run.yaml",
    data="shards",
    triggers=dict(growth=dict(samples=10)),
    evaluation=dict(data="held"),
    gate=dict(metric="edge_f1"),
)


def write(folder, run=RUN, **changes):
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump(POLICY | changes))
    return path


def test_the_shipped_policy_is_complete_and_its_run_is_too():
    policy = load_policy(SHIPPED)
    config = round_config(policy, "edges-0001", "frozen.jsonl", None)
    assert config.data.shards == "frozen.jsonl" and config.name == "edges-0001"
    assert "controlbooth retrain tick launch/configs/retrain.yaml" in SHIPPED.read_text()
    assert datetime.datetime(2026, 1, 4, tzinfo=zone(policy.triggers.clock)).utcoffset() == datetime.timedelta(hours=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(evaluaton=dict(data="x")), "unknown key 'evaluaton'; did you mean 'evaluation'?"),
        (dict(triggers=dict(growth=dict(sample=1))), "did you mean 'triggers.growth.samples'?"),
        (dict(triggers=dict()), "give at least one of clock, growth and drift"),
        (dict(triggers=dict(growth=dict())), "give samples, share or both"),
        (dict(triggers=dict(clock=dict(cron="61 * * * *"))), "not a cron line of five fields"),
        (dict(triggers=dict(clock=dict(cron="* * * * * *"))), "not a cron line of five fields"),
        (dict(triggers=dict(clock=dict(cron="0 3 * * *", every_hours=3))), "give either cron or every_hours"),
        (dict(triggers=dict(clock=dict(cron="0 3 * * *", timezone="Mars/Base"))), "'Mars/Base': no such time zone"),
        (
            dict(gate=dict(metric="edge_f1", margin=float("nan"))),
            "'gate.margin' is nan: Input should be a finite number",
        ),
        (
            dict(gate=dict(metric="edge_f1", no_regression=dict(mask_iou=float("inf")))),
            "Input should be a finite number",
        ),
        (dict(gate=dict(metric="edge_f1", no_regression=dict(mask_iou=-0.1))), "tolerances are 0 or more"),
        (dict(gate=dict(metric="edge_f1", confidence=95)), "'gate.confidence' is 95"),
        (dict(gate=dict()), "'gate.metric' is missing"),
        (dict(engine="cloud"), "'engine' is 'cloud'"),
        (dict(name="a/b"), "'name' is 'a/b'"),
        (dict(cluster="c.yaml"), "cluster is c.yaml, and engine is local, which has none"),
        (dict(engine="slurm", processes=2), "processes is 2, and engine is slurm, whose ranks are nodes x"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        load_policy(write(tmp_path, **changes))
    assert message in str(caught.value)


def test_the_cluster_file_lies_beside_the_policy_and_must_be_there_and_of_its_engine(tmp_path):
    assert cluster_of(load_policy(write(tmp_path))) is None
    policy = load_policy(write(tmp_path, engine="slurm"))
    with pytest.raises(ConfigError, match="cluster.yaml does not exist. launch/configs/clusters/ has some"):
        cluster_of(policy)
    (tmp_path / "cluster.yaml").write_text("nodes: 2")
    (tmp_path / "other.yaml").write_text("engine: kubernetes")
    assert cluster_of(policy) == Cluster(engine="slurm", nodes=2)
    with pytest.raises(ConfigError, match="other.yaml is of engine kubernetes, and this is for slurm.*in a policy"):
        cluster_of(load_policy(write(tmp_path, engine="slurm", cluster="other.yaml")))


def test_a_storage_that_pods_see_elsewhere_than_the_tick_is_refused(tmp_path):
    policy = load_policy(write(tmp_path, engine="kubernetes"))

    def mounted(here):
        storage = [dict(claim="shared", path="/data", here=here)]
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(dict(kubernetes=dict(storage=storage))))
        return cluster_of(policy)

    assert mounted("/data").kubernetes.storage[0].claim == "shared"
    with pytest.raises(ConfigError, match="shared is /data in pods and /mnt/data here"):
        mounted("/mnt/data")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dict(condition="edges", sources=[dict(shards="a"), dict(shards="b")]), "has data.sources, which cannot"),
        (dict(condition="edges", latent_cache="c"), "has data.latent_cache, which cannot"),
    ],
)
def test_a_run_whose_data_cannot_grow_is_refused(tmp_path, data, message):
    policy = load_policy(write(tmp_path, run=RUN | dict(data=data)))
    with pytest.raises(ConfigError, match=message):
        round_config(policy, "edges-0001", "frozen.jsonl", None)


def test_a_round_is_the_template_with_its_changes_name_data_and_start(tmp_path):
    policy = load_policy(write(tmp_path, changes=["max_steps=7"]))
    config = round_config(policy, "edges-0002", "a: b#c.jsonl", "/champion/controlnet")
    assert (config.max_steps, config.name, config.data.shards) == (7, "edges-0002", "a: b#c.jsonl")
    assert config.model.controlnet == "/champion/controlnet" and config.data.condition == "edges"


@pytest.mark.parametrize("verb", ["tick", "status", "rollback", "history"])
def test_every_verb_shows_examples_and_exit_statuses_and_explains_a_missing_policy(verb, tmp_path, capsys):
    assert cli.main(["retrain", verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"controlbooth retrain {verb}" in shown and "exit statuses" in shown
    assert cli.main(["retrain", verb, str(tmp_path / "none.yaml")]) == 2
    assert "launch/configs/retrain.yaml is one" in capsys.readouterr().err
