"""`report` on runs that were trained: pages, tables, and errors of the user."""

import csv
import io
from pathlib import Path

import pytest

from covid_cls.evaluation.metrics import point_scores
from covid_cls.io import read_predictions
from covid_cls.tasks import TASKS
from tests.conftest import Command, FinishedRuns, command
from tests.reporting.sweeps import changed, write_run


@pytest.fixture(scope="module")
def report(environment: dict[str, str]) -> Command:
    """`python -m covid_cls.report *words`, started in `folder`."""
    return command("report", environment)


@pytest.fixture(scope="module")
def sweep(finished_runs: FinishedRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies of two runs below outputs/two."""
    folder = tmp_path_factory.mktemp("sweep")
    for words in (("task=three_class", "strategy=fc", "baselines=false"), ("task=three_class",)):
        finished_runs.copy(folder, *words)
    (folder / "outputs" / "phantom").rename(folder / "outputs" / "two")
    return folder


def test_a_report_on_trained_runs_has_a_page_and_tables(sweep: Path, report: Command, tmp_path: Path) -> None:
    first = report(tmp_path, f"runs={sweep / 'outputs' / 'two'}", "resamples=100")
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    output = sweep / "outputs" / "two" / "report"
    assert sorted(path.name for path in output.iterdir()) == ["index.html", "results.csv", "results.md"]
    assert "three class, phantom, split by patient: " in first.stdout
    assert f"results in {output}" in first.stdout
    page = (output / "index.html").read_text(encoding="utf-8")
    assert "resnet18, partial, ce" in page
    assert "The trained network on changed test images" in page
    text = (output / "results.csv").read_bytes()
    folders = sorted((sweep / "outputs" / "two").glob("three_class-*"))
    for row in csv.DictReader(io.StringIO(text.decode())):
        if row["backbone"]:
            (folder,) = [folder for folder in folders if f"-{row['strategy']}-" in folder.name]
            scores = point_scores(
                read_predictions(folder / "predictions-test.csv", TASKS["three_class"].classes), TASKS["three_class"]
            )
            assert float(row["value"] or "nan") == pytest.approx(scores[row["score"]], abs=1e-9, nan_ok=True)
    # A second report on the same runs, found by name in outputs: the same numbers, and one more test-set access.
    second = report(sweep, "runs=two", f"output={tmp_path / 'again'}", "resamples=100")
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "again" / "results.csv").read_bytes() == text
    assert "2, including this report" in (tmp_path / "again" / "index.html").read_text(encoding="utf-8")
    for folder in folders:
        assert len((folder / "test_accesses.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "runs is not set: give runs=… on the command line"),
        (("runs=nowhere",), "runs=nowhere: no such folder"),
        (("runs=empty",), "no run.json below it; give the folder of a sweep"),
        (("runs=one", "metric=acuracy"), "metric=acuracy: no such score; choose one of accuracy, balanced_accuracy"),
        (("runs=one", "level=high"), "report.level=high: expected float"),
        (("runs=one", "level=95"), "level=95: must lie between 0 and 1"),
        (("runs=one", "resamples=1"), "resamples=1: must be at least 2"),
    ],
    ids=str,
)
def test_a_fault_of_the_user_is_one_line(report: Command, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "one", changed())
    done = report(tmp_path, *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert says in line


def test_help_shows_the_keys(report: Command, tmp_path: Path) -> None:
    done = report(tmp_path, "--help")
    assert done.returncode == 0
    for words in ("runs=outputs/grid", "metric: balanced_accuracy", "Research use, not for diagnosis."):
        assert words in done.stdout
