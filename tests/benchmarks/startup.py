"""Where a rank's time goes before it has read its run: the imports of the training program, by package.

    .venv/bin/python tests/benchmarks/startup.py

By `python -X importtime`: what a package's own modules took, without those that they import. growth.py prints the time
from the command to the first step.
"""

import os
import subprocess
import sys
from collections import Counter

from record import write

CODE = "import controlbooth.trainer.controlnet.train, deepspeed"


def main() -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "importtime", "-c", CODE]
    subprocess.run(command, env=environment, capture_output=True, check=True)  # writes bytecode and warms the disk
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for line in done.stderr.splitlines():
        own, _, rest = line.removeprefix("import time:").partition("|")
        if own.strip().isdigit():
            package = rest.partition("|")[2].strip().partition(".")[0]
            seconds[package] += int(own) / 1e6
            modules[package] += 1
    rows: list[dict] = [dict(package=p, seconds=s, modules=modules[p]) for p, s in seconds.most_common(15)]
    write("startup", [dict(package="all", seconds=sum(seconds.values()), modules=sum(modules.values())), *rows])


if __name__ == "__main__":
    main()
