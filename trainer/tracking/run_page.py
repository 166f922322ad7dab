"""What a reader of MLflow sees of a run besides curves and pictures: its description, data sets, source and tags.

Free of torch. MLflow's page of a run shows the description as Markdown, and tags that begin with `mlflow.` in places of
their own.
"""

import contextlib
import getpass
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlbooth.data.shards.manifest import Dataset
from controlbooth.trainer.config.run import RunConfig, base_path, data_set_name, lora_learning_rate
from controlbooth.trainer.markdown import code, plain
from controlbooth.trainer.tracking.tracker import Input

NAMED_PARTS = 2
"""Of the path of a data set, from its end, that make its name."""


def source_tags(program: str) -> dict[str, str]:
    """Returns MLflow's own tags that say who started what, and of which commit.

    program: the module that runs.
    """
    tags = {"mlflow.source.name": program, "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # a user without a name, as in some containers
        tags["mlflow.user"] = getpass.getuser()
    if (commit := git_commit()) is not None:
        tags["mlflow.source.git.commit"] = commit
    return tags


def git_commit() -> str | None:
    """Returns the commit of the code that runs.

    Returns None for an installed copy, also for one inside another project's checkout.
    """
    file = Path(__file__)
    git = ["git", "-C", str(file.parent)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return None


def training_tags(config: RunConfig, family: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags by which runs are filtered, beside params: `tags.condition = 'edges' and tags.family = 'sd15'`.

    facts: what is known of a run only when it is built, by name.
    """
    return {
        "task": "controlnet",
        "condition": config.data.condition,
        "base": base_path(config).name,
        "family": family,
        **{name: str(value) for name, value in facts.items()},
        **source_tags("controlbooth.trainer.controlnet.train"),
    }


def inputs(config: RunConfig, dataset: Dataset, held_out: Dataset | None) -> list[Input]:
    """Returns the data sets of a run: each of its sources, and the held-out one if there is one."""
    named = [(one, "training") for one in dataset.sources or (dataset,)]
    named += [(held_out, "held-out")] if held_out is not None else []
    return [
        Input(input_name(one.location), one.fingerprint, absolute(one.location), usable(one, config), context)
        for one, context in named
    ]


def input_name(location: str) -> str:
    """Returns the end of a path or URI: `photos/train` for /data/photos/train/."""
    return "/".join([part for part in location.split("/") if part][-NAMED_PARTS:])


def absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).absolute())


def usable(dataset: Dataset, config: RunConfig) -> int:
    """Counts the samples of a data set that have the run's condition; of several sources one may have none of them."""
    return int(dataset.samples_per_shard(config.data.condition).sum())


def describe_training(
    config: RunConfig, folder: Path, base_title: str, dataset: Dataset, held_out: Dataset | None, machine: str
) -> dict[str, str]:
    """Describes a training for Tracker.describe, in parts: what is trained, and on what, how, and where it lies.

    machine: ranks, device and precision, as text.
    """
    size, rate = config.data.resolution, config.optimizer
    lora = f" ({lora_learning_rate(config):g} of low-rank differences)" if config.model.method == "lora" else ""
    rows = {
        "base": f"{code(config.model.base)}, {plain(base_title)}",
        "data": f"{usable(dataset, config):,} samples of {code(data_set_name(config))}",
        "held out": f"{usable(held_out, config):,} samples of {code(config.data.held_out)}" if held_out else "nothing",
        "training": f"{config.max_steps:,} steps of {config.global_batch_size} samples at {size} x {size} px, "
        f"learning rate {rate.learning_rate:g}{lora}, {rate.schedule}",
        "machine": machine,
        "folder": f"{code(folder.absolute())} on {socket.gethostname()}",
    }
    if held_out:
        rows["pictures"] = "`samples.png` among the artifacts is the newest grid; the others are under Model metrics"
    details = "\n".join(f"- **{name}**: {text}" for name, text in rows.items())
    condition, base = plain(config.data.condition), plain(base_path(config).name)
    what = f"ControlNet for **{condition}** on **{base}**, trained with controlbooth."
    return {"what": what, "details": details}


def describe_control(verdict: str) -> str:
    """Describes control in Markdown. verdict: what the validations up to now say of it, as a sentence."""
    return f"**Control:** {verdict}"
