"""Checkpoints that are whole or absent, load without running code, and rebuild their classifier alone."""

import hashlib
import math
import os
import pickle
import shutil
import struct
import time
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_leaves

from covid_cls.errors import InputError
from covid_cls.models.files import read_tensors
from covid_cls.records import whole_file
from covid_cls.training.classifier import Classifier

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_REMEDY = "If a run wrote it, start the run's command again with rerun=true to train anew"
_ZIP, _ZIP_END, _ZIP_END_SIZE = b"PK\x03\x04", b"PK\x05\x06", 22  # how a zip file and its last record begin


class WholeCheckpointIO(TorchCheckpointIO):
    """Saves through a file beside the target, at most every so many seconds, and loads plain tensors only.

    Lightning saves through $TMPDIR and moves: on another file system a kill during that copy leaves a broken file
    under the final name. And it saves twice an epoch, which for a head on cached features takes longer than the epoch
    itself: what comes sooner than `seconds` after the last write waits in memory, the newest for each path, and is
    written with the next, or at the end of the fit, be it by a signal or an exception. A kill costs `seconds` of work.
    The last checkpoint but one is kept, see `newest_good`. fixed: names in the state dict that training does not
    change: they are copied once.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds, self.fixed = seconds, frozenset[str]()
        self._waiting: dict[Path, dict[str, Any]] = {}
        self._copies: dict[str, Tensor] = {}
        self._good = set[Path]()  # what this process has written or read
        self._wrote = -math.inf

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, now or a little later; a kill leaves the old file or the new one.

        InputError where there is no room for it.
        """
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
            keep = path.name == LAST and path in self._good  # a damaged one must not take the place of a good one
            _write_checkpoint(self._waiting[path], path, keep)
            self._good.add(path)
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
        contents = read_checkpoint(Path(path))
        self._good.add(Path(path))
        return contents


def newest_good(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The checkpoint in `folder` to go on from, its contents, and a warning for each that is damaged.

    That is the last one, or the one before where the last is damaged or absent; no path and no contents where there is
    none. It is read once, and nothing is changed: each process of a distributed run comes to the same.
    """
    faults = []
    for path in (folder / LAST, folder / PREVIOUS):
        if path.is_file():
            try:
                contents = read_checkpoint(path)
            except InputError as error:
                faults.append(str(error))
            else:
                return path, contents, [f"going on from {path}, epoch {contents['epoch'] + 1}: {f}" for f in faults]
    return None, {}, [f"training from the beginning: {fault}" for fault in faults]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The plain contents of a checkpoint file. InputError where it is none, or not every byte is as it was written."""
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    if path.is_file():
        _check_digest(path)
    contents = read_tensors(path, _REMEDY)
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


def _write_checkpoint(checkpoint: dict[str, Any], path: Path, keep_previous: bool) -> None:
    try:
        with whole_file(path) as file:
            body = _Digesting(file)
            torch.save(checkpoint, cast("BinaryIO", body))
            file.seek(-2, os.SEEK_END)
            file.write(_comment(body.digest.hexdigest()))
            if keep_previous:
                _keep_previous(path)
    except (OSError, RuntimeError) as error:
        fault = error if isinstance(error, OSError) else error.__context__  # what torch makes a RuntimeError of
        if not isinstance(fault, OSError):
            raise
        needed = sum(leaf.nbytes for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor))
        free = shutil.disk_usage(path.parent).free
        raise InputError(
            f"{path}: cannot be written ({fault.strerror}): {needed:,} bytes are needed and {free:,} are free. The "
            "checkpoints before it are kept; make room and start the command again"
        ) from error


def _keep_previous(last: Path) -> None:
    previous = last.with_name(PREVIOUS)
    previous.unlink(missing_ok=True)
    try:
        previous.hardlink_to(last)
    except OSError:  # a file system without hard links: for a moment there is only the previous one
        last.replace(previous)


class _Digesting:
    """A file for torch.save that digests what it is given."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _comment(sha256: str) -> bytes:
    """How our zip files end: instead of the two bytes of torch's, a comment's length 0, the length of ours, and ours.

    Within the file, since two files cannot be replaced at once; readers of zip files, torch among them, skip comments.
    """
    comment = b"sha256 " + sha256.encode()
    return struct.pack("<H", len(comment)) + comment


def _check_digest(path: Path) -> None:
    """InputError where a zip file does not end in the digest of what is before; one of torch alone has no comment."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _ZIP_END_SIZE))
        end = file.read()
        file.seek(0)
        if file.read(len(_ZIP)) != _ZIP or (end.startswith(_ZIP_END) and end.endswith(b"\0\0")):
            return  # `read_tensors` refuses the one, and checks the other by torch's own checksums
        file.seek(0)
        digest, left = hashlib.sha256(), max(0, size - len(_comment("0" * 64)))
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(b"\0\0")
        if file.read() != _comment(digest.hexdigest()):
            why = "damaged: its checksum is wrong or missing"
            raise InputError(f"{path}: not a file of plain tensors ({why}); pickled code is never executed. {_REMEDY}")
