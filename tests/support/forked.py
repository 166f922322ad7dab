"""Starts programs on ranks of torchrun in milliseconds: forks them from a process that has imported everything.

Importing torch, DeepSpeed, diffusers and transformers takes a rank some seven seconds of a processor, more than most
tests take for all else. `start` does what `python -m torch.distributed.run --standalone` does, with processes of the
same tree, sessions, environment and streams: torchrun's own program, and below it the ranks. What is not the same: the
command lines that `ps` shows, and that all have one seed of Python's string hashes. Commands of controlbooth, which
start torchrun themselves, are not started from here.
"""

import atexit
import contextlib
import importlib
import os
import pickle
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

IMPORTED = (
    "deepspeed", "deepspeed.runtime.zero.stage3", "deepspeed.ops.adam", "torch._dynamo", "torch._inductor.compile_fx",
    "torch.distributed.run", "torch.distributed.optim", "scipy.optimize", "cv2", "pyarrow.parquet",
    "mlflow", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store", "sqlalchemy.dialects.sqlite",
    "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip",
    "diffusers.models", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "controlbooth.models.lora", "controlbooth.models.pretrained", "controlbooth.models.sampling",
    "controlbooth.trainer.controlnet.train", "controlbooth.trainer.dreambooth.train",
    "controlbooth.trainer.dreambooth.full",
    "controlbooth.trainer.dreambooth.validation", "controlbooth.trainer.evaluation.evaluate",
    "controlbooth.trainer.dreambooth.measuring.measure", "controlbooth.trainer.tracking.mlflow_run",
    "controlbooth.trainer.tracking.mlflow_store",
)  # fmt: skip
BEFORE_IMPORTS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
"""What libraries read when they are imported."""


class Started:
    """Stands for a torchrun that was started, as subprocess.Popen does."""

    def __init__(self, connection: socket.socket, stdout: IO[str], stderr: IO[str] | None):
        self._connection, self.stdout, self.stderr = connection, stdout, stderr
        self.pid: int = _receive(connection)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit status, negative after a signal; None while it runs."""
        if self.returncode is None and self._can_be_read(0.0):
            self.returncode = _receive(self._connection)
        return self.returncode

    def _can_be_read(self, timeout: float | None) -> bool:
        """Waits until the exit status is there or timeout seconds are over; None: without end."""
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._connection, selectors.EVENT_READ)
            return bool(waiting.select(timeout))

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired where it runs for longer."""
        if self.poll() is None and not self._can_be_read(timeout):
            raise subprocess.TimeoutExpired("torchrun", timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Returns what it has printed once all who hold its streams have ended. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        texts: dict[Any, list[bytes]] = {one: [] for one in (self.stdout, self.stderr) if one is not None}
        with selectors.DefaultSelector() as waiting:
            for one in texts:
                waiting.register(one, selectors.EVENT_READ)
            while waiting.get_map():
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready = waiting.select(left)
                if not ready:
                    raise subprocess.TimeoutExpired("torchrun", timeout or 0.0)
                for key, _ in ready:
                    part = os.read(key.fd, 1 << 16)
                    texts[key.fileobj].append(part)
                    if not part:
                        waiting.unregister(key.fileobj)
        self.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
        out, *rest = [b"".join(parts).decode(errors="replace") for parts in texts.values()]
        return out, "".join(rest)

    def send_signal(self, number: int) -> None:
        """Sends a signal to torchrun alone, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def start(
    processes: int, words: Sequence[object], environment: Mapping[str, str] = {}, cwd: Path | None = None,
    separate: bool = False,
) -> Started:  # fmt: skip
    """Starts `torchrun --standalone --nproc-per-node PROCESSES WORDS`, in a session of its own.

    words: "-m" and a module, or a program's path; then its arguments. environment is added to this process's. separate
    keeps stderr apart, else it goes where stdout goes.
    """
    ours, theirs = socket.socketpair()
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe() if separate else (None, os.dup(out_write))
    asked = (processes, [str(word) for word in words], os.environ | environment, str(cwd or Path.cwd()))
    with theirs:
        _send(_server(), asked, (theirs.fileno(), out_write, err_write))
    os.close(out_write)
    os.close(err_write)
    # errors="replace": a reader must not fail for what a test has a rank print
    opened = [os.fdopen(end, "r", errors="replace") for end in (out_read, err_read) if end is not None]
    return Started(ours, opened[0], opened[1] if separate else None)


def run(
    processes: int, words: Sequence[object], timeout: float = 900, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Does as `start`, waits, and returns what subprocess.run would, with streams that are separate."""
    started = start(processes, words, environment, cwd, separate=True)
    out, err = started.communicate(timeout)
    return subprocess.CompletedProcess(["torchrun", *map(str, words)], started.wait(), out, err)


@cache
def _server() -> socket.socket:
    """Starts the process that forks, once in a process that tests; it ends when that one does."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-u", __file__, str(theirs.fileno())]
        environment = os.environ | BEFORE_IMPORTS
        subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    return ours


def _send(connection: socket.socket, message: object, descriptors: Sequence[int] = ()) -> None:
    body = pickle.dumps(message)
    socket.send_fds(connection, [struct.pack("!I", len(body))], list(descriptors))
    connection.sendall(body)


def _receive(connection: socket.socket, descriptors: list[int] | None = None) -> Any:
    """Returns a message, and adds what came with it to `descriptors`. Raises EOFError where the other end is gone."""
    head, found, _, _ = socket.recv_fds(connection, 4, 3)
    if descriptors is not None:
        descriptors.extend(found)
    while len(head) < 4:
        head += _some(connection, 4 - len(head))
    (size,) = struct.unpack("!I", head)
    body = b""
    while len(body) < size:
        body += _some(connection, size - len(body))
    return pickle.loads(body)


def _some(connection: socket.socket, size: int) -> bytes:
    if not (part := connection.recv(size)):
        raise EOFError
    return part


def _serve(requests: socket.socket) -> None:
    """Forks what is asked for, and says how each ended, until nobody asks any more."""
    running: dict[int, tuple[int, socket.socket]] = {}
    with selectors.DefaultSelector() as waiting:
        waiting.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is requests:
                    descriptors: list[int] = []
                    try:
                        asked = _receive(requests, descriptors)
                    except (EOFError, OSError):
                        return
                    connection = socket.socket(fileno=descriptors[0])
                    if (pid := os.fork()) == 0:
                        waiting.close()
                        for one in (requests, connection, *(other for _, other in running.values())):
                            one.close()
                        for end in running:
                            os.close(end)
                        _as_process(asked[2], asked[3], *descriptors[1:])
                        _end_as(lambda asked=asked: _torchrun(asked[0], asked[1]))
                    for end in descriptors[1:]:
                        os.close(end)
                    _send(connection, pid)
                    end = os.pidfd_open(pid)
                    running[end] = pid, connection
                    waiting.register(end, selectors.EVENT_READ)
                else:
                    waiting.unregister(key.fileobj)
                    pid, connection = running.pop(key.fd)
                    os.close(key.fd)
                    with contextlib.suppress(OSError), connection:  # of a test that has ended
                        _send(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _as_process(environment: Mapping[str, str], cwd: str | None, out: int | None, err: int | None) -> None:
    """Gives a forked process what a started one has: a session, an environment, a folder and streams."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    for end, place in ((out, 1), (err, 2)):
        if end is not None:
            os.dup2(end, place)
            os.close(end)


def _end_as(program: Any) -> NoReturn:
    """Ends the process as Python does after a program: with its status, or a traceback."""
    status = 1
    try:
        program()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _torchrun(processes: int, words: Sequence[str]) -> None:
    """Runs torchrun's own program, to which each rank that it starts is one that was forked before it had threads."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    ranks = [_Rank() for _ in range(processes)]
    for rank in ranks:
        rank.fork(ranks)
    ready = iter(ranks)
    SubprocessHandler._popen = lambda self, args, env: next(ready).begin(args, env)  # type: ignore[method-assign]
    sys.argv = ["torchrun", "--standalone", f"--nproc-per-node={processes}", *words]
    importlib.import_module("torch.distributed.run").main()


class _Rank:
    """Stands for a rank, as subprocess.Popen does for torchrun; it waits until torchrun starts it."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self.pid = 0
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def fork(self, all_ranks: Sequence["_Rank"]) -> None:
        if pid := os.fork():
            self.pid = pid
            self._theirs.close()
            return
        for other in all_ranks:  # else none would see that torchrun is gone
            other._ours.close()
        try:
            words, environment = _receive(self._theirs)
        except EOFError:
            os._exit(0)
        self._theirs.close()
        _as_process(environment, None, None, None)
        _end_as(lambda: _program(words))

    def begin(self, args: Sequence[str], environment: Mapping[str, str]) -> "_Rank":
        words = [word for word in args[1:] if word != "-u"]  # after Python's own name; streams are unbuffered here too
        _send(self._ours, (words, dict(environment)))
        return self

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            time.sleep(0.02)
        return status


def _program(words: Sequence[str]) -> None:
    """Runs `python WORDS`: a module after -m, or a program's path, and arguments."""
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if words[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = list(words[1:])
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # that it is imported already
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).absolute().parent)
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    import gc

    requests = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(requests.fileno(), False)
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the tests end this by closing the connection
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    others = [name for name in names[1:] if name != "jemalloc_bg_thd"]  # of pyarrow's jemalloc, which looks after forks
    assert not others, f"the threads {others} run after the imports, and what is forked would lack them"
    gc.collect()
    gc.freeze()  # collections in what is forked leave out what was imported, and share its memory
    _serve(requests)


if __name__ == "__main__":
    main()
