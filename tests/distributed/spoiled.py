"""A DreamBooth run in which one gradient of one rank is not finite. `torchrun spoiled.py NUMBER SUBJECTS RUN.yaml`

NUMBER: of the gradient, counted from 1 over the subjects.
"""

import sys

from controlbooth.trainer import dreambooth
from controlbooth.trainer import engine as engines
from controlbooth.trainer.distributed import end_process

number = int(sys.argv.pop(1))
accumulate, losses = engines.accumulate, []


def spoil(engine, loss) -> None:
    losses.append(loss)
    accumulate(engine, loss * float("nan") if len(losses) == number else loss)


engines.accumulate = spoil
end_process(dreambooth.main())
