"""A Lightning Trainer from the sections of conf/: what `train` and `benchmark` both fit with."""

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks, loggers

from covid_cls.errors import InputError, listed
from covid_cls.reporting.tensorboard_epochs import EpochImages
from covid_cls.targets import check_targets
from covid_cls.training.callbacks import FiniteCheck, ImagesBar, quiet_lightning
from covid_cls.training.checkpoints import WholeCheckpointIO


def build_trainer(settings: dict[str, Any], folder: Path, watchers: Sequence[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer for the settings, with our callbacks and then `watchers`, writing below `folder`.

    InputError where a section names another class than one of Lightning's, or a setting that its class does not take.
    """
    check_targets(settings)
    quiet_lightning()
    bar = sys.stdout.isatty()
    chosen = [FiniteCheck(), *watchers, EpochImages(settings["image_every"]), *([ImagesBar()] if bar else [])]
    for name, section in settings["callbacks"].items():
        where = {"dirpath": str(folder / "checkpoints")} if name.endswith("checkpoint") else {}
        chosen += [_built(f"callbacks.{name}", section, callbacks, pl.Callback, where)] if section else []
    gpu = settings["trainer"]["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    logger, sync = settings["logger"], settings["trainer"].get("sync_batchnorm")
    ours = {
        "precision": settings["trainer"]["precision"] or ("bf16-mixed" if gpu or computes_bfloat16() else "32-true"),
        "callbacks": chosen,
        "logger": _built("logger", logger, loggers, loggers.Logger, {"save_dir": str(folder)}) if logger else False,
        "plugins": [WholeCheckpointIO(settings["checkpoint_seconds"])],
        "default_root_dir": str(folder),
        "enable_progress_bar": bar,
        "sync_batchnorm": gpu if sync is None else sync,  # torch has none for CPUs
    }
    trainer: pl.Trainer = _built("trainer", settings["trainer"], pl, pl.Trainer, ours)
    return trainer


def _built(key: str, section: dict[str, Any], home: Any, base: type, ours: dict[str, Any]) -> Any:
    """The object that `section` describes, a subclass of `base` that the module `home` shows; `ours` overrides it.

    By name and not by Hydra's `instantiate`, which would follow a dotted name through any module.
    """
    name = str(section.get("_target_", "")).rpartition(".")[2]
    found = getattr(home, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{key}._target_={section.get('_target_')}: no {base.__name__} of {home.__name__}")
    given = {name: value for name, value in section.items() if name != "_target_"} | ours
    known = inspect.signature(found).parameters
    unknown = [name for name in given if name not in known]
    if unknown and not any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values()):
        raise InputError(f"{key}.{unknown[0]}: no such setting; {name} takes {listed(sorted(known), 60)}")
    return found(**given)


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, which makes training 1.8 to 2.6 times as fast as in float32."""
    # torch has no public question for it; on CPUs without, bfloat16 is converted back and forth and slower.
    return any(
        getattr(torch.cpu, question, bool)() for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
