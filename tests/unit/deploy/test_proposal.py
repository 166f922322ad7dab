"""Whether a round is proposed, on real shards, with a registry that was told what to say."""

from dataclasses import replace

import numpy as np
import pytest
from policies import NOW, World, pack_scenes

from controlbooth.deploy.retrain import growth, registry
from controlbooth.deploy.retrain.proposal import check_start, identity_of
from controlbooth.deploy.retrain.registry import Version
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.section import ConfigError


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_scenes(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def world(packed, tmp_path):
    return World(packed, tmp_path)


def test_the_first_round_needs_no_trigger(world):
    one = world.propose()
    assert one.start and one.number == 1 and one.config.name == "edges-0001" and one.weights is None
    assert "no round was decided yet" in one.reason and "12 samples, 12 of them new" in one.reason
    check_start(world.policy, one)


def test_growth_starts_the_next_one_and_nothing_does_before(world):
    world.decided("refused")
    assert not world.propose().start and "growth: 0 new samples; 6 are wanted" in world.propose().reason
    world.deliver("b")
    assert world.propose().start and world.propose().number == 2


def test_what_would_give_the_same_weights_again_is_not_trained_again(world):
    world.write(triggers=dict(clock=dict(every_hours=1)))
    world.decided("refused", NOW - 3601)
    one = world.propose()
    assert not one.start and "round 1, which was refused, had the same run, data and start" in one.reason
    assert world.propose(by_hand=True).start
    world.deliver("b")
    assert world.propose().start


def test_a_round_that_failed_is_not_repeated_on_the_same_data_and_has_learned_none_of_it(world):
    world.decided("failed")
    one = world.propose()
    assert (
        not one.start
        and "round 1, which was failed" in one.reason
        and "`controlbooth retrain tick --now`" in one.reason
    )
    assert one.found.new == 12


def test_a_data_set_that_shrank_is_said_even_where_nothing_is_started(world):
    world.deliver("b")
    world.decided("promoted")
    (world.folder / "data" / "b.tar").unlink()
    (world.folder / "data" / "b.tar.idx").unlink()
    one = world.propose()
    assert not one.start and "SHRANK: 1 shards with 6 samples are gone" in one.reason


def test_the_next_round_starts_from_the_champion_unless_it_is_told_otherwise(world, monkeypatch):
    champion = Version(3, "digest", 4, world.folder / "runs" / "old" / "checkpoints" / "step-00000004", {})
    monkeypatch.setattr(registry, "aliases", lambda there: {registry.CHAMPION: champion})
    warm = world.propose()
    assert warm.weights == champion and warm.config.model.controlnet.endswith("step-00000004/controlnet")
    with pytest.raises(ConfigError, match="start from the champion in .*step-00000004, which is not there"):
        check_start(world.policy, warm)
    world.write(start="scratch")
    scratch = world.propose()
    assert scratch.weights is None and scratch.config.model.controlnet == "unet"
    assert warm.identity != scratch.identity


@pytest.mark.parametrize(("fresh", "due"), [(0.5, True), (0.79, False)])
def test_drift_of_the_champion_starts_a_round(world, monkeypatch, fresh, due):
    world.write(triggers=dict(drift=dict(data="fresh", metric="edge_f1", margin=0.1)))
    world.decided("promoted")
    champion = Version(1, "digest", 4, world.folder / "runs" / "old" / "checkpoints" / "step-00000004", {})
    monkeypatch.setattr(registry, "aliases", lambda there: {registry.CHAMPION: champion})
    spread = np.linspace(-0.05, 0.05, 20)
    one = world.propose(measured=lambda drift, version: (0.8 + spread, fresh + spread))
    assert one.start == due and "drift: the champion's edge_f1 is 0.800" in one.reason
    assert "drift: is measured by a tick" in world.propose().reason


def test_an_evaluation_set_that_was_trained_on_is_refused(world):
    world.write(evaluation=dict(data=str(world.packed / "a"), samples=4))
    with pytest.raises(ConfigError, match="overlaps the training data"):
        check_start(world.policy, world.propose())


def test_a_frozen_set_that_changed_is_refused_unless_the_policy_says_so(world):
    held = growth.current(str(world.packed / "held")).fingerprint
    world.state = replace(world.state, evaluation_fingerprint="0" * 32)
    with pytest.raises(ConfigError, match=f"is not what it was: its fingerprint is {held}, and 0000"):
        world.propose()
    world.write(evaluation=dict(data=str(world.packed / "held"), samples=4, fingerprint=held))
    assert world.propose().start


def test_a_frozen_set_that_is_too_small_is_refused(world):
    world.write(evaluation=dict(data=str(world.packed / "held"), samples=9))
    with pytest.raises(ConfigError, match="evaluation.samples=9 pictures are asked for, and .* has 8"):
        world.propose()


def test_a_run_folder_of_unknown_origin_is_not_written_into(world):
    (world.folder / "runs" / "edges-0001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="edges-0001 exists and is no round of this policy"):
        check_start(world.policy, world.propose())


def test_an_identity_is_of_what_determines_the_weights(world):
    config = world.propose().config
    named = config.model_copy(update=dict(name="other", output=world.folder))
    longer = config.model_copy(update=dict(max_steps=5))
    assert identity_of(config, "data", "scratch") == identity_of(named, "data", "scratch")
    different = [(longer, "data", "scratch"), (config, "others", "scratch"), (config, "data", "digest")]
    assert len({identity_of(*one) for one in [(config, "data", "scratch"), *different]}) == 4


def test_the_clock_counts_from_the_last_round_whatever_became_of_it(world):
    world.write(triggers=dict(clock=dict(every_hours=2)))
    world.decided("promoted", NOW - 3 * 3600)
    world.deliver("b")
    assert world.propose().start
    world.decided("failed", NOW - 3600)
    assert not world.propose().start


def test_a_policy_of_an_earlier_version_keeps_its_digest_although_fields_were_added_and_renamed():
    """The digest was printed by the version of 2026-11-29; with another one a policy would train its round again."""
    tree = dict(
        name="a", max_steps=3, global_batch_size=2, micro_batch_size=1, model=dict(base="miniature"),
        data=dict(shards="x", condition="edges"),
    )  # fmt: skip
    digest = "5ac880f223411b6cdab8b29d016af5d150d51a2c1797f1786307474feba4c4ad"
    assert identity_of(build_config(tree), "f", "s") == digest
    assert identity_of(build_config(tree | {"flow": {"density": "mode"}}), "f", "s") != digest
