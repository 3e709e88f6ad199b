"""Scores of one table: known answers, agreement with sklearn, and nan for what the data do not define."""

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from covid_cls.evaluation.metrics import class_scores, confusion, decide, overall_scores, positives, roc_points
from covid_cls.tasks import TASKS

BINARY, SOFTMAX, MULTILABEL = TASKS["binary"], TASKS["three_class"], TASKS["three_class_multilabel"]
ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def random_case(rng, task, n=24):
    """Return random truth, with every class, and probabilities with ties."""
    size = len(task.classes)
    truth = np.concatenate([np.arange(size), rng.integers(0, size, n - size)])
    if task.multilabel:
        return truth, rng.integers(0, 8, (n, size)) / 7
    weights = rng.integers(1, 6, (n, size))
    return truth, weights / weights.sum(axis=1, keepdims=True)


def cases(counts):
    """Return truth and decisions with the given confusion matrix."""
    rows, columns = np.indices(np.shape(counts))
    return np.repeat(rows.ravel(), np.ravel(counts)), np.repeat(columns.ravel(), np.ravel(counts))


# --- known answers


def test_auroc_and_average_precision_of_the_example_in_the_sklearn_manual():
    covid = np.array([0.1, 0.4, 0.35, 0.8])
    # Index 0 is covid, the positive class.
    truth = np.array([1, 1, 0, 0])
    prob = np.column_stack([covid, 1 - covid])
    scores = class_scores(truth, prob, decide(prob, BINARY), BINARY)["covid"]
    assert scores["auroc"] == pytest.approx(0.75)
    assert scores["average_precision"] == pytest.approx(0.8333333)


def test_scores_of_a_known_confusion_matrix():
    counts = [[8, 1, 1], [0, 9, 1], [2, 2, 6]]
    truth, decided = cases(counts)
    prob = np.eye(3)[decided]
    overall = overall_scores(truth, prob, decided, SOFTMAX)
    assert confusion(truth, decided, 3).tolist() == counts
    assert overall["accuracy"] == pytest.approx(0.766667, abs=1e-6)
    assert overall["balanced_accuracy"] == pytest.approx(0.766667, abs=1e-6)
    assert overall["macro_f1"] == pytest.approx(0.761616, abs=1e-6)
    assert overall["mcc"] == pytest.approx(0.654377, abs=1e-6)
    covid = class_scores(truth, prob, decided, SOFTMAX)["covid"]
    assert covid["specificity"] == pytest.approx(0.90)
    assert (covid["sensitivity"], covid["ppv"], covid["n"]) == (0.8, 0.8, 10)
    assert covid["npv"] == pytest.approx(18 / 20)


def test_mcc_of_a_known_case():
    truth, decided = 1 - np.array([1, 1, 1, 0, 0, 0]), 1 - np.array([1, 1, 0, 0, 0, 1])
    assert overall_scores(truth, np.eye(2)[decided], decided, BINARY)["mcc"] == pytest.approx(1 / 3)


def test_brier_is_that_of_covid_for_two_classes_and_a_sum_over_classes_for_three():
    covid = np.array([0.9, 0.2, 0.6, 0.7])
    two = np.column_stack([covid, 1 - covid])
    truth = np.array([0, 1, 0, 0])
    assert overall_scores(truth, two, decide(two, BINARY), BINARY)["brier"] == pytest.approx(0.075)
    three = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    truth = np.array([0, 1, 2])
    assert overall_scores(truth, three, decide(three, SOFTMAX), SOFTMAX)["brier"] == pytest.approx(0.246667, abs=1e-6)


def test_perfect_predictions_score_one():
    truth = np.array([0, 1, 2, 0])
    prob = np.eye(3)[truth]
    overall = overall_scores(truth, prob, decide(prob, SOFTMAX), SOFTMAX)
    assert (overall.pop("nll"), overall.pop("brier")) == pytest.approx((0, 0), abs=1e-12)
    assert set(overall.values()) == {1.0}


# --- decisions


def test_a_multilabel_covid_image_with_a_higher_pneumonia_probability_is_called_covid():
    prob = 1 / (1 + np.exp(-np.array([[2, -3, 2.5]])))
    # An argmax would call it pneumonia.
    assert prob[0].argmax() == 2
    assert decide(prob, MULTILABEL).tolist() == [0]


@pytest.mark.parametrize(
    ("prob", "decided"),
    [([0.5, 0.9, 0.9], 0), ([0.49, 0.2, 0.3], 2), ([0.49, 0.3, 0.2], 1), ([0.1, 0.4, 0.4], 1)],
    ids=["covid at the threshold", "pneumonia", "normal", "tie is normal"],
)
def test_multilabel_decisions(prob, decided):
    assert decide(np.array([prob]), MULTILABEL).tolist() == [decided]


def test_a_softmax_decision_is_the_most_probable_class_and_the_first_on_a_tie():
    assert decide(np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]]), SOFTMAX).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_probabilities_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="nan or infinite"):
        decide(np.array([[bad, 0.5, 0.5]]), SOFTMAX)


# --- against sklearn


@ALL_TASKS
def test_random_cases_with_ties_agree_with_sklearn(task):
    rng = np.random.default_rng(20)
    labels = list(range(len(task.classes)))
    # With 24 images each, there are ties of every kind and classes that are never decided.
    for _ in range(25):
        truth, prob = random_case(rng, task)
        decided = decide(prob, task)
        targets = np.eye(len(labels), dtype=int)[truth]
        if task.multilabel:
            targets[truth == 0, 2] = 1
        is_class, called = np.eye(len(labels))[truth], np.eye(len(labels))[decided]
        ppv, sensitivity, f1, n = sk.precision_recall_fscore_support(is_class, called, zero_division=np.nan)
        npv, specificity, *_ = sk.precision_recall_fscore_support(1 - is_class, 1 - called, zero_division=np.nan)
        expected = {
            "auroc": sk.roc_auc_score(targets, prob, average=None),
            "average_precision": sk.average_precision_score(targets, prob, average=None),
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": ppv,
            "npv": npv,
            "f1": f1,
            "n": n,
        }
        per_class = class_scores(truth, prob, decided, task)
        assert list(per_class) == list(task.classes)
        for score, values in expected.items():
            ours = [scores[score] for scores in per_class.values()]
            np.testing.assert_allclose(ours, values, rtol=0, atol=1e-6, err_msg=score)
        overall = {
            "accuracy": sk.accuracy_score(truth, decided),
            "balanced_accuracy": sk.balanced_accuracy_score(truth, decided),
            "macro_auroc": expected["auroc"].mean(),
            "macro_f1": f1.mean(),
            "mcc": sk.matthews_corrcoef(truth, decided),
        }
        if task.multilabel:
            covid = prob[:, 0] >= 0.5
            overall |= {
                "nll": np.mean([sk.log_loss(targets[:, k], prob[:, k], labels=[0, 1]) for k in labels]),
                "brier": np.mean([sk.brier_score_loss(targets[:, k], prob[:, k]) for k in labels]),
                "label_accuracy": sk.accuracy_score(targets.ravel(), prob.ravel() >= 0.5),
                "covid_f1_at_half": sk.f1_score(targets[:, 0], covid),
            }
        else:
            brier = sk.brier_score_loss(*((targets[:, 0], prob[:, 0]) if task is BINARY else (truth, prob)))
            overall |= {"nll": sk.log_loss(truth, prob, labels=labels), "brier": brier}
        assert overall_scores(truth, prob, decided, task) == pytest.approx(overall, rel=0, abs=1e-6)


@ALL_TASKS
def test_the_area_under_the_roc_points_is_the_auroc(task):
    truth, prob = random_case(np.random.default_rng(4), task)
    scores = class_scores(truth, prob, decide(prob, task), task)
    for name, (false_positive, true_positive) in roc_points(truth, prob, task).items():
        assert np.trapezoid(true_positive, false_positive) == pytest.approx(scores[name]["auroc"])
        assert (false_positive[0], true_positive[0], false_positive[-1], true_positive[-1]) == (0, 0, 1, 1)


def test_a_multilabel_covid_image_is_positive_for_pneumonia():
    assert positives(np.array([0, 1, 2]), MULTILABEL).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    prob = np.array([[0.9, 0.1, 0.9], [0.1, 0.9, 0.1], [0.1, 0.2, 0.8]])
    scores = class_scores(np.array([0, 1, 2]), prob, decide(prob, MULTILABEL), MULTILABEL)
    # Against a one-hot target it would be 0.5.
    assert scores["pneumonia"]["auroc"] == 1
    assert scores["pneumonia"]["n"] == 1


def test_covid_f1_at_half_follows_the_label_not_the_decision():
    prob = np.array([[0.6, 0.1, 0.9], [0.6, 0.9, 0.1], [0.1, 0.2, 0.8]])
    truth = np.array([0, 1, 2])
    # Decisions of another threshold.
    overall = overall_scores(truth, prob, np.array([0, 1, 2]), MULTILABEL)
    assert overall["accuracy"] == 1
    assert overall["covid_f1_at_half"] == pytest.approx(2 / 3)
    assert overall["label_accuracy"] == pytest.approx(8 / 9)


def test_multilabel_pneumonia_has_an_auroc_from_covid_images_only():
    prob = np.array([[0.9, 0.1, 0.8], [0.1, 0.9, 0.2]])
    with pytest.warns(UserWarning, match="'pneumonia'"):
        scores = class_scores(np.array([0, 1]), prob, decide(prob, MULTILABEL), MULTILABEL)["pneumonia"]
    assert scores["auroc"] == 1
    assert math.isnan(scores["sensitivity"])


# --- undefined scores


@pytest.mark.filterwarnings("error::sklearn.exceptions.UndefinedMetricWarning")
def test_scores_of_an_absent_class_are_nan_and_a_warning_names_it():
    truth = np.array([1, 2, 1, 2])
    prob = np.array([[0.1, 0.7, 0.2], [0.2, 0.2, 0.6], [0.6, 0.3, 0.1], [0.1, 0.5, 0.4]])
    decided = decide(prob, SOFTMAX)
    with pytest.warns(UserWarning, match="'covid'") as caught:
        scores = class_scores(truth, prob, decided, SOFTMAX)
    assert len(caught) == 1
    covid = scores["covid"]
    assert all(math.isnan(covid[key]) for key in ("auroc", "average_precision", "sensitivity", "ppv", "f1"))
    assert (covid["n"], covid["specificity"]) == (0, 0.75)
    assert not any(math.isnan(score) for score in scores["normal"].values())
    overall = overall_scores(truth, prob, decided, SOFTMAX)
    assert math.isnan(overall["macro_auroc"])
    assert math.isnan(overall["macro_f1"])
    assert overall["balanced_accuracy"] == pytest.approx(0.5)


@ALL_TASKS
@pytest.mark.filterwarnings("error::sklearn.exceptions.UndefinedMetricWarning", "ignore:no image of class 'pneu")
def test_scores_that_need_two_classes_are_nan_for_one(task):
    truth = np.zeros(5, dtype=int)
    _, prob = random_case(np.random.default_rng(1), task, n=5)
    decided = decide(prob, task)
    with pytest.warns(UserWarning, match="'normal'"):
        scores = class_scores(truth, prob, decided, task)
    assert math.isnan(scores["covid"]["auroc"])
    assert math.isnan(scores["covid"]["specificity"])
    assert math.isnan(scores["covid"]["npv"])
    assert scores["covid"]["sensitivity"] == np.mean(decided == 0)
    overall = overall_scores(truth, prob, decided, task)
    assert all(math.isnan(overall[key]) for key in ("macro_auroc", "macro_f1", "mcc"))
    assert roc_points(truth, prob, task) == {}


def test_a_class_never_decided_has_no_ppv_and_an_f1_of_zero():
    truth = np.array([0, 0, 1, 1])
    prob = np.tile([0.3, 0.7], (4, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = class_scores(truth, prob, decide(prob, BINARY), BINARY)
        overall = overall_scores(truth, prob, decide(prob, BINARY), BINARY)
    assert math.isnan(scores["covid"]["ppv"])
    assert (scores["covid"]["f1"], scores["covid"]["sensitivity"], scores["covid"]["auroc"]) == (0, 0, 0.5)
    assert overall["mcc"] == 0


@ALL_TASKS
def test_a_certain_wrong_model_has_a_finite_nll(task):
    truth = np.array([0, 1])
    wrong = np.eye(len(task.classes))[[1, 0]]
    assert 10 < overall_scores(truth, wrong, decide(wrong, task), task)["nll"] < 40


@ALL_TASKS
def test_scores_are_plain_numbers(task):
    truth, prob = random_case(np.random.default_rng(2), task)
    decided = decide(prob, task)
    per_class = class_scores(truth, prob, decided, task)
    values = [
        *overall_scores(truth, prob, decided, task).values(),
        *(v for s in per_class.values() for v in s.values()),
    ]
    assert {type(value) for value in values} == {float, int}
