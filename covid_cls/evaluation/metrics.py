"""Point estimates: what a set of probabilities and the decisions drawn from them are worth.

Shapes throughout: truth int (N,), class indices in the task's order; prob float (N, K), one softmax per row or, for
a multilabel task, one sigmoid per class; decided int (N,). What the data cannot answer is nan, never 0.0.
"""

import math
import warnings

import numpy as np
import numpy.typing as npt
from sklearn import metrics as sk

from covid_cls.labels import POSITIVE, Task

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def decide(prob: Floats, task: Task) -> Indices:
    """The one class index each image is given, (N,).

    Softmax: the most probable class, the first one on a tie. Multilabel: covid where p(covid) >= 0.5, else the
    likelier of pneumonia and normal, normal on a tie; an argmax would call a sure covid image pneumonia, because
    its target holds both. ValueError where a probability is not finite, since argmax(nan) is 0 = covid.
    """
    prob = np.asarray(prob, dtype=np.float64)
    if not np.isfinite(prob).all():
        raise ValueError("a probability is nan or infinite: no class can be decided")
    if not task.multilabel:
        return np.asarray(prob.argmax(axis=1), dtype=np.int64)
    covid, normal, pneumonia = (task.classes.index(name) for name in ("covid", "normal", "pneumonia"))
    rest = np.where(prob[:, pneumonia] > prob[:, normal], pneumonia, normal)
    return np.where(prob[:, covid] >= 0.5, covid, rest)


def confusion(truth: Indices, decided: Indices, n_classes: int) -> Indices:
    """Counts (n_classes, n_classes): rows are the truth, columns the decision."""
    return np.asarray(sk.confusion_matrix(truth, decided, labels=range(n_classes)), dtype=np.int64)


def positives(truth: Indices, task: Task) -> Indices:
    """The 0/1 targets (N, K) that the scores of each class are ranked against.

    One-hot for softmax; in a multilabel task a covid image is positive for pneumonia too.
    """
    return np.asarray(task.targets, dtype=np.int64)[truth]


def roc_points(truth: Indices, prob: Floats, task: Task) -> dict[str, tuple[Floats, Floats]]:
    """Per class the false and true positive rates from (0, 0) to (1, 1); a class with no AUROC has no entry."""
    targets = positives(truth, task)
    return {
        name: sk.roc_curve(targets[:, k], prob[:, k])[:2]
        for k, name in enumerate(task.classes)
        if 0 < targets[:, k].sum() < len(truth)
    }


def class_scores(truth: Indices, prob: Floats, decided: Indices, task: Task) -> dict[str, dict[str, float]]:
    """Per class, against the rest: auroc, average_precision, sensitivity, specificity, ppv, npv, f1, n (its images).

    The class itself is the positive one. auroc and average_precision rank `prob` against `positives`; in a
    multilabel task pneumonia therefore counts covid images as found, and is not comparable with the softmax task's.
    The others and n follow the single decision. ppv and f1 are nan without positives, npv without negatives: with
    none to find they would be 0 for any model. A UserWarning names each class that `truth` lacks.
    """
    counts = confusion(truth, decided, len(task.classes))
    targets = positives(truth, task)
    for name, n in zip(task.classes, counts.sum(axis=1), strict=True):
        if not n:
            warnings.warn(f"no image of class {name!r}: the scores that need one are nan", UserWarning, stacklevel=2)
    return {
        name: {
            "auroc": _auroc(targets[:, k], prob[:, k]),
            "average_precision": _average_precision(targets[:, k], prob[:, k]),
            **_decision_scores(counts, k),
            "n": int(counts[k].sum()),
        }
        for k, name in enumerate(task.classes)
    }


def overall_scores(truth: Indices, prob: Floats, decided: Indices, task: Task) -> dict[str, float]:
    """Over all classes: accuracy, balanced_accuracy, macro_auroc, macro_f1, mcc, nll, brier.

    The macro scores are unweighted means over the task's classes, nan where one of them is (`class_scores` warns and
    names it); balanced_accuracy is over the classes that `truth` holds, as in sklearn. mcc is nan where `truth` holds
    one class and 0 where only `decided` does. nll is in nats. brier is the mean squared error of p(covid) for two
    classes and the sum over classes, not halved (Brier 1950), for more.

    A multilabel task has nll and brier per label (means over N x K) and also label_accuracy (N x K labels cut at 0.5)
    and covid_f1_at_half (F1 of the covid label cut at 0.5), the figures of the seed protocol.
    """
    counts = confusion(truth, decided, len(task.classes))
    targets = positives(truth, task)
    classes = range(len(task.classes))
    per_class = [_decision_scores(counts, k) for k in classes]
    overall = {
        "accuracy": _ratio(counts.trace(), counts.sum()),
        "balanced_accuracy": float(np.nanmean([scores["sensitivity"] for scores in per_class])),
        "macro_auroc": float(np.mean([_auroc(targets[:, k], prob[:, k]) for k in classes])),
        "macro_f1": float(np.mean([scores["f1"] for scores in per_class])),
        "mcc": float(sk.matthews_corrcoef(truth, decided)) if len(np.unique(truth)) > 1 else math.nan,
    }
    return overall | (_label_scores if task.multilabel else _softmax_scores)(targets, prob, task)


def _softmax_scores(targets: Indices, prob: Floats, task: Task) -> dict[str, float]:
    squared = (prob - targets) ** 2
    covid = task.classes.index(POSITIVE)
    return {
        "nll": float(-clipped_log(prob)[targets == 1].mean()),
        "brier": float(squared[:, covid].mean() if len(task.classes) == 2 else squared.sum(axis=1).mean()),
    }


def _label_scores(targets: Indices, prob: Floats, task: Task) -> dict[str, float]:
    labels = (prob >= 0.5).astype(np.int64)
    covid = task.classes.index(POSITIVE)
    pairs = confusion(targets[:, covid], labels[:, covid], 2)
    return {
        "nll": float(-np.where(targets == 1, clipped_log(prob), clipped_log(1 - prob)).mean()),
        "brier": float(((prob - targets) ** 2).mean()),
        "label_accuracy": float((labels == targets).mean()),
        "covid_f1_at_half": _decision_scores(pairs, 1)["f1"],
    }


def _decision_scores(counts: Indices, k: int) -> dict[str, float]:
    true_positive, positive, called = counts[k, k], counts[k].sum(), counts[:, k].sum()
    negative, passed = counts.sum() - positive, counts.sum() - called
    true_negative = negative - (called - true_positive)
    return {
        "sensitivity": _ratio(true_positive, positive),
        "specificity": _ratio(true_negative, negative),
        "ppv": _ratio(true_positive, called) if positive else math.nan,
        "npv": _ratio(true_negative, passed) if negative else math.nan,
        "f1": _ratio(2 * true_positive, positive + called) if positive else math.nan,
    }


def _auroc(positive: Indices, score: Floats) -> float:
    if not 0 < positive.sum() < len(positive):
        return math.nan
    return float(sk.roc_auc_score(positive, score))


def _average_precision(positive: Indices, score: Floats) -> float:
    return float(sk.average_precision_score(positive, score)) if positive.any() else math.nan


def _ratio(part: np.int64, whole: np.int64) -> float:
    return float(part / whole) if whole else math.nan


def clipped_log(prob: Floats) -> Floats:
    """The logarithm of probabilities, the one of 0 that of the smallest step below 1: nll stays finite."""
    # sklearn's log_loss clips alike, but renormalises rows and warns of float32 ones that sum to 1 only within 1e-7
    return np.asarray(np.log(np.clip(prob, np.finfo(np.float64).eps, 1)), dtype=np.float64)
