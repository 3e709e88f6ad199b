"""Whether a score says more than shortcuts do: the model against each probe, and whether the source gives the label."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats.contingency import association

from covid_cls.errors import InputError
from covid_cls.evaluation.comparison import Comparison, compare_cells
from covid_cls.evaluation.metrics import decide
from covid_cls.evaluation.predictions import truth_and_prob, without_nan
from covid_cls.evaluation.resampling import weighted_scores
from covid_cls.labels import Task

CONFOUNDED = 0.9  # Cramér's V of source and label from which on a score is no evidence of disease detection
_LESS_IS_BETTER = ("nll", "brier")

Tables = Sequence[pd.DataFrame]


def source_association(table: pd.DataFrame) -> float:
    """Cramér's V of source and label over the images of `table`, 0 (independent) to 1 (one gives the other away).

    table: columns source and label. Images without a source count as one more source. A single named source says
    nothing of the label: 0. nan where no image has a source, or all have one label.
    """
    source = table["source"].fillna("")
    if (source == "").all() or table["label"].nunique() < 2:
        return math.nan
    if source.nunique() == 1:
        return 0.0
    return float(association(pd.crosstab(source, table["label"]).to_numpy(), method="cramer"))


def verdict(
    model_name: str,
    model_tables: Tables,
    probe_tables: Mapping[str, Tables],
    task: Task,
    *,
    source_v: float | None,
    metric: str = "balanced_accuracy",
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """What the model's score is evidence of, in plain lines, and the figures behind them; ready for JSON.

    model_tables, and those of each probe: predictions over the same images, one table per training seed. source_v: of
    `source_association`; None or nan where sources are not known. metric: a flat score name of which more is better.

    lines: the verdict, the gravest line first. beats_probes: whether the paired patient bootstrap's 95 % interval of
    model - probe lies above 0 for every probe; the probe named is the strongest of those that are not beaten, or of
    all. None without a probe. probes: per probe its score, the difference, and retained, the share of the model's
    macro AUROC above chance that the probe reaches. It fails closed: what cannot be computed is never a success.
    InputError as in `compare_cells`, and for a metric of which less is better.
    """
    if metric in _LESS_IS_BETTER:
        raise InputError(f"metric {metric}: less of it is better; choose another, such as balanced_accuracy")
    model = _scores(model_tables, task, metric)
    probes = {}
    for name, tables in probe_tables.items():
        cells = {model_name: list(model_tables), f"{name} probe": list(tables)}
        (pair,) = compare_cells(cells, task, metric=metric, resamples=resamples, seed=seed)
        probes[name] = _figures(model, _scores(tables, task, metric), metric, pair)
    lines = _source_lines(source_v)
    beaten = {name: bool(figures["difference"]["low"] > 0) for name, figures in probes.items()}  # nan is not beaten
    if probes:
        rivals = [name for name in probes if not beaten[name]] or list(probes)
        strongest = max(rivals, key=lambda name: -math.inf if math.isnan(s := probes[name]["score"]) else s)
        lines.append(_probe_line(model_name, strongest, probes[strongest]["difference"], beaten[strongest]))
    else:
        strongest = None
        lines.append(f"{model_name} was not compared with any shortcut probe")
    record = {
        "lines": lines,
        "metric": metric,
        "score": model[metric],
        "source_association": math.nan if source_v is None else float(source_v),
        "beats_probes": all(beaten.values()) if probes else None,
        "probe": strongest,
        "probes": probes,
    }
    plain: dict[str, Any] = without_nan(record)
    return plain


def _scores(tables: Tables, task: Task, metric: str) -> dict[str, float]:
    """The mean over `tables` of `metric` and of macro_auroc."""
    drawn = []
    for table in tables:
        truth, prob = truth_and_prob(table, task)
        once = np.ones((1, len(truth)), dtype=np.uint8)
        drawn.append(weighted_scores(truth, prob, decide(prob, task), task, once, only={metric, "macro_auroc"}))
    return {name: float(np.mean([scores[name] for scores in drawn])) for name in (metric, "macro_auroc")}


def _figures(model: dict[str, float], probe: dict[str, float], metric: str, pair: Comparison) -> dict[str, Any]:
    above = model["macro_auroc"] - 0.5
    return {
        "score": probe[metric],
        "difference": pair.difference._asdict(),
        "p": pair.p,
        "macro_auroc": probe["macro_auroc"],
        "retained": (probe["macro_auroc"] - 0.5) / above if above > 0 else math.nan,
    }


def _source_lines(source_v: float | None) -> list[str]:
    if source_v is None or math.isnan(source_v):
        return ["not evidence of disease detection: sources are not named, and may predict the label"]
    if source_v >= CONFOUNDED:
        return [f"not evidence of disease detection: source predicts label (Cramér's V {source_v:.2f})"]
    return []


def _probe_line(model_name: str, probe: str, difference: dict[str, Any], beaten: bool) -> str:
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    if math.isnan(low):
        return f"{model_name} cannot be compared with the {probe} probe: too few images or patients"
    if beaten:
        return f"{model_name} beats the {probe} probe by {value:.1f} points ({low:.1f} to {high:.1f})"
    return (
        f"{model_name} is not shown to beat the {probe} probe: "
        f"difference {value:+.1f} points ({low:+.1f} to {high:+.1f})"
    )
