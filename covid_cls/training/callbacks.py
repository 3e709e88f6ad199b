"""Callbacks of a fit: safe interruption, a check for nan, the history of the epochs and a progress bar."""

import logging
import re
import signal
import subprocess
import threading
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar
from torch import Tensor

from covid_cls.errors import NonFiniteError
from covid_cls.system import safe_point
from covid_cls.training.module import Classifier

log = logging.getLogger(__name__)

# Lightning's warnings about choices that are intended: images come from memory, frozen stages are in eval mode, scalars
# are logged once per epoch, the classifier prepares its batches, torchmetrics gather over processes, and a resumed run
# finds its own checkpoints.
_INTENDED = (
    "does not have many workers",
    "in eval mode at the start of training",
    "smaller than the logging interval",
    "in `LightningModule` but have passed in a `LightningDataModule`",
    "sync_dist=True",
    "LeafSpec",
    "exists and is not empty",
)


def quiet_lightning() -> None:
    """Suppress Lightning's advertisements and its warnings about intended choices."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in _INTENDED:
        warnings.filterwarnings("ignore", message=f".*{re.escape(text)}")


class SafePoints(Callback):
    """Ends a fit within `system.deferred` after the step in which a signal arrived.

    Only the first process of a distributed run reacts: the others must not leave a step in which it waits for them, and
    they end with it.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the SIGTERM handler before Lightning replaces it."""
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the SIGTERM handler."""
        # With Lightning's handler the processes would end independently of each other.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Raise Interrupted if a signal has arrived."""
        if trainer.is_global_zero:
            safe_point()

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Raise Interrupted if a signal has arrived."""
        self.on_train_batch_end(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Kill the processes that Lightning started for this fit if a signal ends it, and wait for their end."""
        if not isinstance(exception, KeyboardInterrupt):
            return
        processes: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        # Lightning watches this list and kills the present process, too, when one of its entries is dead.
        processes.clear()


class FiniteCheck(Callback):
    """Stops a run whose loss or weights are not finite, before they are written to a checkpoint.

    Args:
        every: Steps between two checks of the loss on a GPU, because each check makes the GPU wait.
    """

    # Without this check, a network of nans would predict class 0 for all images, with a finite accuracy.

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self._broken: Tensor | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Accumulate on the device whether the loss is finite, and check that regularly."""
        broken = ~torch.isfinite(outputs["loss"].detach())
        self._broken = broken if self._broken is None else self._broken | broken
        if (batch_idx + 1) % self.every == 0 or broken.device.type == "cpu":
            self._stop_if(bool(self._broken), trainer, "training loss")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the losses of the epoch and the weights; Lightning calls this before it saves a checkpoint."""
        self._stop_if(self._broken is not None and bool(self._broken), trainer, "training loss")
        validation = trainer.callback_metrics.get("loss/val")
        self._stop_if(validation is not None and not bool(torch.isfinite(validation)), trainer, "validation loss")
        # A sum is finite only if all of its terms are. This takes half the time of checking each term.
        sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in pl_module.state_dict().values()])
        self._stop_if(not bool(torch.isfinite(sums).all()), trainer, "weights")

    def _stop_if(self, broken: bool, trainer: pl.Trainer, what: str) -> None:
        if broken:
            rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            raise NonFiniteError(
                f"the {what} became nan or inf in epoch {trainer.current_epoch + 1}, step {trainer.global_step} "
                f"(learning rates {rates}). Reduce optimizer.lr, increase scheduler.warmup_epochs or set "
                "trainer.precision=32-true, then start the command again"
            )


class EpochHistory(Callback):
    """The metrics of every epoch: logged, sent to the loggers, and kept in the checkpoint for resumed runs.

    Attributes:
        rows: One dict of floats per epoch, with `epoch` (from 0), `seconds`, `speed/images_per_second`, `lr/<group>`
            and all metrics.
        images_per_second: Training speed of the present epoch.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.images_per_second = 0.0
        self._start, self._images = 0.0, 0
        self._rates: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and remember the learning rates, which some schedules change before the epoch ends."""
        self._rates = {f"lr/{g['name']}": float(g["lr"]) for o in trainer.optimizers for g in o.param_groups}
        self._start, self._images = time.perf_counter(), 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the images of all processes."""
        if self._images == 0 and not self.rows:
            log.info("training started (%s steps per epoch)", trainer.num_training_batches)
        self._images += len(batch.y) * trainer.world_size
        self.images_per_second = self._images / (time.perf_counter() - self._start)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Log and keep the metrics of the epoch."""
        seconds = time.perf_counter() - self._start
        extra: dict[str, Any] = {**pl_module.epoch_scalars(), **self._rates}
        extra["speed/images_per_second"] = self.images_per_second
        numbers = {key: float(value) for key, value in {**trainer.callback_metrics, **extra}.items()}
        # The training metrics of single classes are in history.csv only.
        logged = {key: numbers[key] for key in extra if key.count("/") < 2}
        for logger in trainer.loggers:
            # Lightning's own way takes 0.7 ms per number. The step is the one at which it logs validation metrics: the
            # last step, counted from zero.
            logger.log_metrics(logged, trainer.global_step - 1)
        self.rows.append({"epoch": trainer.current_epoch, "seconds": seconds, **numbers})
        loss, auroc, accuracy = (numbers.get(f"{name}/val", float("nan")) for name in ("loss", "auroc", "accuracy"))
        log.info(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  loss {numbers['loss/train']:.4f} "
            f"(val {loss:.4f})  val auroc {auroc:.4f}  accuracy {accuracy:.4f}  "
            f"{self.images_per_second:.0f} images/s  {self.time_left(trainer)} left"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the rows for a checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])

    def time_left(self, trainer: pl.Trainer) -> str:
        """Return the time until the last epoch ends as m:ss, estimated from the epochs so far."""
        done = [row["seconds"] for row in self.rows] or [time.perf_counter() - self._start]
        left = sum(done) / len(done) * ((trainer.max_epochs or 0) - len(self.rows))
        return "{}:{:02}".format(*divmod(round(left), 60))


class ImagesBar(RichProgressBar):
    """Lightning's progress bar with images per second and the time left for all epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning counts epochs from 0; the log counts them from 1.
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what the bar shows after the number of batches."""
        history = next(callback for callback in trainer.callbacks if isinstance(callback, EpochHistory))  # type: ignore[attr-defined]
        shown = {"images/s": f"{history.images_per_second:.0f}", "left": history.time_left(trainer)}
        auroc = trainer.callback_metrics.get("auroc/val")
        return shown if auroc is None else {**shown, "val auroc": f"{auroc:.3f}"}
