"""A reader that fails in every way in which a reader must not. Its process imports little else."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from covid_cls.data.limits import BadImage


def unreliable(path: Path) -> np.ndarray:
    """Crash, hang, raise or read, as the name of the file requires."""
    if path.name == "killed":
        os.kill(os.getpid(), signal.SIGSEGV)
    if path.name == "hangs":
        time.sleep(60)
    if path.name == "raises":
        raise KeyError("tag")
    if path.name == "refuses":
        raise BadImage("blank")
    return np.ones(300_000_000 if path.name == "large" else 4, np.uint8)[:4]
