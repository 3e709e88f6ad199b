"""Everything an evaluation reports about one predictions table, as one plain record."""

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
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
from covid_cls.evaluation.intervals import (
    Interval,
    degrees_of_freedom,
    involved_patients,
    resampled_interval,
    score_intervals,
)
from covid_cls.evaluation.metrics import Floats, Indices, confusion, decide, overall_scores
from covid_cls.evaluation.operating import PREVALENCES, decide_at, decision_curve, predictive_values
from covid_cls.evaluation.predictions import truth_and_prob, without_nan
from covid_cls.evaluation.resampling import patient_codes, patient_weights, weighted_scores
from covid_cls.evaluation.verdict import CONFOUNDED, source_association
from covid_cls.labels import POSITIVE, Task

_POINT = ("sensitivity", "specificity", "ppv", "npv")


def assess(
    table: pd.DataFrame,
    task: Task,
    operating: dict[str, Any] | None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """All figures of a predictions table, ready for JSON: an interval is value, low, high, method; None stands for nan.

    operating: what `fit_operating` made of the validation table, or None where there is none; then there are no
    thresholds, and p(covid) is taken as it is. resamples, seed and level are those of the patient bootstrap.

    Keys: task, classes, positive, n_images, n_patients, n_per_class, settings; image and patient, each with overall,
    per_class, confusion and operating_points (patient is None where every image is a patient of its own, and its units
    are the mean logits over a patient's images of one label); baselines; calibration, before and after the
    temperature; decision_curve; sources; source_association (Cramér's V); operating; notes. The same table and
    arguments give the same record. InputError as in `truth_and_prob`.
    """
    check_draws(resamples, level)
    truth, _ = truth_and_prob(table, task)
    draws: dict[str, Any] = {"resamples": resamples, "seed": seed, "level": level}
    patients = patient_codes(table)
    notes = _notes(table, task, truth, operating)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = _level(table, task, operating, draws)
    notes += list(dict.fromkeys(str(warning.message) for warning in caught))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once, of the images
        units = patient_units(table, task)
        patient = _level(units, task, operating, draws) if len(units) < len(table) else None
        sources = _sources(table, task, draws)
        baselines = _baselines(truth, task, operating)
    temperature = operating["temperature"] if operating else 1.0
    prob = calibrated(logits(table, task), temperature, task)
    covid = task.classes.index(POSITIVE)
    record = {
        "task": task.name,
        "classes": list(task.classes),
        "positive": POSITIVE,
        "n_images": len(table),
        "n_patients": len(np.unique(patients)),
        "n_per_class": {name: int((truth == k).sum()) for k, name in enumerate(task.classes)},
        "settings": draws,
        "image": image,
        "patient": patient,
        "baselines": baselines,
        "calibration": {
            "temperature": operating["temperature"] if operating else None,
            "before": _calibration(table, task, 1.0, seed, level),
            "after": _calibration(table, task, temperature, seed, level) if operating else None,
        },
        "decision_curve": decision_curve(truth == covid, prob[:, covid]),
        "sources": sources,
        "source_association": source_association(table),
        "operating": operating,
        "notes": notes,
    }
    plain: dict[str, Any] = without_nan(record)
    return plain


def check_draws(resamples: int, level: float) -> None:
    """InputError where these resamples cannot give intervals of this level."""
    if resamples < 100 or not 0 < level < 1:
        raise InputError(f"resamples={resamples} level={level}: at least 100 resamples, and a level between 0 and 1")


def patient_units(table: pd.DataFrame, task: Task) -> pd.DataFrame:
    """A predictions table with a row per patient and label: the mean logits of that patient's images of that label.

    Its image_id is the patient's first image of that label; an image without a patient_id is a unit of its own.
    """
    scores = [f"logit_{name}" for name in task.classes]
    first = {name: "first" for name in table.columns if name not in scores}
    keys = [pd.Series(patient_codes(table), index=table.index), table["label"].rename("unit_label")]
    units = table.groupby(keys, sort=False).agg(first | dict.fromkeys(scores, "mean")).reset_index(drop=True)
    prob = calibrated(logits(units, task), 1.0, task)
    return units[table.columns].assign(**{f"prob_{name}": prob[:, k] for k, name in enumerate(task.classes)})


def _level(table: pd.DataFrame, task: Task, operating: dict[str, Any] | None, draws: dict[str, Any]) -> dict[str, Any]:
    """The scores of one row per image or per patient, by the most probable class and at each threshold."""
    truth, prob = truth_and_prob(table, task)
    scores = score_intervals(table, task, **draws)
    points = {"decision": _point(scores, None)}
    if operating:
        patients = patient_codes(table)
        weights = patient_weights(truth, patients, draws["resamples"], draws["seed"])
        rows = np.concatenate([np.ones_like(weights[:1]), weights])  # the first is the table as it is
        scaled = calibrated(logits(table, task), operating["temperature"], task)
        for name, threshold in operating["thresholds"].items():
            if threshold is not None:
                decided = decide_at(scaled, threshold, task)
                points[name] = _point(_rates(truth, scaled, decided, task, patients, rows, draws["level"]), threshold)
    counts = confusion(truth, decide(prob, task), len(task.classes))
    per_class: dict[str, dict[str, Any]] = {
        name: {"n": int(n)} for name, n in zip(task.classes, counts.sum(axis=1), strict=True)
    }
    overall: dict[str, Any] = {}
    for name, interval in scores.items():
        label, _, score = name.rpartition(".")
        (per_class[label] if label else overall)[score] = interval._asdict()
    return {
        "n": len(table),
        "overall": overall,
        "per_class": per_class,
        "confusion": {"rows": list(task.classes), "columns": list(task.classes), "counts": counts.tolist()},
        "operating_points": points,
    }


def _rates(
    truth: Indices,
    prob: Floats,
    decided: Indices,
    task: Task,
    patients: Indices,
    rows: npt.NDArray[np.integer],
    level: float,
) -> dict[str, Interval]:
    """The rates of covid among the scores that `score_intervals` gives for `decided`, at a tenth of the cost."""
    drawn = weighted_scores(truth, prob, decided, task, rows, only=[f"{POSITIVE}.{name}" for name in _POINT])
    df = degrees_of_freedom(truth, patients)
    return {
        name: resampled_interval(
            name,
            task,
            float(values[0]),
            values[1:],
            n_patients=involved_patients(name, task, truth, decided, patients),
            df=df,
            level=level,
        )
        for name, values in drawn.items()
    }


def _point(scores: dict[str, Interval], threshold: float | None) -> dict[str, Any]:
    """What a decision for covid is worth, here and at other prevalences; threshold None: the most probable class."""
    chosen = {name: scores[f"{POSITIVE}.{name}"] for name in _POINT}
    rates = chosen["sensitivity"].value, chosen["specificity"].value
    elsewhere = [(share, *predictive_values(*rates, share)) for share in PREVALENCES]
    return {
        "threshold": threshold,
        **{name: interval._asdict() for name, interval in chosen.items()},
        "at_prevalence": [{"prevalence": share, "ppv": ppv, "npv": npv} for share, ppv, npv in elsewhere],
    }


def _calibration(table: pd.DataFrame, task: Task, temperature: float, seed: int, level: float) -> dict[str, Any]:
    """Scores of probabilities and what a perfectly calibrated model's ECE would be on as many images."""
    truth, _ = truth_and_prob(table, task)
    logit = logits(table, task) / temperature
    prob = calibrated(logit, 1.0, task)
    covid = task.classes.index(POSITIVE)
    positive = truth == covid
    overall = overall_scores(truth, prob, decide(prob, task), task)
    regression = recalibration(positive, covid_logit(logit, task), patient_codes(table), level)
    record: dict[str, Any] = {name: overall[name] for name in ("nll", "brier")}
    if not task.multilabel:  # of the probability of the most probable class
        record["ece"] = calibration_error(prob.max(axis=1), prob.argmax(axis=1) == truth, seed=seed)._asdict()
    return {
        **record,
        "covid_ece": calibration_error(prob[:, covid], positive, seed=seed)._asdict(),
        **{name: interval._asdict() for name, interval in regression.items()},
        "covid_reliability": reliability(prob[:, covid], positive),
    }


def _sources(table: pd.DataFrame, task: Task, draws: dict[str, Any]) -> list[dict[str, Any]]:
    """A block per source: its counts, whether all its images have one label, and the scores that exist for it."""
    blocks = []
    for name, part in table.groupby(table["source"].fillna("").replace("", "unknown")):
        scores = score_intervals(part, task, **draws)
        counts = part["label"].value_counts().reindex(list(task.classes), fill_value=0)
        blocks.append(
            {
                "source": str(name),
                "n_images": len(part),
                "n_patients": len(np.unique(patient_codes(part))),
                "n_per_class": {label: int(n) for label, n in counts.items()},
                "label_pure": int((counts > 0).sum()) == 1,
                "scores": {score: s._asdict() for score, s in scores.items() if not math.isnan(s.value)},
            }
        )
    return blocks


def _baselines(truth: Indices, task: Task, operating: dict[str, Any] | None) -> dict[str, Any]:
    """What needs no image: the class shares of validation (of these very images without one) as every answer.

    constant: these shares as probabilities and the commonest class as the decision. random: the expected scores of
    classes drawn by these shares.
    """
    targets = np.asarray(task.targets, dtype=np.float64)
    here = np.bincount(truth, minlength=len(task.classes)) / len(truth)
    counts = np.array(list(operating["n_per_class"].values()), dtype=np.float64) if operating else here
    shares = counts / counts.sum()
    prob: Floats = np.tile(shares @ targets, (len(truth), 1))
    constant = overall_scores(truth, prob, np.full(len(truth), shares.argmax()), task)
    kept = ("accuracy", "balanced_accuracy", "nll", "brier")
    return {
        "shares_from": "validation" if operating else "these images",
        "constant": {"class": task.classes[int(shares.argmax())], **{name: constant[name] for name in kept}},
        "random": {
            "accuracy": float(here @ shares),
            "balanced_accuracy": float(shares[here > 0].mean()),
        },
    }


def _notes(table: pd.DataFrame, task: Task, truth: Indices, operating: dict[str, Any] | None) -> list[str]:
    """What limits the figures, in sentences, the gravest first."""
    notes = []
    association = source_association(table)
    if association >= CONFOUNDED:
        notes.append(
            f"SOURCE-CONFOUNDED: the source predicts the label here (Cramér's V {association:.2f}); these scores are "
            "not evidence of disease detection"
        )
    elif math.isnan(association):
        notes.append("sources are not named or there is one label: whether a source predicts the label is not known")
    absent = [name for k, name in enumerate(task.classes) if not (truth == k).any()]
    if absent:
        notes.append(f"no image of {', '.join(absent)}: the scores that need one are undefined")
    patient = table["patient_id"].fillna("").astype(str)
    alone = int(((patient == "") | patient.str.startswith("image:")).sum())
    if alone:
        notes.append(
            f"{alone} of {len(table)} images have no patient_id: each counts as a patient of its own, and intervals "
            "may be too narrow"
        )
    several = int((pd.Series(truth).groupby(patient_codes(table)).nunique() > 1).sum())
    if several:
        notes.append(f"{several} patients have images of several labels: each label of theirs is a unit of its own")
    if operating is None:
        notes.append("without validation predictions there are no thresholds and no temperature")
        return notes
    if operating["n_per_class"].keys() != set(task.classes):
        raise InputError(f"operating: fitted to classes {list(operating['n_per_class'])}, not {list(task.classes)}")
    return [*notes, *operating["notes"]]
