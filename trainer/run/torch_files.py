"""Keeps PyTorch's files from running code when they are read, and what DeepSpeed says meanwhile off the terminal."""

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from controlbooth.trainer.run.continuing import CheckpointError

_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def tensors_only(checkpoint: Path) -> Iterator[None]:
    """Keeps torch.load within the block to tensors, plain values and DeepSpeed's own records, whatever its callers ask
    for.

    DeepSpeed reads its files as pickles without limits, and a pickle can call anything. PyTorch's own switch overrides
    that; it is a variable of the environment, which is set for no longer than this. Raises CheckpointError for a file
    that holds anything else.
    """
    before = os.environ.get(_TENSORS_ONLY)
    os.environ[_TENSORS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_records()):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"a file of {checkpoint} holds more than tensors and plain values, and could run code when it is read: it "
            f"is refused ({str(error).splitlines()[0]}). Delete {checkpoint} to use an older one"
        ) from error
    finally:
        if before is None:
            del os.environ[_TENSORS_ONLY]
        else:
            os.environ[_TENSORS_ONLY] = before


def _deepspeed_records() -> list[Any]:
    """Lists the classes that DeepSpeed's states are made of besides tensors: values and their names, without any
    behaviour when they are read."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def quiet():
    """Keeps what DeepSpeed prints of its progress off the terminal; an error still carries its own message."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
