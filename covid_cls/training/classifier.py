"""The only LightningModule: from uint8 canvases to a loss, and to the numbers of each epoch."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, distributed

from covid_cls.labels import TASKS
from covid_cls.models.backbones import build_network, freeze_depth
from covid_cls.models.losses import Criterion, prior_bias, probabilities
from covid_cls.models.prefix import Prefix
from covid_cls.models.scorer import Scorer
from covid_cls.models.transforms import Augment, Preprocess
from covid_cls.records import Batch
from covid_cls.training.metrics import EpochMetrics
from covid_cls.training.optim import build_optimizer, build_scheduler


class Classifier(pl.LightningModule):
    """A radiograph classifier with its preprocessing, loss and schedule; see conf/ for the values.

    Every argument is a plain str, number, bool, None, list or dict, so that a checkpoint alone rebuilds it.
    class_counts: training images per class. pretrained_stages: stages that start from loaded weights; set it after
    loading and before `fit`, for the optimizer slows only these down. prefix: computes the frozen stages while it is
    fitted; set after loading, too. run_stages: `net.run`, or a compiled form of it.
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
        self.task = TASKS[task]
        self.net = build_network(backbone, len(self.task.classes), head["hidden"], head["dropout"])
        self.net.freeze(freeze_depth(self.net, strategy["name"], strategy["freeze_until"]))
        self.net.to(memory_format=torch.channels_last)  # 1.3 to 1.5 times as fast on CPU and GPU
        self.preprocess = Preprocess(**preprocess)
        self.augment = Augment(**augment)
        targets, images = self.task.targets, sum(class_counts)
        positives = [sum(n * row[k] for n, row in zip(class_counts, targets, strict=True)) for k in range(len(targets))]
        self.criterion = Criterion(targets=targets, counts=positives, images=images, multilabel=self.multilabel, **loss)
        if head["prior_bias"]:
            bias = prior_bias(positives, images, self.multilabel)
            self.net.get_submodule("head.out").bias = torch.nn.Parameter(torch.tensor(bias))
        # Torch's weighted cross-entropy alone divides by the sum of the weights; the others divide by the images.
        weights = self.criterion.weights if self.criterion.name == "ce" and not self.multilabel else None
        image_weights = torch.ones(len(targets)) if weights is None else weights
        self.train_metrics = EpochMetrics(self.task, image_weights)
        self.val_metrics = EpochMetrics(self.task, image_weights)
        self.pretrained_stages: tuple[str, ...] = ()
        self.prefix: Prefix | None = None
        self.run_stages: Callable[..., Tensor] = self.net.run
        self.seed = seed

    @property
    def multilabel(self) -> bool:
        """Whether an image can carry several labels, so that each class has a sigmoid of its own."""
        return self.task.multilabel

    def scorer(self) -> Scorer:
        """The network with its preprocessing, sharing this one's weights, for scoring: in eval mode."""
        return Scorer(self.task, self.net, self.preprocess).eval()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The batch on `device`, but for its index: augmentation draws are looked up on the host, without a wait."""
        return batch._replace(x=batch.x.to(device, non_blocking=True), y=batch.y.to(device, non_blocking=True))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch as network input: augmented in training, centre-cropped otherwise; features pass untouched."""
        if batch.stage > 0:
            return batch
        if self.training and self.augment.random and len(batch.y):
            view = self.augment(batch.x, batch.index, self.preprocess.crop, self.seed, self.current_epoch)
        else:
            view = self.preprocess.centre(batch.x)
        return batch._replace(x=self.preprocess.normalise(view))

    def on_train_epoch_start(self) -> None:
        """Seed what is left to the global generator (dropout), so that a resumed epoch repeats the original."""
        torch.manual_seed(self.seed + self.current_epoch + 1_000_003 * self.global_rank)  # no mask twice in a batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The batch's mean loss; with several processes what they average to that of their shares together."""
        logits = self._logits(batch)
        loss = self._loss(logits, batch.y)
        self.train_metrics.update(logits, batch.y, loss)
        if distributed.is_available() and distributed.is_initialized():
            loss = loss * self._loss_scale(batch.y)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start counting from zero, also after an epoch that an exception cut short."""
        self.val_metrics.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The logits of the batch, which is counted in."""
        logits = self._logits(batch)
        self.val_metrics.update(logits, batch.y, self._loss(logits, batch.y))
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's validation numbers."""
        self.log_dict(self.val_metrics.scalars("val"))

    def epoch_scalars(self) -> dict[str, Tensor]:
        """The training numbers since the last call."""
        scalars = self.train_metrics.scalars("train")
        self.train_metrics.reset()
        return scalars

    def _logits(self, batch: Batch) -> Tensor:
        """Logits (N, classes) of a prepared batch, wherever it enters the network."""
        x, stage = batch.x, batch.stage
        if self.prefix is not None and stage == 0:
            x, stage = self.prefix(x), self.prefix.stop
        return self.run_stages(x, start=stage)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean loss, float32; of a process without a share in the batch 0, whose gradients are 0 as well."""
        loss: Tensor = self.criterion(logits, y) if len(y) else logits.float().sum()
        return loss

    def _loss_scale(self, y: Tensor) -> Tensor:
        """By what this process's mean loss is multiplied: DDP averages gradients, however unequal the shares are."""
        mine = self.train_metrics.image_weights[y].sum()
        total = mine.clone()
        distributed.all_reduce(total)
        return mine * distributed.get_world_size() / total

    def probabilities(self, logits: Tensor) -> Tensor:
        """Float32 probabilities (N, classes); they sum to one unless the task is multi-label."""
        return probabilities(logits, self.multilabel)

    def configure_optimizers(self) -> Any:
        """The optimizer over exactly the trainable tensors, with its schedule."""
        hparams: Any = self.hparams
        optimizer = build_optimizer(self.net, self.pretrained_stages, **hparams.optimizer)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_scheduler(optimizer, steps, self.trainer.max_epochs or 1, **hparams.scheduler)
        return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule, ours included, which need not be one of torch's classes."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(float(metric))
