"""`controlbooth evaluate`: what a ControlNet is worth on held-out conditions, beside pictures that bound it.

    OUT/evaluation.json       every figure with its confidence interval, and what it was measured with
        samples.jsonl         the figures of each picture; `controlbooth compare` pairs two such files
        evaluation.png        condition | without control | with control | no prompt | target
        pictures/WAY-DIGEST/  what was drawn; found again, it is not drawn again

With torchrun, ranks share the pictures: `torchrun ... -m controlbooth.launch.cli evaluate RUN`. Batches are the
same however many ranks there are, so figures are too.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from controlbooth.data.condition_names import COMPUTED
from controlbooth.data.files.whole import write_whole
from controlbooth.data.loading.tokens import describe_cut
from controlbooth.data.scenes.render import Scene, render
from controlbooth.data.shards.manifest import Dataset, dataset_of, open_dataset
from controlbooth.models.base import Base
from controlbooth.models.pretrained import load_base
from controlbooth.models.unlocked_decoder import load_networks
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.engine.distributed import World, barrier, gather_objects, join, leave, on_first_rank
from controlbooth.trainer.evaluation.chance import METRICS_VERSION
from controlbooth.trainer.evaluation.distribution import Measures, measure_sets, open_measures
from controlbooth.trainer.evaluation.drawing import (
    disc_baseline,
    draw,
    noise_pictures,
    read_png,
    rows_of,
    sample_rows,
    slug,
    way_digest,
    write_png,
)
from controlbooth.trainer.evaluation.encoders import encoder_folders
from controlbooth.trainer.evaluation.extract import extractor, what_is_missing
from controlbooth.trainer.evaluation.figures import table
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.evaluation.held_out import EDGE_KINDS, HeldOutSet, load_held_out, scenes_of
from controlbooth.trainer.evaluation.kinds import LOWER_IS_BETTER
from controlbooth.trainer.evaluation.publish import publish
from controlbooth.trainer.evaluation.record import DISCS, NO_PROMPT, NOISE, REAL, WITH, WITHOUT
from controlbooth.trainer.evaluation.report import write_report
from controlbooth.trainer.evaluation.scenes.judge import load_judge, prompt_accuracy_by_picture, read
from controlbooth.trainer.evaluation.statistics import mean_and_interval, share_of_possible
from controlbooth.trainer.evaluation.target import Evaluated, named_networks, resolve, samples_to_draw
from controlbooth.trainer.evaluation.verdict import as_tree, describe_run, read_verdict
from controlbooth.trainer.run.base import once_a_machine, open_base
from controlbooth.trainer.run.best import FIGURES
from controlbooth.trainer.run.process import quiet_libraries
from controlbooth.trainer.run.same_base import check_same_base

SHOWN = 8
JUDGED_SIDE = 64
"""Pixels of the pictures that the judge reads."""


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth evaluate` is asked, and returns its exit status."""
    quiet_libraries()
    target = resolve(options)
    named_networks(options.network, target.condition.removeprefix(COMPUTED))  # now: loading a base takes long
    encoder_folders(options.encoder)
    world = join()
    try:
        return evaluate(target, options, world)
    finally:
        leave()


def base_of(target: Evaluated, world: World) -> Base:
    """Loads the base that pictures are drawn with: a run's base in the way in which the run uses it."""
    if target.config is None:
        where = base_folder(target.base)
        return load_base(where, target.family, torch.float32, world.device, digests_of=once_a_machine(world))
    model = target.config.model.model_copy(update={"base": target.base, "family": target.family})
    return open_base(
        target.config.model_copy(update={"model": model}), torch.float32, world.device, once_a_machine(world)
    )


def evaluate(target: Evaluated, options: argparse.Namespace, world: World) -> int:
    out = options.out or target.where / "evaluation"
    began = time.perf_counter()
    rows = on_first_rank(lambda: open_dataset(target.data).rows, world)
    dataset = dataset_of(target.data, rows)
    count = samples_to_draw(target, dataset)
    base = base_of(target, world)
    if target.saved is not None:
        remedy = f"Put it back as it was, or say --base {target.base} to measure on what it is now"
        check_same_base(target.saved, base, f"at step {target.step}", remedy)
    guidance = target.guidance or base.family.usual_guidance
    target = replace(target, scheduler=target.scheduler or base.process.samplers[0], guidance=guidance)
    controlled, controlnet = load_networks(target.weights, base, kind=target.condition)
    controlnet.eval().requires_grad_(False).to(world.device)
    side = target.resolution or base.picture_size[0]
    held = on_first_rank(lambda: load_held_out(dataset, count, target.condition, side), world)
    if world.rank == 0 and (line := describe_cut(base.tokenizers, held.captions, "held-out captions")):
        print(f"warning: {line}", file=sys.stderr)
    networks = named_networks(options.network, held.kind)
    extract = extractor(held, networks, str(world.device))
    measures = open_measures(encoder_folders(options.encoder), options.aesthetic, world.device)
    if extract is None and world.rank == 0 and held.kind not in EDGE_KINDS:
        print(what_is_missing(held.kind), file=sys.stderr)
    variants: dict[str, tuple[Any, Sequence[str], float]] = {
        WITHOUT: (None, held.captions, guidance),
        WITH: (controlnet, held.captions, guidance),
        NO_PROMPT: (controlnet, [""] * len(held.keys), guidance if base.family.embeds_guidance else 1.0),
    }
    mine = rows_of(world, len(held.keys))
    images: dict[str, np.ndarray] = {}
    drawn = 0

    def way_folder(name: str) -> Path:
        network, prompts, guidance = variants[name]
        return out / "pictures" / f"{slug(name)}-{way_digest(target, base, dataset, network, prompts, guidance, side)}"

    for name, (network, prompts, guidance) in variants.items():
        drawn_by = base if network is None else controlled
        images[name], new = draw(
            drawn_by, network, held, prompts, guidance, target, way_folder(name), mine, name, world
        )
        drawn += new
    seconds = time.perf_counter() - began
    scenes = scenes_of(held)
    if scenes:
        drawn_discs = [render(disc_baseline(scenes[row], side), side).image for row in mine]
        images[DISCS] = np.stack(drawn_discs) if drawn_discs else images[WITH]  # a rank without rows
    images[NOISE] = noise_pictures(mine, held.picture_size)
    images[REAL] = held.targets[mine]
    seen = judged(images, mine, world) if scenes and side == JUDGED_SIDE else {}
    samples = [row for part in gather_objects(sample_rows(images, held, mine, extract), world) for row in part]
    samples.sort(key=lambda row: (list(images).index(row["way"]), row["row"]))
    sets = measure_sets(measures, {name: images[name] for name in (*variants, REAL)}, held, mine, world)
    everything = gather_objects(drawn, world)
    if world.rank == 0:
        for variant, own in seen.items():
            add_prompt_accuracy([row for row in samples if row["way"] == variant], own, scenes)
        of_variant = {variant: [row for row in samples if row["way"] == variant] for variant in images}
        figures = {variant: summary(rows, of_variant[REAL]) for variant, rows in of_variant.items()}
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
        for name in variants:
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


def write_ends(out: Path, samples: Sequence[dict[str, Any]], held: HeldOutSet, drawn: Path) -> None:
    """Writes ends.json and ends/, for the report: the best and the worst pictures by the first of FIGURES they have.

    drawn: the folder of the pictures with control. Writes nothing where they have no such figure.
    """
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


def summary(rows: Sequence[dict[str, Any]], real: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Computes the mean of each figure with its confidence interval; likewise its chance and share where there are any.

    rows, real: of the same held-out samples in the same order, as in samples.jsonl. chance is what the same pictures
    score under the conditions of other samples, and share the share of what is possible (`share_of_possible`), which is
    left out where real pictures are not certainly better than chance.
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
    """Reads all pictures but discs with the judge: variant of the pictures -> (N, 8) int64, whole on every rank."""
    judge = load_judge()
    found = {}
    for variant, pictures in images.items():
        seen = dict(zip(mine, read(judge, pictures) if len(mine) else [], strict=True))
        everyone = {row: one for part in gather_objects(seen, world) for row, one in part.items()}
        if variant != DISCS:
            found[variant] = np.stack([everyone[row] for row in sorted(everyone)])
    return found


def add_prompt_accuracy(rows: Sequence[dict[str, Any]], seen: np.ndarray, scenes: list[Scene]) -> None:
    """Puts each picture's prompt accuracy into its row, as says_*, which is its name on disk and in MLflow.

    The figures are means over pictures, here and in a comparison.
    """
    shares = prompt_accuracy_by_picture(seen, scenes)
    for row in rows:
        row |= {f"says_{name}": round(float(values[row["row"]]), 6) for name, values in shares.items()}


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
    """Writes evaluation.json and samples.jsonl, each whole or not at all.

    facts: more of what the pictures were measured with. seconds: how long drawing took. drawn: how many pictures were
    new.
    """
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
