"""plan.json: everything that a study will ask, frozen before the first answer, and who sees it in which order.

The order of the screens and of the pictures on a screen is arithmetic on the plan's secret and the rater's name: a
rater who comes back by the same link finds the same screens, and nothing about it is stored. The names of methods,
items and files stand in the plan alone: pages are given opaque names, hashes with the secret.
"""

import hashlib
import itertools
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from controlbooth.data.errors import Occupied, UserError
from controlbooth.data.files.records import (
    Damaged,
    each,
    having,
    is_count,
    is_mapping,
    is_number,
    is_text,
    maybe,
    read_json,
)
from controlbooth.data.files.whole import write_whole
from controlbooth.data.order.draws import hash64
from controlbooth.trainer.study.questions import PAIRS, QUESTIONS

PLAN, ASKED, PICTURES = "plan.json", "study.yaml", "pictures"
VERSION = 1
JUDGED, CHECK, REPEAT = "judged", "check", "repeat"
LEAST_PASSED = 0.75
"""Of the checks of a rater whose answers count."""
REMEDY = "A study with answers cannot be mended: copy its folder back, or make another by `controlbooth study new`"


@dataclass(frozen=True)
class Item:
    """What the pictures of one trial have in common."""

    name: str
    prompt: str
    given: Mapping[str, tuple[str, ...]]
    """Opaque names of pictures by CONDITION or REFERENCES."""


@dataclass(frozen=True)
class Trial:
    """One screen: pictures of one item, and one question about them."""

    id: str
    kind: str
    question: str
    item: str
    methods: tuple[str, ...]
    """Of the pictures; of a check none, whose first picture is the right answer."""
    pictures: tuple[str, ...]
    """Opaque names, in the order of the methods."""
    of: str = ""
    """Of a repeat: the trial that is shown again."""


@dataclass(frozen=True)
class Plan:
    """A study as it was frozen."""

    secret: str
    title: str
    form: str
    questions: tuple[str, ...]
    methods: tuple[str, ...]
    items: tuple[Item, ...]
    trials: tuple[Trial, ...]
    """Judged ones and checks; repeats follow from them (`again`)."""
    judged_each: int
    """Trials of each question that one rater judges, beside checks and repeats."""
    checks_each: int
    repeats_each: int
    least_passed: float = LEAST_PASSED
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By method: where its pictures came from."""
    version: int = VERSION

    @property
    def ties(self) -> bool:
        """Tells whether a rater may say that pictures are equal, as in DreamBooth's study; a ranking has no ties."""
        return self.form == PAIRS

    @cached_property
    def digest(self) -> str:
        """Gives the SHA-256 of all of it, by which answers are told to belong to it."""
        return hashlib.sha256(_canonical(self)).hexdigest()

    @cached_property
    def by_id(self) -> dict[str, Trial]:
        """Gives all trials that anybody may be shown, repeats included."""
        repeats = (again(self, trial) for trial in self.trials if trial.kind == JUDGED)
        return {trial.id: trial for trial in (*self.trials, *repeats)}

    @cached_property
    def item_of(self) -> dict[str, Item]:
        return {item.name: item for item in self.items}

    @cached_property
    def pictures(self) -> frozenset[str]:
        """Gives the opaque names of all pictures that pages may ask for."""
        shown = [name for trial in self.trials for name in trial.pictures]
        given = [name for item in self.items for names in item.given.values() for name in names]
        return frozenset([*shown, *given])


@dataclass(frozen=True)
class Shown:
    """A trial as one rater sees it."""

    trial: Trial
    pictures: tuple[str, ...]
    """Opaque names from left to right."""


def new_secret() -> str:
    return secrets.token_hex(16)


def opaque(secret: str, *parts: str) -> str:
    """Makes a name that says nothing to whoever does not know the secret: 16 hexadecimal digits."""
    content = json.dumps(parts).encode()
    return hashlib.blake2b(content, key=bytes.fromhex(secret), digest_size=8).hexdigest()


def judged_trials(
    secret: str, form: str, questions: Sequence[str], methods: Sequence[str], items: Iterable[str]
) -> list[Trial]:
    """Lists the trials that compare methods: every pair of them, or all at once, of each item under each question."""
    groups = list(itertools.combinations(methods, 2)) if form == PAIRS else [tuple(methods)]
    return [
        Trial(
            opaque(secret, JUDGED, question, item, *group),
            JUDGED,
            question,
            item,
            group,
            tuple(opaque(secret, "picture", method, item) for method in group),
        )
        for question in questions
        for item in items
        for group in groups
    ]


def again(plan: Plan, trial: Trial) -> Trial:
    """Returns the repeat of a judged trial."""
    return replace(trial, id=opaque(plan.secret, REPEAT, trial.id), kind=REPEAT, of=trial.id)


def screens_of(plan: Plan, rater: str) -> list[Shown]:
    """Lists what a rater is shown, in order: question by question; each with checks strewn in, and repeats late.

    Which of the trials, if not all, and in which order is decided by a hash of the rater's name. Each method stands at
    each place equally often, as nearly as the number of trials allows; a repeat has its pictures in reverse order.
    """

    def draw(*parts: str) -> int:
        return hash64(plan.secret, rater, *parts)

    screens: list[Shown] = []
    for question in sorted(plan.questions, key=lambda name: draw("question", name)):
        own = [trial for trial in plan.trials if trial.question == question]
        judged = sorted((one for one in own if one.kind == JUDGED), key=lambda one: draw("order", one.id))
        checks = sorted((one for one in own if one.kind == CHECK), key=lambda one: draw("order", one.id))
        judged, checks = judged[: plan.judged_each], checks[: plan.checks_each]
        first = {one.trial.id: one for one in _placed([*judged, *checks], draw)}
        count = len(judged)
        placed = [(float(place), first[trial.id]) for place, trial in enumerate(judged)]
        for place, trial in enumerate(checks):
            placed.append(((place + draw("check", trial.id) / 2**64) * count / len(checks), first[trial.id]))
        repeated = judged[: plan.repeats_each]
        for place, trial in enumerate(repeated):
            late = 0.5 + 0.5 * (place + draw(REPEAT, trial.id) / 2**64) / len(repeated)
            shown = Shown(again(plan, trial), first[trial.id].pictures[::-1])
            placed.append((late * count, shown))
        screens += [shown for _, shown in sorted(placed, key=lambda one: one[0])]
    return screens


def _placed(trials: Sequence[Trial], draw: Any) -> list[Shown]:
    """Puts the pictures of trials from left to right: an order by hash for each group of methods, turned by one place
    from each of its trials to the next."""
    groups: dict[tuple[str, ...], list[Trial]] = {}
    for trial in sorted(trials, key=lambda one: draw("side", one.id)):
        groups.setdefault((trial.kind, *trial.methods), []).append(trial)
    shown = []
    for name, group in groups.items():
        size = len(group[0].pictures)
        order = sorted(range(size), key=lambda place: draw("first", *name, str(place)))
        for turn, trial in enumerate(group):
            places = [order[(place + turn) % size] for place in range(size)]
            shown.append(Shown(trial, tuple(trial.pictures[place] for place in places)))
    return shown


def screens_each(plan: Plan) -> int:
    """Counts the screens of one rater."""
    return len(plan.questions) * (plan.judged_each + plan.checks_each + plan.repeats_each)


def write_plan(folder: Path, plan: Plan) -> None:
    """Writes plan.json. Raises Occupied where there is one: answers belong to the plan that was asked."""
    if (folder / PLAN).exists():
        raise Occupied(f"{folder} holds a study already, whose plan is frozen: give another folder")
    tree = asdict(plan) | {"digest": plan.digest}
    write_whole(folder / PLAN, json.dumps(tree, indent=1).encode())


def read_plan(folder: Path) -> Plan:
    """Reads plan.json. Raises UserError where there is none, and Damaged where it is not as it was frozen."""
    path = folder / PLAN
    tree = read_json(path, REMEDY, _FIELDS, missing=None)
    if tree is None:
        raise UserError(f"{folder} holds no study: make one by `controlbooth study new {folder}`")
    digest = tree.pop("digest")
    if tree["version"] != VERSION:
        raise UserError(f"{path} is of version {tree['version']}, and this program reads {VERSION}")
    known: dict[str, Any] = {name: tree.get(name) for name in Plan.__dataclass_fields__}
    known["items"] = tuple(
        Item(one["name"], one["prompt"], {kind: tuple(names) for kind, names in one["given"].items()})
        for one in tree["items"]
    )
    known["trials"] = tuple(map(_trial, tree["trials"]))
    for name in ("questions", "methods"):
        known[name] = tuple(tree[name])
    plan = Plan(**known)
    if plan.digest != digest:
        raise Damaged(path, "it is not what was frozen", REMEDY)
    return plan


def _trial(tree: dict[str, Any]) -> Trial:
    known = dict(tree)
    for name in ("methods", "pictures"):
        known[name] = tuple(tree[name])
    return Trial(**known)


def _canonical(plan: Plan) -> bytes:
    return json.dumps(asdict(plan), sort_keys=True, separators=(",", ":")).encode()


_TRIAL = {name: is_text for name in ("id", "kind", "question", "item", "of")} | {
    name: each(is_text) for name in ("methods", "pictures")
}
_GIVEN = having({"condition": maybe(each(is_text)), "references": maybe(each(is_text))})
_FIELDS = {
    **{name: is_text for name in ("secret", "title", "form", "digest")},
    "questions": lambda value: isinstance(value, list) and all(one in QUESTIONS for one in value),
    "methods": each(is_text),
    "items": each(having({"name": is_text, "prompt": is_text, "given": _GIVEN})),
    "trials": each(lambda value: having(_TRIAL)(value) and {*value} == {*_TRIAL}),
    "judged_each": is_count,
    "checks_each": lambda value: is_count(value) or value == 0,
    "repeats_each": lambda value: is_count(value) or value == 0,
    "least_passed": is_number,
    "sources": is_mapping,
    "version": is_count,
}
