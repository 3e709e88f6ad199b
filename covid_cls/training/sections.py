"""The sections of a configuration: what takes each of them, and the data that four of them describe."""

from collections.abc import Callable
from typing import Any

from covid_cls.data.datamodule import Radiographs
from covid_cls.labels import TASKS
from covid_cls.models.losses import Criterion
from covid_cls.models.transforms import Augment, Preprocess
from covid_cls.training.optim import build_optimizer, build_scheduler

# The sections whose schema is the signature of what takes them.
SECTIONS: dict[str, Callable[..., Any]] = {
    "data": Radiographs,
    "loss": Criterion,
    "preprocess": Preprocess,
    "augment": Augment,
    "optimizer": build_optimizer,
    "scheduler": build_scheduler,
}


def read_data(settings: dict[str, Any]) -> Radiographs:
    """The data of the settings' task, decoded to the size that their augmentation needs."""
    canvas = Augment(**settings["augment"]).canvas(settings["preprocess"]["crop"])
    return Radiographs(TASKS[settings["task"]["name"]], canvas, settings["seed"], **settings["data"])
