"""The plain loop's images and network in a Lightning fit, as most would write it."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from covid_cls.speed.child import Wire, say
from covid_cls.speed.clock import Gate, peak_memory
from covid_cls.speed.plain import load_epoch, plain_loader, plain_network
from covid_cls.training.callbacks import quiet_lightning


class PlainModule(pl.LightningModule):
    """The plain network, its loss and SGD."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.lr = plain_network(settings), settings["optimizer"]["lr"]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The batch's mean loss."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD over what the strategy trains."""
        free = [tensor for tensor in self.parameters() if tensor.requires_grad]
        return torch.optim.SGD(free, lr=self.lr, momentum=0.9)


def run_plain_lightning(wire: Wire, settings: dict[str, Any], root: Path, device_name: str) -> None:
    """Train an epoch of the Lightning fit each time the parent asks for one."""
    device = torch.device(device_name)
    quiet_lightning()
    torch.manual_seed(settings["seed"])
    loader = plain_loader(settings, root)
    answers = {"loader": lambda: load_epoch(loader, device), "memory": lambda: peak_memory(device)}
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision="bf16-mixed" if device.type == "cuda" else "32-true",
        max_epochs=-1,
        callbacks=[Gate(wire, answers)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    say(wire, {"precision": trainer.precision})
    trainer.fit(PlainModule(settings), loader)
