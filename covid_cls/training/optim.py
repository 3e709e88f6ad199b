"""Optimizers over the trainable tensors, and the schedules of their learning rates."""

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from covid_cls.errors import InputError, listed
from covid_cls.models.backbones import Staged

OPTIMIZERS = ("sgd", "adamw")
SCHEDULERS = ("cosine", "step", "plateau", "raise_on_plateau", "none")


def build_optimizer(
    network: Staged,
    pretrained_stages: Sequence[str],
    *,
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    backbone_lr_scale: float = 1.0,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> Optimizer:
    """SGD or AdamW over exactly the trainable tensors of `network`.

    Group "backbone": stages that start from pretrained weights, at lr x backbone_lr_scale. Group "head": the head and
    stages that start at random, at lr. momentum and nesterov concern SGD only.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer.name={name}: unknown; one of {listed(OPTIMIZERS)}")
    if not (lr > 0 and backbone_lr_scale > 0):  # nan is not above 0 either
        raise InputError(f"optimizer.lr={lr} optimizer.backbone_lr_scale={backbone_lr_scale}: must be above 0")
    groups: list[dict[str, Any]] = []
    for group, scale, pretrained in (("head", 1.0, False), ("backbone", backbone_lr_scale, True)):
        tensors = [
            tensor
            for stage, module in network.named_children()
            if (stage in pretrained_stages) == pretrained
            for tensor in module.parameters()
            if tensor.requires_grad
        ]
        if tensors:
            groups.append({"params": tensors, "lr": lr * scale, "name": group})
    fused = all(tensor.device.type in ("cpu", "cuda") for group in groups for tensor in group["params"])
    if name == "adamw":
        return AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused)
    return SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused)


class RaiseOnPlateau:
    """A rate multiplied by `factor`, up to `max_lr`, whenever the metric moves by less than `threshold` in an epoch.

    The schedule of the work this project starts from: lr starts at 1e-5 and grows tenfold, up to 0.1, whenever
    validation accuracy moves by less than 0.4 points (threshold 0.004) between epochs.
    """

    def __init__(self, optimizer: Optimizer, factor: float, threshold: float, max_lr: float) -> None:
        self.optimizer, self.factor, self.threshold, self.max_lr = optimizer, factor, threshold, max_lr
        self.previous: float | None = None

    def step(self, metric: float) -> None:
        """Take note of an epoch's metric and raise the rates if it stood still."""
        if self.previous is not None and abs(metric - self.previous) < self.threshold:
            for group in self.optimizer.param_groups:
                group["lr"] = min(group["lr"] * self.factor, self.max_lr)
        self.previous = metric

    def state_dict(self) -> dict[str, Any]:
        """The last metric; the rates themselves travel with the optimizer."""
        return {"previous": self.previous}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        self.previous = state_dict["previous"]


def build_scheduler(
    optimizer: Optimizer,
    steps: int,
    epochs: int,
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
    """Lightning's description of a schedule over `steps` optimizer steps in `epochs` epochs, or None.

    cosine: linear warm-up over `warmup_epochs`, then half a cosine to 0, per step. step: x factor every `step_epochs`.
    plateau: x factor after `patience` epochs without a lower `monitor`. raise_on_plateau: see `RaiseOnPlateau`.
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
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))

        return {"scheduler": LambdaLR(optimizer, scale), "interval": "step"}
    plateau: Any = (
        ReduceLROnPlateau(optimizer, factor=factor, patience=patience)
        if name == "plateau"
        else RaiseOnPlateau(optimizer, factor, threshold, max_lr)
    )
    return {"scheduler": plateau, "interval": "epoch", "monitor": monitor, "reduce_on_plateau": True}
