"""Everything that an evaluation reports about one predictions table, as one plain record."""

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd

from covid_cls.errors import InputError
from covid_cls.evaluation.calibration import (
    calibrated,
    calibration_error,
    covid_logit,
    logits,
    recalibration,
    reliability,
)
from covid_cls.evaluation.intervals import Interval, patient_codes, patient_weights, score_intervals
from covid_cls.evaluation.metrics import Floats, Indices, class_scores, confusion, decide, overall_scores
from covid_cls.evaluation.predictions import truth_and_prob, without_nan
from covid_cls.evaluation.thresholds import PREVALENCES, decide_at, decision_curve, predictive_values
from covid_cls.evaluation.verdict import CONFOUNDED, source_association
from covid_cls.tasks import POSITIVE, Task

_RATES = ("sensitivity", "specificity", "ppv", "npv")


def summarise(table: pd.DataFrame, task: Task) -> dict[str, Any]:
    """Return the scores of a predictions table without intervals.

    Returns:
        A record for JSON with None for nan. Keys: n_images; n_patients, where an image without a patient_id counts as
        a separate patient; n_per_class; overall; per_class; confusion with rows (truth) and columns (decision), both
        class names, and counts.

    Raises:
        InputError: As in `truth_and_prob`.
    """
    truth, prob = truth_and_prob(table, task)
    decided = decide(prob, task)
    return without_nan(
        {
            "n_images": len(table),
            "n_patients": _n_patients(table),
            "n_per_class": _n_per_class(truth, task),
            "overall": overall_scores(truth, prob, decided, task),
            "per_class": class_scores(truth, prob, decided, task),
            "confusion": _confusion(truth, decided, task),
        }
    )


def assess(
    table: pd.DataFrame,
    task: Task,
    operating: dict[str, Any] | None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Return all scores of a predictions table with their intervals.

    The same arguments give the same record.

    Args:
        table: The predictions.
        task: Their task.
        operating: The record of `fit_operating` for the validation table. None without validation; then there are
            no thresholds, and p(covid) is not calibrated.
        resamples: Number of patient resamples, at least 100.
        seed: Their random seed.
        level: Confidence level, between 0 and 1.

    Returns:
        A record for JSON with None for nan, in which an interval is value, low, high and method. Keys: task; classes;
        positive; n_images; n_patients; n_per_class; settings; image and patient, each with n, overall, per_class,
        confusion and operating_points, where patient is about the rows of `patient_units` and None if every image is of
        another patient; baselines; calibration before and after the temperature; decision_curve; sources;
        source_association; operating; notes.

    Raises:
        InputError: If the settings are out of range, `operating` is of another task, or as in `truth_and_prob`.
    """
    check_bootstrap(resamples, level)
    settings: dict[str, Any] = {"resamples": resamples, "seed": seed, "level": level}
    truth, _ = truth_and_prob(table, task)
    notes = _notes(table, task, truth, operating)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = _scores(table, task, operating, settings)
    notes += list(dict.fromkeys(str(warning.message) for warning in caught))
    with warnings.catch_warnings():
        # Only the warnings about the images become notes; patients and sources would repeat them.
        warnings.simplefilter("ignore")
        units = patient_units(table, task)
        patient = _scores(units, task, operating, settings) if len(units) < len(table) else None
        sources = _sources(table, task, settings)
        baselines = _baselines(truth, task, operating)
    temperature = operating["temperature"] if operating else 1.0
    covid = task.classes.index(POSITIVE)
    return without_nan(
        {
            "task": task.name,
            "classes": list(task.classes),
            "positive": POSITIVE,
            "n_images": len(table),
            "n_patients": _n_patients(table),
            "n_per_class": _n_per_class(truth, task),
            "settings": settings,
            "image": image,
            "patient": patient,
            "baselines": baselines,
            "calibration": {
                "temperature": temperature if operating else None,
                "before": _calibration(table, task, 1.0, seed, level),
                "after": _calibration(table, task, temperature, seed, level) if operating else None,
            },
            "decision_curve": decision_curve(
                truth == covid, calibrated(logits(table, task), temperature, task)[:, covid]
            ),
            "sources": sources,
            "source_association": source_association(table),
            "operating": operating,
            "notes": notes,
        }
    )


def check_bootstrap(resamples: int, level: float) -> None:
    """Raise InputError if a number of resamples or a confidence level is out of range."""
    if resamples < 100 or not 0 < level < 1:
        raise InputError(
            f"resamples={resamples} level={level}: at least 100 resamples are needed, and a level between 0 and 1"
        )


def patient_units(table: pd.DataFrame, task: Task) -> pd.DataFrame:
    """Return a predictions table with one row per patient and label.

    Its logits are the mean over the patient's images of that label, and its image_id is the first of these. An image
    without a patient_id remains a separate row.
    """
    names = [f"logit_{name}" for name in task.classes]
    columns = {name: "mean" if name in names else "first" for name in table.columns}
    keys = [pd.Series(patient_codes(table), index=table.index), table["label"].rename("unit_label")]
    # By label too, because a patient can have images of several classes, for example before and after recovery.
    units = table.groupby(keys, sort=False).agg(columns).reset_index(drop=True)
    prob = calibrated(logits(units, task), 1.0, task)
    return units.assign(**{f"prob_{name}": prob[:, k] for k, name in enumerate(task.classes)})


def _scores(
    table: pd.DataFrame, task: Task, operating: dict[str, Any] | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the scores of one row per image or per patient, for the most probable class and for each threshold."""
    truth, prob = truth_and_prob(table, task)
    decided = decide(prob, task)
    # Drawn once for all thresholds, so that their intervals are comparable.
    weights = patient_weights(truth, patient_codes(table), settings["resamples"], settings["seed"])
    level = settings["level"]
    scores = score_intervals(table, task, weights=weights, level=level)
    points = {"decision": _operating_point(scores, None)}
    if operating:
        scaled = calibrated(logits(table, task), operating["temperature"], task)
        names = [f"{POSITIVE}.{name}" for name in _RATES]
        for name, threshold in operating["thresholds"].items():
            if threshold is not None:
                called = decide_at(scaled, threshold, task)
                # Only the rates of covid depend on the threshold; all scores would take ten times as long.
                rates = score_intervals(table, task, decided=called, weights=weights, only=names, level=level)
                points[name] = _operating_point(rates, threshold)
    per_class: dict[str, dict[str, Any]] = {name: {"n": n} for name, n in _n_per_class(truth, task).items()}
    overall: dict[str, Any] = {}
    for name, interval in scores.items():
        label, _, score = name.rpartition(".")
        (per_class[label] if label else overall)[score] = interval._asdict()
    return {
        "n": len(table),
        "overall": overall,
        "per_class": per_class,
        "confusion": _confusion(truth, decided, task),
        "operating_points": points,
    }


def _operating_point(scores: dict[str, Interval], threshold: float | None) -> dict[str, Any]:
    """Return the rates of decisions for covid, here and at other prevalences; None is for the most probable class."""
    chosen = {name: scores[f"{POSITIVE}.{name}"] for name in _RATES}
    rates = chosen["sensitivity"].value, chosen["specificity"].value
    elsewhere = [(prevalence, *predictive_values(*rates, prevalence)) for prevalence in PREVALENCES]
    return {
        "threshold": threshold,
        **{name: interval._asdict() for name, interval in chosen.items()},
        "at_prevalence": [{"prevalence": prevalence, "ppv": ppv, "npv": npv} for prevalence, ppv, npv in elsewhere],
    }


def _calibration(table: pd.DataFrame, task: Task, temperature: float, seed: int, level: float) -> dict[str, Any]:
    """Return the scores of probabilities at a temperature, next to those of a perfectly calibrated model."""
    truth, _ = truth_and_prob(table, task)
    logit = logits(table, task) / temperature
    prob = calibrated(logit, 1.0, task)
    covid = task.classes.index(POSITIVE)
    positive = truth == covid
    overall = overall_scores(truth, prob, decide(prob, task), task)
    record: dict[str, Any] = {name: overall[name] for name in ("nll", "brier")}
    # Sigmoids have no single most probable class, so a multilabel task has the error of p(covid) only.
    if not task.multilabel:
        record["ece"] = calibration_error(prob.max(axis=1), prob.argmax(axis=1) == truth, seed=seed)._asdict()
    regression = recalibration(positive, covid_logit(logit, task), patient_codes(table), level)
    return {
        **record,
        "covid_ece": calibration_error(prob[:, covid], positive, seed=seed)._asdict(),
        **{name: interval._asdict() for name, interval in regression.items()},
        "covid_reliability": reliability(prob[:, covid], positive),
    }


def _sources(table: pd.DataFrame, task: Task, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each source its counts, whether all its images have one label, and the scores that are defined."""
    blocks = []
    for name, part in table.groupby(table["source"].fillna("").replace("", "unknown")):
        scores = score_intervals(part, task, **settings)
        blocks.append(
            {
                "source": str(name),
                "n_images": len(part),
                "n_patients": _n_patients(part),
                "n_per_class": _n_per_class(truth_and_prob(part, task)[0], task),
                "label_pure": part["label"].nunique() == 1,
                "scores": {score: s._asdict() for score, s in scores.items() if not math.isnan(s.value)},
            }
        )
    return blocks


def _baselines(truth: Indices, task: Task, operating: dict[str, Any] | None) -> dict[str, Any]:
    """Return the scores of two models that use no image, only the class shares of validation.

    Without validation the shares are those of these images. The constant model gives the shares as probabilities and
    the most frequent class as its decision; the random one draws classes with these shares.
    """
    here = np.bincount(truth, minlength=len(task.classes)) / len(truth)
    counts = np.array(list(operating["n_per_class"].values()), dtype=np.float64) if operating else here
    shares = counts / counts.sum()
    prob: Floats = np.tile(shares @ np.asarray(task.targets, dtype=np.float64), (len(truth), 1))
    constant = overall_scores(truth, prob, np.full(len(truth), shares.argmax()), task)
    kept = ("accuracy", "balanced_accuracy", "nll", "brier")
    return {
        "shares_from": "validation" if operating else "these images",
        "constant": {"class": task.classes[int(shares.argmax())], **{name: constant[name] for name in kept}},
        "random": {"accuracy": float(here @ shares), "balanced_accuracy": float(shares[here > 0].mean())},
    }


def _notes(table: pd.DataFrame, task: Task, truth: Indices, operating: dict[str, Any] | None) -> list[str]:
    """Return what limits the scores, in sentences, the most severe one first."""
    notes = []
    association = source_association(table)
    if association >= CONFOUNDED:
        notes.append(
            f"SOURCE-CONFOUNDED: the source predicts the label here (Cramér's V {association:.2f}); these scores are "
            "not evidence of disease detection"
        )
    elif math.isnan(association):
        notes.append("sources are not named or there is one label: it is unknown whether a source predicts the label")
    absent = [name for name, n in _n_per_class(truth, task).items() if not n]
    if absent:
        notes.append(f"no image of {', '.join(absent)}: the scores that need one are undefined")
    patient = table["patient_id"].fillna("").astype(str)
    unknown = int(((patient == "") | patient.str.startswith("image:")).sum())
    if unknown:
        notes.append(
            f"{unknown} of {len(table)} images have no patient_id: each counts as a separate patient, and intervals "
            "may be too narrow"
        )
    # Their images of each label are a separate row of `patient_units`.
    several = int((pd.Series(truth).groupby(patient_codes(table)).nunique() > 1).sum())
    if several:
        notes.append(
            f"{several} patients have images of several labels: each of their labels counts as a separate unit"
        )
    if operating is None:
        return [*notes, "without validation predictions there are no thresholds and no temperature"]
    if operating["n_per_class"].keys() != set(task.classes):
        raise InputError(
            f"operating: was fitted to the classes {list(operating['n_per_class'])}, not to {list(task.classes)}. "
            "Give validation predictions of the same task."
        )
    return [*notes, *operating["notes"]]


def _n_patients(table: pd.DataFrame) -> int:
    return len(np.unique(patient_codes(table)))


def _n_per_class(truth: Indices, task: Task) -> dict[str, int]:
    return {name: int((truth == k).sum()) for k, name in enumerate(task.classes)}


def _confusion(truth: Indices, decided: Indices, task: Task) -> dict[str, Any]:
    counts = confusion(truth, decided, len(task.classes)).tolist()
    return {"rows": list(task.classes), "columns": list(task.classes), "counts": counts}
