"""`controlbooth study result`: what the answers show, as text, as STUDY/result.json and as STUDY/report.html."""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlbooth.data.files.whole import write_whole
from controlbooth.data.pages.rendering import render_page
from controlbooth.trainer.study.answers import counted, read_answers
from controlbooth.trainer.study.figures import study_figures
from controlbooth.trainer.study.plan import Plan, read_plan, screens_each
from controlbooth.trainer.study.questions import wording

RESULT, REPORT = "result.json", "report.html"
TEMPLATE = Path(__file__).with_name("report.html")


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth study result` is asked, and returns its exit status."""
    plan = read_plan(options.study)
    result = study_result(plan, options.study, options.half_width)
    write_whole(options.study / RESULT, json.dumps(result, indent=1).encode())
    write_whole(options.study / REPORT, page(plan, result).encode())
    print(table(result))
    print(f"report: {options.study / REPORT}")
    if result["answers"]:
        from controlbooth.trainer.study.publish import publish  # reports need more than a study has

        publish(options.study, plan, result)
    return 0


def study_result(plan: Plan, folder: Path, half_width: float) -> dict[str, Any]:
    """Computes what result.json holds: figures that are not known are null."""
    figures = study_figures(plan, counted(read_answers(folder, plan.digest)), half_width)
    facts = dict(
        title=plan.title,
        digest=plan.digest,
        form=plan.form,
        methods=list(plan.methods),
        items=len(plan.items),
        screens=screens_each(plan),
        least_passed=plan.least_passed,
        sources=dict(plan.sources),
    )
    return known(facts | figures)


def known(tree: Any) -> Any:
    """Returns a tree with null in the place of every NaN, which JSON has not."""
    if isinstance(tree, Mapping):
        return {name: known(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [known(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def page(plan: Plan, result: Mapping[str, Any]) -> str:
    questions = {name: dict(own, asks=wording(name, plan.form)) for name, own in result["questions"].items()}
    left = [name for name, one in result["raters"].items() if not one["counts"]]
    shown = dict(result, questions=questions, left_out=left, chance_rank=(len(plan.methods) + 1) / 2)
    return render_page(TEMPLATE, result=shown, percent=percent, number=number, span=span)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def span(figure: Mapping[str, Any], as_percent: bool = False, digits: int = 2) -> str:
    """Formats an interval: low to high."""
    if figure["low"] is None:
        return "–"
    ends = [percent(figure[end]) if as_percent else number(figure[end], digits) for end in ("low", "high")]
    return f"{ends[0]} to {ends[1]}"


def table(result: Mapping[str, Any]) -> str:
    """Formats the figures for a terminal."""
    size = len(result["methods"])
    raters = result["raters"]
    left = [name for name, one in raters.items() if not one["counts"]]
    lines = [f"{result['answers']} answers of {len(raters)} raters, {result['screens']} screens each"]
    if left:
        lines.append(f"left out, for failing their checks: {', '.join(left)}")
    width = max(map(len, result["methods"]))
    for name, own in result["questions"].items():
        lines += ["", f"== {name}: {own['answers']} answers of {own['raters']} raters to {own['items']} items"]
        if not own["answers"]:
            continue
        lines.append(f"{'':<{width}}  average rank{'':<14}of 5 points{'':<15}Bradley-Terry score")
        for method, one in own["methods"].items():
            cells = [f"{number(one[what]['mean'])} ({span(one[what])})" for what in ("rank", "points", "score")]
            lines.append(f"{method:<{width}}  {cells[0]:<26}{cells[1]:<26}{cells[2]}  {one['all_alike']}".rstrip())
        lines.append(f"{'chance':<{width}}  {number((size + 1) / 2):<26}{'3.00':<26}0.00")
        lines.append(f"{'perfect':<{width}}  {'1.00':<26}{'5.00':<26}")
        lines += [preference_line(one) for one in own["preferences"] if one["answers"]]
        lines += agreement_lines(own)
        lines.append(
            f"answers still needed for ±{result['half_width']:.0%}: "
            + (f"about {own['needed']}" if own["needed"] else "none")
        )
    return "\n".join(lines)


def preference_line(one: Mapping[str, Any]) -> str:
    first, second, share = one["first"], one["second"], one["share"]
    told = "chance 50%"
    if share["low"] > 0.5 or share["high"] < 0.5:
        told = f"{first if share['low'] > 0.5 else second} is preferred"
    return (
        f"{first} before {second}: {percent(share['mean'])} ({span(share, True)}), {told}; by majority "
        f"{percent(one['majority']['share'])} of {one['majority']['items']} items; {one['ties']} ties"
    )


def agreement_lines(own: Mapping[str, Any]) -> list[str]:
    alpha, repeats, checks = own["alpha"], own["repeats"], own["checks"]
    lines = [f"agreement between raters: alpha {number(alpha['mean'])} ({span(alpha)}); chance 0, perfect 1"]
    if repeats["count"]:
        told = f"raters agree with themselves in {percent(repeats['same'])} of {repeats['count']} repeats, chance 50%"
        if repeats["ceiling"] is not None:
            told += f": the highest preference that they can show is about {percent(repeats['ceiling'])}"
        lines.append(told)
    if checks["count"]:
        lines.append(f"checks failed: {checks['failed']} of {checks['count']}")
    return lines
