"""What a command of ours has started ends with it, also where it is killed and can say nothing more.

Otherwise ranks would train for ever behind the back of a launcher that has got SIGKILL.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

PR_SET_PDEATHSIG = 1
"""Of Linux' prctl(2)."""


def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    """Starts a program that gets SIGTERM when this process ends before it, whatever ended it: on Linux only, where that
    can be asked for.

    It has a session of its own: Ctrl-C on the terminal reaches this process alone, which hands it on once.
    """
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_ending_with(os.getpid()))


def call(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Starts a program and waits; -> its exit status. At Ctrl-C it has the time that it needs to end well; the second
    one ends it at once."""
    started = start(command, environment)
    try:
        return started.wait()
    except KeyboardInterrupt:
        started.send_signal(signal.SIGINT)
        started.wait()
        raise


def _ending_with(parent: int) -> Callable[[], None] | None:
    """To be called in the child between fork and exec, after which the wish lasts; None on other systems."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded here: the child of a fork had better take no locks

    def wish() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it has ended before the wish
            os.kill(os.getpid(), signal.SIGTERM)

    return wish
