"""A network without training: its frozen stages as one fast function, and the scorer that predictions come from."""

import copy
import hashlib
import itertools

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from covid_cls.io import digest
from covid_cls.models.backbones import Staged
from covid_cls.models.losses import probabilities
from covid_cls.models.transforms import Preprocess
from covid_cls.tasks import Task


# Not an nn.Module: neither a checkpoint nor an optimizer must see the copied weights.
class Prefix:
    """A copy of the leading stages of a network that have no trainable parameter, for inference.

    Batch norms are merged into the convolutions before them, which is exact up to rounding in eval mode.

    Args:
        network: Its output continues at `network.run(x, start=prefix.stop)`.
        device: Where the copy runs.
        dtype: Of weights and outputs.
        compiled: Compile with inductor, which takes about ten seconds and needs a C++ compiler.

    Attributes:
        stop: Number of copied stages.
    """

    def __init__(
        self,
        network: Staged,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.stop, self.dtype, self.device, self.compiled = network.entry, dtype, torch.device(device), compiled
        self._stages = nn.Sequential(*list(network.children())[: self.stop])
        # A copy, because merging batch norms replaces layers.
        part = copy.deepcopy(self._stages).eval().requires_grad_(False)
        _fold_batch_norms(part)
        # Convolutions are faster with channels last, on the CPU and on the GPU.
        self._part = part.to(self.device, dtype).to(memory_format=torch.channels_last)
        self._run = torch.compile(self._part, options={"freezing": True}) if compiled else self._part

    @property
    def digest(self) -> str:
        """Return a digest of the weights as they are in the network now, independent of `dtype` and device."""
        # Feature caches are found by this digest, so its text must stay as it is.
        hashes = {
            name: hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
            for name, tensor in self._stages.state_dict().items()
        }
        return digest(" ".join(f"{name}:{sha256}" for name, sha256 in hashes.items()))

    @torch.no_grad()
    def example(self, side: int) -> Tensor:
        """Return the output for one black image of `side` x `side` pixels, to learn its shape without compiling."""
        # Not through `_run`: inductor would compile for a batch of one image.
        features: Tensor = self._part(torch.zeros(1, 1, side, side, device=self.device, dtype=self.dtype))
        return features

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return the output of stage `stop`, of `dtype`, for normalised grey images (N, 1, H, W)."""
        features: Tensor = self._run(x.to(self.dtype))
        return features


def _fold_batch_norms(module: nn.Module) -> None:
    """Merge each batch norm in `module` into the convolution directly before it."""
    for (name, layer), (next_name, next_layer) in itertools.pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and isinstance(next_layer, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, next_layer))
            setattr(module, next_name, nn.Identity())
    for child in module.children():
        _fold_batch_norms(child)


class Scorer(nn.Module):
    """A network with its preprocessing: what predictions, explanations and exports of a model are computed by.

    `canvases` are uint8 (N, 1, S, S) with S at least `preprocess.crop`: images scaled to a short side of
    `preprocess.size` and cut to a square about their centre, see `data.store.draw_on_canvas`.
    """

    def __init__(self, task: Task, net: Staged, preprocess: Preprocess) -> None:
        super().__init__()
        self.task, self.net, self.preprocess = task, net, preprocess

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.net.parameters()).device

    def prepare(self, canvases: Tensor) -> Tensor:
        """Return the network's input for canvases, float32 (N, 1, crop, crop)."""
        return self.preprocess.normalise(self.preprocess.centre(canvases))

    def forward(self, x: Tensor, stage: int = 0) -> Tensor:
        """Return logits (N, classes) of canvases, or of the output of stage number `stage` if that is not 0."""
        return self.net.run(x if stage else self.prepare(x), start=stage)

    def embed(self, canvases: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, classes) and the spatial mean of the last convolutional stage, (N, channels)."""
        maps = self.net.run(self.prepare(canvases), stop=-2)
        return self.net.run(maps, start=len(self.net) - 2), maps.mean(dim=(2, 3))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return float32 probabilities (N, classes); they sum to one unless the task is multi-label."""
        return probabilities(logits, self.task.multilabel)
