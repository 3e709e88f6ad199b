"""How often a run's test predictions were opened: each look invites a choice that makes the next score optimistic."""

import csv
import datetime
import io
from pathlib import Path
from typing import NamedTuple

from covid_cls.errors import InputError
from covid_cls.records import LEDGER

_COLUMNS = ["time", "command"]


class Openings(NamedTuple):
    """times: how often, this time included; first: when for the first time, ISO 8601 with its offset from UTC."""

    times: int
    first: str


def record_opening(run_folder: Path, command: str) -> Openings:
    """The openings of a run's test predictions, after this one was written to its ledger; call it before reading.

    command: what opens them, as typed. InputError where the ledger cannot be written: a look that leaves no trace
    is refused.
    """
    path = run_folder / LEDGER
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    try:
        with path.open("a+", encoding="utf-8", newline="") as file:
            if file.tell() == 0:
                writer.writerow(_COLUMNS)
            writer.writerow([now, command])
            file.write(line.getvalue())  # one write: commands that open at once append whole lines
            file.flush()
            file.seek(0)
            rows = [row for row in csv.reader(file) if row != _COLUMNS]
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: the opening of the test predictions cannot be recorded ({reason})") from error
    return Openings(len(rows), rows[0][0])
