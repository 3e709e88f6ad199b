"""Predictions from any CSV: required columns, replaced logits, inferred tasks, and messages with line numbers."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.assessment import summarise
from covid_cls.evaluation.predictions import finished_run, load_predictions, refuse_shared_images
from covid_cls.io import prediction_columns, read_predictions, write_json, write_predictions
from covid_cls.tasks import TASKS, Task
from tests.evaluation.test_assessment import predictions

ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def bare(task: Task, path: Path) -> Path:
    """Write a CSV with only the required columns, in another order."""
    table = predictions(task)[["label", *(f"prob_{name}" for name in reversed(task.classes)), "image_id"]]
    table.to_csv(path, index=False)
    return path


@ALL_TASKS
def test_only_id_label_and_probabilities_are_required(task: Task, tmp_path: Path) -> None:
    found = load_predictions(bare(task, tmp_path / "theirs.csv"))
    assert found.task == task
    assert list(found.table.columns) == prediction_columns(task.classes)
    assert set(found.table["patient_id"]) == {""}
    original = predictions(task)
    one, other = (summarise(t.assign(patient_id=""), task)["overall"] for t in (found.table, original))
    assert one == pytest.approx(other, abs=1e-9)
    centred = [t[[f"logit_{name}" for name in task.classes]].to_numpy(dtype=float) for t in (found.table, original)]
    # The probabilities of a softmax do not determine the mean of its logits.
    if not task.multilabel:
        centred = [logit - logit.mean(axis=1, keepdims=True) for logit in centred]
    assert centred[0] == pytest.approx(centred[1], abs=1e-9)
    assert any(note.endswith("are used because there are no logits") for note in found.notes)


@ALL_TASKS
def test_the_table_of_a_run_is_read_unchanged(task: Task, tmp_path: Path) -> None:
    write_predictions(predictions(task), tmp_path / "predictions-test.csv")
    found = load_predictions(tmp_path / "predictions-test.csv")
    expected = read_predictions(tmp_path / "predictions-test.csv", task.classes).fillna({"fold": ""})
    pd.testing.assert_frame_equal(found.table, expected, check_dtype=False)
    assert found.notes == []


def test_logits_that_do_not_match_the_probabilities_are_ignored(tmp_path: Path) -> None:
    table = predictions(TASKS["binary"])
    table.assign(logit_covid=0.0).to_csv(tmp_path / "theirs.csv", index=False)
    found = load_predictions(tmp_path / "theirs.csv")
    assert found.notes[0] == "the logits do not match the probabilities and were ignored"
    assert np.exp(found.table["logit_covid"]).tolist() == pytest.approx(table["prob_covid"].tolist())


def test_labels_may_be_aliases_and_logits_of_certain_probabilities_are_finite(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image_id,label,prob_covid,prob_normal\na,COVID-19,1,0\nb,No_findings,0,1\n")
    found = load_predictions(tmp_path / "a.csv")
    assert found.table["label"].tolist() == ["covid", "normal"]
    assert np.isfinite(found.table[["logit_covid", "logit_normal"]].to_numpy(dtype=float)).all()


def test_the_task_can_be_given(tmp_path: Path) -> None:
    path = bare(TASKS["three_class"], tmp_path / "theirs.csv")
    assert load_predictions(path, TASKS["three_class_multilabel"]).task.multilabel
    with pytest.raises(InputError, match=r"theirs.csv: columns \['prob_pneumonia'\] are missing on line 1"):
        load_predictions(bare(TASKS["binary"], path), TASKS["three_class"])


HEAD = "image_id,label,prob_covid,prob_normal"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a CSV of predictions (No columns to parse from file)"),
        (f"{HEAD}\n", "the table has no rows"),
        ("image_id,label\na,covid\n", "line 1 has probabilities of the classes []"),
        ("label,prob_covid,prob_normal\ncovid,1,0\n", "columns ['image_id'] are missing on line 1"),
        (f"{HEAD},prob_tb\na,covid,1,0,0\n", "line 1 has probabilities of the classes ['covid', 'normal', 'tb']"),
        (f"{HEAD},prob_covid\na,covid,1,0,1\n", "line 1 has the columns prob_covid more than once"),
        (
            f"{HEAD}\na,covid,0.9,0.1\nb,normal,0.9\n",
            ", prob_normal: '' on line 3. Every score must be a finite number",
        ),
        (f"{HEAD}\na,covid,0.9,0.1\nb,normal,0.9,0.1,7\n", "Expected 4 fields in line 3, saw 5"),
        (
            f"{HEAD}\na,covid,0.9,0.1\nb,flu,0.9,0.1\n",
            ", label: 'flu' on line 3. Use one of task binary: covid, normal",
        ),
        (f"{HEAD}\na,covid,0.9,0.1\nb,normal,0.9,0.2\n", ", sum of probabilities: 1.1 on line 3. It must be 1"),
        (f"{HEAD}\na,covid,0.9,0.1\na,normal,0.9,0.1\n", ", image_id: 'a' on line 3. This image is on an earlier line"),
        (f"{HEAD}\na,covid,0.9,0.1\nb,normal,,1\n", ", prob_covid: '' on line 3. Every score must be a finite number"),
        (f"{HEAD}\na,covid,0.9,0.1\nb,normal,nan,1\n", ", prob_covid: 'nan' on line 3"),
        (f"{HEAD}\na,covid,0.9,0.1\nb,normal,high,1\n", ", prob_covid: 'high' on line 3"),
        (f"{HEAD}\na,covid,2.2,-1.2\n", ", prob_covid: '2.2' on line 2. A probability is in [0, 1]"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) and "," in value[:12] else "",
)
def test_a_message_has_file_column_and_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        load_predictions(path)


def test_a_file_that_is_not_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff\xfe")
    for name in ("a.png", "absent.csv", ""):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            load_predictions(tmp_path / name)


def test_one_invalid_row_does_not_turn_a_softmax_into_sigmoids(tmp_path: Path) -> None:
    table = predictions(TASKS["three_class"])
    table.loc[4, "prob_covid"] = 0.0
    table.to_csv(tmp_path / "theirs.csv", index=False)
    with pytest.raises(InputError, match=r"sum of probabilities: .* on line 6. It must be 1 in task three_class"):
        load_predictions(tmp_path / "theirs.csv")


def test_validation_and_test_must_not_share_images(tmp_path: Path) -> None:
    table = predictions(TASKS["binary"])
    with pytest.raises(InputError, match=r"val.csv: 5 images are in .*test.csv too: image0"):
        refuse_shared_images(table.iloc[:5], table, tmp_path / "val.csv", tmp_path / "test.csv")
    refuse_shared_images(table.iloc[:5], table.iloc[5:], tmp_path / "val.csv", tmp_path / "test.csv")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "no run.json there"),
        ({"status": "running"}, "the run is running, not finished. Start its train command again."),
        ({}, "the run is without a status, not finished"),
        (
            {"status": "finished", "config": {"task": {"name": "binery"}}},
            "task.name is not one of binary, three_class",
        ),
        ({"status": "finished", "config": None}, "task.name is not one of binary, three_class"),
    ],
)
def test_an_unfinished_run_is_refused(record: dict[str, object] | None, message: str, tmp_path: Path) -> None:
    if record is not None:
        write_json(tmp_path / "run.json", record)
    with pytest.raises(InputError, match=re.escape(message)):
        finished_run(tmp_path)
