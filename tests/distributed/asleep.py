"""A DreamBooth task that falls asleep (SIGSTOP) when its first subject is trained, right before that is written.

`torchrun asleep.py SUBJECTS RUN.yaml --rows FIRST:END`
"""

import os
import signal

from controlbooth.trainer import dreambooth
from controlbooth.trainer.distributed import end_process

write = dreambooth.save_lora


def sleep_and_write(*arguments) -> None:
    dreambooth.save_lora = write
    os.kill(os.getpid(), signal.SIGSTOP)
    write(*arguments)


dreambooth.save_lora = sleep_and_write
end_process(dreambooth.main())
