"""The patient bootstrap: how often each image counts in each resample, and every score of every resample at once."""

import warnings
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pandas as pd

from covid_cls.evaluation.metrics import Floats, Indices, clipped_log, positives
from covid_cls.labels import POSITIVE, Task

ECE_BINS = 15
_CHUNK = 2**21  # images x resamples in one piece: 16 MB an array, of which about eight live at once


def patient_codes(table: pd.DataFrame) -> Indices:
    """The patient of each row as an integer from 0 on, (N,); an image without a patient_id is a patient of its own.

    Codes follow the ids' order, not the rows', so that the same seed draws the same patients from a shuffled table.
    """
    patient = table["patient_id"].astype(object)
    nobody = (patient.isna() | (patient == "")).to_numpy(dtype=bool)
    keys = ("patient:" + patient.astype(str)).where(~nobody, "image:" + table["image_id"].astype(str))
    return np.asarray(pd.factorize(keys, sort=True)[0], dtype=np.int64)


def patient_weights(truth: Indices, patients: Indices, resamples: int, seed: int) -> npt.NDArray[np.uint8]:
    """How often each image counts in each resample, (resamples, N).

    Whole patients are drawn with replacement, as many as there are, class by class (Davison and Hinkley 1997, 3.8); a
    patient with images of several classes stands in the class that has the fewest patients. `patients` are codes from
    0 on without gaps. A class with a single patient is the same in every resample: a UserWarning says so.
    """
    rng = np.random.default_rng(seed)
    strata = _strata(truth, patients)
    drawn = np.empty((resamples, len(strata)), dtype=np.uint8)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        drawn[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    return drawn[:, patients]


def _strata(truth: Indices, patients: Indices) -> Indices:
    """The stratum of each patient."""
    held = np.unique(np.column_stack([patients, truth]), axis=0)  # one row per patient and class of theirs
    rarity = np.argsort(np.argsort(np.bincount(held[:, 1]), kind="stable"))
    strata = np.full(patients.max() + 1, len(rarity))
    np.minimum.at(strata, held[:, 0], rarity[held[:, 1]])
    for lone in np.flatnonzero(np.bincount(strata)[strata] == 1):
        classes = held[held[:, 0] == lone, 1]
        kin = held[np.isin(held[:, 1], classes) & (held[:, 0] != lone), 0]
        if len(kin):
            strata[lone] = strata[kin[0]]
        else:
            warnings.warn(
                f"class index {classes[0]} has a single patient, whom every resample holds once: no resampling can "
                "tell how far other patients of that class differ",
                UserWarning,
                stacklevel=3,
            )
    return strata


def weighted_scores(
    truth: Indices,
    prob: Floats,
    decided: Indices,
    task: Task,
    weights: npt.NDArray[np.integer],
    only: Collection[str] | None = None,
) -> dict[str, Floats]:
    """Every score of `metrics.overall_scores` and, as "covid.auroc", of `metrics.class_scores`, each (B,), and ece.

    weights, non-negative (B, N), say how often each image counts; with ones the scores are those of `metrics`. ece is
    the expected calibration error of the top label: 15 bins ((0, 1/15], ...), weighted mean of |accuracy - confidence|
    (Guo et al. 2017); nan for a multilabel task. nan where the weighted images lack what a score needs. `only` names
    the scores that are wanted; without auroc, macro_auroc and average_precision it takes a tenth of the time.
    """
    rows = _per_image(truth, prob, decided, task)
    stacked, cuts = np.concatenate(list(rows.values())), np.cumsum([len(row) for row in rows.values()])[:-1]
    ranked = only is None or any(name.endswith(("auroc", "average_precision")) for name in only)
    parts = []
    step = max(1, _CHUNK // len(truth))
    for start in range(0, len(weights), step):
        chunk = weights[start : start + step].T.astype(np.float64, order="C")
        sums = dict(zip(rows, np.split(stacked @ chunk, cuts), strict=True))
        scores = _overall(sums, task) | _per_class(sums["counts"], task)
        parts.append(scores | _ranked(truth, prob, task, chunk) if ranked else scores)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if only is None or name in only}


def _per_image(truth: Indices, prob: Floats, decided: Indices, task: Task) -> dict[str, Floats]:
    """What each image adds to the sums that scores are made of, rows (r, N) by name."""
    size = len(task.classes)
    rows = {"counts": _one_hot(truth * size + decided, size * size), "total": np.ones((1, len(truth)))}
    targets = positives(truth, task)
    covid = task.classes.index(POSITIVE)
    squared = (prob - targets) ** 2
    surprise = -clipped_log(np.where(targets == 1, prob, 1 - prob))
    if task.multilabel:
        labels = prob >= 0.5
        found = np.stack([targets[:, covid] * labels[:, covid], targets[:, covid], labels[:, covid]])
        rows |= {"label_accuracy": (labels == targets).mean(axis=1)[None], "covid_label": found.astype(np.float64)}
        rows |= {"nll": surprise.mean(axis=1)[None], "brier": squared.mean(axis=1)[None]}
    else:
        confidence, right = prob.max(axis=1), prob.argmax(axis=1) == truth
        bins = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
        rows |= {"ece": _one_hot(bins, ECE_BINS) * (right - confidence), "nll": surprise[targets == 1][None]}
        rows |= {"brier": (squared[:, covid] if size == 2 else squared.sum(axis=1))[None]}
    return rows


def _overall(sums: dict[str, Floats], task: Task) -> dict[str, Floats]:
    size = len(task.classes)
    counts, total = sums["counts"].reshape(size, size, -1), sums["total"][0]
    right, held, called = np.einsum("kkb->kb", counts), counts.sum(axis=1), counts.sum(axis=0)
    spread = [total**2 - (each**2).sum(axis=0) for each in (held, called)]
    covariance = right.sum(axis=0) * total - (held * called).sum(axis=0)
    mcc = _ratio(covariance, np.sqrt(spread[0] * spread[1]), otherwise=0.0)
    sensitivity = _ratio(right, held)
    overall = {
        "accuracy": _ratio(right.sum(axis=0), total),
        "balanced_accuracy": _ratio(np.nansum(sensitivity, axis=0), (held > 0).sum(axis=0)),
        "macro_f1": np.where(held > 0, _ratio(2 * right, held + called), np.nan).mean(axis=0),
        "mcc": np.where(spread[0] > 0, mcc, np.nan),
    }
    overall |= {name: _ratio(sums[name][0], total) for name in ("nll", "brier", "label_accuracy") if name in sums}
    if task.multilabel:
        found, held_label, called_label = sums["covid_label"]
        f1 = _ratio(2 * found, held_label + called_label)
        overall |= {"covid_f1_at_half": np.where(held_label > 0, f1, np.nan), "ece": np.full_like(total, np.nan)}
    else:
        overall["ece"] = _ratio(np.abs(sums["ece"]).sum(axis=0), total)
    return overall


def _per_class(counts: Floats, task: Task) -> dict[str, Floats]:
    size = len(task.classes)
    counts = counts.reshape(size, size, -1)
    total = counts.sum(axis=(0, 1))
    scores: dict[str, Floats] = {}
    for k, name in enumerate(task.classes):
        right, held, called = counts[k, k], counts[k].sum(axis=0), counts[:, k].sum(axis=0)
        passed = total - held - called + right  # rightly
        scores |= {
            f"{name}.sensitivity": _ratio(right, held),
            f"{name}.specificity": _ratio(passed, total - held),
            f"{name}.ppv": np.where(held > 0, _ratio(right, called), np.nan),
            f"{name}.npv": np.where(total > held, _ratio(passed, total - called), np.nan),
            f"{name}.f1": np.where(held > 0, _ratio(2 * right, held + called), np.nan),
        }
    return scores


def _ranked(truth: Indices, prob: Floats, task: Task, weights: Floats) -> dict[str, Floats]:
    targets = positives(truth, task).astype(bool)
    scores: dict[str, Floats] = {}
    for k, name in enumerate(task.classes):
        pair = _auroc_and_average_precision(targets[:, k], prob[:, k], weights)
        scores |= dict(zip((f"{name}.auroc", f"{name}.average_precision"), pair, strict=True))
    return scores | {"macro_auroc": np.mean([scores[f"{name}.auroc"] for name in task.classes], axis=0)}


def _auroc_and_average_precision(positive: npt.NDArray[np.bool_], score: Floats, weights: Floats) -> list[Floats]:
    """Both (B,) for weights (N, B); each positive is compared with what lies below and level with it."""
    order = np.argsort(score, kind="stable")
    up, down = order[positive[order]], order[~positive[order]]
    above, below = weights[up], _running(weights[down])  # running sums over the negatives, by ascending score
    lower, upper = (np.searchsorted(score[down], score[up], side) for side in ("left", "right"))
    n_above, n_below = above.sum(axis=0), below[-1]
    won = np.einsum("ib,ib->b", above, below[lower] + below[upper]) / 2
    found = n_above - _running(above)[np.searchsorted(score[up], score[up], "left")]
    precision = _ratio(found, found + n_below - below[lower], otherwise=0.0)
    return [_ratio(won, n_above * n_below), _ratio(np.einsum("ib,ib->b", above, precision), n_above)]


def _running(weights: Floats) -> Floats:
    """Sums (n + 1, B) over the first 0, 1, ... n rows."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _one_hot(index: Indices, size: int) -> Floats:
    return np.asarray(index == np.arange(size)[:, None], dtype=np.float64)


def _ratio(part: Floats, whole: npt.NDArray[np.floating | np.integer], otherwise: float = np.nan) -> Floats:
    return np.asarray(np.divide(part, whole, out=np.full(np.shape(part), otherwise), where=whole > 0))
