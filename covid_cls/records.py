"""What passes between the layers: a batch, the predictions table, JSON records that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from covid_cls.errors import InputError

if TYPE_CHECKING:  # every command imports this module: --help and a misspelt key need neither pandas nor torch
    import pandas as pd
    from torch import Tensor

DISCLAIMER = "Research use, not for diagnosis."
MODEL = "model"  # in a run's folder: what a colleague needs to use its network
LEDGER = "openings.csv"  # in a run's folder: each time its test predictions were opened, rerun or not
_SCRATCH = ".part"  # the end of the name under which a file is written
ID_COLUMNS = ("image_id", "patient_id", "source", "split", "fold", "label")


class Batch(NamedTuple):
    """Images or activations on their way through the network.

    x: uint8 (N, 1, H, W) canvases from the data set; float (N, ...) once the classifier prepared them.
    y: int64 (N,) class indices in the task's order. index: int64 (N,) rows of the image store.
    stage: where x enters the network; 0 = image, k = the output of stage k.
    """

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of that name, which no batch needs
    stage: int = 0


def prediction_columns(classes: Sequence[str]) -> list[str]:
    """The columns of a predictions table over `classes`, in order."""
    return [*ID_COLUMNS, *(f"logit_{c}" for c in classes), *(f"prob_{c}" for c in classes)]


def write_predictions(table: pd.DataFrame, path: Path) -> None:
    """Write a predictions table as CSV; nine significant digits keep every float32 exactly."""
    with whole_file(path) as file:
        table.to_csv(file, index=False, float_format="%.9g", lineterminator="\n")


def read_predictions(path: Path, classes: Sequence[str]) -> pd.DataFrame:
    """A predictions table: ids as text, scores as float64. InputError where it is none or lacks a column."""
    import pandas as pd

    types = {name: "string" if name in ID_COLUMNS else "float64" for name in prediction_columns(classes)}
    empty = {name: [""] for name in types if name == "fold" or name not in ID_COLUMNS}  # a NaN score is written as ""
    try:
        table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=empty)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such predictions file") from error
    except ValueError as error:  # all that pandas and the decoder find at fault
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a predictions table ({reason}); give the CSV that a run wrote") from error
    missing = [name for name in prediction_columns(classes) if name not in table.columns]
    if missing:
        raise InputError(f"{path}: columns {missing} are missing; a predictions table needs them for {list(classes)}")
    return table


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write `record` as JSON; a reader sees the old file or the new one, never half of one."""
    with whole_file(path) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. InputError where it is no JSON object."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it or restore it from a backup") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record


def file_sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(text: str) -> str:
    """32 hexadecimal digits that stand for `text`: the front half of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def files_digest(files: Iterable[Path]) -> str:
    """32 hexadecimal digits that stand for the contents of `files`, in this order, wherever they lie."""
    return digest("".join(file_sha256(file) for file in files))


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well: a reader sees the old file, or all of the new one.

    So does who reads after a kill or a loss of power: it is written beside `path`, so that the final step is a rename
    on one file system, and is on the disk before and after that step. Folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(_SCRATCH, f".{path.name}.", path.parent)
    scratch = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        scratch.chmod(0o644)  # mkstemp gives 0600; a lab shares its outputs
        scratch.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def remove_scratch(folder: Path) -> None:
    """Remove what killed `whole_file`s left in `folder` and below; nobody else may be writing there."""
    for left in folder.rglob(f".*{_SCRATCH}"):
        left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(handle)
