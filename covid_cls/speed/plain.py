"""The loop that a tutorial teaches and this project started from: what covid_cls is measured against."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

from covid_cls.labels import TASKS
from covid_cls.models.backbones import build_network, family_of, freeze_depth
from covid_cls.speed.child import Wire, say, wait_for_word
from covid_cls.speed.clock import Stopwatch, peak_memory, synchronise


def plain_network(settings: dict[str, Any]) -> nn.Module:
    """The network of torchvision for three channels, our head on it, and gradients where the strategy trains.

    All of it is in training mode, as in that loop: batch norms of frozen layers use and gather batch statistics.
    """
    backbone, head, strategy = settings["backbone"]["name"], settings["head"], settings["strategy"]
    classes = len(TASKS[settings["task"]["name"]].classes)
    ours = build_network(backbone, classes, head["hidden"], head["dropout"])
    ours.freeze(freeze_depth(ours, strategy["name"], strategy["freeze_until"]))
    family = family_of(backbone)
    free = {family.torchvision_name(name) for name, tensor in ours.named_parameters() if tensor.requires_grad}
    network: nn.Module = models.get_model(backbone, weights=None)
    setattr(network, family.classifier, ours.get_submodule("head"))
    for name, tensor in network.named_parameters():
        tensor.requires_grad_(name in free or name.startswith(family.classifier))
    return network.train()


def plain_loader(settings: dict[str, Any], root: Path) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled batches of RGB images read, turned, scaled, cropped and mirrored by PIL, one after the other."""
    data, preprocess, workers = settings["data"], settings["preprocess"], settings["plain"]["workers"]
    steps = [
        transforms.RandomRotation(30),
        transforms.Resize(data["size"]),
        transforms.CenterCrop(preprocess["crop"]),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([preprocess["mean"]] * 3, [preprocess["sd"]] * 3),
    ]
    images = ImageFolder(str(root / "train"), transforms.Compose(steps))
    return DataLoader(images, batch_size=data["batch_size"], shuffle=True, num_workers=workers)


def plain_epoch(
    network: nn.Module,
    loader: DataLoader[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    watch: Stopwatch,
    profile: bool = False,
) -> dict[str, float]:
    """Train one epoch in float32; its seconds, and those of its parts."""
    watch.start(waits=profile)
    for images, labels in loader:
        images, labels = images.to(watch.device), labels.to(watch.device)
        watch.mark("data")
        loss = F.cross_entropy(network(images), labels)
        watch.mark("forward")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()
        watch.mark("backward")
    return watch.stop()


def load_epoch(loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Seconds to bring every batch to the device."""
    began = time.perf_counter()
    for images, labels in loader:
        images.to(device), labels.to(device)
    synchronise(device)
    return time.perf_counter() - began


def run_plain(wire: Wire, settings: dict[str, Any], root: Path, device_name: str) -> None:
    """Train an epoch of the plain loop each time the parent asks for one."""
    device = torch.device(device_name)
    torch.manual_seed(settings["seed"])
    network, loader, watch = plain_network(settings).to(device), plain_loader(settings, root), Stopwatch(device)
    free = [tensor for tensor in network.parameters() if tensor.requires_grad]
    optimizer = torch.optim.SGD(free, lr=settings["optimizer"]["lr"], momentum=0.9)
    say(wire, {"precision": "32-true"})
    answers = {
        "epoch": lambda: plain_epoch(network, loader, optimizer, watch),
        "profile": lambda: plain_epoch(network, loader, optimizer, watch, profile=True),
        "loader": lambda: load_epoch(loader, device),
        "memory": lambda: peak_memory(device),
    }
    wait_for_word(wire, answers)
