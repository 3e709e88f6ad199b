"""What TensorBoard shows beside the scalars: confusion matrices, what the network was fed, and the HParams row."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torchvision.utils import make_grid

from covid_cls.evaluation.metrics import confusion, decide
from covid_cls.reporting.figures import confusion_matrix


class EpochImages(Callback):
    """Writes, each `every` epochs, the validation confusion matrix and `images` of the first training batch.

    Reads the logits that validation returns and the batch that training was given, never the network.
    """

    def __init__(self, every: int = 5, images: int = 16) -> None:
        self.every, self.images = every, images
        self._scores: list[torch.Tensor] = []
        self._truth: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Write the augmented images of an epoch's first batch as the network gets them."""
        writer = _writer(trainer)
        if batch_idx or writer is None or not self._due(trainer) or batch.stage > 0:
            return
        view = batch.x[: self.images].float().cpu() * pl_module.preprocess.sd + pl_module.preprocess.mean
        writer.add_image("images/train_batch", make_grid(view.clamp(0, 1), nrow=8), trainer.current_epoch)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Forget the last epoch."""
        self._scores, self._truth = [], []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch's probabilities."""
        self._scores.append(pl_module.probabilities(outputs))
        self._truth.append(batch.y)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the confusion matrix over this process's validation images."""
        writer = _writer(trainer)
        if writer is None or not self._due(trainer) or not self._scores:
            return
        task = pl_module.task
        decided = decide(torch.cat(self._scores).cpu().numpy(), task)
        counts = confusion(torch.cat(self._truth).cpu().numpy(), decided, len(task.classes))
        figure = confusion_matrix(counts, task.classes, f"validation, epoch {trainer.current_epoch + 1}")
        writer.add_figure("confusion_matrix/val", figure, trainer.current_epoch)

    def _due(self, trainer: pl.Trainer) -> bool:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        return trainer.current_epoch % self.every == 0 or last


def write_hparams(logger: TensorBoardLogger, hparams: dict[str, str | float | int], metrics: dict[str, float]) -> None:
    """Give the run its row in the HParams tab: few typed hyper-parameters and final metrics, written once, at the end.

    A row written at the start would show -1 for a metric until the end, and a None makes a run vanish from the tab.
    """
    logger.log_hyperparams(hparams, metrics)
    logger.save()


def write_text(logger: TensorBoardLogger, tag: str, markdown: str) -> None:
    """Show `markdown` in the Text tab."""
    logger.experiment.add_text(tag, markdown)


def _writer(trainer: pl.Trainer) -> Any:
    """The SummaryWriter of this run, or None where nothing is to be written."""
    if not trainer.is_global_zero or trainer.sanity_checking:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
