"""Accesses to the test predictions of a run are counted, also those of commands that run at the same time."""

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from covid_cls.errors import InputError
from covid_cls.io import FORMER_TEST_ACCESSES, TEST_ACCESSES
from covid_cls.reporting.access_log import record_test_access


def test_each_access_is_counted_and_the_first_time_is_kept(tmp_path: Path) -> None:
    first = record_test_access(tmp_path, "evaluate run=a, b")
    assert first.times == 1
    second = record_test_access(tmp_path, 'report runs="x y"')
    assert second == (2, first.first)
    with (tmp_path / TEST_ACCESSES).open(newline="") as file:
        assert [row["command"] for row in csv.DictReader(file)] == ["evaluate run=a, b", 'report runs="x y"']


def test_accesses_at_the_same_time_are_all_counted(tmp_path: Path) -> None:
    record_test_access(tmp_path, "first")
    with ThreadPoolExecutor(8) as pool:
        counts = [found.times for found in pool.map(lambda k: record_test_access(tmp_path, f"number {k}"), range(40))]
    assert max(counts) == 41
    assert len((tmp_path / TEST_ACCESSES).read_text().splitlines()) == 42


def test_the_log_of_an_earlier_version_is_counted_and_left_as_it_is(tmp_path: Path) -> None:
    former = tmp_path / FORMER_TEST_ACCESSES
    text = "time,command\n2026-01-31T10:00:00+00:00,evaluate run=a\n2026-02-01T10:00:00+00:00,report\n"
    former.write_text(text)
    assert record_test_access(tmp_path, "evaluate run=a") == (3, "2026-01-31T10:00:00+00:00")
    assert record_test_access(tmp_path, "report") == (4, "2026-01-31T10:00:00+00:00")
    assert former.read_text() == text
    assert len((tmp_path / TEST_ACCESSES).read_text().splitlines()) == 1 + 2


def test_an_access_that_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    (tmp_path / TEST_ACCESSES).mkdir()
    with pytest.raises(InputError, match=r"test_accesses\.csv: .*cannot be recorded"):
        record_test_access(tmp_path, "evaluate")
