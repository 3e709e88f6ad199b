"""The small configuration that tests share with tools/soak, and comparisons of weights."""

import torch
from torch import Tensor

from tools.soak.training import SMALL, compose_small, make_classifier, make_data, make_trainer

__all__ = ["SMALL", "changed", "compose_small", "make_classifier", "make_data", "make_trainer", "snapshot"]


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter and persistent buffer."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that are not bit-identical."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
