"""A policy that tests call the verbs of, on data that grows shard by shard."""

import shutil
import time

import yaml

from controlbooth.deploy.retrain import audit, registry
from controlbooth.deploy.retrain.policy import load_policy, state_folder
from controlbooth.deploy.retrain.rounds import is_alive, read_state
from controlbooth.deploy.retrain.tick import open_registry_of
from controlbooth.launch import cli


class Retraining:
    """A policy in a folder of its own, and data that grows shard by shard."""

    def __init__(self, world, folder, name, **changes):
        self.world, self.folder, self.name = world, folder, name
        self.path = folder / f"{name}.yaml"
        (folder / "data").mkdir()
        run = dict(
            name="template", output=str(folder / "runs"), max_steps=4, global_batch_size=4, micro_batch_size=2,
            model=dict(base=str(world / "base"), hint_channels=[8, 8, 8, 8], attention="math"),
            data=dict(condition="edges", resolution=64), optimizer=dict(learning_rate=1e-3),
            engine=dict(precision="fp32"), checkpoint=dict(every_steps=2),
        )  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
        self.tree = dict(
            name=name, state=str(folder / "state"), run="run.yaml", data=f"{folder / 'data'}/*.tar", processes=1,
            triggers=dict(growth=dict(samples=12)), resumes=1, lease_seconds=30,
            evaluation=dict(data=str(world / "held"), samples=4, sampling_steps=2, guidance_scale=1.0),
            gate=dict(metric="edge_f1", margin=-1.0, no_regression={"says_count": 1.0}),
        )  # fmt: skip
        self.write(**changes)

    def write(self, **changes):
        self.path.write_text(yaml.safe_dump(self.tree | changes))
        self.policy = load_policy(self.path)

    def add_shard(self, number):
        for suffix in ("tar", "tar.idx"):
            name = f"shards-{number:06d}.{suffix}"
            shutil.copy2(self.world / "train" / name, self.folder / "data" / name)

    def call(self, verb, *options):
        return cli.main(["retrain", verb, str(self.path), *options])

    @property
    def rounds(self):
        return read_state(state_folder(self.policy), time.time()).rounds

    @property
    def decisions(self):
        return [(one["round"], one["decision"]) for one in audit.read(state_folder(self.policy))]

    def aliases(self):
        return {name: one.number for name, one in registry.aliases(open_registry_of(self.policy)).items()}

    def wait(self):
        end = time.monotonic() + 300
        while is_alive(self.rounds[-1]):
            assert time.monotonic() < end, "the training did not end"
            time.sleep(0.2)
