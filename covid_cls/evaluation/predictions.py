"""Predictions tables from any source: a CSV with image_id, label and prob_<class>, or the folder of a finished run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from covid_cls.errors import InputError, listed
from covid_cls.io import ID_COLUMNS, prediction_columns, read_json
from covid_cls.tasks import CLASSES, TASKS, Task, canonical

# Probabilities of 0 have no logarithm, so this one replaces them.
_SMALLEST = 1e-12


class Predictions(NamedTuple):
    """A valid predictions table.

    Attributes:
        table: Has all columns of `io.prediction_columns`.
        task: The task of the predictions.
        notes: What the file lacked and how it was replaced.
    """

    table: pd.DataFrame
    task: Task
    notes: list[str]


def load_predictions(path: Path, task: Task | None = None) -> Predictions:
    """Read a CSV with image_id, label and prob_<class> for each class; other columns are optional.

    Labels may be aliases such as "COVID-19". A missing patient_id, source, split or fold is "". If logits are missing
    or do not match the probabilities, they are computed from these: as logarithms for a softmax, which differ from the
    network's logits by one constant per image, and as log odds for sigmoids.

    Args:
        path: The CSV file.
        task: None to infer it from the columns.

    Raises:
        InputError: If the file is not a CSV, or for the reasons of `truth_and_prob`.
    """
    table = _text_table(path)
    task = task or _task_of(table, path)
    missing = [name for name in ("image_id", "label", *_columns("prob", task)) if name not in table.columns]
    if missing:
        raise InputError(f"{path}: columns {missing} are missing on line 1. Add them: task {task.name} needs them.")
    table["label"] = [canonical(label) or label for label in table["label"]]
    table = table.assign(**{name: "" for name in ID_COLUMNS if name not in table.columns})
    logits = _columns("logit", task)
    given = set(logits) <= set(table.columns)
    if not given:
        table = table.assign(**dict.fromkeys(logits, "0"))
    table = table[prediction_columns(task.classes)]
    # The table is still text here, so that a message quotes what the file has.
    _, prob = truth_and_prob(table, task, str(path))
    table = table.astype({name: "float64" for name in table.columns if name not in ID_COLUMNS})
    notes = []
    if given and not _match(table[logits].to_numpy(), prob, task):
        given = False
        notes.append("the logits do not match the probabilities and were ignored")
    if not given:
        clipped = np.clip(prob, _SMALLEST, 1 - _SMALLEST if task.multilabel else 1)
        table[logits] = np.log(clipped) - (np.log1p(-clipped) if task.multilabel else 0)
        notes.append(f"{'log odds' if task.multilabel else 'log probabilities'} are used because there are no logits")
    return Predictions(table, task, notes)


def truth_and_prob(
    table: pd.DataFrame, task: Task, name: str = "predictions"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Check a predictions table and return its class indices (N,) and probabilities (N, K) in the task's order.

    Args:
        table: The predictions.
        task: Their task.
        name: Name of the table in messages, if possible its file.

    Raises:
        InputError: If columns or rows are missing, an image occurs twice, a label is unknown, a score is not a finite
            number, a probability is outside [0, 1], or, for a softmax, the probabilities of a row do not sum to 1
            within 1e-3. The message has the line numbers in the CSV file, whose header is line 1.
    """
    missing = [column for column in prediction_columns(task.classes) if column not in table.columns]
    if missing:
        raise InputError(f"{name}: columns {missing} are missing. Add them: task {task.name} needs them.")
    if table.empty:
        raise InputError(f"{name}: the table has no rows. Add at least one scored image.")
    ids, labels = table["image_id"], table["label"]
    _check_rows(name, ids, ids.duplicated(), "This image is on an earlier line too. Keep one line per image.")
    known = f"Use one of task {task.name}: {', '.join(task.classes)}."
    _check_rows(name, labels, ~labels.isin(task.classes), known)
    for label in task.classes:
        _finite(name, table[f"logit_{label}"])
    prob = np.column_stack([_finite(name, table[f"prob_{label}"]) for label in task.classes])
    for label, column in zip(task.classes, prob.T, strict=True):
        outside = (column < 0) | (column > 1)
        _check_rows(name, table[f"prob_{label}"], outside, "A probability is in [0, 1]. Check whether this is a logit.")
    if not task.multilabel:
        # Tables with three or four decimals are accepted.
        total = pd.Series(prob.sum(axis=1).round(6), name="sum of probabilities")
        remedy = f"It must be 1 in task {task.name}. Check whether these predictions are of another task."
        _check_rows(name, total, np.abs(total - 1) > 1e-3, remedy)
    return np.array([task.classes.index(label) for label in labels], dtype=np.int64), prob


def pool_folds(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join the test parts of a cross-validation into one predictions table, sorted by image_id.

    Raises:
        InputError: If an image is in the test part of two folds.
    """
    table = pd.concat(parts, ignore_index=True)
    repeated = sorted(set(table.loc[table["image_id"].duplicated(), "image_id"]))
    if repeated:
        raise InputError(
            f"{len(repeated)} images are in the test part of more than one fold: {listed(repeated, 3)}. "
            "Pool only the folds of one division of the data."
        )
    return table.sort_values("image_id", kind="stable", ignore_index=True)


def finished_run(folder: Path) -> tuple[dict[str, Any], Task]:
    """Return the run.json of a finished run and its task.

    Raises:
        InputError: If the folder contains no run, or its run has not finished.
    """
    if not (folder / "run.json").is_file():
        raise InputError(f"run={folder}: no run.json there (searched from {Path.cwd()}). Give the folder of one run.")
    record = read_json(folder / "run.json")
    if record.get("status") != "finished":
        status = record.get("status", "without a status")
        raise InputError(f"{folder}/run.json: the run is {status}, not finished. Start its train command again.")
    try:
        return record, TASKS[record["config"]["task"]["name"]]
    except (KeyError, TypeError) as error:
        known = listed(list(TASKS))
        raise InputError(f"{folder}/run.json: config.task.name is not one of {known}. Restore the file.") from error


def refuse_shared_images(val: pd.DataFrame, table: pd.DataFrame, val_path: Path, path: Path) -> None:
    """Raise InputError if a validation and a test table have images in common."""
    # A threshold that was fitted to the images on which it is tested looks too good.
    shared = sorted(set(val["image_id"]) & set(table["image_id"]))
    if shared:
        raise InputError(
            f"{val_path}: {len(shared)} images are in {path} too: {listed(shared, 5)}. Use other images for validation."
        )


def without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested dicts and lists with None in place of nan, which JSON does not have."""
    return {key: _without_nan(value) for key, value in record.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return without_nan(value)
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _columns(kind: str, task: Task) -> list[str]:
    return [f"{kind}_{name}" for name in task.classes]


def _text_table(path: Path) -> pd.DataFrame:
    """Read all columns of a CSV as text, so that a message can quote a value that is not a number."""
    try:
        # "NA" may be an image_id, and spreadsheets write a byte-order mark at the start of a CSV.
        rows = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}). Give a CSV of predictions.") from error
    except ValueError as error:
        # All parser and decoder errors of pandas are ValueErrors.
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a CSV of predictions ({reason}). Give the table as CSV.") from error
    names = [str(name).strip() for name in rows.iloc[0]]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"{path}: line 1 has the columns {listed(repeated)} more than once. Keep one of each.")
    return rows.iloc[1:].reset_index(drop=True).set_axis(names, axis=1)


def _task_of(table: pd.DataFrame, path: Path) -> Task:
    """Return the task that has a prob_ column for each of its classes."""
    found = [name.removeprefix("prob_") for name in table.columns if name.startswith("prob_")]
    if sorted(found) == ["covid", "normal"]:
        return TASKS["binary"]
    if sorted(found) != sorted(CLASSES):
        wanted = "prob_covid, prob_normal and, for three classes, prob_pneumonia"
        raise InputError(f"{path}: line 1 has probabilities of the classes {found}. Name the columns {wanted}.")
    total = table[_columns("prob", TASKS["three_class"])].apply(pd.to_numeric, errors="coerce").sum(axis=1)
    # Three classes are a softmax if most rows sum to one. If all had to, one faulty row would turn a softmax into
    # sigmoids without a message.
    return TASKS["three_class" if (np.abs(total - 1) <= 1e-3).mean() >= 0.5 else "three_class_multilabel"]


def _match(logit: npt.NDArray[np.float64], prob: npt.NDArray[np.float64], task: Task) -> bool:
    from scipy.special import expit, softmax

    # A tolerance for rounded numbers; logits of another temperature differ by more.
    return bool(np.abs((expit(logit) if task.multilabel else softmax(logit, axis=1)) - prob).max() <= 1e-3)


def _finite(name: str, column: pd.Series) -> npt.NDArray[np.float64]:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=math.nan)
    _check_rows(name, column, ~np.isfinite(numbers), "Every score must be a finite number. Check the model's outputs.")
    return numbers


def _check_rows(name: str, column: pd.Series, bad: npt.ArrayLike, remedy: str) -> None:
    rows = np.flatnonzero(np.asarray(bad, dtype=bool))
    if len(rows):
        lines = [f"{value!r} on line {row + 2}" for row, value in zip(rows, column.iloc[rows].tolist(), strict=True)]
        raise InputError(f"{name}, {column.name}: {listed(lines, 5)}. {remedy}")
