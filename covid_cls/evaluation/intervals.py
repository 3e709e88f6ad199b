"""Confidence intervals of scores from a bootstrap over patients."""

import math
import warnings
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest, t

from covid_cls.evaluation.metrics import Floats, Indices, decide, positives, weighted_scores
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.tasks import POSITIVE, Task

_PROPORTIONS = {"accuracy", "sensitivity", "specificity", "ppv", "npv"}
# The largest negative log likelihood: `metrics` clips probabilities at the machine epsilon.
_MAX_NLL = -math.log(np.finfo(np.float64).eps)


class Interval(NamedTuple):
    """A value with its confidence interval.

    Attributes:
        value: The score, or a difference of scores.
        low: Lower end of the interval.
        high: Upper end of the interval.
        method: How the interval was computed; "undefined" if the numbers are nan.
    """

    value: float
    low: float
    high: float
    method: str


UNDEFINED = Interval(math.nan, math.nan, math.nan, "undefined")


def score_intervals(
    table: pd.DataFrame,
    task: Task,
    *,
    decided: Indices | None = None,
    weights: npt.NDArray[np.integer] | None = None,
    only: Collection[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Return each score of a predictions table with its `bootstrap_interval`, by flat name such as "covid.auroc".

    Args:
        table: The predictions.
        task: Their task.
        decided: Class indices (N,) to use instead of `metrics.decide`, such as those of another threshold.
        weights: Patient resamples of the table, drawn earlier; None to draw them here.
        only: Names of the scores to return, None for all.
        resamples: Number of resamples to draw.
        seed: Random seed of the resamples.
        level: Confidence level, between 0 and 1.

    Raises:
        InputError: As in `truth_and_prob`.
    """
    truth, prob = truth_and_prob(table, task)
    decided = decide(prob, task) if decided is None else decided
    patients = patient_codes(table)
    if weights is None:
        weights = patient_weights(truth, patients, resamples, seed)
    values = weighted_scores(truth, prob, decided, task, np.ones((1, len(truth)), dtype=np.uint8), only)
    # ECE is biased upward and resampling adds the same bias again, so that its replicates can all exceed the value.
    values.pop("ece", None)
    replicates = weighted_scores(truth, prob, decided, task, weights, only)
    df = degrees_of_freedom(truth, patients)
    intervals = {}
    for name, (value,) in values.items():
        n_patients = involved_patients(name, task, truth, decided, patients)
        intervals[name] = bootstrap_interval(
            name, task, float(value), replicates[name], n_patients=n_patients, df=df, level=level
        )
    return intervals


def proportion_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return successes / n with Wilson's interval (1927), or Clopper and Pearson's (1934) if the share is 0 or 1.

    The n trials must be independent, which several images of one patient are not. nan for n = 0.
    """
    if not n:
        return UNDEFINED
    name, method = ("Clopper-Pearson", "exact") if successes in (0, n) else ("Wilson", "wilson")
    low, high = binomtest(successes, n).proportion_ci(level, method)
    return Interval(successes / n, float(low), float(high), name)


def bootstrap_interval(
    name: str, task: Task, value: float, replicates: Floats, *, n_patients: int, df: int, level: float = 0.95
) -> Interval:
    """Return the interval of a score, from its standard error over patient resamples.

    A proportion has Wilson's interval for the number of independent trials that have the same standard error, with a
    quantile of t (Korn and Graubard 1998). Another score has value ± t x standard error on the logit scale of its
    range, which keeps the ends in the range. If the resamples do not differ or only one patient is involved, see
    `interval_without_spread`. The interval never has zero width.

    Args:
        name: Flat name of the score.
        task: Task of the score.
        value: The score of all images.
        replicates: The score of each resample, shape (B,); nan is left out.
        n_patients: See `involved_patients`.
        df: See `degrees_of_freedom`.
        level: Confidence level, between 0 and 1.
    """
    if math.isnan(value):
        return UNDEFINED
    low, high = score_range(name, task)
    error = standard_error(replicates, n_patients)
    if not error > 0:
        return interval_without_spread(value, n_patients, low, high, level)
    # The share is not 0 or 1: a score at an end of its range is the same in every resample, so its error is 0.
    share, error = (value - low) / (high - low), error / (high - low)
    # With few patients the standard error is uncertain too, so a normal quantile would be too small.
    quantile = float(t.ppf((1 + level) / 2, df))
    if name.rpartition(".")[2] in _PROPORTIONS:
        ends, method = _wilson(share, error, quantile), "patient bootstrap, Wilson"
    else:
        centre, reach = math.log(share / (1 - share)), quantile * error / (share * (1 - share))
        ends = [1 / (1 + math.exp(-(centre + side * reach))) for side in (-1, 1)]
        method = "patient bootstrap, logit"
    return Interval(value, low + (high - low) * ends[0], low + (high - low) * ends[1], method)


def difference_interval(
    name: str, task: Task, value: float, replicates: Floats, *, n_patients: int, df: int, level: float = 0.95
) -> Interval:
    """Return the interval of a paired difference of scores: value ± t x standard error over patient resamples.

    It is clipped to the possible differences. The arguments are those of `bootstrap_interval`, for the difference.
    """
    if math.isnan(value):
        return UNDEFINED
    low, high = score_range(name, task)
    largest, error = high - low, standard_error(replicates, n_patients)
    if not error > 0:
        return interval_without_spread(value, n_patients, -largest, largest, level)
    reach = float(t.ppf((1 + level) / 2, df)) * error
    return Interval(value, max(-largest, value - reach), min(largest, value + reach), "paired patient bootstrap")


def interval_without_spread(value: float, n_patients: int, low: float, high: float, level: float = 0.95) -> Interval:
    """Return the interval of a mean if n independent groups of patients all showed the same value.

    With confidence `level`, a group shows another value with a probability of at most q = 1 - (alpha / 2)^(1 / n), the
    bound of Clopper and Pearson (1934) for 0 of n. Such a value is in [low, high], so the mean is between
    value - q (value - low) and value + q (high - value). At an end of the range this is Clopper and Pearson's interval.

    Args:
        value: The common value, in [low, high].
        n_patients: Number of groups n. For an AUROC of 1, a group is one patient of each class, so that n pairs are all
            in the right order; for a score over all classes it is also one patient of each.
        low: Smallest possible value.
        high: Largest possible value.
        level: Confidence level, between 0 and 1.
    """
    q = 1 - ((1 - level) / 2) ** (1 / n_patients)
    method = "Clopper-Pearson" if value in (low, high) else "exact, no spread"
    return Interval(value, value - q * (value - low), value + q * (high - value), method)


def p_without_spread(difference: float, n_patients: int, largest: float) -> float:
    """Return the two-sided p of a mean difference within ±largest if n independent groups all showed it.

    It is 1 - level of the widest `interval_without_spread` that does not contain 0.
    """
    return float(min(1.0, 2 * (1 + abs(difference) / largest) ** -n_patients))


def standard_error(replicates: Floats, n_patients: int) -> float:
    """Return the bootstrap standard error, 0 if the replicates are equal up to rounding, nan for one patient."""
    defined = replicates[np.isfinite(replicates)]
    if n_patients < 2 or len(defined) < 2:
        return math.nan
    spread = float(defined.std(ddof=1))
    # Resamples of n patients have (n - 1) / n of the variance of samples from the population.
    return spread * math.sqrt(n_patients / (n_patients - 1)) if spread > 1e-12 else 0.0


def score_range(name: str, task: Task) -> tuple[float, float]:
    """Return the smallest and the largest possible value of a score."""
    if name == "mcc":
        return -1.0, 1.0
    if name == "nll":
        return 0.0, _MAX_NLL
    return 0.0, 2.0 if name == "brier" and len(task.classes) > 2 and not task.multilabel else 1.0


def involved_patients(name: str, task: Task, truth: Indices, decided: Indices, patients: Indices) -> int:
    """Return the number of patients in the smallest group of images that a score needs."""
    label, _, score = name.rpartition(".")
    k = task.classes.index(label or POSITIVE)
    target = positives(truth, task)[:, k] == 1
    # A score can be no more certain than its smallest group: sensitivity depends on the images of one class only,
    # an AUROC on pairs of a positive and a negative. Scores over all classes need images of each.
    groups = {
        "sensitivity": [truth == k],
        "f1": [truth == k],
        "specificity": [truth != k],
        "ppv": [decided == k],
        "npv": [decided != k],
        "average_precision": [target],
        "covid_f1_at_half": [target],
        "auroc": [target, ~target],
        **{name: [np.ones(len(truth), dtype=bool)] for name in ("accuracy", "nll", "brier", "label_accuracy")},
    }.get(score, [truth == each for each in np.unique(truth)])
    return min(len(np.unique(patients[group])) for group in groups)


def degrees_of_freedom(truth: Indices, patients: Indices) -> int:
    """Return the patients less the classes, at least 1, as survey samples count clusters less strata."""
    return max(1, len(np.unique(patients)) - len(np.unique(truth)))


def patient_codes(table: pd.DataFrame) -> Indices:
    """Return the patient of each row as an integer from 0 without gaps, shape (N,).

    An image without a patient_id counts as a separate patient.
    """
    patient = table["patient_id"].astype(object)
    # The prefixes keep an image_id from being taken for a patient of the same name.
    unknown = (patient.isna() | (patient == "")).to_numpy(dtype=bool)
    keys = ("patient:" + patient.astype(str)).where(~unknown, "image:" + table["image_id"].astype(str))
    # Sorted by id, so that a seed draws the same patients whatever the order of the rows.
    return np.asarray(pd.factorize(keys, sort=True)[0], dtype=np.int64)


def patient_weights(truth: Indices, patients: Indices, resamples: int, seed: int) -> npt.NDArray[np.uint8]:
    """Draw patient resamples: how often each image counts in each, shape (resamples, N).

    Patients are drawn with replacement within each class, as many as it has (Davison and Hinkley 1997, 3.8), and each
    brings all its images. A patient with images of several classes belongs to the class with the fewest patients. A
    class with a single patient is the same in every resample, which a UserWarning reports.

    Args:
        truth: Class indices (N,).
        patients: See `patient_codes`.
        resamples: Number of resamples.
        seed: Random seed.
    """
    # Drawing within classes keeps every class in every resample. Without one, scores would be undefined.
    rng = np.random.default_rng(seed)
    strata = _strata(truth, patients)
    # uint8 saves memory: 2,000 resamples of 10,000 images take 20 MB.
    drawn = np.empty((resamples, len(strata)), dtype=np.uint8)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        drawn[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    return drawn[:, patients]


def _strata(truth: Indices, patients: Indices) -> Indices:
    """Return the stratum of each patient."""
    # One row per patient and class of that patient.
    pairs = np.unique(np.column_stack([patients, truth]), axis=0)
    # The rank of each class by its number of patients, 0 for the fewest. The inner argsort sorts, the outer one ranks.
    rarity = np.argsort(np.argsort(np.bincount(pairs[:, 1]), kind="stable"))
    strata = np.full(patients.max() + 1, len(rarity))
    np.minimum.at(strata, pairs[:, 0], rarity[pairs[:, 1]])
    # A patient that is alone in its stratum would be in every resample once, so it joins a patient with the same class.
    for lone in np.flatnonzero(np.bincount(strata)[strata] == 1):
        classes = pairs[pairs[:, 0] == lone, 1]
        others = pairs[np.isin(pairs[:, 1], classes) & (pairs[:, 0] != lone), 0]
        if len(others):
            strata[lone] = strata[others[0]]
        else:
            warnings.warn(
                f"class index {classes[0]} has a single patient, who is in every resample once: the intervals do not "
                "show how much other patients of that class would differ",
                UserWarning,
                stacklevel=3,
            )
    return strata


def _wilson(share: float, error: float, quantile: float) -> list[float]:
    # z² / n of the binomial distribution with this standard error.
    per_trial = quantile**2 * error**2 / (share * (1 - share))
    reach = quantile * math.sqrt(error**2 + per_trial**2 / (4 * quantile**2))
    return [(share + per_trial / 2 + side * reach) / (1 + per_trial) for side in (-1, 1)]
