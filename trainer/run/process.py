"""A rank as a process: its stop signals, its memory, its words, and the libraries that it keeps quiet."""

import logging
import resource
import signal
import sys
import warnings

import torch
from tqdm import tqdm

from controlbooth.trainer.engine.distributed import World


class StopRequest:
    """Set by SIGTERM (and SIGINT of a rank that runs by hand): the loop ends after its step, with a checkpoint."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True


def say(world: World, message: str) -> None:
    if world.rank == 0:
        tqdm.write(message, file=sys.stderr)


def peak_memory_gib(world: World) -> float:
    """Returns the most memory that this rank has held, in GiB: of the GPU where there is one, else of its process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def quiet_libraries() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
