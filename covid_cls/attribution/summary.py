"""From the numbers of each map to those of a set of images, with intervals over patients."""

import math
from typing import Any

import numpy as np
import pandas as pd

from covid_cls.attribution.audit import SURVIVES, border
from covid_cls.evaluation.intervals import (
    UNDEFINED,
    Interval,
    paired_difference,
    resampled_interval,
)
from covid_cls.evaluation.predictions import without_nan
from covid_cls.evaluation.resampling import patient_codes, patient_weights
from covid_cls.labels import Task

MUST_CHANGE = 0.9  # share of the maps; below it, none is shown
_EVERYTHING = "all"


def summarise_maps(table: pd.DataFrame, task: Task, crop: int, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """What the maps of a set of images add up to, ready for JSON: None stands for nan.

    table: image_id, patient_id, target and the fields of `Measures`, a row per image that could be read. An image
    counts in a mean where it has the number. Intervals are 95 %, from resampled patients.

    - n_images, n_patients, n_maps: images, their patients, and images whose map is not 0 everywhere.
    - where: by class explained, and for all: `border` and `lungs`, each with share (of the map), area (of the picture,
      which is the share of a map that is the same everywhere), times (share / area) and n.
    - curves: `deletion` and `insertion`, each with map, random (order) and their paired difference.
    - weights: similarity (mean SSIM with the maps of random weights), changed (share of the maps below `SURVIVES`),
      needed, and passed, which is None without a map.
    """
    mapped = table[table["similarity"].notna()]
    groups = {_EVERYTHING: mapped, **{name: mapped[mapped["target"] == name] for name in task.classes}}
    frame = float(border(crop).mean())
    means = _Means(task, resamples, seed)
    changed = (mapped["similarity"] < SURVIVES).astype(float)
    record = {
        "n_images": len(table),
        "n_patients": len(np.unique(patient_codes(table))) if len(table) else 0,
        "n_maps": len(mapped),
        "where": {name: _where(part, frame, means) for name, part in groups.items() if len(part)},
        "curves": {
            name: {
                "map": means.share(mapped, mapped[name])._asdict(),
                "random": means.share(mapped, mapped[f"random_{name}"])._asdict(),
                "difference": means.signed(mapped, mapped[name] - mapped[f"random_{name}"])._asdict(),
            }
            for name in ("deletion", "insertion")
        },
        "weights": {
            "similarity": means.signed(mapped, mapped["similarity"])._asdict(),
            "changed": means.share(mapped, changed)._asdict(),
            "needed": MUST_CHANGE,
            "passed": bool(changed.mean() >= MUST_CHANGE) if len(mapped) else None,
        },
    }
    plain: dict[str, Any] = without_nan(record)
    return plain


class _Means:
    """Means over images with an interval from resampled patients; images without the number are left out."""

    def __init__(self, task: Task, resamples: int, seed: int) -> None:
        self.task, self.resamples, self.seed = task, resamples, seed

    def share(self, table: pd.DataFrame, numbers: "pd.Series[float]") -> Interval:
        """The mean of numbers in [0, 1], of the rows of `table`."""
        drawn = self._drawn(table, numbers)
        return UNDEFINED if drawn is None else resampled_interval("share", self.task, **drawn)

    def signed(self, table: pd.DataFrame, numbers: "pd.Series[float]") -> Interval:
        """The mean of numbers in [-1, 1], such as differences of shares."""
        drawn = self._drawn(table, numbers)
        return UNDEFINED if drawn is None else paired_difference("share", self.task, **drawn)

    def _drawn(self, table: pd.DataFrame, numbers: "pd.Series[float]") -> dict[str, Any] | None:
        """What intervals take: the mean, that of each resample, and how many patients they rest on."""
        known = numbers.notna()
        if not known.any():
            return None
        values, patients = numbers[known].to_numpy(dtype=np.float64), patient_codes(table[known])
        if patients.max() == 0:  # nothing to resample
            weights = np.empty((0, len(values)), dtype=np.uint8)
        else:
            weights = patient_weights(np.zeros_like(patients), patients, self.resamples, self.seed)
        return {
            "value": float(values.mean()),
            "resampled": weights @ values / weights.sum(axis=1),
            "n_patients": int(patients.max()) + 1,
            "df": max(1, int(patients.max())),
        }


def _where(table: pd.DataFrame, frame: float, means: _Means) -> dict[str, Any]:
    lungs = float(table["lungs_area"].mean())
    return {
        "border": _against(means.share(table, table["border"]), frame, len(table)),
        "lungs": _against(means.share(table, table["lungs"]), lungs, int(table["lungs"].notna().sum())),
    }


def _against(share: Interval, area: float, n: int) -> dict[str, Any]:
    return {"share": share._asdict(), "area": area, "times": share.value / area if area > 0 else math.nan, "n": n}
