"""How many processors this process may use."""

import os


def usable_cpus() -> int:
    """Counts the CPUs that this process may use: fewer than the machine's where a container or taskset limits them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
