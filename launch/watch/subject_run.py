"""A run of subjects as the page shows it: a card, a gallery that tells at a glance what became of each, a page each."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from controlbooth.data.arguments import quoted
from controlbooth.data.errors import UserError
from controlbooth.data.files.records import (
    Damaged,
    is_figure,
    is_number,
    is_text,
    is_whole,
    maybe,
    parse_json,
    parse_json_list,
)
from controlbooth.data.secrets import shown
from controlbooth.launch.progress import SUBJECTS, duration, number
from controlbooth.launch.watch import facts
from controlbooth.launch.watch.charts import job_charts, subject_charts
from controlbooth.launch.watch.failures import Failure, rank_failures, sentences
from controlbooth.launch.watch.metrics import Metrics
from controlbooth.launch.watch.run_folder import READING_SECONDS, RunFolder
from controlbooth.trainer.dreambooth.measuring.overfitting import (
    LEARNT_SHARE,
    LEAST_WAY,
    PROMPT_KEPT,
    Course,
    course,
    describe,
)

CATEGORIES = {
    "failed": "failed",
    "overfits": "overfits",
    "learnt": "learnt",
    "not-learnt": "not learnt",
    "untold": "not told",
    "training": "in training",
    "waiting": "waiting",
}
"""What became of a subject: class of its badge, and word. In the order of the gallery."""
RULE = (
    f"Learnt: drawn pictures have come {LEARNT_SHARE:.0%} of the way from what the base draws at step 0 to what the "
    f"subject's own pictures have in common (where that way is at least {LEAST_WAY:g}), and stay there. Overfits: from "
    "some step on drawn pictures are nearer to one of the subject's own than these are to each other, and, where CLIP "
    f"measures prompts, follow them less than {PROMPT_KEPT:.0%} as well as at step 0. Not learnt: measured, and "
    "neither. Not told: nothing has compared its pictures; validation.encoders of the run does."
)
WITHOUT_REMEDY = "Look at its pictures and its row of the manifest; started again, the run trains it anew"
VALIDATION_FILE, BEST = "validation.json", "best.json"
SUBJECTS_OF_JOB = "job/subjects.jsonl"
ROOM_FOR_THUMBNAILS = 6
"""Of subjects, on the run's card."""
_MEASURED = ("fidelity", "nearest", "real", "real_nearest")


class Subject(RunFolder):
    """One subject of a run."""

    def facts(self, row: dict[str, Any]) -> dict[str, Any]:
        """Gathers what the gallery shows. row: of subjects.json."""
        status = facts.status_of(self.files)
        state, step = status.get("state"), status.get("step") or 0
        if state not in ("finished", "failed"):
            self.glance.update(READING_SECONDS)
            step = max([step, *(record["step"] for record in [*self.glance.recent][-1:])])
        validations = self.files.read(VALIDATION_FILE, _validations, [])
        told = course(validations)
        of = row.get("steps") or 0
        return {
            "name": self.name,
            "category": category(state, told, validations),
            "state": state or "waiting",
            "step": step,
            "of": of,
            "done": min(1.0, step / of) if of else float(state == "finished"),
            "told": describe(told) if told_by_figures(validations) else "",
            "best": told.best,
            "figures": self._figures(validations),
            "failure": _failure(status),
            "picture": pictures[-1]["name"] if (pictures := self.pictures()) else None,
            "problems": self.files.problems,
        }

    def pictures(self) -> list[dict[str, Any]]:
        """Lists the pictures of the validations, by step; names are relative to the subject's folder."""
        pattern = re.compile(re.escape(self.name) + r"-step-(\d+)\.png")
        found = [(match, name) for name in self.files.names("samples") if (match := pattern.fullmatch(name))]
        return [
            {"step": step, "name": f"samples/{name}"}
            for step, name in sorted((int(one[1]), name) for one, name in found)
        ]

    def _figures(self, validations: list[dict[str, float]]) -> dict[str, Any] | None:
        """Returns how near drawn pictures are to the subject, as a share of the way to its own pictures."""
        if not told_by_figures(validations):
            return None
        first, last = validations[0], validations[-1]
        way = last["real"] - first["fidelity"]
        return {
            "step": int(last["step"]),
            "fidelity": f"{last['fidelity']:.3f}",
            "base": f"{first['fidelity']:.3f}",
            "real": f"{last['real']:.3f}",
            "nearest": f"{last['nearest']:.3f}",
            "real_nearest": f"{last['real_nearest']:.3f}",
            "prompt": f"{last['prompt']:.3f}" if "prompt" in last else "",
            "share": (last["fidelity"] - first["fidelity"]) / way if way >= LEAST_WAY else None,
        }

    def page(self, row: dict[str, Any]) -> dict[str, Any]:
        """Gathers what the subject's own page shows."""
        metrics = self.read_whole()
        best = self.files.read(BEST, _best, {})
        return self.facts(row) | {
            "charts": subject_charts(metrics.curves),
            "read": metrics.share_read,
            "steps": self.pictures(),
            "measured": "samples.png" if self.files.stamp("samples.png") else None,
            "attempts": facts.attempts(metrics),
            "best_step": best.get("step"),
            "prompt": row.get("instance_prompt") or "",
        }


class SubjectRun(RunFolder):
    """The folder of a run of subjects."""

    kind = "subjects"

    def __init__(self, folder: Path, name: str):
        super().__init__(folder, name)
        self._subjects: dict[str, Subject] = {}

    def rows(self) -> dict[str, dict[str, Any]]:
        """Returns what is known of each subject before it is trained, by name."""
        listed = self.files.read("subjects.json", _rows, None)
        if listed is None:
            listed = self.files.read(SUBJECTS_OF_JOB, _job_rows, [])
        rows = {row["name"]: row for row in listed}
        return rows | {name: {"name": name} for name in self.files.names("subjects") if name not in rows}

    def subject(self, name: str) -> Subject:
        """Returns a subject by name; it may not be there."""
        if name not in self._subjects:
            self._subjects[name] = Subject(self.folder / "subjects" / name, name)
        return self._subjects[name]

    def subjects(self) -> list[dict[str, Any]]:
        """Gathers what the gallery shows of all subjects."""
        rows = {name: row for name, row in self.rows().items() if _is_folder_name(name)}
        return [self.subject(name).facts(row) for name, row in rows.items()]

    def card(self, now: float) -> dict[str, Any]:
        """Gathers what the overview shows. now: seconds since 1970."""
        self.glance.update(READING_SECONDS)
        subjects = self.subjects()
        pictured = [one for one in subjects if one["picture"]]
        return self._summary(subjects, self.glance, now) | {
            "spark": "",
            "pictures": [f"subjects/{one['name']}/{one['picture']}" for one in pictured[:ROOM_FOR_THUMBNAILS]],
        }

    def _summary(self, subjects: list[dict[str, Any]], metrics: Metrics, now: float) -> dict[str, Any]:
        tree, counts = facts.configuration(self.files), Counter(one["category"] for one in subjects)
        parts = [name for name in self.files.names("rows") if re.fullmatch(r"\d+-\d+", name)]
        failures = rank_failures(self.files) + [
            one for part in parts for one in rank_failures(self.files, f"rows/{part}")
        ]
        news = facts.news_of(self.files, "subjects", *(f"rows/{part}/metrics.jsonl" for part in parts))
        state = self._state(subjects, metrics, failures, news, now)
        trained = [one for one in subjects if one["state"] != "failed"]
        step, of = (sum(one[what] for one in trained) for what in ("step", "of"))
        left = sum(one["of"] - one["step"] for one in trained if one["state"] != "finished")
        rate = steps_of_subjects(metrics)
        base = Path(str(facts.field(tree, "model.base", str, ""))).name
        failed = [one for one in subjects if one["category"] == "failed"]
        return {
            "name": self.name,
            "kind": self.kind,
            "what": f"{len(subjects)} subjects on {base}" if base else f"{len(subjects)} subjects",
            "state": state.word,
            "more": state.more,
            "step": step,
            "of": of,
            "done": min(1.0, step / of) if of else 0.0,
            "rate": f"{number(rate)} subject steps/s" if rate and state.word == "running" else "",
            "left": duration(left / rate) if rate and left > 0 and state.word == "running" else "",
            "loss": "",
            "figure": None,
            "counts": [(key, word, counts[key]) for key, word in CATEGORIES.items() if counts[key]],
            "news": news,
            "failure": self._failure(state, failures, failed),
            "bad": 0,
            "problems": [
                *self.files.problems,
                *([metrics.problem] if metrics.problem else []),
                *(problem for one in subjects for problem in one["problems"]),
            ],
        }

    def page(self, now: float) -> dict[str, Any]:
        """Gathers what the run's own page shows."""
        metrics, subjects = self.read_whole(), self.subjects()
        order = list(CATEGORIES)
        folder = quoted(self.folder)
        return self._summary(subjects, metrics, now) | {
            "read": metrics.share_read,
            "subjects": sorted(subjects, key=lambda one: (order.index(one["category"]), one["name"])),
            "rule": RULE,
            "charts": job_charts(metrics.curves),
            "failures": rank_failures(self.files),
            "attempts": facts.attempts(metrics),
            "attempt": facts.attempt_of(self.files),
            "measures": self.files.read("measures.json", _measures, {}),
            "system": {name: number(value) for name, value in metrics.system.items()},
            "configuration": facts.configuration_text(self.files),
            "commands": {
                "go on": self.going_on(
                    f"controlbooth dreambooth run SUBJECTS.yaml {quoted(self.folder / 'config.yaml')}"
                ),
                "state, in a terminal": f"controlbooth launch status {folder}",
                "measure as the paper does": f"controlbooth dreambooth measure {folder}",
                "write LoRAs for other programs": f"controlbooth dreambooth export --all {folder}",
            },
        }

    def _state(
        self,
        subjects: list[dict[str, Any]],
        metrics: Metrics,
        failures: list[Failure],
        news: float | None,
        now: float,
    ) -> facts.State:
        """Tells what the run is doing: a run of subjects has no status of its own beside those of its subjects."""
        attempt = facts.attempt_of(self.files)
        began = attempt.get("time") or 0.0
        if subjects and all(one["state"] in ("finished", "failed") for one in subjects):
            return facts.State("failed" if all(one["state"] == "failed" for one in subjects) else "finished")
        if any((one.when or 0.0) >= began for one in failures):
            return facts.State("failed")
        last = metrics.statuses[-1] if metrics.statuses else (0.0, "")
        if last[0] >= began and last[1] in ("KILLED", "FAILED"):
            return facts.State(facts.ENDS[last[1]])
        if news is None or not (attempt or metrics.offset or self.files.names("rows")):
            return facts.State("waiting", "submitted, and not begun" if facts.job_of(self.files) else "not begun")
        if facts.is_fresh(facts.configuration(self.files), news, now):
            return facts.State("running" if metrics.recent else "starting")
        return facts.silent(attempt, news, now)

    def _failure(
        self, state: facts.State, failures: list[Failure], failed: list[dict[str, Any]]
    ) -> dict[str, str] | None:
        if (told := self.told_failure(state, failures)) is not None:
            return told
        if failed:
            others = f" ({len(failed) - 1} more have failed)" if len(failed) > 1 else ""
            return {"what": f"{failed[0]['name']}: {failed[0]['failure']['what']}{others}", **_remedy(failed[0])}
        return None


def category(state: str | None, told: Course, validations: list[dict[str, float]]) -> str:
    """Chooses the key of CATEGORIES for a subject. state: of its status.json."""
    if state == "failed":
        return "failed"
    if told.overfits is not None:
        return "overfits"
    if told.learnt is not None:
        return "learnt"
    if state == "finished":
        return "not-learnt" if told_by_figures(validations) else "untold"
    return "training" if state in ("training", "stopped") else "waiting"


def told_by_figures(validations: list[dict[str, float]]) -> bool:
    """Tells whether validations have compared pictures, from step 0 on."""
    return bool(validations) and validations[0]["step"] == 0 and "real" in validations[0]


def steps_of_subjects(metrics: Metrics) -> float:
    """Computes the steps of single subjects that a process takes in a second, over its last steps."""
    records = [*metrics.recent]
    seconds = records[-1]["time"] - records[0]["time"] if records else 0.0
    if seconds <= 0:
        return 0.0
    together = [
        float(value)
        for record in records[1:]
        for name, value in record["metrics"].items()
        if name.endswith("/subjects_in_training")
    ]
    return sum(together) / seconds


def _remedy(one: dict[str, Any]) -> dict[str, str]:
    return {"remedy": one["failure"]["remedy"]}


def _failure(status: dict[str, Any]) -> dict[str, str] | None:
    if status.get("state") != "failed":
        return None
    what, remedy = sentences(str(status.get("error") or "it does not say why"), WITHOUT_REMEDY)
    return {"what": what, "remedy": remedy}


def _is_folder_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _validations(content: bytes, where: str) -> list[dict[str, float]]:
    remedy = "What was found up to then is not told again"
    found = parse_json_list(content, where, remedy, {"step": is_whole})
    if any(not is_figure(value) for one in found for value in one.values()):
        raise Damaged(where, "not all of its values are numbers", remedy)
    if found and "real" in found[0] and any(name not in one for one in found for name in _MEASURED):
        raise Damaged(where, f"not every validation has {', '.join(_MEASURED)}", remedy)
    if found and "prompt" in found[0] and any("prompt" not in one for one in found):
        raise Damaged(where, "not every validation has prompt", remedy)
    return found


def _best(content: bytes, where: str) -> dict[str, Any]:
    return parse_json(content, where, "The next validation writes it anew", {"step": is_whole})


def _rows(content: bytes, where: str) -> list[dict[str, Any]]:
    fields = {**SUBJECTS, "instance_prompt": maybe(is_text)}
    return parse_json_list(content, where, "Start the run again, which writes it anew", fields)


def _job_rows(content: bytes, where: str) -> list[dict[str, Any]]:
    rows = []
    for line in content.splitlines():
        try:
            rows.append(parse_json(line, where, "Submit the job again", SUBJECTS))
        except UserError:
            continue
    return rows


def _measures(content: bytes, where: str) -> dict[str, Any]:
    """Returns the means of measures.json, and what its encoders are."""
    numbers = lambda value: isinstance(value, dict) and all(map(is_number, value.values()))  # noqa: E731
    tree = parse_json(content, where, "Measure again", {"mean": numbers, "encoders": lambda one: isinstance(one, dict)})
    return {
        "mean": {name: f"{value:.3f}" for name, value in tree["mean"].items()},
        "encoders": {name: shown(str(text)) for name, text in tree["encoders"].items()},
    }
