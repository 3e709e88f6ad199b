"""`evaluate` on finished runs, other images and predictions of unknown origin: what it prints and leaves behind."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from covid_cls.data.phantoms import build_phantoms
from covid_cls.errors import InputError
from covid_cls.evaluate import evaluate as evaluate_function
from covid_cls.evaluation.assessment import assess, summarise
from covid_cls.evaluation.predictions import load_predictions
from covid_cls.io import DISCLAIMER, write_predictions
from covid_cls.tasks import TASKS
from tests.conftest import Command, FinishedRuns, command
from tests.evaluation.test_assessment import cohort

FEW = "resamples=200"
TASK = TASKS["three_class"]
FIGURES = ("confusion", "decision_curve", "precision_recall", "reliability", "roc")


@pytest.fixture(scope="module")
def evaluate(environment: dict[str, str]) -> Command:
    """Return a function that runs `python -m covid_cls.evaluate *words` in a folder."""
    return command("evaluate", environment)


@pytest.fixture
def own_run(finished_runs: FinishedRuns, tmp_path: Path) -> Path:
    """Return a run that a test may change, without fitted thresholds and without an access to its test split."""
    copy = finished_runs.copy(tmp_path, "task=three_class").rename(tmp_path / "outputs" / "phantom" / "copy")
    (copy / "operating.json").unlink(missing_ok=True)
    return copy


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_a_run_is_evaluated_from_its_predictions_alone(own_run: Path, tmp_path: Path, evaluate: Command) -> None:
    shutil.rmtree(own_run / "checkpoints")
    done = evaluate(tmp_path, "run=phantom/copy", FEW)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = metrics(own_run / "evaluation")
    operating = json.loads((own_run / "operating.json").read_text())
    table = load_predictions(own_run / "predictions-test.csv", TASK).table
    again = assess(table, TASK, operating, resamples=200)
    assert {key: found[key] for key in again if key != "notes"} == {k: v for k, v in again.items() if k != "notes"}
    assert found["image"]["confusion"] == summarise(table, TASK)["confusion"]
    assert found["operating"] == operating
    assert found["openings"]["times"] == 1
    assert {path.stem for path in (own_run / "evaluation" / "figures").iterdir()} == set(FIGURES)
    page = (own_run / "evaluation" / "evaluation.html").read_text(encoding="utf-8")
    assert not re.search(r"<img|<script|<link|src=|href=\"http|url\(http", page)  # it needs no other file
    for text in (page, done.stdout, found["disclaimer"]):
        assert DISCLAIMER in text
    assert "macro AUROC" in done.stdout
    assert "covid by thresholds chosen on validation:" in done.stdout
    assert {entry.name for entry in tmp_path.iterdir()} == {"outputs"}


def test_each_access_to_the_test_predictions_is_counted(own_run: Path, tmp_path: Path, evaluate: Command) -> None:
    for count in (1, 2):
        assert evaluate(tmp_path, f"run={own_run}", f"output=access{count}", FEW).returncode == 0
        assert metrics(tmp_path / f"access{count}")["openings"]["times"] == count
    assert len((own_run / "test_accesses.csv").read_text().splitlines()) == 1 + 2
    first, second = metrics(tmp_path / "access1"), metrics(tmp_path / "access2")
    first.pop("openings"), second.pop("openings")
    assert first == second


def test_test_labels_affect_neither_temperature_nor_thresholds(
    own_run: Path, tmp_path: Path, evaluate: Command
) -> None:
    tainted = tmp_path / "outputs" / "phantom" / "tainted"
    shutil.copytree(own_run, tainted)
    table = pd.read_csv(own_run / "predictions-test.csv", dtype=str, keep_default_na=False)
    table["label"] = np.random.default_rng(0).permutation(table["label"].to_numpy())
    table.to_csv(tainted / "predictions-test.csv", index=False)
    for folder in (own_run, tainted):
        assert evaluate(tmp_path, f"run={folder}", FEW).returncode == 0
    assert (own_run / "operating.json").read_bytes() == (tainted / "operating.json").read_bytes()
    clean, other = metrics(own_run / "evaluation"), metrics(tainted / "evaluation")
    assert clean["operating"] == other["operating"]
    assert clean["image"]["confusion"] != other["image"]["confusion"]


def test_test_predictions_are_not_accessed_before_thresholds_are_frozen(
    own_run: Path, tmp_path: Path, evaluate: Command
) -> None:
    (own_run / "predictions-val.csv").write_text("image_id\n")
    done = evaluate(tmp_path, f"run={own_run}")
    assert done.returncode == 2
    assert f"{own_run}/predictions-val.csv: columns ['label', 'prob_covid'" in done.stderr
    assert not (own_run / "test_accesses.csv").exists()


def test_other_images_are_scored_with_the_frozen_thresholds_of_the_run(
    own_run: Path, tmp_path: Path, evaluate: Command
) -> None:
    folder = build_phantoms(tmp_path / "elsewhere", images=24, seed=7).parent
    manifest = pd.read_csv(folder / "manifest.csv", dtype=str, keep_default_na=False)
    manifest = manifest[manifest["label"] != "pneumonia"]
    manifest.to_csv(folder / "manifest.csv", index=False)
    words = ("data=manifest", f"data.path={folder / 'manifest.csv'}")
    done = evaluate(tmp_path, f"run={own_run}", *words, FEW)
    assert done.returncode == 0, done.stderr
    found = metrics(own_run / f"evaluation-{folder.name}")
    assert found["operating"] == json.loads((own_run / "model" / "model.json").read_text())["operating"]
    assert (found["n_images"], found["split"]) == (len(manifest), "external")
    assert found["image"]["overall"]["macro_auroc"]["value"] is None
    assert any(f"{folder.name} has no image of pneumonia" in note for note in found["notes"])
    assert not (own_run / "test_accesses.csv").exists()
    idle = evaluate(tmp_path, f"run={own_run}", *words, "data.size=64")
    assert idle.returncode == 2
    assert idle.stderr.startswith("error: data.size=64: has no effect")


def test_scoring_the_images_of_the_run_again_gives_the_same_scores(
    own_run: Path, tmp_path: Path, evaluate: Command
) -> None:
    done = evaluate(tmp_path, f"run={own_run}", "data=phantom", "data.images=48", "output=again", FEW)
    assert done.returncode == 0, done.stderr
    scores = [f"logit_{name}" for name in TASK.classes]
    before = load_predictions(own_run / "predictions-test.csv", TASK).table.set_index("image_id")[scores]
    after = load_predictions(tmp_path / "again" / "predictions-external.csv", TASK).table.set_index("image_id")[scores]
    assert after.loc[before.index].to_numpy() == pytest.approx(before.to_numpy(), abs=1e-4)
    assert "48 of these images are in the data set of the run, byte for byte" in done.stdout


def test_predictions_of_other_programs_are_evaluated_with_and_without_validation(
    tmp_path: Path, evaluate: Command
) -> None:
    needed = ["image_id", "label", *(f"prob_{name}" for name in TASK.classes)]
    cohort(TASK)[needed].to_csv(tmp_path / "theirs.csv", index=False)
    val = cohort(TASK, seed=1)[needed].assign(image_id=lambda table: "val-" + table["image_id"])
    val.to_csv(tmp_path / "val.csv", index=False)
    done = evaluate(tmp_path, "predictions=theirs.csv", "validation=val.csv", "sensitivity=0.9", FEW)
    assert done.returncode == 0, done.stderr
    found = metrics(tmp_path / "evaluation")
    assert found["task"] == "three_class"
    assert set(found["operating"]["thresholds"]) == {"youden", "sensitivity_90", "specificity_95"}
    assert any("log probabilities are used" in note for note in found["notes"])
    done = evaluate(tmp_path, "predictions=theirs.csv", "output=alone", FEW)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "alone")["operating"] is None
    assert "note: without validation predictions there are no thresholds and no temperature" in done.stdout


def test_predictions_of_a_single_class_are_evaluated_with_a_note(tmp_path: Path, evaluate: Command) -> None:
    table = cohort(TASK)
    write_predictions(table[table["label"] == "covid"], tmp_path / "theirs.csv")
    done = evaluate(tmp_path, "predictions=theirs.csv", FEW)
    assert done.returncode == 0, done.stderr
    assert "note: no image of normal, pneumonia: the scores that need one are undefined" in done.stdout
    assert done.stderr == ""


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which is entered, with predictions good and bad and a run that has not finished."""
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text('{"status": "running"}')
    (tmp_path / "broken.csv").write_text("image_id,label,prob_covid,prob_normal\na,flu,1,0\n")
    write_predictions(cohort(TASK), tmp_path / "good.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give one of run=FOLDER, model=FOLDER with data=, and predictions=FILE.csv"),
        ("run=a predictions=b.csv", "give one of run=FOLDER, model=FOLDER with data=, and predictions=FILE.csv"),
        ("predictions=absent.csv", "predictions=absent.csv: no such file (searched in "),
        ("predictions=good.csv validation=absent.csv", "validation=absent.csv: no such file (searched in "),
        ("predictions=good.csv validation=good.csv", "good.csv: 60 images are in good.csv too"),
        ("predictions=good.csv data=phantom", "data= does not go with predictions="),
        ("run=unfinished task=binary", "task= does not go with run="),
        ("run=unfinished validation=good.csv", "validation= does not go with run="),
        ("predictions=good.csv resamples=many", "resamples=many: expected int"),
        ("predictions=good.csv sensitivity=high", "sensitivity=high: expected float"),
        ("predictions=good.csv resamples=10", "resamples=10 level=0.95: at least 100"),
        ("predictions=good.csv task=binary", "good.csv, label: 'pneumonia' on line 4"),
        ("run=unfinished data=manifest", "data.path is not set"),
    ],
)
def test_a_fault_of_the_input_is_named_before_anything_is_written(words: str, message: str, inputs: Path) -> None:
    before = sorted(inputs.rglob("*"))
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate_function(*words.split())
    assert sorted(inputs.rglob("*")) == before


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run=nowhere", "run=nowhere: no such folder (searched in "),
        ("run=.", "run=.: no run.json there"),
        ("run=unfinished", "unfinished/run.json: the run is running, not finished"),
        ("predictions=broken.csv", "broken.csv, label: 'flu' on line 2"),
        ("resample=10", "Could not override 'resample'"),
    ],
)
def test_a_fault_of_the_input_is_one_line_and_exit_code_2(
    word: str, message: str, inputs: Path, evaluate: Command
) -> None:
    done = evaluate(inputs, word)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_without_test_predictions_is_refused(own_run: Path, tmp_path: Path, evaluate: Command) -> None:
    (own_run / "predictions-test.csv").unlink()
    done = evaluate(tmp_path, f"run={own_run}")
    assert done.returncode == 2
    assert f"{own_run}/predictions-test.csv: no such file. Train the run with test=true" in done.stderr


def test_help_shows_the_commands(tmp_path: Path, evaluate: Command) -> None:
    done = evaluate(tmp_path, "--help")
    assert done.returncode == 0
    assert "python -m covid_cls.evaluate predictions=" in done.stdout
    assert DISCLAIMER in done.stdout
