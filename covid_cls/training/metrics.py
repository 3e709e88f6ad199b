"""An epoch's numbers while it trains: kept per step, computed once, by torchmetrics."""

import torch
import torchmetrics.classification as tm
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from covid_cls.labels import Task
from covid_cls.models.losses import probabilities

_MULTICLASS = (tm.MulticlassAUROC, tm.MulticlassRecall, tm.MulticlassF1Score, tm.MulticlassAccuracy)
_MULTILABEL = (tm.MultilabelAUROC, tm.MultilabelRecall, tm.MultilabelF1Score, tm.MultilabelAccuracy)


class EpochMetrics(nn.Module):
    """Loss, accuracy, AUROC, sensitivity and F1 of an epoch; float32 probabilities go in, whatever the precision.

    Softmax tasks: accuracy is the share of images whose most probable class is right. Multi-label: label-wise
    accuracy at 0.5 over N x C, and everything per class is against its own 0/1 target. Macro: mean over classes.
    Over several processes: of all of their images, and equal in each.

    image_weights: by which a mean loss divides, of one image of each class (C,); the loss is then the epoch's own mean,
    however its images were batched.
    """

    targets: Tensor
    image_weights: Tensor

    def __init__(self, task: Task, image_weights: Tensor) -> None:
        super().__init__()
        self.task = task
        size = len(task.classes)
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.loss = MeanMetric()
        self.register_buffer("targets", torch.tensor(task.targets), persistent=False)
        self.register_buffer("image_weights", image_weights.clone(), persistent=False)
        auroc, recall, f1, accuracy = _MULTILABEL if task.multilabel else _MULTICLASS
        # validate_args=False: checking what cannot be wrong here would make a GPU wait at every step
        self.scores = MetricCollection(
            {
                "auroc": auroc(size, average=None, validate_args=False),
                "sensitivity": recall(size, average=None, validate_args=False),
                "f1": f1(size, average=None, validate_args=False),
                "accuracy": accuracy(size, average="micro", validate_args=False),
            }
        )

    def update(self, logits: Tensor, y: Tensor, loss: Tensor) -> None:
        """Take note of a batch: logits (N, C), class indices (N,), its mean loss; N may be 0."""
        # Tensors as they are: an update of the metrics at each step takes 0.7 ms, half of a step on cached features.
        self._seen.append((logits.detach(), y, loss.detach()))

    def reset(self) -> None:
        """Forget what was noted."""
        self._seen = []
        self.loss.reset()
        self.scores.reset()

    def scalars(self, split: str) -> dict[str, Tensor]:
        """`loss/<split>`, `auroc/<split>` (macro) and `auroc/<split>/<class>` and the like, of the batches noted."""
        logits, y, losses = zip(*self._seen, strict=True)
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
