"""A DreamBooth task that falls asleep (SIGSTOP) when its first subject is trained, right before that is written.

`torchrun asleep.py SUBJECTS RUN.yaml --rows FIRST:END`
"""

import os
import signal

from controlbooth.trainer.dreambooth import stack, train
from controlbooth.trainer.engine.distributed import end_process

write = stack.save_lora


def sleep_and_write(*arguments) -> None:
    stack.save_lora = write
    os.kill(os.getpid(), signal.SIGSTOP)
    write(*arguments)


stack.save_lora = sleep_and_write
end_process(train.main())
