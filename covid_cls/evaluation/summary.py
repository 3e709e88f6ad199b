"""From a predictions table to one plain record of every point estimate."""

from typing import Any

import pandas as pd

from covid_cls.evaluation.metrics import class_scores, confusion, decide, overall_scores
from covid_cls.evaluation.predictions import truth_and_prob, without_nan
from covid_cls.labels import Task


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
