"""What the layers exchange: batches, predictions tables, and files that are written atomically."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from covid_cls.errors import InputError

# Every command imports this module, and --help or a misspelt key need neither pandas nor torch.
if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


DISCLAIMER = "Research use, not for diagnosis."
# In a run folder: the model folder, which is all that is needed to use the network elsewhere.
MODEL = "model"
# In a run folder: the log of accesses to its test predictions. A rerun keeps it.
TEST_ACCESSES = "test_accesses.csv"
FORMER_TEST_ACCESSES = "openings.csv"  # the name that earlier versions used
# Suffix of the temporary file under which `atomic_file` writes.
_SCRATCH = ".part"
ID_COLUMNS = ("image_id", "patient_id", "source", "split", "fold", "label")


class Batch(NamedTuple):
    """A batch of images or of features.

    Attributes:
        x: uint8 images (N, 1, H, W) from the data set; float (N, ...) after the classifier has prepared them.
        y: int64 class indices (N,) in the task's order.
        index: int64 row numbers (N,) in the image store.
        stage: Where x enters the network: 0 for images, k for outputs of stage k.
    """

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no batch needs
    stage: int = 0


def prediction_columns(classes: Sequence[str]) -> list[str]:
    """Return the column names of a predictions table for `classes`, in order."""
    return [*ID_COLUMNS, *(f"logit_{c}" for c in classes), *(f"prob_{c}" for c in classes)]


def write_predictions(table: pd.DataFrame, path: Path) -> None:
    """Write a predictions table as CSV with nine significant digits, which preserve every float32 exactly."""
    with atomic_file(path) as file:
        table.to_csv(file, index=False, float_format="%.9g", lineterminator="\n")


def read_predictions(path: Path, classes: Sequence[str]) -> pd.DataFrame:
    """Read a predictions table: ids as text, scores as float64.

    Raises:
        InputError: The file does not exist, is not a CSV table, or lacks a column.
    """
    import pandas as pd

    types = {name: "string" if name in ID_COLUMNS else "float64" for name in prediction_columns(classes)}
    # A NaN score is written as an empty field.
    empty = {name: [""] for name in types if name == "fold" or name not in ID_COLUMNS}
    try:
        table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=empty)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such predictions file") from error
    except ValueError as error:
        # All parser and decoder errors of pandas are ValueErrors.
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a predictions table ({reason}); give the CSV that a run wrote") from error
    missing = [name for name in prediction_columns(classes) if name not in table.columns]
    if missing:
        raise InputError(f"{path}: columns {missing} are missing; a predictions table needs them for {list(classes)}")
    return table


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write `record` as an indented JSON file, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises InputError if it holds anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it or restore it from a backup") from error
    if not isinstance(record, dict):
        raise InputError(
            f"{path}: expected a JSON object, found {type(record).__name__}; restore the file from a backup"
        )
    return record


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(text: str) -> str:
    """Return the first 32 hexadecimal digits of the sha256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary binary file that replaces `path` if the block ends without an exception.

    A reader sees either the old file or the complete new one, also after a kill or a power failure. Missing folders are
    created.
    """
    # The temporary file is in the same folder, so that the last step is a rename within one file system. The data and
    # the folder are flushed to the disk before and after the rename.
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(_SCRATCH, f".{path.name}.", path.parent)
    scratch = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        # mkstemp creates files that only their owner can read, but labs share their outputs.
        scratch.chmod(0o644)
        scratch.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder tree in which no other process is writing."""
    for left in folder.rglob(f".*{_SCRATCH}"):
        left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems do not support fsync on folders and do not need it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
