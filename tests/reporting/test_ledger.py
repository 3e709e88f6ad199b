"""Openings of test predictions are counted, by any number of commands at once."""

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from covid_cls.errors import InputError
from covid_cls.records import LEDGER
from covid_cls.reporting.ledger import record_opening


def test_each_opening_is_counted_and_the_first_is_kept(tmp_path: Path) -> None:
    first = record_opening(tmp_path, "evaluate run=a, b")
    assert first.times == 1
    second = record_opening(tmp_path, 'report runs="x y"')
    assert second == (2, first.first)
    with (tmp_path / LEDGER).open(newline="") as file:
        assert [row["command"] for row in csv.DictReader(file)] == ["evaluate run=a, b", 'report runs="x y"']


def test_openings_at_once_are_all_counted(tmp_path: Path) -> None:
    record_opening(tmp_path, "first")
    with ThreadPoolExecutor(8) as pool:
        counts = [found.times for found in pool.map(lambda k: record_opening(tmp_path, f"number {k}"), range(40))]
    assert max(counts) == 41
    assert len((tmp_path / LEDGER).read_text().splitlines()) == 42


def test_a_look_that_leaves_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / LEDGER).mkdir()
    with pytest.raises(InputError, match=r"openings\.csv: .*cannot be recorded"):
        record_opening(tmp_path, "evaluate")
