"""Reads checkpoints of optimizers that move whole tensors (engine/whole_tensors.py), at any number of ranks.

    deepspeed/                weights and masters, DeepSpeed's files, one set a rank
    optimizer/rank-00000.pt   by the names of parameters, the state of those that begin in the rank's share

DeepSpeed's own reader knows no states but Adam's when the number of ranks has changed, so the masters, which lie in its
files one share after the other, are read here for every number of ranks alike.
"""

import re
from pathlib import Path
from typing import Any

import torch

from controlbooth.trainer.run.continuing import CheckpointError

FOLDER = "optimizer"


def file_of_rank(checkpoint: Path, rank: int) -> Path:
    return checkpoint / FOLDER / f"rank-{rank:05d}.pt"


def load_whole(engine: Any, checkpoint: Path, shares: Path) -> None:
    """Puts an engine with whole tensors where a checkpoint was. Every rank calls this.

    shares: the folder of DeepSpeed's files in it. Raises CheckpointError where files are missing.
    """
    files = sorted(shares.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    own = sorted((checkpoint / FOLDER).glob("rank-*.pt"))
    if not files or len(files) != len(own):
        raise CheckpointError(
            f"{checkpoint} has {len(files)} files of weights and {len(own)} of the optimizer. Delete it to resume from "
            "an older one"
        )
    saved = [_read(path)["optimizer_state_dict"] for path in files]
    trees = [_read(path) for path in own]
    engine.optimizer._load_global_state(saved[0])  # the scale of losses in fp16
    engine.whole_tensors.take_over(
        torch.cat([one["single_partition_of_fp32_groups"][0] for one in saved]),
        {name: state for tree in trees for name, state in tree["tensors"].items()},
        trees[0]["estimate"],
    )


def _rank_of(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    assert match is not None, path
    return int(match[1])


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
