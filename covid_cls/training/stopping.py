"""Where a fit ends when a signal has asked for it."""

import signal
import subprocess
import threading
from typing import Any

import pytorch_lightning as pl

from covid_cls.interrupts import safe_point


class SafePoints(pl.Callback):
    """Ends a fit that runs within `interrupts.deferred` after the step in which a signal came.

    In the first process alone: the others of a distributed run must not leave a step in which it waits for them, and
    end with it. Lightning's own handling of SIGTERM, by which each process leaves for itself, is undone.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note who handles SIGTERM before Lightning does."""
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give SIGTERM back to it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop here if a signal has come."""
        if trainer.is_global_zero:
            safe_point()

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop here if a signal has come."""
        self.on_train_batch_end(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the processes that Lightning started for this fit, and wait until they are gone."""
        if not isinstance(exception, KeyboardInterrupt):
            return
        processes: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        processes.clear()  # Lightning watches them, and kills this process, too, once it finds one of them dead
