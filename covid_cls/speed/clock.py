"""Seconds and bytes of a side while it trains."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from covid_cls.speed.child import Wire, say, wait_for_word

PARTS = ("data", "forward", "backward")


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """The most that this process has held so far, in MB of 1e6 bytes: `host` resident, `device` allocated on a GPU."""
    allocated = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    held = process_memory()["peak_bytes"]
    return {"host": None if held is None else held / 1e6, "device": allocated}


class Stopwatch:
    """Seconds of an epoch and of its three parts.

    A GPU computes while the host goes on: parts are true there only where the device is waited for at each mark, which
    slows the epoch down.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.waits = device, False
        self._began = self._last = 0.0
        self._parts: dict[str, float] = {}

    def start(self, waits: bool) -> None:
        """Start from zero. waits: for the device, at each mark."""
        self.waits, self._parts = waits, dict.fromkeys(PARTS, 0.0)
        synchronise(self.device)
        self._began = self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """The time since the last mark was that of `part`."""
        if self.waits:
            synchronise(self.device)
        now = time.perf_counter()
        self._parts[part] += now - self._last
        self._last = now

    def stop(self) -> dict[str, float]:
        """Seconds in all, as `seconds`, and of each part."""
        synchronise(self.device)
        return {"seconds": time.perf_counter() - self._began, **self._parts}


class Gate(Callback):
    """Lets a fit train an epoch when the parent says so, and times it from there to the end of its last step.

    Validation, the epoch's metrics, logging and checkpoints lie between that and the next word, and are not timed: the
    parent hears of an epoch when they are over. answers: what else it may ask for meanwhile.
    data: the time to the next prepared batch on the device; forward: with the loss; backward: with the optimizer.
    """

    watch: Stopwatch

    def __init__(self, wire: Wire, answers: Mapping[str, Callable[[], Any]]) -> None:
        self.wire, self.answers = wire, answers
        self._done: dict[str, float] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a watch for the device."""
        self.watch = Stopwatch(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the last epoch and wait for the word."""
        if self._done:
            say(self.wire, self._done)
        self.watch.start(waits=wait_for_word(self.wire, self.answers) == "profile")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """The batch is there."""
        self.watch.mark("data")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        """The loss is there."""
        self.watch.mark("forward")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The weights have moved."""
        self.watch.mark("backward")
        if batch_idx + 1 == trainer.num_training_batches:
            self._done = self.watch.stop()


def process_memory() -> dict[str, int | None]:
    """Bytes of this process: `peak_bytes` resident so far, `resident_bytes` now, libraries included; or None."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux counts in ru_maxrss what the parent held when it started this process.
        text = status.read_text(encoding="ascii", errors="replace")
        fields = dict(line.split(":", 1) for line in text.splitlines())
        names = {"peak_bytes": "VmHWM", "resident_bytes": "VmRSS"}
        return {key: int(fields[name].split()[0]) * 1024 if name in fields else None for key, name in names.items()}
    try:
        import resource
    except ImportError:  # Windows
        return {"peak_bytes": None, "resident_bytes": None}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": most if sys.platform == "darwin" else most * 1024, "resident_bytes": None}
