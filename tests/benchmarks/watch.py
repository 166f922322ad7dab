"""What `controlbooth watch` costs and shows: 200 runs in one page, its share of a core beside a training, pictures.

    .venv/bin/python tests/benchmarks/watch.py WORK [--runs 200] [--seconds 60]
    .venv/bin/python tests/benchmarks/watch.py WORK --screenshots OUT

WORK is a folder for the runs, which are trained once and found again. Times: a tiny run is trained and copied to so
many folders; a fresh `watch` is asked for its overview, first and again, after a change of one run, and for the page of
a run of a million steps. Cost: a browser (Chromium where there is one, else a client that asks as the page's script
does) looks at a training that goes on beside it, and the processor's time of the `watch` process is read from
/proc/PID/stat. Screenshots: runs on the built-in base, a ControlNet in training, a batch of subjects two of which
cannot be trained, one that failed and one that was killed, in windows of a desktop and of a telephone.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from browser import browser, live_page, screenshot, settle, why_no_browser

from controlbooth.launch.watch.finding import key_of

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "controlbooth.launch.cli"]
ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
SETTLING = 3.0
"""Seconds for pictures and curves to come, on pages that count seconds and so never stand still."""
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
ASKED_EVERY = 3.0
"""Seconds, as watch.js does while something runs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0, help="for which the cost is measured")
    parser.add_argument("--screenshots", type=Path, metavar="OUT", help="take pictures, and measure nothing")
    parser.add_argument("--steps", type=int, default=240, help="of the runs in the pictures")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if options.screenshots:
        show(work, options.screenshots, options.steps)
        return 0
    tiny_run = train_tiny(work)
    time_many(work, tiny_run, options.runs)
    time_long(work, tiny_run)
    cost(work, options.seconds)
    return 0


# ---- times and cost


def controlbooth(*words: object, **kept: Any) -> subprocess.Popen:
    """Starts a command of controlbooth."""
    return subprocess.Popen([*CLI, *map(str, words)], env=ENVIRONMENT, cwd=kept.pop("cwd", ROOT), **kept)


def done(*words: object, **kept: Any) -> int:
    return controlbooth(*words, **kept).wait()


def train_tiny(work: Path) -> Path:
    """Trains a run of the tests' tiny base, with validations, once; -> its folder."""
    import tiny

    folder = work / "tiny"
    if not (folder / "runs" / "first" / "control.json").is_file():
        folder.mkdir(exist_ok=True)
        tiny.write_base(folder / "base")
        if not (folder / "train").is_dir():
            tiny.write_shards(folder)
        train_one(folder, "first", 40)
    return folder / "runs" / "first"


def tiny_file(folder: Path, name: str, steps: int) -> Path:
    import tiny

    tree = tiny.run_tree(folder, name) | {"max_steps": steps}
    tree["validation"] |= {"every_steps": 10, "at_start": True, "samples": 8}
    tree["checkpoint"] |= {"every_steps": 1000}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder / f"{name}.yaml"


def train_one(folder: Path, name: str, steps: int) -> None:
    assert done("train", tiny_file(folder, name, steps)) == 0


@contextlib.contextmanager
def watch(*folders: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """Runs `controlbooth watch` at a free port; -> its address, and the process."""
    process = controlbooth("watch", *folders, "--port", 0, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def asked(address: str, version: str = "") -> tuple[float, bytes]:
    """Asks for a page; -> the seconds that it took, and what came."""
    headers = {"If-None-Match": version} if version else {}
    began = time.perf_counter()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        content = error.read()
    return time.perf_counter() - began, content


def time_many(work: Path, run: Path, count: int) -> None:
    many = work / "many"
    shutil.rmtree(many, ignore_errors=True)
    for number in range(count):
        shutil.copytree(run, many / f"run-{number:03d}", ignore=shutil.ignore_patterns("checkpoints", "*.npy"))
    with watch(many) as (address, _):
        began = time.monotonic()
        cold, page = asked(address)
        later = page
        while b'class="card reading"' in later:
            later = asked(address)[1]
        whole = time.monotonic() - began
        time.sleep(2.0)
        warm = [(asked(address)[0], time.sleep(1.1)) for _ in range(5)]
        version = f'"{json.loads(asked(f"{address}parts")[1])["version"]}"'
        unchanged = [(asked(f"{address}parts", version)[0], time.sleep(1.1)) for _ in range(5)]
        status = many / "run-007" / "status.json"
        status.write_text(status.read_text().replace("finished", "stopped"))
        answer, began = b"", time.monotonic()
        while not answer:
            time.sleep(0.5)
            changed, answer = asked(f"{address}parts", version)
        late = time.monotonic() - began
    assert page.count(b"<article") == count and len(json.loads(answer)["parts"]) == 1
    again, nothing = (median(one for one, _ in several) for several in (warm, unchanged))
    print(f"{count} run folders, overview: first {cold:.3f} s, {len(page) / 2**10:.0f} KiB, "
          f"every card by {whole:.3f} s; again {again:.3f} s")  # fmt: skip
    print(f"  what has changed? nothing: {nothing:.3f} s; one run: {changed:.3f} s, {len(answer):,} bytes, "
          f"{late:.0f} s after it did")  # fmt: skip


def time_long(work: Path, run: Path, steps: int = 1_000_000) -> None:
    """Times the pages of a run whose metrics.jsonl has a million lines."""
    long = work / "long" / "million"
    if not long.is_dir():
        shutil.copytree(run, long, ignore=shutil.ignore_patterns("checkpoints", "*.npy"))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        record = next(json.loads(line) for line in lines if '"loss"' in line)
        draw = random.Random(0)
        with (long / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                record |= {"step": step, "time": 1.7e9 + step}
                record["metrics"]["loss"] = 0.1 + draw.random() / (1 + step / 1e5)
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
    size = (long / "metrics.jsonl").stat().st_size
    with watch(long.parent) as (address, process):
        overview, _ = asked(address)
        page = f"{address}run/{key_of(long)}/"
        first, _ = asked(page)
        requests, before = 1, processor_seconds(process.pid)
        while b"of metrics.jsonl is read" in asked(page)[1]:
            requests += 1
            time.sleep(0.2)
        spent = processor_seconds(process.pid) - before
        resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    print(f"{steps:,} steps, {size / 2**20:.0f} MiB: overview {overview:.3f} s; its page {first:.3f} s at first")
    print(f"  all of it is read in {spent:.1f} s of a processor; {resident / 2**20:.0f} MiB of memory")


def processor_seconds(process: int) -> float:
    """Returns what a process has used of processors, as /proc/PID/stat tells it."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cost(work: Path, seconds: float) -> None:
    """Measures the share of a core that `watch` takes beside a training, with a browser that looks on."""
    folder = work / "tiny"
    shutil.rmtree(folder / "runs" / "beside", ignore_errors=True)
    training = controlbooth("train", tiny_file(folder, "beside", 1_000_000), stderr=subprocess.DEVNULL)
    lines = folder / "runs" / "beside" / "metrics.jsonl"
    try:
        while not (lines.is_file() and b'"loss"' in lines.read_bytes()):
            assert training.poll() is None, "the training has ended"
            time.sleep(0.5)
        with watch(folder / "runs") as (address, process):
            page = f"{address}run/{key_of(folder / 'runs' / 'beside')}/"
            for what, url in (("nobody", None), ("the overview", address), ("the run's page", page)):
                with looking(url):
                    time.sleep(10.0)
                    before, began = processor_seconds(process.pid), time.monotonic()
                    time.sleep(seconds)
                    share = (processor_seconds(process.pid) - before) / (time.monotonic() - began)
                print(f"{what} is looked at beside a training: {share:.2%} of a core over {seconds:.0f} s", flush=True)
    finally:
        training.send_signal(signal.SIGTERM)
        training.wait()


@contextlib.contextmanager
def looking(url: str | None) -> Iterator[None]:
    """Has a page open for a while."""
    if url is None:
        yield
    elif why_no_browser() is None:
        with browser(*SIZES["desktop"]) as driver:
            driver.get(url)
            yield
    else:
        program = (
            "import sys, time, json, urllib.request as r\nv = ''\nwhile True:\n"
            " try: v = json.load(r.urlopen(r.Request(sys.argv[1] + 'parts', headers={'If-None-Match': v})))"
            "['version']\n"
            " except Exception: pass\n time.sleep(float(sys.argv[2]))"
        )
        client = subprocess.Popen([sys.executable, "-c", program, url, str(ASKED_EVERY)])
        try:
            yield
        finally:
            client.kill()


# ---- pictures


def show(work: Path, out: Path, steps: int) -> None:
    runs = work / "shown"
    make_shown(work, runs, steps)
    training = start_again(runs, "edges", steps)
    try:
        with watch(runs) as (address, _):
            pictures(address, runs, out)
    finally:
        if training is not None:
            training.send_signal(signal.SIGTERM)
            training.wait()


def make_shown(work: Path, runs: Path, steps: int) -> None:
    """Trains the runs of the pictures, but those that are there."""
    data = work / "data"
    for name, seed, count in (("train", 0, 600), ("held", 1_000_003, 32)):
        if not (data / name).is_dir():
            words = ["--scenes", count, "--seed", seed, "--condition", "edges", "-o", data / name, "--workers", 1]
            assert done("data", "pack", *words) == 0
    runs.mkdir(exist_ok=True)
    subjects = work / "subjects"
    if not subjects.is_dir():
        assert done("dreambooth", "subjects", "-o", subjects, "--count", 7) == 0
        spoil(subjects)
    if not (runs / "pets").is_dir():
        common = [f"output={runs}", "name=pets", "validation.encoders={efficientnet: true}", f"steps={steps}"]
        settings = [f"validation.every_steps={max(1, steps // 8)}", "validation.pictures=2", "prior.images=16"]
        done(
            "dreambooth", "run", subjects / "subjects.yaml", ROOT / "launch/configs/dreambooth.yaml", *common, *settings
        )
    if not (runs / "diverged").is_dir():
        wrong = ["optimizer.learning_rate=1e12", "optimizer.max_skipped_steps=3", "optimizer.warmup_steps=10"]
        done("train", *control(data, runs, "diverged", 60), *wrong, "validation.every_steps=20")
    if not (runs / "killed").is_dir():
        kill_at(controlbooth("train", *control(data, runs, "killed", 200)), runs / "killed", 12)


def spoil(subjects: Path) -> None:
    """Makes two subjects such that they cannot be trained: by a picture that is none, and a rate that is too high."""
    rows = yaml.safe_load((subjects / "subjects.yaml").read_text())
    next(iter(sorted((subjects / rows[5]["images"]).glob("*.png")))).write_bytes(b"not a picture")
    rows[6]["learning_rate"] = 1e9
    (subjects / "subjects.yaml").write_text(yaml.safe_dump(rows))


def control(data: Path, runs: Path, name: str, steps: int) -> list[object]:
    """Returns the words of a ControlNet run on the built-in base."""
    return [
        *(ROOT / "launch/configs/quickstart.yaml", f"name={name}", f"output={runs}", f"max_steps={steps}"),
        *(f"data.shards={data / 'train'}", f"data.held_out={data / 'held'}", "validation.samples=8"),
        *("validation.every_steps=10", "validation.sampling_steps=6", "validation.grid=6", "checkpoint.every_steps=20"),
    ]


def start_again(runs: Path, name: str, steps: int) -> subprocess.Popen | None:
    """Starts the run that is shown while it trains, and waits until it has something to show."""
    training = controlbooth("train", *control(runs.parent / "data", runs, name, 1600), stderr=subprocess.DEVNULL)
    strips = runs / name / "samples" / "strips"
    while len(list(strips.glob("step-*.png"))) < steps // 10:
        assert training.poll() is None, "the training has ended"
        time.sleep(1.0)
    return training


def kill_at(training: subprocess.Popen, run: Path, step: int) -> None:
    """Ends a training without a word, with all its processes."""
    import psutil

    while training.poll() is None:
        lines = run / "metrics.jsonl"
        if lines.is_file() and f'"step":{step},'.encode() in lines.read_bytes():
            for one in [*psutil.Process(training.pid).children(recursive=True), training]:
                one.send_signal(signal.SIGKILL)
        time.sleep(0.2)


def pictures(address: str, runs: Path, out: Path) -> None:
    for size, (width, height) in SIZES.items():
        with browser(width, height) as driver:
            # A window of Chromium is at least 500 pixels wide; a telephone's is set by its own protocol.
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"},
            )
            for name, url in pages(address, runs):
                live_page(driver, url)
                settle(driver, seconds=SETTLING)
                print(screenshot(driver, out / f"{name}-{size}.png"), flush=True)
                if name != "overview":
                    whole = driver.execute_script("return document.documentElement.scrollHeight")
                    shape = {
                        "width": width,
                        "height": min(whole, 6000),
                        "deviceScaleFactor": 1,
                        "mobile": size == "phone",
                    }
                    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
                    settle(driver, seconds=SETTLING)
                    print(screenshot(driver, out / f"{name}-{size}-whole.png"), flush=True)
                    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape | {"height": height})


def pages(address: str, runs: Path) -> Sequence[tuple[str, str]]:
    subjects = sorted(one.name for one in (runs / "pets" / "subjects").iterdir())
    of = {name: f"{address}run/{key_of(runs / name)}/" for name in ("edges", "pets", "diverged", "killed")}
    return [
        ("overview", address),
        ("training", of["edges"]),
        ("subjects", of["pets"]),
        ("subject", f"{of['pets']}subject/{subjects[0]}/"),
        ("failed", of["diverged"]),
        ("killed", of["killed"]),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
