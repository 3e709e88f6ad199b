"""Calibration of probabilities: its measures, and the temperature that improves it.

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
from covid_cls.evaluation.metrics import ECE_BINS, Floats, Indices, bin_index, positives
from covid_cls.tasks import POSITIVE, Task

# Temperatures from 1/50 to 50 are searched.
_MAX_LOG_TEMPERATURE = math.log(50)


class CalibrationError(NamedTuple):
    """An expected calibration error and its values for a perfectly calibrated model.

    Attributes:
        value: The error.
        null: The mean error of a perfectly calibrated model on as many images.
        null_p95: The 95th percentile of that error. A value below it is no evidence of miscalibration.
    """

    value: float
    null: float
    null_p95: float


def logits(table: pd.DataFrame, task: Task) -> Floats:
    """Return the logits (N, K) of a predictions table."""
    return table[[f"logit_{name}" for name in task.classes]].to_numpy(dtype=np.float64)


def calibrated(logit: Floats, temperature: float, task: Task) -> Floats:
    """Return the probabilities (N, K) of logits divided by a temperature.

    The temperature changes no decision of `metrics.decide`, unless probabilities round to 1.
    """
    scaled = logit / temperature
    return np.asarray(expit(scaled) if task.multilabel else softmax(scaled, axis=1), dtype=np.float64)


def fit_temperature(truth: Indices, logit: Floats, task: Task) -> float:
    """Return the temperature with the smallest negative log likelihood (Guo et al. 2017).

    A multilabel task has one temperature for all its sigmoids. nan if the data do not determine one: with a single
    class, if all labels are right, so that ever smaller temperatures fit better, or so wrong that ever larger ones do.
    """
    targets = positives(truth, task)
    # A label is right if its logit is on the right side of 0, or of the middle of the two largest logits for a softmax.
    cut = 0 if task.multilabel else np.sort(logit, axis=1)[:, -2:].mean(axis=1, keepdims=True)
    if len(np.unique(truth)) < 2 or ((logit > cut) == (targets == 1)).all():
        return math.nan

    def loss(log_temperature: float) -> float:
        scaled = logit / math.exp(log_temperature)
        if task.multilabel:
            return float((np.logaddexp(0, scaled) - targets * scaled).mean())
        return float(-log_softmax(scaled, axis=1)[targets == 1].mean())

    # The loss is convex in 1/temperature, so it has one minimum in the logarithm too. One at a bound means
    # that the data determine no temperature.
    bounds = (-_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(found.x) if abs(found.x) < _MAX_LOG_TEMPERATURE - 1e-3 else math.nan


def covid_logit(logit: Floats, task: Task) -> Floats:
    """Return the log odds (N,) of covid against the rest."""
    covid = task.classes.index(POSITIVE)
    if task.multilabel:
        return logit[:, covid]
    return np.asarray(logit[:, covid] - logsumexp(np.delete(logit, covid, axis=1), axis=1), dtype=np.float64)


def calibration_error(
    prob: Floats, outcome: npt.ArrayLike, *, bins: int = ECE_BINS, draws: int = 500, seed: int = 0
) -> CalibrationError:
    """Return the expected calibration error (Guo et al. 2017) and its null distribution.

    The error is the weighted mean over equal bins of |share of outcomes - mean probability|. With few images even a
    perfect model has one, so the null outcomes are drawn from `prob` itself.

    Args:
        prob: Probabilities that the outcome is 1, shape (N,).
        outcome: 0 or 1, shape (N,).
        bins: Number of bins of [0, 1].
        draws: Number of random sets of null outcomes.
        seed: Random seed of these.
    """
    index = bin_index(prob, bins)
    rng = np.random.default_rng(seed)

    def error(outcomes: Floats) -> float:
        return float(np.abs(np.bincount(index, outcomes - prob, bins)).sum() / len(prob))

    null = [error((rng.random(len(prob)) < prob).astype(np.float64)) for _ in range(draws)]
    value = error(np.asarray(outcome, dtype=np.float64))
    return CalibrationError(value, float(np.mean(null)), float(np.quantile(null, 0.95)))


def reliability(prob: Floats, outcome: npt.ArrayLike, bins: int = 10) -> list[dict[str, float]]:
    """Return for each bin with images: n, their mean probability, the number of outcomes (`events`) and their share."""
    index = bin_index(prob, bins)
    n, total = np.bincount(index, minlength=bins), np.bincount(index, prob, bins)
    events = np.bincount(index, np.asarray(outcome, dtype=np.float64), bins)
    return [
        {
            "n": int(n[k]),
            "mean_prob": float(total[k] / n[k]),
            "events": int(events[k]),
            "share": float(events[k] / n[k]),
        }
        for k in np.flatnonzero(n)
    ]


def recalibration(
    positive: npt.NDArray[np.bool_], logit: Floats, patients: Indices, level: float = 0.95
) -> dict[str, Interval]:
    """Return the calibration slope and intercept (Van Calster et al. 2016).

    The slope comes from a logistic regression of the outcome on the logit; it is below 1 for an overconfident model.
    The intercept comes from a regression with slope 1 (calibration in the large); it is below 0 if p(covid) is too high
    on average. Both have Wald intervals with a covariance that is clustered by patient. nan if the logit separates the
    classes, or one is absent.

    Args:
        positive: Whether each image is of the positive class, shape (N,).
        logit: Log odds of the positive class, shape (N,).
        patients: See `intervals.patient_codes`.
        level: Confidence level, between 0 and 1.
    """
    both = positive.any() and not positive.all()
    up, down = logit[positive], logit[~positive]
    # Without overlap of the classes the slope of the regression is infinite.
    if not both or up.min() >= down.max() or up.max() <= down.min():
        return dict.fromkeys(("slope", "intercept"), UNDEFINED)
    # Takes 0.5 s, and training imports this module before it reads an image.
    import statsmodels.api as sm

    outcome, ones, family = positive.astype(np.float64), np.ones(len(logit)), sm.families.Binomial()
    return {
        "slope": _coefficient(sm.GLM(outcome, np.column_stack([ones, logit]), family), patients, level),
        "intercept": _coefficient(sm.GLM(outcome, ones, family, offset=logit), patients, level),
    }


def prior_shift(prob: Floats, prior: npt.ArrayLike, new_prior: npt.ArrayLike) -> Floats:
    """Return softmax probabilities (N, K) for other class frequencies: p' ∝ p new_prior / prior (Saerens et al. 2002).

    This is right if only the prevalence differs, which is seldom true of another hospital.

    Args:
        prob: The probabilities, shape (N, K).
        prior: Class frequencies of the training data, shape (K,).
        new_prior: Class frequencies to convert to, shape (K,).
    """
    weighted = prob * (np.asarray(new_prior, dtype=np.float64) / np.asarray(prior, dtype=np.float64))
    return np.asarray(weighted / weighted.sum(axis=1, keepdims=True), dtype=np.float64)


def _coefficient(model: Any, patients: Indices, level: float) -> Interval:
    """Return the last coefficient of a statsmodels GLM with its interval."""
    with warnings.catch_warnings():
        # A fit without convergence is reported as undefined instead.
        warnings.simplefilter("ignore")
        fit = model.fit(cov_type="cluster", cov_kwds={"groups": patients})
    if not fit.converged:
        return UNDEFINED
    low, high = fit.conf_int(1 - level)[-1]
    return Interval(float(fit.params[-1]), float(low), float(high), "Wald, by patient")
