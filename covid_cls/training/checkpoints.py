"""Checkpoints that are whole or absent, load without running code, and rebuild their classifier alone."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from covid_cls.errors import InputError
from covid_cls.records import whole_file
from covid_cls.training.classifier import Classifier


class WholeCheckpointIO(TorchCheckpointIO):
    """Saves through a file beside the target, and loads plain tensors only.

    Lightning saves through $TMPDIR and moves: on another file system a kill during that copy leaves a broken file
    under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`; a kill leaves the old file or the new one."""
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a machine that loses power keeps one of the two

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """The checkpoint in `path`, on the CPU; pickled code is never executed."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The plain contents of a checkpoint file. InputError where it is none."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums that it wrote
        if damaged:
            raise ValueError(damaged)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, UnicodeDecodeError, KeyError …
        raise InputError(
            f"{path}: not a checkpoint of plain tensors ({type(error).__name__}); pickled code is never executed. "
            "If a crash broke it, delete it and start the command again"
        ) from error
    if not isinstance(contents, dict) or "state_dict" not in contents or "hyper_parameters" not in contents:
        raise InputError(f"{path}: not a checkpoint of covid_cls")
    return contents


def load_classifier(path: Path) -> Classifier:
    """The classifier in a checkpoint, in eval mode on the CPU. Downloads nothing and executes nothing."""
    contents = read_checkpoint(path)
    try:
        classifier = Classifier(**contents["hyper_parameters"])
        classifier.load_state_dict(contents["state_dict"])
    except (TypeError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: not a checkpoint of this version of covid_cls ({reason})") from error
    return classifier.eval()
