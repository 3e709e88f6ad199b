"""What a grid of trained cells says as a whole: seeds, folds, the effect of each axis, and what chance adds.

A cell is a list of predictions tables over the same test images in the same order, one per training seed; folds are
pooled into one table before. Resamples are drawn once per set of test images, by patient, and shared by all cells, so
that every difference is paired.
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from covid_cls.errors import InputError, listed
from covid_cls.evaluation.intervals import (
    Interval,
    degrees_of_freedom,
    involved_patients,
    paired_difference,
    resampled_interval,
)
from covid_cls.evaluation.metrics import Floats, decide
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.evaluation.resampling import patient_codes, weighted_scores
from covid_cls.labels import Task


class CellScores(NamedTuple):
    """A cell's scores by flat name, e.g. "covid.f1".

    seeds: float (S,), of each seed's table; draws: float (S, B), of the same tables in each resample. n_patients: how
    many patients each score rests on, df: the degrees of freedom of its standard error (see `intervals`).
    """

    task: Task
    seeds: dict[str, Floats]
    draws: dict[str, Floats]
    n_patients: dict[str, int]
    df: int

    def value(self, name: str) -> float:
        """The cell's score: the mean over its seeds."""
        return float(self.seeds[name].mean())

    def resampled(self, name: str) -> Floats:
        """The cell's score in each resample, (B,)."""
        return np.asarray(self.draws[name].mean(axis=0), dtype=np.float64)


class VarianceSplit(NamedTuple):
    """Variances of one run's score: what another training seed, another test set, and the two together would change.

    seed: between seeds, on all images; nan for a single seed. test: what the sampling of test patients does to all
    seeds alike. both: what it does to each seed in its own way.
    """

    seed: float
    test: float
    both: float

    @property
    def seed_share(self) -> float:
        """The seed's part of the total variance, in [0, 1]; nan for a single seed or where nothing varies."""
        total = self.seed + self.test + self.both
        return self.seed / total if total > 0 else math.nan


class Effect(NamedTuple):
    """What changing one axis from level `second` to `first` does to a score, all other settings held.

    difference: first - second, averaged over the `matched` pairs of cells, whose names are in `pairs`.
    """

    axis: str
    first: str
    second: str
    difference: Interval
    pairs: tuple[tuple[str, str], ...]


def pool_folds(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The test parts of a cross-validation as one predictions table, sorted by image_id.

    InputError where an image is in the test part of two folds.
    """
    table = pd.concat(parts, ignore_index=True)
    twice = sorted(set(table.loc[table["image_id"].duplicated(), "image_id"]))
    if twice:
        raise InputError(
            f"{len(twice)} images are in the test part of more than one fold: {listed(twice, 3)}; "
            "pool only folds of one division of the data"
        )
    return table.sort_values("image_id", kind="stable", ignore_index=True)


def mean_sd(values: npt.ArrayLike) -> tuple[float, float]:
    """Mean and standard deviation (ddof=1); the latter is nan for a single value."""
    numbers = np.asarray(values, dtype=np.float64)
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan


def point_scores(table: pd.DataFrame, task: Task) -> dict[str, float]:
    """Every score of a predictions table by its flat name, e.g. "accuracy" and "covid.auroc"."""
    truth, prob = truth_and_prob(table, task)
    once = np.ones((1, len(truth)), dtype=np.uint8)
    return {name: float(v[0]) for name, v in weighted_scores(truth, prob, decide(prob, task), task, once).items()}


def score_cell(
    tables: Sequence[pd.DataFrame],
    task: Task,
    weights: npt.NDArray[np.integer],
    only: Collection[str] | None = None,
) -> CellScores:
    """The scores of each of a cell's tables, as they are and in each resample.

    weights: (B, N), how often each image counts in each resample, in the order of the tables' rows. only: the scores
    that are wanted; None: all.
    """
    seeds: dict[str, list[float]] = {}
    draws: dict[str, list[Floats]] = {}
    involved: dict[str, int] = {}
    rows = np.concatenate([np.ones_like(weights[:1]), weights])  # the first is the table as it is
    patients = patient_codes(tables[0])
    for table in tables:
        truth, prob = truth_and_prob(table, task)
        decided = decide(prob, task)
        for name, drawn in weighted_scores(truth, prob, decided, task, rows, only).items():
            seeds.setdefault(name, []).append(float(drawn[0]))
            draws.setdefault(name, []).append(drawn[1:])
            found = involved_patients(name, task, truth, decided, patients)
            involved[name] = min(found, involved.get(name, found))
    return CellScores(
        task,
        {name: np.array(values) for name, values in seeds.items()},
        {name: np.stack(drawn) for name, drawn in draws.items()},
        involved,
        degrees_of_freedom(truth, patients),
    )


def mean_score(cell: CellScores, name: str, level: float = 0.95) -> Interval:
    """A cell's score, the mean over its seeds, with its interval over patients (`resampled_interval`)."""
    n_patients, value = cell.n_patients[name], cell.value(name)
    return resampled_interval(
        name, cell.task, value, cell.resampled(name), n_patients=n_patients, df=cell.df, level=level
    )


def mean_difference(pairs: Sequence[tuple[CellScores, CellScores]], name: str, level: float = 0.95) -> Interval:
    """The score of the first minus that of the second cell, averaged over `pairs`, with its paired interval.

    All cells must have been scored with the same weights. The interval is that of `comparison.compare_cells`:
    difference ± t x the standard error of the paired patient bootstrap.
    """
    value = float(np.mean([first.value(name) - second.value(name) for first, second in pairs]))
    drawn = np.mean([first.resampled(name) - second.resampled(name) for first, second in pairs], axis=0)
    n_patients = min(cell.n_patients[name] for pair in pairs for cell in pair)
    any_cell = pairs[0][0]
    return paired_difference(name, any_cell.task, value, drawn, n_patients=n_patients, df=any_cell.df, level=level)


def main_effects(
    cells: Mapping[str, CellScores],
    axes: Mapping[str, Mapping[str, Hashable]],
    axis: str,
    name: str,
    level: float = 0.95,
) -> list[Effect]:
    """What each pair of levels of `axis` does to the score `name`, over the cells that differ in nothing else.

    axes: per cell its level on every axis. The level that `cells` names earlier is `second`; a pair of levels without
    matched cells has no entry. The interval covers the sampling of test patients, not that of training seeds.
    """
    by_level: dict[str, dict[frozenset[tuple[str, Hashable]], str]] = {}
    for cell in cells:
        others = frozenset(item for item in axes[cell].items() if item[0] != axis)
        by_level.setdefault(str(axes[cell][axis]), {})[others] = cell
    effects = []
    for second, first in combinations(by_level, 2):
        shared = sorted(
            (by_level[first][others], by_level[second][others])
            for others in by_level[first]
            if others in by_level[second]
        )
        if shared:
            difference = mean_difference([(cells[a], cells[b]) for a, b in shared], name, level)
            effects.append(Effect(axis, first, second, difference, tuple(shared)))
    return effects


def split_variance(seeds: Floats, draws: Floats) -> VarianceSplit:
    """How much of a score's variance comes from training seeds and how much from the sampling of test patients.

    seeds: (S,), each seed's score on all test images; draws: (S, B), the same in each resample, shared by the seeds.
    The covariance of two seeds' draws is what the test images do to both; the rest of the draws' variance is the
    interaction, which is in the variance between seeds too and is subtracted from it (crossed random effects).
    A component that comes out negative is 0.
    """
    n = len(seeds)
    covariance = np.atleast_2d(np.cov(draws, ddof=1))
    own = float(np.trace(covariance)) / n
    if n == 1:
        return VarianceSplit(math.nan, own, math.nan)
    test = max(0.0, float(covariance.sum() - np.trace(covariance)) / (n * (n - 1)))
    both = max(0.0, own - test)
    return VarianceSplit(max(0.0, float(np.var(seeds, ddof=1)) - both), test, both)
