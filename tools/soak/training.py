"""Build trainings of the shipped configuration at its smallest: 32 pixels, 36 phantoms, on the CPU."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from pytorch_lightning import Callback

from covid_cls.data.datamodule import Radiographs
from covid_cls.experiment import build_trainer
from covid_cls.models.transforms import Augment
from covid_cls.runtime.cli import conf_folder
from covid_cls.runtime.schema import plain_settings
from covid_cls.tasks import TASKS
from covid_cls.training.callbacks import EpochHistory
from covid_cls.training.module import Classifier
from covid_cls.training.settings import read_data

SMALL = (
    "trainer=cpu",
    "trainer.max_epochs=2",
    "data.size=32",
    "preprocess.crop=32",
    "data.images=36",
    "data.batch_size=6",
    "backbone.weights=none",
)
PARTS = ("strategy", "head", "loss", "preprocess", "augment", "optimizer", "scheduler")


def compose_small(*overrides: str) -> dict[str, Any]:
    """Return the settings of `train` with these overrides and without a logger."""
    return deepcopy(_composed(overrides))


# A composition takes 0.3 s, and hundreds of tests use the same few.
@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return {**plain_settings(compose("train", [*SMALL, *overrides])), "logger": None}


def make_data(settings: dict[str, Any], cache: Path) -> Radiographs:
    """Return the data module of these settings; phantoms and stores are kept in `cache`."""
    with_cache = {**settings, "data": {**settings["data"], "cache": str(cache)}}
    return read_data(with_cache, Augment(**settings["augment"]))


def make_classifier(settings: dict[str, Any], counts: list[int] | None = None) -> Classifier:
    """Return the classifier of these settings, with initial weights from its seed.

    Args:
        settings: Settings from `compose_small`.
        counts: Training images per class; 8 of each by default.
    """
    torch.manual_seed(settings["seed"])
    return Classifier(
        task=settings["task"]["name"],
        backbone=settings["backbone"]["name"],
        class_counts=counts or [8] * len(TASKS[settings["task"]["name"]].classes),
        seed=settings["seed"],
        **{part: settings[part] for part in PARTS},
    )


def make_trainer(
    settings: dict[str, Any], folder: Path, *callbacks: Callback, checkpoints: bool = True
) -> tuple[pl.Trainer, EpochHistory]:
    """Return the trainer that `train` builds, with `callbacks` after its own, and its history."""
    if not checkpoints:
        settings = {**settings, "callbacks": {}}
        settings["trainer"] = {**settings["trainer"], "enable_checkpointing": False}
    history = EpochHistory()
    trainer = build_trainer(settings, folder, [history])
    trainer.callbacks += callbacks  # type: ignore[attr-defined]
    return trainer, history
