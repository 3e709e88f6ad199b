"""Calibration: known temperatures, expected calibration errors with their null values, slope and intercept."""

import math

import numpy as np
import pytest

from covid_cls.evaluation.calibration import (
    calibrated,
    calibration_error,
    covid_logit,
    fit_temperature,
    prior_shift,
    recalibration,
    reliability,
)
from covid_cls.evaluation.metrics import Floats, Indices, decide
from covid_cls.tasks import TASKS, Task

ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def sample(task: Task, n: int, seed: int = 0) -> tuple[Indices, Floats]:
    """Draw classes from the probabilities of their logits, as for a perfectly calibrated model."""
    rng = np.random.default_rng(seed)
    if not task.multilabel:
        logit = rng.normal(0, 1.5, (n, len(task.classes)))
        cumulative = calibrated(logit, 1, task).cumsum(axis=1)
        return (rng.random(n)[:, None] > cumulative[:, :-1]).sum(axis=1), logit
    # Multilabel targets depend on each other, so a calibrated model predicts their shares in groups of images.
    group, truth = rng.integers(0, 40, n), rng.integers(0, 3, n)
    weights = rng.dirichlet((1.0, 1.0, 1.0), 40)
    truth = np.array([rng.choice(3, p=weights[g]) for g in group])
    targets = np.asarray(task.targets)[truth]
    share = np.array([targets[group == g].mean(axis=0).clip(1e-3, 1 - 1e-3) for g in range(40)])[group]
    return truth, np.log(share) - np.log1p(-share)


@ALL_TASKS
def test_a_known_temperature_is_found(task: Task) -> None:
    truth, logit = sample(task, 20_000)
    assert fit_temperature(truth, 3 * logit, task) == pytest.approx(3, abs=0.1)


@ALL_TASKS
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_temperature_changes_no_decision(task: Task, temperature: float) -> None:
    logit = np.random.default_rng(1).normal(0, 3, (500, len(task.classes)))
    decided = [decide(calibrated(logit, t, task), task).tolist() for t in (1.0, temperature)]
    assert decided[0] == decided[1]


def test_logits_are_divided_by_the_temperature() -> None:
    logit = np.array([[2.0, 0.0]])
    # The difference of 2 becomes 1 at temperature 2.
    p = 1 / (1 + math.exp(-1))
    assert calibrated(logit, 2.0, TASKS["binary"]) == pytest.approx(np.array([[p, 1 - p]]))
    logit = np.array([[2.0, 0.0, -2.0]])
    found = calibrated(logit, 2.0, TASKS["three_class_multilabel"])
    assert found == pytest.approx(np.array([[p, 0.5, 1 - p]]))


@ALL_TASKS
def test_a_temperature_is_nan_if_the_data_do_not_determine_it(task: Task) -> None:
    truth = np.arange(30) % len(task.classes)
    sure = np.where(np.asarray(task.targets)[truth] == 1, 4.0, -4.0)
    assert math.isnan(fit_temperature(truth, sure, task))
    assert math.isnan(fit_temperature(np.zeros(30, dtype=np.int64), sure, task))


def test_ece_of_known_cases() -> None:
    prob, outcome = np.arange(0.95, 0, -0.1), [1, 1, 1, 0, 1, 0, 1, 0, 0, 0]
    assert calibration_error(prob, outcome, bins=10).value == pytest.approx(0.31)
    top = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    right = top.argmax(axis=1) == [0, 1, 0, 1]
    assert calibration_error(top.max(axis=1), right).value == pytest.approx(0.40)


@pytest.mark.parametrize(("n", "null", "within"), [(100, 0.088, 0.006), (300, 0.051, 0.003), (1000, 0.030, 0.002)])
def test_the_null_value_of_the_ece_of_known_cases(n: int, null: float, within: float) -> None:
    prob = np.random.default_rng(3).uniform(0.5, 1, n)
    gap = calibration_error(prob, np.ones(n))
    assert gap.null == pytest.approx(null, abs=within)
    assert gap.null < gap.null_p95 < gap.value


def test_a_calibrated_model_is_within_its_null_range() -> None:
    rng = np.random.default_rng(0)
    prob = rng.uniform(0.5, 1, (100, 400))
    gaps = [calibration_error(p, rng.random(400) < p, draws=200) for p in prob]
    assert 0.85 <= np.mean([gap.value <= gap.null_p95 for gap in gaps]) <= 1


def test_reliability_counts_every_image_once() -> None:
    bins = reliability(np.array([0.0, 0.04, 0.55, 1.0]), [0, 1, 1, 1])
    assert [(b["n"], b["events"], b["share"]) for b in bins] == [(2, 1, 0.5), (1, 1, 1.0), (1, 1, 1.0)]
    assert [b["mean_prob"] for b in bins] == pytest.approx([0.02, 0.55, 1.0])


def test_slope_and_intercept_of_a_distorted_model() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 20_000)
    positive = rng.random(len(logit)) < 1 / (1 + np.exp(-logit))
    alone = np.arange(len(logit))
    found = recalibration(positive, 2 * logit, alone)
    assert found["slope"].value == pytest.approx(0.5, abs=0.02)
    assert found["slope"].low < 0.5 < found["slope"].high
    assert recalibration(positive, logit + 1, alone)["intercept"].value == pytest.approx(-1, abs=0.05)


def test_copies_of_an_image_do_not_narrow_the_interval_of_the_slope() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 1, 200)
    positive = rng.random(200) < 1 / (1 + np.exp(-logit))
    once = recalibration(positive, logit, np.arange(200))["slope"]
    fourfold = recalibration(np.tile(positive, 4), np.tile(logit, 4), np.tile(np.arange(200), 4))["slope"]
    assert tuple(fourfold[:3]) == pytest.approx(tuple(once[:3]), abs=0.01)


@pytest.mark.parametrize("positive", [[True] * 4, [False] * 4, [False, False, True, True]])
def test_the_slope_is_nan_without_two_overlapping_classes(positive: list[bool]) -> None:
    found = recalibration(np.array(positive), np.array([-2.0, -1.0, 1.0, 2.0]), np.arange(4))
    assert math.isnan(found["slope"].value)
    assert math.isnan(found["intercept"].low)


def test_covid_log_odds_match_its_probability() -> None:
    logit = np.random.default_rng(0).normal(0, 2, (50, 3))
    for task in (TASKS["three_class"], TASKS["three_class_multilabel"]):
        prob = calibrated(logit, 1, task)[:, 0]
        assert covid_logit(logit, task) == pytest.approx(np.log(prob / (1 - prob)))


def test_prior_shift_of_a_known_case_and_back() -> None:
    shifted = prior_shift(np.array([[0.8, 0.2]]), [0.5, 0.5], [0.05, 0.95])
    assert shifted[0] == pytest.approx([0.173913, 0.826087], abs=1e-6)
    prob = np.random.default_rng(0).dirichlet([1, 1, 1], 10)
    back = prior_shift(prior_shift(prob, [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]), [0.1, 0.1, 0.8], [0.2, 0.3, 0.5])
    assert back == pytest.approx(prob)
