"""What TensorBoard shows of a run's epochs beside the scalars: confusion matrices, PR curves, images, Grad-CAM."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from covid_cls.attribution.maps import evaluating, grad_cam
from covid_cls.data.datamodule import Radiographs
from covid_cls.evaluation.metrics import confusion, decide, positives
from covid_cls.models.scorer import Scorer
from covid_cls.records import Batch
from covid_cls.reporting.figures import INK, confusion_matrix
from covid_cls.reporting.tensorboard import write_layout

_CARD = 0.7  # of a figure's usual size, for the width of TensorBoard's cards: its words stay as large
_WRONG = "#B3261E"


class EpochImages(Callback):
    """Writes, each `every` epochs and after the last, what validation came to and what the network looks at.

    The confusion matrix and a PR curve per class, from the logits that validation returns, in a distributed run of the
    first process's images; `images` of the epoch's first training batch; Grad-CAM of `cases` fixed validation images
    per class, the first ones in path order, each of a patient of its own. Steps are epochs, counted from one.

    Nothing of it is seen by training: no random number is drawn, no weight, gradient or mode changed.
    """

    def __init__(self, every: int = 5, images: int = 16, cases: int = 2) -> None:
        self.every, self.images, self.cases = every, images, cases
        self._scores: list[Tensor] = []
        self._truth: list[Tensor] = []
        self._cases: Batch | None = None
        self._written = 0  # the last epoch of which pictures were

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the layout of the charts and look up the fixed cases."""
        logger = _logger(trainer)
        if logger is not None:
            write_layout(logger)
            self._cases = fixed_cases(trainer.datamodule, self.cases)  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Forget the last epoch, also where this one will have no validation."""
        self._scores, self._truth = [], []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Write the augmented images of an epoch's first batch as the network gets them."""
        logger = _logger(trainer)
        if batch_idx or logger is None or not self._due(trainer) or batch.stage > 0:
            return
        view = batch.x[: self.images].float().cpu() * pl_module.preprocess.sd + pl_module.preprocess.mean
        grid = make_grid(view.clamp(0, 1), nrow=8)
        logger.experiment.add_image("images/train_batch", grid, trainer.current_epoch + 1)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch's probabilities."""
        self._scores.append(pl_module.probabilities(outputs))
        self._truth.append(batch.y)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the epoch's pictures.

        Here and not after validation: there, a nan would meet `decide` before `FiniteCheck`, and Lightning's inference
        mode forbids the gradients that Grad-CAM needs.
        """
        if self._due(trainer):
            self._write(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the last epoch's pictures: that it was the last, early stopping decides behind all other callbacks."""
        if self._written != trainer.current_epoch:  # by now the number of epochs
            self._write(trainer, pl_module, trainer.current_epoch)

    def _write(self, trainer: pl.Trainer, pl_module: Any, epoch: int) -> None:
        logger = _logger(trainer)
        if logger is None:
            return
        task, writer, self._written = pl_module.task, logger.experiment, epoch
        if self._scores:
            scores, truth = torch.cat(self._scores).cpu().numpy(), torch.cat(self._truth).cpu().numpy()
            counts = confusion(truth, decide(scores, task), len(task.classes))
            figure = confusion_matrix(counts, task.classes, f"validation, epoch {epoch}")
            figure.set_size_inches(*(_CARD * figure.get_size_inches()))
            writer.add_figure("confusion_matrix/val", figure, epoch)
            targets = positives(truth, task)
            for k, name in enumerate(task.classes):
                if 0 < targets[:, k].sum() < len(truth):  # else there is no such curve
                    writer.add_pr_curve(f"pr/val/{name}", targets[:, k], scores[:, k], epoch)
        if self._cases is not None:
            writer.add_figure("grad_cam/val", grad_cam_panel(pl_module, self._cases, epoch), epoch)

    def _due(self, trainer: pl.Trainer) -> bool:
        return trainer.current_epoch % self.every == 0


def fixed_cases(data: Radiographs, cases: int) -> Batch:
    """The canvases and classes of `cases` validation images per class, fewer where there are no more, class by class.

    The first ones in path order, each of a patient of its own, whatever features `data` serves.
    """
    part = data.table[data.table["split"] == "val"].reset_index(drop=True).drop_duplicates("patient_id")
    places = [k for name in data.task.classes for k in part.index[part["label"] == name][:cases]]
    return data.dataset("val")[places]


def grad_cam_panel(classifier: Any, cases: Batch, epoch: int) -> Figure:
    """Each case as the network sees it, its Grad-CAM for its true class over it, and the probability of that class.

    cases: class by class; a row for each class. The map is the lighter and the less transparent the higher it is.
    Six images of 224 pixels through a ResNet18 took 0.52 s of one CPU core: 0.17 s the maps, 0.15 s the scores, 0.20 s
    the drawing.
    """
    # Not the classifier's own scorer(): that leaves the network in eval mode.
    scorer = Scorer(classifier.task, classifier.net, classifier.preprocess)
    maps = grad_cam(scorer, cases.x, cases.y)
    with evaluating(scorer), torch.no_grad():
        seen = scorer.prepare(cases.x.to(scorer.device))
        scores = scorer.probabilities(scorer.net(seen)).double().cpu().numpy()
    views = (seen[:, 0] * scorer.preprocess.sd + scorer.preprocess.mean).clamp(0, 1).cpu().numpy()
    truth, decided = cases.y.numpy(), decide(scores, scorer.task)
    classes, columns = scorer.task.classes, int(np.bincount(truth).max())
    figure = Figure(figsize=(0.25 + 1.75 * columns, 0.3 + 2 * len(classes)), facecolor="white")
    grid = figure.subplots(len(classes), columns, squeeze=False)
    # By hand, for a layout engine takes as long as the maps: caption and image are 2 inches high, a row's name 0.25.
    high, wide = figure.get_figheight(), figure.get_figwidth()
    figure.subplots_adjust(0.25 / wide, 0.02 / high, 1 - 0.02 / wide, 1 - 0.52 / high, wspace=0.03, hspace=0.16)
    figure.suptitle(f"Grad-CAM of the true class, epoch {epoch}", fontsize=10, color=INK, y=1 - 0.06 / high, va="top")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, name in zip(grid[:, 0], classes, strict=True):
        axes.set_ylabel(name, fontsize=10, color=INK)
    for k, (view, heat) in enumerate(zip(views, maps, strict=True)):
        axes = grid[truth[k], int((truth[:k] == truth[k]).sum())]
        axes.imshow(view, cmap="gray", vmin=0, vmax=1)
        axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.6 * heat)
        wrong = "" if decided[k] == truth[k] else f", called {classes[decided[k]]}"
        axes.set_title(f"p {scores[k, truth[k]]:.2f}{wrong}", fontsize=9, pad=3, color=_WRONG if wrong else INK)
        if heat.max() == 0:
            axes.text(0.5, 0.04, "nothing positive", transform=axes.transAxes, ha="center", fontsize=9, color="white")
    return figure


def _logger(trainer: pl.Trainer) -> TensorBoardLogger | None:
    """The run's TensorBoard, or None where nothing is to be written."""
    if not trainer.is_global_zero or trainer.sanity_checking:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
