"""The frozen part of a network as one fast function."""

import copy
import hashlib
import itertools

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from covid_cls.models.backbones import Staged
from covid_cls.records import digest


class Prefix:
    """A copy of the leading stages of `network` that hold nothing trainable, for inference on `device`.

    Batch norms are folded into the convolutions before them, which is exact up to rounding in eval mode; weights and
    outputs are of `dtype`. `stop` stages are run: their output enters the network at `run(x, start=stop)`. It is no
    module: neither a checkpoint nor an optimizer sees it. compiled: through inductor, which takes some ten seconds at
    first and needs a C++ compiler.
    """

    def __init__(
        self,
        network: Staged,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.stop, self.dtype, self.device, self.compiled = network.entry, dtype, torch.device(device), compiled
        self._source = network
        part = nn.Sequential(*copy.deepcopy(list(network.children())[: self.stop])).eval().requires_grad_(False)
        _fold_batch_norms(part)
        part = part.to(self.device, dtype).to(memory_format=torch.channels_last)
        self._part = part
        self._run = torch.compile(part, options={"freezing": True}) if compiled else part

    @property
    def digest(self) -> str:
        """Stands for the weights, to the last bit."""
        frozen = nn.Sequential(*list(self._source.children())[: self.stop]).state_dict()
        parts = (
            f"{name}:{hashlib.sha256(t.cpu().contiguous().numpy().tobytes()).hexdigest()}" for name, t in frozen.items()
        )
        return digest(" ".join(parts))

    @torch.no_grad()
    def example(self, side: int) -> Tensor:
        """The output for one grey image of `side` x `side`, for its shape; nothing is compiled for it."""
        features: Tensor = self._part(torch.zeros(1, 1, side, side, device=self.device, dtype=self.dtype))
        return features

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The output of stage `stop`, of `dtype`, for normalised grey images (N, 1, H, W)."""
        features: Tensor = self._run(x.to(self.dtype))
        return features


def _fold_batch_norms(module: nn.Module) -> None:
    """Merge each batch norm into the convolution that stands right before it, throughout `module`."""
    children = list(module.named_children())
    for (name, layer), (next_name, next_layer) in itertools.pairwise(children):
        if isinstance(layer, nn.Conv2d) and isinstance(next_layer, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, next_layer))
            setattr(module, next_name, nn.Identity())
    for _, child in module.named_children():
        _fold_batch_norms(child)
