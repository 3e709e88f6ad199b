"""Thresholds of p(covid), chosen on validation only, and the value of decisions at a threshold.

The positive class is covid. An image is called covid if its calibrated p(covid) is at least the threshold.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import roc_curve

from covid_cls.errors import InputError
from covid_cls.evaluation.calibration import calibrated, fit_temperature, logits
from covid_cls.evaluation.intervals import patient_codes
from covid_cls.evaluation.metrics import Floats, Indices
from covid_cls.evaluation.predictions import load_predictions, truth_and_prob, without_nan
from covid_cls.io import read_json, write_json
from covid_cls.tasks import POSITIVE, Task

PREVALENCES = (0.01, 0.05, 0.1, 0.5)
# Keys of operating.json that an evaluation needs.
_FROZEN = ("temperature", "thresholds", "targets", "n_per_class", "notes")


def fit_operating(
    val: pd.DataFrame, task: Task, *, sensitivity: float = 0.95, specificity: float = 0.95
) -> dict[str, Any]:
    """Fit the temperature and the thresholds of p(covid) to a validation table.

    Args:
        val: The validation predictions; the result depends on nothing else.
        task: Their task.
        sensitivity: Sensitivity that a threshold must reach on validation, between 0 and 1.
        specificity: Specificity that another threshold must reach there.

    Returns:
        A record for JSON with None for nan. Keys: task; positive; temperature, 1 if validation does not determine it,
        which `notes` states; thresholds, see `choose_thresholds`; validation, the sensitivity and specificity of each
        threshold there; targets; n_images; n_patients; n_per_class; notes.

    Raises:
        InputError: If a target is not between 0 and 1, or as in `truth_and_prob`.
    """
    targets = {"sensitivity": sensitivity, "specificity": specificity}
    for name, target in targets.items():
        if not 0 < target < 1:
            raise InputError(f"{name}={target}: must lie between 0 and 1. Give a share such as 0.95.")
    truth, _ = truth_and_prob(val, task)
    logit = logits(val, task)
    notes = []
    # Thresholds are of calibrated probabilities, so the temperature is fitted first.
    temperature = fit_temperature(truth, logit, task)
    if math.isnan(temperature):
        temperature = 1.0
        notes.append("validation determines no temperature (one class, or classes perfectly separated): 1 is used")
    covid = task.classes.index(POSITIVE)
    positive, score = truth == covid, calibrated(logit, temperature, task)[:, covid]
    thresholds = choose_thresholds(positive, score, **targets)
    missing = [name for name, threshold in thresholds.items() if math.isnan(threshold)]
    if missing:
        notes.append(f"validation gives no threshold for {', '.join(missing)}")
    return without_nan(
        {
            "task": task.name,
            "positive": POSITIVE,
            "temperature": temperature,
            "thresholds": thresholds,
            # A threshold exists only if validation has images of both kinds.
            "validation": {
                name: {
                    "sensitivity": float((score[positive] >= threshold).mean()),
                    "specificity": float((score[~positive] < threshold).mean()),
                }
                for name, threshold in thresholds.items()
                if name not in missing
            },
            "targets": targets,
            "n_images": len(val),
            "n_patients": len(np.unique(patient_codes(val))),
            "n_per_class": {name: int((truth == k).sum()) for k, name in enumerate(task.classes)},
            "notes": notes,
        }
    )


def frozen_operating(folder: Path, task: Task, **targets: float) -> dict[str, Any]:
    """Return the record of `fit_operating` in a run's operating.json.

    If the file does not exist, the record is fitted to the run's predictions-val.csv and written. No other file of the
    run is read.

    Args:
        folder: The run folder.
        task: Task of the run.
        targets: sensitivity and specificity of `fit_operating`; one that is missing may have any value in the file.

    Raises:
        InputError: If the file was fitted for other targets or is incomplete.
    """
    # Written once, before anything reads the test predictions, so that no threshold can be chosen by their scores.
    path = folder / "operating.json"
    if not path.is_file():
        val = load_predictions(folder / "predictions-val.csv", task).table
        write_json(path, fit_operating(val, task, **targets))
    frozen = read_json(path)
    missing = [key for key in _FROZEN if key not in frozen]
    if missing:
        raise InputError(f"{path}: lacks {missing}. Delete the file to have it fitted to predictions-val.csv again.")
    return check_frozen_targets(frozen, targets, path)


def check_frozen_targets(frozen: dict[str, Any], targets: dict[str, float], path: Path) -> dict[str, Any]:
    """Return `frozen`, the record in `path`, and raise InputError if it was fitted for other targets."""
    if frozen["targets"] != {**frozen["targets"], **targets}:
        given = " ".join(f"{name}={value}" for name, value in frozen["targets"].items())
        raise InputError(f"{path}: was fitted with {given}. Give the same targets, or leave them out.")
    return frozen


def choose_thresholds(
    positive: npt.NDArray[np.bool_], score: Floats, *, sensitivity: float, specificity: float
) -> dict[str, float]:
    """Choose three of the scores as thresholds.

    Returns:
        youden: the threshold with the largest sensitivity + specificity (Youden 1950), the highest one on a tie.
        sensitivity_95: the highest that reaches the wanted sensitivity. specificity_95: the lowest that reaches the
        wanted specificity. The numbers in the names are the targets in percent. nan if positives or negatives are
        absent, or no score meets the condition.
    """
    names = ("youden", f"sensitivity_{100 * sensitivity:g}", f"specificity_{100 * specificity:g}")
    if positive.all() or not positive.any():
        return dict.fromkeys(names, math.nan)
    # sklearn would drop thresholds that do not change the shape of the curve, but may be the ones wanted here.
    false_positive, true_positive, cut = roc_curve(positive, score, drop_intermediate=False)
    # 1 - 1/20 differs from 0.95 in the last digit.
    tolerance = 1e-12
    places = (
        int(np.argmax(true_positive - false_positive)),
        int(np.argmax(true_positive >= sensitivity - tolerance)),
        int(np.flatnonzero(1 - false_positive >= specificity - tolerance)[-1]),
    )
    # At place 0 no image is called covid, and sklearn's threshold is infinite.
    return {name: float(cut[place]) if place else math.nan for name, place in zip(names, places, strict=True)}


def decide_at(prob: Floats, threshold: float, task: Task) -> Indices:
    """Return class indices (N,): covid if its calibrated probability reaches the threshold, else the likeliest other.

    Args:
        prob: Calibrated probabilities, shape (N, K).
        threshold: Threshold of p(covid), in [0, 1].
        task: Task of the probabilities.
    """
    covid = task.classes.index(POSITIVE)
    others = np.delete(np.arange(len(task.classes)), covid)
    rest = others[prob[:, others].argmax(axis=1)]
    return np.where(prob[:, covid] >= threshold, covid, rest).astype(np.int64)


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> tuple[float, float]:
    """Return PPV and NPV by Bayes' theorem for a share `prevalence` of patients with covid; nan for 0 / 0."""
    true_positive, false_negative = sensitivity * prevalence, (1 - sensitivity) * prevalence
    false_positive, true_negative = (1 - specificity) * (1 - prevalence), specificity * (1 - prevalence)
    called, passed = true_positive + false_positive, true_negative + false_negative
    return true_positive / called if called else math.nan, true_negative / passed if passed else math.nan


def decision_curve(positive: npt.NDArray[np.bool_], prob: Floats) -> dict[str, list[float]]:
    """Return the net benefit of acting on the model, on everybody and on nobody (Vickers and Elkin 2006).

    Net benefit is true positives less false positives per image, where a false positive counts threshold /
    (1 - threshold).

    Args:
        positive: Whether each image is of the positive class, shape (N,).
        prob: Probability of the positive class, shape (N,).

    Returns:
        Lists of 99 numbers for the thresholds 0.01 to 0.99: threshold, model, treat_all and treat_none. model and
        treat_all are nan without images of both kinds.
    """
    cuts = np.arange(1, 100) / 100
    odds = cuts / (1 - cuts)
    # The images at or above each threshold, from the position of the threshold among the sorted probabilities.
    above = [len(part) - np.searchsorted(np.sort(part), cuts) for part in (prob[positive], prob[~positive])]
    n, prevalence = float(len(positive)), positive.mean()
    if not 0 < prevalence < 1:
        n = prevalence = math.nan
    return {
        "threshold": cuts.tolist(),
        "model": ((above[0] - above[1] * odds) * (1 / n)).tolist(),
        "treat_all": (prevalence - (1 - prevalence) * odds).tolist(),
        "treat_none": [0.0] * len(cuts),
    }
