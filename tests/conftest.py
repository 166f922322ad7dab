"""Set before anything is imported: tests run beside each other on few cores, and never ask a hub or call home."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

sys.path.insert(0, str(Path(__file__).parent / "support"))  # what tests and benchmarks share


def pytest_collection_finish() -> None:
    """Leaves out of garbage collection what was imported: a full one took most of a second, and tests ask for many."""
    gc.collect()
    gc.freeze()
