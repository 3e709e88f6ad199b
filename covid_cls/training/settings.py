"""The sections of a train configuration: their schemas, and the data set that they describe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.image_source import DataSettings
from covid_cls.errors import InputError
from covid_cls.evaluation.thresholds import fit_operating
from covid_cls.models.backbones import apply_strategy
from covid_cls.models.losses import LOSSES
from covid_cls.models.transforms import Augment, Preprocess
from covid_cls.tasks import TASKS
from covid_cls.training.optimizers import build_optimizer, build_scheduler


@dataclass(frozen=True)
class Head:
    """The section `head` of a configuration.

    Attributes:
        hidden: Units of the hidden layer; None for a linear head.
        dropout: Dropout probability after the hidden layer, in [0, 1).
        prior_bias: Whether the untrained network predicts the class frequencies of the training split.
    """

    hidden: int | None = 150
    dropout: float = 0.5
    prior_bias: bool = False

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise InputError(f"head.hidden={self.hidden}: must be at least 1, or null for a linear head")
        if not 0 <= self.dropout < 1:
            raise InputError(f"head.dropout={self.dropout}: must be at least 0 and below 1")


def _task() -> None:
    """Schema of a task: there are no settings besides its name."""


def _backbone(name: str, weights: str) -> None:
    """Schema of the section `backbone`."""


def _sweep(jobs_per_gpu: int, fail_fast: bool) -> None:
    """Schema of the section `sweep`."""


# The schema of a section is the signature of the function or class that takes it. If it is a mapping, the section's
# `name` selects the entry.
SECTIONS: dict[str, Callable[..., Any] | Mapping[str, Callable[..., Any]]] = {
    "task": dict.fromkeys(TASKS, _task),
    "data": DataSettings,
    "backbone": _backbone,
    "strategy": apply_strategy,
    "head": Head,
    "loss": LOSSES,
    "preprocess": Preprocess,
    "augment": Augment,
    "optimizer": build_optimizer,
    "scheduler": build_scheduler,
    "operating": fit_operating,
    "sweep": _sweep,
}
# Lightning's own classes take these sections, and `experiment.build_trainer` checks their settings.
CHECKED_ELSEWHERE = ("trainer", "logger", "callbacks")


class RunSettings(NamedTuple):
    """Schema of the settings that belong to no section; conf/train.yaml describes them."""

    seed: int
    output_root: str
    name: str | int | None
    rerun: bool
    audit: str
    baselines: bool
    test: bool
    image_every: int
    feature_cache: str
    feature_cache_gb: float
    checkpoint_seconds: float
    compile: bool


def read_data(settings: dict[str, Any], augment: Augment) -> Radiographs:
    """Read the data set of a train configuration.

    Args:
        settings: The configuration; the sections task, data and preprocess and the seed are used.
        augment: Its augmentation, which determines the size of the decoded images.

    Raises:
        InputError: The data or their settings are at fault.
    """
    canvas = augment.canvas(settings["preprocess"]["crop"])
    return Radiographs(TASKS[settings["task"]["name"]], canvas, settings["seed"], DataSettings(**settings["data"]))
