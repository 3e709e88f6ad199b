"""Predictions from any hand: a CSV with as little as image_id, label and prob_<class>, and a finished run's folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from covid_cls.errors import InputError, listed
from covid_cls.labels import CLASSES, TASKS, Task, canonical
from covid_cls.records import ID_COLUMNS, prediction_columns, read_json

if TYPE_CHECKING:  # a table is read, and refused, before the statistics libraries are imported
    from covid_cls.evaluation.metrics import Floats, Indices

_SMALLEST = 1e-12  # a probability of 0 has no logarithm


class Predictions(NamedTuple):
    """A sound table of `task` with every column of `records.prediction_columns`, and notes on what it lacked."""

    table: pd.DataFrame
    task: Task
    notes: list[str]


def read_scores(path: Path, task: Task | None = None) -> Predictions:
    """The predictions in a CSV with image_id, label and a prob_<class> per class; other columns are optional.

    Labels go by their aliases. task: deduced where it is None. A patient_id, source, split or fold that is not there
    is "". Logits that are not there, or do not give the probabilities, are made of these: their logarithms for a
    softmax, which differ from the logits by the same number in each class, and their log odds for sigmoids. InputError
    as in `truth_and_prob`, beginning with `path`; also where it is no CSV.
    """
    table = _text_table(path)
    task = task or _task_of(table, path)
    missing = [name for name in ("image_id", "label", *_columns("prob", task)) if name not in table.columns]
    if missing:
        raise InputError(f"{path}: columns {missing} are missing on line 1; task {task.name} needs them")
    table["label"] = [canonical(label) or label for label in table["label"]]
    for name in ID_COLUMNS:
        if name not in table.columns:
            table[name] = ""
    given = set(_columns("logit", task)) <= set(table.columns)
    if not given:
        table = table.assign(**dict.fromkeys(_columns("logit", task), "0"))
    table = table[prediction_columns(task.classes)]
    _, prob = truth_and_prob(table, task, str(path))
    scores = [name for name in table.columns if name not in ID_COLUMNS]
    table = table.astype(dict.fromkeys(scores, "float64"))
    notes = []
    if given and not _agree(table[_columns("logit", task)].to_numpy(), prob, task):
        given = False
        notes.append("the logits do not give the probabilities and were left aside")
    if not given:
        table[_columns("logit", task)] = _logit_of(prob, task)
        notes.append(f"without logits, {'log odds' if task.multilabel else 'log probabilities'} stand in for them")
    return Predictions(table, task, notes)


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


def finished_run(folder: Path) -> tuple[dict[str, Any], Task]:
    """The run.json of a finished run and its task. InputError where the folder is no run or a run has not finished."""
    if not (folder / "run.json").is_file():
        raise InputError(f"run={folder}: no run.json there (looked in {Path.cwd()}); give the folder of one run")
    record = read_json(folder / "run.json")
    if record.get("status") != "finished":
        status = record.get("status", "without a status")
        raise InputError(f"{folder}/run.json: the run is {status}, not finished; start its train command again")
    try:
        return record, TASKS[record["config"]["task"]["name"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}/run.json: config.task.name is none of {listed(list(TASKS))}; restore it") from error


def refuse_shared(val: pd.DataFrame, table: pd.DataFrame, val_path: Path, path: Path) -> None:
    """InputError where an image is in both: a threshold fitted to the images it is judged on looks too good."""
    shared = sorted(set(val["image_id"]) & set(table["image_id"]))
    if shared:
        raise InputError(f"{val_path}: {len(shared)} images are in {path} too: {listed(shared, 5)}; validate on others")


def without_nan(value: Any) -> Any:
    """`value`, plain dicts and lists, with None for each float that is nan: what JSON can hold."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _columns(kind: str, task: Task) -> list[str]:
    return [f"{kind}_{name}" for name in task.classes]


def _text_table(path: Path) -> pd.DataFrame:
    """A CSV as text, so that a score that is no number can be named by its line."""
    try:
        rows = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); give a CSV of predictions") from error
    except ValueError as error:  # all that pandas and the decoder find at fault
        raise InputError(f"{path}: not a CSV of predictions ({' '.join(str(error).split())})") from error
    names = [str(name).strip() for name in rows.iloc[0]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: columns {listed(twice)} stand on line 1 twice; keep one of each")
    return rows.iloc[1:].reset_index(drop=True).set_axis(names, axis=1)


def _task_of(table: pd.DataFrame, path: Path) -> Task:
    """The task whose classes have a prob_ column each; three classes are a softmax where most rows sum to one."""
    found = [name.removeprefix("prob_") for name in table.columns if name.startswith("prob_")]
    if sorted(found) == ["covid", "normal"]:
        return TASKS["binary"]
    if sorted(found) != sorted(CLASSES):
        wanted = "prob_covid, prob_normal and, for three classes, prob_pneumonia"
        raise InputError(f"{path}: columns for the classes {found} on line 1; a task's predictions have {wanted}")
    prob = table[_columns("prob", TASKS["three_class"])].apply(pd.to_numeric, errors="coerce").sum(axis=1)
    # Not all rows: a faulty one would turn a softmax into sigmoids, unseen.
    return TASKS["three_class" if (np.abs(prob - 1) <= 1e-3).mean() >= 0.5 else "three_class_multilabel"]


def _agree(logit: Floats, prob: Floats, task: Task) -> bool:
    from scipy.special import expit, softmax

    return bool(np.abs((expit(logit) if task.multilabel else softmax(logit, axis=1)) - prob).max() <= 1e-3)


def _logit_of(prob: Floats, task: Task) -> Floats:
    clipped = np.clip(prob, _SMALLEST, 1 - _SMALLEST if task.multilabel else 1)
    return np.log(clipped) - (np.log1p(-clipped) if task.multilabel else 0)


def _finite(name: str, column: pd.Series) -> Floats:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=math.nan)
    _refuse(name, column, ~np.isfinite(numbers), "every score is a finite number; check the model that wrote them")
    return numbers


def _refuse(name: str, column: pd.Series, bad: npt.ArrayLike, remedy: str) -> None:
    rows = np.flatnonzero(np.asarray(bad, dtype=bool))
    if len(rows):
        lines = [f"{value!r} on line {row + 2}" for row, value in zip(rows, column.iloc[rows].tolist(), strict=True)]
        raise InputError(f"{name}, {column.name}: {listed(lines, 5)}; {remedy}")
