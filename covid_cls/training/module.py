"""The LightningModule: from batches of uint8 images to the loss and to the metrics of each epoch."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torchmetrics.classification as tm
from torch import Tensor, distributed, nn
from torchmetrics import MeanMetric, MetricCollection

from covid_cls.io import Batch
from covid_cls.models.backbones import apply_strategy, build_network
from covid_cls.models.inference import Prefix, Scorer
from covid_cls.models.losses import build_loss, prior_bias, probabilities
from covid_cls.models.transforms import Augment, Preprocess
from covid_cls.tasks import TASKS, Task
from covid_cls.training.optimizers import build_optimizer, build_scheduler
from covid_cls.training.settings import Head

_MULTICLASS = (tm.MulticlassAUROC, tm.MulticlassRecall, tm.MulticlassF1Score, tm.MulticlassAccuracy)
_MULTILABEL = (tm.MultilabelAUROC, tm.MultilabelRecall, tm.MultilabelF1Score, tm.MultilabelAccuracy)


class Classifier(pl.LightningModule):
    """A radiograph classifier with its preprocessing, augmentation, loss, optimizer and schedule.

    All arguments are plain values, so that a checkpoint alone rebuilds the classifier. See conf/ for the sections.

    Args:
        task: Name of the task.
        backbone: Name of the backbone.
        strategy: Section of the configuration.
        head: Section of the configuration.
        loss: Section of the configuration.
        preprocess: Section of the configuration.
        augment: Section of the configuration.
        optimizer: Section of the configuration.
        scheduler: Section of the configuration.
        class_counts: Training images per class, in the order of the task's classes.
        seed: Random seed of the augmentation and of dropout.

    Attributes:
        pretrained_stages: Stages with pretrained weights, for which the optimizer uses a smaller rate. Set it before
            `fit`.
        prefix: Computes the frozen stages during `fit`; None runs the stages themselves.
        run_stages: `net.run`, or a compiled version of it.
    """

    def __init__(
        self,
        *,
        task: str,
        backbone: str,
        strategy: dict[str, Any],
        head: dict[str, Any],
        loss: dict[str, Any],
        preprocess: dict[str, Any],
        augment: dict[str, Any],
        optimizer: dict[str, Any],
        scheduler: dict[str, Any],
        class_counts: list[int],
        seed: int,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.task, self.seed = TASKS[task], seed
        layers = Head(**head)
        self.net = build_network(backbone, len(self.task.classes), layers.hidden, layers.dropout)
        apply_strategy(self.net, **strategy)
        # This memory format is 1.3 to 1.5 times as fast on CPU and GPU.
        self.net.to(memory_format=torch.channels_last)
        self.preprocess = Preprocess(**preprocess)
        self.augment = Augment(**augment)
        self.criterion = build_loss(loss, self.task, class_counts)
        if layers.prior_bias:
            bias = torch.tensor(prior_bias(self.task, class_counts))
            self.net.get_submodule("head.out").bias = nn.Parameter(bias)
        self.train_metrics = EpochMetrics(self.task, self.criterion.image_weights)
        self.val_metrics = EpochMetrics(self.task, self.criterion.image_weights)
        self.pretrained_stages: tuple[str, ...] = ()
        self.prefix: Prefix | None = None
        self.run_stages: Callable[..., Tensor] = self.net.run

    def scorer(self) -> Scorer:
        """Return the network with its preprocessing in eval mode; it shares the weights of this classifier."""
        return Scorer(self.task, self.net, self.preprocess).eval()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return float32 probabilities (N, classes); they sum to one unless the task is multi-label."""
        return probabilities(logits, self.task.multilabel)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move the images and classes of a batch to `device`."""
        # The index stays on the host, where augmentation needs it; copying it back would make the GPU wait.
        return batch._replace(x=batch.x.to(device, non_blocking=True), y=batch.y.to(device, non_blocking=True))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Return the network's input: augmented in training, otherwise the centre crop. Features are not changed."""
        if batch.stage > 0:
            return batch
        if self.training and self.augment.random and len(batch.y):
            view = self.augment(batch.x, batch.index, self.preprocess.crop, self.seed, self.current_epoch)
        else:
            view = self.preprocess.centre(batch.x)
        return batch._replace(x=self.preprocess.normalise(view))

    def on_train_epoch_start(self) -> None:
        """Seed the global generator, which dropout uses, so that a resumed epoch repeats the original."""
        # Each process of a distributed run gets its own seed, or images of one batch would share dropout masks.
        torch.manual_seed(self.seed + self.current_epoch + 1_000_003 * self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch, scaled so that DDP's average is the mean over all processes' images."""
        logits = self._logits(batch)
        loss = self._loss(logits, batch.y)
        self.train_metrics.update(logits, batch.y, loss)
        # Some builds of torch have no distributed module.
        if distributed.is_available() and distributed.is_initialized():
            loss = loss * self._loss_scale(batch.y)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Discard the batches of an epoch that an exception has ended."""
        self.val_metrics.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to the epoch's metrics, and return its logits."""
        logits = self._logits(batch)
        self.val_metrics.update(logits, batch.y, self._loss(logits, batch.y))
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics of the epoch."""
        self.log_dict(self.val_metrics.scalars("val"))

    def epoch_scalars(self) -> dict[str, Tensor]:
        """Return the training metrics since the last call."""
        scalars = self.train_metrics.scalars("train")
        self.train_metrics.reset()
        return scalars

    def configure_optimizers(self) -> Any:
        """Return the optimizer over exactly the trainable tensors, with its schedule."""
        hparams: Any = self.hparams
        optimizer = build_optimizer(self.net, self.pretrained_stages, **hparams.optimizer)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_scheduler(optimizer, steps, self.trainer.max_epochs or 1, **hparams.scheduler)
        return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule}

    def _logits(self, batch: Batch) -> Tensor:
        x, stage = batch.x, batch.stage
        if self.prefix is not None and stage == 0:
            x, stage = self.prefix(x), self.prefix.stop
        return self.run_stages(x, start=stage)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        # A process without a share in the batch needs a loss with gradients, which are all 0.
        loss: Tensor = self.criterion(logits, y) if len(y) else logits.float().sum()
        return loss

    def _loss_scale(self, y: Tensor) -> Tensor:
        # DDP averages the gradients of all processes with equal weights, however unequal their shares are.
        mine = self.train_metrics.image_weights[y].sum()
        total = mine.clone()
        distributed.all_reduce(total)
        return mine * distributed.get_world_size() / total


class EpochMetrics(nn.Module):
    """Loss, accuracy, AUROC, sensitivity and F1 of an epoch, from float32 probabilities whatever the precision.

    Softmax tasks: accuracy is the share of images whose most probable class is correct. Multi-label tasks: accuracy is
    the share of correct decisions at 0.5 among N x C, and the metrics of a class refer to its own 0/1 target. In a
    distributed run each process returns the metrics of all processes' images.

    Args:
        task: The classes.
        image_weights: What one image of each class adds to the divisor of the batch's mean loss, (C,). With it the
            epoch's loss does not depend on how the images were batched.
    """

    targets: Tensor
    image_weights: Tensor

    def __init__(self, task: Task, image_weights: Tensor) -> None:
        super().__init__()
        self.task = task
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self.loss = MeanMetric()
        self.register_buffer("targets", torch.tensor(task.targets), persistent=False)
        self.register_buffer("image_weights", image_weights.clone(), persistent=False)
        auroc, recall, f1, accuracy = _MULTILABEL if task.multilabel else _MULTICLASS
        size = len(task.classes)
        # Validation of the arguments would make a GPU wait, and they cannot be wrong here.
        self.scores = MetricCollection(
            {
                "auroc": auroc(size, average=None, validate_args=False),
                "sensitivity": recall(size, average=None, validate_args=False),
                "f1": f1(size, average=None, validate_args=False),
                "accuracy": accuracy(size, average="micro", validate_args=False),
            }
        )

    def update(self, logits: Tensor, y: Tensor, loss: Tensor) -> None:
        """Add a batch, which may be empty: logits (N, C), class indices (N,) and its mean loss."""
        # The metrics are computed at the end of the epoch: an update at each step takes 0.7 ms, half of a step on
        # cached features.
        self._batches.append((logits.detach(), y, loss.detach()))

    def reset(self) -> None:
        """Forget all batches."""
        self._batches = []
        self.loss.reset()
        self.scores.reset()

    def scalars(self, split: str) -> dict[str, Tensor]:
        """Return the metrics of all batches as `<metric>/<split>` (macro averages) and `<metric>/<split>/<class>`."""
        logits, y, losses = zip(*self._batches, strict=True)
        self.loss.update(torch.stack(losses).float(), torch.stack([self.image_weights[batch].sum() for batch in y]))
        truth = torch.cat(y)
        scores = probabilities(torch.cat(logits), self.task.multilabel)
        self.scores.update(scores, self.targets[truth] if self.task.multilabel else truth)
        found = {f"loss/{split}": self.loss.compute()}
        for name, value in self.scores.compute().items():
            found[f"{name}/{split}"] = value.mean()
            if value.ndim:
                found.update({f"{name}/{split}/{c}": v for c, v in zip(self.task.classes, value, strict=True)})
        return found
