"""Run folders and model folders of version 0.1.0 still open."""

import json
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from covid_cls.data.phantoms import build_phantoms
from tests.conftest import ROOT, Command, command

ARCHIVE = ROOT / "tests" / "fixtures" / "version_0_1_0.tar.xz"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which `outputs/phantom` holds two runs of version 0.1.0."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run_of_seed(folder: Path, seed: int) -> Path:
    (found,) = (folder / "outputs" / "phantom").glob(f"*-s{seed}-*")
    return found


def test_evaluate_opens_an_old_run_and_continues_its_count_of_accesses(
    unpacked: Path, environment: dict[str, str]
) -> None:
    run = run_of_seed(unpacked, 1)
    header = "time,command\n"
    (run / "openings.csv").write_text(header + "2026-11-25T10:00:00+00:00,python -m covid_cls.evaluate\n")
    done = command("evaluate", environment)(unpacked, f"run={run}", "resamples=100", "output=evaluated")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((unpacked / "evaluated" / "metrics.json").read_text())
    assert (run / "test_accesses.csv").is_file()
    assert metrics["openings"]["times"] == 2


def test_report_compares_old_runs_with_their_baselines(unpacked: Path, environment: dict[str, str]) -> None:
    done = command("report", environment)(unpacked, "runs=outputs/phantom", "resamples=100", "output=report")
    assert done.returncode == 0, done.stderr
    results = pd.read_csv(unpacked / "report" / "results.csv")
    assert len(results) > 0
    page = (unpacked / "report" / "index.html").read_text()
    assert "No baselines" not in page
    assert "without test predictions" not in page


def test_predict_gives_the_probabilities_of_the_old_run(unpacked: Path, environment: dict[str, str]) -> None:
    run = run_of_seed(unpacked, 0)
    images = build_phantoms(unpacked / "phantoms", images=48)
    words = (f"model={run}", f"input={images}", "output=table.csv", "threshold=argmax")
    done = command("predict", environment)(unpacked, *words)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(unpacked / "table.csv").set_index("image_id")
    old = pd.read_csv(run / "predictions-test.csv").set_index("image_id")
    columns = [f"prob_{name}" for name in ("covid", "normal", "pneumonia")]
    assert (table.loc[old.index, columns] - old[columns]).abs().max().max() < 1e-6


def test_train_states_why_an_old_run_is_not_continued(unpacked: Path, train: Command) -> None:
    words = ("task=three_class", "data.images=48", "data.size=48", "preprocess.crop=48", "data.batch_size=8")
    words += ("trainer=cpu", "trainer.max_epochs=1", "trainer.precision=32-true", "strategy=fc", "head.hidden=null")
    done = train(unpacked, *words, "logger=none", "audit=off", "backbone.weights=none", "baselines=false", "seed=1")
    assert done.returncode == 0, done.stderr
    assert "trained by covid_cls 0.1.0" in done.stdout
    assert len(list((unpacked / "outputs" / "phantom").glob("*-s1-*"))) == 2
