"""Cross-entropy and focal loss in their softmax and sigmoid forms, and what class counts make of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covid_cls.errors import InputError, listed

LOSSES = ("ce", "focal")
Weighting = str | Sequence[float] | None


def softmax_focal_loss(logits: Tensor, y: Tensor, gamma: float, alpha: Tensor | None = None) -> Tensor:
    """Mean over N of -alpha[y] (1 - p_y)^gamma log p_y, float32.

    logits (N, C), C >= 2; y (N,) int64; alpha (C,) or None for ones; gamma >= 0, and gamma=0 without alpha is
    cross-entropy. The mean is plain: it does not divide by the sum of alphas, as `cross_entropy(weight=)` does.
    Lin et al. 2017, "Focal Loss for Dense Object Detection", carried from two classes to C.

    log(1 - p_y) comes from the other classes' log-sum-exp, so value and gradient stay finite for any finite logits
    and any gamma (the power form has a nan gradient at p_y = 1 for gamma < 1).
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    chosen = y[:, None]
    loss = -log_p.gather(1, chosen).squeeze(1)
    if gamma:
        log_rest = log_p.scatter(1, chosen, -math.inf).logsumexp(dim=1)
        loss = (gamma * log_rest).exp() * loss
    if alpha is not None:
        loss = alpha[y] * loss
    return loss.mean()


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, gamma: float, alpha: Tensor | None = None) -> Tensor:
    """Mean over N x C of -alpha_t (1 - p_t)^gamma log p_t, float32; p_t is the probability of the true state.

    logits (N, C); targets (N, C) of 0 and 1; alpha (C,) in [0, 1]: positives of label c count alpha[c], negatives
    1 - alpha[c]; None counts both once, and then gamma=0 is binary cross-entropy. Lin et al. 2017; the definition of
    `torchvision.ops.sigmoid_focal_loss` with one alpha per label and a gradient that is finite for every gamma.
    """
    signed = torch.where(targets > 0, logits.float(), -logits.float())
    loss = -F.logsigmoid(signed)
    if gamma:
        loss = (gamma * F.logsigmoid(-signed)).exp() * loss
    if alpha is not None:
        loss = torch.where(targets > 0, alpha, 1 - alpha) * loss
    return loss.mean()


def probabilities(logits: Tensor, multilabel: bool) -> Tensor:
    """Float32 probabilities of logits (N, C): one sigmoid per label, or a softmax over the classes."""
    return logits.float().sigmoid() if multilabel else logits.float().softmax(dim=1)


def inverse_frequency(counts: Sequence[int], total: float) -> list[float]:
    """Weights proportional to 1 / count that sum to `total`."""
    return _scaled([1 / n for n in counts], total)


def class_balanced(counts: Sequence[int], beta: float) -> list[float]:
    """Weights proportional to (1 - beta) / (1 - beta^count) that sum to the number of classes (Cui et al. 2019)."""
    if not 0 <= beta < 1:
        raise InputError(f"loss.beta={beta}: must lie in [0, 1)")
    return _scaled([(1 - beta) / (1 - beta**n) for n in counts], len(counts))


def prior_bias(counts: Sequence[int], images: int, multilabel: bool) -> list[float]:
    """The last layer's bias that makes an untrained network predict the training split's class frequencies.

    Softmax: log(count / images); sigmoid: -log((1 - p) / p), p = positives / images. Lin et al. 2017, section 3.3.
    """
    shares = [n / images for n in counts]
    return [-math.log((1 - p) / p) if multilabel else math.log(p) for p in shares]


def check_weighting(loss: Mapping[str, Any], sampler: str) -> None:
    """InputError where more than one of class weights, focal alpha and balanced sampler is asked for."""
    asked = [f"loss.{key}={loss[key]}" for key in ("class_weights", "alpha") if loss.get(key) is not None]
    asked += [] if sampler == "shuffle" else [f"data.sampler={sampler}"]
    if len(asked) > 1:
        raise InputError(
            f"{' and '.join(asked)}: each of these evens the classes out by itself; together they count a rare class "
            "several times over. Keep one"
        )


class Criterion(nn.Module):
    """The training loss of a task: logits (N, C) and class indices (N,) to a float32 scalar.

    name="ce": cross-entropy, or binary cross-entropy where an image can carry several labels. `class_weights` may be
    None, a list, "inverse_frequency" or "class_balanced" (with `beta`). Softmax: the weights sum to C and the mean
    divides by the batch's sum of weights (torch's rule). Sigmoid: they weigh a label's positives only, and
    "inverse_frequency" is negatives / positives.
    name="focal": see `softmax_focal_loss` and `sigmoid_focal_loss`; `alpha` may be None, a list or
    "inverse_frequency" (sum C for softmax, sum 1 for sigmoid).

    targets: row k is the 0/1 target vector of class k. counts: images (softmax) or positives (sigmoid) per label in
    the training split, `images` of them in all. Every weight is a buffer: nothing of the loss is ever trained.
    """

    weights: Tensor | None
    targets: Tensor

    def __init__(
        self,
        name: str,
        targets: Sequence[Sequence[int]],
        counts: Sequence[int],
        images: int,
        multilabel: bool = False,
        *,
        gamma: float = 0.0,
        alpha: Weighting = None,
        class_weights: Weighting = None,
        beta: float = 0.999,
    ) -> None:
        super().__init__()
        if name not in LOSSES:
            raise InputError(f"loss.name={name}: unknown; one of {listed(LOSSES)}")
        if not 0 <= gamma < math.inf:
            raise InputError(f"loss.gamma={gamma}: must be at least 0; 0 is cross-entropy")
        for key, value, at_home in (("class_weights", class_weights, "ce"), ("alpha", alpha, "focal")):
            if value is not None and name != at_home:
                raise InputError(f"loss.{key} does nothing with loss.name={name}; leave it out")
        self.name, self.multilabel, self.gamma = name, multilabel, float(gamma)
        if name == "focal":
            weights = _alpha(alpha, counts, multilabel)
        else:
            weights = _class_weights(class_weights, counts, images, multilabel, beta)
        self.register_buffer("weights", None if weights is None else torch.tensor(weights), persistent=False)
        self.register_buffer("targets", torch.tensor(targets, dtype=torch.float32), persistent=False)

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """The scalar loss of logits (N, C) against class indices (N,)."""
        if self.multilabel:
            targets = self.targets[y]
            if self.name == "focal":
                return sigmoid_focal_loss(logits, targets, self.gamma, self.weights)
            return F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=self.weights)
        if self.name == "focal":
            return softmax_focal_loss(logits, y, self.gamma, self.weights)
        return F.cross_entropy(logits.float(), y, weight=self.weights)


def _alpha(spec: Weighting, counts: Sequence[int], multilabel: bool) -> list[float] | None:
    if spec is None:
        return None
    if spec == "inverse_frequency":
        return inverse_frequency(counts, total=1.0 if multilabel else len(counts))
    alpha = _listed_weights("loss.alpha", spec, len(counts), "inverse_frequency")
    if multilabel and any(a > 1 for a in alpha):
        raise InputError(f"loss.alpha={alpha}: a sigmoid focal loss needs values in [0, 1]; negatives count 1 - alpha")
    return alpha


def _class_weights(
    spec: Weighting, counts: Sequence[int], images: int, multilabel: bool, beta: float
) -> list[float] | None:
    if spec is None:
        return None
    if spec == "inverse_frequency":
        return [(images - n) / n for n in counts] if multilabel else inverse_frequency(counts, len(counts))
    if spec == "class_balanced":
        return class_balanced(counts, beta)
    return _listed_weights("loss.class_weights", spec, len(counts), "inverse_frequency or class_balanced")


def _listed_weights(key: str, spec: str | Sequence[float], size: int, words: str) -> list[float]:
    numbers = not isinstance(spec, str) and all(isinstance(w, int | float) and 0 <= w < math.inf for w in spec)
    if not numbers or len(spec) != size:
        raise InputError(f"{key}={spec}: give null, {words}, or a list of {size} numbers, none below 0")
    return [float(w) for w in spec]


def _scaled(values: Sequence[float], total: float) -> list[float]:
    return [v * total / sum(values) for v in values]
