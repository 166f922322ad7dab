"""Measures what a rank's machine is doing: processors, memory, GPUs."""

import shutil
import subprocess
from pathlib import Path

import psutil

GIB = 2**30


def system_metrics(folder: Path) -> dict[str, float]:
    """Measures this machine's load and memory, this process's memory, free disk at `folder`, and NVIDIA GPUs.

    Returns the figures by name, each in percent or GiB as its name says.
    """
    memory = psutil.virtual_memory()
    return {
        "cpu_percent": psutil.cpu_percent(),
        "memory_used_gib": (memory.total - memory.available) / GIB,
        "process_memory_gib": psutil.Process().memory_info().rss / GIB,
        "disk_free_gib": shutil.disk_usage(folder).free / GIB,
    } | _gpu_metrics()


def _gpu_metrics() -> dict[str, float]:
    """Asks nvidia-smi, which comes with the driver, for the load in percent and the memory in GiB of each GPU.

    Returns {} where there is none or it does not answer.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (subprocess.SubprocessError, OSError):
        return {}  # a gap in the curve; a GPU that is gone stops the training itself
    metrics = {}
    for line in lines:
        index, utilization, memory_mib = (part.strip() for part in line.split(","))
        if utilization.isdecimal() and memory_mib.isdecimal():  # otherwise [N/A], as on a divided GPU
            metrics |= {f"gpu_{index}_percent": float(utilization), f"gpu_{index}_memory_gib": float(memory_mib) / 1024}
    return metrics
