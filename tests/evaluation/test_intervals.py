import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from covid_cls.errors import InputError
from covid_cls.evaluation.intervals import (
    involved_patients,
    proportion_interval,
    resampled_interval,
    score_intervals,
    score_range,
    without_spread,
)
from covid_cls.evaluation.metrics import class_scores, decide, overall_scores
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.labels import TASKS
from covid_cls.records import prediction_columns
from tools.simulations.intervals import Design, count, covered, draw, known

BINARY, SOFTMAX = TASKS["binary"], TASKS["three_class"]
ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def table(truth, prob, patients=None, task=BINARY):
    prob = np.asarray(prob, dtype=float)
    columns = {
        "image_id": [f"image{i}" for i in range(len(truth))],
        "patient_id": [""] * len(truth) if patients is None else [f"p{code}" for code in patients],
        **dict.fromkeys(("source", "split", "fold"), "here"),
        "label": [task.classes[k] for k in truth],
        **{f"logit_{name}": prob[:, k] for k, name in enumerate(task.classes)},
        **{f"prob_{name}": prob[:, k] for k, name in enumerate(task.classes)},
    }
    return pd.DataFrame(columns)[prediction_columns(task.classes)]


def covid_first(covid):
    return np.column_stack([covid, 1 - np.asarray(covid)])


def drawn(task, n=60, images=1, seed=0):
    """A predictions table of any task; a multilabel one reads the softmax as sigmoids."""
    name = "three_class" if task.multilabel else task.name
    return draw(Design(name, n, images), np.random.default_rng(seed))[0]


# --- proportions: known answers (the project's trust page, section 2)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high", "method"),
    [
        (45, 50, 0.7864, 0.9565, "Wilson"),
        (50, 50, 0.9289, 1, "Clopper-Pearson"),
        (20, 20, 0.8316, 1, "Clopper-Pearson"),
        (0, 20, 0, 1 - 0.8316, "Clopper-Pearson"),
    ],
)
def test_interval_of_a_proportion(successes, n, low, high, method):
    interval = proportion_interval(successes, n)
    assert interval.value == successes / n
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert interval.method == method


def test_no_trials_have_no_proportion():
    interval = proportion_interval(0, 0)
    assert all(math.isnan(figure) for figure in interval[:3])
    assert interval.method == "undefined"


# --- scores


@ALL_TASKS
def test_every_score_of_metrics_has_an_interval_around_it(task):
    rows = drawn(task)
    truth, prob = truth_and_prob(rows, task)
    decided = decide(prob, task)
    expected = overall_scores(truth, prob, decided, task)
    for name, scores in class_scores(truth, prob, decided, task).items():
        expected |= {f"{name}.{score}": value for score, value in scores.items() if score != "n"}
    intervals = score_intervals(rows, task, resamples=200)
    assert {name: interval.value for name, interval in intervals.items()} == pytest.approx(expected, abs=1e-12)
    for name, interval in intervals.items():
        low, high = score_range(name, task)
        assert low <= interval.low < interval.value < interval.high <= high, name
        wilson = name.rpartition(".")[2] in ("accuracy", "sensitivity", "specificity", "ppv", "npv")
        assert interval.method == f"patient bootstrap, {'Wilson' if wilson else 'logit'}"
        assert {type(figure) for figure in interval[:3]} == {float}


def test_ece_has_no_interval():
    assert "ece" not in score_intervals(drawn(BINARY), BINARY, resamples=50)


@ALL_TASKS
def test_rows_may_come_in_any_order(task):
    rows = drawn(task, images=2)
    one, other = (score_intervals(t, task, resamples=100) for t in (rows, rows.sample(frac=1, random_state=1)))
    for name, interval in one.items():
        assert interval[:3] == pytest.approx(other[name][:3], abs=1e-12), name


def test_with_one_image_each_a_sensitivity_has_wilsons_interval():
    rng = np.random.default_rng(0)
    covid = np.r_[np.full(45, 0.9), np.full(5, 0.1), rng.random(200)]
    rows = table(np.repeat([0, 1], [50, 200]), covid_first(covid))
    found = score_intervals(rows, BINARY, resamples=10_000)["covid.sensitivity"]
    # the same but for a t of 248 degrees of freedom, n / (n - 1) and the resampling's own error
    assert found[:3] == pytest.approx((0.9, 0.7864, 0.9565), abs=0.005)


def test_other_decisions_have_other_intervals():
    rows = drawn(BINARY)
    _, prob = truth_and_prob(rows, BINARY)
    eager = score_intervals(rows, BINARY, decided=np.where(prob[:, 0] > 0.1, 0, 1), resamples=100)
    usual = score_intervals(rows, BINARY, resamples=100)
    assert eager["covid.sensitivity"].low > usual["covid.sensitivity"].low
    assert eager["covid.auroc"] == usual["covid.auroc"]


def test_a_higher_level_is_wider():
    rows = drawn(SOFTMAX)
    narrow, wide = (score_intervals(rows, SOFTMAX, resamples=200, level=level) for level in (0.8, 0.99))
    assert all(wide[name].low < narrow[name].low < narrow[name].high < wide[name].high for name in wide)


def test_a_faulty_table_is_refused():
    with pytest.raises(InputError, match="no rows"):
        score_intervals(drawn(BINARY).iloc[:0], BINARY)


# --- where resampling has no answer


def test_a_perfect_model_has_exact_intervals_of_the_patients_involved():
    truth = np.repeat([0, 1], [20, 50])
    intervals = score_intervals(table(truth, covid_first(np.where(truth == 0, 0.9, 0.2))), BINARY, resamples=50)
    expected = {"covid.sensitivity": 0.8316, "covid.specificity": 0.9289, "covid.auroc": 0.8316}
    expected |= {"accuracy": 0.025 ** (1 / 70), "balanced_accuracy": 0.8316, "mcc": 2 * 0.8316 - 1}
    for name, low in expected.items():
        assert intervals[name].value == 1
        assert (intervals[name].low, intervals[name].high) == pytest.approx((low, 1), abs=1e-4), name
        assert intervals[name].method == "Clopper-Pearson"


def test_images_of_one_patient_do_not_sharpen_an_exact_interval():
    truth, patients = np.repeat([0, 1], [80, 200]), np.repeat(np.arange(70), 4)
    covid = np.where(truth == 0, 0.9, 0.2)
    intervals = score_intervals(table(truth, covid_first(covid), patients), BINARY, resamples=50)
    assert intervals["covid.sensitivity"].low == pytest.approx(0.8316, abs=1e-4)  # 20 patients
    assert intervals["covid.auroc"].low == pytest.approx(0.8316, abs=1e-4)


@pytest.mark.parametrize("constant", [0.1, 0.9], ids=["always normal", "always covid"])
def test_a_constant_model_has_no_interval_of_zero_width(constant):
    truth = np.repeat([0, 1], [10, 30])
    intervals = score_intervals(table(truth, covid_first(np.full(40, constant))), BINARY, resamples=50)
    for name in ("covid.auroc", "balanced_accuracy", "mcc", "covid.sensitivity", "covid.specificity", "brier", "nll"):
        assert intervals[name].low < intervals[name].high, name
    assert intervals["covid.auroc"].value == 0.5
    assert intervals["covid.auroc"].method == "exact, no spread"
    never = "ppv" if constant == 0.1 else "npv"
    assert intervals[f"covid.{never}"].method == "undefined"


@pytest.mark.filterwarnings("ignore:class index 0 has a single patient")
def test_one_patient_says_little():
    truth, patients = np.repeat([0, 1], [4, 30]), np.r_[np.zeros(4, int), np.arange(1, 31)]
    covid = np.r_[0.9, 0.8, 0.6, 0.1, np.linspace(0.05, 0.7, 30)]
    intervals = score_intervals(table(truth, covid_first(covid), patients), BINARY, resamples=100)
    assert intervals["covid.sensitivity"].value == 0.75
    assert intervals["covid.sensitivity"].low < 0.05
    assert intervals["covid.sensitivity"].high > 0.95
    assert intervals["covid.auroc"].high - intervals["covid.auroc"].low > 0.9
    assert intervals["covid.specificity"].method == "patient bootstrap, Wilson"


def test_an_absent_class_is_undefined_and_the_others_are_not():
    rng = np.random.default_rng(0)
    truth, prob = np.repeat([1, 2], 20), rng.dirichlet(np.ones(3), 40)
    intervals = score_intervals(table(truth, prob, task=SOFTMAX), SOFTMAX, resamples=100)
    for name in ("covid.auroc", "covid.sensitivity", "macro_auroc", "macro_f1"):
        assert all(math.isnan(figure) for figure in intervals[name][:3]), name
        assert intervals[name].method == "undefined"
    assert intervals["covid.specificity"].low < intervals["covid.specificity"].high
    assert intervals["normal.auroc"].low < intervals["normal.auroc"].high


@pytest.mark.parametrize("n", [1, 5, 20])
@pytest.mark.parametrize("truth", [0.5, 0.9, 0.99])
def test_the_bound_without_spread_is_exact(n, truth):
    """Where all of n trials of probability `truth` succeed, the interval misses `truth` in at most 2.5 % of draws."""
    interval = without_spread(1.0, n, 0, 1)
    missed = binom.pmf(n, n, truth) if interval.low > truth else 0
    assert missed <= 0.025


def test_involved_patients_are_those_of_the_smallest_group():
    truth, patients = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 2, 3, 4, 5, 6, 6, 7])
    decided = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    expected = {"covid.sensitivity": 2, "covid.specificity": 6, "covid.ppv": 3, "covid.npv": 5, "covid.auroc": 2}
    expected |= {"normal.auroc": 4, "accuracy": 8, "macro_f1": 2, "nll": 8}
    found = {name: involved_patients(name, SOFTMAX, truth, decided, patients) for name in expected}
    assert found == expected
    assert involved_patients("pneumonia.auroc", TASKS["three_class_multilabel"], truth, decided, patients) == 4


def test_resamples_without_the_score_are_left_out():
    values = np.r_[np.random.default_rng(0).uniform(0.6, 0.8, 500), np.full(20, np.nan)]
    with_nan, without = (
        resampled_interval("covid.ppv", BINARY, 0.7, part, n_patients=30, df=100) for part in (values, values[:500])
    )
    assert with_nan == without


# --- what the intervals promise


def test_by_patient_a_clustered_interval_is_wider():
    """100 patients with 4 images each, whose noise they share: the project's trust page has it 1.9 times wider."""
    rng = np.random.default_rng(5)
    truth, patients = np.repeat([0, 1], 200), np.repeat(np.arange(100), 4)
    noise = rng.normal(size=100)[patients] + 0.3 * rng.normal(size=400)
    covid = 1 / (1 + np.exp(-(np.where(truth == 0, 0.5, -0.5) + noise)))
    by_patient = score_intervals(table(truth, covid_first(covid), patients), BINARY)["covid.auroc"]
    by_image = score_intervals(table(truth, covid_first(covid)), BINARY)["covid.auroc"]
    assert by_patient.value == by_image.value
    ratio = (by_patient.high - by_patient.low) / (by_image.high - by_image.low)
    assert 1.6 < ratio < 2.2  # at most 2, for images that are copies, but for chance


@pytest.mark.parametrize("design", [Design("binary", 200), Design("binary", 60, 4)], ids=str)
def test_intervals_cover_the_truth(design):
    """In 150 simulations; fewer than `least` would happen once in 1,000 times. docs/simulations.md has 1,000."""
    truths = known(design, patients=200_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = count(covered, design, 150, 200, 7, truths)
    least = binom.ppf(0.001, 150, 0.94)
    for name in ("covid.auroc", "covid.sensitivity", "covid.specificity", "accuracy", "balanced_accuracy", "macro_f1"):
        assert counts[name] >= least, name
    if design.images > 1:
        assert counts["covid.sensitivity, Wilson by image"] < counts["covid.sensitivity"]
