"""Scores over seeds and folds, main effects and variance components."""

import math

import numpy as np
import pandas as pd
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.comparison import (
    compare_configurations,
    leaderboard,
    mean_difference,
    mean_score,
    score_configurations,
    score_seeds,
)
from covid_cls.evaluation.effects import main_effects, mean_sd, split_variance
from covid_cls.evaluation.intervals import patient_codes, patient_weights, score_intervals
from covid_cls.evaluation.metrics import class_scores, decide, overall_scores, point_scores
from covid_cls.evaluation.predictions import pool_folds, truth_and_prob
from covid_cls.tasks import TASKS
from tests.reporting.sweeps import predictions

TASK = TASKS["three_class"]
RESAMPLES = 300


def weights(table):
    truth, _ = truth_and_prob(table, TASK)
    return patient_weights(truth, patient_codes(table), RESAMPLES, 0)


def scored(*tables):
    return score_seeds(tables, TASK, weights(tables[0]))


def test_pooled_folds_do_not_depend_on_their_order():
    complete = predictions(TASK)
    parts = [complete.iloc[k::3].sample(frac=1, random_state=k) for k in (2, 0, 1)]
    pd.testing.assert_frame_equal(pool_folds(parts), complete)


def test_an_image_in_two_folds_is_refused():
    complete = predictions(TASK)
    with pytest.raises(InputError, match=r"1 images are in the test part of more than one fold: i0004\."):
        pool_folds([complete.iloc[:5], complete.iloc[4:]])


def test_mean_and_sd_of_known_numbers_and_of_a_single_one():
    assert mean_sd([1.0, 2.0, 3.0, 6.0]) == (3.0, math.sqrt(14 / 3))
    mean, sd = mean_sd([0.8])
    assert mean == 0.8
    assert math.isnan(sd)


def test_point_scores_equal_the_overall_and_class_scores():
    table = predictions(TASK)
    truth, prob = truth_and_prob(table, TASK)
    decided = decide(prob, TASK)
    found = point_scores(table, TASK)
    for name, value in overall_scores(truth, prob, decided, TASK).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    for label, scores in class_scores(truth, prob, decided, TASK).items():
        for name in ("auroc", "sensitivity", "f1"):
            assert found[f"{label}.{name}"] == pytest.approx(scores[name], abs=1e-12)


def test_a_mean_over_seeds_has_the_interval_of_the_leaderboard():
    tables = [predictions(TASK, seed=s) for s in (0, 1, 2)]
    configuration = scored(*tables)
    each = [point_scores(table, TASK)["macro_auroc"] for table in tables]
    assert configuration.value("macro_auroc") == pytest.approx(np.mean(each), abs=1e-12)
    scores = score_configurations({"a": tables}, TASK, resamples=RESAMPLES)
    (ranked,) = leaderboard(scores, [], "macro_auroc")
    assert mean_score(configuration, "macro_auroc") == pytest.approx(ranked.interval)


def test_a_single_seed_has_the_interval_of_its_table():
    table = predictions(TASK)
    expected = score_intervals(table, TASK, resamples=RESAMPLES)
    configuration = scored(table)
    for name in ("accuracy", "covid.sensitivity", "macro_auroc", "brier"):
        assert mean_score(configuration, name) == pytest.approx(expected[name])


def test_a_mean_difference_of_one_pair_equals_its_comparison():
    a, b = ([predictions(TASK, skill=skill, seed=s) for s in (0, 1)] for skill in (2.0, 1.0))
    (expected,) = compare_configurations(score_configurations({"a": a, "b": b}, TASK, resamples=RESAMPLES))
    found = mean_difference([(scored(*a), scored(*b))], "balanced_accuracy")
    assert found == pytest.approx(expected.difference)
    assert found.low < found.value < found.high


def test_a_difference_of_models_without_errors_has_an_interval_around_zero():
    perfect = predictions(TASK, skill=50.0)
    found = mean_difference([(scored(perfect), scored(perfect))], "accuracy")
    assert found.value == 0
    assert found.low < 0 < found.high


def test_main_effects_average_over_matched_configurations():
    skill = {"A": {"x": 1.0, "y": 2.0}, "B": {"x": 1.5, "y": 2.5}}
    configurations = {f"{a}{b}": scored(predictions(TASK, skill=s)) for a, row in skill.items() for b, s in row.items()}
    axes = {name: {"first": name[0], "second": name[1]} for name in configurations}
    configurations["Cx"], axes["Cx"] = scored(predictions(TASK, skill=3.0)), {"first": "C", "second": "x"}
    found = {(e.first, e.second): e for e in main_effects(configurations, axes, "first", "accuracy")}
    assert set(found) == {("B", "A"), ("C", "A"), ("C", "B")}
    assert found["B", "A"].pairs == (("Bx", "Ax"), ("By", "Ay"))
    values = {name: scores.value("accuracy") for name, scores in configurations.items()}
    expected = np.mean([values["Bx"] - values["Ax"], values["By"] - values["Ay"]])
    assert found["B", "A"].difference.value == pytest.approx(expected, abs=1e-12)
    assert found["C", "A"].pairs == (("Cx", "Ax"),)
    # The mean of two differences varies less than one of them.
    alone = mean_difference([(configurations["Bx"], configurations["Ax"])], "accuracy")
    both = found["B", "A"].difference
    assert both.high - both.low < alone.high - alone.low


def test_levels_without_matched_configurations_have_no_effect():
    configurations = {name: scored(predictions(TASK, skill=s)) for name, s in (("Ax", 1.0), ("By", 2.0))}
    axes = {name: {"first": name[0], "second": name[1]} for name in configurations}
    assert main_effects(configurations, axes, "first", "accuracy") == []


def test_the_variance_split_recovers_its_components():
    seed_sd, test_sd, both_sd = 0.04, 0.02, 0.03
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        n_seeds = 5
        of_seed = rng.normal(0, seed_sd, n_seeds)
        drawn = rng.normal(0, test_sd, 400) + rng.normal(0, both_sd, (n_seeds, 400))
        here = rng.normal(0, test_sd) + rng.normal(0, both_sd, n_seeds)
        found.append(split_variance(0.8 + of_seed + here, 0.8 + of_seed[:, None] + drawn))
    # Clipping at 0 raises the mean of the seed component slightly.
    assert np.mean([f.seed for f in found]) == pytest.approx(seed_sd**2, rel=0.1)
    assert np.mean([f.test for f in found]) == pytest.approx(test_sd**2, rel=0.05)
    assert np.mean([f.both for f in found]) == pytest.approx(both_sd**2, rel=0.05)


def test_variance_with_a_single_component():
    draws = np.random.default_rng(0).normal(size=500)
    same = split_variance(np.array([0.8, 0.8]), np.stack([draws, draws]))
    assert (same.seed, same.both) == (0.0, pytest.approx(0.0, abs=1e-12))
    assert same.test == pytest.approx(draws.var(ddof=1))
    assert same.seed_share == 0
    apart = split_variance(np.array([0.7, 0.9]), np.full((2, 500), 0.8))
    assert apart.seed == pytest.approx(0.02)
    assert apart.seed_share == 1


def test_a_single_seed_has_no_seed_variance():
    split = split_variance(np.array([0.8]), np.random.default_rng(0).normal(size=(1, 500)))
    assert math.isnan(split.seed)
    assert math.isnan(split.seed_share)
    assert split.test > 0
