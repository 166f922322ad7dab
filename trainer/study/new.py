"""`controlbooth study new`: brings the pictures together and freezes what will be asked.

OUT/study.yaml      what was asked for on the command line
    plan.json       every screen, frozen; names of methods stand here and in study.yaml alone
    pictures/       what raters see, by names that say nothing
    drawn/          what was drawn of runs; found again, it is not drawn again
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from controlbooth.data.arguments import quoted
from controlbooth.data.errors import Occupied, UserError
from controlbooth.data.files.whole import write_whole
from controlbooth.data.order.draws import hash64
from controlbooth.trainer.study.checks import Check, check_pictures, choose_checks
from controlbooth.trainer.study.pictures import fit_condition, fit_reference, read_level, read_picture, write_picture
from controlbooth.trainer.study.plan import (
    ASKED,
    CHECK,
    PICTURES,
    PLAN,
    Item,
    Plan,
    Trial,
    judged_trials,
    new_secret,
    opaque,
    screens_each,
    write_plan,
)
from controlbooth.trainer.study.questions import (
    CONDITION,
    PAIRS,
    PROMPT,
    QUESTIONS,
    RANKINGS,
    REFERENCES,
    usual_questions,
)
from controlbooth.trainer.study.sources import (
    FOLDER,
    RUN,
    SUBJECTS,
    Beside,
    Gathered,
    Source,
    gather,
    parse_methods,
    pictures_below,
    pictures_of_subjects,
    read_prompts,
    read_references,
)

PAIR_SECONDS, PICTURE_SECONDS = 6.0, 5.0
"""That a person takes for a pair, and for each picture of a ranking: what the estimate of minutes assumes."""
MOST_RANKED = 8
TITLE = "Comparing pictures"


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth study new` is asked, and returns its exit status."""
    sources = parse_methods(options.methods)
    if (options.out / PLAN).exists():
        raise Occupied(f"{options.out} holds a study already, whose plan is frozen: give another folder")
    form = options.form or (PAIRS if len(sources) == 2 else RANKINGS)
    if form == RANKINGS and len(sources) > MOST_RANKED:
        raise UserError(f"{len(sources)} pictures are too many to rank at once, {MOST_RANKED} at most: --form pairs")
    if options.dry_run:
        names, given, left = _look(sources, options)
        plan = _outline(options, sources, form, names, given)
        print(describe(plan, left))
        return 0
    items, left, steps = _gather(sources, options)
    sources = [replace(one, step=steps.get(one.name)) for one in sources]
    given = {kind for kind in (CONDITION, REFERENCES, PROMPT) if all(_has(one, kind) for one in items.values())}
    plan = _outline(options, sources, form, list(items), given)
    plan = _write_pictures(options.out, plan, items)
    write_whole(options.out / ASKED, yaml.safe_dump(_asked(options), sort_keys=False).encode())
    write_plan(options.out, plan)
    print(describe(plan, left))
    print(f"{options.out}: frozen. `controlbooth study serve {quoted(options.out)}` asks for answers")
    return 0


def _has(item: Gathered, kind: str) -> bool:
    return bool({CONDITION: item.condition, REFERENCES: item.references, PROMPT: item.prompt}[kind])


def _gather(
    sources: Sequence[Source], options: argparse.Namespace
) -> tuple[dict[str, Gathered], int, dict[str, int | None]]:
    """Gathers the files of all items, and draws what runs have not drawn.

    -> (items, how many names some method lacks, the steps of the runs' checkpoints by method).
    """
    pictures, beside = _found(sources)
    steps: dict[str, int | None] = {}
    runs = [one for one in sources if one.kind == RUN]
    if runs:
        from controlbooth.trainer.study import drawing  # needs torch

        targets = drawing.targets_of(runs, options)
        dataset = drawing.open_data(targets)
        count = drawing.count_items(targets, dataset, options.items)
        drawn, beside = drawing.draw_runs(targets, dataset, count, options.out)
        pictures = {one.name: drawn.get(one.name) or pictures[one.name] for one in sources}
        steps = {name: target.step for name, target in targets.items()}
    items, left = gather(pictures, _given_beside(options, beside))
    return {name: items[name] for name in chosen_items(items, options.items)}, left, steps


def _look(sources: Sequence[Source], options: argparse.Namespace) -> tuple[list[str], set[str], int]:
    """Finds, without drawing, (names of items, what all of them have, names that some method lacks)."""
    pictures, beside = _found(sources)
    runs = [one for one in sources if one.kind == RUN]
    if runs:
        from controlbooth.trainer.study import drawing

        targets = drawing.targets_of(runs, options)
        count = drawing.count_items(targets, drawing.open_data(targets), options.items)
        rows = {f"{row:06d}": runs[0].where for row in range(count)}
        pictures = {one.name: pictures.get(one.name, rows) for one in sources}
        beside = Beside(dict.fromkeys(rows, "its caption"), rows, rows)
    items, left = gather(pictures, _given_beside(options, beside))
    items = {name: items[name] for name in chosen_items(items, options.items)}
    return [*items], {k for k in (CONDITION, REFERENCES, PROMPT) if all(_has(one, k) for one in items.values())}, left


def _found(sources: Sequence[Source]) -> tuple[dict[str, dict[str, Path]], Beside]:
    """Finds the pictures that are there: those of folders and of subjects."""
    pictures: dict[str, dict[str, Path]] = {}
    beside = Beside()
    for one in sources:
        if one.kind == FOLDER:
            pictures[one.name] = pictures_below(one.where)
        if one.kind == SUBJECTS:
            pictures[one.name], beside = pictures_of_subjects(one.where)
    return pictures, beside


def _given_beside(options: argparse.Namespace, beside: Beside) -> Beside:
    """Puts what the command line names in the place of what was found."""
    return replace(
        beside,
        **({"prompts": read_prompts(options.prompts)} if options.prompts else {}),
        **({"conditions": pictures_below(options.conditions)} if options.conditions else {}),
        **({"targets": pictures_below(options.targets)} if options.targets else {}),
        **({"references": read_references(options.references)} if options.references else {}),
    )


def chosen_items(items: Mapping[str, Gathered], most: int) -> list[str]:
    """Chooses at most so many items by a hash of their names, which is the same for whoever chooses; sorted."""
    return sorted(sorted(items, key=lambda name: hash64("study", name))[:most])


def _outline(
    options: argparse.Namespace, sources: Sequence[Source], form: str, names: Sequence[str], given: set[str]
) -> Plan:
    """Makes the plan without its checks and pictures. Raises UserError for a question that not every item allows."""
    questions = tuple(options.questions or usual_questions(given))
    for name in questions:
        needed = QUESTIONS[name].given
        if needed is not None and needed not in given:
            remedy = {CONDITION: "--conditions FOLDER", REFERENCES: "--references FOLDER", PROMPT: "--prompts FILE"}
            raise UserError(
                f"--questions {name} needs a {needed} of every item: give {remedy[needed]}, or leave it out"
            )
    methods, secret = tuple(one.name for one in sources), new_secret()
    trials = judged_trials(secret, form, questions, methods, names)
    each = len(trials) // len(questions)
    if options.per_rater:
        each = min(each, max(1, options.per_rater // len(questions)))
    return Plan(
        secret=secret,
        title=options.title or TITLE,
        form=form,
        questions=questions,
        methods=methods,
        items=tuple(Item(name, "", {}) for name in names),
        trials=tuple(trials),
        judged_each=each,
        checks_each=min(math.ceil(each * options.checks), len(names)),
        repeats_each=min(math.ceil(each * options.repeats), each),
        sources={one.name: dict(kind=one.kind, where=str(one.where.resolve()), step=one.step) for one in sources},
    )


def _write_pictures(out: Path, plan: Plan, gathered: Mapping[str, Gathered]) -> Plan:
    """Writes what raters see, and returns the plan with its checks and with what stands beside the pictures."""
    folder = out / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    items, checks = [], []
    asked = choose_checks(plan, gathered)
    for name, files in tqdm(gathered.items(), desc="study", unit="item"):
        shown = read_level(name, files)
        for method, picture in shown.items():
            write_picture(folder, opaque(plan.secret, "picture", method, name), picture)
        given: dict[str, tuple[str, ...]] = {}
        if files.condition is not None:
            given[CONDITION] = (opaque(plan.secret, CONDITION, name),)
            shape = next(iter(shown.values())).shape[:2]
            write_picture(folder, given[CONDITION][0], fit_condition(read_picture(files.condition), shape, name))
        if files.references:
            given[REFERENCES] = tuple(opaque(plan.secret, REFERENCES, str(path)) for path in files.references)
            for one, path in zip(given[REFERENCES], files.references, strict=True):
                write_picture(folder, one, fit_reference(read_picture(path)))
        items.append(Item(name, files.prompt, given))
        checks += [_write_check(folder, plan, check, shown, gathered) for check in asked if check.item == name]
    return replace(plan, items=tuple(items), trials=(*plan.trials, *checks))


def _write_check(
    folder: Path, plan: Plan, check: Check, shown: Mapping[str, Any], gathered: Mapping[str, Gathered]
) -> Trial:
    count = 2 if plan.form == PAIRS else len(plan.methods)
    names = tuple(opaque(plan.secret, CHECK, check.question, check.item, str(place)) for place in range(count))
    for name, picture in zip(names, check_pictures(check, shown, gathered, count), strict=True):
        write_picture(folder, name, picture)
    return Trial(opaque(plan.secret, CHECK, check.question, check.item), CHECK, check.question, check.item, (), names)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    told = {
        name: value for name, value in vars(options).items() if value is not None and name not in ("out", "dry_run")
    }
    return {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}


def seconds_each(plan: Plan) -> float:
    """Estimates how long one rater takes, in seconds."""
    one = PAIR_SECONDS if plan.form == PAIRS else PICTURE_SECONDS * len(plan.methods)
    return one * screens_each(plan)


def describe(plan: Plan, left: int) -> str:
    """Says what a rater is asked, how long it takes, and what so many raters would tell. left: items left out."""
    questions = len(plan.questions)
    shown = "pairs" if plan.form == PAIRS else f"rankings of {len(plan.methods)}"
    lines = [
        f"{len(plan.methods)} methods ({', '.join(plan.methods)}), {len(plan.items)} items; "
        f"questions: {', '.join(plan.questions)}",
        f"a rater sees {screens_each(plan)} screens, about {seconds_each(plan) / 60:.1f} min: "
        f"{plan.judged_each * questions} {shown}, {plan.checks_each * questions} checks with a known answer, "
        f"{plan.repeats_each * questions} repeats",
    ]
    if left:
        lines.append(f"left out: {left} names of pictures that some method lacks")
    pairs = len(plan.methods) * (len(plan.methods) - 1) // 2 if plan.form == PAIRS else 1
    told = []
    for raters in (1, 3, 10, 30):  # 1.96 standard deviations of a share of one half
        answers = raters * plan.judged_each / pairs
        told.append(f"{raters} rater{'s' * (raters > 1)} ±{98 / math.sqrt(answers):.0f} %")
    lines.append("95 % interval of a preference near 50 %, where answers are independent: " + ", ".join(told))
    return "\n".join(lines)
