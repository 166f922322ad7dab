"""A real MLflow server in processes of its own, to be killed."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

PROGRAM = Path(sys.executable).with_name("mlflow")


def start(folder: Path, port: int) -> subprocess.Popen:
    """On a store in the folder, with one worker. Returns when it answers."""
    command = [str(PROGRAM), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    quiet = dict(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
    with open(folder / "server.log", "a") as log:
        server = subprocess.Popen(
            command, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    end = time.monotonic() + 300
    while not _answers(port):
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError((folder / "server.log").read_text()[-2000:])
        time.sleep(0.1)
    return server


def _answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def stop(server: subprocess.Popen) -> None:
    """SIGKILL to it and to its workers; nothing if it has ended."""
    if server.poll() is not None:
        return
    for one in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
        one.send_signal(signal.SIGKILL)
    server.wait()
