"""`controlbooth mirror`: copies of runs' figures for TensorBoard, and as offline runs of Weights & Biases.

    OUT/NAME/               what the run NAME has logged; of a run of subjects NAME/job/ and NAME/subjects/SUBJECT/
             mirror.json    that this folder is a mirror, which may be written anew

A mirror is made of metrics.jsonl alone: each record of a step becomes one entry with the record's names, values, step
and time. The training knows nothing of it, so a mirror can be begun, stopped and begun again at any time, of runs that
train elsewhere too. Where metrics.jsonl is another file, as after a start that goes on from an older checkpoint, and
when the command starts, the mirror is written anew: so no step is in it twice.
"""

import argparse
import importlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from controlbooth.data.errors import UserError
from controlbooth.data.files.records import Damaged, read_json
from controlbooth.launch.watch.finding import Finder
from controlbooth.launch.watch.growing import GrowingFile
from controlbooth.launch.watch.subject_run import SubjectRun
from controlbooth.trainer.tracking.spool import LINES, parse_record

MARK = "mirror.json"
ASK_EVERY_SECONDS = 5.0
KINDS = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""What a mirror can be for -> the package that it needs, which is the extra of the same name."""


class Writer(Protocol):
    """What takes the figures of one run."""

    def write(self, step: int, moment: float, figures: Mapping[str, float]) -> None:
        """Adds figures of a step. moment: when they were logged, in seconds since 1970."""

    def flush(self) -> None:
        """Sees to it that others find what was written."""

    def close(self) -> None:
        """Ends the files."""


class TensorBoard:
    """Writes event files, whose values are 32-bit floats."""

    def __init__(self, folder: Path, name: str):
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        writing = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._writer = writing.EventFileWriter(str(folder))

    def write(self, step: int, moment: float, figures: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.add_event(self._event(wall_time=moment, step=step, summary=self._summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Writes an offline run, which `wandb sync` sends later."""

    def __init__(self, folder: Path, name: str):
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True)
        self._run: Any = wandb.init(
            project="controlbooth", name=name, dir=str(folder), mode="offline", reinit="create_new", settings=settings
        )
        # By a figure of their own, since W&B leaves out what comes at a step that is past.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, moment: float, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "step": step, "time": moment})

    def flush(self) -> None:
        """Does nothing: W&B writes by itself."""

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, Callable[[Path, str], Writer]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Mirror(GrowingFile):
    """The mirror of one metrics.jsonl, in a folder of its own."""

    def __init__(self, folder: Path, name: str, out: Path, kind: str):
        """Writes nothing yet. Raises UserError where `out` holds something that is no mirror."""
        super().__init__(folder, LINES)
        self.name, self._out, self._kind = name, out, kind
        self._writer: Writer | None = None
        self.written = 0
        """Records of steps that are in it."""
        if out.exists() and any(out.iterdir()) and read_json(out / MARK, "", missing={}).get("kind") != kind:
            raise UserError(f"{out} holds something else than a mirror for {kind}: give another folder, or empty it")

    def begin(self) -> None:
        """Removes what was written, and begins anew."""
        self.close()
        shutil.rmtree(self._out, ignore_errors=True)
        self.written = 0

    def take(self, line: bytes) -> None:
        try:
            record = parse_record(line, "")
        except Damaged:  # the training says so of its own file, and the page counts such lines
            return
        if "metrics" not in record:
            return
        if self._writer is None:
            self._out.mkdir(parents=True, exist_ok=True)
            (self._out / MARK).write_text(json.dumps({"kind": self._kind, "of": str(self._folder)}))
            self._writer = WRITERS[self._kind](self._out, self.name)
        figures = {name: float(value) for name, value in record["metrics"].items()}
        self._writer.write(record["step"], record["time"], figures)
        self.written += 1

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth mirror` is asked, and returns its exit status."""
    if importlib.util.find_spec(KINDS[options.to]) is None:
        raise UserError(
            f"--to {options.to} needs the package {KINDS[options.to]}: pip install 'controlbooth[{options.to}]'"
        )
    for folder in options.runs:
        if options.out.absolute().is_relative_to(folder.absolute()):
            raise UserError(f"--out {options.out} lies in {folder}, whose runs are only read: give a folder beside it")
    finder, mirrors = Finder(options.runs), {}
    try:
        while True:
            update(finder, mirrors, options.out, options.to)
            if not options.follow:
                break
            time.sleep(ASK_EVERY_SECONDS)
    finally:
        for mirror in mirrors.values():
            mirror.close()
    print(f"{len(mirrors)} mirrors with {sum(one.written for one in mirrors.values()):,} records in {options.out}")
    return 0


def update(finder: Finder, mirrors: dict[Path, Mirror], out: Path, kind: str) -> None:
    """Adds to the mirrors what is new in the runs that are there now, and to `mirrors` those of new ones."""
    for one in finder.runs().values():
        places = {one.folder: one.name}
        if isinstance(one, SubjectRun):
            names = one.files.names("subjects")
            places = {one.folder: f"{one.name}/job"}
            places |= {one.folder / "subjects" / name: f"{one.name}/subjects/{name}" for name in names}
        for folder, name in places.items():
            if folder not in mirrors:
                if name in (other.name for other in mirrors.values()):
                    raise UserError(
                        f"two runs are called {name}, and mirrors have these names: copy one of them by itself"
                    )
                mirrors[folder] = Mirror(folder, name, out / name, kind)
            mirrors[folder].update()
            mirrors[folder].flush()
