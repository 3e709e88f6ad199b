"""Main effects of settings over a grid of configurations, and the variance that training seeds and test images add."""

import math
from collections.abc import Hashable, Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from covid_cls.evaluation.comparison import ConfigurationScores, mean_difference
from covid_cls.evaluation.intervals import Interval
from covid_cls.evaluation.metrics import Floats


class VarianceSplit(NamedTuple):
    """The components of the variance of one run's score.

    Attributes:
        seed: Variance between training seeds on all test images; nan for a single seed.
        test: Variance over samples of test patients that all seeds have in common.
        both: Variance over samples of test patients that is particular to each seed (the interaction).
    """

    seed: float
    test: float
    both: float

    @property
    def seed_share(self) -> float:
        """Return the seed's share of the total variance, in [0, 1]; nan for a single seed or without variance."""
        total = self.seed + self.test + self.both
        return self.seed / total if total > 0 else math.nan


class Effect(NamedTuple):
    """The effect of a setting on a score, with all other settings the same.

    Attributes:
        axis: The setting.
        first: One of its levels.
        second: The level that it is compared with.
        difference: Score at `first` - score at `second`, averaged over the matched pairs of configurations.
        pairs: Names of these pairs.
    """

    axis: str
    first: str
    second: str
    difference: Interval
    pairs: tuple[tuple[str, str], ...]


def main_effects(
    configurations: Mapping[str, ConfigurationScores],
    axes: Mapping[str, Mapping[str, Hashable]],
    axis: str,
    name: str,
    level: float = 0.95,
) -> list[Effect]:
    """Return the effect of each pair of levels of a setting, over configurations that differ in nothing else.

    The intervals cover the sampling of test patients, not of training seeds. A pair of levels without matched
    configurations has no entry.

    Args:
        configurations: Scores by name, on the same resamples. Of two levels, the one that occurs earlier is `second`.
        axes: For each configuration its level of every setting.
        axis: The setting.
        name: Flat name of the score.
        level: Confidence level of the intervals, between 0 and 1.
    """
    # By level and all other settings, which two matched configurations have in common.
    by_level: dict[str, dict[frozenset[tuple[str, Hashable]], str]] = {}
    for configuration in configurations:
        others = frozenset(item for item in axes[configuration].items() if item[0] != axis)
        by_level.setdefault(str(axes[configuration][axis]), {})[others] = configuration
    effects = []
    for second, first in combinations(by_level, 2):
        shared = by_level[first].keys() & by_level[second].keys()
        matched = sorted((by_level[first][others], by_level[second][others]) for others in shared)
        if matched:
            pairs = [(configurations[a], configurations[b]) for a, b in matched]
            effects.append(Effect(axis, first, second, mean_difference(pairs, name, level), tuple(matched)))
    return effects


def split_variance(per_seed: Floats, replicates: Floats) -> VarianceSplit:
    """Split the variance of a score into the components of training seeds and of sampled test patients.

    Crossed random effects: the covariance of two seeds over resamples is the component of test patients, the rest of
    the variance over resamples is the interaction. The variance between seeds contains the interaction too, so this is
    subtracted. A negative component is set to 0.

    Args:
        per_seed: Score of each seed on all test images, shape (S,).
        replicates: The same in each resample, shared by the seeds, shape (S, B).
    """
    n = len(per_seed)
    # np.cov returns a number instead of a matrix for a single seed.
    covariance = np.atleast_2d(np.cov(replicates, ddof=1))
    own = float(np.trace(covariance)) / n
    if n == 1:
        return VarianceSplit(math.nan, own, math.nan)
    # The mean covariance of all pairs of seeds.
    test = max(0.0, float(covariance.sum() - np.trace(covariance)) / (n * (n - 1)))
    both = max(0.0, own - test)
    return VarianceSplit(max(0.0, float(np.var(per_seed, ddof=1)) - both), test, both)


def mean_sd(values: npt.ArrayLike) -> tuple[float, float]:
    """Return the mean and the standard deviation (ddof=1), which is nan for a single value."""
    numbers = np.asarray(values, dtype=np.float64)
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
