"""What of this machine the process may use."""

import os


def cores() -> int:
    """The number of processor cores that this process may use, which a cluster's job or taskset can make few."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
