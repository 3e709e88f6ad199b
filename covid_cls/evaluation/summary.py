"""From a predictions table to one plain record of every point estimate."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from covid_cls.errors import InputError, listed
from covid_cls.evaluation.metrics import Floats, Indices, class_scores, confusion, decide, overall_scores
from covid_cls.labels import Task
from covid_cls.records import prediction_columns


def summarise(table: pd.DataFrame, task: Task) -> dict[str, Any]:
    """n_images, n_patients, n_per_class, overall, per_class and confusion, ready for JSON: None stands for nan.

    confusion holds `rows` (truth) and `columns` (decision), the class names, and `counts`, a list of rows. An image
    without a patient_id counts as a patient of its own. InputError as in `truth_and_prob`.
    """
    truth, prob = truth_and_prob(table, task)
    decided = decide(prob, task)
    patients = table["patient_id"].replace("", pd.NA)
    classes = list(task.classes)
    record = {
        "n_images": len(table),
        "n_patients": int(patients.nunique() + patients.isna().sum()),
        "n_per_class": {name: int((truth == k).sum()) for k, name in enumerate(classes)},
        "overall": overall_scores(truth, prob, decided, task),
        "per_class": class_scores(truth, prob, decided, task),
        "confusion": {
            "rows": classes,
            "columns": list(classes),
            "counts": confusion(truth, decided, len(classes)).tolist(),
        },
    }
    plain: dict[str, Any] = without_nan(record)
    return plain


def truth_and_prob(table: pd.DataFrame, task: Task, name: str = "predictions") -> tuple[Indices, Floats]:
    """Class indices (N,) and probabilities (N, K) in the task's order, from a table found sound.

    name: of the table in messages, best its file. InputError names the fault, the lines of the CSV file (the header is
    line 1) and the remedy: missing columns, no rows, an image scored twice, an unknown label, a score that is no
    finite number, a probability outside [0, 1], or, for a softmax, a row whose probabilities do not sum to 1 within
    1e-3.
    """
    missing = [column for column in prediction_columns(task.classes) if column not in table.columns]
    if missing:
        raise InputError(f"{name}: columns {missing} are missing; task {task.name} needs them")
    if table.empty:
        raise InputError(f"{name}: the table has no rows; score at least one image")
    ids, labels = table["image_id"], table["label"]
    _refuse(name, ids, ids.duplicated(), "an earlier line has it already; keep one line per image")
    _refuse(name, labels, ~labels.isin(task.classes), f"task {task.name} knows {', '.join(task.classes)}")
    for label in task.classes:
        _finite(name, table[f"logit_{label}"])
    prob = np.column_stack([_finite(name, table[f"prob_{label}"]) for label in task.classes])
    for label, column in zip(task.classes, prob.T, strict=True):
        outside = (column < 0) | (column > 1)
        _refuse(name, table[f"prob_{label}"], outside, "a probability lies in [0, 1]; is this a logit?")
    if not task.multilabel:
        total = pd.Series(prob.sum(axis=1).round(6), name="sum of probabilities")
        remedy = f"it is 1 in task {task.name}; are these another task's predictions?"
        _refuse(name, total, np.abs(total - 1) > 1e-3, remedy)
    index = {name: k for k, name in enumerate(task.classes)}
    return np.array([index[label] for label in table["label"]], dtype=np.int64), prob


def without_nan(value: Any) -> Any:
    """`value`, plain dicts and lists, with None for each float that is nan: what JSON can hold."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _finite(name: str, column: pd.Series) -> Floats:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=math.nan)
    _refuse(name, column, ~np.isfinite(numbers), "every score is a finite number; check the model that wrote them")
    return numbers


def _refuse(name: str, column: pd.Series, bad: npt.ArrayLike, remedy: str) -> None:
    rows = np.flatnonzero(np.asarray(bad, dtype=bool))
    if len(rows):
        lines = [f"{value!r} on line {row + 2}" for row, value in zip(rows, column.iloc[rows].tolist(), strict=True)]
        raise InputError(f"{name}, {column.name}: {listed(lines, 5)}; {remedy}")
