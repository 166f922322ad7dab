"""Writes status.json, by which others see how a run is doing."""

import json
import time
from typing import Any

from controlbooth.trainer.run.attempt import Attempt, write_text
from controlbooth.trainer.run.failures import STATUS


def write_own_status(attempt: Attempt, **fields: Any) -> None:
    write_text(attempt, attempt.run / STATUS, json.dumps(fields | {"attempt": attempt.number, "time": time.time()}))
