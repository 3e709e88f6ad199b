"""Confidence intervals of scores, by patient: what other patients like these could have shown for the same model.

They say nothing of another training seed or another hospital. The methods were chosen by how often they cover a known
truth: docs/simulations.md has the counts.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest, t

from covid_cls.evaluation.metrics import Floats, Indices, decide, positives
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.evaluation.resampling import patient_codes, patient_weights, weighted_scores
from covid_cls.labels import POSITIVE, Task

_PROPORTIONS = {"accuracy", "sensitivity", "specificity", "ppv", "npv"}
_MOST_NLL = -math.log(np.finfo(np.float64).eps)  # metrics clip probabilities there


class Interval(NamedTuple):
    """A figure, the ends of its interval and how they were found. All nan and "undefined" where there is no figure."""

    value: float
    low: float
    high: float
    method: str


UNDEFINED = Interval(math.nan, math.nan, math.nan, "undefined")


def proportion_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """The share successes / n with Wilson's interval, or Clopper and Pearson's exact one where it is 0 or 1.

    nan for n = 0. The n trials are independent: images of one patient are not.
    """
    if not n:
        return UNDEFINED
    name, method = ("Clopper-Pearson", "exact") if successes in (0, n) else ("Wilson", "wilson")
    low, high = binomtest(successes, n).proportion_ci(level, method)
    return Interval(successes / n, float(low), float(high), name)


def score_intervals(
    table: pd.DataFrame,
    task: Task,
    *,
    decided: Indices | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Every score of a predictions table by its flat name ("accuracy", "covid.auroc"), with its `resampled_interval`.

    decided: class indices (N,) in place of `metrics.decide`, for another threshold. The values are those of `metrics`.
    ece has no entry: it is biased upward, and each resample adds as much bias again, so that its percentiles can lie
    above the value itself; read it beside its null value instead. InputError as in `truth_and_prob`.
    """
    truth, prob = truth_and_prob(table, task)
    decided = decide(prob, task) if decided is None else decided
    patients = patient_codes(table)
    once = np.ones((1, len(truth)), dtype=np.uint8)
    values = weighted_scores(truth, prob, decided, task, once)
    weights = patient_weights(truth, patients, resamples, seed)
    resampled = weighted_scores(truth, prob, decided, task, weights)
    df = degrees_of_freedom(truth, patients)
    return {
        name: resampled_interval(
            name,
            task,
            float(value[0]),
            resampled[name],
            n_patients=involved_patients(name, task, truth, decided, patients),
            df=df,
            level=level,
        )
        for name, value in values.items()
        if name != "ece"
    }


def resampled_interval(
    name: str, task: Task, value: float, resampled: Floats, *, n_patients: int, df: int, level: float = 0.95
) -> Interval:
    """`value` of the score called `name` with its interval, from the same score in each patient resample, (B,).

    n_patients: of `involved_patients`; df: of `degrees_of_freedom`. nan resamples are left out.

    - Proportions: Wilson's interval for as many independent trials as have the bootstrap's standard error, with a
      quantile of t (Korn and Graubard 1998): "patient bootstrap, Wilson".
    - Other scores: value ± t x the bootstrap's standard error on the logit scale of the score's range, which keeps the
      ends inside and lets them lie unevenly: "patient bootstrap, logit".
    - Where no resample differs, or a single patient is involved, a standard error would be 0: `without_spread`.

    No interval has zero width.
    """
    if math.isnan(value):
        return UNDEFINED
    low, high = score_range(name, task)
    error = standard_error(resampled, n_patients)
    if not error > 0:
        return without_spread(value, n_patients, low, high, level)
    share, spread = (value - low) / (high - low), error / (high - low)
    quantile = float(t.ppf((1 + level) / 2, df))
    if name.rpartition(".")[2] in _PROPORTIONS:
        ends, method = _wilson(share, spread, quantile), "patient bootstrap, Wilson"
    else:
        centre, reach = math.log(share / (1 - share)), quantile * spread / (share * (1 - share))
        ends = [1 / (1 + math.exp(-(centre + side * reach))) for side in (-1, 1)]
        method = "patient bootstrap, logit"
    return Interval(value, low + (high - low) * ends[0], low + (high - low) * ends[1], method)


def paired_difference(
    name: str, task: Task, value: float, resampled: Floats, *, n_patients: int, df: int, level: float = 0.95
) -> Interval:
    """`value`, a difference of scores called `name`, with its interval from the same difference per resample, (B,).

    value ± t x the bootstrap's standard error, cut to what such a difference can be: "paired patient bootstrap". Where
    no resample differs, `without_spread`.
    """
    if math.isnan(value):
        return UNDEFINED
    low, high = score_range(name, task)
    most, error = high - low, standard_error(resampled, n_patients)
    if not error > 0:
        return without_spread(value, n_patients, -most, most, level)
    reach = float(t.ppf((1 + level) / 2, df)) * error
    return Interval(value, max(-most, value - reach), min(most, value + reach), "paired patient bootstrap")


def without_spread(value: float, n_patients: int, low: float, high: float, level: float = 0.95) -> Interval:
    """The interval of a mean within [low, high] of which n independent groups of patients all showed the same `value`.

    For a group to differ has a probability of at most q = 1 - (alpha / 2)^(1 / n) at this level, the Clopper-Pearson
    bound for 0 of n, and a group that differs lies within the range: value - q (value - low) to
    value + q (high - value). At an end of the range this is Clopper and Pearson's interval for n of n. For an AUROC of
    1, pair each patient of the smaller class with one of the other: n independent pairs, all in the right order, and
    the AUROC is the probability that a pair is. A score over all classes takes a patient of each.
    """
    q = 1 - ((1 - level) / 2) ** (1 / n_patients)
    method = "Clopper-Pearson" if value in (low, high) else "exact, no spread"
    return Interval(value, value - q * (value - low), value + q * (high - value), method)


def standard_error(resampled: Floats, n_patients: int) -> float:
    """The bootstrap's standard error times sqrt(n / (n - 1)), which n drawn of n patients fall short of; nan for n = 1.

    0 where the resamples agree to rounding.
    """
    drawn = resampled[np.isfinite(resampled)]
    if n_patients < 2 or len(drawn) < 2:
        return math.nan
    spread = float(drawn.std(ddof=1))
    return spread * math.sqrt(n_patients / (n_patients - 1)) if spread > 1e-12 else 0.0


def score_range(name: str, task: Task) -> tuple[float, float]:
    """The least and the most that the score called `name` can be."""
    two_sided = name == "brier" and len(task.classes) > 2 and not task.multilabel
    return {"mcc": (-1.0, 1.0), "nll": (0.0, _MOST_NLL)}.get(name, (0.0, 2.0 if two_sided else 1.0))


def involved_patients(name: str, task: Task, truth: Indices, decided: Indices, patients: Indices) -> int:
    """How many patients the score called `name` rests on: those of the smallest group of images that it needs."""
    label, _, score = name.rpartition(".")
    k = task.classes.index(label or POSITIVE)
    target = positives(truth, task)[:, k] == 1
    match score:
        case "sensitivity" | "f1":
            groups = [truth == k]
        case "specificity":
            groups = [truth != k]
        case "ppv":
            groups = [decided == k]
        case "npv":
            groups = [decided != k]
        case "average_precision" | "covid_f1_at_half":
            groups = [target]
        case "auroc":
            groups = [target, ~target]
        case "accuracy" | "nll" | "brier" | "label_accuracy":
            groups = [np.ones(len(truth), dtype=bool)]
        case _:
            groups = [truth == each for each in np.unique(truth)]
    return min(len(np.unique(patients[group])) for group in groups)


def degrees_of_freedom(truth: Indices, patients: Indices) -> int:
    """Patients less classes, as survey samples count clusters less strata; at least 1."""
    return max(1, len(np.unique(patients)) - len(np.unique(truth)))


def _wilson(share: float, error: float, quantile: float) -> list[float]:
    per_trial = quantile**2 * error**2 / (share * (1 - share))  # z² / n of the binomial with this standard error
    reach = quantile * math.sqrt(error**2 + per_trial**2 / (4 * quantile**2))
    return [(share + per_trial / 2 + side * reach) / (1 + per_trial) for side in (-1, 1)]
