"""One run from top to bottom: settings, data, model, trainer, outputs."""

import ctypes
import dataclasses
import inspect
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks, loggers
from pytorch_lightning.callbacks import ModelCheckpoint

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.dataset import check_shares
from covid_cls.errors import InputError, listed
from covid_cls.models.backbones import freeze_report
from covid_cls.models.inference import Prefix
from covid_cls.models.weights import load_pretrained
from covid_cls.reporting.run_outputs import write_results
from covid_cls.reporting.tensorboard import EpochImages
from covid_cls.runtime.sweep import inside_sweep
from covid_cls.shortcuts.baselines import write_baselines
from covid_cls.system import deferred
from covid_cls.training.callbacks import EpochHistory, FiniteCheck, ImagesBar, SafePoints, quiet_lightning
from covid_cls.training.checkpoints import AtomicCheckpointIO, load_classifier, read_checkpoint
from covid_cls.training.feature_cache import feature_note, fixed_views, prediction_features, serve_features
from covid_cls.training.module import Classifier
from covid_cls.training.perturbations import write_perturbations
from covid_cls.training.run_folder import Run
from covid_cls.training.split_predictions import predict_split

log = logging.getLogger(__name__)
# The sections of the configuration that the classifier takes as they are.
_CLASSIFIER_SECTIONS = ("strategy", "head", "loss", "preprocess", "augment", "optimizer", "scheduler")


def run_experiment(settings: dict[str, Any], data: Radiographs, run: Run, notes: Sequence[str]) -> None:
    """Train a run, predict with its selected weights, and write its outputs.

    Whatever happens, run.json states how the run ended. An interrupted run continues from its last checkpoint.

    Args:
        settings: The composed configuration of `train`, checked.
        data: Its data set.
        run: Its run folder, opened for writing.
        notes: Notes about the data for run.json and the outputs.
    """
    resume, checkpoint = run.last_checkpoint()
    # A sweep never downloads: a network that comes and goes would give its runs different weights.
    classifier = build_classifier(settings, data, run, download=not inside_sweep(), checkpoint=checkpoint)
    # As large as the network and the state of the optimizer, and Lightning reads it again.
    del checkpoint
    run.note(notes=[*run.record["notes"], *notes, *run.record.get("damage", [])])
    if resume:
        # Sums are rounded differently with another number of threads.
        torch.set_num_threads(run.record["device"]["threads"])
    with run.training():
        history = EpochHistory()
        trainer = build_trainer(settings, run.folder, [history, SafePoints()])
        run.note(precision=trainer.precision)
        prepare_fit(classifier, data, trainer, settings)
        with deferred():
            trainer.fit(classifier, data, ckpt_path=str(resume) if resume else None, weights_only=True)
        # Of several processes, the first one writes the outputs.
        if not trainer.is_global_zero:
            return
        best, selected = selected_checkpoint(trainer)
        run.note(selected=selected)
        classifier = load_classifier(best).to(trainer.strategy.root_device)
        scorer, splits = classifier.scorer(), ("val", "test") if settings["test"] else ("val",)
        cached = settings["feature_cache"] != "off"
        features = prediction_features(classifier, data, splits, settings["feature_cache_gb"]) if cached else None
        tables = {split: predict_split(scorer, data, split, features) for split in splits}
        if settings["baselines"]:
            write_baselines(data, run.folder / "baselines", splits)
            write_perturbations(scorer, data, run.folder / "baselines", splits[-1])
        write_results(run, tables, scorer, data, history.rows, trainer.logger)


def build_classifier(
    settings: dict[str, Any], data: Radiographs, run: Run, download: bool, checkpoint: dict[str, Any] | None = None
) -> Classifier:
    """Build the classifier of a run, and write to run.json where its weights come from and which stages are frozen.

    Args:
        settings: The composed configuration.
        data: The data set, for its class counts and its facts.
        run: The run folder.
        download: Whether pretrained weights may be downloaded.
        checkpoint: Contents of the checkpoint that a resumed run starts from; its weights replace the pretrained ones.

    Raises:
        InputError: The pretrained weights cannot be used.
    """
    backbone = settings["backbone"]
    classifier = Classifier(
        task=settings["task"]["name"],
        backbone=backbone["name"],
        class_counts=data.class_counts,
        seed=settings["seed"],
        **{section: settings[section] for section in _CLASSIFIER_SECTIONS},
    )
    if checkpoint:
        weights = run.record["weights"]
        classifier.load_state_dict(checkpoint["state_dict"])
    else:
        weights = dataclasses.asdict(load_pretrained(classifier.net, backbone["name"], backbone["weights"], download))
    classifier.pretrained_stages = tuple(weights["pretrained_stages"])
    facts = data.facts()
    notes = [*facts.pop("notes"), *([weights["note"]] if weights["note"] else [])]
    notes += feature_note(settings["feature_cache"])
    report = freeze_report(classifier.net)
    run.note(weights=weights, freeze=[dataclasses.asdict(line) for line in report], data=facts, notes=notes)
    log.info("%-8s %11s %11s  norm", "stage", "parameters", "trainable")
    for line in report:
        log.info(f"{line.stage:<8} {line.parameters:>11,} {line.trainable:>11,}  {line.norm}")
    return classifier


def build_trainer(settings: dict[str, Any], folder: Path, watchers: Sequence[pl.Callback]) -> pl.Trainer:
    """Build Lightning's Trainer.

    Args:
        settings: The composed configuration; the sections trainer, callbacks and logger are used.
        folder: The run folder, where checkpoints and logs are written.
        watchers: Callbacks of this run; they are called before those of the configuration.

    Raises:
        InputError: A section names a class that Lightning does not have, or a setting that its class does not take.
    """
    quiet_lightning()
    bar = sys.stdout.isatty()
    chosen = [FiniteCheck(), *watchers, EpochImages(settings["image_every"]), *([ImagesBar()] if bar else [])]
    for name, section in settings["callbacks"].items():
        if section:
            is_checkpoint = str(section.get("_target_", "")).endswith(".ModelCheckpoint")
            where = {"dirpath": str(folder / "checkpoints")} if is_checkpoint else {}
            chosen.append(_instantiate(f"callbacks.{name}", section, callbacks, pl.Callback, where))
    gpu = settings["trainer"]["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    logger, sync = settings["logger"], settings["trainer"].get("sync_batchnorm")
    ours = {
        "precision": settings["trainer"]["precision"] or ("bf16-mixed" if gpu or computes_bfloat16() else "32-true"),
        "callbacks": chosen,
        "logger": logger and _instantiate("logger", logger, loggers, loggers.Logger, {"save_dir": str(folder)}),
        "plugins": [AtomicCheckpointIO(settings["checkpoint_seconds"])],
        "default_root_dir": str(folder),
        "enable_progress_bar": bar,
        # torch has synchronised batch norms for GPUs only.
        "sync_batchnorm": gpu if sync is None else sync,
    }
    trainer: pl.Trainer = _instantiate("trainer", settings["trainer"], pl, pl.Trainer, ours)
    return trainer


def _instantiate(key: str, section: dict[str, Any], module: Any, base: type, ours: dict[str, Any]) -> Any:
    """Instantiate the class that `section` names: a subclass of `base` in `module`; `ours` overrides its settings.

    Hydra's `instantiate` is not used, because it follows a dotted name through any module.
    """
    name = str(section.get("_target_", "")).rpartition(".")[2]
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{key}._target_={section.get('_target_')}: {module.__name__} has no such {base.__name__}")
    given = {name: value for name, value in section.items() if name != "_target_"} | ours
    known = inspect.signature(found).parameters
    unknown = [name for name in given if name not in known]
    if unknown and not any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values()):
        raise InputError(f"{key}.{unknown[0]}: no such setting; {name} takes {listed(sorted(known), 60)}")
    return found(**given)


def computes_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware, where it trains 1.8 to 2.6 times as fast as float32."""
    # torch has no public function for it. Other CPUs convert bfloat16 back and forth, which is slower than float32.
    return any(
        getattr(torch.cpu, question, bool)() for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def prepare_fit(classifier: Classifier, data: Radiographs, trainer: pl.Trainer, settings: dict[str, Any]) -> None:
    """Bring classifier and data into the form in which `trainer` computes fastest.

    The frozen stages become a `Prefix` in the trainer's precision. With a feature cache its outputs are computed once
    per image. Images that fit are kept on the GPU. With `compile`, the frozen stages are compiled, and on a GPU the
    trained ones as well (on a CPU compiled training was slower).
    """
    # Checked before other processes are started.
    check_shares(settings["data"]["batch_size"], trainer.world_size)
    device = trainer.strategy.root_device
    frozen = tuple(f"net.{stage}." for stage in classifier.net.frozen_names)
    saver: Any = trainer.strategy.checkpoint_io
    saver.fixed = frozenset(name for name in classifier.state_dict() if name.startswith(frozen))
    data.keep_on(device)
    if device.type == "cpu":
        _keep_freed_memory()
    if settings["compile"] and device.type == "cuda":
        classifier.run_stages = torch.compile(classifier.net.run)
    if classifier.net.entry == 0:
        return
    dtype = torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32
    classifier.prefix = Prefix(classifier.net, device, dtype, settings["compile"])
    views = fixed_views(settings["feature_cache"], classifier.augment, settings["strategy"])
    if views is not None:
        serve_features(classifier, data, views, settings["feature_cache_gb"])


def _keep_freed_memory() -> None:
    """Let this process keep the memory of large tensors for the next ones, instead of returning it to the system."""
    # glibc maps each block above 32 MB again, and the first access to each page costs more than the computation on it:
    # with this function a training step of a ResNet18 at batch 32 took 28 instead of 33 ms per image, its frozen stages
    # 8.2 instead of 10.2, and a step of a VGG16 217 instead of 255. The process grows by 6 % (ResNet18) to 27 %
    # (VGG16). musl, another C library, has no mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def selected_checkpoint(trainer: pl.Trainer) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint whose weights a run keeps, and by what it was selected.

    Returns:
        The path of the checkpoint that the first ModelCheckpoint with a monitor kept; and its epoch (from 1), the
        monitor and the monitor's value in that epoch.

    Raises:
        InputError: No ModelCheckpoint of the configuration monitors a metric.
    """
    kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    if not kept or not kept[0].best_model_path:
        raise InputError(
            "callbacks: no ModelCheckpoint with a monitor has kept an epoch; keep callbacks.best_checkpoint, which "
            "selects the weights of a run"
        )
    # The folder may have been moved since the checkpoint was written, so only the name is taken from the callback.
    path = Path(str(kept[0].dirpath)) / Path(kept[0].best_model_path).name
    epoch = int(read_checkpoint(path)["epoch"]) + 1
    score = kept[0].best_model_score
    # Lightning replaces nan by an infinite score, which JSON does not have.
    value = float(score) if score is not None and math.isfinite(score) else None
    return path, {
        "epoch": epoch,
        "monitor": kept[0].monitor,
        "mode": kept[0].mode,
        "value": value,
    }
