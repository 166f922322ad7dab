"""Ends a process with the one that has started it, also where that one is killed and can say nothing more.

On Linux, where the kernel can be asked for it; on other systems nothing is asked. Standard library only.
"""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of Linux' prctl(2)."""
REFUSED = "CONTROLBOOTH_REFUSED"
"""The variable by which a launcher tells ranks a folder for why they have refused to start: failed-RANK.json, as the
run's own folder has it of ranks that fail later. It is not theirs yet, and nothing is written there."""
LAUNCHER = "CONTROLBOOTH_LAUNCHER"
"""Environment: the process that has started torchrun, and takes in the ranks of an agent that was killed."""


def dying_with(parent: int) -> Callable[[], None] | None:
    """Returns what is to be called between fork and exec, so that the child gets SIGTERM when `parent` ends.

    The wish outlasts exec. None on other systems. parent: the process that forks, by its main thread.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded here: the child of a fork had better take no locks

    def wish() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it has ended before the wish
            os.kill(os.getpid(), signal.SIGTERM)

    return wish


def end_with_agent() -> None:
    """Asks for SIGTERM when the torchrun agent ends that has started this rank; torchrun's own ranks live on.

    A rank without an agent asks for nothing: started alone, it has been given the wish. Raises ProcessLookupError
    where the agent has ended already.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    parent = os.getppid()
    if str(parent) == os.environ.get(LAUNCHER) or not _runs_python(parent):
        raise ProcessLookupError(
            f"the torchrun agent of rank {os.environ.get('RANK', '0')} ended before the rank began"
        )


def _runs_python(process: int) -> bool:
    """Tells whether it may be an agent; what takes in orphans otherwise, such as init, is another program."""
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:  # hidden, as some systems hide processes of other users
        return process != 1
    return any(b"python" in os.path.basename(word) or b"torch" in word for word in words[:3])


def end_with_parent() -> None:
    """Ends this process of a multiprocessing pool when the command ends that has started it; to be called first in it.

    Without this, workers of a killed command would live on, and write while the next one runs.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def adopt(orphans: bool) -> None:
    """Makes this process, from now on or no longer, the parent of what the processes that it starts leave behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0)
