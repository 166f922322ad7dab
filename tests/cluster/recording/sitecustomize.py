"""Python imports this before a rank's program when PYTHONPATH names its folder: it writes down what a rank trains on.

One line for each step of each rank, in $RECORD/ATTEMPT-RANK.jsonl: when it began, and position and key of each sample.
While $RECORD/hold has a step's number, that step waits, until its rank is asked to stop or the file is gone: so a test
disturbs a run at a step that it chooses.
"""

import json
import os
import signal
import sys
import time

if "controlbooth.trainer.controlnet.train" in sys.orig_argv and "RANK" in os.environ:
    from controlbooth.data.loading.loader import Loader

    plain = Loader.__next__

    def recorded(self):
        batch = plain(self)
        samples = [[int(p), key] for m in batch.micro_batches for p, key in zip(m.positions, m.keys, strict=True)]
        step = samples[0][0] // int(os.environ["GLOBAL_BATCH_SIZE"])
        name = f"{os.environ.get('CONTROLBOOTH_ATTEMPT', '0')}-{os.environ['RANK']}.jsonl"
        with open(os.path.join(os.environ["RECORD"], name), "a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), "samples": samples}) + "\n")
        hold = os.path.join(os.environ["RECORD"], "hold")
        stop = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        while os.path.exists(hold) and open(hold).read() == str(step) and not getattr(stop, "requested", False):
            time.sleep(0.05)
        return batch

    Loader.__next__ = recorded
