"""Whether a round is proposed, on real shards, with a registry that was told what to say."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from controlbooth.data import pack
from controlbooth.deploy import registry
from controlbooth.deploy.policy import load_policy, state_folder
from controlbooth.deploy.proposal import check_start, identity_of, propose
from controlbooth.deploy.registry import Registry, Version
from controlbooth.deploy.rounds import Round, State, round_folder, with_round
from controlbooth.trainer import growth
from controlbooth.trainer.config import ConfigError

NOW = 1_800_000_000.0


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    for name, seed, start, count in (("a", 0, 0, 12), ("b", 0, 12, 6), ("held", 7, 0, 8)):
        scenes = ["--scenes", str(count), "--seed", str(seed), "--start", str(start), "--size", "16"]
        assert pack.main([*scenes, "--condition", "edges", "--workers", "1", "-o", str(root / name)]) == 0
    return root


class World:
    """A policy whose data set has the shard of a, and what a tick would ask of it."""

    def __init__(self, packed, folder):
        self.packed, self.folder = packed, folder
        (folder / "data").mkdir()
        self.state = State(created=NOW - 1e6)
        self.there = Registry(f"sqlite:///{folder / 'none.db'}", "edges")
        run = dict(
            name="template", output=str(folder / "runs"), max_steps=4, global_batch_size=4, micro_batch_size=2,
            model=dict(base="miniature"), data=dict(condition="edges"),
        )  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
        self.write()
        self.deliver("a")

    def write(self, **changes):
        tree = dict(
            name="edges", state=str(self.folder / "state"), run="run.yaml", data=f"{self.folder / 'data'}/*.tar",
            triggers=dict(growth=dict(samples=6)), gate=dict(metric="edge_f1"),
            evaluation=dict(data=str(self.packed / "held"), samples=4),
        )  # fmt: skip
        (self.folder / "policy.yaml").write_text(yaml.safe_dump(tree | changes))
        self.policy = load_policy(self.folder / "policy.yaml")

    def deliver(self, name):
        for suffix in ("tar", "tar.idx"):
            shutil.copy2(self.packed / name / f"shards-000000.{suffix}", self.folder / "data" / f"{name}.{suffix}")

    def propose(self, now=NOW, by_hand=False, measured=None):
        return propose(self.policy, state_folder(self.policy), self.state, self.there, now, by_hand, measured)

    def decided(self, state, started=NOW - 3600):
        """The proposed round as one that has ended."""
        one = self.propose(by_hand=True)
        growth.freeze(one.dataset, round_folder(state_folder(self.policy), one.number) / "manifest.jsonl")
        ended = Round(
            number=one.number, state=state, run="none", trigger="", started=started, identity=one.identity,
            dataset_fingerprint=one.dataset.fingerprint, samples=12, start="scratch", working_directory="/",
        )  # fmt: skip
        self.state = with_round(self.state, ended)


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
