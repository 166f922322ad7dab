"""What a command of ours has started ends with it, also where it is killed and can say nothing more.

Otherwise ranks would train for ever behind the back of a launcher that has got SIGKILL.

    python -m controlbooth.launch.ranks.child_process PARENT COMMAND...    becomes COMMAND, which gets SIGTERM when
    PARENT ends
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from controlbooth.data.processes.parent import dying_with

MODULE = "controlbooth.launch.ranks.child_process"


def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    """Starts a program that gets SIGTERM when this process ends before it, whatever ended it: on Linux only, where that
    can be asked for.

    It has a session of its own: Ctrl-C on the terminal reaches this process alone, which hands it on once.
    """
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=dying_with(os.getpid()))


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


def main(arguments: Sequence[str]) -> None:
    """Becomes a program that ends with its parent, for scripts: a shell cannot ask for that."""
    parent, *command = arguments
    if wish := dying_with(int(parent)):
        wish()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
