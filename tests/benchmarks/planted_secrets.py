"""Plants a secret in every place where people put one, runs every command, and searches what was written and printed.

    .venv/bin/python tests/benchmarks/planted_secrets.py [--folder DIR]

Places: a tracking URI in a run's file and on the command line, MLflow's and the stores' variables, a shard's URI with a
password and a presigned one, a .netrc, a cluster's environment and its setup lines. Commands: pack, index, train,
precompute, dreambooth, evaluate, report, export, launch local, launch slurm and kubernetes --dry-run, retrain tick. The
search goes into SQLite files, tars, zips, gzips and the command lines of all processes, and knows base64 and %-codes.
Files that only their owner may read are told apart. Tiny models; some five minutes on 2 cores. Exits with 1 for a hit.
"""

import argparse
import base64
import contextlib
import gzip
import http.server
import io
import os
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import studios
import tiny

CLI = [sys.executable, "-m", "controlbooth.launch.cli"]
PLACES = (
    "tracking-file", "tracking-override", "mlflow-password", "mlflow-token", "aws-secret", "shard-password",
    "signature", "netrc", "cluster-password", "cluster-plain-name", "cluster-address", "setup-token",
)  # fmt: skip
MARK = "CONTROLBOOTH_SECRETS"


class Shards(http.server.BaseHTTPRequestHandler):
    """Ranges of files: below /signed with a signature, below /private with a user and a password, below /none never."""

    def __init__(self, folder: Path, signature: str, password: str, *arguments, **options) -> None:
        self.folder, self.signature = folder, signature
        self.expected = "Basic " + base64.b64encode(f"reader:{password}".encode()).decode()
        super().__init__(*arguments, **options)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = urlsplit(self.path)
        _, kind, name = parts.path.split("/")
        signed = parse_qs(parts.query).get("X-Amz-Signature") == [self.signature]
        allowed = {"signed": signed, "private": self.headers.get("Authorization") == self.expected}.get(kind, False)
        if not allowed:
            self.send_error(403)
            return
        data = (self.folder / name).read_bytes()
        first, last = 0, len(data) - 1
        if asked := self.headers.get("Range"):
            first, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(end or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"one"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])

    def log_message(self, format: str, *arguments: object) -> None:
        return


@contextlib.contextmanager
def serving(folder: Path, signature: str, password: str) -> Iterator[int]:
    """The port of a server of a folder's files."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Shards, folder, signature, password))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


class Watching:
    """Reads the command lines of all processes that a command has started, as `ps` shows them to everybody."""

    def __init__(self, mark: str) -> None:
        self.mark, self.seen, self._over = mark, set(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watching":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get(MARK) == self.mark and process.pid != self.own:
                        self.seen.add("\0".join(process.cmdline()))

    own: int = -1
    """The command itself, whose words a person has written."""


def texts(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """What a file holds: its bytes, and what lies in it, however it is packed."""
    yield name, data
    if data[:2] == b"\x1f\x8b":
        with contextlib.suppress(OSError, EOFError):
            yield from texts(f"{name}!gz", gzip.decompress(data))
    if data[:4] == b"PK\x03\x04":
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from texts(f"{name}!{member}", archive.read(member))
    if data[257:262] == b"ustar":
        with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                if (file := archive.extractfile(member)) is not None:
                    yield from texts(f"{name}!{member.name}", file.read())


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    data = path.read_bytes()
    yield from texts(str(path), data)
    if data[:15] == b"SQLite format 3":
        with contextlib.closing(sqlite3.connect(path)) as store:
            yield f"{path}!sql", "\n".join(store.iterdump()).encode()


def forms(secret: str) -> list[bytes]:
    """How a secret may be written: as it is, in a URI, in base64 at each of three offsets."""
    codes = [base64.b64encode(b"x" * offset + secret.encode())[4:-4] for offset in range(3)]
    return [secret.encode(), quote(secret, safe="").encode(), *codes]


def hits(planted: dict[str, str], name: str, data: bytes) -> list[str]:
    return [f"{place} in {name}" for place, secret in planted.items() if any(form in data for form in forms(secret))]


class Trial:
    """A folder with its inputs, commands that are run in it, and what they have printed."""

    def __init__(self, folder: Path, planted: dict[str, str]) -> None:
        self.folder, self.planted, self.found, self.printed = folder, planted, [], 0
        self.inputs: set[Path] = set()
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MLFLOW_TRACKING_USERNAME": "trainer",
            "MLFLOW_TRACKING_PASSWORD": planted["mlflow-password"], "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": planted["aws-secret"], MARK: str(os.getpid()),
            "NETRC": str(folder / "netrc"),
        }  # fmt: skip

    def write(self, name: str, text: str) -> Path:
        """An input, in which a person has written a secret."""
        path = self.folder / name
        path.write_text(text)
        self.inputs.add(path)
        return path

    def run(self, *words: object, expect: tuple[int, ...] = (0,), **environment: str) -> str:
        command = [*CLI, *map(str, words)]
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment | environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        watching = Watching(str(os.getpid()))
        watching.own = process.pid
        with watching:
            printed, _ = process.communicate(timeout=900)
        self.printed += len(printed)
        told = " ".join(command[3:6]).partition("=http")[0]
        found = hits(self.planted, f"what `{told}` printed", printed)
        found += [hit for line in watching.seen for hit in hits(self.planted, f"ps during `{told}`", line.encode())]
        self.found += found
        status = "" if process.returncode in expect else f", UNEXPECTED: {printed.decode()[-1500:]}"
        print(f"  {told}: status {process.returncode}, {len(found)} hits{status}", flush=True)
        return printed.decode()


def prepare(folder: Path) -> None:
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    studios.write_subjects(folder)


def run_tree(folder: Path, name: str, **changes) -> dict:
    tree = tiny.run_tree(folder, name) | dict(max_steps=2)
    for section, value in changes.items():
        tree[section] = tree.get(section, {}) | value if isinstance(value, dict) else value
    return tree


def plant_and_run(trial: Trial, port: int) -> None:
    folder, planted = trial.folder, trial.planted
    write = lambda name, tree: trial.write(name, yaml.safe_dump(tree))  # noqa: E731
    dead = "http://127.0.0.1:9"
    host = f"127.0.0.1:{port}"
    # Tracking: refused, and elsewhere from the environment
    uri = f"http://trainer:{planted['tracking-file']}@127.0.0.1:9"
    write("refused.yaml", run_tree(folder, "refused", tracking=dict(uri=uri)))
    trial.run("train", "refused.yaml", expect=(2,))
    trial.run("train", "refused.yaml", "--dry-run", expect=(2,))
    write("run.yaml", run_tree(folder, "run", tracking=dict(uri=dead)))
    override = f"tracking.uri=http://trainer:{planted['tracking-override']}@127.0.0.1:9"
    trial.run("train", "run.yaml", override, expect=(2,))
    trial.run("train", "run.yaml", "--processes", "2")
    token = {"MLFLOW_TRACKING_TOKEN": planted["mlflow-token"]}
    trial.run("train", "run.yaml", "name=token", **token)
    # Shards
    presigned = f"http://{host}/signed/shards-00000{{0..2}}.tar?X-Amz-Expires=60&X-Amz-Signature={planted['signature']}"
    trial.run("data", "index", presigned, "--manifest", "signed.jsonl")
    trial.run("data", "index", presigned.replace("/signed/", "/none/"), "--manifest", "none.jsonl", expect=(2,))
    with_password = f"http://reader:{planted['shard-password']}@{host}/private/shards-000000.tar"
    trial.run("data", "index", with_password, "--manifest", "refused.jsonl", expect=(2,))
    netrc = trial.write("netrc", f"machine 127.0.0.1 login reader password {planted['netrc']}\n")
    netrc.chmod(0o600)
    trial.run("data", "index", f"http://{host}/private/shards-000000.tar", "--manifest", "private.jsonl")
    for number, shards in enumerate((with_password, presigned)):
        write(f"shards-{number}.yaml", run_tree(folder, f"shards-{number}", data=dict(shards=shards)))
        trial.run("train", f"shards-{number}.yaml", "--dry-run", expect=(2,))
    signed = dict(shards="signed.jsonl", cache=str(folder / "cache"), cache_gib=1)
    write("signed.yaml", run_tree(folder, "signed", data=signed))
    trial.run("train", "signed.yaml", "--dry-run")
    trial.run("train", "signed.yaml")
    for verb in ("info", "lint", "stats", "explain"):
        words = (
            ("data", verb, "signed.jsonl") if verb != "explain" else ("data", "explain", "signed.yaml", "--step", "0")
        )
        trial.run(*words, expect=(0, 1, 2))
    manifest = folder / "signed.jsonl"
    lost = manifest.read_text().replace("/signed/", "/none/")
    (folder / "lost.jsonl").touch(0o600)
    write("lost.yaml", run_tree(folder, "lost", data=signed | dict(shards="lost.jsonl", cache=str(folder / "cache-2"))))
    trial.write("lost.jsonl", lost)
    trial.run("train", "lost.yaml", expect=(1, 2))
    # What is made of a run
    trial.run("data", "pack", "pictures", "-o", "packed", "--condition", "canny", "--caption", "a {folder}")
    trial.run("data", "precompute", "signed.yaml", "data.latent_cache=latents", "data.held_out=null")
    trial.run("evaluate", "runs/signed", "--samples", "4", "--steps", "2")
    trial.run("report", "runs/signed", "-o", "report.html")
    trial.run("export", "runs/signed", "exported")
    subjects = dict(
        name="subjects", output="runs", model=dict(base=str(folder / "base"), attention="math"), precision="fp32",
        resolution=64, steps=2, identifiers=["red", "blue", "green", "teal", "pink", "gray"],
        prior=dict(weight=0.0), tracking=dict(uri=dead),
    )  # fmt: skip
    write("subjects-run.yaml", subjects)
    trial.run("dreambooth", "run", "subjects.yaml", "subjects-run.yaml")
    # Clusters
    environment = {
        "PGPASSWORD": planted["cluster-password"], "TITLE": planted["cluster-plain-name"],
        "STORE": f"https://me:{planted['cluster-address']}@store.example", "NCCL_DEBUG": "WARN",
    }  # fmt: skip
    setup = [f"export HF_TOKEN={planted['setup-token']}"]
    for engine in ("local", "slurm", "kubernetes"):
        tree = dict(engine=engine, environment=environment, setup=setup)
        if engine == "kubernetes":
            tree["kubernetes"] = dict(image="a/b:1", storage=[dict(claim="data", path=str(folder))])
        write(f"{engine}.yaml", tree)
        trial.run("launch", engine, "run.yaml", "name=job", "--cluster", f"{engine}.yaml", "--dry-run", expect=(0, 2))
    trial.run("launch", "local", "run.yaml", "name=job", "--cluster", "local.yaml")
    until_it_ends(folder / "runs" / "job")
    trial.run("launch", "status", "runs/job")
    trial.run("launch", "logs", "runs/job")
    trial.run("launch", "resume", "runs/job", "max_steps=3")
    until_it_ends(folder / "runs" / "job", step=3)
    retrain(trial)


def until_it_ends(run: Path, step: int = 2) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        status = run / "status.json"
        told = yaml.safe_load(status.read_text()) if status.exists() else {}
        log = run / "job" / "log.txt"
        attempts = log.read_text().count("== attempt") if log.exists() else 0
        ended = log.read_text().count("== finished") + log.read_text().count("== failed") if attempts else 0
        if told.get("state") in ("finished", "failed") and told.get("step", step) >= step and ended >= attempts:
            time.sleep(5)
            return
        time.sleep(0.2)


def retrain(trial: Trial) -> None:
    """A policy whose data set has presigned shards: a round is trained and measured."""
    folder = trial.folder
    tree = run_tree(folder, "template", data=dict(cache=str(folder / "cache"), cache_gib=1))
    del tree["data"]["shards"], tree["data"]["held_out"]
    trial.write("template.yaml", yaml.safe_dump(tree))
    policy = dict(
        name="policy", state="state", run="template.yaml", data="signed.jsonl", processes=1,
        triggers=dict(growth=dict(samples=1)), lease_seconds=30,
        evaluation=dict(data=str(folder / "held"), samples=4, sampling_steps=2, guidance_scale=1.0),
        gate=dict(metric="edge_f1", margin=-1.0),
    )  # fmt: skip
    trial.write("policy.yaml", yaml.safe_dump(policy))
    trial.run("retrain", "tick", "policy.yaml", "--dry-run")
    trial.run("retrain", "tick", "policy.yaml")
    until_it_ends(folder / "runs" / "policy-0001")
    trial.run("retrain", "tick", "policy.yaml")
    trial.run("retrain", "history", "policy.yaml")


def search(trial: Trial) -> tuple[int, int, list[str], list[str]]:
    """Files, bytes, hits in files that others can read, hits in those that only their owner can."""
    files, size, open_to_others, private = 0, 0, [], []
    for path in sorted(trial.folder.rglob("*")):
        if not path.is_file() or path.is_symlink() or path in trial.inputs:
            continue
        files, size = files + 1, size + path.stat().st_size
        found = [hit for name, data in contents(path) for hit in hits(trial.planted, name, data)]
        (open_to_others if path.stat().st_mode & 0o077 else private).extend(found)
    return files, size, open_to_others, private


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.umask(0o022)
    prepare(folder)
    planted = {place: f"{uuid.uuid4().hex[:8]}+{uuid.uuid4().hex}" for place in PLACES}
    planted |= {place: planted[place].replace("+", "") for place in ("signature", "netrc", "setup-token")}
    trial = Trial(folder, planted)
    with serving(folder / "train", planted["signature"], planted["netrc"]) as port:
        plant_and_run(trial, port)
    files, size, open_to_others, private = search(trial)
    print(f"searched {files} files of {size / 1e6:.0f} MB, {trial.printed / 1e3:.0f} kB of output, and command lines, "
          f"for {len(planted)} secrets")  # fmt: skip
    for hit in sorted(set(private)):
        print(f"  readable by the owner alone: {hit}")
    for hit in sorted({*trial.found, *open_to_others}):
        print(f"  HIT: {hit}")
    print(f"hits: {len({*trial.found, *open_to_others})}")
    sys.exit(bool(trial.found or open_to_others))


if __name__ == "__main__":
    main()
