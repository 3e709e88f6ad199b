"""What watches a run: its history, its speed, and whether its numbers are still finite."""

import logging
import re
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar
from torch import Tensor

from covid_cls.errors import NonFiniteError
from covid_cls.training.classifier import Classifier

log = logging.getLogger(__name__)


# What Lightning says of choices that are meant: images come from memory, frozen stages are in eval mode, scalars are
# logged once an epoch, the classifier prepares its batches, torchmetrics gather over processes by themselves, a resumed
# run finds its checkpoints where it left them.
_MEANT = (
    "does not have many workers",
    "in eval mode at the start of training",
    "smaller than the logging interval",
    "in `LightningModule` but have passed in a `LightningDataModule`",
    "sync_dist=True",
    "LeafSpec",
    "exists and is not empty",
)


def quiet_lightning() -> None:
    """Keep Lightning's remarks on what is meant, and its advertisements, out of the log."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for words in _MEANT:
        warnings.filterwarnings("ignore", message=f".*{re.escape(words)}")


class FiniteCheck(Callback):
    """Stops a run whose loss or weights are no longer finite, before a checkpoint of them is written.

    A network of nans predicts class 0 throughout, with a finite accuracy. The loss is gathered on the device and looked
    at every `every` steps: a look makes a GPU wait.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self._broken: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss of this step."""
        broken = ~torch.isfinite(outputs["loss"].detach())
        self._broken = broken if self._broken is None else self._broken | broken
        if (batch_idx + 1) % self.every == 0 or broken.device.type == "cpu":
            self._stop_if(bool(self._broken), trainer, "training loss")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the epoch's losses and weights; runs before any checkpoint."""
        self._stop_if(self._broken is not None and bool(self._broken), trainer, "training loss")
        validation = trainer.callback_metrics.get("loss/val")
        self._stop_if(validation is not None and not bool(torch.isfinite(validation)), trainer, "validation loss")
        # A sum is finite only if all of its terms are, and takes half the time of asking each.
        sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in pl_module.state_dict().values()])
        self._stop_if(not bool(torch.isfinite(sums).all()), trainer, "weights")

    def _stop_if(self, broken: bool, trainer: pl.Trainer, what: str) -> None:
        if broken:
            rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            raise NonFiniteError(
                f"the {what} became nan or inf in epoch {trainer.current_epoch}, step {trainer.global_step} "
                f"(learning rates {rates}); lower optimizer.lr, lengthen scheduler.warmup_epochs or use "
                "trainer.precision=32-true, then start the command again"
            )


class EpochHistory(Callback):
    """Every epoch's numbers, one line each in the log, kept in the checkpoint so that a resumed run has them all.

    rows: dicts of floats with `epoch`, `seconds`, `images_per_second`, `lr/<group>` and all logged metrics.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.images_per_second = 0.0
        self._started = self._seen = 0.0
        self._rates: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; note the rates, which some schedules have moved on by the epoch's end."""
        self._rates = {f"lr/{g['name']}": float(g["lr"]) for o in trainer.optimizers for g in o.param_groups}
        self._started, self._seen = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch's images over all processes."""
        if self._seen == 0 and not self.rows:
            log.info(f"first step taken; {trainer.num_training_batches} of them make an epoch")
        self._seen += len(batch.y) * trainer.world_size
        self.images_per_second = self._seen / (time.perf_counter() - self._started)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Classifier) -> None:  # type: ignore[override]
        """Log and keep the epoch's numbers."""
        seconds = time.perf_counter() - self._started
        extra: dict[str, Any] = {
            **pl_module.epoch_scalars(),
            **self._rates,
            "speed/images_per_second": self.images_per_second,
        }
        numbers = {key: float(value) for key, value in {**trainer.callback_metrics, **extra}.items()}
        shown = [key for key in extra if key.count("/") < 2]  # training numbers of each class stay in history.csv
        for logger in trainer.loggers:  # straight there: Lightning's own way takes 0.7 ms a number
            # At the step where Lightning puts the validation's numbers: the last one taken, counted from zero.
            logger.log_metrics({key: numbers[key] for key in shown}, trainer.global_step - 1)
        self.rows.append({"epoch": trainer.current_epoch, "seconds": seconds, **numbers})
        log.info(self._line(trainer, numbers))

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rows of a run that is resumed."""
        self.rows = list(state_dict["rows"])

    def seconds_left(self, trainer: pl.Trainer) -> float:
        """Training and validation time that is left if no epoch is spared, from the epochs so far."""
        done = [row["seconds"] for row in self.rows] or [time.perf_counter() - self._started]
        return sum(done) / len(done) * ((trainer.max_epochs or 0) - len(self.rows))

    def _line(self, trainer: pl.Trainer, n: dict[str, float]) -> str:
        left = self.seconds_left(trainer)
        return (
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  "
            f"loss {n['loss/train']:.4f} (val {n.get('loss/val', float('nan')):.4f})  "
            f"val auroc {n.get('auroc/val', float('nan')):.4f}  accuracy {n.get('accuracy/val', float('nan')):.4f}  "
            f"{self.images_per_second:.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left"
        )


class ImagesBar(RichProgressBar):
    """Lightning's rich progress bar with images/s and the whole run's time left."""

    def _get_train_description(self, current_epoch: int) -> str:
        """Epochs counted from one, as in the log."""
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What the bar shows behind the batch count."""
        history = next(callback for callback in trainer.callbacks if isinstance(callback, EpochHistory))  # type: ignore[attr-defined]
        left = history.seconds_left(trainer)
        shown = {"images/s": f"{history.images_per_second:.0f}", "left": f"{left // 60:.0f}:{left % 60:02.0f}"}
        val = trainer.callback_metrics.get("auroc/val")
        return shown if val is None else {**shown, "val auroc": f"{val:.3f}"}
