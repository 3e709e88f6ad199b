"""The vectorised scores of resamples equal those of one table and those of sklearn with sample weights."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.exceptions import UndefinedMetricWarning

from covid_cls.evaluation.metrics import class_scores, decide, overall_scores, positives, weighted_scores
from covid_cls.tasks import TASKS

ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
CASES = 60  # per task


def random_case(rng, task, complete):
    """Return random truth and probabilities with ties; classes may be absent unless `complete`."""
    size, n = len(task.classes), int(rng.integers(4, 30))
    truth = rng.integers(0, size, n)
    if complete:
        truth[:size] = np.arange(size)
    if task.multilabel:
        return truth, rng.integers(0, 8, (n, size)) / 7
    weights = rng.integers(1, 6, (n, size))
    return truth, weights / weights.sum(axis=1, keepdims=True)


@ALL_TASKS
@pytest.mark.filterwarnings("ignore:no image of class")
def test_weights_of_one_give_the_unweighted_scores(task):
    rng = np.random.default_rng(21)
    for _ in range(CASES):
        truth, prob = random_case(rng, task, complete=False)
        decided = decide(prob, task) if rng.random() < 0.5 else rng.integers(0, len(task.classes), len(truth))
        expected = overall_scores(truth, prob, decided, task)
        for name, scores in class_scores(truth, prob, decided, task).items():
            expected |= {f"{name}.{score}": value for score, value in scores.items() if score != "n"}
        found = weighted_scores(truth, prob, decided, task, np.ones((1, len(truth)), dtype=np.uint8))
        assert set(found) == {*expected, "ece"}
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], [value], rtol=0, atol=1e-12, err_msg=name)


@ALL_TASKS
def test_weighted_scores_equal_those_of_sklearn(task):
    rng = np.random.default_rng(22)
    labels = list(range(len(task.classes)))
    for _ in range(CASES):
        truth, prob = random_case(rng, task, complete=True)
        weights = rng.integers(0, 4, len(truth))
        # No class loses all its images.
        weights[: len(labels)] += 1
        decided = decide(prob, task)
        found = weighted_scores(truth, prob, decided, task, weights[None])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            expected = _by_sklearn(truth, prob, decided, task, weights)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], [value], rtol=0, atol=1e-12, err_msg=name)


def _by_sklearn(truth, prob, decided, task, weights):
    labels = list(range(len(task.classes)))
    targets, once = positives(truth, task), {"sample_weight": weights}
    is_class, called = np.eye(len(labels))[truth], np.eye(len(labels))[decided]
    ppv, sensitivity, f1, _ = sk.precision_recall_fscore_support(is_class, called, zero_division=np.nan, **once)
    npv, specificity, *_ = sk.precision_recall_fscore_support(1 - is_class, 1 - called, zero_division=np.nan, **once)
    per_class = {"sensitivity": sensitivity, "specificity": specificity, "ppv": ppv, "npv": npv, "f1": f1}
    per_class |= {
        "auroc": sk.roc_auc_score(targets, prob, average=None, **once),
        "average_precision": sk.average_precision_score(targets, prob, average=None, **once),
    }
    found = {
        "accuracy": sk.accuracy_score(truth, decided, **once),
        "balanced_accuracy": sensitivity.mean(),
        "macro_f1": f1.mean(),
        "mcc": sk.matthews_corrcoef(truth, decided, **once),
        "macro_auroc": per_class["auroc"].mean(),
    }
    if not task.multilabel:
        found["nll"] = sk.log_loss(truth, prob, labels=labels, **once)
        two = len(labels) == 2
        found["brier"] = sk.brier_score_loss(*((truth == 0, prob[:, 0]) if two else (truth, prob)), **once)
    for score, values in per_class.items():
        found |= {f"{name}.{score}": value for name, value in zip(task.classes, values, strict=True)}
    return found


@pytest.mark.parametrize("task", [TASKS["binary"], TASKS["three_class"]], ids=lambda task: task.name)
def test_weighted_ece_equals_that_of_repeated_images_in_explicit_bins(task):
    rng = np.random.default_rng(23)
    for _ in range(100):
        truth, prob = random_case(rng, task, complete=True)
        # Moves probabilities off the edges of bins, where rounding would decide.
        prob = np.clip(prob + rng.uniform(1e-4, 2e-4, prob.shape), 0, 1)
        weights = rng.integers(0, 4, len(truth))
        weights[0] = 1
        rows = np.repeat(np.arange(len(truth)), weights)
        confidence, right = prob.max(axis=1)[rows], (prob.argmax(axis=1) == truth)[rows]
        gaps = 0.0
        for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
            inside = (confidence > low) & (confidence <= high)
            if inside.any():
                gaps += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
        found = weighted_scores(truth, prob, decide(prob, task), task, weights[None])["ece"][0]
        assert found == pytest.approx(gaps, abs=1e-12)
