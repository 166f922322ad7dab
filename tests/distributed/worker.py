"""What the ranks of a distributed test do. `torchrun worker.py SCENARIO FOLDER RESULT [ARGUMENT ...]`."""

import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny import run_tree

from controlbooth.data.draws import noise_hash
from controlbooth.data.manifest import open_dataset
from controlbooth.models.attention import AttentionChoice, apply_attention
from controlbooth.models.pretrained import load_base
from controlbooth.trainer import engine as engines
from controlbooth.trainer import train as training
from controlbooth.trainer.config import build_config
from controlbooth.trainer.distributed import World, gather_objects, join, leave
from controlbooth.trainer.spool import read_metrics
from controlbooth.trainer.step import controlnet_step


class Never:
    requested = False


def run(tree: dict, world: World) -> list[float]:
    """Trains, and returns the losses that were logged, on rank 0."""
    config = build_config(tree)
    training.train(config, world, Never())
    if world.rank:
        return []
    return [metrics["loss"] for _, _, metrics in read_metrics(config.output / config.name) if "loss" in metrics]


def stages(folder: Path, world: World) -> dict:
    """The losses of every ZeRO stage."""
    losses = {}
    for stage in (0, 1, 2, 3):
        tree = run_tree(folder, f"stage-{stage}")
        tree["engine"]["zero_stage"] = stage
        losses[str(stage)] = run(tree, world)
    return losses


def plain(folder: Path, world: World) -> dict:
    """The same run in a bare PyTorch loop: one process, no DeepSpeed, gradients clipped by PyTorch."""
    config = build_config(run_tree(folder, "plain"))
    base = load_base(config.model.base, "auto", torch.float32, "cpu")
    torch.manual_seed(config.seed)
    controlnet = training.make_controlnet(config, base)
    for module in (base.unet, controlnet):
        apply_attention(module, AttentionChoice("math", "the same for all"))
    o = config.optimizer
    optimizer = torch.optim.AdamW(controlnet.parameters(), o.learning_rate, o.betas, o.epsilon, o.weight_decay)
    losses = []
    with training.make_loader(config, world, base, open_dataset(config.data.shards), 0, folder) as loader:
        for _ in range(config.max_steps):
            batch = next(loader)
            share = len(batch.micro_batches)
            step = controlnet_step(
                base,
                controlnet,
                lambda loss, n=share: (loss / n).backward(),
                batch.micro_batches,
                config.seed,
                None,
                world.device,
            )
            torch.nn.utils.clip_grad_norm_(controlnet.parameters(), o.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(sum(step) / share)
    return {"losses": losses}


def batches(folder: Path, world: World) -> dict:
    """Everything that is drawn for six global batches, gathered over ranks in the order of positions."""
    config = build_config(run_tree(folder, "batches") | dict(micro_batch_size=1))
    base = load_base(config.model.base, "auto", torch.float32, "cpu")
    seen = []
    with training.make_loader(config, world, base, open_dataset(config.data.shards), 0, folder) as loader:
        for _ in range(6):
            mine = [
                (
                    int(m.positions[i]),
                    m.keys[i],
                    bool(m.dropped[i]),
                    int(m.timesteps[i]),
                    noise_hash(m.noise[i]),
                    m.captions[i],
                )
                for m in next(loader).micro_batches
                for i in range(len(m.keys))
            ]
            seen.append(sorted(row for rows in gather_objects(mine, world) for row in rows))
    return {"batches": seen}


def train(folder: Path, world: World, *overrides: str) -> dict:
    """One run under the name and with the fields that are given, as JSON."""
    name, changes = overrides[0], json.loads(overrides[1])
    tree = run_tree(folder, name)
    for section, fields in changes.items():
        if isinstance(fields, dict):
            tree[section] |= fields
        else:
            tree[section] = fields
    return {"losses": run(tree, world)}


def poisoned(folder: Path, world: World) -> dict:
    """A run whose third step has a gradient that is not finite on rank 1 only, for every ZeRO stage."""
    outcome = {}
    for stage in (0, 2, 3):
        tree = run_tree(folder, f"poisoned-{stage}")
        tree["engine"]["zero_stage"] = stage
        original, calls = engines.accumulate, []

        def spoil(engine, loss, original=original, calls=calls):
            calls.append(1)
            original(engine, loss * float("nan") if world.rank == 1 and len(calls) == 5 else loss)

        engines.accumulate = spoil
        try:
            losses = run(tree, world)
        finally:
            engines.accumulate = original
        rows = []
        if world.rank == 0:
            config = build_config(tree)
            rows = [m["skipped"] for _, _, m in read_metrics(config.output / config.name) if "skipped" in m]
        outcome[str(stage)] = {"losses": losses, "skipped": rows}
    return outcome


def main() -> None:
    scenario, folder, result, *rest = sys.argv[1:]
    world = join()
    answer = partial(globals()[scenario], Path(folder), world)(*rest)
    if world.rank == 0:
        Path(result).write_text(json.dumps(answer))
    leave()


if __name__ == "__main__":
    main()
