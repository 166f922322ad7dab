"""What keeps a run of subjects from being worth anything, found before anything is written."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from controlbooth.data.errors import UserError
from controlbooth.launch.preflight.run import base_problems
from controlbooth.models.architectures import VAE_FACTOR
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.manifest import Task, check_pictures, load_subjects, settle
from controlbooth.trainer.dreambooth.words import check_words
from controlbooth.trainer.run.starting import unwritable
from controlbooth.trainer.tracking.mlflow_address import tracking_problems


def run_problems(config: SubjectRunConfig) -> Iterator[str]:
    """Yields what would stop all subjects, wherever they are trained."""
    problems = list(base_problems(config))
    yield from problems
    unet, size = base_folder(config.model.base) / "unet" / "config.json", config.resolution
    if problems or config.prior.weight == 0 or not unet.is_file():  # of a single file the trainer knows it
        return
    sample_size = json.loads(unet.read_text()).get("sample_size")
    if isinstance(sample_size, int) and sample_size * VAE_FACTOR != size:
        drawn = sample_size * VAE_FACTOR
        yield (
            f"resolution is {size}, and the base draws {drawn} x {drawn}: class pictures are drawn at the base's own "
            f"size. Set resolution to {drawn}, or prior.weight to 0"
        )


def folder_problems(config: SubjectRunConfig) -> Iterator[str]:
    """Yields the problems of folders to be written on this machine, or on a disk that it sees."""
    yield from tracking_problems(config)
    written = [("output", config.output, config.output / config.name)]
    if config.prior.weight and config.prior.cache is not None:
        written.append(("prior.cache", config.prior.cache, config.prior.cache))
    for field, value, folder in written:
        if why := unwritable(folder):
            yield f"{field} is {str(value)!r}, but {why}. Give another folder"


def checked_subjects(
    config: SubjectRunConfig, manifest: Path, program: str, open_pictures: bool
) -> tuple[list[Task], dict[str, str]]:
    """Returns the subjects that can be trained, and what is wrong with the others, by name, which is printed.

    open_pictures: whether each picture is opened, as training does when a subject begins. Raises ValueError where no
    subject can be trained.
    """
    subjects, faults = load_subjects(manifest)
    tasks, more = settle(subjects, config)
    split, warnings = check_words(tasks, config)
    faults |= more | split
    if open_pictures:
        faults |= check_pictures([task for task in tasks if task.name not in faults], config.resolution)
    for name, message in [*faults.items(), *((name, f"warning: {text}") for name, text in warnings.items())]:
        print(f"controlbooth {program}: {name}: {message}", file=sys.stderr)
    tasks = [task for task in tasks if task.name not in faults]
    if not tasks:
        raise UserError(f"{manifest} has no subject that can be trained")
    return tasks, faults
