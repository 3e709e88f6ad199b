"""Small networks with known attribution maps."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from covid_cls.models.backbones import Staged
from covid_cls.models.inference import Scorer
from covid_cls.models.transforms import Preprocess
from covid_cls.tasks import TASKS

SIDE = 64
# Side of the upper left corner in pixels.
CORNER = 16


class _Corner(nn.Module):
    """A stage that gives the brightness above the mean grey in the upper left corner, and 0 elsewhere."""

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
    """A stage without weights that finds vertical edges with a fixed Sobel filter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sobel", torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])[None, None])

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.sobel, Tensor)
        return nn.functional.conv2d(x, self.sobel, padding=1).abs()


class _Sign(nn.Module):
    """A head without weights whose logits are (feature, -feature)."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features, -features], dim=1)


def corner_scorer(gain: float = 400.0) -> Scorer:
    """Return a network whose logit of class 0 is `gain` times the brightness of the corner."""
    head = nn.Linear(1, 2, bias=False)
    head.weight = nn.Parameter(torch.tensor([[float(gain)], [-float(gain)]]))
    return _scorer(_Corner(), head)


def edge_scorer() -> Scorer:
    """Return a network without weights, whose maps always show the edges in the image."""
    return _scorer(_Edges(), _Sign())


def bright_corner(n: int = 2) -> Tensor:
    """Return canvases (n, 1, SIDE, SIDE) of noise that is brighter than the mean grey everywhere."""
    return torch.randint(160, 256, (n, 1, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _scorer(look: nn.Module, head: nn.Module) -> Scorer:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = Staged(OrderedDict(look=look, pool=pool, head=head))
    # Scorer.device needs a parameter, which the network of edges lacks. `randomise` does not re-initialise this one.
    if not list(net.parameters()):
        net.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    return Scorer(TASKS["binary"], net, Preprocess(size=SIDE, crop=SIDE, mean=0.5, sd=0.25)).eval()
