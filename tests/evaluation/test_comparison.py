import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from covid_cls.errors import InputError
from covid_cls.evaluation.comparison import compare_cells, leaderboard, mcnemar
from covid_cls.evaluation.delong import delong_test
from covid_cls.evaluation.intervals import score_intervals
from covid_cls.evaluation.metrics import decide, overall_scores
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.evaluation.resampling import patient_codes
from covid_cls.labels import TASKS
from tools.simulations.intervals import TESTS, Design, count, draw, rejected

BINARY, SOFTMAX = TASKS["binary"], TASKS["three_class"]


def models(n=60, images=1, number=2, task="binary", seed=0):
    return draw(Design(task, n, images), np.random.default_rng(seed), number)


def sharpened(table, task, towards):
    """The same predictions moved by a share `towards` of the way to the truth."""
    truth, prob = truth_and_prob(table, task)
    moved = (1 - towards) * prob + towards * np.eye(len(task.classes))[truth]
    return table.assign(**{f"prob_{name}": moved[:, k] for k, name in enumerate(task.classes)})


def perfect(table, task, sure):
    truth = truth_and_prob(table, task)[0]
    prob = (1 - sure) / (len(task.classes) - 1) + np.eye(len(task.classes))[truth] * (sure - (1 - sure))
    return table.assign(**{f"prob_{name}": prob[:, k] for k, name in enumerate(task.classes)})


# --- McNemar


def test_exact_mcnemar_is_the_known_one():
    first, second = np.r_[np.ones(10), np.zeros(2), np.ones(30)], np.r_[np.zeros(10), np.ones(2), np.ones(30)]
    b, c, p = mcnemar(first, second, np.arange(42))
    assert (b, c) == (10, 2)
    assert p == pytest.approx(0.038574, abs=1e-6)


def test_models_that_never_differ_have_p_of_one():
    assert mcnemar([1, 0, 1], [1, 0, 1], np.arange(3)) == (0, 0, 1)


def test_a_patient_counts_once():
    patients = np.array([0, 0, 0, 1, 1, 2, 2])
    first, second = [1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 1, 0, 0]
    assert mcnemar(first, second, patients) == (2, 0, 0.5)  # patient 1 is a draw


# --- pairs


@pytest.mark.parametrize("task", [BINARY, SOFTMAX], ids=lambda task: task.name)
def test_a_pair_is_the_difference_of_its_scores(task):
    a, b = models(task=task.name, images=2)
    for metric in ("balanced_accuracy", "covid.auroc", "nll", "macro_f1"):
        (pair,) = compare_cells({"a": [a], "b": [b]}, task, metric=metric, resamples=100)
        one, other = (score_intervals(table, task, resamples=10)[metric].value for table in (a, b))
        assert pair[:3] == ("a", "b", metric)
        assert pair.difference.value == pytest.approx(one - other, abs=1e-12)
        assert pair.difference.low < pair.difference.value < pair.difference.high
        assert pair.difference.method == "paired patient bootstrap"
        assert pair.p == pair.p_holm
        assert (pair.p < 0.05) == (pair.difference.low > 0 or pair.difference.high < 0)
    truth, _ = truth_and_prob(a, task)
    scores = [truth_and_prob(table, task)[1][:, 0] for table in (a, b)]
    assert pair.delong_p == pytest.approx(delong_test(truth == 0, *scores, patients=patient_codes(a))[2])
    right = [decide(truth_and_prob(table, task)[1], task) == truth for table in (a, b)]
    assert pair[-3:] == mcnemar(*right, patient_codes(a))


def test_a_cell_is_the_mean_of_its_seeds():
    first, second, third = models(number=3, task="three_class")
    (pair,) = compare_cells({"a": [first, second], "b": [third]}, SOFTMAX, resamples=100)
    scores = []
    for table in (first, second, third):
        truth, prob = truth_and_prob(table, SOFTMAX)
        scores.append(overall_scores(truth, prob, decide(prob, SOFTMAX), SOFTMAX)["balanced_accuracy"])
    assert pair.difference.value == pytest.approx((scores[0] + scores[1]) / 2 - scores[2])


def test_pairs_come_in_order_and_are_antisymmetric():
    a, b, c = models(number=3)
    pairs = compare_cells({"a": [a], "b": [b], "c": [c]}, BINARY, resamples=100)
    assert [pair[:2] for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    (turned,) = compare_cells({"b": [b], "a": [a]}, BINARY, resamples=100)
    assert turned.difference.low == pytest.approx(-pairs[0].difference.high)
    assert turned.p == pytest.approx(pairs[0].p)
    assert (turned.mcnemar_b, turned.mcnemar_c) == (pairs[0].mcnemar_c, pairs[0].mcnemar_b)


def test_pairing_is_worth_it():
    """The same images are hard for both: the project's trust page has a standard error 4.6 times smaller."""
    (base,) = models(n=300, number=1)
    other = sharpened(base, BINARY, 0.02)
    (pair,) = compare_cells({"a": [other], "b": [base]}, BINARY, metric="covid.auroc", resamples=500)
    alone = [score_intervals(table, BINARY, resamples=500)["covid.auroc"] for table in (base, other)]
    unpaired = math.hypot(*(interval.high - interval.low for interval in alone))
    assert pair.difference.high - pair.difference.low < unpaired / 3
    assert pair.p < 0.01


def test_rows_are_matched_by_image():
    a, b = models(images=2)
    shuffled = b.sample(frac=1, random_state=4)
    straight, turned = (compare_cells({"a": [a], "b": [t]}, BINARY, resamples=100) for t in (b, shuffled))
    assert straight == turned


def test_holm_over_all_pairs():
    (base,) = models(number=1)
    cells = {f"cell{i}": [sharpened(base, BINARY, share)] for i, share in enumerate((0, 0.05, 0.15, 0.4))}
    pairs = compare_cells(cells, BINARY, metric="nll", resamples=200)
    order = np.argsort([pair.p for pair in pairs])
    corrected, most = {}, 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1, (len(pairs) - rank) * pairs[i].p))
        corrected[i] = most
    assert [pair.p_holm for pair in pairs] == pytest.approx([corrected[i] for i in range(len(pairs))])


# --- where nothing differs


def test_identical_models_have_p_of_one():
    (a,) = models(number=1)
    (pair,) = compare_cells({"a": [a], "b": [a.copy()]}, BINARY, resamples=50)
    assert pair.difference == (0, 0, 0, "identical")
    assert (pair.p, pair.p_holm, pair.delong_p, pair.mcnemar_b, pair.mcnemar_c, pair.mcnemar_p) == (1, 1, 1, 0, 0, 1)


def test_two_models_without_error_may_yet_differ():
    (base,) = models(number=1)
    cells = {"sure": [perfect(base, BINARY, 0.9)], "surer": [perfect(base, BINARY, 0.99)]}
    (pair,) = compare_cells(cells, BINARY, resamples=50)
    assert pair.difference.low < 0 == pair.difference.value < pair.difference.high
    assert pair.p == 1


def test_a_perfect_and_a_constant_model_differ():
    (base,) = models(number=1)
    constant = base.assign(prob_covid=0.1, prob_normal=0.9)
    (pair,) = compare_cells({"a": [perfect(base, BINARY, 0.9)], "b": [constant]}, BINARY, resamples=50)
    assert pair.difference.value == 0.5
    assert 0 < pair.difference.low < 0.5 < pair.difference.high
    assert pair.p < 0.001


def test_a_score_that_one_model_lacks_is_not_compared():
    a, b = models()
    never = b.assign(prob_covid=0.1, prob_normal=0.9)
    pairs = compare_cells({"a": [a], "b": [b], "never": [never]}, BINARY, metric="covid.ppv", resamples=50)
    assert [math.isnan(pair.p) for pair in pairs] == [False, True, True]
    assert [math.isnan(pair.p_holm) for pair in pairs] == [False, True, True]
    assert pairs[0].p == pairs[0].p_holm  # what was not tested is not corrected for
    assert pairs[1].difference.method == "undefined"


# --- faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.iloc[2:], "cells 'first' and 'second' were not scored on the same images: 0, 1 are in one of"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "cell 'second': predictions, image_id: '0' on line 62; an earlier"),
        (
            lambda t: t.assign(label=t["label"].where(t.index > 0, "normal")),
            "cells 'first' and 'second' name another label for 0;",
        ),
        (lambda t: t.assign(patient_id=t["patient_id"].where(t.index != 5, "4")), "name another patient for 5;"),
    ],
    ids=["images", "duplicate", "label", "patient"],
)
def test_cells_on_other_images_are_refused(change, message):
    a, b = models()
    for cells in ({"first": [a], "second": [change(b)]}, {"first": [a], "second": [b, change(b)]}):
        for compare in (compare_cells, leaderboard):
            with pytest.raises(InputError, match=re.escape(message)):
                compare(cells, BINARY)


def test_patients_may_have_other_names():
    a, b = models(images=2)
    renamed = b.assign(patient_id="hospital-" + b["patient_id"])
    assert compare_cells({"a": [a], "b": [renamed]}, BINARY, resamples=50)[0].p <= 1


@pytest.mark.parametrize("metric", ["auroc", "ece", ""])
def test_an_unknown_metric_is_refused(metric):
    with pytest.raises(InputError, match=re.escape(f"metric {metric!r}: no score of task binary; choose one of accu")):
        compare_cells({"a": models(number=1)}, BINARY, metric=metric)


def test_no_cell_and_no_table_are_refused():
    with pytest.raises(InputError, match="no cell"):
        compare_cells({}, BINARY)
    with pytest.raises(InputError, match="cell 'a' has no predictions table"):
        leaderboard({"a": []}, BINARY)


# --- the leaderboard


def test_cells_that_cannot_be_told_apart_share_a_group():
    a, b = models(n=200, number=2)
    cells = {
        "worse": [a],
        "best": [sharpened(a, BINARY, 0.5)],
        "as bad": [b],
        "as good": [sharpened(a, BINARY, 0.495)],
    }
    board = leaderboard(cells, BINARY, "nll", resamples=300)
    scores = [standing.interval.value for standing in board]
    assert scores == sorted(scores)  # of a loss the least is best
    groups = {standing.name: standing.group for standing in board}
    assert groups["best"] == 1
    assert groups["worse"] == groups["as bad"] > groups["best"]


def test_a_lone_cell_has_the_interval_of_its_table():
    (a,) = models(number=1, images=2)
    (standing,) = leaderboard({"a": [a]}, BINARY, "covid.auroc", resamples=200, seed=3)
    assert standing.interval == pytest.approx(score_intervals(a, BINARY, resamples=200, seed=3)["covid.auroc"])
    assert standing.group == 1


def test_the_best_comes_first_and_nan_last():
    (a,) = models(number=1)
    never = a.assign(prob_covid=0.1, prob_normal=0.9)
    cells = {"never": [never], "plain": [a], "sharp": [sharpened(a, BINARY, 0.6)]}
    assert [s.name for s in leaderboard(cells, BINARY, "covid.ppv", resamples=50)] == ["sharp", "plain", "never"]


# --- size and error rates


def test_equal_models_are_seldom_called_different():
    """In 80 pairs; more than `most` would happen once in 1,000 times. docs/simulations.md has 1,000."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = count(rejected, Design("binary", 60, 4), 80, 200, 7, {})
    most = binom.isf(0.001, 80, 0.06)
    for name in TESTS:
        assert counts[name] <= most, name
    assert counts["bootstrap, balanced_accuracy"] > 0
