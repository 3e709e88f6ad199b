"""Whether probabilities mean what they say, and one temperature that makes them mean it better.

Shapes: logit float (N, K) in the task's order, truth int (N,), prob and outcome (N,).
"""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logsumexp, softmax

from covid_cls.evaluation.intervals import UNDEFINED, Interval
from covid_cls.evaluation.metrics import Floats, Indices, positives
from covid_cls.evaluation.resampling import ECE_BINS
from covid_cls.labels import POSITIVE, Task

_EDGE = math.log(50)  # temperatures from 1/50 to 50 are tried


class Gap(NamedTuple):
    """An expected calibration error: value, and what a perfectly calibrated model would show: its mean and 95th
    percentile over draws of the outcomes. A value within that range is no evidence of a fault.
    """

    value: float
    null: float
    null_p95: float


def logits(table: pd.DataFrame, task: Task) -> Floats:
    """The logits (N, K) of a predictions table."""
    return table[[f"logit_{name}" for name in task.classes]].to_numpy(dtype=np.float64)


def calibrated(logit: Floats, temperature: float, task: Task) -> Floats:
    """Probabilities (N, K) of logits over a temperature: a softmax, or a sigmoid for each class of a multilabel task.

    No decision of `metrics.decide` changes with the temperature, but for probabilities that round to 1.
    """
    scaled = logit / temperature
    return np.asarray(expit(scaled) if task.multilabel else softmax(scaled, axis=1), dtype=np.float64)


def fit_temperature(truth: Indices, logit: Floats, task: Task) -> float:
    """The temperature with the least negative log likelihood (Guo et al. 2017), one for all sigmoids if multilabel.

    nan where the data do not determine one: a single class, every label right, so that ever smaller temperatures fit
    ever better, or labels so wrong that ever larger ones do.
    """
    targets = positives(truth, task)
    cut = 0 if task.multilabel else np.sort(logit, axis=1)[:, -2:].mean(axis=1, keepdims=True)
    right = ((logit > cut) == (targets == 1)).all()
    if len(np.unique(truth)) < 2 or right:
        return math.nan

    def loss(log_temperature: float) -> float:
        scaled = logit / math.exp(log_temperature)
        if task.multilabel:
            return float((np.logaddexp(0, scaled) - targets * scaled).mean())
        return float(-log_softmax(scaled, axis=1)[targets == 1].mean())

    found = minimize_scalar(loss, bounds=(-_EDGE, _EDGE), method="bounded", options={"xatol": 1e-6})
    return math.exp(found.x) if abs(found.x) < _EDGE - 1e-3 else math.nan


def covid_logit(logit: Floats, task: Task) -> Floats:
    """The log odds (N,) of covid against the rest."""
    covid = task.classes.index(POSITIVE)
    if task.multilabel:
        return logit[:, covid]
    return np.asarray(logit[:, covid] - logsumexp(np.delete(logit, covid, axis=1), axis=1), dtype=np.float64)


def calibration_error(
    prob: Floats, outcome: npt.ArrayLike, *, bins: int = ECE_BINS, draws: int = 500, seed: int = 0
) -> Gap:
    """The expected calibration error of `prob` for `outcome` (0 or 1), beside its null value.

    Weighted mean over equal bins ((0, 1/bins], ...) of |share of outcomes - mean probability|. The null outcomes are
    drawn from `prob` itself: with few images even a perfect model shows a gap.
    """
    which = _bins(prob, bins)
    rng = np.random.default_rng(seed)

    def gap(outcomes: Floats) -> float:
        return float(np.abs(np.bincount(which, outcomes - prob, bins)).sum() / len(prob))

    null = [gap((rng.random(len(prob)) < prob).astype(np.float64)) for _ in range(draws)]
    value = gap(np.asarray(outcome, dtype=np.float64))
    return Gap(value, float(np.mean(null)), float(np.quantile(null, 0.95)))


def reliability(prob: Floats, outcome: npt.ArrayLike, bins: int = 10) -> list[dict[str, float]]:
    """Per bin that holds images: n, their mean probability, how many outcomes were 1 (`events`) and their share."""
    which = _bins(prob, bins)
    n, summed = np.bincount(which, minlength=bins), np.bincount(which, prob, bins)
    events = np.bincount(which, np.asarray(outcome, dtype=np.float64), bins)
    return [
        {
            "n": int(n[k]),
            "mean_prob": float(summed[k] / n[k]),
            "events": int(events[k]),
            "share": float(events[k] / n[k]),
        }
        for k in np.flatnonzero(n)
    ]


def recalibration(
    positive: npt.NDArray[np.bool_], logit: Floats, patients: Indices, level: float = 0.95
) -> dict[str, Interval]:
    """Calibration `slope`, below 1 where overconfident, and `intercept`, below 0 where covid comes out too likely.

    logit: log odds of the positive class. Slope of a logistic regression of the outcome on the logit; intercept of
    one with the slope held at 1, calibration in the large (Van Calster et al. 2016). Intervals: Wald, with a
    covariance that allows for several images of a patient. nan where one logit separates the classes, or one is absent.
    """
    nothing = dict.fromkeys(("slope", "intercept"), UNDEFINED)
    if positive.all() or not positive.any():
        return nothing
    if logit[positive].min() >= logit[~positive].max() or logit[positive].max() <= logit[~positive].min():
        return nothing
    import statsmodels.api as sm  # 0.5 s, and training needs the rest of this module before it reads an image

    outcome, ones = positive.astype(np.float64), np.ones(len(logit))
    return {
        "slope": _coefficient(sm.GLM(outcome, np.column_stack([ones, logit]), sm.families.Binomial()), patients, level),
        "intercept": _coefficient(sm.GLM(outcome, ones, sm.families.Binomial(), offset=logit), patients, level),
    }


def prior_shift(prob: Floats, prior: npt.ArrayLike, new_prior: npt.ArrayLike) -> Floats:
    """Probabilities (N, K) of a softmax as they are where classes have `new_prior` (K,) instead of `prior`.

    p' ∝ p new_prior / prior (Saerens et al. 2002): right where the prevalence alone differs, which another hospital
    seldom grants.
    """
    weighted = prob * (np.asarray(new_prior, dtype=np.float64) / np.asarray(prior, dtype=np.float64))
    return np.asarray(weighted / weighted.sum(axis=1, keepdims=True), dtype=np.float64)


def _bins(prob: Floats, bins: int) -> Indices:
    """The bin of each probability: (0, 1/bins] is number 0, and so is 0 itself."""
    return np.clip(np.ceil(prob * bins).astype(np.int64) - 1, 0, bins - 1)


def _coefficient(model: Any, patients: Indices, level: float) -> Interval:
    """Return the last coefficient of a statsmodels GLM, with its interval."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what did not converge is nan below
        fit = model.fit(cov_type="cluster", cov_kwds={"groups": patients})
    if not fit.converged:
        return UNDEFINED
    low, high = fit.conf_int(1 - level)[-1]
    return Interval(float(fit.params[-1]), float(low), float(high), "Wald, by patient")
