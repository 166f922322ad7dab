"""What the ranks of a distributed test do. `torchrun worker.py SCENARIO FOLDER RESULT [ARGUMENT ...]`."""

import gc
import hashlib
import json
import os
import shutil
import sys
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from tiny import run_tree

from controlbooth.data.order.draws import noise_hash
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.models.attention import AttentionChoice, apply_attention
from controlbooth.models.denoisers.registry import predicts_alone
from controlbooth.models.pretrained import load_base
from controlbooth.models.unlocked_decoder import UnlockedNetwork
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import EngineConfig, OptimizerConfig, lora_learning_rate
from controlbooth.trainer.config.subjects import load_run
from controlbooth.trainer.controlnet import build
from controlbooth.trainer.controlnet import train as training
from controlbooth.trainer.controlnet.rates import parameter_groups
from controlbooth.trainer.controlnet.step import controlnet_step
from controlbooth.trainer.dreambooth import full
from controlbooth.trainer.dreambooth.batches import draw_prior
from controlbooth.trainer.dreambooth.manifest import load_subjects, settle
from controlbooth.trainer.dreambooth.session import SubjectRun
from controlbooth.trainer.dreambooth.tracking import Untracked
from controlbooth.trainer.dreambooth.validation import open_studio
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine import ema
from controlbooth.trainer.engine.distributed import World, barrier, end_process, gather_objects, join, leave
from controlbooth.trainer.engine.flat_gradients import clipping
from controlbooth.trainer.engine.optimizers import make_optimizers, matrix_shape
from controlbooth.trainer.planning.footprint import Footprint, LiveStorages, states_of
from controlbooth.trainer.planning.rank_memory import BUCKET_ELEMENTS, rank_memory
from controlbooth.trainer.run import checkpoint as checkpoints
from controlbooth.trainer.run import saving
from controlbooth.trainer.run.attempt import Attempt, only_run
from controlbooth.trainer.run.base import open_base
from controlbooth.trainer.run.universal import make_universal
from controlbooth.trainer.tracking.spool import read_metrics

FOOTPRINT = Footprint(
    micro_batch_size=1,
    frozen_bytes=0,
    trained_parameters=0,
    largest_parameter=0,
    trained_modules=0,
    profile=((0, 0),),
    encoder_flops=0,
    training_flops=0,
    traffic_bytes=0,
    operations=0,
    batch_bytes=0,
    cached_bytes=0,
)
"""Of a step that takes nothing."""


class Never:
    requested = False


def run(tree: dict, world: World) -> list[float]:
    """Trains, and returns the losses that were logged, on rank 0."""
    config = build_config(tree)
    training.train(config, world, Never())
    if world.rank:
        return []
    return [metrics["loss"] for _, _, metrics in read_metrics(config.output / config.name) if "loss" in metrics]


def stages(folder: Path, world: World, precision: str) -> dict:
    """The losses of every ZeRO stage; in bf16 without an average, so that checkpoints hold the weights themselves."""
    losses = {}
    for stage in (0, 1, 2, 3):
        tree = run_tree(folder, f"stage-{stage}-{precision}")
        tree["engine"] = dict(zero_stage=stage, precision=precision)
        if precision == "bf16":
            tree["optimizer"]["ema_decay"] = None
        losses[str(stage)] = run(tree, world)
    return losses


class Calls(TorchDispatchMode):
    """Counts operations by name. What a kernel does by itself is not seen, such as reading a step's number on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count[f"{function.namespace}.{function.overloadpacket.__name__}"] += 1
        return function(*arguments, **(options or {}))


class Counted:
    """A loader under whose sixth to eighth step calls are counted, from one batch's asking to the next one's."""

    FIRST, STEPS = 5, 3

    def __init__(self, loader) -> None:
        self.loader, self.asked, self.calls = loader, 0, Calls()

    def __next__(self):
        if self.asked == self.FIRST:
            self.calls.__enter__()
        if self.asked == self.FIRST + self.STEPS:
            self.calls.__exit__(None, None, None)
        self.asked += 1
        return next(self.loader)

    def __getattr__(self, name: str):
        return getattr(self.loader, name)


class Touched:
    """Notes the files and folders that this process opens, lists or asks about, while `noting`."""

    def __init__(self) -> None:
        self.noting, self.names, self.hashed = False, Counter[str](), 0
        sys.addaudithook(self._audit)
        for name in ("stat", "lstat"):  # which no audit tells
            setattr(os, name, partial(self._ask, getattr(os, name)))
        digest = hashlib.file_digest
        hashlib.file_digest = partial(self._digest, digest)

    def _note(self, path) -> None:
        if self.noting and isinstance(path, str | Path):
            self.names[os.fspath(path)] += 1

    def _audit(self, event, arguments) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            self._note(arguments[0])

    def _ask(self, real, path, *what, **how):
        self._note(path)
        return real(path, *what, **how)

    def _digest(self, real, *what):
        self.hashed += self.noting
        return real(*what)


def start_calls(folder: Path, world: World) -> dict:
    """What each rank touches below the folder until its loader is made, at a new start and at one that goes on."""
    touched, found = Touched(), {}
    opened = build.make_loader

    def make_loader(*arguments, **options):
        touched.noting = False
        return opened(*arguments, **options)

    build.make_loader = make_loader
    for start, steps in (("new", 4), ("resumed", 6)):
        tree = run_tree(folder, "touched") | dict(max_steps=steps)
        touched.names.clear()
        touched.hashed, touched.noting = 0, True
        run(tree, world)
        inside = {name[len(f"{folder}/") :]: n for name, n in touched.names.items() if name.startswith(f"{folder}/")}
        found[start] = gather_objects(dict(names=inside, hashed=touched.hashed), world)
    build.make_loader = opened
    return found


def trained(folder: Path, world: World, name: str, stage: str) -> dict:
    """Saves once, after two steps, and measures nothing."""
    tree = run_tree(folder, name) | dict(max_steps=2)
    tree["data"]["held_out"] = None
    tree["engine"]["zero_stage"] = int(stage)
    return {"losses": run(tree, world)}


def split_again(folder: Path, world: World) -> dict:
    """Splits a checkpoint of two ranks by parameter, on all ranks and on one; -> the markers of both, whose digests
    are those of all files; and what each rank says of a file that is no archive."""
    with only_run(folder / "runs" / "split", world) as attempt:
        source = folder / "runs" / "split" / "checkpoints" / "step-00000002" / "deepspeed"
        made = {}
        for name, among in (("all", world), ("one", World(0, 1, 0, world.device))):
            if among is world or world.rank == 0:
                (folder / name).mkdir(exist_ok=True)
                make_universal(source, folder / name / "universal", attempt, among)
                made[name] = (folder / name / "universal" / "COMPLETE").read_text() if world.rank == 0 else None
            barrier()
        if world.rank == 0:
            next(source.glob("*rank_1*optim_states.pt")).write_bytes(b"no archive")
        barrier()
        error = None
        try:
            make_universal(source, folder / "damaged" / "universal", attempt, world)
        except Exception as raised:
            error = str(raised)
        errors = gather_objects(error, world)
        left = [str(path) for path in (folder / "damaged").rglob("*")]
    return made | dict(errors=errors, left=left)


MESSAGES = ("c10d.send", "c10d.recv_")
"""Calls of torch.distributed that two ranks make, not all."""


def counts(folder: Path, world: World, *engines_asked: str) -> dict:
    """What a step asks of the device and of the network, in the training loop. engines_asked: such as ZeRO-2-bf16."""
    found = {}
    for engine in engines_asked:
        _, stage, precision = engine.split("-")
        tree = run_tree(folder, f"counts-{engine}") | dict(max_steps=Counted.FIRST + Counted.STEPS + 1)
        tree["engine"] = dict(zero_stage=int(stage), precision=precision)
        tree["checkpoint"] = dict(every_steps=100)
        opened = build.make_loader
        kept = []

        def make_loader(*arguments, opened=opened, kept=kept, **options):
            kept.append(Counted(opened(*arguments, **options)))
            return kept[-1]

        build.make_loader = make_loader
        try:
            run(tree, world)
        finally:
            build.make_loader = opened
        calls = {name: count / Counted.STEPS for name, count in kept[0].calls.count.items()}
        found[engine] = dict(
            waits=calls.get("aten._local_scalar_dense", 0.0),
            collectives=sum(n for name, n in calls.items() if name.startswith("c10d.") and name not in MESSAGES),
            messages=calls.get("c10d.send", 0.0),
            copies=sum(calls.get(f"aten.{name}", 0.0) for name in ("copy_", "_to_copy", "clone")),
            operations=sum(calls.values()),
        )
        found[engine]["by name"] = {name[5:]: count for name, count in calls.items() if name.startswith("c10d.")}
    return found


def plain(folder: Path, world: World) -> dict:
    """The same run in a bare PyTorch loop: one process, no DeepSpeed, gradients clipped by PyTorch."""
    config = build_config(run_tree(folder, "plain"))
    base = open_base(config, torch.float32, torch.device("cpu"))
    torch.manual_seed(config.seed)
    controlnet = build.make_controlnet(config, base)
    for module in (base.denoiser, controlnet):
        apply_attention(module, AttentionChoice("math", "the same for all"))
    o = config.optimizer
    own_rates = [o.learning_rate, lora_learning_rate(config)][predicts_alone(controlnet) :]
    groups = [dict(params=group, lr=rate) for group, rate in zip(parameter_groups(controlnet), own_rates, strict=False)]
    optimizer = torch.optim.AdamW(groups, o.learning_rate, o.betas, o.epsilon, o.weight_decay)
    losses = []
    mean = {name: parameter.detach().clone() for name, parameter in controlnet.named_parameters()}
    with build.make_loader(config, world, base, open_dataset(config.data.shards), 0, folder) as loader:
        for number in range(config.max_steps):
            batch = next(loader)
            share = len(batch.micro_batches)
            step = controlnet_step(
                base,
                controlnet,
                lambda loss, n=share: (loss / n).backward(),
                batch.micro_batches,
                None,
                world.device,
            )
            torch.nn.utils.clip_grad_norm_(controlnet.parameters(), o.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(sum(step.tolist()) / share)
            for name, parameter in controlnet.named_parameters():
                mean[name].lerp_(parameter.detach(), 1.0 - min(o.ema_decay, (1 + number) / (10 + number)))
    save_file(mean, folder / "plain-average.safetensors")
    return {"losses": losses}


def unlocking_tree(folder: Path, name: str, stage: int, precision: str = "fp32") -> dict:
    """A run of six steps, whose decoder learns from the fourth on, with a checkpoint of each and no validation."""
    tree = run_tree(folder, name) | dict(engine=dict(zero_stage=stage, precision=precision))
    tree["model"] |= dict(unlock_decoder_at=3)
    # Where gradients are only rounding, Adam makes whole steps in a direction that rounding chose, unless its epsilon
    # lies above them.
    tree["optimizer"] |= dict(decoder_learning_rate=4e-4, epsilon=1e-3)
    tree["checkpoint"] |= dict(every_steps=1)
    tree["data"] |= dict(held_out=None)
    return tree


def unlocking(folder: Path, world: World, precision: str) -> dict:
    """The losses of such a run at every ZeRO stage, with validations before its last step and after it."""
    losses = {}
    for stage in (0, 1, 2, 3):
        tree = unlocking_tree(folder, f"unlocking-{stage}-{precision}", stage, precision)
        if precision == "bf16":
            tree["optimizer"]["ema_decay"] = None
        tree["data"] |= dict(held_out=str(folder / "held"))
        tree["validation"] |= dict(every_steps=5)
        losses[str(stage)] = run(tree, world)
    return losses


def unlocking_plain(folder: Path, world: World) -> dict:
    """The same run in a bare PyTorch loop, as `plain`: the decoder's parameters join the optimizer at their step."""
    config = build_config(unlocking_tree(folder, "unlocking-plain", 0))
    base = load_base(config.model.base, "auto", torch.float32, "cpu")
    torch.manual_seed(config.seed)
    controlnet = build.make_controlnet(config, base)
    for module in (base.denoiser, controlnet):
        apply_attention(module, AttentionChoice("math", "the same for all"))
    unlocked = UnlockedNetwork(controlnet, base)
    o = config.optimizer
    optimizer = torch.optim.AdamW(controlnet.parameters(), o.learning_rate, o.betas, o.epsilon, o.weight_decay)
    losses = []
    mean = {name: parameter.detach().clone() for name, parameter in unlocked.named_parameters()}
    with build.make_loader(config, world, base, open_dataset(config.data.shards), 0, folder) as loader:
        for number in range(config.max_steps):
            network: torch.nn.Module = controlnet if number < 3 else unlocked
            if number == 3:
                optimizer.add_param_group({"params": list(unlocked.decoder.parameters()), "lr": 4e-4})
            batch = next(loader)
            share = len(batch.micro_batches)
            step = controlnet_step(
                base,
                network,
                lambda loss, n=share: (loss / n).backward(),
                batch.micro_batches,
                None,
                world.device,
            )
            torch.nn.utils.clip_grad_norm_(network.parameters(), o.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(sum(step.tolist()) / share)
            for name, parameter in unlocked.named_parameters():
                mean[name].lerp_(parameter.detach(), 1.0 - min(o.ema_decay, (1 + number) / (10 + number)))
    save_file(mean, folder / "unlocking-plain-average.safetensors")
    return {"losses": losses}


def unlocking_resumed(folder: Path, world: World, name: str, *steps: str) -> dict:
    """The losses of copies of the runs `name`-STAGE, which are made if they are missing, gone on from `steps`."""
    losses: dict[str, dict[str, list[float]]] = {}
    for stage in (0, 1, 2, 3):
        whole = folder / "runs" / f"{name}-{stage}"
        if not gather_objects(whole.exists(), world)[0]:
            run(unlocking_tree(folder, whole.name, stage), world)
        for step in steps:
            copied = whole.with_name(f"{whole.name}-from-{step}-on-{world.world_size}")
            if world.rank == 0:
                shutil.copytree(whole, copied)
                for checkpoint in (copied / "checkpoints").iterdir():
                    if int(checkpoint.name.removeprefix("step-")) > int(step):
                        shutil.rmtree(checkpoint)
            barrier()
            losses.setdefault(str(stage), {})[step] = run(unlocking_tree(folder, copied.name, stage), world)
    return losses


def batches(folder: Path, world: World) -> dict:
    """Everything that is drawn for six global batches, gathered over ranks in the order of positions."""
    config = build_config(run_tree(folder, "batches") | dict(micro_batch_size=1))
    base = load_base(config.model.base, "auto", torch.float32, "cpu")
    seen = []
    with build.make_loader(config, world, base, open_dataset(config.data.shards), 0, folder) as loader:
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
    for stage, precision in ((0, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")):
        tree = run_tree(folder, f"poisoned-{stage}-{precision}")
        tree["engine"] = dict(zero_stage=stage, precision=precision)
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
        outcome[f"{stage} {precision}"] = {"losses": losses, "skipped": rows}
    return outcome


def settings(folder: Path, world: World) -> dict:
    """A small network stepped, saved, and loaded into an engine of other settings, at every stage and precision.

    Says what settings count afterwards, whether the weights came over bit for bit, and whether the average, loaded
    into the other engine, is the one that was saved.
    """
    tree = run_tree(folder, "settings") | dict(micro_batch_size=8 // world.world_size)
    changed = tree | {"optimizer": dict(learning_rate=1e-3, betas=[0.5, 0.9], weight_decay=0.25, max_grad_norm=9.0)}
    outcome = {}
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            engine = engine_of(tree, stage, precision, world)
            average = ema.Average(engine, 0.5)
            for step in range(3):
                x = torch.linspace(-1, 1, 16, dtype=engines.DTYPES[precision]).view(2, 8) * (step + 1 + world.rank)
                engines.accumulate(engine, engine(x).square().mean())
                engines.apply_gradients(engine, 1e-2)
                average.update(step, torch.tensor(False))
            where = folder / f"settings-{stage}-{precision}"
            engine.save_checkpoint(str(where), tag="x")
            other = engine_of(changed, stage, precision, world)
            other.load_checkpoint(str(where), tag="x")
            config = build_config(changed)
            engines.apply_settings(other, config.optimizer)
            before, after = engines.full_state(engine), engines.full_state(other)
            copied = ema.Average(other, 0.5)
            copied.load(average.full_state())
            same_average = all(torch.equal(copied.full_state()[n], average.full_state()[n]) for n in before)
            untouched = all(torch.equal(engines.full_state(other)[n], after[n]) for n in after)
            (group,) = other.optimizer.param_groups
            assert group["fused"], "clipping and skipping by tensors asks for it"
            outcome[f"{stage} {precision}"] = dict(
                betas=group["betas"],
                weight_decay=group["weight_decay"],
                clip=getattr(other.optimizer, "clip_grad", None),
                same_weights=all(torch.equal(before[n], after[n]) for n in before),
                same_average=same_average,
                masters_untouched=untouched,
                average_differs=any(not torch.equal(average.full_state()[n], before[n]) for n in before),
                rounded=max(float((v == v.bfloat16().float()).float().mean()) for v in before.values()),
            )
    return outcome


class Forked(nn.Module):
    """Two layers, the second of which takes part where the inputs are large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x + self.second(x) if x.abs().max() > 2 else x


def flat_gradients(folder: Path, world: World, precision: str) -> dict:
    """Seven steps of two micro-batches at stage 2, the same on every rank, beside the same in plain PyTorch.

    Says how far their weights are apart after each step, which steps were skipped, and whether MLflow was imported. The
    second layer has no part in the first step nor in the fifth, the third step's first micro-batch has no finite
    gradient, and clipping bites.
    """
    dtype, rate = engines.DTYPES[precision], 1e-2
    torch.manual_seed(0)
    ours = Forked()
    masters = {name: value.to(dtype).float().clone().requires_grad_() for name, value in ours.state_dict().items()}
    plain = Forked().to(dtype)
    settings = OptimizerConfig(max_grad_norm=0.05)
    sizes = engines.BatchSizes(4 * world.world_size, 2, 2)
    adam = torch.optim.AdamW(
        masters.values(), rate, settings.betas, settings.epsilon, settings.weight_decay, fused=True
    )
    engine = engines.initialize(ours, EngineConfig(zero_stage=2), settings, sizes, precision, load_universal=False)

    apart, skipped = [], []
    for step in range(7):
        size = 0.1 if step in (0, 4) else 9.0
        for micro in range(2):
            x = size * torch.linspace(-1, 1 + step + micro, 16).view(2, 8).to(dtype)
            bad = float("nan") if (step, micro) == (2, 0) else 1.0
            engines.accumulate(engine, bad * engine(x).float().square().mean())
            plain.load_state_dict(masters)
            plain.zero_grad()
            (bad * plain(x).float().square().mean() / 2).backward()
            for name, parameter in plain.named_parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                before = masters[name].grad if micro else None
                masters[name].grad = gradient.float() if before is None else before + gradient.float()
        skipped.append(bool(engines.apply_gradients(engine, rate).skipped))
        norm = torch.stack([master.grad.norm() for master in masters.values()]).norm()
        if norm.isfinite():
            for master in masters.values():
                master.grad /= max(1.0, (float(norm) + 1e-6) / settings.max_grad_norm)
            adam.step()
        apart.append(max(float((value - masters[n]).abs().max()) for n, value in engines.full_state(engine).items()))
    return dict(apart=apart, skipped=skipped, mlflow="mlflow" in sys.modules)


class Shapes(nn.Module):
    """Tensors of one to four dimensions, one of them larger than half of all, so that two ranks cut it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 64, 3, padding=1)
        self.wide = nn.Linear(64, 160)
        self.conv_out = nn.Linear(160, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.silu(self.middle(torch.nn.functional.silu(self.conv_in(x))).mean((2, 3)))
        return self.conv_out(torch.nn.functional.silu(self.wide(x)))


def batch_of(step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.sin(torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8) * 0.37 * (1 + step)).to(dtype)


def alone(settings: OptimizerConfig, network: nn.Module, norms: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in fp32 after steps of the library's optimizers on whole matrices, without DeepSpeed or ranks.

    norms: of the gradients of each step, by which they are clipped; steps without a finite one are left out.
    """
    held = {name: nn.Parameter(p.detach().view(matrix_shape(p.shape))) for name, p in network.named_parameters()}
    movers = make_optimizers(settings, held)
    for step, norm in enumerate(norms):
        if not norm.isfinite():
            continue
        network.zero_grad()
        network(batch_of(step, torch.float32)).square().mean().backward()
        scale, _ = clipping(norm, settings.max_grad_norm)
        assert scale > 1, "clipping bites"
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            held[name].grad = (parameter.grad / scale).view_as(held[name])
        for mover in movers:
            for group in mover.param_groups:
                group["lr"] = settings.learning_rate
            mover.step()
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def whole_tensors(folder: Path, world: World, optimizer: str, stage: str, rate: str) -> dict:
    """Six steps of a small network, the same on every rank, the third without a finite gradient; saved after the
    fourth, and gone on from there by another engine.

    Says how far the weights are from those that the library makes alone, what the skipped step changed, whether the
    second engine ended with the same bits, and the bytes of the states beside the planned ones. The weights and states
    after the load are written to a file that names the ranks.
    """
    settings = OptimizerConfig(name=optimizer, learning_rate=float(rate), max_grad_norm=0.002)
    engine_config, plans = EngineConfig(zero_stage=int(stage)), run_tree(folder, "unused")
    sizes = engines.BatchSizes(2 * world.world_size, 2, 1)

    def made():
        torch.manual_seed(0)
        return engines.initialize(Shapes(), engine_config, settings, sizes, "fp32", load_universal=False)

    def step(engine, number: int) -> engines.Taken:
        bad = float("nan") if number == 2 and world.rank == world.world_size - 1 else 1.0
        engines.accumulate(engine, bad * engine(batch_of(number, torch.float32)).square().mean())
        return engines.apply_gradients(engine, settings.learning_rate)

    def held(engine) -> dict[str, torch.Tensor]:
        states = engine.whole_tensors.states()["tensors"]
        own = {f"{name}/{k}": torch.as_tensor(v).clone() for name, state in states.items() for k, v in state.items()}
        return own | {f"weight/{name}": value for name, value in engines.full_state(engine).items()}

    engine, skipped, norms, untouched = made(), [], [], False
    for number in range(4):
        before = held(engine)
        taken = step(engine, number)
        skipped.append(bool(taken.skipped))
        norms.append(taken.norm)
        if skipped[-1]:
            after = held(engine)
            untouched = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    run = folder / "runs" / f"whole-{optimizer}-{stage}-on-{world.world_size}"
    attempt = Attempt(run, 1, "id")
    attempt.folder.mkdir(parents=True, exist_ok=True)
    barrier()
    about = dict(step=4, zero_stage=int(stage), precision="fp32", world_size=world.world_size, optimizer=optimizer)
    saved = saving.save_checkpoint(engine, run, about, json.dumps(plans), None, world, attempt, "weights", write_plain)
    one, kept = made(), held(engine)
    checkpoints.load_checkpoint(one, saved, None, world, attempt)
    loaded = held(one)
    for number in (4, 5):
        norms.append(step(engine, number).norm)
        step(one, number)
    ours, theirs = held(engine), held(one)
    torch.manual_seed(0)
    plain = alone(settings, Shapes(), norms)
    largest = max(gather_objects(engine.whole_tensors.state_bytes(), world))
    network = Shapes()
    planned = rank_memory(
        replace(FOOTPRINT, trained_parameters=sum(p.numel() for p in network.parameters()),
                states=states_of(optimizer, network)),
        engine_config, "fp32", world.world_size, "cpu",
    ).device["optimizer"]  # fmt: skip
    masters = 4 * -(-sum(p.numel() for p in network.parameters()) // world.world_size)
    return dict(
        skipped=skipped,
        untouched=all(gather_objects(untouched, world)),
        loaded=all(
            gather_objects(
                kept.keys() == loaded.keys() and all(map(torch.equal, kept.values(), loaded.values())), world
            )
        ),
        resumed=all(gather_objects(all(torch.equal(ours[k], theirs[k]) for k in ours), world)),
        apart=max(float((ours[f"weight/{name}"] - value).abs().max()) for name, value in plain.items()),
        moved=max(float((ours[f"weight/{name}"] - p.detach()).abs().max()) for name, p in network.named_parameters())
        > 0,
        cut=engine.whole_tensors.cut_elements,
        states=largest,
        planned=planned - masters,
    )


def whole_tensors_elsewhere(folder: Path, world: World, optimizer: str, stage: str, ranks: str) -> dict:
    """Loads on these ranks what `whole_tensors` saved on others, and says whether every weight and state is the one in
    the files, bit for bit."""
    run = folder / "runs" / f"whole-{optimizer}-{stage}-on-{ranks}"
    checkpoint = checkpoints.folder_of(run, 4)
    settings = OptimizerConfig(name=optimizer)
    torch.manual_seed(1)
    engine = engines.initialize(
        Shapes(), EngineConfig(zero_stage=int(stage)), settings, engines.BatchSizes(2 * world.world_size, 2, 1), "fp32",
        checkpoints.needs_universal(checkpoints.read_state(checkpoint), world.world_size),
    )  # fmt: skip
    checkpoints.load_checkpoint(engine, checkpoint, None, world, Attempt(run, 2, "id"))
    weights, states = engines.full_state(engine), engine.whole_tensors.states()["tensors"]
    written = load_file(checkpoint / "weights" / "weights.safetensors")
    files = [torch.load(path, weights_only=True)["tensors"] for path in (checkpoint / "optimizer").iterdir()]
    saved = {name: state for one in files for name, state in one.items()}
    here = [name for names in gather_objects(list(states), world) for name in names]
    return dict(
        names=sorted(here) == sorted(saved),
        weights=all(torch.equal(weights[name], written[name]) for name in written),
        states=all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(saved[name][key]))
            for name, state in states.items()
            for key, value in state.items()
        ),
    )


def engine_memory(folder: Path, world: World, precision: str) -> dict:
    """Of every stage: the planned peak of a rank without its runtime, and what a real engine's tensors came to."""
    return {stage: peaks_of_engine(stage, precision, world) for stage in (0, 1, 2, 3)}


def peaks_of_engine(stage: int, precision: str, world: World) -> tuple[int, int]:
    """Six layers of 250,000 parameters, over the threshold below which stage 3 does not split."""
    width, samples = 512, 2
    config = EngineConfig(zero_stage=stage)
    with LiveStorages() as live:
        network = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(6)])
        total = sum(parameter.numel() for parameter in network.parameters())
        sizes = engines.BatchSizes(world.world_size * samples, samples, 1)
        engine = engines.initialize(network, config, OptimizerConfig(), sizes, precision, False)
        steps = []
        for _ in range(6):
            live.moments.clear()
            inputs = torch.zeros(samples, width, dtype=engines.DTYPES[precision])
            engines.accumulate(engine, engine(inputs).float().square().mean())
            engines.apply_gradients(engine, 1e-3)
            gc.collect()
            steps.append([size for size, _ in live.moments])
    bytes_each = 4 if precision == "fp32" else 2
    one = replace(
        FOOTPRINT,
        micro_batch_size=samples,
        trained_parameters=total,
        largest_parameter=width * width,
        profile=((0, bytes_each * total),),
    )
    memory = rank_memory(one, config, precision, world.world_size, "cpu")
    planned = memory.peak - memory.device["runtime"]
    # DeepSpeed allocates its bucket whole, and a CPU gives memory to what is written of it
    bucket = BUCKET_ELEMENTS * (4 if stage == 3 else bytes_each)

    def written(size: int) -> int:
        return size - bucket + (bucket * total // BUCKET_ELEMENTS) if size > bucket else size

    # gloo's thread lets go of what it reduced a moment after the step went on, so one step in ten holds that too. The
    # smallest peak of the steps is the engine's own; the first, which makes the optimizer's state, is not among them
    held = min(max(map(written, sizes_of_step)) for sizes_of_step in steps[1:])
    return planned, held


def subjects_in_turn(folder: Path, world: World, *names: str) -> dict:
    """Trains the manifest of each of these runs with method=full.

    Says of each run how many bytes the weights of one subject are, and at the moments when each of three begins, and at
    the end, how many bytes of tensors are held and how many engines of earlier subjects there are.
    """
    outcome = {}
    for name in names:
        config = load_run(folder / f"{name}.yaml")
        tasks, _ = settle(load_subjects(folder / "subjects.yaml")[0], config)
        base = load_base(folder / "base", "auto", torch.float32, "cpu")
        run = config.output / config.name
        attempt = Attempt(run, 1, "id")
        attempt.folder.mkdir(parents=True, exist_ok=True)
        barrier()
        draw_prior(config, base, tasks, world)
        held, alive, seen, weights = [], [], [], []
        begin = full.begin_full

        with LiveStorages() as live:

            def look(held=held, alive=alive, seen=seen, live=live) -> None:
                held.append(live.live)
                alive.append(sum(engine() is not None for engine in seen))

            def noted(*arguments, look=look, seen=seen, weights=weights, begin=begin):
                look()
                training = begin(*arguments)
                seen.append(weakref.ref(training.engine))
                weights.append(sum(4 * getattr(p, "ds_numel", p.numel()) for p in training.engine.module.parameters()))
                return training

            full.begin_full = noted
            try:
                studio = open_studio(config, run, attempt, Untracked(), world.device, False)
                kernels = AttentionChoice("math", "the same for all")
                ours = SubjectRun(config, base, kernels, "fp32", run, attempt, world, Never(), studio)
                full.train_fully(ours, tasks[:3])
            finally:
                full.begin_full = begin
            look()
        outcome[name] = dict(held=held, engines=alive, weights=weights[0])
    return outcome


def background(folder: Path, world: World) -> dict:
    """A save that begins after the second step and is finished after the fourth, at every stage and precision.

    Says which checkpoints were seen before and after, and whether what is loaded is the state of the second step.
    """
    tree = run_tree(folder, "background") | dict(micro_batch_size=8 // world.world_size)
    outcome = {}
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            engine = engine_of(tree, stage, precision, world)
            average = ema.Average(engine, 0.5)

            def train(step: int, engine=engine, precision=precision, average=average) -> None:
                x = torch.linspace(-1, 1, 16, dtype=engines.DTYPES[precision]).view(2, 8) * (step + 1 + world.rank)
                engines.accumulate(engine, engine(x).square().mean())
                engines.apply_gradients(engine, 1e-2)
                average.update(step, torch.tensor(False))

            run = folder / f"background-{stage}-{precision}"
            attempt = Attempt(run, 1, "id")
            attempt.folder.mkdir(parents=True, exist_ok=True)
            barrier()
            about = dict(step=2, zero_stage=stage, world_size=world.world_size)

            def save(about=about, engine=engine, run=run, average=average, attempt=attempt) -> saving.Save:
                return saving.begin_save(engine, run, about, "", average, world, attempt, "weights", write_plain)

            train(0), train(1)
            kept, mean = engines.full_state(engine), average.full_state()
            pending = save()
            train(2)
            before = checkpoints.complete_checkpoints(run)
            train(3)
            finished = saving.finish_save(pending, world)
            moved = engines.full_state(engine)
            other = engine_of(tree, stage, precision, world)
            checkpoints.load_checkpoint(other, finished, None, world, attempt)
            loaded = engines.full_state(other)
            written = load_file(finished / "weights" / "weights.safetensors")

            # Whoever cannot write says so where the ranks meet, on all of them.
            barrier()
            if world.rank == 0:
                shutil.rmtree(finished)
            barrier()
            failing = saving.begin_save(engine, run, about, "", average, world, attempt, "weights", write_nowhere)
            try:
                saving.finish_save(failing, world)
                error = ""
            except (OSError, ValueError) as raised:
                error = str(raised)
            errors = gather_objects(error, world)
            outcome[f"{stage} {precision}"] = dict(
                before=len(before),
                same=all(torch.equal(loaded[name], kept[name]) for name in kept),
                same_average=all(torch.equal(written[name], mean[name]) for name in mean),
                moved=any(not torch.equal(moved[name], kept[name]) for name in kept),
                errors=errors,
                after_error=len(checkpoints.complete_checkpoints(run)),
            )
    return outcome


def write_nowhere(engine, weights: dict, folder: Path) -> None:
    (folder / "no folder" / "weights").touch()


def write_plain(engine, weights: dict, folder: Path) -> None:
    folder.mkdir()
    save_file(weights, folder / "weights.safetensors")


def engine_of(tree: dict, stage: int, precision: str, world: World):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.SiLU(), torch.nn.Linear(32, 8))
    config = build_config(tree | {"engine": dict(zero_stage=stage, precision=precision)})
    sizes = engines.batch_sizes(config, world.world_size)
    return engines.initialize(network, config.engine, config.optimizer, sizes, precision, load_universal=False)


def main() -> None:
    scenario, folder, result, *rest = sys.argv[1:]
    world = join()
    answer = partial(globals()[scenario], Path(folder), world)(*rest)
    if world.rank == 0:
        Path(result).write_text(json.dumps(answer))
    leave()
    end_process(0)


if __name__ == "__main__":
    main()
