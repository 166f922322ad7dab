"""`controlbooth evaluate`: what a ControlNet is worth on held-out conditions, beside pictures that bound it.

    OUT/evaluation.json       every figure with its confidence interval, and what it was measured with
        samples.jsonl         the figures of each picture; `controlbooth compare` pairs two such files
        evaluation.png        condition | without control | with control | no prompt | target
        pictures/WAY-DIGEST/  what was drawn; found again, it is not drawn again

With torchrun, ranks share the pictures: `torchrun ... -m controlbooth.trainer.evaluate.evaluate RUN`. Batches are the
same however many ranks there are, so figures are too.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from controlbooth.data.kinds import COMPUTED
from controlbooth.data.manifest import Dataset, open_dataset
from controlbooth.data.networks import network_folders
from controlbooth.data.scenes import Scene, SceneObject, render
from controlbooth.data.secrets import error_text
from controlbooth.data.sidecar import temporary_path, write_whole
from controlbooth.data.tokens import told_of_cut
from controlbooth.models.base import Base
from controlbooth.models.decoder import load_networks
from controlbooth.models.pretrained import UNET_FOLDER, load_base
from controlbooth.models.sampling import Control, drawn_by, sample
from controlbooth.trainer import command_lines
from controlbooth.trainer.checkpoint import check_weights, complete_checkpoints, read_state
from controlbooth.trainer.command_lines import SAMPLES
from controlbooth.trainer.config import ConfigError, RunConfig, base_folder, load_config
from controlbooth.trainer.distributed import World, barrier, gather_objects, join, leave
from controlbooth.trainer.evaluate.chance import METRICS_VERSION
from controlbooth.trainer.evaluate.distribution import Measures, measure_sets, open_measures
from controlbooth.trainer.evaluate.encoders import encoder_folders
from controlbooth.trainer.evaluate.extract import extractor, fidelity, what_is_missing
from controlbooth.trainer.evaluate.figures import table
from controlbooth.trainer.evaluate.grids import draw_grid
from controlbooth.trainer.evaluate.held_out import AT_ONCE, EDGE_KINDS, HeldOutSet, load_held_out, scenes_of
from controlbooth.trainer.evaluate.judge import load_judge, obedience_by_picture, read
from controlbooth.trainer.evaluate.kinds import LOWER_IS_BETTER
from controlbooth.trainer.evaluate.publish import publish
from controlbooth.trainer.evaluate.report import write_report
from controlbooth.trainer.evaluate.statistics import mean_and_interval, share_of_possible
from controlbooth.trainer.evaluate.verdict import FIGURES, as_tree, describe_run, read_verdict
from controlbooth.trainer.same_base import check_same_base
from controlbooth.trainer.train import quiet_libraries

WITHOUT, WITH, NO_PROMPT = "without control", "with control", "with control, no prompt"
DISCS, NOISE, REAL = "discs at the true places", "random noise", "real pictures"
SHOWN = 8
JUDGED_SIDE = 64
"""Pixels of the pictures that the judge reads."""


@dataclass(frozen=True)
class Evaluated:
    """A ControlNet, and everything that its pictures depend on."""

    where: Path
    weights: Path
    digest: str
    step: int | None
    base: str
    family: str
    data: str
    condition: str
    resolution: int
    samples: int | None
    """Held-out conditions; None where nobody said how many."""
    steps: int
    guidance: float
    scheduler: str
    config: RunConfig | None
    """Of the run, where it is one."""
    saved: Mapping[str, Any] | None = None
    """What its checkpoint notes of the base, where the run's own is taken."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_lines.evaluate().parse_args(arguments)
    quiet_libraries()
    target = resolve(options)
    named_networks(options.network, target.condition.removeprefix(COMPUTED))  # now: loading a base takes long
    encoder_folders(options.encoder)
    world = join()
    try:
        return evaluate(target, options, world)
    finally:
        leave()


def resolve(options: argparse.Namespace) -> Evaluated:
    """Raises ConfigError for what is missing or cannot be."""
    where: Path = options.where
    if (where / "config.yaml").is_file():
        return resolve_run(options, where)
    if not (where / "config.json").is_file():
        raise ConfigError(
            f"{where} holds neither a run's config.yaml nor a ControlNet's config.json. Give the folder that "
            "`controlbooth train` made, or one in the format of diffusers"
        )
    missing = [f"--{name}" for name in ("data", "condition", "base") if getattr(options, name) is None]
    if missing:
        raise ConfigError(f"{where} is a ControlNet without its run: say {', '.join(missing)} too")
    if options.step is not None:
        raise ConfigError(f"--step {options.step} is of a run's checkpoints, and {where} is no run")
    return Evaluated(
        where=where,
        weights=where,
        digest=file_digest(where),
        step=None,
        base=options.base,
        family="auto",
        data=options.data,
        condition=options.condition,
        resolution=options.resolution or 0,
        samples=options.samples,
        steps=options.steps or 20,
        guidance=options.guidance or 7.5,
        scheduler=options.scheduler,
        config=None,
    )


def resolve_run(options: argparse.Namespace, where: Path) -> Evaluated:
    whole = complete_checkpoints(where)
    if not whole:
        load_config(where / "config.yaml")  # which refuses a DreamBooth run by its name
        raise ConfigError(f"{where} holds no whole checkpoint yet. Train it further")
    if options.step is not None:
        steps = [read_state(one)["step"] for one in whole]
        if options.step not in steps:
            raise ConfigError(f"{where} has no checkpoint of step {options.step}; it has {', '.join(map(str, steps))}")
        whole = [whole[steps.index(options.step)]]
    checkpoint = whole[-1]
    config = load_config(checkpoint / "config.yaml")
    data = options.data or config.data.held_out
    if data is None:
        raise ConfigError(f"{where} has no held-out shards: name some by --data SHARDS")
    if options.condition and options.condition != config.data.condition:
        raise ConfigError(
            f"{where} was trained on {config.data.condition!r}, and --condition says {options.condition!r}"
        )
    state = read_state(checkpoint)
    check_weights(checkpoint)
    return Evaluated(
        where=where,
        weights=checkpoint / "controlnet",
        digest=state["digest"],
        step=state["step"],
        base=options.base or config.model.base,
        family=config.model.family,
        data=data,
        condition=config.data.condition,
        resolution=options.resolution or config.data.resolution,
        samples=options.samples,
        steps=options.steps or config.validation.sampling_steps,
        guidance=options.guidance or config.validation.guidance_scale,
        scheduler=options.scheduler,
        config=config,
        saved=None if options.base else state,
    )


def file_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of a ControlNet's folder."""
    total = hashlib.sha256()
    files = [*folder.glob("*.safetensors"), *folder.glob(f"{UNET_FOLDER}/*.safetensors")]
    for path in sorted(files) + [folder / "config.json"]:
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def evaluate(target: Evaluated, options: argparse.Namespace, world: World) -> int:
    out = options.out or target.where / "evaluation"
    began = time.perf_counter()
    dataset = open_dataset(target.data)
    count = samples_to_draw(target, dataset)
    base = load_base(base_folder(target.base), target.family, torch.float32, world.device)
    if target.saved is not None:
        remedy = f"Put it back as it was, or say --base {target.base} to measure on what it is now"
        check_same_base(target.saved, base, f"at step {target.step}", remedy)
    controlled, controlnet = load_networks(target.weights, base)
    controlnet.eval().requires_grad_(False).to(world.device)
    side = target.resolution or base.picture_size[0]
    held = load_held_out(dataset, count, target.condition, side)
    if world.rank == 0 and (line := told_of_cut(base.tokenizers, held.captions, "held-out captions")):
        print(f"warning: {line}", file=sys.stderr)
    networks = named_networks(options.network, held.kind)
    extract = extractor(held, networks, str(world.device))
    measures = open_measures(encoder_folders(options.encoder), options.aesthetic, world.device)
    if extract is None and world.rank == 0 and held.kind not in EDGE_KINDS:
        print(what_is_missing(held.kind), file=sys.stderr)
    ways: dict[str, tuple[Any, Sequence[str], float]] = {
        WITHOUT: (None, held.captions, target.guidance),
        WITH: (controlnet, held.captions, target.guidance),
        NO_PROMPT: (controlnet, [""] * len(held.keys), 1.0),
    }
    mine = rows_of(world, len(held.keys))
    images: dict[str, np.ndarray] = {}
    drawn = 0

    def way_folder(name: str) -> Path:
        network, prompts, guidance = ways[name]
        return out / "pictures" / f"{slug(name)}-{way_digest(target, base, dataset, network, prompts, guidance, side)}"

    for name, (network, prompts, guidance) in ways.items():
        drawn_by = base if network is None else controlled
        images[name], new = draw(
            drawn_by, network, held, prompts, guidance, target, way_folder(name), mine, name, world
        )
        drawn += new
    seconds = time.perf_counter() - began
    scenes = scenes_of(held)
    if scenes:
        drawn_discs = [render(discs(scenes[row], side), side).image for row in mine]
        images[DISCS] = np.stack(drawn_discs) if drawn_discs else images[WITH]  # a rank without rows
    images[NOISE] = noise_pictures(mine, held.picture_size)
    images[REAL] = held.targets[mine]
    seen = judged(images, mine, world) if scenes and side == JUDGED_SIDE else {}
    samples = [row for part in gather_objects(sample_rows(images, held, mine, extract), world) for row in part]
    samples.sort(key=lambda row: (list(images).index(row["way"]), row["row"]))
    sets = measure_sets(measures, {name: images[name] for name in (*ways, REAL)}, held, mine, world)
    everything = gather_objects(drawn, world)
    if world.rank == 0:
        for way, own in seen.items():
            add_obedience([row for row in samples if row["way"] == way], own, scenes)
        of_way = {way: [row for row in samples if row["way"] == way] for way in images}
        figures = {way: summary(rows, of_way[REAL]) for way, rows in of_way.items()}
        measured_by = {kind: str(Path(folder).resolve()) for kind, folder in networks.items() if kind == held.kind}
        facts = dict(
            base_digest=base.digest,
            base_identity=base.identity,
            resolution=side,
            networks=measured_by,
            metrics_version=METRICS_VERSION,
        )
        write(out, target, dataset, facts, figures, sets, measures, samples, seconds, sum(everything), world)
        shown = min(SHOWN, len(held.keys))
        columns = {"condition": held.conditions[:shown]}
        for name in ways:
            columns[name] = np.stack([read_png(way_folder(name) / f"{row:06d}.png") for row in range(shown)])
        draw_grid(out / "evaluation.png", columns | {"target": held.targets[:shown]}, held.captions[:shown])
        write_ends(out, samples, held, way_folder(WITH))
        result = json.loads((out / "evaluation.json").read_text())
        print(table(result))
        print(f"pictures: {out / 'evaluation.png'}")
        if target.config is not None and out == target.where / "evaluation":
            write_report([target.where], target.where / "report.html")
            print(f"report: {target.where / 'report.html'}")
            publish(target.where, target.config, result)
    barrier()
    return 0


def samples_to_draw(target: Evaluated, dataset: Dataset) -> int:
    """As many as were asked for, or else up to SAMPLES. Raises ConfigError where there are fewer, or none."""
    there = int(dataset.samples_per_shard(target.condition).sum())
    if there == 0:
        raise ConfigError(f"{target.data} has no sample with the condition {target.condition!r}: name others by --data")
    if target.samples is None:
        return min(SAMPLES, there)
    if target.samples > there:
        raise ConfigError(
            f"--samples {target.samples} is more than the {there} that {target.data} has with the condition "
            f"{target.condition!r}: ask for fewer, or leave it out"
        )
    return target.samples


def write_ends(out: Path, samples: Sequence[dict[str, Any]], held: HeldOutSet, drawn: Path) -> None:
    """ends.json and ends/: the best and the worst pictures, for the report. drawn: the folder of those with control."""
    own = [row for row in samples if row["way"] == WITH]
    figure = next((name for name in FIGURES if name in own[0]), None)
    if figure is None:
        return
    ordered = sorted(own, key=lambda row: -row[figure])
    count = min(SHOWN, len(ordered) // 2 or 1)
    (out / "ends").mkdir(exist_ok=True)
    chosen: dict[str, list[dict[str, Any]]] = {}
    for name, rows in (("best", ordered[:count]), ("worst", ordered[::-1][:count])):
        chosen[name] = []
        for row in rows:
            number = row["row"]
            pictures = {
                f"condition-{number}.png": held.conditions[number],
                f"picture-{number}.png": read_png(drawn / f"{number:06d}.png"),
                f"target-{number}.png": held.targets[number],
            }
            for file, picture in pictures.items():
                write_png(out / "ends" / file, picture)
            chosen[name].append(
                dict(pictures=list(pictures), figure=figure, value=row[figure], key=row["key"], caption=row["caption"])
            )
    write_whole(out / "ends.json", json.dumps(chosen, indent=2).encode())


def noise_pictures(rows: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """(N, H, W, 3) uint8, every level independent and uniform; a row has the same picture on any rank."""
    pictures = [np.random.default_rng(row).integers(0, 256, (*size, 3), dtype=np.uint8) for row in rows]
    return np.stack(pictures) if pictures else np.zeros((0, *size, 3), np.uint8)


def rows_of(world: World, count: int) -> list[int]:
    """This rank's rows: whole batches in turn, so that the same rows share a batch at every world size."""
    batches = range(0, count, AT_ONCE)
    return [
        row for first in batches[world.rank :: world.world_size] for row in range(first, min(first + AT_ONCE, count))
    ]


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def way_digest(
    target: Evaluated, base: Base, dataset: Dataset, network: Any, prompts: Sequence[str], guidance: float, side: int
) -> str:
    """Of everything that the pictures depend on."""
    facts = dict(
        weights=target.digest if network is not None else None,
        data=dataset.fingerprint,
        condition=target.condition if network is not None else None,
        prompts=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        picture_size=(side, side),
        steps=target.steps,
        guidance=guidance,
        scheduler=target.scheduler,
        **drawn_by(base),
    )
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def draw(
    base: Base,
    network: Any,
    held: HeldOutSet,
    prompts: Sequence[str],
    guidance: float,
    target: Evaluated,
    folder: Path,
    mine: Sequence[int],
    name: str,
    world: World,
) -> tuple[np.ndarray, int]:
    """This rank's pictures, (n, H, W, 3) uint8, and how many were not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    new = 0
    batches = [[row for row in mine if row // AT_ONCE == batch] for batch in sorted({row // AT_ONCE for row in mine})]
    for rows in tqdm(batches, desc=name, unit="batch", disable=world.rank != 0):
        if all((folder / f"{row:06d}.png").is_file() for row in rows):
            continue
        conditioning = torch.from_numpy(held.conditions[rows]).permute(0, 3, 1, 2).float() / 255.0
        pictures = sample(
            base,
            [prompts[row] for row in rows],
            [] if network is None else [Control(network, conditioning)],
            seeds=rows,
            steps=target.steps,
            guidance_scale=guidance,
            scheduler=target.scheduler,
            picture_size=held.picture_size,
        ).numpy()
        for row, picture in zip(rows, pictures, strict=True):
            write_png(folder / f"{row:06d}.png", picture)
        new += len(rows)
    pictures = [read_png(folder / f"{row:06d}.png") for row in mine]
    return (np.stack(pictures) if pictures else np.zeros((0, *held.targets.shape[1:]), np.uint8)), new


def write_png(path: Path, picture: np.ndarray) -> None:
    temporary = temporary_path(path)
    Image.fromarray(picture).save(temporary, format="PNG")
    temporary.replace(path)


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def sample_rows(
    images: dict[str, np.ndarray], held: HeldOutSet, mine: Sequence[int], extract: Any
) -> list[dict[str, Any]]:
    """One row a way and picture of this rank: what it is of, and figures."""
    rows = []
    for way, pictures in images.items():
        figures = fidelity(pictures, held, mine, extract)
        for place, row in enumerate(mine):
            own, chance = ({name: round(float(values[place]), 6) for name, values in part.items()} for part in figures)
            named = dict(key=held.keys[row], place=held.places[row], caption=held.captions[row])
            rows.append(dict(way=way, row=row, **named, **own, chance=chance))
    return rows


def summary(rows: Sequence[dict[str, Any]], real: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean of each figure with its confidence interval; chance and share, each likewise, where they can be told.

    rows, real: of the same held-out samples in the same order, as in samples.jsonl. chance is what the same pictures
    score under the conditions of other samples, and share the share of what is possible (`share_of_possible`), which
    is left out where real pictures are not certainly better than chance.
    """
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        values = np.array([row[name] for row in rows])
        result[name] = dict(mean_and_interval(values))
        if name not in rows[0]["chance"]:
            continue
        chances = np.array([row["chance"][name] for row in rows])
        reals = np.array([row[name] for row in real])
        result[name]["chance"] = mean_and_interval(chances)
        share = share_of_possible(values, chances, reals, lower_is_better=name in LOWER_IS_BETTER)
        if np.isfinite(share["mean"]):
            result[name]["share"] = share
    return result


def judged(images: dict[str, np.ndarray], mine: Sequence[int], world: World) -> dict[str, np.ndarray]:
    """By way: what the judge reads in all pictures, (N, 8), whole on every rank."""
    judge = load_judge()
    found = {}
    for way, pictures in images.items():
        seen = dict(zip(mine, read(judge, pictures) if len(mine) else [], strict=True))
        everyone = {row: one for part in gather_objects(seen, world) for row, one in part.items()}
        if way != DISCS:
            found[way] = np.stack([everyone[row] for row in sorted(everyone)])
    return found


def add_obedience(rows: Sequence[dict[str, Any]], seen: np.ndarray, scenes: list[Scene]) -> None:
    """Puts each picture's own shares into its row; the figures are means over pictures, here and in a comparison."""
    shares = obedience_by_picture(seen, scenes)
    for row in rows:
        row |= {f"says_{name}": round(float(values[row["row"]]), 6) for name, values in shares.items()}


def discs(what: Scene, size: int) -> Scene:
    """The scene with each object replaced by a disc of its area at its centre of mass: place and size, no outline."""
    rendering = render(what, size)
    objects = []
    for place, thing in enumerate(what.objects):
        rows, columns = np.nonzero(rendering.instances == place + 1)
        radius = (len(rows) / np.pi) ** 0.5 / size / 0.95  # a ball fills .95 of its radius
        x, y = (columns.mean() + 0.5) / size, (rows.mean() + 0.5) / size
        objects.append(
            SceneObject("ball", thing.colour, thing.size, float(x), float(y), float(radius), 0.0, thing.tint)
        )
    return Scene(tuple(objects), what.background, what.horizon, what.slope)


def named_networks(given: Sequence[str], trained: str) -> dict[str, str]:
    """["depth=/path"] -> {"depth": "/path"}. trained: the kind of condition that pictures are compared in.

    Raises ConfigError and ValueError for what is no model's folder, or would not be used.
    """
    named = {}
    for one in given:
        kind, equals, folder = one.partition("=")
        if not (kind and equals and folder):
            raise ConfigError(f"--network {one!r} is not understood; write KIND=FOLDER")
        try:
            network_folders(kind, folder)
        except ValueError as error:
            raise ConfigError(f"--network {one!r}: {error}") from None
        if kind != trained:
            raise ConfigError(f"--network {one!r} finds {kind}, and pictures are compared in {trained}: leave it out")
        named[kind] = folder
    return named


def write(
    out: Path,
    target: Evaluated,
    dataset: Dataset,
    facts: dict[str, Any],
    figures: dict[str, Any],
    sets: dict[str, Any],
    measures: Measures,
    samples: Sequence[dict[str, Any]],
    seconds: float,
    drawn: int,
    world: World,
) -> None:
    """evaluation.json and samples.jsonl, each whole or not at all. facts: more of what it was measured with."""
    verdict = read_verdict(target.where) if target.config else None
    result = dict(
        where=str(target.where),
        step=target.step,
        digest=target.digest,
        base=target.base,
        data=target.data,
        data_fingerprint=dataset.fingerprint,
        condition=target.condition,
        **facts,
        samples=len({row["row"] for row in samples}),
        sampler=dict(scheduler=target.scheduler, steps=target.steps, guidance=target.guidance),
        figures=figures,
        sets=sets,
        encoders=measures.what,
        control=verdict and as_tree(verdict),
        told=describe_run(target.where) if target.config else None,
        speed=dict(ranks=world.world_size, seconds=seconds, drawn=drawn),
    )
    for name, text in (
        ("samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples)),
        ("evaluation.json", json.dumps(result, indent=2)),
    ):
        write_whole(out / name, text.encode())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(error_text(error), file=sys.stderr, flush=True)
        os._exit(2)
