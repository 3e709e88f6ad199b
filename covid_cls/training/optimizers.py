"""Optimizers over the trainable tensors, and the schedules of their learning rates."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from covid_cls.errors import InputError, listed
from covid_cls.models.backbones import Staged

OPTIMIZERS = ("sgd", "adamw")
SCHEDULERS = ("cosine", "step", "plateau", "raise_on_plateau", "none")


def build_optimizer(
    network: Staged,
    pretrained_stages: Sequence[str],
    /,
    *,
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    backbone_lr_scale: float = 1.0,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> Optimizer:
    """Return an optimizer over exactly the trainable tensors of a network.

    Args:
        network: The network, frozen as it will be trained.
        pretrained_stages: Stages that start from pretrained weights. They form the group "backbone" with the rate
            lr x backbone_lr_scale; all other stages form the group "head" with the rate lr.
        name: "sgd" or "adamw".
        lr: Learning rate.
        weight_decay: Weight decay of both groups.
        backbone_lr_scale: Factor on the rate of the pretrained stages.
        momentum: Momentum of SGD.
        nesterov: Whether SGD uses Nesterov momentum.

    Raises:
        InputError: The name is unknown, or a rate is not above 0.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer.name={name}: unknown; one of {listed(OPTIMIZERS)}")
    # Written so that nan is refused, too.
    if not (lr > 0 and backbone_lr_scale > 0):
        raise InputError(f"optimizer.lr={lr} optimizer.backbone_lr_scale={backbone_lr_scale}: must be above 0")
    tensors: dict[str, list[Tensor]] = {"head": [], "backbone": []}
    for stage, module in network.named_children():
        group = "backbone" if stage in pretrained_stages else "head"
        tensors[group] += [tensor for tensor in module.parameters() if tensor.requires_grad]
    rates = {"head": lr, "backbone": lr * backbone_lr_scale}
    groups = [{"params": found, "lr": rates[group], "name": group} for group, found in tensors.items() if found]
    # torch has fused implementations for CPUs and CUDA, which are faster.
    fused = all(tensor.device.type in ("cpu", "cuda") for found in tensors.values() for tensor in found)
    if name == "adamw":
        return AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused)
    return SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused)


class RaiseOnPlateau(ReduceLROnPlateau):
    """Multiply the learning rates by `factor`, up to `max_lr`, if the metric changes by less than `threshold`.

    The schedule of the original coursework: the rate starts at 1e-5 and grows tenfold, up to 0.1, whenever validation
    accuracy changes by less than 0.4 points (threshold 0.004) from one epoch to the next.
    """

    def __init__(self, optimizer: Optimizer, factor: float, threshold: float, max_lr: float) -> None:
        super().__init__(optimizer)
        # Set here, because the base class refuses factors above 1.
        self.factor, self.threshold, self.max_lr = factor, threshold, max_lr
        self.previous: float | None = None

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # as in the base class
        """Raise the rates if the metric has hardly changed since the epoch before."""
        metric = float(metrics)
        if self.previous is not None and abs(metric - self.previous) < self.threshold:
            for group in self.optimizer.param_groups:
                group["lr"] = min(group["lr"] * self.factor, self.max_lr)
        self.previous = metric


def build_scheduler(
    optimizer: Optimizer,
    steps: int,
    epochs: int,
    /,
    *,
    name: str,
    warmup_epochs: float = 0.0,
    step_epochs: int = 10,
    factor: float = 0.1,
    patience: int = 5,
    threshold: float = 0.004,
    max_lr: float = 0.1,
    monitor: str = "loss/val",
) -> dict[str, Any] | None:
    """Return a learning-rate schedule in the form that Lightning expects, or None.

    Args:
        optimizer: The optimizer whose rates it changes.
        steps: Optimizer steps of the complete run.
        epochs: Epochs of the complete run.
        name: "cosine": linear warm-up, then half a cosine to 0, per step. "step": x factor every `step_epochs`.
            "plateau": x factor after `patience` epochs without a lower `monitor`. "raise_on_plateau": see
            `RaiseOnPlateau`. "none": constant rates.
        warmup_epochs: Of "cosine".
        step_epochs: Of "step".
        factor: Of "step" and the plateaus.
        patience: Of "plateau".
        threshold: Of "raise_on_plateau".
        max_lr: Of "raise_on_plateau".
        monitor: Metric that the plateaus compare.

    Raises:
        InputError: The name is unknown.
    """
    if name not in SCHEDULERS:
        raise InputError(f"scheduler.name={name}: unknown; one of {listed(SCHEDULERS)}")
    if name == "none":
        return None
    if name == "step":
        return {"scheduler": StepLR(optimizer, step_epochs, factor), "interval": "epoch"}
    if name == "cosine":
        warmup = warmup_epochs * steps / epochs

        def scale(step: int) -> float:
            # The first step must not have a rate of 0.
            if step < warmup:
                return (step + 1) / (warmup + 1)
            # The maximum avoids a division by 0 in runs that are shorter than their warm-up.
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))

        return {"scheduler": LambdaLR(optimizer, scale), "interval": "step"}
    plateau = (
        ReduceLROnPlateau(optimizer, factor=factor, patience=patience)
        if name == "plateau"
        else RaiseOnPlateau(optimizer, factor, threshold, max_lr)
    )
    return {"scheduler": plateau, "interval": "epoch", "monitor": monitor}
