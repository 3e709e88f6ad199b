"""Intervals of scores: known answers, special cases, patient resamples, and their coverage in simulations."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from covid_cls.errors import InputError
from covid_cls.evaluation.intervals import (
    bootstrap_interval,
    interval_without_spread,
    involved_patients,
    patient_codes,
    patient_weights,
    proportion_interval,
    score_intervals,
    score_range,
)
from covid_cls.evaluation.metrics import class_scores, decide, overall_scores, weighted_scores
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.io import prediction_columns
from covid_cls.tasks import TASKS
from tools.simulations.intervals import Design, count, covered_scores, simulate, true_scores

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


def simulated(task, n=60, images=1, seed=0):
    """Simulate a predictions table of any task; a multilabel task takes the softmax as sigmoids."""
    name = "three_class" if task.multilabel else task.name
    return simulate(Design(name, n, images), np.random.default_rng(seed))[0]


# --- proportions: known answers


@pytest.mark.parametrize(
    ("successes", "n", "low", "high", "method"),
    [
        (45, 50, 0.7864, 0.9565, "Wilson"),
        (50, 50, 0.9289, 1, "Clopper-Pearson"),
        (20, 20, 0.8316, 1, "Clopper-Pearson"),
        (0, 20, 0, 1 - 0.8316, "Clopper-Pearson"),
    ],
)
def test_interval_of_a_known_proportion(successes, n, low, high, method):
    interval = proportion_interval(successes, n)
    assert interval.value == successes / n
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert interval.method == method


def test_the_proportion_of_no_trials_is_undefined():
    interval = proportion_interval(0, 0)
    assert all(math.isnan(figure) for figure in interval[:3])
    assert interval.method == "undefined"


# --- scores


@ALL_TASKS
def test_every_score_has_an_interval_that_contains_it(task):
    rows = simulated(task)
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
    assert "ece" not in score_intervals(simulated(BINARY), BINARY, resamples=50)


@ALL_TASKS
def test_intervals_do_not_depend_on_the_order_of_rows(task):
    rows = simulated(task, images=2)
    one, other = (score_intervals(t, task, resamples=100) for t in (rows, rows.sample(frac=1, random_state=1)))
    for name, interval in one.items():
        assert interval[:3] == pytest.approx(other[name][:3], abs=1e-12), name


def test_a_sensitivity_with_one_image_per_patient_has_wilsons_interval():
    rng = np.random.default_rng(0)
    covid = np.r_[np.full(45, 0.9), np.full(5, 0.1), rng.random(200)]
    rows = table(np.repeat([0, 1], [50, 200]), covid_first(covid))
    found = score_intervals(rows, BINARY, resamples=10_000)["covid.sensitivity"]
    # They differ by t with 248 degrees of freedom, n / (n - 1) and the error of resampling.
    assert found[:3] == pytest.approx((0.9, 0.7864, 0.9565), abs=0.005)


def test_intervals_follow_the_given_decisions():
    rows = simulated(BINARY)
    _, prob = truth_and_prob(rows, BINARY)
    eager = score_intervals(rows, BINARY, decided=np.where(prob[:, 0] > 0.1, 0, 1), resamples=100)
    usual = score_intervals(rows, BINARY, resamples=100)
    assert eager["covid.sensitivity"].low > usual["covid.sensitivity"].low
    assert eager["covid.auroc"] == usual["covid.auroc"]


def test_given_weights_and_a_selection_give_the_same_intervals():
    rows = simulated(SOFTMAX, images=2)
    everything = score_intervals(rows, SOFTMAX, resamples=100, seed=3)
    weights = patient_weights(truth_and_prob(rows, SOFTMAX)[0], patient_codes(rows), 100, 3)
    names = ["covid.ppv", "accuracy"]
    chosen = score_intervals(rows, SOFTMAX, weights=weights, only=names)
    assert chosen == {name: everything[name] for name in ("accuracy", "covid.ppv")}


def test_a_higher_level_gives_wider_intervals():
    rows = simulated(SOFTMAX)
    narrow, wide = (score_intervals(rows, SOFTMAX, resamples=200, level=level) for level in (0.8, 0.99))
    assert all(wide[name].low < narrow[name].low < narrow[name].high < wide[name].high for name in wide)


def test_an_empty_table_is_refused():
    with pytest.raises(InputError, match="no rows"):
        score_intervals(simulated(BINARY).iloc[:0], BINARY)


# --- resamples without spread


def test_a_perfect_model_has_exact_intervals_for_the_involved_patients():
    truth = np.repeat([0, 1], [20, 50])
    intervals = score_intervals(table(truth, covid_first(np.where(truth == 0, 0.9, 0.2))), BINARY, resamples=50)
    expected = {"covid.sensitivity": 0.8316, "covid.specificity": 0.9289, "covid.auroc": 0.8316}
    expected |= {"accuracy": 0.025 ** (1 / 70), "balanced_accuracy": 0.8316, "mcc": 2 * 0.8316 - 1}
    for name, low in expected.items():
        assert intervals[name].value == 1
        assert (intervals[name].low, intervals[name].high) == pytest.approx((low, 1), abs=1e-4), name
        assert intervals[name].method == "Clopper-Pearson"


def test_more_images_per_patient_do_not_narrow_an_exact_interval():
    truth, patients = np.repeat([0, 1], [80, 200]), np.repeat(np.arange(70), 4)
    covid = np.where(truth == 0, 0.9, 0.2)
    intervals = score_intervals(table(truth, covid_first(covid), patients), BINARY, resamples=50)
    # There are 20 patients with covid.
    assert intervals["covid.sensitivity"].low == pytest.approx(0.8316, abs=1e-4)
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
def test_intervals_for_a_single_patient_are_wide():
    truth, patients = np.repeat([0, 1], [4, 30]), np.r_[np.zeros(4, int), np.arange(1, 31)]
    covid = np.r_[0.9, 0.8, 0.6, 0.1, np.linspace(0.05, 0.7, 30)]
    intervals = score_intervals(table(truth, covid_first(covid), patients), BINARY, resamples=100)
    assert intervals["covid.sensitivity"].value == 0.75
    assert intervals["covid.sensitivity"].low < 0.05
    assert intervals["covid.sensitivity"].high > 0.95
    assert intervals["covid.auroc"].high - intervals["covid.auroc"].low > 0.9
    assert intervals["covid.specificity"].method == "patient bootstrap, Wilson"


def test_scores_of_an_absent_class_are_undefined_and_those_of_others_are_not():
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
def test_the_interval_without_spread_is_exact(n, truth):
    """If all n trials with probability `truth` succeed, the interval misses `truth` in at most 2.5 % of the cases."""
    interval = interval_without_spread(1.0, n, 0, 1)
    missed = binom.pmf(n, n, truth) if interval.low > truth else 0
    assert missed <= 0.025


def test_involved_patients_belong_to_the_smallest_group():
    truth, patients = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 2, 3, 4, 5, 6, 6, 7])
    decided = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    expected = {"covid.sensitivity": 2, "covid.specificity": 6, "covid.ppv": 3, "covid.npv": 5, "covid.auroc": 2}
    expected |= {"normal.auroc": 4, "accuracy": 8, "macro_f1": 2, "nll": 8}
    found = {name: involved_patients(name, SOFTMAX, truth, decided, patients) for name in expected}
    assert found == expected
    assert involved_patients("pneumonia.auroc", TASKS["three_class_multilabel"], truth, decided, patients) == 4


def test_resamples_with_an_undefined_score_are_left_out():
    values = np.r_[np.random.default_rng(0).uniform(0.6, 0.8, 500), np.full(20, np.nan)]
    with_nan, without = (
        bootstrap_interval("covid.ppv", BINARY, 0.7, part, n_patients=30, df=100) for part in (values, values[:500])
    )
    assert with_nan == without


# --- coverage


def test_intervals_are_wider_for_several_images_per_patient():
    """100 patients have 4 images each with common noise."""
    rng = np.random.default_rng(5)
    truth, patients = np.repeat([0, 1], 200), np.repeat(np.arange(100), 4)
    noise = rng.normal(size=100)[patients] + 0.3 * rng.normal(size=400)
    covid = 1 / (1 + np.exp(-(np.where(truth == 0, 0.5, -0.5) + noise)))
    by_patient = score_intervals(table(truth, covid_first(covid), patients), BINARY)["covid.auroc"]
    by_image = score_intervals(table(truth, covid_first(covid)), BINARY)["covid.auroc"]
    assert by_patient.value == by_image.value
    ratio = (by_patient.high - by_patient.low) / (by_image.high - by_image.low)
    # Copies of an image would give a ratio of 2.
    assert 1.6 < ratio < 2.2


@pytest.mark.parametrize("design", [Design("binary", 200), Design("binary", 60, 4)], ids=str)
def test_intervals_contain_the_true_score(design):
    """Run 100 simulations; docs/simulations.md has the results of 1,000."""
    truths = true_scores(design, patients=200_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = count(covered_scores, design, 100, 200, 7, truths)
    # Of intervals with 94 % coverage, fewer would contain the true score in 1 of 1,000 such tests.
    least = binom.ppf(0.001, 100, 0.94)
    for name in ("covid.auroc", "covid.sensitivity", "covid.specificity", "accuracy", "balanced_accuracy", "macro_f1"):
        assert counts[name] >= least, name
    if design.images > 1:
        assert counts["covid.sensitivity, Wilson by image"] < counts["covid.sensitivity"]


def patient_table(image_id, patient_id):
    return pd.DataFrame({"image_id": image_id, "patient_id": patient_id})


# --- patients


@pytest.mark.parametrize("unknown", ["", None, pd.NA, np.nan])
def test_an_image_without_a_patient_counts_as_a_separate_patient(unknown):
    codes = patient_codes(patient_table(["a", "b", "c", "d"], ["p", unknown, unknown, "p"]))
    assert codes[0] == codes[3]
    assert sorted(np.unique(codes)) == [0, 1, 2]


def test_an_image_is_not_confused_with_a_patient_of_the_same_name():
    assert len(set(patient_codes(patient_table(["a", "b"], ["", "a"])))) == 2


def test_patient_codes_do_not_depend_on_the_order_of_rows():
    rows = patient_table(list("abcdef"), ["p2", "", "p1", "p2", "p1", ""])
    order = np.random.default_rng(0).permutation(6)
    assert patient_codes(rows.iloc[order]).tolist() == patient_codes(rows)[order].tolist()


# --- resamples


def test_each_resample_has_as_many_complete_patients_of_each_class_as_the_table():
    patients = np.repeat(np.arange(40), 3)
    truth = np.repeat(np.r_[np.zeros(10, int), np.ones(30, int)], 3)
    weights = patient_weights(truth, patients, 200, seed=1)
    assert weights.shape == (200, 120)
    by_patient = weights.reshape(200, 40, 3)
    assert (by_patient == by_patient[:, :, :1]).all()
    assert (by_patient[:, :10, 0].sum(axis=1) == 10).all()
    assert (by_patient[:, 10:, 0].sum(axis=1) == 30).all()
    # The moments of a multinomial: mean 1, variance 1 - 1/n.
    drawn = by_patient[:, 10:, 0].astype(float)
    assert drawn.mean() == 1
    assert drawn.var() == pytest.approx(1 - 1 / 30, abs=0.08)


def test_resamples_depend_on_the_seed_only():
    truth, patients = np.arange(20) % 2, np.arange(20)
    first, again, other = (patient_weights(truth, patients, 5, seed) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_a_patient_with_two_classes_belongs_to_the_rarer_and_no_class_is_lost():
    patients = np.array([0, 0, 1, 1, 2, 3, 4, 5, 6, 7])
    # Patients 0 and 1 have covid and normal images.
    truth = np.array([0, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    weights = patient_weights(truth, patients, 500, seed=0)
    assert (weights[:, 0] + weights[:, 2] == 2).all()
    assert (weights[:, 4:].sum(axis=1) == 6).all()
    assert len(np.unique(weights[:, 0])) == 3


def test_a_single_patient_of_a_stratum_is_drawn_with_patients_of_the_same_class():
    patients = np.array([0, 0, 1, 1, 2])
    # Patient 2 is the only one without a covid image.
    truth = np.array([0, 1, 0, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = patient_weights(truth, patients, 300, seed=0)
    assert set(np.unique(weights[:, 4])) == {0, 1, 2, 3}


def test_a_class_with_a_single_patient_gives_a_warning():
    patients, truth = np.array([0, 0, 1, 2, 3]), np.array([0, 0, 1, 1, 1])
    with pytest.warns(UserWarning, match="class index 0 has a single patient") as caught:
        weights = patient_weights(truth, patients, 50, seed=0)
    assert len(caught) == 1
    assert (weights[:, :2] == 1).all()


# --- scores of resamples; test_against_sklearn.py checks their values


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_selected_scores_equal_those_of_all_scores(task):
    rng = np.random.default_rng(0)
    truth, size = rng.integers(0, len(task.classes), 40), len(task.classes)
    prob = rng.dirichlet(np.ones(size), 40)
    arguments = truth, prob, decide(prob, task), task, patient_weights(truth, np.arange(40), 20, 0)
    everything = weighted_scores(*arguments)
    for name, values in everything.items():
        chosen = weighted_scores(*arguments, only=[name])
        assert list(chosen) == [name]
        np.testing.assert_array_equal(chosen[name], values)


def test_scores_do_not_depend_on_the_chunk_size(monkeypatch):
    rng = np.random.default_rng(1)
    truth, prob = rng.integers(0, 3, 50), rng.dirichlet(np.ones(3), 50)
    arguments = truth, prob, decide(prob, SOFTMAX), SOFTMAX, patient_weights(truth, np.arange(50), 30, 0)
    expected = weighted_scores(*arguments)
    monkeypatch.setattr("covid_cls.evaluation.metrics._CHUNK", 350)
    for name, values in weighted_scores(*arguments).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-13, err_msg=name)


def test_ece_of_a_known_case():
    task = TASKS["binary"]
    prob = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    truth = np.array([0, 1, 0, 1])
    once = np.ones((1, 4), dtype=int)
    # Each image is in a separate bin: (0.1 + 0.8 + 0.4 + 0.3) / 4.
    assert weighted_scores(truth, prob, decide(prob, task), task, once)["ece"][0] == pytest.approx(0.4)


def test_a_bin_contains_its_upper_edge():
    task = TASKS["binary"]
    # 0.6 = 9/15 is the upper edge of a bin. In one bin, the two would have an ECE of |0.5 - 0.605|.
    prob = np.array([[0.6, 0.4], [0.61, 0.39]])
    scores = weighted_scores(np.array([0, 1]), prob, np.array([0, 0]), task, np.ones((1, 2), dtype=int))
    assert scores["ece"][0] == pytest.approx((0.4 + 0.61) / 2)
