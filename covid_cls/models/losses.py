"""Training losses: the registry that `loss.name` selects from, cross-entropy and focal loss, class weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covid_cls.errors import InputError, listed
from covid_cls.tasks import Task

Weighting = str | Sequence[float] | None


class Loss(nn.Module):
    """Base class of the losses: `forward` maps logits (N, C) and class indices (N,) to a float32 scalar.

    The constructor of a subclass takes `task`, `class_counts` and, after a `/`, the settings of the section `loss`.

    Args:
        task: Gives the classes, and whether an image can carry several labels.
        class_counts: Training images per class, in the order of the task's classes.
        weights: One weight per class, kept in the attribute `weights`.

    Attributes:
        weighting: Name of the setting that weights the classes; None if the loss has none.
        targets: Row k is the 0/1 target vector of class k, float32 (C, C).
    """

    weighting: ClassVar[str | None] = None
    targets: Tensor
    weights: Tensor | None

    def __init__(self, task: Task, class_counts: Sequence[int], /, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.multilabel = task.multilabel
        # Buffers move to the GPU with the module, are never trained, and stay out of checkpoints: the settings and the
        # class counts in a checkpoint's hyper-parameters give them again.
        self.register_buffer("weights", None if weights is None else torch.tensor(weights), persistent=False)
        self.register_buffer("targets", torch.tensor(task.targets, dtype=torch.float32), persistent=False)

    @property
    def image_weights(self) -> Tensor:
        """Return what one image of each class adds to the divisor of the batch mean, (C,)."""
        # With these weights, the mean over batches or processes of unequal size is the mean over all of their images.
        return torch.ones(len(self.targets))


LOSSES: dict[str, type[Loss]] = {}


def register_loss(name: str) -> Callable[[type[Loss]], type[Loss]]:
    """Return a decorator that makes a subclass of `Loss` selectable by loss.name=<name>; see docs/your-loss.md."""

    def register(loss: type[Loss]) -> type[Loss]:
        LOSSES[name] = loss
        return loss

    return register


def build_loss(settings: Mapping[str, Any], task: Task, class_counts: Sequence[int]) -> Loss:
    """Return the training loss for the section `loss` of a configuration.

    Raises:
        InputError: `loss.name` is unknown, or a value is out of range.
    """
    name, options = settings["name"], {key: value for key, value in settings.items() if key != "name"}
    if name not in LOSSES:
        raise InputError(f"loss.name={name}: unknown; choose one of {listed(list(LOSSES))}, or see docs/your-loss.md")
    return LOSSES[name](task, class_counts, **options)


def check_weighting(settings: Mapping[str, Any], sampler: str) -> None:
    """Raise InputError if both the loss and `data.sampler` compensate for unequal class frequencies."""
    key = LOSSES[settings["name"]].weighting
    if key and settings.get(key) is not None and sampler != "shuffle":
        raise InputError(
            f"loss.{key}={settings[key]} and data.sampler={sampler}: each of these balances the classes alone; "
            "together they count a rare class several times. Keep one of them"
        )


@register_loss("ce")
class CrossEntropy(Loss):
    """Cross-entropy, or binary cross-entropy if an image can carry several labels.

    Args:
        class_weights: None, "inverse_frequency", "class_balanced" (Cui et al. 2019, with `beta`) or a list. Softmax:
            the weights of the first two sum to C. Sigmoid: weights apply to a label's positives only, and
            "inverse_frequency" is negatives / positives.
        beta: In [0, 1); 0 weights all classes equally.
    """

    weighting = "class_weights"

    def __init__(
        self, task: Task, class_counts: Sequence[int], /, class_weights: Weighting = None, beta: float = 0.999
    ) -> None:
        counts, weights = positives_per_label(task, class_counts), None
        if class_weights == "class_balanced":
            weights = class_balanced(counts, beta)
        elif class_weights == "inverse_frequency" and task.multilabel:
            weights = [(sum(class_counts) - n) / n for n in counts]
        elif class_weights == "inverse_frequency":
            weights = inverse_frequency(counts, len(counts))
        elif class_weights is not None:
            options = "inverse_frequency or class_balanced"
            weights = _listed_weights("loss.class_weights", class_weights, len(counts), options)
        super().__init__(task, class_counts, weights)

    @property
    def image_weights(self) -> Tensor:
        """Return the class weights, (C,): torch divides softmax cross-entropy by the sum of the images' weights."""
        return super().image_weights if self.weights is None or self.multilabel else self.weights

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of logits (N, C) for class indices (N,)."""
        # Mixed precision gives bfloat16 logits, whose 8 significant bits are too few for a mean loss.
        if self.multilabel:
            return F.binary_cross_entropy_with_logits(logits.float(), self.targets[y], pos_weight=self.weights)
        return F.cross_entropy(logits.float(), y, weight=self.weights)


@register_loss("focal")
class FocalLoss(Loss):
    """Focal loss; see `softmax_focal_loss`, and `sigmoid_focal_loss` if an image can carry several labels.

    Args:
        gamma: At least 0; 0 is cross-entropy.
        alpha: None, a list, or "inverse_frequency" (sums to C for softmax, to 1 for sigmoid).
    """

    weighting = "alpha"

    def __init__(self, task: Task, class_counts: Sequence[int], /, gamma: float = 0.0, alpha: Weighting = None) -> None:
        if not 0 <= gamma < math.inf:
            raise InputError(f"loss.gamma={gamma}: must be at least 0; 0 is cross-entropy")
        counts, weights = positives_per_label(task, class_counts), None
        if alpha == "inverse_frequency":
            weights = inverse_frequency(counts, 1.0 if task.multilabel else len(counts))
        elif alpha is not None:
            weights = _listed_weights("loss.alpha", alpha, len(counts), "inverse_frequency")
            if task.multilabel and max(weights) > 1:
                raise InputError(f"loss.alpha={alpha}: must be in [0, 1] for sigmoids, because negatives get 1 - alpha")
        super().__init__(task, class_counts, weights)
        self.gamma = float(gamma)

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of logits (N, C) for class indices (N,)."""
        if self.multilabel:
            return sigmoid_focal_loss(logits, self.targets[y], self.gamma, self.weights)
        return softmax_focal_loss(logits, y, self.gamma, self.weights)


def softmax_focal_loss(logits: Tensor, y: Tensor, gamma: float, alpha: Tensor | None = None) -> Tensor:
    """Return the mean of -alpha[y] (1 - p_y)^gamma log p_y, float32.

    Lin et al. 2017, "Focal Loss for Dense Object Detection", extended from two classes to C. The mean divides by N and
    not by the sum of the alphas, unlike `cross_entropy(weight=...)`.

    Args:
        logits: (N, C), with at least two classes.
        y: Class indices, int64 (N,).
        gamma: At least 0; 0 without alpha is cross-entropy.
        alpha: Weights per class, (C,); None weights all by 1.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    chosen = y[:, None]
    loss = -log_p.gather(1, chosen).squeeze(1)
    if gamma:
        # log(1 - p_y) from the other classes' log-sum-exp keeps value and gradient finite for any logits: the gradient
        # of the power form is nan at p_y = 1 if gamma is below 1.
        log_rest = log_p.scatter(1, chosen, -math.inf).logsumexp(dim=1)
        loss = (gamma * log_rest).exp() * loss
    if alpha is not None:
        loss = alpha[y] * loss
    return loss.mean()


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, gamma: float, alpha: Tensor | None = None) -> Tensor:
    """Return the mean over N x C of -alpha_t (1 - p_t)^gamma log p_t, float32.

    p_t is the probability of the true state of a label. Lin et al. 2017, as `torchvision.ops.sigmoid_focal_loss`, but
    with one alpha per label and a gradient that is finite for every gamma.

    Args:
        logits: (N, C).
        targets: 0 or 1, (N, C).
        gamma: At least 0; 0 without alpha is binary cross-entropy.
        alpha: In [0, 1], (C,): weight of a label's positives, whose negatives get 1 - alpha; None weights both by 1.
    """
    signed = torch.where(targets > 0, logits.float(), -logits.float())
    loss = -F.logsigmoid(signed)
    if gamma:
        # logsigmoid(-s) is log(1 - p_t), again so that the gradient is finite.
        loss = (gamma * F.logsigmoid(-signed)).exp() * loss
    if alpha is not None:
        loss = torch.where(targets > 0, alpha, 1 - alpha) * loss
    return loss.mean()


def probabilities(logits: Tensor, multilabel: bool) -> Tensor:
    """Return float32 probabilities of logits (N, C): one sigmoid per label, or a softmax over the classes."""
    return logits.float().sigmoid() if multilabel else logits.float().softmax(dim=1)


def positives_per_label(task: Task, class_counts: Sequence[int]) -> list[int]:
    """Return the number of positive images per label; a multi-label COVID image counts as pneumonia, too."""
    return [
        sum(n * row[k] for n, row in zip(class_counts, task.targets, strict=True)) for k in range(len(class_counts))
    ]


def inverse_frequency(counts: Sequence[int], total: float) -> list[float]:
    """Return weights proportional to 1 / count that sum to `total`."""
    return _scaled([1 / n for n in counts], total)


def class_balanced(counts: Sequence[int], beta: float) -> list[float]:
    """Return weights proportional to (1 - beta) / (1 - beta^count) that sum to the number of classes.

    Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples".

    Raises:
        InputError: `beta` is not in [0, 1).
    """
    if not 0 <= beta < 1:
        raise InputError(f"loss.beta={beta}: must be at least 0 and below 1")
    return _scaled([(1 - beta) / (1 - beta**n) for n in counts], len(counts))


def prior_bias(task: Task, class_counts: Sequence[int]) -> list[float]:
    """Return the last layer's bias with which an untrained network predicts the class frequencies.

    Softmax: log(count / images); sigmoid: log(p / (1 - p)) with p = positives / images. Lin et al. 2017, section 3.3.
    """
    shares = [n / sum(class_counts) for n in positives_per_label(task, class_counts)]
    return [-math.log((1 - p) / p) if task.multilabel else math.log(p) for p in shares]


def _listed_weights(key: str, given: str | Sequence[float], size: int, options: str) -> list[float]:
    # A string is a sequence, too: "abc" would count as three weights.
    numbers = not isinstance(given, str) and all(isinstance(w, int | float) and 0 <= w < math.inf for w in given)
    if not numbers or len(given) != size:
        raise InputError(f"{key}={given}: must be null, {options}, or a list of {size} numbers, none below 0")
    return [float(w) for w in given]


def _scaled(values: Sequence[float], total: float) -> list[float]:
    return [v * total / sum(values) for v in values]
