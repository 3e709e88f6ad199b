"""Where p(covid) is cut, chosen on validation alone, and what a cut is worth elsewhere.

The positive class is covid; an image is called covid where its calibrated p(covid) is at least the threshold.
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
from covid_cls.evaluation.metrics import Floats, Indices
from covid_cls.evaluation.predictions import read_scores, truth_and_prob, without_nan
from covid_cls.evaluation.resampling import patient_codes
from covid_cls.labels import POSITIVE, Task
from covid_cls.records import read_json, write_json

_FROZEN = ("temperature", "thresholds", "targets", "n_per_class", "notes")
PREVALENCES = (0.01, 0.05, 0.1, 0.5)


def fit_operating(
    val: pd.DataFrame, task: Task, *, sensitivity: float = 0.95, specificity: float = 0.95
) -> dict[str, Any]:
    """The temperature and the thresholds of p(covid) that a validation table gives, ready for JSON.

    Keys: task, positive, temperature (1 where validation determines none; `notes` then says so), thresholds (see
    `choose_thresholds`; None where there is none), validation (what each gives there), targets, n_images, n_patients,
    n_per_class, notes. A function of `val` alone. InputError as in `truth_and_prob`.
    """
    for name, target in (("sensitivity", sensitivity), ("specificity", specificity)):
        if not 0 < target < 1:
            raise InputError(f"{name}={target}: must lie between 0 and 1")
    truth, _ = truth_and_prob(val, task)
    logit = logits(val, task)
    notes = []
    temperature = fit_temperature(truth, logit, task)
    if math.isnan(temperature):
        temperature = 1.0
        notes.append("validation determines no temperature (one class, or classes wholly apart): 1 is used")
    covid = task.classes.index(POSITIVE)
    positive, score = truth == covid, calibrated(logit, temperature, task)[:, covid]
    thresholds = choose_thresholds(positive, score, sensitivity=sensitivity, specificity=specificity)
    missing = [name for name, threshold in thresholds.items() if math.isnan(threshold)]
    if missing:
        notes.append(f"validation gives no threshold for {', '.join(missing)}")
    record = {
        "task": task.name,
        "positive": POSITIVE,
        "temperature": temperature,
        "thresholds": thresholds,
        "validation": {
            name: {
                "sensitivity": _share(score[positive] >= threshold),
                "specificity": _share(score[~positive] < threshold),
            }
            for name, threshold in thresholds.items()
            if name not in missing
        },
        "targets": {"sensitivity": sensitivity, "specificity": specificity},
        "n_images": len(val),
        "n_patients": len(np.unique(patient_codes(val))),
        "n_per_class": {name: int((truth == k).sum()) for k, name in enumerate(task.classes)},
        "notes": notes,
    }
    plain: dict[str, Any] = without_nan(record)
    return plain


def frozen_operating(folder: Path, task: Task, **targets: float) -> dict[str, Any]:
    """What `fit_operating` makes of a run's predictions-val.csv, from its operating.json once that is written.

    targets: sensitivity and specificity as there; one that is not given is the one that was frozen. Nothing else of the
    run is read. InputError where what was frozen has other targets.
    """
    path = folder / "operating.json"
    if not path.is_file():
        val = read_scores(folder / "predictions-val.csv", task).table
        write_json(path, fit_operating(val, task, **targets))
    frozen = read_json(path)
    missing = [key for key in _FROZEN if key not in frozen]
    if missing:
        raise InputError(f"{path}: lacks {missing}; delete it and it is fitted to predictions-val.csv again")
    return check_targets(frozen, targets, path)


def check_targets(frozen: dict[str, Any], targets: dict[str, float], path: Path) -> dict[str, Any]:
    """`frozen`, which `path` holds. InputError where it was fitted for other targets than the ones that are given."""
    if frozen["targets"] != {**frozen["targets"], **targets}:
        given = " ".join(f"{name}={value}" for name, value in frozen["targets"].items())
        raise InputError(f"{path}: frozen with {given}; give these, or none")
    return frozen


def choose_thresholds(
    positive: npt.NDArray[np.bool_], score: Floats, *, sensitivity: float, specificity: float
) -> dict[str, float]:
    """Three of the scores, as thresholds: youden, sensitivity_95 and specificity_95, the latter named by the targets.

    youden: the most sensitivity + specificity (Youden 1950). sensitivity_95: the highest that reaches the wanted
    sensitivity; specificity_95: the lowest that reaches the wanted specificity. The highest one on a tie. nan where
    positives or negatives are absent, or no score does it.
    """
    names = ("youden", f"sensitivity_{100 * sensitivity:g}", f"specificity_{100 * specificity:g}")
    if positive.all() or not positive.any():
        return dict.fromkeys(names, math.nan)
    false_positive, true_positive, cut = roc_curve(positive, score, drop_intermediate=False)
    enough = 1e-12  # 1 - 1/20 is not 0.95 to the last digit
    places = (
        int(np.argmax(true_positive - false_positive)),
        int(np.argmax(true_positive >= sensitivity - enough)),
        int(np.flatnonzero(1 - false_positive >= specificity - enough)[-1]),
    )
    # Place 0 calls nothing covid: sklearn's threshold there is infinite.
    return {name: float(cut[place]) if place else math.nan for name, place in zip(names, places, strict=True)}


def decide_at(prob: Floats, threshold: float, task: Task) -> Indices:
    """One class index per row of calibrated `prob` (N, K): covid from the threshold on, else the likeliest other."""
    covid = task.classes.index(POSITIVE)
    others = np.delete(np.arange(len(task.classes)), covid)
    rest = others[prob[:, others].argmax(axis=1)]
    return np.where(prob[:, covid] >= threshold, covid, rest).astype(np.int64)


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> tuple[float, float]:
    """PPV and NPV where a share `prevalence` of the patients has covid, by Bayes; nan where nobody is called so."""
    found, missed = sensitivity * prevalence, (1 - sensitivity) * prevalence
    alarmed, passed = (1 - specificity) * (1 - prevalence), specificity * (1 - prevalence)
    return (
        found / (found + alarmed) if found + alarmed else math.nan,
        passed / (passed + missed) if passed + missed else math.nan,
    )


def decision_curve(positive: npt.NDArray[np.bool_], prob: Floats) -> dict[str, list[float]]:
    """Net benefit at thresholds 0.01 to 0.99 of acting on `prob`, on everybody and on nobody (Vickers and Elkin 2006).

    Lists of 99: threshold, model, treat_all, treat_none. True minus false positives per image, a false one weighing
    threshold / (1 - threshold); nan throughout without images of one kind.
    """
    cuts = np.arange(1, 100) / 100
    odds = cuts / (1 - cuts)
    # The number at or above each cut is what is left behind its place in the sorted scores.
    above = [len(part) - np.searchsorted(np.sort(part), cuts) for part in (prob[positive], prob[~positive])]
    prevalence = positive.mean() if 0 < positive.sum() < len(positive) else math.nan
    scale = np.nan if math.isnan(prevalence) else 1 / len(positive)
    return {
        "threshold": cuts.tolist(),
        "model": ((above[0] - above[1] * odds) * scale).tolist(),
        "treat_all": (prevalence - (1 - prevalence) * odds).tolist(),
        "treat_none": [0.0] * len(cuts),
    }


def _share(hits: npt.NDArray[np.bool_]) -> float:
    return float(hits.mean()) if len(hits) else math.nan
