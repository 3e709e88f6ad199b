"""Scores of predictions, for one table or for many bootstrap resamples of it.

Shapes used throughout: truth int (N,), class indices in the task's order; prob float (N, K), one softmax per row or,
for a multilabel task, one sigmoid per class; decided int (N,), the class index that each image is given. A score that
the data do not define is nan, never 0.
"""

import math
import warnings
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn import metrics as sk

from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.tasks import POSITIVE, Task

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# As in Guo et al. 2017.
ECE_BINS = 15
LOWER_IS_BETTER = ("nll", "brier", "ece")
# Images x resamples per chunk: 16 MB per array, and about eight such arrays exist at once.
_CHUNK = 2**21


def decide(prob: Floats, task: Task) -> Indices:
    """Return the class index of each image, shape (N,).

    Softmax: the most probable class, the first one on a tie. Multilabel: covid if p(covid) >= 0.5, else the more
    probable one of pneumonia and normal, normal on a tie.

    Raises:
        ValueError: If a probability is not finite.
    """
    prob = np.asarray(prob, dtype=np.float64)
    # The argmax of a row with nan is 0, which would be covid.
    if not np.isfinite(prob).all():
        raise ValueError("a probability is nan or infinite, so no class can be decided; check the model's outputs")
    if not task.multilabel:
        return np.asarray(prob.argmax(axis=1), dtype=np.int64)
    # An argmax could call a certain covid image pneumonia, because its target contains both labels.
    covid, normal, pneumonia = (task.classes.index(name) for name in ("covid", "normal", "pneumonia"))
    rest = np.where(prob[:, pneumonia] > prob[:, normal], pneumonia, normal)
    return np.where(prob[:, covid] >= 0.5, covid, rest)


def confusion(truth: Indices, decided: Indices, n_classes: int) -> Indices:
    """Return the confusion matrix (n_classes, n_classes): rows are the truth, columns the decision."""
    # With `labels`, a class that is in neither array keeps its row and column.
    return np.asarray(sk.confusion_matrix(truth, decided, labels=range(n_classes)), dtype=np.int64)


def positives(truth: Indices, task: Task) -> Indices:
    """Return the 0/1 targets (N, K) of each class against the rest.

    They are one-hot for a softmax. In a multilabel task a covid image is positive for pneumonia too.
    """
    return np.asarray(task.targets, dtype=np.int64)[truth]


def roc_points(truth: Indices, prob: Floats, task: Task) -> dict[str, tuple[Floats, Floats]]:
    """Return false and true positive rates from (0, 0) to (1, 1), for each class that has an AUROC."""
    targets = positives(truth, task)
    return {
        name: sk.roc_curve(targets[:, k], prob[:, k])[:2]
        for k, name in enumerate(task.classes)
        if 0 < targets[:, k].sum() < len(truth)
    }


def class_scores(truth: Indices, prob: Floats, decided: Indices, task: Task) -> dict[str, dict[str, float]]:
    """Return the scores of each class as the positive class against the rest.

    Returns:
        By class: auroc and average_precision, which rank `prob` against `positives`; sensitivity, specificity, ppv,
        npv and f1 of the decisions; n, the number of its images. In a multilabel task auroc and average_precision of
        pneumonia count covid images as positive, so they are not comparable with those of a softmax task. ppv and f1
        are nan if there are no positives, npv if there are no negatives: they would be 0 for every model.

    A UserWarning names each class that `truth` lacks.
    """
    counts = confusion(truth, decided, len(task.classes))
    n_images = counts.sum(axis=1)
    # Not in `overall_scores`, so that a summary of both warns once.
    for name, n in zip(task.classes, n_images, strict=True):
        if not n:
            warnings.warn(f"no image of class {name!r}: the scores that need one are nan", UserWarning, stacklevel=2)
    targets = positives(truth, task)
    _, by_decision = _decision_scores(counts[:, :, None])
    return {
        name: {
            "auroc": _auroc(targets[:, k], prob[:, k]),
            "average_precision": (
                float(sk.average_precision_score(targets[:, k], prob[:, k])) if targets[:, k].any() else math.nan
            ),
            **{score: float(values[k, 0]) for score, values in by_decision.items()},
            "n": int(n_images[k]),
        }
        for k, name in enumerate(task.classes)
    }


def overall_scores(truth: Indices, prob: Floats, decided: Indices, task: Task) -> dict[str, float]:
    """Return the scores over all classes.

    Returns:
        accuracy; balanced_accuracy, the mean sensitivity of the classes that `truth` contains; macro_auroc and
        macro_f1, unweighted means over all classes, nan if one class is absent; mcc for K classes (Gorodkin 2004), nan
        if `truth` has one class and 0 if only `decided` has; nll in nats; brier (Brier 1950): the mean squared error of
        p(covid) for two classes, the sum over classes, not halved, for more.
        A multilabel task has nll and brier per label (means over N x K), and also label_accuracy (N x K labels cut at
        0.5) and covid_f1_at_half (F1 of the covid label cut at 0.5), the scores of the original protocol.
    """
    targets = positives(truth, task)
    by_decision, _ = _decision_scores(confusion(truth, decided, len(task.classes))[:, :, None])
    scores = {name: float(values[0]) for name, values in by_decision.items()}
    # The order of metrics.json.
    overall = {name: scores.pop(name) for name in ("accuracy", "balanced_accuracy")}
    overall["macro_auroc"] = float(np.mean([_auroc(*pair) for pair in zip(targets.T, prob.T, strict=True)]))
    overall |= scores | {name: float(values.mean()) for name, values in _losses(truth, prob, task).items()}
    if task.multilabel:
        overall["covid_f1_at_half"] = float(_f1(*_covid_label(truth, prob, task).sum(axis=1)))
    return overall


def point_scores(table: pd.DataFrame, task: Task) -> dict[str, float]:
    """Return every score of a predictions table by its flat name, such as "accuracy" and "covid.auroc"."""
    truth, prob = truth_and_prob(table, task)
    once = np.ones((1, len(truth)), dtype=np.uint8)
    scores = weighted_scores(truth, prob, decide(prob, task), task, once)
    return {name: float(values[0]) for name, values in scores.items()}


def weighted_scores(
    truth: Indices,
    prob: Floats,
    decided: Indices,
    task: Task,
    weights: npt.NDArray[np.integer],
    only: Collection[str] | None = None,
) -> dict[str, Floats]:
    """Return the scores of many resamples at once.

    With weights of one, they equal `overall_scores` and `class_scores` up to rounding.

    Args:
        truth: Class indices, shape (N,).
        prob: Probabilities, shape (N, K).
        decided: Class index given to each image, shape (N,).
        task: Task of these.
        weights: How often each image counts in each resample, non-negative, shape (B, N).
        only: Flat names of the scores to return, None for all. Without auroc, macro_auroc and average_precision it
            takes a tenth of the time.

    Returns:
        Each score, shape (B,), by its flat name: "accuracy", "covid.auroc" and so on; nan if the weighted images lack
        what a score needs. Also ece, the expected calibration error of the most probable class in 15 equal bins (Guo et
        al. 2017): the weighted mean of |accuracy - confidence|, nan for a multilabel task.
    """
    size, n = len(task.classes), len(truth)
    rows = {"counts": _one_hot(truth * size + decided, size * size), "total": np.ones((1, n))}
    if task.multilabel:
        rows["covid_label"] = _covid_label(truth, prob, task)
    else:
        confidence, correct = prob.max(axis=1), prob.argmax(axis=1) == truth
        rows["ece"] = _one_hot(bin_index(confidence, ECE_BINS), ECE_BINS) * (correct - confidence)
    rows |= {name: values.reshape(n, -1).mean(axis=1)[None] for name, values in _losses(truth, prob, task).items()}
    # One matrix product sums all rows for all resamples.
    stacked, ends = np.concatenate(list(rows.values())), np.cumsum([len(row) for row in rows.values()])
    ranked = only is None or any(name.endswith(("auroc", "average_precision")) for name in only)
    parts = []
    # In chunks, so that the memory does not grow with the number of resamples.
    step = max(1, _CHUNK // n)
    for start in range(0, len(weights), step):
        # In float64, because numpy multiplies matrices of integers without BLAS, which is far slower.
        chunk = weights[start : start + step].T.astype(np.float64, order="C")
        scores = _from_sums(dict(zip(rows, np.split(stacked @ chunk, ends[:-1]), strict=True)), task)
        parts.append(scores | _rank_scores(truth, prob, task, chunk) if ranked else scores)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if only is None or name in only}


def bin_index(prob: Floats, bins: int) -> Indices:
    """Return the index of each probability's bin among (0, 1/bins], (1/bins, 2/bins] and so on; 0 is in the first."""
    # Closed on the right as in Guo et al. 2017, unlike the bins of np.histogram.
    return np.clip(np.ceil(prob * bins).astype(np.int64) - 1, 0, bins - 1)


def _losses(truth: Indices, prob: Floats, task: Task) -> dict[str, Floats]:
    """Return the summands of nll, brier and label_accuracy: per image (N,), for a multilabel task per label (N, K)."""
    targets = positives(truth, task)
    squared = (prob - targets) ** 2
    # sklearn's log_loss clips in the same way, but it rescales rows and warns about float32 rows, whose sums are 1 only
    # within 1e-7.
    nll = -np.log(np.clip(np.where(targets == 1, prob, 1 - prob), np.finfo(np.float64).eps, 1))
    if task.multilabel:
        return {"nll": nll, "brier": squared, "label_accuracy": ((prob >= 0.5) == targets).astype(np.float64)}
    covid = task.classes.index(POSITIVE)
    brier = squared[:, covid] if len(task.classes) == 2 else squared.sum(axis=1)
    return {"nll": nll[targets == 1], "brier": brier}


def _covid_label(truth: Indices, prob: Floats, task: Task) -> Floats:
    """Return the rows (3, N) of the covid label cut at 0.5: correctly called, positive, called."""
    covid = task.classes.index(POSITIVE)
    positive, called = truth == covid, prob[:, covid] >= 0.5
    return np.stack([positive & called, positive, called]).astype(np.float64)


def _from_sums(sums: dict[str, Floats], task: Task) -> dict[str, Floats]:
    """Return all scores that follow from weighted sums over images."""
    size, total = len(task.classes), sums["total"][0]
    overall, per_class = _decision_scores(sums["counts"].reshape(size, size, -1))
    overall |= {name: _ratio(sums[name][0], total) for name in ("nll", "brier", "label_accuracy") if name in sums}
    if task.multilabel:
        overall |= {"covid_f1_at_half": _f1(*sums["covid_label"]), "ece": np.full_like(total, np.nan)}
    else:
        overall["ece"] = _ratio(np.abs(sums["ece"]).sum(axis=0), total)
    for k, name in enumerate(task.classes):
        overall |= {f"{name}.{score}": values[k] for score, values in per_class.items()}
    return overall


def _decision_scores(counts: npt.NDArray[np.integer | np.floating]) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return the scores that follow from confusion matrices.

    Args:
        counts: B confusion matrices, shape (K, K, B), rows are the truth.

    Returns:
        Scores over all classes, each (B,), and scores per class, each (K, B).
    """
    correct, positive, called = np.einsum("kkb->kb", counts), counts.sum(axis=1), counts.sum(axis=0)
    total = positive.sum(axis=0)
    negative, true_negative = total - positive, total - positive - called + correct
    sensitivity, f1 = _ratio(correct, positive), _f1(correct, positive, called)
    per_class = {
        "sensitivity": sensitivity,
        "specificity": _ratio(true_negative, negative),
        # Without positives, ppv and f1 would be 0 for every model that calls an image; the same for npv and negatives.
        "ppv": np.where(positive > 0, _ratio(correct, called), np.nan),
        "npv": np.where(negative > 0, _ratio(true_negative, total - called), np.nan),
        "f1": f1,
    }
    spread_truth, spread_called = (total**2 - (each**2).sum(axis=0) for each in (positive, called))
    # sklearn's formula and its conventions: mcc is 0 if all decisions are the same, and balanced accuracy leaves out
    # classes without images.
    covariance = correct.sum(axis=0) * total - (positive * called).sum(axis=0)
    mcc = _ratio(covariance, np.sqrt(spread_truth * spread_called), otherwise=0.0)
    overall = {
        "accuracy": _ratio(correct.sum(axis=0), total),
        "balanced_accuracy": _ratio(np.nansum(sensitivity, axis=0), (positive > 0).sum(axis=0)),
        "macro_f1": f1.mean(axis=0),
        "mcc": np.where(spread_truth > 0, mcc, np.nan),
    }
    return overall, per_class


def _f1(correct: Floats, positive: Floats, called: Floats) -> Floats:
    return np.where(positive > 0, _ratio(2 * correct, positive + called), np.nan)


def _auroc(positive: Indices, score: Floats) -> float:
    # Only for one table, whose metrics.json keeps sklearn's digits; sklearn is too slow for thousands of resamples.
    return float(sk.roc_auc_score(positive, score)) if 0 < positive.sum() < len(positive) else math.nan


def _rank_scores(truth: Indices, prob: Floats, task: Task, weights: Floats) -> dict[str, Floats]:
    targets = positives(truth, task).astype(bool)
    scores: dict[str, Floats] = {}
    for k, name in enumerate(task.classes):
        pair = _auroc_and_average_precision(targets[:, k], prob[:, k], weights)
        scores |= {f"{name}.auroc": pair[0], f"{name}.average_precision": pair[1]}
    return scores | {"macro_auroc": np.mean([scores[f"{name}.auroc"] for name in task.classes], axis=0)}


def _auroc_and_average_precision(
    positive: npt.NDArray[np.bool_], score: Floats, weights: Floats
) -> tuple[Floats, Floats]:
    """Return both scores, each (B,), for weights of shape (N, B).

    The AUROC is the weighted share of pairs of a positive and a negative in the right order, ties counted half. The
    average precision is the weighted mean, over the positives, of the precision at their score.
    """
    # Running sums over the sorted negatives give the weight below each positive, and level with it, by two lookups. So
    # neither the N x N pairs nor another sort for each resample is needed.
    order = np.argsort(score, kind="stable")
    up, down = order[positive[order]], order[~positive[order]]
    above, below = weights[up], _running_sum(weights[down])
    lower, upper = (np.searchsorted(score[down], score[up], side) for side in ("left", "right"))
    n_above, n_below = above.sum(axis=0), below[-1]
    pairs = np.einsum("ib,ib->b", above, below[lower] + below[upper]) / 2
    # Images with equal scores are called together, so a positive's precision counts all images from its score upward.
    found = n_above - _running_sum(above)[np.searchsorted(score[up], score[up], "left")]
    precision = _ratio(found, found + n_below - below[lower], otherwise=0.0)
    return _ratio(pairs, n_above * n_below), _ratio(np.einsum("ib,ib->b", above, precision), n_above)


def _running_sum(weights: Floats) -> Floats:
    """Return the sums over the first 0, 1, ... n rows, shape (n + 1, B)."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _one_hot(index: Indices, size: int) -> Floats:
    """Return the one-hot columns, shape (size, N)."""
    return np.asarray(index == np.arange(size)[:, None], dtype=np.float64)


def _ratio(part: npt.ArrayLike, total: npt.ArrayLike, otherwise: float = np.nan) -> Floats:
    total = np.asarray(total)
    return np.asarray(np.divide(part, total, out=np.full(np.shape(part), otherwise), where=total > 0))
