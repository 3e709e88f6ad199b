"""Whether a score shows more than shortcuts do: comparison with baselines, and association of source and label."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats.contingency import association

from covid_cls.errors import InputError
from covid_cls.evaluation.comparison import ConfigurationScores, paired_test
from covid_cls.evaluation.metrics import LOWER_IS_BETTER
from covid_cls.evaluation.predictions import without_nan

# From this Cramér's V of source and label on, a score is no evidence of disease detection.
CONFOUNDED = 0.9


def source_association(table: pd.DataFrame) -> float:
    """Return Cramér's V (1946) of source and label, from 0 (independent) to 1 (the source determines the label).

    Images without a source count as one more source. With a single named source V is 0; it is nan if no image has a
    source or all have the same label.

    Args:
        table: Has the columns source and label.
    """
    source = table["source"].fillna("")
    # Without names or with one label, it is unknown whether the source predicts the label, so V is not 0.
    if (source == "").all() or table["label"].nunique() < 2:
        return math.nan
    if source.nunique() == 1:
        return 0.0
    return float(association(pd.crosstab(source, table["label"]).to_numpy(), method="cramer"))


def verdict(
    model_name: str,
    model: ConfigurationScores,
    baselines: Mapping[str, ConfigurationScores],
    *,
    source_v: float | None,
    metric: str = "balanced_accuracy",
) -> dict[str, Any]:
    """Compare a model with shortcut baselines and state what its score is evidence of.

    What cannot be computed never counts as a success.

    Args:
        model_name: Name of the model in the text.
        model: Its scores.
        baselines: Scores of the baselines by name, on the same resamples.
        source_v: The result of `source_association`; None or nan if sources are unknown.
        metric: Flat name of the score to compare; higher values must be better.

    Returns:
        A record for JSON with None for nan. Keys: lines, the verdict with the most severe line first; metric; score;
        source_association; beats_baselines, whether the 95 % interval of model - baseline is above 0 for every
        baseline, None without baselines; baseline, the strongest of those that are not beaten, or of all; baselines,
        for each its score, difference, p, macro_auroc and retained: its macro AUROC above chance over the model's.

    Raises:
        InputError: If lower values of the metric are better.
    """
    if metric in LOWER_IS_BETTER:
        raise InputError(f"metric {metric}: lower values are better. Use another one, such as balanced_accuracy.")
    records: dict[str, dict[str, Any]] = {}
    above_chance = model.value("macro_auroc") - 0.5
    for name, scores in baselines.items():
        difference, p = paired_test(model, scores, metric)
        macro_auroc = scores.value("macro_auroc")
        records[name] = {
            "score": scores.value(metric),
            "difference": difference._asdict(),
            "p": p,
            "macro_auroc": macro_auroc,
            "retained": (macro_auroc - 0.5) / above_chance if above_chance > 0 else math.nan,
        }
    lines, strongest = _source_lines(source_v), None
    # An undefined interval has nan as its lower end, so the baseline counts as not beaten.
    unbeaten = [name for name in records if not records[name]["difference"]["low"] > 0]
    if records:
        strongest = max(
            unbeaten or list(records), key=lambda name: np.nan_to_num(records[name]["score"], nan=-math.inf)
        )
        beaten = strongest not in unbeaten
        lines.append(_baseline_line(model_name, strongest, records[strongest]["difference"], beaten))
    else:
        lines.append(f"{model_name} was not compared with any shortcut baseline")
    return without_nan(
        {
            "lines": lines,
            "metric": metric,
            "score": model.value(metric),
            "source_association": math.nan if source_v is None else float(source_v),
            "beats_baselines": not unbeaten if records else None,
            "baseline": strongest,
            "baselines": records,
        }
    )


def _source_lines(source_v: float | None) -> list[str]:
    if source_v is None or math.isnan(source_v):
        return ["not evidence of disease detection: sources are not named, and may predict the label"]
    if source_v >= CONFOUNDED:
        return [f"not evidence of disease detection: source predicts label (Cramér's V {source_v:.2f})"]
    return []


def _baseline_line(model_name: str, baseline: str, difference: dict[str, Any], beaten: bool) -> str:
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    if math.isnan(low):
        return f"{model_name} cannot be compared with the {baseline} baseline: too few images or patients"
    if beaten:
        return f"{model_name} beats the {baseline} baseline by {value:.1f} points ({low:.1f} to {high:.1f})"
    return (
        f"{model_name} is not shown to beat the {baseline} baseline: "
        f"difference {value:+.1f} points ({low:+.1f} to {high:+.1f})"
    )
