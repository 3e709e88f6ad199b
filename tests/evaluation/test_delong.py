"""DeLong's variance, interval and test of AUROCs: known answers, properties, and scores without variance."""

import math

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from covid_cls.evaluation.delong import delong_interval, delong_test, placements
from covid_cls.evaluation.intervals import interval_without_spread, p_without_spread

# --- known answers

README = [0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1], [0.1, 0.35, 0.24, 0.8, 0.2, 0.85, 0.13, 0.85, 0.74, 0.58, 0.71, 0.25]
PAIR = [0, 0, 1, 1, 0, 1, 0], [0.1, 0.35, 0.4, 0.8, 0.2, 0.75, 0.1], [0.5, 0.92, 0.1, 0.1, 0.8, 0.95, 0.9]


def paired_test(positive, first, second):
    return delong_test(placements(positive, first), placements(positive, second))


def test_variance_of_a_known_case():
    placed = placements([1, 1, 1, 0, 0, 0], [0.9, 0.8, 0.4, 0.7, 0.3, 0.2])
    assert placed.auroc == pytest.approx(8 / 9)
    assert placed.variance == pytest.approx(2 / 81)
    assert math.sqrt(placed.variance) == pytest.approx(0.157135, abs=1e-6)


def test_the_interval_is_clipped_at_one():
    interval = delong_interval(*README)
    assert interval[:3] == pytest.approx((0.708, 0.378, 1), abs=5e-4)
    assert interval.method == "DeLong"


def test_the_paired_test_of_a_known_case():
    difference, z, p = paired_test(*PAIR)
    assert difference == pytest.approx(1 - 0.3333, abs=1e-4)
    assert z == pytest.approx(2)
    assert p == pytest.approx(0.0455, abs=1e-4)


def test_an_auroc_of_one_has_an_exact_interval():
    interval = delong_interval(*PAIR[:2])
    assert interval.value == 1
    # There are 3 positives and 4 negatives.
    assert interval.low == pytest.approx(0.025 ** (1 / 3))
    assert interval.high == 1
    assert interval.method == "Clopper-Pearson"


def test_equal_scores_have_p_of_one():
    assert paired_test(*README[:1], README[1], README[1]) == (0, 0, 1)
    # Both scores are perfect.
    assert paired_test(PAIR[0], PAIR[1], PAIR[1]) == (0, 0, 1)


# --- properties


def test_placements_equal_the_shares_of_ordered_pairs_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(200):
        positive = np.r_[0, 1, rng.integers(0, 2, int(rng.integers(0, 20)))]
        score = rng.integers(0, 6, len(positive)) / 5
        up, down = score[positive == 1], score[positive == 0]
        pairs = (up[:, None] > down) + (up[:, None] == down) / 2
        placed = placements(positive, score)
        np.testing.assert_allclose(placed.positives, pairs.mean(axis=1), atol=1e-12)
        np.testing.assert_allclose(placed.negatives, pairs.mean(axis=0), atol=1e-12)
        assert placed.auroc == pytest.approx(roc_auc_score(positive, score), abs=1e-12)


def test_the_test_is_antisymmetric():
    rng = np.random.default_rng(1)
    positive, a, b = np.arange(50) % 2, rng.random(50), rng.random(50)
    one, other = paired_test(positive, a, b), paired_test(positive, b, a)
    assert one[:2] == pytest.approx((-other[0], -other[1]))
    assert one[2] == pytest.approx(other[2])


def test_only_ranks_matter():
    positive, score = README
    assert delong_interval(positive, score) == delong_interval(positive, np.exp(5 * np.array(score)))


def test_patient_codes_change_nothing_for_one_image_per_patient():
    codes = np.random.default_rng(0).permutation(12)
    assert delong_interval(*README, patients=codes) == pytest.approx(delong_interval(*README))


def test_copies_of_an_image_do_not_narrow_the_interval():
    positive, score = (np.repeat(values, 5) for values in README)
    by_patient = delong_interval(positive, score, patients=np.repeat(np.arange(12), 5))
    assert by_patient[:3] == pytest.approx(delong_interval(*README)[:3])
    assert delong_interval(positive, score).low > by_patient.low + 0.1


def test_images_of_both_classes_of_a_patient_are_correlated():
    """If the two images of a patient have common noise, the AUROC varies less than with separate patients."""
    rng = np.random.default_rng(2)
    shared = 3 * rng.normal(size=200)
    score = np.r_[1 + shared + rng.normal(size=200), shared + rng.normal(size=200)]
    positive = np.repeat([1, 0], 200)
    paired = placements(positive, score, np.tile(np.arange(200), 2))
    assert paired.variance < 0.5 * placements(positive, score).variance


# --- without variance


def test_one_class_has_no_auroc():
    interval = delong_interval([1, 1], [0.2, 0.4])
    assert all(math.isnan(figure) for figure in interval[:3])
    assert interval.method == "undefined"
    assert all(math.isnan(figure) for figure in paired_test([0, 0], [0.2, 0.4], [0.1, 0.2]))


def test_the_interval_for_a_single_positive_is_wide():
    interval = delong_interval([1, 0, 0, 0, 0], [0.5, 0.1, 0.2, 0.3, 0.9])
    assert interval.value == 0.75
    assert interval.high - interval.low > 0.9


@pytest.mark.parametrize("n", [3, 10, 40])
def test_a_perfect_score_differs_from_a_constant_one(n):
    positive = np.repeat([1, 0], n)
    difference, z, p = paired_test(positive, positive, np.zeros(2 * n))
    assert (difference, z) == (0.5, math.inf)
    assert p == pytest.approx(min(1, 2 * 1.5**-n))


@pytest.mark.parametrize("difference", [0.1, -0.5, 1])
@pytest.mark.parametrize("n", [5, 30])
def test_p_and_interval_without_spread_match(difference, n):
    p = p_without_spread(difference, n, 1)
    if p < 1:
        wider, narrower = (interval_without_spread(difference, n, -1, 1, 1 - factor * p) for factor in (0.99, 1.01))
        assert wider.low * wider.high < 0 < narrower.low * narrower.high
    # If n of n pairs favour the same side, it is the sign test.
    if difference == 1:
        assert p == pytest.approx(2 * binom.pmf(n, n, 0.5))
