"""A file of another kind than a verb reads is recognised, and the verb for it is told."""

import re
from pathlib import Path

import pytest
import yaml

from controlbooth.deploy.retrain.policy import Policy, load_policy
from controlbooth.launch.commands.ablate import Ablations, load_ablations
from controlbooth.launch.job.cluster import Cluster, load_cluster
from controlbooth.trainer.config.file_kinds import ABLATIONS, CLUSTER, OWN_KEYS, POLICY, RUN, SUBJECTS, kind_of
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig, load_run

CONFIGS = Path(__file__).parents[3] / "launch" / "configs"
CLASSES = {RUN: RunConfig, SUBJECTS: SubjectRunConfig, ABLATIONS: Ablations, POLICY: Policy, CLUSTER: Cluster}
LOAD = {
    RUN: load_config,
    SUBJECTS: load_run,
    ABLATIONS: load_ablations,
    POLICY: load_policy,
    CLUSTER: lambda path: load_cluster(path, "slurm"),
}
SHIPPED = {
    "quickstart.yaml": RUN,
    "photos.yaml": RUN,
    "sd15-edges.yaml": RUN,
    "transformer.yaml": RUN,
    "copied-blocks.yaml": ABLATIONS,
    "dreambooth.yaml": SUBJECTS,
    "ablations.yaml": ABLATIONS,
    "retrain.yaml": POLICY,
    "clusters/slurm.yaml": CLUSTER,
    "clusters/kubernetes.yaml": CLUSTER,
}


def test_the_keys_that_tell_a_kind_are_fields_of_it_and_of_no_other():
    for kind, keys in OWN_KEYS.items():
        for key in keys:
            assert [other for other, one in CLASSES.items() if key in one.model_fields] == [kind], key


def test_every_shipped_file_is_of_the_kind_that_reads_it():
    assert set(SHIPPED) == {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    assert {name: kind_of(yaml.safe_load((CONFIGS / name).read_text())) for name in SHIPPED} == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("wanted", LOAD)
def test_a_file_of_another_kind_is_refused_in_one_sentence_with_the_verb_for_it(name, wanted):
    if wanted == SHIPPED[name]:
        return
    said = f"^{re.escape(str(CONFIGS / name))} is {SHIPPED[name]}, not {wanted}: use controlbooth [^;]*$"
    with pytest.raises(ConfigError, match=said):
        LOAD[wanted](CONFIGS / name)


def test_the_sentence_names_the_file_and_overrides_change_nothing_of_it():
    path = CONFIGS / "retrain.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["max_steps=5"])
    assert str(caught.value) == f"{path} is a retraining policy, not a run: use controlbooth retrain tick {path}"


def test_a_run_with_a_key_of_another_kind_is_a_run_with_a_mistake(tmp_path):
    tree = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text()) | {"gate": 1, "triggers": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="unknown keys 'gate', 'triggers'; known keys"):
        load_config(tmp_path / "run.yaml")


def test_a_missing_run_of_subjects_names_those_that_are_shipped(tmp_path):
    with pytest.raises(ConfigError, match="Runs to start from, in launch/configs: dreambooth.yaml$"):
        load_run(tmp_path / "nothing.yaml")
