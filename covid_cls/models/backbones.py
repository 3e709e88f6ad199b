"""ResNet and VGG as one chain of named stages that can be entered, left and frozen at any of them."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from covid_cls.errors import InputError, listed

RESNETS = ("resnet18", "resnet34", "resnet50")
VGGS = ("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")
STRATEGIES = ("fc", "partial", "full")


class Staged(nn.Sequential):
    """A network as a chain of named stages; the last two are `pool` (images to feature vectors) and `head`.

    Stage k of `run` counts from one: the input image is stage 0, `run(x, start=k)` takes the output of stage k.
    The first `frozen` stages hold no trainable parameter and stay in eval mode whatever `train()` is told, so that
    their batch norms neither use nor gather batch statistics.
    """

    frozen: int = 0

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The output of stage `stop` (default: the logits) for an `x` that is the output of stage `start`."""
        for stage in list(self.children())[start:stop]:
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of normalised grey images (N, 1, H, W)."""
        return self.run(x)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages in the order in which an image passes them."""
        return tuple(name for name, _ in self.named_children())

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The stages that training leaves bit-identical, buffers included."""
        return self.stage_names[: self.frozen]

    @property
    def entry(self) -> int:
        """How many leading stages hold nothing that is trained: frozen ones, and a `pool` that follows them."""
        stages = list(self.children())
        return next(k for k, stage in enumerate(stages) if any(p.requires_grad for p in stage.parameters()))

    def freeze(self, until: str | None) -> None:
        """Freeze every stage up to and including `until`; None frees them all."""
        self.frozen = 0 if until is None else self.stage_names.index(until) + 1
        for position, stage in enumerate(self.children()):
            stage.requires_grad_(position >= self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Staged":
        """The network in training mode, frozen stages excepted."""
        super().train(mode)
        for stage in list(self.children())[: self.frozen]:
            stage.eval()
        return self


@dataclass(frozen=True)
class StageReport:
    """One line of the freeze report. norm: "none", "frozen" (stored statistics) or "batch" (batch statistics)."""

    stage: str
    parameters: int
    trainable: int
    norm: str


class Family(NamedTuple):
    """Backbones that are cut into stages in one way; docs/your-backbone.md adds one.

    names: as torchvision knows them. stages: for a name, the stages in order, randomly initialised, the last of them
    `pool`, and the length of the feature vectors that it makes; the first layer takes one channel. torchvision_name:
    what torchvision calls the tensor that such a network calls so. classifier: torchvision's name of what follows the
    pool, which our head replaces.
    """

    names: tuple[str, ...]
    stages: Callable[[str], tuple[dict[str, nn.Module], int]]
    torchvision_name: Callable[[str], str]
    classifier: str


def family_of(backbone: str) -> Family:
    """The family that has `backbone`. InputError where none has."""
    for family in FAMILIES.values():
        if backbone in family.names:
            return family
    known = [name for family in FAMILIES.values() for name in family.names]
    raise InputError(f"backbone.name={backbone}: unknown; one of {listed(known, 20)}")


def build_network(backbone: str, classes: int, hidden: int | None = 150, dropout: float = 0.5) -> Staged:
    """A randomly initialised `Staged` network for one grey channel; torchvision's initialisation, our head.

    The first convolution's three filters are summed, which is exact for grey input when all channels share one mean
    and standard deviation. ResNets pool to 1x1, VGGs to 7x7 (25,088 features).
    """
    stages, features = family_of(backbone).stages(backbone)
    return Staged(OrderedDict([*stages.items(), ("head", _head(features, classes, hidden, dropout))]))


def freeze_depth(network: Staged, strategy: str, freeze_until: str | None = None) -> str | None:
    """The last stage that `strategy` freezes, None for none.

    "fc" trains the head alone, "partial" the last convolutional stage as well, "full" everything; a `freeze_until`
    that names a stage goes before the strategy. InputError for an unknown strategy or stage.
    """
    stages = [name for name in network.stage_names if name not in ("pool", "head")]
    if freeze_until is not None:
        if freeze_until not in stages:
            raise InputError(f"strategy.freeze_until={freeze_until}: no such stage; this backbone has {listed(stages)}")
        return freeze_until
    if strategy not in STRATEGIES:
        raise InputError(f"strategy.name={strategy}: unknown; one of {listed(STRATEGIES)} (or strategy.freeze_until)")
    return {"fc": stages[-1], "partial": stages[-2], "full": None}[strategy]


def freeze_report(network: Staged) -> list[StageReport]:
    """One `StageReport` per stage that holds parameters, in order."""
    lines = []
    for name, stage in network.named_children():
        sizes = [(p.numel(), p.requires_grad) for p in stage.parameters()]
        if not sizes:
            continue
        norms = [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)]
        norm = "none" if not norms else "frozen" if name in network.frozen_names else "batch"
        lines.append(StageReport(name, sum(n for n, _ in sizes), sum(n for n, free in sizes if free), norm))
    return lines


def grey_convolution(convolution: nn.Conv2d) -> nn.Conv2d:
    """A one-channel convolution that does to grey what `convolution` does to three equal channels."""
    grey = nn.Conv2d(
        1,
        convolution.out_channels,
        kernel_size=convolution.kernel_size,  # type: ignore[arg-type]  # torch types it as a tuple of any length
        stride=convolution.stride,  # type: ignore[arg-type]
        padding=convolution.padding,  # type: ignore[arg-type]
        bias=convolution.bias is not None,
    )
    with torch.no_grad():
        grey.weight.copy_(convolution.weight.sum(dim=1, keepdim=True))
        if grey.bias is not None and convolution.bias is not None:
            grey.bias.copy_(convolution.bias)
    return grey


def _resnet_stages(backbone: str) -> tuple[dict[str, nn.Module], int]:
    whole = models.get_model(backbone, weights=None)
    stem = nn.Sequential(
        OrderedDict(conv1=grey_convolution(whole.conv1), bn1=whole.bn1, relu=whole.relu, maxpool=whole.maxpool)
    )
    layers: dict[str, nn.Module] = {f"layer{k}": getattr(whole, f"layer{k}") for k in range(1, 5)}
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {"stem": stem, **layers, "pool": pool}, whole.fc.in_features


def _vgg_stages(backbone: str) -> tuple[dict[str, nn.Module], int]:
    """block1 to block5, each up to and including its max-pooling; layers keep torchvision's numbers."""
    stages: dict[str, nn.Module] = {}
    block: OrderedDict[str, nn.Module] = OrderedDict()
    for number, layer in enumerate(_vgg_features(backbone)):
        block[str(number)] = grey_convolution(layer) if number == 0 and isinstance(layer, nn.Conv2d) else layer
        if isinstance(layer, nn.MaxPool2d):
            stages[f"block{len(stages) + 1}"] = nn.Sequential(block)
            block = OrderedDict()
    return {**stages, "pool": nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten())}, 512 * 7 * 7


def _vgg_features(backbone: str) -> nn.Sequential:
    """The convolutional part with torchvision's initialisation, without its classifier of 120 million parameters."""
    with torch.device("meta"):
        features: nn.Sequential = models.get_model(backbone, weights=None).features
    features.to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # VGG's convolutions have one
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    return features


def _head(features: int, classes: int, hidden: int | None, dropout: float) -> nn.Sequential:
    if hidden is None:
        return nn.Sequential(OrderedDict(out=nn.Linear(features, classes)))
    return nn.Sequential(
        OrderedDict(
            hidden=nn.Linear(features, hidden),
            relu=nn.ReLU(inplace=True),
            dropout=nn.Dropout(dropout),
            out=nn.Linear(hidden, classes),
        )
    )


FAMILIES = {
    "resnet": Family(RESNETS, _resnet_stages, lambda name: name.removeprefix("stem."), "fc"),
    "vgg": Family(VGGS, _vgg_stages, lambda name: f"features.{name.partition('.')[2]}", "classifier"),
}
BACKBONES = tuple(name for family in FAMILIES.values() for name in family.names)
