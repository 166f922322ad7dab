"""A ControlNet run as the page shows it: a card of the overview, and a page of its own."""

import math
import re
from pathlib import Path
from statistics import median
from typing import Any

from controlbooth.data.arguments import quoted
from controlbooth.data.errors import UserError
from controlbooth.data.files.records import is_text, parse_json, parse_json_list
from controlbooth.data.inspection.ledger import parse_entry
from controlbooth.data.secrets import shown
from controlbooth.launch.progress import duration, number
from controlbooth.launch.watch import facts
from controlbooth.launch.watch.charts import control_charts, ordered, spark, step_charts
from controlbooth.launch.watch.failures import Failure, rank_failures, sentences
from controlbooth.launch.watch.files import SETTLED_SECONDS, Stamp
from controlbooth.launch.watch.metrics import Metrics
from controlbooth.launch.watch.run_folder import READING_SECONDS, RunFolder
from controlbooth.trainer.evaluation.verdict import (
    CONTROL,
    VALIDATION,
    VERDICT,
    Verdict,
    describe,
    from_tree,
    measured_by,
    title,
)

STRIPS = "samples/strips"
CAPTIONS = "captions.json"
STEP_PICTURE = re.compile(r"step-(\d+)\.png")
CHECKPOINT = re.compile(r"step-(\d{8,})")
LEDGER = re.compile(r"bad-samples-\d+\.jsonl")
LEDGER_BYTES = 2**18
"""Of each ledger, from its end, that is read."""
SHOWN_BAD = 30
CAPTION_LENGTH = 200
LAST = ("loss", "grad_norm", "learning_rate", "samples_per_second", "stall_percent", "peak_memory_gib")
OF_CARD = (
    *("", "metrics.jsonl", "status.json", "attempt.json", "config.yaml", CONTROL, "samples", STRIPS, "job/job.json"),
    f"{STRIPS}/{CAPTIONS}",
)
"""Files and folders of which the card of a run that is over is made; the run's own folder tells of failures and bad
samples."""


class ControlRun(RunFolder):
    """The folder of a ControlNet run."""

    kind = "ControlNet"

    def __init__(self, folder: Path, name: str):
        super().__init__(folder, name)
        self._card: tuple[list[Stamp | None], dict[str, Any]] | None = None

    def card(self, now: float) -> dict[str, Any]:
        """Gathers what the overview shows. now: seconds since 1970.

        That of a run that is over is the same dict until one of its files changes.
        """
        stamps = [self.files.stamp(name) for name in OF_CARD]
        if self._card is not None and self._card[0] == stamps:
            return self._card[1]
        card = self._made_card(now)
        settled = all(stamp is None or now - stamp.changed / 1e9 > SETTLED_SECONDS for stamp in stamps)
        self._card = (stamps, card) if settled and card["state"] in facts.OVER else None
        return card

    def _made_card(self, now: float) -> dict[str, Any]:
        self.glance.update(READING_SECONDS)
        return self._summary(self.glance, now) | {
            "spark": spark(self.glance.curves.get("loss")),
            "pictures": [picture] if (picture := self._newest_strip()) else [],
        }

    def _summary(self, metrics: Metrics, now: float) -> dict[str, Any]:
        files, tree = self.files, facts.configuration(self.files)
        failures, news = rank_failures(files), facts.news_of(files, CONTROL)
        state = facts.state_of(files, news, failures, now)
        status = facts.status_of(files)
        taken = [record for record in metrics.recent if "loss" in record["metrics"]]
        step = max([status.get("step") or 0, *(record["step"] for record in taken[-1:])])
        most = facts.field(tree, "max_steps", int, 0)
        rates = [float(one["metrics"].get("samples_per_second", math.nan)) for one in taken]
        rates = [rate for rate in rates if math.isfinite(rate)]
        speed = facts.steps_a_second(taken)
        going = state.word == "running"
        base = Path(str(facts.field(tree, "model.base", str, ""))).name
        return {
            "name": self.name,
            "kind": self.kind,
            "what": f"{facts.field(tree, 'data.condition', str, '')} on {base}" if base else "",
            "state": state.word,
            "more": state.more,
            "step": step,
            "of": most,
            "done": min(1.0, step / most) if most else 0.0,
            "rate": f"{number(median(rates))} samples/s" if rates else "",
            "left": duration((most - step) / speed) if going and speed > 0 and most > step else "",
            "loss": number(metrics.curves["loss"].last) if "loss" in metrics.curves else "",
            "figure": self._figure(metrics),
            "news": news,
            "failure": self._failure(state, failures),
            "bad": len(self.bad_samples()[0]),
            "problems": [*files.problems, *([metrics.problem] if metrics.problem else [])],
        }

    def page(self, now: float) -> dict[str, Any]:
        """Gathers what the run's own page shows."""
        metrics, files = self.read_whole(), self.files
        verdict, (bad, bad_more) = self.verdict(), self.bad_samples()
        failures, attempt, tree = rank_failures(files), facts.attempt_of(files), facts.configuration(files)
        summary = self._summary(metrics, now)
        last = next((one["metrics"] for one in reversed(metrics.recent) if "loss" in one["metrics"]), {})
        return summary | {
            "read": metrics.share_read,
            "last": {name: number(last[name]) for name in LAST if name in last},
            "system": {name: number(value) for name, value in metrics.system.items()},
            "verdict": self._told(verdict),
            "figures": self._figures(metrics),
            "charts": [
                *control_charts(metrics.curves, verdict, self._named(metrics)),
                *step_charts(metrics.curves),
            ],
            "player": self._player(verdict),
            "grid": self._newest("samples"),
            "prompts": self._newest("samples/prompts"),
            "evaluation": "evaluation/evaluation.png" if files.stamp("evaluation/evaluation.png") else None,
            "report": files.stamp("report.html") is not None,
            "failures": failures,
            "attempts": facts.attempts(metrics),
            "attempt": attempt,
            "bad_samples": [self._bad(entry) for entry in bad[::-1][:SHOWN_BAD]],
            "bad_more": bad_more,
            "checkpoints": self._checkpoints(),
            "configuration": facts.configuration_text(files),
            "commands": self._commands(tree),
            "unreadable": metrics.unreadable,
        }

    def verdict(self) -> Verdict | None:
        """Reads the verdict on the run's control."""
        return self.files.read(CONTROL, _verdict)

    def bad_samples(self) -> tuple[list[dict[str, Any]], bool]:
        """Reads what the run notes of bad samples, each event once, and whether there is more than was read."""
        entries: dict[tuple[int, int], dict[str, Any]] = {}
        more = False
        for name in self.files.names():
            if LEDGER.fullmatch(name):
                stamp = self.files.stamp(name)
                more |= stamp is not None and stamp.size > LEDGER_BYTES
                entries |= self.files.tail(name, LEDGER_BYTES, _entries, {})
        return [entries[event] for event in sorted(entries)], more

    def _bad(self, entry: dict[str, Any]) -> dict[str, str]:
        return {
            "place": f"{Path(entry['shard']).name}, byte {entry['byte']:,}",
            "key": entry["key"],
            "error": shown(f"{entry['part']}: {entry['error']}"),
        }

    def _named(self, metrics: Metrics) -> str | None:
        """Returns the figure by which control is told, without `validation/`."""
        verdict = self.verdict()
        figure = (verdict and verdict.figure) or measured_by(metrics.validated[1] if metrics.validated else ())
        return figure.removeprefix(VALIDATION) if figure else None

    def _figure(self, metrics: Metrics) -> dict[str, Any] | None:
        """Returns the newest figure of control beside its chance and the real pictures; None where nothing tells it."""
        return next(iter(self._figures(metrics)), None) or self._figure_of_verdict()

    def _figures(self, metrics: Metrics) -> list[dict[str, Any]]:
        """Lists the newest figures of control, that by which it is told first, each beside chance and the real
        pictures."""
        if metrics.validated is None:
            return []
        step, own = metrics.validated
        found = []
        for name in ordered(own, self._named(metrics)):
            values = {suffix: own.get(f"{VALIDATION}{name}{suffix}") for suffix in ("", "_chance", "_real")}
            share = {end: own.get(f"{VALIDATION}{name}_share{end}") for end in ("", "_low", "_high")}
            found.append(self._shown_figure(name, step, values, share))
        return found

    def _figure_of_verdict(self) -> dict[str, Any] | None:
        verdict = self.verdict()
        if verdict is None or verdict.last is None or verdict.figure is None:
            return None
        last = verdict.last
        share = {"": last.share, "_low": last.low, "_high": last.high}
        return self._shown_figure(verdict.figure, last.step, {"": last.value}, share)

    def _shown_figure(self, name: str, step: int, values: dict[str, Any], share: dict[str, Any]) -> dict[str, Any]:
        verdict = self.verdict()
        is_judged = bool(verdict and verdict.figure == name)
        bound = verdict.last.bound if verdict and verdict.last and is_judged else None
        finite = {end: value for end, value in share.items() if value is not None and math.isfinite(value)}
        return {
            "title": title(name),
            "step": step,
            "value": _figure_text(values.get("")),
            "chance": _figure_text(values.get("_chance")),
            "real": _figure_text(values.get("_real")),
            "share": finite.get(""),
            "low": finite.get("_low", finite.get("")),
            "high": finite.get("_high", finite.get("")),
            "bound": bound if bound is not None and math.isfinite(bound) else None,
            "obeys": bool(is_judged and verdict and verdict.announced),
            "since": verdict.announced.step if is_judged and verdict and verdict.announced else None,
        }

    def _told(self, verdict: Verdict | None) -> dict[str, str] | None:
        """Returns class, headline and sentence of the verdict's box; None where nothing was validated."""
        if verdict is None:
            return None
        told = describe(verdict)
        if verdict.announced:
            kind, headline = "obeys", f"It obeys since step {verdict.announced.step:,}"
        elif verdict.events:
            kind, headline = "withdrawn", "It obeyed, and does no longer"
        else:
            kind, headline = "unknown", "Not known yet whether it obeys"
        return {"kind": kind, "headline": headline, "told": f"{told[:1].upper()}{told[1:]}."}

    def _failure(self, state: facts.State, failures: list[Failure]) -> dict[str, str] | None:
        if (told := self.told_failure(state, failures)) is not None:
            return told
        if state.word != "failed":
            return None
        what, remedy = sentences(str(facts.status_of(self.files).get("error") or "it has failed and does not say why"))
        return {"what": what, "remedy": remedy}

    def _player(self, verdict: Verdict | None) -> dict[str, Any] | None:
        """Returns the strips of the validations: rows of pictures, one of which changes with the step."""
        captions = self.files.read(f"{STRIPS}/{CAPTIONS}", _captions)
        steps = self._steps(STRIPS)
        if not captions or not steps:
            return None
        announced = verdict.announced.step if verdict and verdict.announced else None
        return {
            "captions": captions,
            "steps": [{"step": step, "name": f"{STRIPS}/{name}"} for step, name in steps],
            "above": f"{STRIPS}/conditions.png",
            "below": f"{STRIPS}/targets.png",
            "announced": announced,
        }

    def _steps(self, folder: str) -> list[tuple[int, str]]:
        found = [(match, name) for name in self.files.names(folder) if (match := STEP_PICTURE.fullmatch(name))]
        return sorted((int(match[1]), name) for match, name in found)

    def _newest(self, folder: str) -> dict[str, Any] | None:
        steps = self._steps(folder)
        return {"step": steps[-1][0], "name": f"{folder}/{steps[-1][1]}"} if steps else None

    def _newest_strip(self) -> str | None:
        newest = self._newest(STRIPS) or self._newest("samples")
        return newest["name"] if newest else None

    def _checkpoints(self) -> list[str]:
        names = [name for name in self.files.names("checkpoints") if CHECKPOINT.fullmatch(name)]
        return [name for name in names if self.files.stamp(f"checkpoints/{name}/COMPLETE")][::-1]

    def _commands(self, tree: dict[str, Any]) -> dict[str, str]:
        """Returns commands about the run, by what they do, as a shell takes them."""
        folder = quoted(self.folder)
        commands = {
            "go on": self.going_on(f"controlbooth train {quoted(self.folder / 'config.yaml')}"),
            "state, in a terminal": f"controlbooth launch status {folder}",
            "measure on more samples": f"controlbooth evaluate {folder}",
            "one page to keep": f"controlbooth report {folder}",
        }
        if self.bad_samples()[0]:
            commands["leave the bad samples out of the next run"] = f"controlbooth data quarantine {folder}"
        return commands


def _figure_text(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and math.isfinite(value) else ""


def _verdict(content: bytes, where: str) -> Verdict:
    return from_tree(parse_json(content, where, "A training that goes on writes it again", VERDICT))


def _captions(content: bytes, where: str) -> list[str]:
    found = parse_json_list(content, where, "The next validation writes it anew", is_text)
    return [caption[:CAPTION_LENGTH] for caption in found]


def _entries(content: bytes, where: str) -> dict[tuple[int, int], dict[str, Any]]:
    entries: dict[tuple[int, int], dict[str, Any]] = {}
    for line in content.decode(errors="replace").splitlines():
        try:
            entry = parse_entry(line, where)
        except UserError:  # `data quarantine` says what is wrong with it
            continue
        if entry is not None:
            entries.setdefault((entry["position"], entry["attempt"]), entry)
    return entries
