"""DeLong's variance of the AUROC, for one score and for two scores of the same images.

The method of DeLong, DeLong and Clarke-Pearson (1988), with placement values from midranks (Sun and Xu 2014) in
O(N log N). With patient codes, images of one patient are not assumed to be independent (Obuchowski 1997); for one image
per patient both methods are equal.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata

from covid_cls.evaluation.intervals import UNDEFINED, Interval, interval_without_spread, p_without_spread
from covid_cls.evaluation.metrics import Floats, Indices


class Placements(NamedTuple):
    """Placement values of a score, or the difference of those of two scores.

    Attributes:
        positives: For each of m positives, the share of negatives with a lower score; ties count half. Shape (m,).
        negatives: For each of n negatives, the share of positives with a higher score. Shape (n,).
        positive_patients: Patient code of each positive, shape (m,).
        negative_patients: Patient code of each negative, shape (n,).
    """

    positives: Floats
    negatives: Floats
    positive_patients: Indices
    negative_patients: Indices

    @property
    def auroc(self) -> float:
        """Return the AUROC, or the difference of two."""
        return float(self.positives.mean())

    @property
    def n_patients(self) -> int:
        """Return the number of patients of the class that has fewer."""
        return min(len(np.unique(self.positive_patients)), len(np.unique(self.negative_patients)))

    @property
    def variance(self) -> float:
        """Return the variance of the AUROC over samples of patients; nan with fewer than two of a class."""
        if self.n_patients < 2:
            return math.nan
        codes = self.positive_patients, self.negative_patients
        size = 1 + max(each.max() for each in codes)
        # Sums by patient: images of one patient are one independent observation.
        up, down = (
            np.bincount(each, (values - self.auroc) / len(values), size)
            for each, values in zip(codes, (self.positives, self.negatives), strict=True)
        )
        n_up, n_down, n = (len(np.unique(each)) for each in (*codes, np.concatenate(codes)))
        squares = (up**2).sum() * n_up / (n_up - 1) + (down**2).sum() * n_down / (n_down - 1)
        # The last term is the covariance of patients who have images of both classes.
        return max(0.0, float(squares + 2 * (up * down).sum() * n / (n - 1)))


def placements(positive: npt.ArrayLike, score: npt.ArrayLike, patients: Indices | None = None) -> Placements:
    """Return the placement values of a score.

    Args:
        positive: 1 for the positive class, else 0, shape (N,).
        score: Higher for the positive class, shape (N,).
        patients: See `intervals.patient_codes`; None if each image is a separate patient.
    """
    chosen, scores = np.asarray(positive, dtype=bool), np.asarray(score, dtype=np.float64)
    codes = np.arange(len(scores)) if patients is None else patients
    # The rank among all images less the rank within the own class is the number of images of the other class below.
    ranks = rankdata(scores)
    above = (ranks[chosen] - rankdata(scores[chosen])) / max((~chosen).sum(), 1)
    below = 1 - (ranks[~chosen] - rankdata(scores[~chosen])) / max(chosen.sum(), 1)
    return Placements(above, below, codes[chosen], codes[~chosen])


def delong_interval(
    positive: npt.ArrayLike, score: npt.ArrayLike, level: float = 0.95, *, patients: Indices | None = None
) -> Interval:
    """Return the AUROC with DeLong's interval, AUROC ± z x standard error clipped to [0, 1].

    It contains the true AUROC too seldom if a class is small or the AUROC is close to 1 (docs/simulations.md);
    `score_intervals` does not have this fault. If the variance is 0 or a class has one patient, see
    `interval_without_spread`. nan without both classes. The arguments are those of `placements`.
    """
    placed = placements(positive, score, patients)
    if not placed.n_patients:
        return UNDEFINED
    # nan, which is not > 0, is the variance with a single patient of a class.
    if not placed.variance > 0:
        return interval_without_spread(placed.auroc, placed.n_patients, 0, 1, level)
    reach = float(norm.ppf((1 + level) / 2)) * math.sqrt(placed.variance)
    return Interval(placed.auroc, max(0.0, placed.auroc - reach), min(1.0, placed.auroc + reach), "DeLong")


def delong_test(a: Placements, b: Placements) -> tuple[float, float, float]:
    """Return AUROC of a - AUROC of b, z and the two-sided p, for two scores of the same images.

    If the difference has no variance, z = 0 and p = 1 for equal AUROCs; else z is infinite, and p comes from
    `p_without_spread`. All are nan without both classes.
    """
    if not a.n_patients:
        return math.nan, math.nan, math.nan
    # An AUROC is the mean of placement values, so a difference of AUROCs is the mean of their differences.
    apart = a._replace(positives=a.positives - b.positives, negatives=a.negatives - b.negatives)
    # A smaller variance is rounding error.
    if apart.variance > 1e-24:
        z = apart.auroc / math.sqrt(apart.variance)
        return apart.auroc, z, float(2 * norm.sf(abs(z)))
    if abs(apart.auroc) < 1e-12:
        return 0.0, 0.0, 1.0
    return apart.auroc, math.copysign(math.inf, apart.auroc), p_without_spread(apart.auroc, a.n_patients, 1)
