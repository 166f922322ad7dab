"""Aliases in a real SQLite store: promotion, repetition, the way back, and a registry that is away."""

import logging
import shutil

import pytest

from controlbooth.deploy.retrain import registry
from controlbooth.deploy.retrain.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry, RegistryAway
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A store with the run of three checkpoints, and the run's id."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    tracker = Tracker(folder / "run", uri, "tests", "a run", {}, {}, system_metrics_seconds=3600.0)
    for step in (1, 2, 3):
        tracker.log_checkpoint(step, f"digest-{step}", f"file:///runs/a%20run/checkpoints/step-0000000{step}", {}, {})
    tracker.finish("RUNNING")
    assert tracker.close(120.0) == 0
    return folder, tracker._spool.state.run_id


@pytest.fixture
def there(logged, tmp_path):
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    shutil.copy(logged[0] / "mlflow.db", tmp_path / "mlflow.db")
    found = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", "edges")
    registry.claim(found, tmp_path / "state")
    return found


def numbers(there):
    return {alias: one.number for alias, one in registry.aliases(there).items()}


def test_a_checkpoint_is_registered_once_and_leads_back_to_its_folder(there, logged):
    first = registry.register(there, logged[1], "digest-2", {"round": "1"})
    assert first is not None
    assert registry.register(there, logged[1], "digest-2", {"round": "1"}) == first
    assert (first.number, first.step, str(first.run)) == (1, 2, "/runs/a run")
    assert first.tags["round"] == "1" and numbers(there) == {CHALLENGER: 1}
    assert registry.register(there, logged[1], "not yet sent", {}) is None


def test_promotions_and_the_whole_way_back(there, logged):
    for step in (1, 2, 3):
        version = registry.register(there, logged[1], f"digest-{step}", {})
        assert version is not None
        for _ in range(2):  # a tick that died after the move repeats it
            registry.promote(there, version.number, version.number - 1 or None)
    assert numbers(there) == {CHAMPION: 3, CHALLENGER: 3, PREVIOUS: 2}
    leaving, returning = registry.rollback(there)
    assert (leaving.number, returning.number) == (3, 2)
    assert numbers(there) == {CHAMPION: 2, CHALLENGER: 3, PREVIOUS: 1}
    registry.rollback(there)
    assert numbers(there) == {CHAMPION: 1, CHALLENGER: 3}
    with pytest.raises(ConfigError, match="version 1 of 'edges' is the first champion"):
        registry.rollback(there)


def test_without_a_champion_there_is_no_way_back(there):
    with pytest.raises(ConfigError, match="has no champion"):
        registry.rollback(there)


def test_a_verdict_is_written_on_the_version(there, logged):
    version = registry.register(there, logged[1], "digest-1", {})
    assert version is not None
    registry.note_verdict(there, version.number, "refused", "x" * 9000)
    tags = there.client.get_model_version("edges", "1").tags
    assert tags["verdict"] == "refused" and len(tags["reason"]) == 5000


def test_a_model_belongs_to_one_state_folder(there, tmp_path):
    registry.claim(there, tmp_path / "state")
    with pytest.raises(ConfigError, match="is retrained with the state in .*state, and this policy's is .*other"):
        registry.claim(there, tmp_path / "other")


def test_a_dead_run_is_marked_once(there, logged):
    assert registry.mark_dead(there, logged[1])
    assert there.client.get_run(logged[1]).info.status == "KILLED"
    assert not registry.mark_dead(there, logged[1])


def test_a_version_of_others_is_refused(there, logged):
    registry.register(there, logged[1], "digest-1", {})
    there.client.delete_model_version_tag("edges", "1", "uri")
    with pytest.raises(ConfigError, match="has no tag uri: it was not registered by a tick"):
        registry.aliases(there)


def test_looking_makes_no_store(tmp_path):
    assert registry.aliases(Registry(f"sqlite:///{tmp_path / 'none' / 'mlflow.db'}", "edges")) == {}
    assert not (tmp_path / "none").exists()


def test_a_server_that_is_away_is_named_with_what_to_do(tmp_path):
    away = Registry("http://127.0.0.1:9", "edges")
    for ask in (registry.aliases, registry.rollback, lambda one: registry.claim(one, tmp_path)):
        with pytest.raises(RegistryAway, match="registry at http://127.0.0.1:9 does not answer .*Nothing was changed"):
            ask(away)


def test_a_local_store_that_cannot_be_made_is_away(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RegistryAway, match="does not answer as it should .*File exists.*Nothing was changed"):
        registry.claim(Registry(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}", "edges"), tmp_path / "state")
