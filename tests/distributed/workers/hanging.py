"""Ranks of torchrun without a model: rank 1 stops in the middle of step 2. `torchrun hanging.py FOLDER SECONDS`."""

import os
import signal
import sys
import time
from pathlib import Path

from controlbooth.trainer.engine.distributed import all_sum, join
from controlbooth.trainer.run.attempt import only_run
from controlbooth.trainer.run.watchdog import watching


def wait_for_ever() -> None:
    time.sleep(1000)


world = join()
with only_run(Path(sys.argv[1]), world) as attempt, watching(attempt, world, float(sys.argv[2])) as watchdog:
    for step in range(1, 4):
        watchdog.begin("the step", step)
        if world.rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGSTOP) if sys.argv[3:] == ["frozen"] else wait_for_ever()
        all_sum([1.0])
