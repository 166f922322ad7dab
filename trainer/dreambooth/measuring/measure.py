"""`controlbooth dreambooth measure`: what trained subjects are worth, as the paper measures it.

    RUN/measures.json                   every figure, the encoders by name, and what was drawn
        subjects/NAME/pictures/*.png    what was drawn of a subject; found again, it is not drawn again
                      samples.png       real | drawn, one row a prompt

With torchrun, ranks share the subjects: `torchrun ... -m controlbooth.launch.cli dreambooth measure RUN`.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from controlbooth.data.errors import UserError
from controlbooth.data.files.records import read_note
from controlbooth.data.files.whole import write_whole
from controlbooth.models.base import Base
from controlbooth.models.files.loading import read_tensors
from controlbooth.models.lora import StackedAdapter, load_subject
from controlbooth.models.sampling import branches, drawn_by, sample
from controlbooth.trainer.config.run import tracking_uri
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.adapted import attach, by_part
from controlbooth.trainer.dreambooth.images import SubjectError, read_picture
from controlbooth.trainer.dreambooth.manifest import Task, find_images, read_record
from controlbooth.trainer.dreambooth.measuring.fidelity import (
    diversity,
    mean_off_diagonal,
    prompt_similarity,
    separation,
    similarity,
)
from controlbooth.trainer.dreambooth.measuring.protocol import Drawing, asked_background, drawings
from controlbooth.trainer.dreambooth.pipeline import NETWORKS, PIPELINE, base_of_subject
from controlbooth.trainer.dreambooth.prior import DRAWN_AT_ONCE, drawn_size
from controlbooth.trainer.dreambooth.stack import LORA_FILE
from controlbooth.trainer.dreambooth.status import status_of
from controlbooth.trainer.dreambooth.tracking import count_states, last_step, subject_params, subject_tags
from controlbooth.trainer.engine.deepspeed import DTYPES, resolve_precision
from controlbooth.trainer.engine.distributed import World, gather_objects, join, leave, patient_group
from controlbooth.trainer.evaluation.drawing import write_png
from controlbooth.trainer.evaluation.encoders import Encoders, encoder_folders, open_encoders
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.evaluation.scenes.judge import ATTRIBUTES, NONE, load_judge, read
from controlbooth.trainer.run.attempt import only_run
from controlbooth.trainer.run.base import once_a_machine, open_base, with_usual_guidance
from controlbooth.trainer.run.process import quiet_libraries
from controlbooth.trainer.run.same_base import check_same_base, read_base_facts
from controlbooth.trainer.tracking.mlflow_run import EVALUATION
from controlbooth.trainer.tracking.tracker import Status, Tracker

RUN_FILE = "measures.json"
REAL_SIDE = 512
"""Pixels of the square to which photographs are cut for `--real`, as in the paper's data set."""
GRID_ROWS = 8


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth dreambooth measure` is asked, and returns its exit status."""
    if (options.run is None) == (options.real is None):
        raise ConfigError(
            "give either the folder of a run, or --real FOLDER with a folder of pictures for each subject"
        )
    folders = encoder_folders(options.encoder)
    quiet_libraries()
    if options.real is not None:
        return measure_real(options.real, folders)
    config, tasks = read_record(options.run)
    finished = [task for task in tasks if status_of(options.run, task.name).get("state") == "finished"]
    if not finished:
        raise ConfigError(
            f"none of the {len(tasks)} subjects of {options.run} is finished. Start `controlbooth dreambooth run` "
            "again: it goes on where it was"
        )
    drawings(finished[0], options.run, False, options.prompts, options.images)  # its errors, before anything is loaded
    world = join()
    try:
        with only_run(options.run, world):
            return measure_run(options.run, config, finished, folders, options.prompts, options.images, world)
    finally:
        leave()


def measure_real(folder: Path, encoders: dict[str, Path]) -> int:
    """Prints how alike real pictures of the same subject are, and those of different subjects."""
    if not folder.is_dir():
        raise ConfigError(f"--real {folder} is no folder. Give one that holds a folder of pictures for each subject")
    named = [(one.name, path) for one in sorted(folder.iterdir()) if one.is_dir() for path in find_images(one)]
    if not named:
        raise ConfigError(f"{folder} holds no folders with pictures; give one that holds a folder for each subject")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_encoders(encoders, device)
    pictures = real_pictures([path for _, path in named], REAL_SIDE)
    names = [name for name, _ in named]
    print(f"{len(pictures)} real pictures of {len(set(names))} subjects")
    print(f"{'':<12}{'within':>10}{'between':>10}{'nearest neighbour':>20}")
    for encoder in (opened.subject, opened.clip):
        if encoder is not None:
            found = separation(encoder.images(pictures), names)
            figures = f"{found['within']:>10.3f}{found['between']:>10.3f}{found['nearest_neighbour']:>20.3f}"
            print(f"{encoder.title:<12}{figures}")
    print("\n".join(f"{title}: {what}" for title, what in named_encoders(opened).items() if "DIV" not in title))
    return 0


def measure_run(
    run: Path,
    config: SubjectRunConfig,
    tasks: Sequence[Task],
    folders: dict[str, Path],
    prompts: int,
    images: int,
    world: World,
) -> int:
    at_the_end = patient_group()
    encoders = open_encoders(folders, world.device)  # its errors come before hours of drawing
    precision = resolve_precision(config.precision, world.device, zero_stage=1)
    base = open_base(config, DTYPES[precision], world.device, once_a_machine(world))
    config = with_usual_guidance(config, base)
    remedy = "Put it back as it was: what a subject has learnt holds on that base alone"
    check_same_base(read_base_facts(run) or {}, base, "when the run began", remedy)
    embedded = base.family.name in ("miniature", "miniature-dit")
    plans = {task.name: drawings(task, pictures_folder(run, task), embedded, prompts, images) for task in tasks}
    mine = list(tasks[world.rank :: world.world_size])
    for task in mine:
        forget_others(run, config, base, task)
    draw(run, config, base, mine, plans, world)
    judge = load_judge() if embedded and base.picture_size == (64, 64) else None
    found = {}
    for task in tqdm(mine, desc="measuring", unit="subject", disable=world.rank > 0):
        real = real_pictures(task.images, config.resolution)
        drawn = np.stack([np.asarray(Image.open(row.path)) for row in plans[task.name]])
        found[task.name] = figures_of(encoders, real, drawn, plans[task.name])
        if judge is not None:
            found[task.name] |= judged(read(judge, drawn), plans[task.name], task.class_noun)
        grid(run / "subjects" / task.name / "samples.png", real, drawn, plans[task.name], images)
    everyone = {name: row for part in gather_objects(found, world, at_the_end) for name, row in part.items()}
    if world.rank == 0:
        result = dict(
            protocol=dict(
                prompts=prompts,
                images=images,
                class_images=prompts,
                sampling_steps=config.prior.sampling_steps,
                guidance_scale=config.prior.guidance_scale,
            ),
            encoders=named_encoders(encoders),
            base_digest=base.digest,
            subjects={task.name: everyone[task.name] for task in tasks},
            mean=mean_of([everyone[task.name] for task in tasks]),
        )
        write_whole(run / RUN_FILE, json.dumps(result, indent=2).encode())
        print(table(result, encoders))
        print(f"figures: {run / RUN_FILE}; pictures: {run / 'subjects'}/*/samples.png")
        log_to_mlflow(run, config, result)
    return 0


def pictures_folder(run: Path, task: Task) -> Path:
    return run / "subjects" / task.name / "pictures"


def forget_others(run: Path, config: SubjectRunConfig, base: Base, task: Task) -> None:
    """Deletes a subject's pictures that other weights or settings have drawn; those of its present weights are kept."""
    folder = pictures_folder(run, task)
    own = run / "subjects" / task.name
    now = dict(
        weights=digest_of(trained_files(own, config.method)),
        dtype=str(base.dtype),
        **drawn_by(base),
        sampling_steps=config.prior.sampling_steps,
        guidance_scale=config.prior.guidance_scale,
        **({"resolution": config.resolution} if base.family.is_transformer else {}),
    )
    record = folder / "drawn_by.json"
    if read_note(record, "The pictures are drawn anew") == now:
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_whole(record, json.dumps(now, indent=1).encode())


def trained_files(own: Path, method: str) -> list[Path]:
    """Returns the files of a subject's trained weights, always in the same order. own: the subject's folder.

    A network above 10 GB is in several files, and text encoders may have learned too.
    """
    if method == "lora":
        return [own / LORA_FILE]
    return sorted(path for part in NETWORKS for path in (own / PIPELINE / part).glob("*.safetensors"))


def digest_of(files: Sequence[Path]) -> str:
    """Returns the SHA-256, in hex, of the bytes of these files, one after another."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def draw(
    run: Path,
    config: SubjectRunConfig,
    base: Base,
    tasks: Sequence[Task],
    plans: dict[str, list[Drawing]],
    world: World,
) -> None:
    """Draws what is missing, several subjects in each batch: one frozen base, and their adapters in a stack.

    Guidance sends the batch through the network twice, first without the prompts and then with them, so the stack holds
    each subject twice, in that order.
    """
    missing = {task.name: [row for row in plans[task.name] if not row.path.exists()] for task in tasks}
    tasks = [task for task in tasks if missing[task.name]]
    if not tasks:
        return
    if config.method == "full":
        draw_full(run, config, base, tasks, missing, world)
        return
    _, adapters = attach(config, base, subjects=0, rank=1)
    total = sum(len(missing[task.name]) for task in tasks)
    bar = tqdm(total=total, desc="drawing", unit="picture", disable=world.rank > 0, dynamic_ncols=True)
    for first in range(0, len(tasks), config.subjects_per_batch):
        together = tasks[first : first + config.subjects_per_batch]
        loras = [read_tensors([run / "subjects" / task.name / LORA_FILE]) for task in together]
        try:
            fill_stack(adapters, loras, branches(base, guidance_of(config)))
        except ValueError as error:
            raise ConfigError(f"a LoRA of {', '.join(task.name for task in together)}: {error}") from error
        each = max(1, DRAWN_AT_ONCE // len(together))
        for start in range(0, max(len(missing[task.name]) for task in together), each):
            # All subjects have equally many rows; one that has fewer pictures to draw repeats its last one.
            rows = [
                missing[task.name][min(start + number, len(missing[task.name]) - 1)]
                for task in together
                for number in range(each)
            ]
            pictures = sample_rows(base, rows, config)
            for row, picture in zip(rows, pictures.numpy(), strict=True):
                if not row.path.exists():
                    write_png(row.path, picture)
                    bar.update()
    bar.close()


def draw_full(
    run: Path,
    config: SubjectRunConfig,
    base: Base,
    tasks: Sequence[Task],
    missing: dict[str, list[Drawing]],
    world: World,
) -> None:
    """Draws the missing pictures of subjects that each have networks of their own, one subject after another."""
    total = sum(len(missing[task.name]) for task in tasks)
    bar = tqdm(total=total, desc="drawing", unit="picture", disable=world.rank > 0, dynamic_ncols=True)
    for task in tasks:
        own = base_of_subject(config, base, run / "subjects" / task.name / PIPELINE)
        for start in range(0, len(missing[task.name]), DRAWN_AT_ONCE):
            rows = missing[task.name][start : start + DRAWN_AT_ONCE]
            pictures = sample_rows(own, rows, config)
            for row, picture in zip(rows, pictures.numpy(), strict=True):
                write_png(row.path, picture)
                bar.update()
    bar.close()


def guidance_of(config: SubjectRunConfig) -> float:
    assert config.prior.guidance_scale is not None, "the run has its family's guidance where it says none"
    return config.prior.guidance_scale


def sample_rows(base: Base, rows: Sequence[Drawing], config: SubjectRunConfig) -> Tensor:
    """Draws these rows with the settings of class pictures, and returns them as (len(rows), H, W, 3) uint8."""
    return sample(
        base,
        [row.prompt for row in rows],
        seeds=[row.seed for row in rows],
        steps=config.prior.sampling_steps,
        guidance_scale=guidance_of(config),
        picture_size=drawn_size(base, config.resolution),
    )


def fill_stack(adapters: dict[str, StackedAdapter], loras: Sequence[dict[str, Tensor]], branches: int) -> None:
    """Makes the stack hold these LoRAs, in this order, as the base draws them with so many branches of guidance."""
    if other := sorted({name for lora in loras for name in lora if name.partition(".lora_")[0] not in adapters}):
        raise UserError(
            f"the LoRA is of other layers: {len(other)} of its names are none of theirs, such as {other[0]}"
        )
    for part, times in zip(by_part(adapters), (branches, 1), strict=True):
        own = [{name: lora[name] for name in lora if name.partition(".lora_")[0] in part} for lora in loras]
        if part:
            _fill(part, own * times)


@torch.no_grad()
def _fill(adapters: dict[str, StackedAdapter], loras: Sequence[dict[str, Tensor]]) -> None:
    """Makes adapters hold these LoRAs, in this order, with room for the largest rank among them."""
    rank = max(len(tensor) for lora in loras for name, tensor in lora.items() if name.endswith("lora_A.weight"))
    for adapter in adapters.values():
        (_, _, *inputs), (_, outputs, _, *kernel) = adapter.down.shape, adapter.up.shape
        adapter.down = nn.Parameter(adapter.down.new_zeros(len(loras), rank, *inputs), requires_grad=False)
        adapter.up = nn.Parameter(adapter.up.new_zeros(len(loras), outputs, rank, *kernel), requires_grad=False)
    for slot, lora in enumerate(loras):
        load_subject(adapters, slot, lora)


def real_pictures(paths: Sequence[Path], side: int) -> np.ndarray:
    """Reads pictures as the trainer sees them, (N, side, side, 3) uint8.

    Raises ConfigError for a picture that cannot be used.
    """
    try:
        return np.stack([read_picture(path, side).transpose(1, 2, 0) for path in paths])
    except SubjectError as error:
        raise ConfigError(f"{error}. Remove it, or replace it") from error


def figures_of(encoders: Encoders, real: np.ndarray, drawn: np.ndarray, plan: Sequence[Drawing]) -> dict[str, float]:
    """Computes one subject's figures by name.

    real: (N, H, W, 3) uint8; drawn: (M, H', W', 3) uint8, in the order of `plan`.
    """
    groups = np.array([row.group for row in plan])
    of_subject, of_class = torch.from_numpy(groups >= 0), torch.from_numpy(groups < 0)
    subject = encoders.subject
    real_rows, drawn_rows = subject.images(real), subject.images(drawn)
    figures = {
        subject.key: similarity(drawn_rows[of_subject], real_rows),
        f"pres_{subject.key}": similarity(drawn_rows[of_class], real_rows),
        encoders.div_key: diversity([encoders.distances(drawn[groups == n]) for n in sorted({*groups} - {-1})]),
    }
    if len(real) > 1:
        figures[f"real_{subject.key}"] = mean_off_diagonal(real_rows @ real_rows.T)
    if encoders.clip is not None:
        assert encoders.clip.texts is not None
        clip_rows = encoders.clip.images(drawn)[of_subject]
        figures["clip_i"] = similarity(clip_rows, encoders.clip.images(real))
        texts = encoders.clip.texts([row.described for row in plan if row.group >= 0])
        figures["clip_t"] = prompt_similarity(clip_rows, texts)
    return {name: float(value) for name, value in figures.items()}


def judged(seen: np.ndarray, plan: Sequence[Drawing], class_noun: str) -> dict[str, float]:
    """Computes prompt fidelity without CLIP, from what the embedded world's judge reads in pictures of the subject.

    seen: (M, 8), as `judge.read` returns it. judge_background: share of pictures with the background that their prompt
    asks for, all colours of it; judge_class: share that show the class noun first from the left.
    """
    names = list(ATTRIBUTES)
    asked = [row.group >= 0 for row in plan]
    backgrounds = []
    for row in plan:
        upper, lower = (*asked_background(row.described), NONE)[:2] if row.group >= 0 else (NONE, NONE)
        backgrounds.append([ATTRIBUTES["background"].index(upper), ATTRIBUTES["lower_background"].index(lower)])
    read_backgrounds = seen[:, [names.index("background"), names.index("lower_background")]]
    classes = ATTRIBUTES["left_class"]
    shown = seen[:, names.index("left_class")] == (classes.index(class_noun) if class_noun in classes else -1)
    return {
        "judge_background": float((read_backgrounds == np.array(backgrounds)).all(axis=1)[asked].mean()),
        "judge_class": float(shown[asked].mean()),
    }


def grid(path: Path, real: np.ndarray, drawn: np.ndarray, plan: Sequence[Drawing], images: int) -> None:
    """Draws a grid of a subject's pictures with a row for each of the first prompts, and one for the class noun last.

    Its columns are one real picture and up to four drawn ones.
    """
    groups = [row.group for row in plan]
    shown = [group for group in dict.fromkeys(groups) if group >= 0][:GRID_ROWS]
    count = min(images, 4)
    per_row = [[number for number, group in enumerate(groups) if group == one][:count] for one in [*shown, -1]]
    per_row = [row + [row[-1]] * (count - len(row)) for row in per_row]
    columns = {"real": real[[number % len(real) for number in range(len(per_row))]]}
    columns |= {f"drawn {n + 1}": drawn[[row[n] for row in per_row]] for n in range(count)}
    draw_grid(path, columns, [plan[row[0]].prompt for row in per_row])


def named_encoders(encoders: Encoders) -> dict[str, str]:
    """Returns what the titles of the table stand for, by title."""
    named = {encoders.subject.title: encoders.subject.what}
    if encoders.clip is not None:
        named["CLIP"] = encoders.clip.what
    return named | {encoders.div_title: encoders.div_what}


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each figure over the subjects that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def table(result: dict[str, Any], encoders: Encoders) -> str:
    key, title = encoders.subject.key, encoders.subject.title
    heads = {
        key: title,
        "clip_i": "CLIP-I",
        "clip_t": "CLIP-T",
        "judge_background": "says background",
        "judge_class": "says class",
        f"pres_{key}": f"PRES by {title}",
        encoders.div_key: encoders.div_title,
        f"real_{key}": f"real by {title}",
    }
    heads = {name: head for name, head in heads.items() if name in result["mean"]}
    rows = result["subjects"] | {"mean": result["mean"]}
    width = max(map(len, rows)) + 2
    protocol = result["protocol"]
    lines = [
        f"{len(result['subjects'])} subjects, {protocol['prompts']} prompts x {protocol['images']} images, "
        f"{protocol['class_images']} images of the class",
        " " * width + "  ".join(heads.values()),
    ]
    for name, figures in rows.items():
        cells = [f"{figures[n]:.3f}" if n in figures else "-" for n in heads]
        lines.append(
            name.ljust(width) + "  ".join(f"{c:>{len(h)}}" for c, h in zip(cells, heads.values(), strict=True))
        )
    return "\n".join([*lines, *(f"{title}: {what}" for title, what in result["encoders"].items())])


def log_to_mlflow(run: Path, config: SubjectRunConfig, result: dict[str, Any]) -> None:
    """Logs the means to the job's run in MLflow, and each subject's figures to its own run.

    These are the runs that the training logged to. What does not reach MLflow stays in the files, as its warning says,
    and is sent with the next measures.
    """
    settings = (tracking_uri(config), config.tracking.experiment)
    measured = {"measure": {"protocol": result["protocol"], "encoders": result["encoders"]}}
    left = count_states(run)["left"]

    def log(tracker: Tracker, step: int, figures: dict[str, float], file: Path) -> None:
        tracker.log(step, {f"{EVALUATION}{key}": value for key, value in figures.items()})
        tracker.log_artifact(file)

    def opened(folder: Path, name: str, params: dict[str, Any], status: Status | None, **which: Any) -> Tracker:
        seconds = config.tracking.system_metrics_seconds
        return Tracker(folder, *settings, name, params, {}, seconds, status=status, threads=False, **which)

    params = config.model_dump(mode="json") | measured
    parent = opened(run, config.name, params, None if left else "FINISHED", shared=run)
    log(parent, last_step(run), result["mean"], run / RUN_FILE)
    answers = parent.send_pending(at_once=True)
    for task in tqdm(read_record(run)[1], desc="MLflow", unit="subject"):
        if task.name not in result["subjects"]:
            continue
        folder = run / "subjects" / task.name
        drawn_by = read_note(folder / "pictures" / "drawn_by.json", "Measure again")
        params = subject_params(config, task) | {"measure": measured["measure"] | drawn_by}
        child = opened(folder, task.name, params, "FINISHED", parent=parent)
        child.set_tags(subject_tags(task) | {"state": "finished"})
        log(child, status_of(run, task.name).get("step") or 0, result["subjects"][task.name], folder / "samples.png")
        if answers:
            child.send_pending(at_once=True)
        child.close(0.0)
    parent.close(0.0)
