"""ResNet and VGG as a sequence of named stages, which can be frozen up to any of them."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from covid_cls.errors import InputError, listed

STRATEGIES = ("fc", "partial", "full")
# The stages of a backbone by name, without its head, and the length of the feature vectors.
Stages = tuple[dict[str, nn.Module], int]
BuildStages = Callable[[str], Stages]


class Staged(nn.Sequential):
    """A network as a sequence of named stages; the last two are `pool` (feature vectors) and `head` (logits).

    Attributes:
        frozen: Number of leading stages that are frozen: they have no trainable parameter and stay in eval mode after
            `train()`, so that their batch norms neither use nor update batch statistics.
    """

    frozen: int = 0

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the output of stage number `stop` for the output `x` of stage number `start`.

        Stages are numbered from 1, and 0 is the image: by default, images (N, 1, H, W) become logits (N, C).
        """
        for stage in list(self.children())[start:stop]:
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, C) of normalised grey images (N, 1, H, W)."""
        return self.run(x)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Return the names of all stages in order, ending in "pool" and "head"."""
        return tuple(name for name, _ in self.named_children())

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Return the stages whose parameters and buffers stay bit-identical in training."""
        return self.stage_names[: self.frozen]

    @property
    def entry(self) -> int:
        """Return the number of leading stages without trainable parameters, including a `pool` behind frozen ones."""
        stages = list(self.children())
        return next(k for k, stage in enumerate(stages) if any(p.requires_grad for p in stage.parameters()))

    def freeze(self, until: str | None) -> None:
        """Freeze every stage up to and including `until`, and unfreeze the others; None unfreezes all."""
        self.frozen = 0 if until is None else self.stage_names.index(until) + 1
        for position, stage in enumerate(self.children()):
            stage.requires_grad_(position >= self.frozen)
        # Newly frozen stages go to eval mode now, and not at the next epoch.
        self.train(self.training)

    def train(self, mode: bool = True) -> "Staged":
        """Set the training mode of all stages that are not frozen."""
        # Lightning calls train() on the complete network in every epoch.
        super().train(mode)
        for stage in list(self.children())[: self.frozen]:
            stage.eval()
        return self


@dataclass(frozen=True)
class StageReport:
    """One line of the freeze report.

    Attributes:
        norm: "none", "frozen" (batch norms with stored statistics) or "batch" (with batch statistics).
    """

    stage: str
    parameters: int
    trainable: int
    norm: str


class Backbone(NamedTuple):
    """How a network of torchvision is divided into stages; see `register_backbone`."""

    stages: BuildStages
    torchvision_name: Callable[[str], str]
    classifier: str


BACKBONES: dict[str, Backbone] = {}


def register_backbone(
    *names: str, classifier: str, torchvision_name: Callable[[str], str]
) -> Callable[[BuildStages], BuildStages]:
    """Return a decorator for a function that builds the stages of a backbone; see docs/your-backbone.md.

    The function takes the backbone's name and returns its randomly initialised stages in order, the last of them
    `pool`, and the length of the feature vectors. Its first convolution takes one channel.

    Args:
        names: Values of `backbone.name` that the function serves, named as in torchvision.
        classifier: torchvision's name of the layers after the pooling, which our head replaces.
        torchvision_name: Maps the name of a tensor in the stages to its name in torchvision's network.
    """

    def register(stages: BuildStages) -> BuildStages:
        BACKBONES.update(dict.fromkeys(names, Backbone(stages, torchvision_name, classifier)))
        return stages

    return register


def build_network(backbone: str, classes: int, hidden: int | None = 150, dropout: float = 0.5) -> Staged:
    """Return a randomly initialised network for one grey channel.

    Args:
        backbone: A name in `BACKBONES`.
        classes: Number of logits.
        hidden: Units of the head's hidden layer; None for a linear head.
        dropout: Dropout probability after the hidden layer.

    Raises:
        InputError: The backbone is unknown.
    """
    if backbone not in BACKBONES:
        raise InputError(f"backbone.name={backbone}: unknown; choose one of {listed(list(BACKBONES), 20)}")
    stages, features = BACKBONES[backbone].stages(backbone)
    if hidden is None:
        head = OrderedDict[str, nn.Module](out=nn.Linear(features, classes))
    else:
        head = OrderedDict[str, nn.Module](
            hidden=nn.Linear(features, hidden),
            relu=nn.ReLU(inplace=True),
            dropout=nn.Dropout(dropout),
            out=nn.Linear(hidden, classes),
        )
    return Staged(OrderedDict({**stages, "head": nn.Sequential(head)}))


def apply_strategy(network: Staged, /, name: str, freeze_until: str | None = None) -> None:
    """Freeze the stages of `network` that a strategy does not train; unfreeze the others.

    Args:
        network: A network whose last two stages are `pool` and `head`.
        name: "fc" trains the head, "partial" also the last stage before `pool`, "full" trains everything.
        freeze_until: The last stage to freeze; if given, it decides instead of `name`.

    Raises:
        InputError: The strategy is unknown, or the backbone has no such stage.
    """
    stages = network.stage_names[:-2]
    last_frozen = {"fc": stages[-1], "partial": stages[-2], "full": None}
    if freeze_until is not None:
        if freeze_until not in stages:
            raise InputError(f"strategy.freeze_until={freeze_until}: no such stage; this backbone has {listed(stages)}")
        network.freeze(freeze_until)
    elif name not in last_frozen:
        raise InputError(
            f"strategy.name={name}: unknown; choose one of {listed(STRATEGIES)} (or strategy.freeze_until)"
        )
    else:
        network.freeze(last_frozen[name])


def freeze_report(network: Staged) -> list[StageReport]:
    """Return one `StageReport` per stage that has parameters, in order."""
    lines = []
    for name, stage in network.named_children():
        sizes = [(p.numel(), p.requires_grad) for p in stage.parameters()]
        if sizes:
            normalised = any(isinstance(module, nn.BatchNorm2d) for module in stage.modules())
            norm = "none" if not normalised else "frozen" if name in network.frozen_names else "batch"
            lines.append(StageReport(name, sum(n for n, _ in sizes), sum(n for n, free in sizes if free), norm))
    return lines


def grey_convolution(convolution: nn.Conv2d) -> nn.Conv2d:
    """Return a one-channel convolution that gives for grey images what `convolution` gives for three equal channels.

    Its filters are the sums of the three filters. With inputs normalised by one mean and standard deviation for all
    channels this is exact.
    """
    layout: Any = {key: getattr(convolution, key) for key in ("out_channels", "kernel_size", "stride", "padding")}
    grey = nn.Conv2d(1, bias=convolution.bias is not None, **layout)
    # The initial weights drawn here are overwritten, but the head is initialised with the random numbers after them: a
    # construction without initialisation would change the results of every seed.
    tensors = convolution.state_dict()
    grey.load_state_dict({**tensors, "weight": tensors["weight"].sum(dim=1, keepdim=True)})
    return grey


@register_backbone(
    "resnet18", "resnet34", "resnet50", classifier="fc", torchvision_name=lambda name: name.removeprefix("stem.")
)
def _resnet_stages(backbone: str) -> Stages:
    """Return a stem, layer1 to layer4, and average pooling to 1 x 1."""
    network = models.get_model(backbone, weights=None)
    # Layers keep torchvision's names, so that `torchvision_name` is a one-line function.
    stem = OrderedDict(
        conv1=grey_convolution(network.conv1), bn1=network.bn1, relu=network.relu, maxpool=network.maxpool
    )
    layers = {f"layer{k}": getattr(network, f"layer{k}") for k in range(1, 5)}
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {"stem": nn.Sequential(stem), **layers, "pool": pool}, network.fc.in_features


@register_backbone(
    *(f"vgg{depth}{norm}" for norm in ("", "_bn") for depth in (11, 13, 16, 19)),
    classifier="classifier",
    torchvision_name=lambda name: f"features.{name.partition('.')[2]}",
)
def _vgg_stages(backbone: str) -> Stages:
    """Return block1 to block5, each up to and including its max-pooling, and average pooling to 7 x 7."""
    # VGG's classifier has 120 million parameters that our head replaces: on the "meta" device they are never allocated.
    # The convolutional part is then initialised here as torchvision does it.
    with torch.device("meta"):
        features: nn.Sequential = models.get_model(backbone, weights=None).features
    features.to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # VGG's convolutions have one
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    # Only now the first convolution is replaced: it draws random numbers, see `grey_convolution`.
    stages: dict[str, nn.Module] = {}
    block: OrderedDict[str, nn.Module] = OrderedDict()
    for number, layer in enumerate(features):
        # Here, torchvision's name of a layer is its number.
        block[str(number)] = grey_convolution(layer) if number == 0 and isinstance(layer, nn.Conv2d) else layer
        if isinstance(layer, nn.MaxPool2d):
            stages[f"block{len(stages) + 1}"] = nn.Sequential(block)
            block = OrderedDict()
    return {**stages, "pool": nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten())}, 512 * 7 * 7
