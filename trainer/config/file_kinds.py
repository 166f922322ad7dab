"""Which of the project's YAML files one is, told by keys that no other kind has: people give a verb the wrong one."""

from typing import Any

from controlbooth.data.arguments import quoted

RUN, SUBJECTS, ABLATIONS, POLICY, CLUSTER = (
    "a run",
    "a DreamBooth run",
    "a table of ablations",
    "a retraining policy",
    "a cluster file",
)
OWN_KEYS = {
    RUN: ("max_steps", "global_batch_size", "micro_batch_size", "checkpoint"),
    SUBJECTS: ("subjects_per_batch", "instance_batch_size", "steps", "instance_prompt", "adapter", "prior"),
    ABLATIONS: ("variants", "seeds"),
    POLICY: ("triggers", "evaluation", "gate"),
    CLUSTER: ("nodes", "processes_per_node", "gpus_per_node", "grace_seconds", "slurm", "kubernetes"),
}
TAKEN_BY = {
    RUN: "controlbooth train {path}",
    SUBJECTS: "controlbooth dreambooth run SUBJECTS {path}, and of its folder dreambooth measure and dreambooth export",
    ABLATIONS: "controlbooth ablate {path}",
    POLICY: "controlbooth retrain tick {path}",
    CLUSTER: "controlbooth launch slurm|kubernetes|local RUN.yaml --cluster {path}",
}
"""The verb that reads a file of this kind."""


def kind_of(tree: Any) -> str | None:
    """Returns the kind that has the most of its own keys in a file's tree, or None where the tree has no such key."""
    counts = {kind: sum(key in tree for key in keys) for kind, keys in OWN_KEYS.items() if isinstance(tree, dict)}
    best = max(counts, key=lambda kind: counts[kind], default=None)
    return best if best and counts[best] else None


def mistaken_for(tree: Any, wanted: str, path: str) -> str | None:
    """Returns a message for a file that is plainly of another kind than the wanted one, or None where it is not."""
    kind = kind_of(tree)
    if kind in (None, wanted) or any(key in tree for key in OWN_KEYS[wanted]):
        return None
    return f"{path} is {kind}, not {wanted}: use {TAKEN_BY[kind].format(path=quoted(path))}"
