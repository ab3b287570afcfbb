"""CPU cores of this machine."""

import os

CORES = "LLIP_CORES"
"""Environment variable: number of cores to use, where others work on the same machine."""


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if os.environ.get(CORES, "").isdigit():
        return max(1, int(os.environ[CORES]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
