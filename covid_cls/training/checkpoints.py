"""Checkpoints that are whole or absent, load without running code, and rebuild their classifier alone."""

import math
import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from covid_cls.errors import InputError
from covid_cls.models.files import read_tensors
from covid_cls.records import whole_file
from covid_cls.training.classifier import Classifier


class WholeCheckpointIO(TorchCheckpointIO):
    """Saves through a file beside the target, at most every so many seconds, and loads plain tensors only.

    Lightning saves through $TMPDIR and moves: on another file system a kill during that copy leaves a broken file
    under the final name. And it saves twice an epoch, which for a head on cached features takes longer than the epoch
    itself: what comes sooner than `seconds` after the last write waits in memory, the newest for each path, and is
    written with the next, or at the end of the fit, be it by Ctrl-C or an exception. A kill costs `seconds` of work.
    fixed: names in the state dict that training does not change: they are copied once.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds, self.fixed = seconds, frozenset[str]()
        self._waiting: dict[Path, dict[str, Any]] = {}
        self._copies: dict[str, Tensor] = {}
        self._wrote = -math.inf

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, now or a little later; a kill leaves the old file or the new one."""
        due = time.monotonic() - self._wrote >= self.seconds
        self._waiting[Path(path)] = checkpoint if due else self._copy(checkpoint)
        if due:
            self._write()

    def teardown(self) -> None:
        """Write what still waits."""
        self._write()

    def _write(self) -> None:
        # In the order in which they came: the best epoch before a last one that refers to it.
        while self._waiting:
            path = next(iter(self._waiting))
            with whole_file(path) as file:
                torch.save(self._waiting[path], file)
                file.flush()
                os.fsync(file.fileno())  # before the rename: a machine that loses power keeps one of the two
            del self._waiting[path]
        self._wrote = time.monotonic()

    def _copy(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        state = {name: self._copies.get(name, tensor) for name, tensor in checkpoint["state_dict"].items()}
        state = {name: t if name in self._copies else t.detach().to("cpu", copy=True) for name, t in state.items()}
        self._copies = {name: state[name] for name in self.fixed}
        rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        # Not copy.deepcopy, which takes five times as long over the history's many numbers.
        return {**pickle.loads(pickle.dumps(rest)), "state_dict": state}  # noqa: S301  # what was dumped just now

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """The checkpoint in `path`, on the CPU; pickled code is never executed."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The plain contents of a checkpoint file. InputError where it is none."""
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    contents = read_tensors(path, "If a crash broke it, delete it and start the command again")
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
