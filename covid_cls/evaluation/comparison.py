"""Scores of configurations on the same test images, their paired comparisons and their ranking.

A configuration is given as predictions tables of the same images, one per training seed, with all folds pooled into one
table. Its score is the mean over seeds. All configurations share the same patient resamples, so differences are paired:
images that are difficult for both cancel. Intervals and p cover the sampling of test patients, not of training seeds.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest, t
from statsmodels.stats.multitest import multipletests

from covid_cls.errors import InputError, listed
from covid_cls.evaluation.delong import delong_test, placements
from covid_cls.evaluation.intervals import (
    UNDEFINED,
    Interval,
    bootstrap_interval,
    degrees_of_freedom,
    difference_interval,
    involved_patients,
    p_without_spread,
    patient_codes,
    patient_weights,
    score_range,
    standard_error,
)
from covid_cls.evaluation.metrics import LOWER_IS_BETTER, Floats, Indices, decide, weighted_scores
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.tasks import POSITIVE, Task


class ConfigurationScores(NamedTuple):
    """The scores of a configuration by flat name, such as "covid.f1", on all test images and in each resample.

    Attributes:
        task: The task.
        per_seed: Each score of each seed's table, shape (S,).
        replicates: The same in each resample, shape (S, B).
        n_patients: For each score, the patients that it is based on (`intervals.involved_patients`).
        df: Degrees of freedom of a standard error.
        truth: Class indices of the images, shape (N,).
        patients: Patient codes of the images, shape (N,).
        prob: Probabilities of each seed's table, shape (S, N, K).
    """

    task: Task
    per_seed: dict[str, Floats]
    replicates: dict[str, Floats]
    n_patients: dict[str, int]
    df: int
    truth: Indices
    patients: Indices
    prob: Floats

    def value(self, name: str) -> float:
        """Return the mean score over seeds."""
        return float(self.per_seed[name].mean())

    def mean_replicates(self, name: str) -> Floats:
        """Return the mean score over seeds in each resample, shape (B,)."""
        return np.asarray(self.replicates[name].mean(axis=0), dtype=np.float64)


class Comparison(NamedTuple):
    """A comparison of two configurations; differences are first - second.

    Attributes:
        first: Name of a configuration.
        second: Name of another one.
        metric: Flat name of the compared score.
        difference: Difference of the score with its paired bootstrap interval.
        p: Two-sided p of the difference.
        p_holm: p corrected for the number of compared pairs (Holm 1979).
        delong_p: Two-sided p of the AUROC of covid, clustered by patient (`delong.delong_test`).
        mcnemar_b: Patients whom the first one decides better.
        mcnemar_c: Patients whom the second one decides better.
        mcnemar_p: Two-sided p of `mcnemar`. It and delong_p use the mean probabilities over seeds; they are not
            corrected.
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


class RankedConfiguration(NamedTuple):
    """A configuration's place in a ranking.

    Attributes:
        name: Name of the configuration.
        interval: Its score with its interval.
        group: Number of its group, 1 for the best; see `leaderboard`.
    """

    name: str
    interval: Interval
    group: int


def score_configurations(
    configurations: Mapping[str, Sequence[pd.DataFrame]], task: Task, *, resamples: int = 2000, seed: int = 0
) -> dict[str, ConfigurationScores]:
    """Score configurations on the same patient resamples, for all functions below that compare them.

    Args:
        configurations: By name, one predictions table per training seed; the rows may be in any order.
        task: Task of the predictions.
        resamples: Number of patient resamples.
        seed: Random seed of the resamples.

    Raises:
        InputError: If there are no tables, a table is not valid, or two tables differ in their images, labels or
            patients.
    """
    aligned = _aligned(configurations, task)
    first = next(iter(aligned.values()))[0]
    truth, _ = truth_and_prob(first, task)
    weights = patient_weights(truth, patient_codes(first), resamples, seed)
    return {name: score_seeds(tables, task, weights) for name, tables in aligned.items()}


def score_seeds(
    tables: Sequence[pd.DataFrame],
    task: Task,
    weights: npt.NDArray[np.integer],
    only: Collection[str] | None = None,
) -> ConfigurationScores:
    """Score the tables of one configuration.

    Args:
        tables: One predictions table per training seed, with the same images in the same order.
        task: Task of the predictions.
        weights: How often each image counts in each resample, shape (B, N), in the order of the tables' rows.
        only: Flat names of the scores to compute, None for all.
    """
    patients = patient_codes(tables[0])
    found = [truth_and_prob(table, task) for table in tables]
    truth, prob = found[0][0], np.stack([each for _, each in found])
    decided = [decide(each, task) for each in prob]
    # The first row gives the scores of the tables themselves.
    rows = np.concatenate([np.ones_like(weights[:1]), weights])
    scores = [weighted_scores(truth, p, d, task, rows, only) for p, d in zip(prob, decided, strict=True)]
    names = list(scores[0])
    return ConfigurationScores(
        task,
        {name: np.array([each[name][0] for each in scores]) for name in names},
        {name: np.stack([each[name][1:] for each in scores]) for name in names},
        {name: min(involved_patients(name, task, truth, each, patients) for each in decided) for name in names},
        degrees_of_freedom(truth, patients),
        truth,
        patients,
        prob,
    )


def mean_score(scores: ConfigurationScores, name: str, level: float = 0.95) -> Interval:
    """Return the mean of a score over seeds, with its `bootstrap_interval`."""
    value, replicates = scores.value(name), scores.mean_replicates(name)
    n_patients = scores.n_patients[name]
    return bootstrap_interval(name, scores.task, value, replicates, n_patients=n_patients, df=scores.df, level=level)


def mean_difference(
    pairs: Sequence[tuple[ConfigurationScores, ConfigurationScores]], name: str, level: float = 0.95
) -> Interval:
    """Return the difference first - second of a score, averaged over pairs, with its `difference_interval`.

    All configurations must have been scored on the same resamples.
    """
    value, replicates, n_patients = _difference(pairs, name)
    task, df = pairs[0][0].task, pairs[0][0].df
    return difference_interval(name, task, value, replicates, n_patients=n_patients, df=df, level=level)


def paired_test(
    first: ConfigurationScores, second: ConfigurationScores, name: str, level: float = 0.95
) -> tuple[Interval, float]:
    """Return the difference first - second of a score with its interval, and its two-sided p.

    The interval is difference ± t x standard error of the paired bootstrap, and p comes from the same t;
    docs/simulations.md has its type I error. Configurations with the same probabilities have p = 1 and the interval
    "identical", the only one of zero width. If no resample differs though the probabilities do, as for two models that
    make no error, see `interval_without_spread` and `p_without_spread`.
    """
    value, replicates, n_patients = _difference([(first, second)], name)
    # A model that never calls covid has no PPV, for example.
    if math.isnan(value):
        return UNDEFINED, math.nan
    if np.array_equal(first.prob, second.prob):
        return Interval(0.0, 0.0, 0.0, "identical"), 1.0
    task, df = first.task, first.df
    interval = difference_interval(name, task, value, replicates, n_patients=n_patients, df=df, level=level)
    error = standard_error(replicates, n_patients)
    if not error > 0:
        low, high = score_range(name, task)
        return interval, p_without_spread(value, n_patients, high - low)
    return interval, float(2 * t.sf(abs(value) / error, df))


def compare_configurations(
    configurations: Mapping[str, ConfigurationScores], metric: str = "balanced_accuracy", level: float = 0.95
) -> list[Comparison]:
    """Compare every pair of configurations, in their order.

    Args:
        configurations: Scores by name, on the same resamples.
        metric: Flat name of the score to compare.
        level: Confidence level of the intervals, between 0 and 1.

    Raises:
        InputError: If `metric` is unknown or has no interval.
    """
    placed, correct = {}, {}
    for name, scores in configurations.items():
        _check_metric(metric, scores)
        # DeLong and McNemar need one prediction per image, so they take the mean over seeds.
        mean = scores.prob.mean(axis=0)
        covid = scores.task.classes.index(POSITIVE)
        placed[name] = placements(scores.truth == covid, mean[:, covid], scores.patients)
        correct[name] = decide(mean, scores.task) == scores.truth
    pairs = []
    for first, second in combinations(configurations, 2):
        difference, p = paired_test(configurations[first], configurations[second], metric, level)
        delong_p = delong_test(placed[first], placed[second])[2]
        counts = mcnemar(correct[first], correct[second], configurations[first].patients)
        pairs.append(Comparison(first, second, metric, difference, p, p, delong_p, *counts))
    # An undefined score is not tested, so Holm's correction does not count it.
    tested = [i for i, pair in enumerate(pairs) if not math.isnan(pair.p)]
    # One pair needs no correction, and `multipletests` takes 0.1 to 0.3 s because it collects garbage.
    if len(tested) > 1:
        corrected = multipletests([pairs[i].p for i in tested], method="holm")[1]
        for i, p_holm in zip(tested, corrected, strict=True):
            pairs[i] = pairs[i]._replace(p_holm=float(p_holm))
    return pairs


def leaderboard(
    configurations: Mapping[str, ConfigurationScores],
    comparisons: Sequence[Comparison],
    metric: str = "balanced_accuracy",
    level: float = 0.95,
) -> list[RankedConfiguration]:
    """Rank configurations from the best score to the worst, in groups without significant difference; nan comes last.

    The best configuration leads group 1, which contains every one whose p_holm against it is at least 1 - level. The
    best of the rest leads the next group, and so on. Members of a group may differ from each other, and one of them may
    rank above a configuration of an earlier group.

    Args:
        configurations: Scores by name, on the same resamples.
        comparisons: The result of `compare_configurations` for the same configurations and metric.
        metric: Flat name of the score.
        level: Confidence level of the intervals and of the groups.
    """
    # Pairs without order, because the comparisons may name the better one second.
    different = {frozenset((pair.first, pair.second)) for pair in comparisons if pair.p_holm < 1 - level}
    values = {name: scores.value(metric) for name, scores in configurations.items()}
    sign = 1 if metric in LOWER_IS_BETTER else -1
    order = sorted(values, key=lambda name: (math.isnan(values[name]), sign * values[name]))
    groups: dict[str, int] = {}
    while rest := [name for name in order if name not in groups]:
        number = max(groups.values(), default=0) + 1
        groups |= {name: number for name in rest if frozenset((rest[0], name)) not in different}
    return [RankedConfiguration(name, mean_score(configurations[name], metric, level), groups[name]) for name in order]


def mcnemar(first_correct: npt.ArrayLike, second_correct: npt.ArrayLike, patients: Indices) -> tuple[int, int, float]:
    """Return McNemar's b and c (1947) and the exact two-sided p of b = c, counted by patient.

    b is the number of patients of whom the first decides more images correctly, c of whom the second does. With one
    image per patient they are the discordant images. Under the null hypothesis the exact test rejects less often than
    its level. p = 1 if the two never differ.

    Args:
        first_correct: 1 or True for each image that the first decides correctly, shape (N,).
        second_correct: The same for the second.
        patients: See `intervals.patient_codes`.
    """
    # Several images of a patient, taken as independent trials, would reject too often.
    apart = np.asarray(first_correct, dtype=np.int64) - np.asarray(second_correct, dtype=np.int64)
    lead = np.bincount(patients, apart)
    b, c = int((lead > 0).sum()), int((lead < 0).sum())
    return b, c, float(binomtest(b, b + c).pvalue) if b + c else 1.0


def _difference(
    pairs: Sequence[tuple[ConfigurationScores, ConfigurationScores]], name: str
) -> tuple[float, Floats, int]:
    """Return the mean difference, its replicates (B,), and the number of patients that it is based on."""
    value = float(np.mean([first.value(name) - second.value(name) for first, second in pairs]))
    replicates = np.mean([a.mean_replicates(name) - b.mean_replicates(name) for a, b in pairs], axis=0)
    return value, replicates, min(scores.n_patients[name] for pair in pairs for scores in pair)


def _check_metric(metric: str, scores: ConfigurationScores) -> None:
    # ECE is left out because its bias is unknown, as in `score_intervals`.
    known = [name for name in scores.per_seed if name != "ece"]
    if metric not in known:
        raise InputError(f"metric {metric!r}: unknown for task {scores.task.name}. Use one of {', '.join(known)}.")


def _aligned(configurations: Mapping[str, Sequence[pd.DataFrame]], task: Task) -> dict[str, list[pd.DataFrame]]:
    """Check that all tables have the same images, and return them with their rows sorted by image_id."""
    aligned: dict[str, list[pd.DataFrame]] = {}
    reference: tuple[str, pd.DataFrame] | None = None
    for name, tables in configurations.items():
        if not tables:
            raise InputError(f"configuration {name!r} has no predictions table. Give it one per training seed.")
        for table in tables:
            try:
                truth_and_prob(table, task)
            except InputError as error:
                raise InputError(f"configuration {name!r}: {error}") from error
            # The weights of resamples are by row, so all tables need the same order.
            ordered = table.sort_values("image_id", ignore_index=True)
            reference = reference or (name, ordered)
            _check_same_images(*reference, name, ordered)
            aligned.setdefault(name, []).append(ordered)
    if not aligned:
        raise InputError("there is no configuration to compare. Give at least one with its predictions tables.")
    return aligned


def _check_same_images(first: str, one: pd.DataFrame, second: str, other: pd.DataFrame) -> None:
    pair = f"configurations {first!r} and {second!r}"
    unshared = sorted(set(one["image_id"]) ^ set(other["image_id"]))
    if unshared:
        raise InputError(
            f"{pair} were not scored on the same images: {listed(unshared, 3)} are in only one of them. "
            "Compare configurations with the same test images."
        )
    # Patients are compared by the first row of each, so that tables may use different names for the same patients.
    found = [np.unique(patient_codes(table), return_index=True, return_inverse=True) for table in (one, other)]
    grouped = [first_rows[codes] for _, first_rows, codes in found]
    labelled = [table["label"].to_numpy() for table in (one, other)]
    for column, (ours, theirs) in {"label": labelled, "patient": grouped}.items():
        differ = one["image_id"][ours != theirs].tolist()
        if differ:
            raise InputError(
                f"{pair} have a different {column} for {listed(differ, 3)}. Compare configurations of one manifest."
            )
