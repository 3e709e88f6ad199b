"""How long a user waits between the command and the first training step."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from covid_cls.errors import InputError

_IMPORTS = "import torch, pytorch_lightning, torchvision"
_FIRST_STEP = "first step"


def time_starts(overrides: Sequence[str], pairs: int = 3) -> dict[str, Any]:
    """Seconds from starting `python -m covid_cls.train *overrides` to its first step, images decoded before.

    `first_step` and `imports` (of starting Python with torch, Lightning and torchvision alone): one per pair, in turn;
    `medians` of both. InputError as from the command.
    """
    found: dict[str, list[float]] = {"first_step": [], "imports": []}
    with tempfile.TemporaryDirectory() as folder:
        own = [f"output_root='{folder}'", "trainer.max_epochs=1", "rerun=true"]
        train = [sys.executable, "-u", "-m", "covid_cls.train", *overrides, *own]
        seconds_to_line(train, _FIRST_STEP)  # decodes the images
        for _ in range(pairs):
            found["first_step"].append(seconds_to_line(train, _FIRST_STEP))
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", _IMPORTS], check=True)  # noqa: S603  # a constant
            found["imports"].append(time.perf_counter() - began)
    return {**found, "medians": {name: median(times) for name, times in found.items()}}


def seconds_to_line(command: Sequence[str], words: str) -> float:
    """Seconds until `command` prints a line with `words`; it is then ended.

    InputError with its line where it ends with 2; RuntimeError where it ends without these words.
    """
    printed: list[str] = []
    began = time.perf_counter()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # noqa: S603  # the user's own words, and no shell
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if words in line:
                    return time.perf_counter() - began
                printed.append(line)
            ended = process.wait()
        finally:
            process.kill()
    faults = [line.removeprefix("error: ").strip() for line in printed if line.startswith("error: ")]
    if ended == 2 and faults:
        raise InputError(faults[-1])
    raise RuntimeError(f"{' '.join(command)} ended without {words!r}: {''.join(printed[-5:])}")
