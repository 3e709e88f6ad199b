"""Checkpoints: atomic files with a checksum, which are loaded without executing code."""

import hashlib
import io
import math
import pickle
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from covid_cls.errors import InputError
from covid_cls.io import atomic_file
from covid_cls.models.weights import read_tensors
from covid_cls.training.module import Classifier

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_REMEDY = "If a run wrote this file, start the run's command again with rerun=true to train again"
# The first bytes of a ZIP file, and the record at the end of one without a comment: its first bytes and its size.
_ZIP, _ZIP_END, _ZIP_END_SIZE = b"PK\x03\x04", b"PK\x05\x06", 22
_COMMENT_SIZE = 2 + len("sha256 ") + 64


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves checkpoints atomically and at most every `seconds`, and loads plain tensors and values only.

    A checkpoint that comes sooner than `seconds` after the last write waits in memory, the newest one for each path. It
    is written with the next one, or at the end of the fit, also if a signal or an exception ends it. A kill loses at
    most `seconds` of work. The last checkpoint but one is kept, see `newest_valid`.

    Args:
        seconds: Minimum time between two writes.

    Attributes:
        fixed: Names in the state dict that training does not change; they are copied to memory once.
    """

    # Lightning itself writes to $TMPDIR and moves the file: on another file system, a kill during the move leaves a
    # broken file under the final name. It also saves twice per epoch, which takes longer than training a head on cached
    # features for an epoch.

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds, self.fixed = seconds, frozenset[str]()
        self._waiting: dict[Path, dict[str, Any]] = {}
        self._copies: dict[str, Tensor] = {}
        self._valid = set[Path]()  # files that this process has written or read
        self._last_write = -math.inf

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path` now or later; a kill leaves either the old file or the new one.

        Raises:
            InputError: The disk is full.
        """
        due = time.monotonic() - self._last_write >= self.seconds
        # Removed first, so that the dict keeps the order of arrival.
        self._waiting.pop(Path(path), None)
        self._waiting[Path(path)] = checkpoint if due else self._copy(checkpoint)
        if due:
            self.teardown()

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, also if it waits in memory."""
        self._waiting.pop(Path(path), None)
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        """Write the checkpoints that wait in memory."""
        # In the order of arrival, since a last checkpoint refers to the best one that was saved before it.
        for path in list(self._waiting):
            # A damaged last checkpoint must not replace the valid previous one.
            _write(self._waiting[path], path, keep_previous=path.name == LAST and path in self._valid)
            self._valid.add(path)
            del self._waiting[path]
        self._last_write = time.monotonic()

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Return the checkpoint in `path`, on the CPU; pickled code is never executed."""
        contents = read_checkpoint(Path(path))
        self._valid.add(Path(path))
        _relocate(contents.get("callbacks", {}), Path(path).resolve().parent)
        return contents

    def _copy(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        state = {
            name: self._copies[name] if name in self._copies else tensor.detach().to("cpu", copy=True)
            for name, tensor in checkpoint["state_dict"].items()
        }
        self._copies = {name: state[name] for name in self.fixed}
        rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        # copy.deepcopy takes five times as long for the many numbers of the history.
        return {**pickle.loads(pickle.dumps(rest)), "state_dict": state}  # noqa: S301  # our own bytes


def newest_valid(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Return the checkpoint from which an interrupted run continues: the last one, or the one before if it is damaged.

    No file is changed, so that all processes of a distributed run choose the same one.

    Args:
        folder: The folder of the checkpoints.

    Returns:
        The path and the contents, or None and an empty dict if there is no valid one; and a warning for each damaged
        file.
    """
    faults = []
    for path in (folder / LAST, folder / PREVIOUS):
        if path.is_file():
            try:
                contents = read_checkpoint(path)
            except InputError as error:
                faults.append(str(error))
            else:
                return path, contents, [f"resuming from {path}, epoch {contents['epoch'] + 1}: {f}" for f in faults]
    return None, {}, [f"training from the first epoch again: {fault}" for fault in faults]


def load_classifier(path: Path) -> Classifier:
    """Return the classifier in a checkpoint, in eval mode on the CPU. Nothing is downloaded or executed.

    Raises:
        InputError: The file is not a valid checkpoint of this version.
    """
    contents = read_checkpoint(path)
    try:
        classifier = Classifier(**contents["hyper_parameters"])
        classifier.load_state_dict(contents["state_dict"])
    except (TypeError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: not a checkpoint of this version of covid_cls ({reason})") from error
    return classifier.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the plain contents of a checkpoint.

    Raises:
        InputError: There is no such file, it is not a checkpoint, or a byte of it has changed.
    """
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    if path.is_file():
        _check_digest(path)
    contents = read_tensors(path, _REMEDY)
    if not isinstance(contents, dict) or "state_dict" not in contents or "hyper_parameters" not in contents:
        raise InputError(f"{path}: not a checkpoint of covid_cls")
    return contents


def _relocate(states: dict[str, dict[str, Any]], folder: Path) -> None:
    """Replace the paths in the states of ModelCheckpoint callbacks, since the run folder may have been moved."""
    # A callback that finds another folder than its own forgets the best score. The next epoch, however bad, would then
    # replace best.ckpt.

    def moved(path: str) -> str:
        return str(folder / Path(path).name) if path else ""

    for state in states.values():
        if "best_k_models" in state and Path(state["dirpath"]).name == folder.name:
            state |= {key: moved(state[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
            state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
            state["dirpath"] = str(folder)


def _write(checkpoint: dict[str, Any], path: Path, keep_previous: bool) -> None:
    # In memory first, since torch reports a full disk as a RuntimeError without its cause.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    data = buffer.getbuffer()
    try:
        with atomic_file(path) as file:
            file.write(data[:-2])
            file.write(_comment(hashlib.sha256(data)))
            if keep_previous:
                _keep_previous(path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise InputError(
            f"{path}: cannot be written ({error.strerror}): {len(data):,} bytes are needed and {free:,} are free. "
            "Earlier checkpoints are kept. Free some space and start the command again"
        ) from error


def _keep_previous(last: Path) -> None:
    previous = last.with_name(PREVIOUS)
    previous.unlink(missing_ok=True)
    try:
        previous.hardlink_to(last)
    except OSError:
        # The file system has no hard links. Until the new file is in place there is only the previous one.
        last.replace(previous)


def _comment(sha256: Any) -> bytes:
    """Return the end of our ZIP files, which replaces torch's empty comment (two zeros): a length and a digest."""
    # The digest is in the file itself because two files cannot be replaced at once. ZIP readers ignore comments. torch
    # checks a CRC of each tensor, but neither the ZIP's own records nor the padding.
    text = f"sha256 {sha256.hexdigest()}".encode()
    return struct.pack("<H", len(text)) + text


def _check_digest(path: Path) -> None:
    """Raise InputError if a ZIP file has neither the right digest nor, as torch alone writes it, no comment."""
    data = path.read_bytes()
    ends_without_comment = data[-_ZIP_END_SIZE:].startswith(_ZIP_END) and data.endswith(b"\0\0")
    if ends_without_comment or not data.startswith(_ZIP):
        # `read_tensors` refuses what is not a ZIP file.
        return
    sha256 = hashlib.sha256(memoryview(data)[:-_COMMENT_SIZE])
    sha256.update(b"\0\0")
    if data[-_COMMENT_SIZE:] != _comment(sha256):
        raise InputError(f"{path}: damaged, since its checksum is wrong or missing. {_REMEDY}")
