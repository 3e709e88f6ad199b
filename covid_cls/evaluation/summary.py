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
    plain: dict[str, Any] = _without_nan(record)
    return plain


def truth_and_prob(table: pd.DataFrame, task: Task) -> tuple[Indices, Floats]:
    """Class indices (N,) and probabilities (N, K) in the task's order, from a table found sound.

    InputError names the fault, the lines of the CSV file (the header is line 1) and the remedy: missing columns, no
    rows, an image scored twice, an unknown label, a score that is no finite number, a probability outside [0, 1],
    or, for a softmax, a row whose probabilities do not sum to 1 within 1e-3.
    """
    missing = [name for name in prediction_columns(task.classes) if name not in table.columns]
    if missing:
        raise InputError(f"predictions: columns {missing} are missing; task {task.name} needs them")
    if table.empty:
        raise InputError("predictions: the table has no rows; score at least one image")
    _refuse(
        table["image_id"], table["image_id"].duplicated(), "an earlier line has it already; keep one line per image"
    )
    _refuse(table["label"], ~table["label"].isin(task.classes), f"task {task.name} knows {', '.join(task.classes)}")
    for name in task.classes:
        _finite(table[f"logit_{name}"])
    prob = np.column_stack([_finite(table[f"prob_{name}"]) for name in task.classes])
    for k, name in enumerate(task.classes):
        outside = (prob[:, k] < 0) | (prob[:, k] > 1)
        _refuse(table[f"prob_{name}"], outside, "a probability lies in [0, 1]; is this a logit?")
    if not task.multilabel:
        total = pd.Series(prob.sum(axis=1).round(6), name="sum of probabilities")
        _refuse(total, np.abs(total - 1) > 1e-3, f"it is 1 in task {task.name}; are these another task's predictions?")
    index = {name: k for k, name in enumerate(task.classes)}
    return np.array([index[label] for label in table["label"]], dtype=np.int64), prob


def _finite(column: pd.Series) -> Floats:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=math.nan)
    _refuse(column, ~np.isfinite(numbers), "every score is a finite number; check the model that wrote them")
    return numbers


def _refuse(column: pd.Series, bad: npt.ArrayLike, remedy: str) -> None:
    rows = np.flatnonzero(np.asarray(bad, dtype=bool))
    if len(rows):
        lines = [f"{value!r} on line {row + 2}" for row, value in zip(rows, column.iloc[rows].tolist(), strict=True)]
        raise InputError(f"predictions, {column.name}: {listed(lines, 5)}; {remedy}")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
