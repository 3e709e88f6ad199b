"""Networks whose maps are known: what they look at was put there."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from covid_cls.labels import TASKS
from covid_cls.models.backbones import Staged
from covid_cls.models.scorer import Scorer
from covid_cls.models.transforms import Preprocess

SIDE = 64
CORNER = 16  # pixels a side of the upper left corner


class _Corner(nn.Module):
    """Brightness above the mean grey, in the upper left corner alone."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.look.weight)
        mask = torch.zeros(1, 1, SIDE, SIDE)
        mask[..., :CORNER, :CORNER] = 1
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.look(x).relu() * self.mask
        return found


class _Edges(nn.Module):
    """Vertical edges by a fixed Sobel filter: nothing of it is a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sobel", torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])[None, None])

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.sobel, Tensor)
        return nn.functional.conv2d(x, self.sobel, padding=1).abs()


class _Sign(nn.Module):
    """Logits (feature, -feature), without a weight."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features, -features], dim=1)


def corner_scorer(gain: float = 400.0) -> Scorer:
    """Class 0 is the brightness of the corner times `gain`; whatever lies elsewhere changes nothing."""
    head = nn.Linear(1, 2, bias=False)
    head.weight = nn.Parameter(torch.tensor([[float(gain)], [-float(gain)]]))
    return _scorer(_Corner(), head)


def edge_scorer() -> Scorer:
    """A network whose every map is that of the edges in the image, whatever its weights: it has none."""
    return _scorer(_Edges(), _Sign())


def bright_corner(n: int = 2) -> Tensor:
    """Canvases (n, 1, SIDE, SIDE) of noise that is brighter than the mean grey."""
    return torch.randint(160, 256, (n, 1, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _scorer(look: nn.Module, head: nn.Module) -> Scorer:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = Staged(OrderedDict(look=look, pool=pool, head=head))
    # Scorer.device asks for a parameter, which the network of edges lacks: a batch norm's would be drawn anew.
    if not list(net.parameters()):
        net.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    return Scorer(TASKS["binary"], net, Preprocess(size=SIDE, crop=SIDE, mean=0.5, sd=0.25)).eval()
