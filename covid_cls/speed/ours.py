"""covid_cls as `python -m covid_cls.train` assembles it, an epoch at a time."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl

from covid_cls.assemble import build_trainer
from covid_cls.data.datamodule import Radiographs
from covid_cls.labels import TASKS
from covid_cls.models.transforms import Augment
from covid_cls.speed.child import Wire, say
from covid_cls.speed.clock import Gate, peak_memory, synchronise
from covid_cls.speed.peak import measure_peak
from covid_cls.training.callbacks import EpochHistory
from covid_cls.training.classifier import Classifier
from covid_cls.training.features import feature_note
from covid_cls.training.run import Run
from covid_cls.training.start import prepare_fit, start_classifier


class Fit(NamedTuple):
    """All that a fit needs. seconds: of decoding the images (`store`) and of the frozen stages' pass (`prepare`)."""

    trainer: pl.Trainer
    classifier: Classifier
    data: Radiographs
    notes: list[str]
    seconds: dict[str, float]


def staged_settings(settings: dict[str, Any], root: Path, cache: Path, epochs: int) -> dict[str, Any]:
    """`settings` for a fit of the images staged in `root`, over `epochs` whole epochs, with `cache` as its cache."""
    data = {
        **settings["data"],
        "kind": "folder",
        "root": str(root),
        "cache": str(cache),
        "sampler": "shuffle",  # every image once, as in the plain loop
        "folds": None,
        "group": "patient",
        "on_bad_image": "stop",
    }
    trainer = {**settings["trainer"], "max_epochs": epochs, "limit_train_batches": 1.0, "limit_val_batches": 1.0}
    callbacks = {**settings["callbacks"], "early_stopping": None}
    return {**settings, "data": data, "trainer": trainer, "callbacks": callbacks}


def assemble_fit(settings: dict[str, Any], folder: Path, watchers: Sequence[pl.Callback] = ()) -> Fit:
    """A fit that is ready to start and writes below `folder`; as in train.py, but for run.json."""
    pl.seed_everything(settings["seed"], workers=True, verbose=False)
    canvas = Augment(**settings["augment"]).canvas(settings["preprocess"]["crop"])
    began = time.perf_counter()
    data = Radiographs(TASKS[settings["task"]["name"]], canvas, settings["seed"], **settings["data"])
    stored = time.perf_counter()
    run = Run(folder, {"status": "running"}, writes=False)
    classifier = start_classifier(settings, data, run, download=False)
    trainer = build_trainer(settings, folder, [EpochHistory(), *watchers])
    ready = time.perf_counter()
    prepare_fit(classifier, data, trainer, settings)
    synchronise(trainer.strategy.root_device)
    seconds = {"store": stored - began, "prepare": time.perf_counter() - ready}
    weights = run.record["weights"]["note"]
    notes = [*([weights] if weights else []), *feature_note(settings["feature_cache"])]
    return Fit(trainer, classifier, data, notes, seconds)


def run_ours(wire: Wire, settings: dict[str, Any], folder: Path) -> None:
    """Train an epoch each time the parent asks for one; settings: as from `staged_settings`."""
    answers: dict[str, Callable[[], Any]] = {}
    fit = assemble_fit(settings, folder, [Gate(wire, answers)])
    device = fit.trainer.strategy.root_device
    answers["loader"] = lambda: load_epoch(fit)
    answers["bare"] = lambda: bare_epoch(fit)
    answers["peak"] = lambda: measure_peak(device, str(fit.trainer.precision))
    answers["memory"] = lambda: peak_memory(device)
    say(wire, {"device": str(device), "precision": str(fit.trainer.precision), "notes": fit.notes})
    fit.trainer.fit(fit.classifier, fit.data)


def load_epoch(fit: Fit) -> float:
    """Seconds to bring every training batch to the device, augmented and normalised."""
    device = fit.trainer.strategy.root_device
    began = time.perf_counter()
    for batch in fit.data.train_dataloader():
        there = fit.classifier.transfer_batch_to_device(batch, device, 0)
        fit.classifier.on_after_batch_transfer(there, 0)
    synchronise(device)
    return time.perf_counter() - began


def bare_epoch(fit: Fit) -> float:
    """Seconds per image of training steps on one batch that lies ready on the device; as many as an epoch has."""
    classifier, trainer = fit.classifier, fit.trainer
    device, (optimizer,) = trainer.strategy.root_device, trainer.optimizers
    loader = fit.data.train_dataloader()
    batch = classifier.transfer_batch_to_device(next(iter(loader)), device, 0)
    batch = classifier.on_after_batch_transfer(batch, 0)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a step costs the same and leaves the weights to the epochs that are timed
    synchronise(device)
    began = time.perf_counter()
    for _ in range(len(loader)):
        loss: Any = trainer.strategy.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    synchronise(device)
    seconds = time.perf_counter() - began
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    classifier.train_metrics.reset()
    return seconds / (len(loader) * len(batch.y))


def cold_fit(settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Seconds of a whole fit: `store`, `prepare`, `fit` with its validation, checkpoints and logs, `seconds` in all."""
    began = time.perf_counter()
    fit = assemble_fit(settings, folder)
    ready = time.perf_counter()
    fit.trainer.fit(fit.classifier, fit.data)
    synchronise(fit.trainer.strategy.root_device)
    return {**fit.seconds, "fit": time.perf_counter() - ready, "seconds": time.perf_counter() - began}
