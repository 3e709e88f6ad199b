"""The training loops that covid_cls is compared with."""

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

from covid_cls.benchmarking.timing import Stopwatch, TimedEpochs, answer, load_seconds, peak_memory, step_flops
from covid_cls.models.backbones import BACKBONES, apply_strategy, build_network
from covid_cls.tasks import TASKS
from covid_cls.training.callbacks import quiet_lightning

Batches = DataLoader[tuple[Tensor, Tensor]]


def plain_network(settings: dict[str, Any]) -> nn.Module:
    """Return torchvision's network for three channels with the head of covid_cls, in training mode throughout.

    Parameters that the strategy freezes require no gradient. As in the usual loop, batch norms of frozen layers use
    and update batch statistics.
    """
    backbone, head, strategy = settings["backbone"]["name"], settings["head"], settings["strategy"]
    classes = len(TASKS[settings["task"]["name"]].classes)
    ours = build_network(backbone, classes, head["hidden"], head["dropout"])
    apply_strategy(ours, **strategy)
    theirs = BACKBONES[backbone]
    trained = {theirs.torchvision_name(name) for name, tensor in ours.named_parameters() if tensor.requires_grad}
    # Random weights, which are as fast as pretrained ones.
    network: nn.Module = models.get_model(backbone, weights=None)
    setattr(network, theirs.classifier, ours.get_submodule("head"))
    for name, tensor in network.named_parameters():
        tensor.requires_grad_(name in trained or name.startswith(theirs.classifier))
    return network.train()


def plain_loader(settings: dict[str, Any], root: Path) -> Batches:
    """Return shuffled batches of the RGB images in `root`/train; PIL reads and augments one image after the other."""
    data, preprocess = settings["data"], settings["preprocess"]
    # The augmentation of the original protocol.
    steps = [
        transforms.RandomRotation(30),
        transforms.Resize(data["size"]),
        transforms.CenterCrop(preprocess["crop"]),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([preprocess["mean"]] * 3, [preprocess["sd"]] * 3),
    ]
    images = ImageFolder(str(root / "train"), transforms.Compose(steps))
    return DataLoader(images, data["batch_size"], shuffle=True, num_workers=settings["plain"]["workers"])


def plain_epoch(
    network: nn.Module, loader: Batches, optimizer: torch.optim.Optimizer, device: torch.device, profile: bool = False
) -> dict[str, float]:
    """Train one epoch in float32 and return its seconds and those of its parts, see `Stopwatch`."""
    watch = Stopwatch(waits=profile)
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        watch.mark("data")
        loss = F.cross_entropy(network(images), labels)
        watch.mark("forward")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        # Such loops print the loss, for which a GPU must be waited for.
        loss.item()
        watch.mark("backward")
    return watch.stop()


def measure_plain(pipe: Connection, settings: dict[str, Any], root: Path, device_name: str) -> None:
    """Train an epoch of the plain loop each time the parent process requests one."""
    device = torch.device(device_name)
    torch.manual_seed(settings["seed"])
    module, loader = PlainModule(settings).to(device), plain_loader(settings, root)
    network, optimizer = module.network, module.configure_optimizers()
    epochs = {
        "epoch": lambda: plain_epoch(network, loader, optimizer, device),
        "profile": lambda: plain_epoch(network, loader, optimizer, device, profile=True),
    }
    answer(pipe, {**_measurements(network, "32-true", loader, device), **epochs})


def measure_plain_lightning(pipe: Connection, settings: dict[str, Any], root: Path, device_name: str) -> None:
    """Train an epoch of a Lightning fit over the plain loader each time the parent process requests one."""
    device = torch.device(device_name)
    quiet_lightning()
    torch.manual_seed(settings["seed"])
    module, loader = PlainModule(settings), plain_loader(settings, root)
    precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    # Logging, checkpoints and the progress bar would take time that the plain loop does not need.
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        precision=precision,  # type: ignore[arg-type]
        max_epochs=-1,
        callbacks=[TimedEpochs(pipe, _measurements(module.network, precision, loader, device))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


class PlainModule(pl.LightningModule):
    """The plain network, its loss and its optimizer."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.lr = plain_network(settings), settings["optimizer"]["lr"]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum; parameters without a gradient are not changed."""
        return torch.optim.SGD(self.network.parameters(), lr=self.lr, momentum=0.9)


def _measurements(network: nn.Module, precision: str, loader: Batches, device: torch.device) -> dict[str, Any]:
    return {
        "about": lambda: {"precision": precision},
        "flops": lambda: step_flops(network, next(iter(loader))[0]),
        "loader": lambda: load_seconds(loader, lambda batch: [tensor.to(device) for tensor in batch]),
        "memory": lambda: peak_memory(device),
    }
