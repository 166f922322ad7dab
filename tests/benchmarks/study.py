"""A study from beginning to end: three scripted raters in real browsers against a known truth, then a hundred at once.

    python tests/benchmarks/study.py                            on two sets of pictures that it makes
    python tests/benchmarks/study.py --early RUN/checkpoints/step-00000100 --late RUN

The raters answer by keys in headless Chromium. With probability .95, .8 and .6 a rater says what is true, and else the
reverse: of judged pairs that the late picture is better, of checks their known answer. `careful` works alone with
`usual` at the same time; `usual` closes the page half-way and comes back by the link; what `hasty` has answered is sent
again, as it was and turned round. Then a hundred raters answer for a minute, each half a second after the last answer
was stored, and every tenth answer is sent twice. Screenshots go to build/bench/study/.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import record
import studies
from browser import browser, screenshot, wait

from controlbooth.launch.commands import study_new
from controlbooth.trainer.study.answers import LINES, read_answers
from controlbooth.trainer.study.plan import CHECK, Plan, read_plan, screens_of
from controlbooth.trainer.study.result import study_result, table

RELIABILITY = dict(careful=0.95, usual=0.8, hasty=0.6)
SIZES = dict(desktop=(1280, 800), phone=(390, 844))
SHOTS = record.ROOT / "build" / "bench" / "study"


class Served:
    """`study serve` as its users start it."""

    def __init__(self, study: Path):
        command = [sys.executable, "-u", "-m", "controlbooth.launch.cli", "study", "serve", str(study), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip().rstrip("/")

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--early", help="a run or its checkpoint, or a folder of pictures")
    parser.add_argument("--late", help="likewise; the truth is that it is better")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--raters", type=int, default=100, help="at once (default: 100)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for which they answer (default: 60)")
    parser.add_argument("--out", type=Path, default=record.ROOT / "build" / "bench" / "study-folder")
    options = parser.parse_args()
    for name in ("browsers", "load"):
        if (options.out / name).exists():
            raise SystemExit(f"{options.out / name} is there: delete it, or give another --out")
    browsers, load = (make(options, options.out / name) for name in ("browsers", "load"))
    with Served(browsers) as served:
        rate_in_browsers(browsers, served.address)
    known = check_browsers(browsers)
    with Served(load) as served:
        row = asyncio.run(rate_at_once(load, served.address, options.raters, options.seconds))
    record.write("study", [known | {"part": "browsers"}, row | {"part": "load"}])
    return 0


def make(options: argparse.Namespace, out: Path) -> Path:
    """Makes a study of the two methods; without any, of pictures that are blurred more and less."""
    named, beside = dict(early=options.early, late=options.late), []
    if not (options.early and options.late):
        made = out.parent / "made"
        if not made.exists():
            studies.write_methods(made, options.items, 256, ("smeared", "hazy"))
        named = dict(early=made / "smeared", late=made / "hazy")
        beside = ["--conditions", made / "conditions", "--targets", made / "targets"]
    methods = [f"{name}={where}" for name, where in named.items()]
    words = [out, "--methods", *methods, *beside, "--items", options.items]
    assert study_new.main(list(map(str, words))) == 0
    return out


def truth(plan: Plan, shown: Any) -> int:
    """The place of the picture that is better."""
    right = shown.trial.pictures[0 if shown.trial.kind == CHECK else shown.trial.methods.index("late")]
    return shown.pictures.index(right)


def rate_in_browsers(study: Path, address: str) -> None:
    plan = read_plan(study)
    part = len(screens_of(plan, "usual")) * 5 // 8
    with browser(*SIZES["desktop"]) as one, browser(*SIZES["phone"]) as other:
        for driver, (name, (width, height)) in zip((one, other), SIZES.items(), strict=True):
            metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=name == "phone")
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", dict(enabled=name == "phone"))
        with ThreadPoolExecutor() as at_once:
            careful = at_once.submit(rate, one, plan, address, "careful", shots="desktop")
            usual = at_once.submit(rate, other, plan, address, "usual", most=part, shots="phone")
            careful.result(), usual.result()
    with browser(*SIZES["phone"]) as again:  # another window, as after the page was closed
        rate(again, plan, address, "usual", begin=part)
    with browser(*SIZES["desktop"]) as last:
        rate(last, plan, address, "hasty")
    replay(study, address, "hasty")


def rate(
    driver: Any, plan: Plan, address: str, rater: str, begin: int = 0, most: int | None = None, shots: str = ""
) -> None:
    """Answers the rater's screens by keys, and closes the page after `most` of them."""
    draw = np.random.default_rng([*rater.encode()])
    told = draw.random(1000) < RELIABILITY[rater]
    screens = screens_of(plan, rater)
    shown: set[str] = set()

    def state(script: str) -> Any:
        return driver.execute_script(f"return {script}")

    def shot(name: str) -> None:
        if shots:
            screenshot(driver, SHOTS / f"{shots}-{name}.png")

    def press(key: str) -> None:
        state(f"dispatchEvent(new KeyboardEvent('keydown', {{key: {key!r}}}))")

    driver.get(f"{address}/?rater={rater}")
    wait(lambda: state("!document.getElementById('intro').hidden"), "the introduction", 180)
    shot("1-introduction")
    state("document.getElementById('start').click()")
    card = "!document.getElementById('turn').hidden"  # between two questions
    for place in range(begin, len(screens) if most is None else most):
        wait(lambda place=place: state(f"place === {place} && !busy && (ready || {card})"), f"screen {place}", 180)
        if state(card):
            shot("3-next-question")
            state("document.getElementById('go').click()")
            wait(lambda: state("ready"), f"screen {place}", 180)
        asks = screens[place].trial.question
        if shots and asks not in shown:
            shown.add(asks)
            shot(f"2-{asks}")
        if shots and state("screens[place].overlay") and "overlay" not in shown:
            shown.add("overlay")
            press("t")
            wait(lambda: state("[...document.images].every(one => one.complete)"), "the guide")
            shot("4-overlay")
            press("t")
            press("z")
            wait(lambda: state("document.getElementById('large').complete"), "the large picture")
            shot("5-zoom")
            state("document.getElementById('zoom').close()")
        right = truth(plan, screens[place])
        press("AB"[right if told[place] else 1 - right])
    wait(lambda: state("waiting.length === 0"), "the last answer on the disk", 180)
    if most is None:
        wait(lambda: state("!document.getElementById('end').hidden"), "the end", 180)
        shot("6-end")


def replay(study: Path, address: str, rater: str) -> None:
    """Sends all answers of a rater once more: as they were, and turned round under new ids."""
    for line in (study / LINES).read_text().splitlines():
        one = json.loads(line)
        if one["rater"] != rater:
            continue
        assert post(address, one) == 200
        assert post(address, one | {"id": f"replay-{one['id']}", "ranks": one["ranks"][::-1], "replaces": ""}) == 409


def post(address: str, answer: dict[str, Any]) -> int:
    body = json.dumps(answer).encode()
    request = urllib.request.Request(f"{address}/answers", body, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


def check_browsers(study: Path) -> dict[str, Any]:
    """Compares what is stored with what the raters were told to say, and the figures with the truth."""
    plan = read_plan(study)
    stored = read_answers(study, plan.digest)
    wanted = {(rater, one.trial.id) for rater in RELIABILITY for one in screens_of(plan, rater)}
    found = [(one.rater, one.trial) for one in stored]
    result = study_result(plan, study, 0.05)
    print(table(result))
    row: dict[str, Any] = dict(screens=len(wanted), stored=len(found), lost=len(wanted - set(found)))
    row |= dict(twice=len(found) - len(set(found)), left_out=",".join(_left_out(result)) or "nobody")
    for name, own in result["questions"].items():
        counting = [RELIABILITY[rater] for rater, one in result["raters"].items() if one["counts"]]
        share = own["preferences"][0]["share"]
        row[f"{name}: late preferred"] = f"{1 - share['mean']:.0%} ({1 - share['high']:.0%} to {1 - share['low']:.0%})"
        row[f"{name}: truth"] = f"{np.mean(counting):.0%}"
        row[f"{name}: alpha"] = own["alpha"]["mean"]
    for rater, one in result["raters"].items():
        row[f"{rater}: checks failed"] = f"{one['failed']} of {one['checks']}"
    return row


def _left_out(result: dict[str, Any]) -> list[str]:
    return [name for name, one in result["raters"].items() if not one["counts"]]


async def rate_at_once(study: Path, address: str, raters: int, seconds: float) -> dict[str, Any]:
    """Lets raters answer at once for some seconds, and compares what was sent with what is stored."""
    plan = read_plan(study)
    host, port = re.fullmatch(r"http://(.*):(\d+)", address).groups()  # type: ignore[union-attr]
    times: list[float] = []
    loads: list[float] = []
    sent: set[str] = set()
    statuses: list[int] = []
    end = time.monotonic() + seconds

    async def one(number: int) -> None:
        name, draw = f"rater-{number:03d}", random.Random(number)
        connection = await asyncio.open_connection(host, int(port))
        began = time.monotonic()
        await ask(connection, "GET", f"/study?rater={name}")
        loads.append(time.monotonic() - began)
        round_ = 0
        answers: dict[str, str] = {}
        while time.monotonic() < end:
            for shown in screens_of(plan, name):
                if time.monotonic() >= end:
                    break
                identity = f"{name}-{shown.trial.id}-{round_}"
                body = dict(
                    id=identity, rater=name, trial=shown.trial.id, pictures=shown.pictures,
                    ranks=draw.choice([[1, 2], [2, 1]]), seconds=0.5, replaces=answers.get(shown.trial.id, ""),
                )  # fmt: skip
                for again in range(1 + (draw.random() < 0.1)):
                    began = time.monotonic()
                    status = await ask(connection, "POST", "/answers", body)
                    times.append(time.monotonic() - began)
                    statuses.append(status)
                    assert status == (200 if again else 201), status
                sent.add(identity)
                answers[shown.trial.id] = identity
                await asyncio.sleep(0.5 * draw.uniform(0.5, 1.5))
            round_ += 1
        connection[1].close()

    await asyncio.gather(*(one(number) for number in range(raters)))
    stored = [answer.id for answer in read_answers(study, plan.digest)]
    lines = [json.loads(line)["id"] for line in (study / LINES).read_text().splitlines()]
    row = dict(
        raters=raters,
        seconds=seconds,
        sent=len(sent),
        requests=len(times),
        stored=len(stored),
        lost=len(sent - set(stored)),
        twice=len(stored) - len(set(stored)),
        files_agree=stored == lines,
    )
    for share in (50, 95, 99, 100):
        row[f"answer ms p{share}"] = 1000 * float(np.percentile(times, share))
    row["page ms p95"] = 1000 * float(np.percentile(loads, 95))
    return row


async def ask(connection: Any, method: str, path: str, body: Any = None) -> int:
    """Sends one request on a connection that stays open, reads its answer to the end; -> the status."""
    reader, writer = connection
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    await reader.readexactly(int(re.search(r"content-length: (\d+)", answer)[1]))  # type: ignore[index]
    return int(answer.split()[1])


if __name__ == "__main__":
    sys.exit(main())
