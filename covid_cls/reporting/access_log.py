"""The log of accesses to the test predictions of a run.

Who sees a test score may choose by it: another threshold, another configuration, one more run. Such a choice makes the
next score on the same images optimistic. So every access is logged, and pages show how many there were.
"""

import csv
import datetime
import io
from pathlib import Path
from typing import NamedTuple

from covid_cls.errors import InputError
from covid_cls.io import FORMER_TEST_ACCESSES, TEST_ACCESSES

_COLUMNS = ["time", "command"]


class AccessCount(NamedTuple):
    """How often the test predictions of a run were read.

    Attributes:
        times: Number of accesses, the current one included.
        first: Time of the first access, ISO 8601 with its offset from UTC.
    """

    times: int
    first: str


def record_test_access(run_folder: Path, command: str) -> AccessCount:
    """Log an access to the test predictions of a run. Call it before they are read.

    Args:
        run_folder: Folder of the run. A log that an earlier version wrote is counted too.
        command: The command that reads the predictions, as typed.

    Raises:
        InputError: If the log cannot be written. The predictions must then not be read.
    """
    path = run_folder / TEST_ACCESSES
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            if file.tell() == 0:
                writer.writerow(_COLUMNS)
            writer.writerow([datetime.datetime.now().astimezone().isoformat(timespec="seconds"), command])
            # One write call, so that commands that run at the same time append complete lines. Two of them may both
            # find the file empty and write the header, which is therefore skipped wherever it is.
            file.write(line.getvalue())
        rows = []
        for log in (run_folder / FORMER_TEST_ACCESSES, path):
            if log.is_file():
                with log.open(encoding="utf-8", newline="") as file:
                    rows += [row for row in csv.reader(file) if row != _COLUMNS]
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{path}: the access to the test predictions cannot be recorded ({reason}). Make the folder writable."
        ) from error
    return AccessCount(len(rows), rows[0][0])
