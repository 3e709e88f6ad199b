"""The shipped configuration, made small enough for a test: 32 pixels, a few phantoms, the CPU."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from pytorch_lightning import Callback

from covid_cls.assemble import build_trainer
from covid_cls.command import conf_folder, plain
from covid_cls.data.datamodule import Radiographs
from covid_cls.labels import TASKS
from covid_cls.models.transforms import Augment
from covid_cls.training.callbacks import EpochHistory
from covid_cls.training.classifier import Classifier

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
    """The settings of `train` with these overrides; no logger."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return {**plain(compose("train", [*SMALL, *overrides])), "logger": None}


def make_data(settings: dict[str, Any], cache: Path) -> Radiographs:
    """The phantoms of these settings; `cache` is shared by all tests of a session."""
    canvas = Augment(**settings["augment"]).canvas(settings["preprocess"]["crop"])
    where = {**settings["data"], "cache": str(cache)}
    return Radiographs(TASKS[settings["task"]["name"]], canvas, settings["seed"], **where)


def make_classifier(settings: dict[str, Any], counts: list[int] | None = None) -> Classifier:
    """The classifier of these settings, its first weights decided by its seed."""
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
    """The trainer that `train` builds, with more callbacks behind its own."""
    if not checkpoints:
        settings = {**settings, "callbacks": {}}
        settings["trainer"] = {**settings["trainer"], "enable_checkpointing": False}
    history = EpochHistory()
    trainer = build_trainer(settings, folder, [history])
    trainer.callbacks += callbacks
    return trainer, history
