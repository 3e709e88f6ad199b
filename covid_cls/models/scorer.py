"""A trained network with its preprocessing and nothing of its training: grey squares in, logits out."""

import torch
from torch import Tensor, nn

from covid_cls.labels import Task
from covid_cls.models.backbones import Staged
from covid_cls.models.losses import probabilities
from covid_cls.models.transforms import Preprocess


class Scorer(nn.Module):
    """What a checkpoint and an artifact promise of an image; predictions, explanations and exports are made of it.

    `canvases` are uint8 (N, 1, S, S), S at least `preprocess.crop`: images scaled to a short side of `preprocess.size`
    and cut to a square about their middle (see `data.store.draw_on_canvas`).
    """

    def __init__(self, task: Task, net: Staged, preprocess: Preprocess) -> None:
        super().__init__()
        self.task, self.net, self.preprocess = task, net, preprocess

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.net.parameters()).device

    def prepare(self, canvases: Tensor) -> Tensor:
        """The network's input, float32 (N, 1, crop, crop), of canvases."""
        return self.preprocess.normalise(self.preprocess.centre(canvases))

    def forward(self, x: Tensor, stage: int = 0) -> Tensor:
        """Logits (N, classes) of canvases, or of what stage number `stage` of the network made of them."""
        return self.net.run(x if stage else self.prepare(x), start=stage)

    def embed(self, canvases: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) of canvases, and the last convolutional stage's mean over places, (N, channels)."""
        maps = self.net.run(self.prepare(canvases), stop=-2)
        return self.net.run(maps, start=len(self.net) - 2), maps.mean(dim=(2, 3))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Float32 probabilities (N, classes); they sum to one unless the task is multi-label."""
        return probabilities(logits, self.task.multilabel)
