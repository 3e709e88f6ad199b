"""Paired comparisons of trained cells on the same test images, and which of them cannot be told apart.

A cell is a list of predictions tables of the same images, one per training seed (folds pooled into one table); its
score is the mean over them. Intervals and p speak of other patients, not of other training seeds. Every pair shares
the same resampled patients, so that what both cells find hard cancels.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest, t
from statsmodels.stats.multitest import multipletests

from covid_cls.errors import InputError, listed
from covid_cls.evaluation.delong import Placements, p_without_spread, placement_test, placements
from covid_cls.evaluation.intervals import (
    UNDEFINED,
    Interval,
    degrees_of_freedom,
    involved_patients,
    paired_difference,
    resampled_interval,
    score_range,
    standard_error,
)
from covid_cls.evaluation.metrics import Floats, Indices, decide
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.evaluation.resampling import patient_codes, patient_weights, weighted_scores
from covid_cls.labels import POSITIVE, Task

_LESS_IS_BETTER = ("nll", "brier")


class Comparison(NamedTuple):
    """Two cells on the same images; differences are first - second.

    difference: of `metric`, with the paired patient bootstrap's interval; p: its two-sided p; p_holm: corrected for all
    pairs that were compared (Holm 1979). delong_p: of the AUROC of covid, by patient. mcnemar_b, mcnemar_c and
    mcnemar_p: of `mcnemar`, patients whom the first and whom the second decides better. These take the mean
    probabilities of a cell's tables and are not corrected.
    """

    first: str
    second: str
    metric: str
    difference: Interval
    p: float
    p_holm: float
    delong_p: float
    mcnemar_b: int
    mcnemar_c: int
    mcnemar_p: float


class Standing(NamedTuple):
    """A cell's place: its score with its interval, and the group (1 is best) of cells it cannot be told apart from."""

    name: str
    interval: Interval
    group: int


class _Cell(NamedTuple):
    """prob: (S, N, K), rows in the order of the image ids; drawn: the mean score in each resample, (B,)."""

    prob: Floats
    score: float
    drawn: Floats
    n_patients: int
    placed: Placements
    right: npt.NDArray[np.bool_]


class _Bench(NamedTuple):
    """What all cells are measured on and by."""

    task: Task
    metric: str
    truth: Indices
    patients: Indices
    level: float

    @property
    def df(self) -> int:
        return degrees_of_freedom(self.truth, self.patients)


def compare_cells(
    cells: Mapping[str, Sequence[pd.DataFrame]],
    task: Task,
    *,
    metric: str = "balanced_accuracy",
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Comparison]:
    """Every pair of cells, in the order of `cells`.

    metric: a flat score name. The interval is difference ± t x the bootstrap's standard error of the difference, and p
    comes from the same t: docs/simulations.md has its type I error. Cells with the same probabilities have p = 1 and
    the one interval of zero width, "identical". Where no resample differs though the cells do, as between two that make
    no error: `without_spread` and `p_without_spread`.

    InputError names the cells and the first images where two cells do not hold the same images, labels and patients,
    the cell whose table is at fault, and a metric that is none.
    """
    bench, measured = _measure(cells, task, metric, resamples, seed, level)
    return _compare(bench, measured)


def leaderboard(
    cells: Mapping[str, Sequence[pd.DataFrame]],
    task: Task,
    metric: str = "balanced_accuracy",
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Standing]:
    """The cells from the best score to the worst, in groups that cannot be told apart; nan comes last.

    The best cell leads group 1, which holds every cell whose p_holm against it is at least 1 - level; the best of the
    rest leads the next group, and so on. Members of a group need not be equal to each other, and a cell may stand
    above one of an earlier group. The interval is that of `resampled_interval`. InputError as in `compare_cells`.
    """
    bench, measured = _measure(cells, task, metric, resamples, seed, level)
    apart = {frozenset((pair.first, pair.second)) for pair in _compare(bench, measured) if pair.p_holm < 1 - level}
    sign = 1 if metric in _LESS_IS_BETTER else -1
    order = sorted(cells, key=lambda name: (math.isnan(measured[name].score), sign * measured[name].score))
    groups: dict[str, int] = {}
    while rest := [name for name in order if name not in groups]:
        number = max(groups.values(), default=0) + 1
        groups |= {name: number for name in rest if frozenset((rest[0], name)) not in apart}
    return [Standing(name, _interval(bench, measured[name]), groups[name]) for name in order]


def mcnemar(first_right: npt.ArrayLike, second_right: npt.ArrayLike, patients: Indices) -> tuple[int, int, float]:
    """McNemar's b, c and the exact two-sided p of b = c: 1 where the two never differ.

    b: patients of whom the first decides more images rightly, c: of whom the second does. With one image each these are
    the discordant images; several images of a patient as independent trials would reject too often. Under the null
    hypothesis the exact test rejects less often than its level.
    """
    apart = np.asarray(first_right, dtype=np.int64) - np.asarray(second_right, dtype=np.int64)
    lead = np.bincount(patients, apart)
    b, c = int((lead > 0).sum()), int((lead < 0).sum())
    return b, c, float(binomtest(b, b + c).pvalue) if b + c else 1.0


def _measure(
    cells: Mapping[str, Sequence[pd.DataFrame]], task: Task, metric: str, resamples: int, seed: int, level: float
) -> tuple[_Bench, dict[str, _Cell]]:
    tables = _aligned(cells, task)
    first = next(iter(tables.values()))[0]
    truth, prob = truth_and_prob(first, task)
    bench = _Bench(task, metric, truth, patient_codes(first), level)
    once = np.ones((1, len(truth)), dtype=np.uint8)
    known = weighted_scores(truth, prob, decide(prob, task), task, once)
    del known["ece"]  # as in score_intervals: no resampling knows its bias
    if metric not in known:
        raise InputError(f"metric {metric!r}: no score of task {task.name}; choose one of {', '.join(known)}")
    weights = np.concatenate([once, patient_weights(truth, bench.patients, resamples, seed)])
    return bench, {name: _measured(bench, weights, of_cell) for name, of_cell in tables.items()}


def _measured(bench: _Bench, weights: npt.NDArray[np.uint8], tables: Sequence[pd.DataFrame]) -> _Cell:
    task, truth, metric = bench.task, bench.truth, bench.metric
    prob = np.stack([truth_and_prob(table, task)[1] for table in tables])
    decided = [decide(each, task) for each in prob]
    scores = [
        weighted_scores(truth, each, chosen, task, weights, only=[metric])[metric]
        for each, chosen in zip(prob, decided, strict=True)
    ]
    drawn, mean = np.mean(scores, axis=0), prob.mean(axis=0)
    covid = task.classes.index(POSITIVE)
    return _Cell(
        prob=prob,
        score=float(drawn[0]),
        drawn=drawn[1:],
        n_patients=min(involved_patients(metric, task, truth, chosen, bench.patients) for chosen in decided),
        placed=placements(truth == covid, mean[:, covid], bench.patients),
        right=decide(mean, task) == truth,
    )


def _interval(bench: _Bench, cell: _Cell) -> Interval:
    return resampled_interval(
        bench.metric,
        bench.task,
        cell.score,
        cell.drawn,
        n_patients=cell.n_patients,
        df=bench.df,
        level=bench.level,
    )


def _compare(bench: _Bench, cells: Mapping[str, _Cell]) -> list[Comparison]:
    pairs = []
    for first, second in combinations(cells, 2):
        a, b = cells[first], cells[second]
        difference, p = _difference(bench, a, b)
        delong_p = placement_test(a.placed, b.placed)[2]
        counts = mcnemar(a.right, b.right, bench.patients)
        pairs.append(Comparison(first, second, bench.metric, difference, p, p, delong_p, *counts))
    tested = [i for i, pair in enumerate(pairs) if not math.isnan(pair.p)]
    if len(tested) > 1:  # for one alone Holm changes nothing, and the call collects garbage, 0.1 to 0.3 s
        corrected = multipletests([pairs[i].p for i in tested], method="holm")[1]
        for i, p_holm in zip(tested, corrected, strict=True):
            pairs[i] = pairs[i]._replace(p_holm=float(p_holm))
    return pairs


def _difference(bench: _Bench, a: _Cell, b: _Cell) -> tuple[Interval, float]:
    """The paired difference and its two-sided p."""
    value = a.score - b.score
    if math.isnan(value):
        return UNDEFINED, math.nan
    if np.array_equal(a.prob, b.prob):
        return Interval(0.0, 0.0, 0.0, "identical"), 1.0
    drawn, n_patients = a.drawn - b.drawn, min(a.n_patients, b.n_patients)
    interval = paired_difference(
        bench.metric, bench.task, value, drawn, n_patients=n_patients, df=bench.df, level=bench.level
    )
    error = standard_error(drawn, n_patients)
    if not error > 0:
        low, high = score_range(bench.metric, bench.task)
        return interval, p_without_spread(value, n_patients, high - low)
    return interval, float(2 * t.sf(abs(value) / error, bench.df))


def _aligned(cells: Mapping[str, Sequence[pd.DataFrame]], task: Task) -> dict[str, list[pd.DataFrame]]:
    """The tables of each cell with their rows in the order of the image ids, all found to hold the same images."""
    aligned: dict[str, list[pd.DataFrame]] = {}
    kept: tuple[str, pd.DataFrame] | None = None
    for name, tables in cells.items():
        if not tables:
            raise InputError(f"cell {name!r} has no predictions table; give it one per training seed")
        for table in tables:
            try:
                truth_and_prob(table, task)
            except InputError as error:
                raise InputError(f"cell {name!r}: {error}") from error
            ordered = table.sort_values("image_id", ignore_index=True)
            kept = kept or (name, ordered)
            _refuse_other_images(*kept, name, ordered)
            aligned.setdefault(name, []).append(ordered)
    if not aligned:
        raise InputError("no cell to compare; give at least one with its predictions tables")
    return aligned


def _refuse_other_images(first: str, one: pd.DataFrame, second: str, other: pd.DataFrame) -> None:
    pair = f"cells {first!r} and {second!r}"
    strangers = sorted(set(one["image_id"]) ^ set(other["image_id"]))
    if strangers:
        raise InputError(
            f"{pair} were not scored on the same images: {listed(strangers, 3)} are in one of them alone; "
            "compare cells with the same test images"
        )
    # The first row of the same patient: the same grouping of images, whatever the patients are called.
    found = [np.unique(patient_codes(table), return_index=True, return_inverse=True) for table in (one, other)]
    grouped = [first_rows[codes] for _, first_rows, codes in found]
    labelled = [table["label"].to_numpy() for table in (one, other)]
    for column, (ours, theirs) in {"label": labelled, "patient": grouped}.items():
        differ = one["image_id"][ours != theirs].tolist()
        if differ:
            raise InputError(
                f"{pair} name another {column} for {listed(differ, 3)}; compare cells trained on one manifest"
            )
