"""A policy on real shards of scenes, without a training: what tests of proposals and ticks share."""

import shutil

import yaml

from controlbooth.deploy.retrain import growth
from controlbooth.deploy.retrain.policy import load_policy, state_folder
from controlbooth.deploy.retrain.proposal import propose
from controlbooth.deploy.retrain.registry import Registry
from controlbooth.deploy.retrain.rounds import Round, State, round_folder, with_round
from controlbooth.launch.commands import data_pack

NOW = 1_800_000_000.0


def pack_scenes(root):
    """a: twelve scenes; b: six more; held: eight others."""
    for name, seed, start, count in (("a", 0, 0, 12), ("b", 0, 12, 6), ("held", 7, 0, 8)):
        scenes = ["--scenes", str(count), "--seed", str(seed), "--start", str(start), "--size", "16"]
        assert data_pack.main([*scenes, "--condition", "edges", "--workers", "1", "-o", str(root / name)]) == 0
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
        self.path = self.folder / "policy.yaml"
        self.policy = load_policy(self.path)

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
