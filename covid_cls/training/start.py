"""What a fit starts from: a classifier that is built, frozen, filled with weights and on record."""

import ctypes
import dataclasses
import logging
import sys
from typing import Any

import pytorch_lightning as pl
import torch

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.dataset import check_shares
from covid_cls.models.backbones import freeze_report
from covid_cls.models.prefix import Prefix
from covid_cls.models.weights import load_pretrained
from covid_cls.training.classifier import Classifier
from covid_cls.training.features import feature_note, fixed_views, serve_features
from covid_cls.training.run import Run

log = logging.getLogger(__name__)
_PARTS = ("strategy", "head", "loss", "preprocess", "augment", "optimizer", "scheduler")


def start_classifier(
    settings: dict[str, Any], data: Radiographs, run: Run, download: bool, checkpoint: dict[str, Any] | None = None
) -> Classifier:
    """The classifier of `settings`; where its weights came from, what is frozen and the data's facts go into run.json.

    A run that is resumed takes its weights from its `checkpoint` and their history from its record. download: whether
    pretrained weights may be fetched. InputError where they are refused.
    """
    backbone = settings["backbone"]
    classifier = Classifier(
        task=settings["task"]["name"],
        backbone=backbone["name"],
        class_counts=data.class_counts,
        seed=settings["seed"],
        **{part: settings[part] for part in _PARTS},
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


def prepare_fit(classifier: Classifier, data: Radiographs, trainer: pl.Trainer, settings: dict[str, Any]) -> None:
    """Put everything where, and into the form in which, `trainer` computes it fastest.

    The frozen stages become a `Prefix` of the trainer's precision, whose output is computed once per image if a
    feature cache is asked for; images that fit lie on the GPU. With `compile`, the frozen stages are compiled, and on a
    GPU the trained ones too (on a CPU they were slower that way).
    """
    check_shares(settings["data"]["batch_size"], trainer.world_size)  # before other processes are started
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
    """Let this process keep the memory of large tensors for the next ones, instead of returning it to the system.

    glibc maps each block above 32 MB anew, and the first touch of each page costs more than what is computed there: a
    ResNet18's training step at batch 32 took 33 ms an image without and 28 with, its frozen stages 10.2 and 8.2, a
    VGG16's step 255 and 217. The process grows by 6 % (ResNet18) to 27 % (VGG16).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
