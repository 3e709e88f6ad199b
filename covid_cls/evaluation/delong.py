"""DeLong's variance of AUROCs, for one score and for two on the same images (DeLong, DeLong and Clarke-Pearson 1988).

The placement values come from midranks (Sun and Xu 2014), in O(N log N). Where `patients` are given, images of one
patient are not taken as independent (Obuchowski 1997); with one image each, both are the same.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata

from covid_cls.evaluation.intervals import UNDEFINED, Interval, without_spread
from covid_cls.evaluation.metrics import Floats, Indices


class Placements(NamedTuple):
    """Placement values and whose they are, as patient codes.

    positives (m,): the share of negatives below each positive; negatives (n,): the share of positives above each
    negative; ties count half. The difference of two scores' placements is one more of them.
    """

    positives: Floats
    negatives: Floats
    positive_patients: Indices
    negative_patients: Indices

    @property
    def auroc(self) -> float:
        """The mean of either; of a difference, the difference of the AUROCs."""
        return float(self.positives.mean())

    @property
    def n_patients(self) -> int:
        """Those of the class that has fewer."""
        return min(len(np.unique(self.positive_patients)), len(np.unique(self.negative_patients)))

    @property
    def variance(self) -> float:
        """Of the AUROC over other patients; nan with fewer than two of either class."""
        if self.n_patients < 2:
            return math.nan
        size = 1 + max(self.positive_patients.max(), self.negative_patients.max())
        up, down = (
            np.bincount(codes, (values - self.auroc) / len(values), size)
            for values, codes in ((self.positives, self.positive_patients), (self.negatives, self.negative_patients))
        )
        n_up, n_down, n = (
            len(np.unique(codes))
            for codes in (
                self.positive_patients,
                self.negative_patients,
                np.concatenate([self.positive_patients, self.negative_patients]),
            )
        )
        squares = (up**2).sum() * n_up / (n_up - 1) + (down**2).sum() * n_down / (n_down - 1)
        return max(0.0, float(squares + 2 * (up * down).sum() * n / (n - 1)))

    def minus(self, other: "Placements") -> "Placements":
        """The differences to another score's placements of the same images."""
        return self._replace(positives=self.positives - other.positives, negatives=self.negatives - other.negatives)


def placements(positive: npt.ArrayLike, score: npt.ArrayLike, patients: Indices | None = None) -> Placements:
    """Placement values of `score` (N,), higher for the positive class, where `positive` (N,) is 0 or 1.

    patients: the patient of each image as an integer from 0 on; None: each image is a patient of its own.
    """
    chosen, scores = np.asarray(positive, dtype=bool), np.asarray(score, dtype=np.float64)
    codes = np.arange(len(scores)) if patients is None else patients
    ranks = rankdata(scores)
    above = (ranks[chosen] - rankdata(scores[chosen])) / max((~chosen).sum(), 1)
    below = 1 - (ranks[~chosen] - rankdata(scores[~chosen])) / max(chosen.sum(), 1)
    return Placements(above, below, codes[chosen], codes[~chosen])


def delong_interval(
    positive: npt.ArrayLike, score: npt.ArrayLike, level: float = 0.95, *, patients: Indices | None = None
) -> Interval:
    """The AUROC with DeLong's interval, AUROC ± z x SE clipped to [0, 1], as it is commonly given.

    It covers too seldom where a class is small or the AUROC close to 1 (docs/simulations.md); `score_intervals` does
    not. Where the variance is 0, as for an AUROC of 1, or a class has one patient: `without_spread` with the patients
    of the smaller class. nan without both classes.
    """
    placed = placements(positive, score, patients)
    if not placed.n_patients:
        return UNDEFINED
    if not placed.variance > 0:
        return without_spread(placed.auroc, placed.n_patients, 0, 1, level)
    reach = float(norm.ppf((1 + level) / 2)) * math.sqrt(placed.variance)
    return Interval(placed.auroc, max(0.0, placed.auroc - reach), min(1.0, placed.auroc + reach), "DeLong")


def delong_test(
    positive: npt.ArrayLike, score_a: npt.ArrayLike, score_b: npt.ArrayLike, *, patients: Indices | None = None
) -> tuple[float, float, float]:
    """AUROC of a - AUROC of b, z and the two-sided p, of two scores of the same images.

    Where the difference has no variance: z = 0 and p = 1 without a difference, as for equal scores; else z is infinite
    and p that of `p_without_spread`. All nan without both classes.
    """
    return placement_test(placements(positive, score_a, patients), placements(positive, score_b, patients))


def placement_test(a: Placements, b: Placements) -> tuple[float, float, float]:
    """`delong_test` from the placement values of both scores."""
    if not a.n_patients:
        return math.nan, math.nan, math.nan
    apart = a.minus(b)
    if apart.variance > 1e-24:
        z = apart.auroc / math.sqrt(apart.variance)
        return apart.auroc, z, float(2 * norm.sf(abs(z)))
    if abs(apart.auroc) < 1e-12:
        return 0.0, 0.0, 1.0
    return apart.auroc, math.copysign(math.inf, apart.auroc), p_without_spread(apart.auroc, a.n_patients, 1)


def p_without_spread(difference: float, n_patients: int, most: float) -> float:
    """The two-sided p of a mean difference within ±`most`, of which n independent groups all showed the same.

    It is 1 - level of the widest `without_spread` interval that leaves 0 out: 2 (1 + |difference| / most)^-n.
    """
    return float(min(1.0, 2 * (1 + abs(difference) / most) ** -n_patients))
