"""What a run writes to TensorBoard: charts, images, PR curves and a row of hyperparameters."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from torch import Tensor
from torchvision.utils import make_grid

from covid_cls.attribution.maps import evaluating, grad_cam
from covid_cls.data.datamodule import Radiographs
from covid_cls.evaluation.metrics import confusion, decide, positives
from covid_cls.io import Batch
from covid_cls.models.inference import Scorer
from covid_cls.models.names import loss_label, strategy_label
from covid_cls.reporting.figures import confusion_matrix
from covid_cls.reporting.style import INK, WRONG

# Charts of the Custom Scalars tab, each with a curve per selected run. Tags are regular expressions, matched from the
# start. TensorBoard merges the layouts of many runs only if they are equal, so they must not depend on the task.
_CHARTS = {
    "validation": {
        "loss": ["loss/val$"],
        "AUROC, mean over classes": ["auroc/val$"],
        "AUROC of covid": ["auroc/val/covid$"],
        "accuracy": ["accuracy/val$"],
        "F1, mean over classes": ["f1/val$"],
        "sensitivity to covid": ["sensitivity/val/covid$"],
    },
    "generalisation": {
        f"{shown}: training and validation": [f"{name}/train$", f"{name}/val$"]
        for name, shown in (("loss", "loss"), ("auroc", "AUROC"), ("accuracy", "accuracy"))
    },
    "running": {
        "learning rates: head and pretrained backbone": ["lr/head$", "lr/backbone$"],
        "speed: images per second": ["speed/images_per_second$"],
    },
}
# Scores of the HParams tab by tag, with their display names. By default the tab shows the first five.
_BEST_SCORES = {
    "loss/val": "loss",
    "auroc/val": "AUROC",
    "accuracy/val": "accuracy",
    "f1/val": "F1",
    "sensitivity/val/covid": "covid sensitivity",
}


# A figure fills a card of the Images tab when it is drawn at this share of its usual size; its text keeps its size.
_CARD_SCALE = 0.7


class EpochImages(Callback):
    """Write what the network predicts and attends to on validation, every `every` epochs and after the last one.

    Written are the confusion matrix and a PR curve per class; the first augmented training images; and Grad-CAM of
    fixed validation images, see `fixed_cases`. Steps are epochs, counted from 1. In a distributed run, only the images
    of the first process are used. Training is not affected: no random number is drawn, and no weight, gradient or
    module mode is changed.

    Args:
        every: Number of epochs from one set of pictures to the next.
        images: Number of training images to show.
        cases: Number of validation images per class for Grad-CAM.
    """

    def __init__(self, every: int = 5, images: int = 16, cases: int = 2) -> None:
        self.every, self.images, self.cases = every, images, cases
        self._scores: list[Tensor] = []
        self._truth: list[Tensor] = []
        self._cases: Batch | None = None
        self._last_written = 0  # number of the last epoch with pictures

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the layout of the charts and select the fixed cases."""
        logger = _logger(trainer)
        if logger is not None:
            write_layout(logger)
            self._cases = fixed_cases(trainer.datamodule, self.cases)  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Forget the scores of the last epoch."""
        # Not at the start of validation, which an epoch may not have: its pictures would show the last one again.
        self._scores, self._truth = [], []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Write the augmented images of the first batch of an epoch as the network receives them."""
        logger = _logger(trainer)
        if batch_idx or logger is None or not self._due(trainer) or batch.stage > 0:
            return
        view = batch.x[: self.images].float().cpu() * pl_module.preprocess.sd + pl_module.preprocess.mean
        grid = make_grid(view.clamp(0, 1), nrow=8)
        logger.experiment.add_image("images/train_batch", grid, trainer.current_epoch + 1)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the probabilities of the batch."""
        self._scores.append(pl_module.probabilities(outputs))
        self._truth.append(batch.y)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the pictures of the epoch."""
        # Not at the end of validation: there, nan would reach `decide` before `FiniteCheck` stops the run, and
        # Lightning's inference mode forbids the gradients that Grad-CAM needs.
        if self._due(trainer):
            self._write(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the pictures of the last epoch."""
        # Early stopping decides after all other callbacks, so at the end of an epoch it is unknown whether it is the
        # last one. Here, current_epoch is already the number of epochs.
        if self._last_written != trainer.current_epoch:
            self._write(trainer, pl_module, trainer.current_epoch)

    def _write(self, trainer: pl.Trainer, pl_module: Any, epoch: int) -> None:
        logger = _logger(trainer)
        if logger is None:
            return
        task, writer, self._last_written = pl_module.task, logger.experiment, epoch
        if self._scores:
            scores, truth = torch.cat(self._scores).cpu().numpy(), torch.cat(self._truth).cpu().numpy()
            counts = confusion(truth, decide(scores, task), len(task.classes))
            figure = confusion_matrix(counts, task.classes, f"validation, epoch {epoch}")
            figure.set_size_inches(*(_CARD_SCALE * figure.get_size_inches()))
            writer.add_figure("confusion_matrix/val", figure, epoch)
            targets = positives(truth, task)
            for k, name in enumerate(task.classes):
                # A PR curve needs positive and negative images.
                if 0 < targets[:, k].sum() < len(truth):
                    writer.add_pr_curve(f"pr/val/{name}", targets[:, k], scores[:, k], epoch)
        if self._cases is not None:
            writer.add_figure("grad_cam/val", grad_cam_panel(pl_module, self._cases, epoch), epoch)

    def _due(self, trainer: pl.Trainer) -> bool:
        return trainer.current_epoch % self.every == 0


def _logger(trainer: pl.Trainer) -> TensorBoardLogger | None:
    """Return the TensorBoard logger of the run, or None if nothing is to be written."""
    if not trainer.is_global_zero or trainer.sanity_checking:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def fixed_cases(data: Radiographs, cases: int) -> Batch:
    """Return the canvases and classes of at most `cases` validation images per class, class by class.

    They are the first images in path order, each from a different patient. It does not matter whether `data` serves
    features in place of images.
    """
    part = data.table[data.table["split"] == "val"].reset_index(drop=True).drop_duplicates("patient_id")
    rows = [k for name in data.task.classes for k in part.index[part["label"] == name][:cases]]
    return data.dataset("val")[rows]


def grad_cam_panel(classifier: Any, cases: Batch, epoch: int) -> Figure:
    """Draw each case with its Grad-CAM for the true class over it and the probability of that class.

    Args:
        classifier: The classifier in training.
        cases: Images class by class, see `fixed_cases`. Each class is a row of the figure.
        epoch: Number for the title.
    """
    # Six images of 224 pixels through a ResNet18 take 0.52 s of a CPU core: maps 0.17, scores 0.15, drawing 0.20.
    # classifier.scorer() would leave the network in eval mode.
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
    # A layout engine would take as long as the maps. Per row: 2 inches of image and caption; class names: 0.25 inches.
    height, width = figure.get_figheight(), figure.get_figwidth()
    figure.subplots_adjust(0.25 / width, 0.02 / height, 1 - 0.02 / width, 1 - 0.52 / height, wspace=0.03, hspace=0.16)
    figure.suptitle(f"Grad-CAM of the true class, epoch {epoch}", fontsize=10, color=INK, y=1 - 0.06 / height, va="top")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, name in zip(grid[:, 0], classes, strict=True):
        axes.set_ylabel(name, fontsize=10, color=INK)
    for k, (view, heat) in enumerate(zip(views, maps, strict=True)):
        axes = grid[truth[k], int((truth[:k] == truth[k]).sum())]
        axes.imshow(view, cmap="gray", vmin=0, vmax=1)
        # The higher the map, the less transparent it is.
        axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.6 * heat)
        wrong = "" if decided[k] == truth[k] else f", called {classes[decided[k]]}"
        axes.set_title(f"p {scores[k, truth[k]]:.2f}{wrong}", fontsize=9, pad=3, color=WRONG if wrong else INK)
        if heat.max() == 0:
            axes.text(0.5, 0.04, "nothing positive", transform=axes.transAxes, ha="center", fontsize=9, color="white")
    return figure


def write_layout(logger: TensorBoardLogger) -> None:
    """Write the charts of the Custom Scalars tab, which are the same for every run."""
    charts = {kind: {title: ["Multiline", tags] for title, tags in rows.items()} for kind, rows in _CHARTS.items()}
    logger.experiment.add_custom_scalars(charts)


def write_hparams(logger: TensorBoardLogger, record: dict[str, Any], best: dict[str, float]) -> None:
    """Write the row of the run in the HParams tab: its main settings and the validation scores of the selected epoch.

    Call it once, at the end: a row written at the start shows no score, or the score of an earlier epoch.

    Args:
        logger: The TensorBoard logger of the run.
        record: Content of run.json.
        best: Metrics of the selected epoch, see `EpochHistory`. They also become scalars `best/...` at that epoch.
    """
    hparams = _hparams(record)
    # TensorBoard shows five columns by default: first those marked as differing, each group in alphabetical order.
    shown = {"task", "backbone", "strategy", "loss", "seed" if hparams["fold"] == "-" else "fold"}
    columns = [
        api_pb2.HParamInfo(
            name=name,
            type=api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64,
            differs=name in shown,
        )
        for name, value in hparams.items()
    ]
    tags = {tag: f"best/{tag.replace('/', '_')}" for tag in _BEST_SCORES}
    scores = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tags[tag]), display_name=f"{name} (val)")
        for tag, name in _BEST_SCORES.items()
    ]
    # The logger's log_hyperparams gives no group name. The tab would then label the row with the first letters of the
    # run's name, which all runs of a sweep share.
    start = SessionStartInfo(group_name=record["cell"].rpartition("-")[2])
    for name, value in hparams.items():
        setattr(start.hparams[name], "string_value" if isinstance(value, str) else "number_value", value)
    writer = logger.experiment
    for tag, content in (
        (metadata.EXPERIMENT_TAG, {"experiment": api_pb2.Experiment(hparam_infos=columns, metric_infos=scores)}),
        (metadata.SESSION_START_INFO_TAG, {"session_start_info": start}),
        (metadata.SESSION_END_INFO_TAG, {"session_end_info": SessionEndInfo(status=api_pb2.STATUS_SUCCESS)}),
    ):
        about = metadata.create_summary_metadata(HParamsPluginData(**content))
        value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
        writer._get_file_writer().add_summary(Summary(value=[value]))
    for tag in _BEST_SCORES:
        writer.add_scalar(tags[tag], best[tag], int(best["epoch"]) + 1)
    writer.flush()


def _hparams(record: dict[str, Any]) -> dict[str, str | float]:
    """Return the settings that identify a run. The names are the same for all runs: the tab reads them from one run."""
    config = record["config"]
    data = config["data"]
    return {
        "task": config["task"]["name"],
        "backbone": config["backbone"]["name"],
        "strategy": strategy_label(config["strategy"]),
        "loss": loss_label(config["loss"]),
        # As a number, TensorBoard would show it as 0.0000.
        "seed": str(config["seed"]),
        "fold": "-" if data["folds"] is None else str(data["fold"]),
        "split": f"by {data['group']}",
        "weights": record["weights"]["used"].rpartition("/")[2],
        "augment": config["augment"]["name"],
        "optimizer": config["optimizer"]["name"],
        "lr": float(config["optimizer"]["lr"]),
        "feature_cache": config["feature_cache"],
        "seen": config["preprocess"]["seen"],
    }
