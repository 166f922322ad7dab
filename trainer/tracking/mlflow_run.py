"""One run in MLflow: the records of the spool as the calls that put them there, each of them safe to repeat.

MLflow is imported on connecting, which takes seconds, and for a new SQLite store some more to create its tables.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from controlbooth.trainer.markdown import code
from controlbooth.trainer.tracking.mlflow_store import make_store, store_file
from controlbooth.trainer.tracking.spool import Record, State, publish

TRAIN, EVALUATION = "train/", "evaluation/"
"""What names of metrics begin with in MLflow, whose pages make a group of each beginning: TRAIN is put before a name
of metrics.jsonl without one; EVALUATION is of what is measured afterwards, at any step, in any order, and again."""
METRICS_PER_CALL, ENTRIES_PER_CALL = 1000, 100
"""MLflow's limits for log_batch: of metrics, and of params or tags."""
KEY_TAG = "controlbooth.key"
DATASET_DIGEST_LENGTH = 36
"""MLflow's limit for the digest of a data set."""
DESCRIPTION = "mlflow.note.content"
"""The tag of a run or a model that its page shows as Markdown."""
PARENT_TAG = "mlflow.parentRunId"
MLFLOW_MODEL_IS_EXTERNAL = "mlflow.model.isExternal"
MLFLOW_LOGGED_ARTIFACTS = "mlflow.loggedArtifacts"
MLFLOW_LOGGED_IMAGES = "mlflow.loggedImages"
MLFLOW_DATASET_CONTEXT = "mlflow.data.context"
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",  # no warning where git is not installed
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The spool repeats, patiently and without holding anything up; MLflow's own retries take four minutes each.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
OTHER_KINDS = ("params", "tags", "inputs", "status", "artifact", "table", "image", "checkpoint")
"""Of records: each has the key of its kind, and is sent by itself by the method of that name."""
PASSING = re.compile(
    r"UNIQUE constraint failed|UniqueViolation|duplicate key|Duplicate entry|InterfaceError|connection .*(closed|lost)",
    re.IGNORECASE,
)
"""Errors of databases that MLflow calls bad requests, and that another try cures: of two runs that add the same data
set at once one is told that its key is taken, and finds it there the next time; a connection that is gone is made anew.
"""
Item = TypeVar("Item")


class Refused(Exception):
    """A record that the server will never take, so that sending it again is useless."""


class MlflowRun:
    """A connection to one run. Any method may raise whatever the server, a proxy or the client library raises."""

    def __init__(
        self,
        state: State,
        run_name: str,
        folder: Path,
        values_changed: bool,
        parent_id: str | None = None,
        shared: Path | None = None,
    ):
        """Connects, and finds or creates the run.

        folder: of the run; relative paths of artifacts and images start there.
        values_changed: steps that are repeated may have other values than before, and are sent again.
        parent_id: of the MLflow run that this one is shown below. shared: a folder in which all processes that log to
        this run agree on its id.
        """
        from mlflow import MlflowClient

        # Progress of creating tables; their errors are raised and need no log.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._state, self._folder, self._values_changed = state, folder, values_changed
        make_store(state.uri)
        self._client = MlflowClient(state.uri)
        self.experiment_id = self._find_or_create_experiment()
        self.run_id = state.run_id or self._find_or_create_run(run_name, parent_id, shared)
        self._sent_steps: dict[str, int] = {}

    def skip_sent_steps(self) -> None:
        """Leaves out, from here on, what the server has now: each metric up to its last step, as steps come in order.

        Evaluations are sent again: their points have the times that they had, and count once. Nothing is left out where
        repeated steps may have other values than before.
        """
        if not self._values_changed:
            data = self._client.get_run(self.run_id).data
            last = {metric.key: metric.step for metric in data.to_proto().metrics}
            self._sent_steps = {name: step for name, step in last.items() if not name.startswith(EVALUATION)}

    def send(self, records: Sequence[Record]) -> None:
        """Sends records of one kind to MLflow.

        Raises Refused for what it will never take, and otherwise whatever another try may cure.
        """
        from mlflow.exceptions import MlflowException

        kind = kind_of(records[0])
        try:
            if kind == "points":
                metrics = [metric for record in records for metric in self._metrics(record)]
                for some in _batched(metrics, METRICS_PER_CALL):
                    self._client.log_batch(self.run_id, metrics=some)
            else:
                for record in records:
                    getattr(self, f"_send_{kind}")(record)
        except FileNotFoundError as error:
            raise Refused(str(error)) from error
        except MlflowException as error:
            lasting = error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST") and not PASSING.search(str(error))
            if not lasting or not self._is_active():
                raise
            raise Refused(str(error)) from error

    def _is_active(self) -> bool:
        """Tells whether the run is not deleted: a deleted run refuses everything, until it is restored."""
        return self._client.get_run(self.run_id).info.lifecycle_stage == "active"

    def _find_or_create_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._state.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._client.create_experiment(name, artifact_location=_artifact_location(self._state.uri))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            return self._find_or_create_experiment()  # another process has created it meanwhile
        if experiment.lifecycle_stage != "active":
            raise RuntimeError(
                f"the MLflow experiment {name!r} is deleted. Restore it with `mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}`, or set tracking.experiment to another name"
            )
        return experiment.experiment_id

    def _find_or_create_run(self, name: str, parent_id: str | None, shared: Path | None) -> str:
        """Returns the id of the run that has our key, which is created where there is none.

        The run is searched for by its key, as the answer to an earlier attempt to create it may have been lost.
        """
        key = self._state.key
        found = self._client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
        else:
            tags = {KEY_TAG: key} | ({PARENT_TAG: parent_id} if parent_id else {})
            start_time = round(self._state.created * 1000)
            run_id = self._client.create_run(self.experiment_id, start_time, tags=tags, run_name=name).info.run_id
        if shared is None:
            return run_id
        agreed = publish(shared / f".mlflow-run-{key}", run_id)
        if agreed != run_id:  # another process has created it at the same time
            self._client.delete_run(run_id)
        return agreed

    def _metrics(self, record: Record) -> Iterator[Any]:
        """Yields the mlflow.entities.Metric of a record of a step or of the machine.

        Those of a step that the server has are left out.
        """
        from mlflow.entities import Metric

        time = round(record["time"] * 1000)
        if "system" in record:
            step = max(0, int(record["time"] - self._state.created))  # seconds of the run, through all its starts
            for name, value in record["system"].items():
                yield Metric(f"{record.get('group', 'system')}/{name}", float(value), time, step)
        else:
            for name, value in record["metrics"].items():
                if record["step"] > self._sent_steps.get(metric_name(name), -1):
                    yield Metric(metric_name(name), float(value), time, record["step"])

    def _send_params(self, record: Record) -> None:
        from mlflow.entities import Param

        for some in _batched(list(record["params"].items()), ENTRIES_PER_CALL):
            self._client.log_batch(self.run_id, params=[Param(name, value) for name, value in some])

    def _send_tags(self, record: Record) -> None:
        from mlflow.entities import RunTag

        for some in _batched(list(record["tags"].items()), ENTRIES_PER_CALL):
            self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in some])

    def _send_status(self, record: Record) -> None:
        time = round(record["time"] * 1000)
        if record["status"] not in ("RUNNING", "SCHEDULED"):
            self._client.set_terminated(self.run_id, record["status"], time)
        elif (self._client.get_run(self.run_id).info.end_time or 0) < time:  # else another process has ended it since
            self._client.update_run(self.run_id, record["status"])

    def _send_inputs(self, record: Record) -> None:
        """Sends data sets. One that the run has already is not added again."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for one in record["inputs"]:
            facts = {"fingerprint": one["fingerprint"], "num_rows": one["samples"]}
            dataset = Dataset(
                name=one["name"],
                digest=one["fingerprint"][:DATASET_DIGEST_LENGTH],
                source_type=one["source_type"],
                source=json.dumps({"uri": one["source"]}),
                profile=json.dumps(facts),
            )
            inputs.append(DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, one["context"])]))
        self._client.log_inputs(self.run_id, inputs)

    def _send_artifact(self, record: Record) -> None:
        self._client.log_artifact(self.run_id, str(self._folder / record["artifact"]))

    def _send_table(self, record: Record) -> None:
        """Sends a file as MlflowClient.log_table would, which needs pandas and adds rows when it is repeated."""
        path = self._folder / record["table"]
        self._client.log_artifact(self.run_id, str(path))
        logged = json.loads(self._client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if (entry := {"path": path.name, "type": "table"}) not in logged:
            self._client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*logged, entry]))

    def _send_image(self, record: Record) -> None:
        """Sends a picture of a series, also as NAME.png at the top of the artifacts, which is the newest one."""
        from mlflow.tracking.multimedia import compress_image_size

        image, time = record["image"], round(record["time"] * 1000)
        there = f"images/{image['name'].replace('/', '~')}+step+{record['step']}+timestamp+"
        if self._values_changed:
            there += f"{time}+"
        listed = [file.path for file in self._client.list_artifacts(self.run_id, "images")]
        sent = [path.removesuffix(".png") for path in listed if path.startswith(there) and path.endswith(".png")]
        with self._picture(image["path"]) as picture:
            if not sent:  # else MLflow adds a copy under a random name
                self._client.log_image(self.run_id, picture, key=image["name"], step=record["step"], timestamp=time)
            elif (thumbnail := f"{sent[0]}+compressed.webp") not in listed:  # the server went away between the two
                self._client.log_image(self.run_id, compress_image_size(picture), thumbnail)
                self._client.set_tag(self.run_id, MLFLOW_LOGGED_IMAGES, "True")
            self._client.log_image(self.run_id, picture, f"{image['name']}.png")

    def _picture(self, path: str) -> Any:
        """Opens a picture. Raises Refused for one that cannot be read, as another try would not cure that."""
        from PIL import Image

        try:
            picture = Image.open(self._folder / path)
            picture.load()  # which closes the file
            return picture
        except (OSError, SyntaxError, ValueError) as error:
            raise Refused(f"{path} cannot be read: {error}") from error

    def _send_checkpoint(self, record: Record) -> None:
        """Sends a checkpoint as a LoggedModel with its metrics, as an output of the run.

        Its bytes stay where they are.
        """
        from mlflow.entities import LoggedModelOutput, Metric

        checkpoint, step = record["checkpoint"], record["step"]
        model_id, there = self._find_model(checkpoint["digest"], step)
        model_id = model_id or self._create_model(checkpoint, step)
        metrics = [
            Metric(metric_name(name), float(value), round(time * 1000), step, model_id=model_id)
            for name, (value, time) in checkpoint["metrics"].items()
            if metric_name(name) not in there
        ]
        for some in _batched(metrics, METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=some)
        outputs = self._client.get_run(self.run_id).outputs
        if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])

    def _find_model(self, digest: str, step: int) -> tuple[str | None, set[str]]:
        """Returns the id and the names of the metrics of this checkpoint's LoggedModel, or None and no names."""
        found = self._client.search_logged_models(
            [self.experiment_id],
            f"source_run_id = '{self.run_id}' AND tags.digest = '{digest}' AND tags.step = '{step}'",
        )
        for model in found:
            if str(model.status) == "READY":
                return model.model_id, {metric.key for metric in model.metrics or ()}
            self._client.delete_logged_model(model.model_id)  # a creation that was cut off half way
        return None, set()

    def _create_model(self, checkpoint: dict[str, Any], step: int) -> str:
        """Creates a LoggedModel as mlflow.create_external_model does, and returns its id.

        That function itself needs pandas for a signature, and a global tracking URI.
        """
        from mlflow.models import Model

        model = self._client.create_logged_model(
            self.experiment_id,
            name=re.sub(r"[^A-Za-z0-9_-]", "-", f"{self._folder.name}-step-{step}"),
            source_run_id=self.run_id,
            tags={
                "digest": checkpoint["digest"],
                "step": str(step),
                "uri": checkpoint["uri"],
                MLFLOW_MODEL_IS_EXTERNAL: "true",
                DESCRIPTION: f"The checkpoint of step {step:,}, whose weights stay in {code(checkpoint['uri'])}.",
            },
        )
        with tempfile.TemporaryDirectory() as folder:  # the registry wants a description among the model's artifacts
            Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                model_id=model.model_id,
                run_id=self.run_id,
                metadata={MLFLOW_MODEL_IS_EXTERNAL: True, "uri": checkpoint["uri"], "digest": checkpoint["digest"]},
            ).save(os.path.join(folder, "MLmodel"))
            self._client.log_model_artifacts(model.model_id, folder)
        return self._client.finalize_logged_model(model.model_id, "READY").model_id


def metric_name(name: str) -> str:
    """Returns what a metric of metrics.jsonl is called in MLflow."""
    return name if "/" in name else f"{TRAIN}{name}"


def kind_of(record: Record) -> str:
    """Returns the kind of a record. Neighbouring records of the kind `points` may be sent together."""
    if record.keys() & {"metrics", "system"}:
        return "points"
    return next(kind for kind in OTHER_KINDS if kind in record)


def _artifact_location(uri: str) -> str | None:
    """Returns the URI of the artifact folder beside a SQLite file, where MLflow would take the working directory.

    Returns None for a server, which decides by itself.
    """
    store = store_file(uri)
    return None if store is None else (store.absolute().parent / "mlartifacts").as_uri()


def quiet_environment() -> None:
    """Sets, unless they are set, the variables that keep MLflow from calling home, from warning and from blocking."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def _batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
