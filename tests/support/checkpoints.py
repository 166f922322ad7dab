"""Runs with a checkpoint as the trainer leaves it, without DeepSpeed's files."""

import json

from inputs import SIZE

from controlbooth.trainer.config.loading import build_config, dump
from controlbooth.trainer.run.integrity import COMPLETE, folder_digest


def write_run(root, base, model, write, **state):
    """Writes the run runs/edges below `root`, at step 300; -> its folder.

    model: settings of `model`, with the base's folder. write: is called with the folder for the ControlNet. state: what
    state.json has besides.
    """
    run = root / "runs" / "edges"
    checkpoint = run / "checkpoints" / "step-00000300"
    checkpoint.mkdir(parents=True)
    tree = dict(
        name="edges", max_steps=400, global_batch_size=8, micro_batch_size=4, model=model,
        data=dict(shards="shards/*.tar", condition="edges", resolution=SIZE), validation=dict(sampling_steps=2),
    )  # fmt: skip
    for folder in (run, checkpoint):
        (folder / "config.yaml").write_text(dump(build_config(tree)))
    write(checkpoint / "controlnet")
    digest = folder_digest(checkpoint / "controlnet")
    state = dict(step=300, digest=digest, dataset_fingerprint="f1", base_digest=base.digest) | state
    (checkpoint / "state.json").write_text(json.dumps(state))
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in checkpoint.rglob("*.*")}
    (checkpoint / COMPLETE).write_text(json.dumps(sizes))
    return run
