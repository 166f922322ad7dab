"""A DreamBooth run in which one gradient of one rank is not finite. `torchrun spoiled.py NUMBER SUBJECTS RUN.yaml`

NUMBER: of the gradient, counted from 1 over the subjects.
"""

import sys

from controlbooth.trainer.dreambooth import train
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine.distributed import end_process

number = int(sys.argv.pop(1))
accumulate, losses = engines.accumulate, []


def spoil(engine, loss) -> None:
    losses.append(loss)
    accumulate(engine, loss * float("nan") if len(losses) == number else loss)


engines.accumulate = spoil
end_process(train.main())
