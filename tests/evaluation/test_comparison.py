"""Paired comparisons of configurations and their ranking: known answers, special cases, faults and error rates."""

import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from covid_cls.errors import InputError
from covid_cls.evaluation.comparison import compare_configurations, leaderboard, mcnemar, score_configurations
from covid_cls.evaluation.delong import delong_test, placements
from covid_cls.evaluation.intervals import patient_codes, score_intervals
from covid_cls.evaluation.metrics import decide, overall_scores
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.tasks import TASKS
from tools.simulations.intervals import TESTS, Design, count, rejecting_tests, simulate

BINARY, SOFTMAX = TASKS["binary"], TASKS["three_class"]


def models(n=60, images=1, number=2, task="binary", seed=0):
    return simulate(Design(task, n, images), np.random.default_rng(seed), number)


def compare(tables, task, metric="balanced_accuracy", **settings):
    return compare_configurations(score_configurations(tables, task, **settings), metric)


def rank(tables, task, metric, **settings):
    scores = score_configurations(tables, task, **settings)
    return leaderboard(scores, compare_configurations(scores, metric), metric)


def sharpened(table, task, towards):
    """Return the predictions moved by a share `towards` of the way to the truth."""
    truth, prob = truth_and_prob(table, task)
    moved = (1 - towards) * prob + towards * np.eye(len(task.classes))[truth]
    return table.assign(**{f"prob_{name}": moved[:, k] for k, name in enumerate(task.classes)})


def perfect(table, task, sure):
    truth = truth_and_prob(table, task)[0]
    prob = (1 - sure) / (len(task.classes) - 1) + np.eye(len(task.classes))[truth] * (sure - (1 - sure))
    return table.assign(**{f"prob_{name}": prob[:, k] for k, name in enumerate(task.classes)})


# --- McNemar


def test_exact_mcnemar_of_a_known_case():
    first, second = np.r_[np.ones(10), np.zeros(2), np.ones(30)], np.r_[np.zeros(10), np.ones(2), np.ones(30)]
    b, c, p = mcnemar(first, second, np.arange(42))
    assert (b, c) == (10, 2)
    assert p == pytest.approx(0.038574, abs=1e-6)


def test_mcnemar_of_equal_decisions_has_p_of_one():
    assert mcnemar([1, 0, 1], [1, 0, 1], np.arange(3)) == (0, 0, 1)


def test_mcnemar_counts_a_patient_once():
    patients = np.array([0, 0, 0, 1, 1, 2, 2])
    first, second = [1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 1, 0, 0]
    # Of patient 1 each decides one image correctly.
    assert mcnemar(first, second, patients) == (2, 0, 0.5)


# --- pairs


@pytest.mark.parametrize("task", [BINARY, SOFTMAX], ids=lambda task: task.name)
def test_a_comparison_has_the_difference_of_two_scores(task):
    a, b = models(task=task.name, images=2)
    for metric in ("balanced_accuracy", "covid.auroc", "nll", "macro_f1"):
        (pair,) = compare({"a": [a], "b": [b]}, task, metric=metric, resamples=100)
        one, other = (score_intervals(table, task, resamples=10)[metric].value for table in (a, b))
        assert pair[:3] == ("a", "b", metric)
        assert pair.difference.value == pytest.approx(one - other, abs=1e-12)
        assert pair.difference.low < pair.difference.value < pair.difference.high
        assert pair.difference.method == "paired patient bootstrap"
        assert pair.p == pair.p_holm
        assert (pair.p < 0.05) == (pair.difference.low > 0 or pair.difference.high < 0)
    truth, _ = truth_and_prob(a, task)
    placed = [placements(truth == 0, truth_and_prob(t, task)[1][:, 0], patient_codes(a)) for t in (a, b)]
    assert pair.delong_p == pytest.approx(delong_test(*placed)[2])
    right = [decide(truth_and_prob(table, task)[1], task) == truth for table in (a, b)]
    assert pair[-3:] == mcnemar(*right, patient_codes(a))


def test_the_score_of_a_configuration_is_the_mean_over_seeds():
    first, second, third = models(number=3, task="three_class")
    (pair,) = compare({"a": [first, second], "b": [third]}, SOFTMAX, resamples=100)
    scores = []
    for table in (first, second, third):
        truth, prob = truth_and_prob(table, SOFTMAX)
        scores.append(overall_scores(truth, prob, decide(prob, SOFTMAX), SOFTMAX)["balanced_accuracy"])
    assert pair.difference.value == pytest.approx((scores[0] + scores[1]) / 2 - scores[2])


def test_pairs_are_in_order_and_antisymmetric():
    a, b, c = models(number=3)
    pairs = compare({"a": [a], "b": [b], "c": [c]}, BINARY, resamples=100)
    assert [pair[:2] for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    (turned,) = compare({"b": [b], "a": [a]}, BINARY, resamples=100)
    assert turned.difference.low == pytest.approx(-pairs[0].difference.high)
    assert turned.p == pytest.approx(pairs[0].p)
    assert (turned.mcnemar_b, turned.mcnemar_c) == (pairs[0].mcnemar_c, pairs[0].mcnemar_b)


def test_a_paired_interval_is_narrower_than_an_unpaired_one():
    """The same images are difficult for both models."""
    (base,) = models(n=300, number=1)
    other = sharpened(base, BINARY, 0.02)
    (pair,) = compare({"a": [other], "b": [base]}, BINARY, metric="covid.auroc", resamples=500)
    alone = [score_intervals(table, BINARY, resamples=500)["covid.auroc"] for table in (base, other)]
    unpaired = math.hypot(*(interval.high - interval.low for interval in alone))
    assert pair.difference.high - pair.difference.low < unpaired / 3
    assert pair.p < 0.01


def test_a_comparison_does_not_depend_on_the_order_of_rows():
    a, b = models(images=2)
    shuffled = b.sample(frac=1, random_state=4)
    straight, turned = (compare({"a": [a], "b": [t]}, BINARY, resamples=100) for t in (b, shuffled))
    assert straight == turned


def test_holm_corrects_for_all_pairs():
    (base,) = models(number=1)
    tables = {f"configuration{i}": [sharpened(base, BINARY, share)] for i, share in enumerate((0, 0.05, 0.15, 0.4))}
    pairs = compare(tables, BINARY, metric="nll", resamples=200)
    order = np.argsort([pair.p for pair in pairs])
    corrected, largest = {}, 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1, (len(pairs) - place) * pairs[i].p))
        corrected[i] = largest
    assert [pair.p_holm for pair in pairs] == pytest.approx([corrected[i] for i in range(len(pairs))])


# --- without difference or spread


def test_identical_models_have_p_of_one():
    (a,) = models(number=1)
    (pair,) = compare({"a": [a], "b": [a.copy()]}, BINARY, resamples=50)
    assert pair.difference == (0, 0, 0, "identical")
    assert (pair.p, pair.p_holm, pair.delong_p, pair.mcnemar_b, pair.mcnemar_c, pair.mcnemar_p) == (1, 1, 1, 0, 0, 1)


def test_two_models_without_errors_have_an_interval_around_zero():
    (base,) = models(number=1)
    tables = {"sure": [perfect(base, BINARY, 0.9)], "surer": [perfect(base, BINARY, 0.99)]}
    (pair,) = compare(tables, BINARY, resamples=50)
    assert pair.difference.low < 0 == pair.difference.value < pair.difference.high
    assert pair.p == 1


def test_a_perfect_and_a_constant_model_differ_significantly():
    (base,) = models(number=1)
    constant = base.assign(prob_covid=0.1, prob_normal=0.9)
    (pair,) = compare({"a": [perfect(base, BINARY, 0.9)], "b": [constant]}, BINARY, resamples=50)
    assert pair.difference.value == 0.5
    assert 0 < pair.difference.low < 0.5 < pair.difference.high
    assert pair.p < 0.001


def test_an_undefined_score_is_not_compared():
    a, b = models()
    never = b.assign(prob_covid=0.1, prob_normal=0.9)
    pairs = compare({"a": [a], "b": [b], "never": [never]}, BINARY, metric="covid.ppv", resamples=50)
    assert [math.isnan(pair.p) for pair in pairs] == [False, True, True]
    assert [math.isnan(pair.p_holm) for pair in pairs] == [False, True, True]
    # Holm's correction counts the tested pair only.
    assert pairs[0].p == pairs[0].p_holm
    assert pairs[1].difference.method == "undefined"


# --- faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.iloc[2:],
            "configurations 'first' and 'second' were not scored on the same images: 0, 1 are in only",
        ),
        (lambda t: pd.concat([t, t.iloc[:1]]), "configuration 'second': predictions, image_id: '0' on line 62. This"),
        (
            lambda t: t.assign(label=t["label"].where(t.index > 0, "normal")),
            "configurations 'first' and 'second' have a different label for 0.",
        ),
        (lambda t: t.assign(patient_id=t["patient_id"].where(t.index != 5, "4")), "have a different patient for 5."),
    ],
    ids=["images", "duplicate", "label", "patient"],
)
def test_tables_of_different_images_are_refused(change, message):
    a, b = models()
    for tables in ({"first": [a], "second": [change(b)]}, {"first": [a], "second": [b, change(b)]}):
        with pytest.raises(InputError, match=re.escape(message)):
            score_configurations(tables, BINARY)


def test_patients_may_have_different_names():
    a, b = models(images=2)
    renamed = b.assign(patient_id="hospital-" + b["patient_id"])
    assert compare({"a": [a], "b": [renamed]}, BINARY, resamples=50)[0].p <= 1


@pytest.mark.parametrize("metric", ["auroc", "ece", ""])
def test_an_unknown_metric_is_refused(metric):
    with pytest.raises(
        InputError, match=re.escape(f"metric {metric!r}: unknown for task binary. Use one of accuracy,")
    ):
        compare({"a": models(number=1)}, BINARY, metric=metric)


def test_no_configuration_and_no_table_are_refused():
    with pytest.raises(InputError, match="no configuration"):
        score_configurations({}, BINARY)
    with pytest.raises(InputError, match="configuration 'a' has no predictions table"):
        score_configurations({"a": []}, BINARY)


# --- the leaderboard


def test_configurations_without_significant_difference_share_a_group():
    a, b = models(n=200, number=2)
    tables = {
        "worse": [a],
        "best": [sharpened(a, BINARY, 0.5)],
        "as bad": [b],
        "as good": [sharpened(a, BINARY, 0.495)],
    }
    board = rank(tables, BINARY, "nll", resamples=300)
    # The smallest loss is the best.
    scores = [ranked.interval.value for ranked in board]
    assert scores == sorted(scores)
    groups = {ranked.name: ranked.group for ranked in board}
    assert groups["best"] == 1
    assert groups["worse"] == groups["as bad"] > groups["best"]


def test_a_single_configuration_has_the_interval_of_its_table():
    (a,) = models(number=1, images=2)
    (ranked,) = rank({"a": [a]}, BINARY, "covid.auroc", resamples=200, seed=3)
    assert ranked.interval == pytest.approx(score_intervals(a, BINARY, resamples=200, seed=3)["covid.auroc"])
    assert ranked.group == 1


def test_the_best_is_first_and_nan_is_last():
    (a,) = models(number=1)
    never = a.assign(prob_covid=0.1, prob_normal=0.9)
    tables = {"never": [never], "plain": [a], "sharp": [sharpened(a, BINARY, 0.6)]}
    assert [s.name for s in rank(tables, BINARY, "covid.ppv", resamples=50)] == ["sharp", "plain", "never"]


# --- error rates


def test_equal_models_are_seldom_significantly_different():
    """Run 60 simulations; docs/simulations.md has the results of 1,000."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = count(rejecting_tests, Design("binary", 60, 4), 60, 200, 7, {})
    # A test with a type I error of 6 % would reject more often in 1 of 1,000 such tests.
    most = binom.isf(0.001, 60, 0.06)
    for name in TESTS:
        assert counts[name] <= most, name
    assert counts["bootstrap, balanced_accuracy"] > 0
