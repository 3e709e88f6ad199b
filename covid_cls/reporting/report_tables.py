"""A sweep's report as tables: results.csv to the last digit, results.md for a README, and rows for the page."""

import csv
import io
import math
from collections.abc import Sequence

import numpy as np

from covid_cls.artifact.card import markdown_table
from covid_cls.evaluation.intervals import Interval
from covid_cls.evaluation.resampling import patient_codes
from covid_cls.labels import Task
from covid_cls.reporting import html
from covid_cls.reporting.published import references
from covid_cls.reporting.runs import AXES
from covid_cls.reporting.standing import CellResult, ProtocolResult

CSV_COLUMNS = (
    *("protocol", "cell", *AXES, "score", "value", "low", "high", "method", "mean", "sd"),
    *("n_seeds", "n_folds", "n_images", "n_patients"),
)
_LABELS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "covid.sensitivity": "covid sensitivity",
    "covid.specificity": "covid specificity",
    "covid.f1": "covid F1",
    "normal.f1": "normal F1",
    "macro_f1": "macro F1",
    "macro_auroc": "macro AUROC",
    "label_accuracy": "accuracy per label",
    "covid_f1_at_half": "covid F1, label cut at 0.5",
}
_MULTILABEL = ("label_accuracy", "covid_f1_at_half")


def score_label(name: str) -> str:
    """A flat score name in words."""
    return _LABELS.get(name, name.replace(".", " ").replace("_", " ").replace("auroc", "AUROC"))


def grid_scores(task: Task, metric: str) -> list[str]:
    """The scores that the grid's table shows; the report's own, if it is none of them, comes first."""
    shown = [name for name in _LABELS if task.multilabel or name not in _MULTILABEL]
    return shown if metric in shown else [metric, *shown]


def number(value: float, digits: int = 3) -> str:
    """A number as text; a dash where it is not defined."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def bounds(interval: Interval, signed: bool = False) -> str:
    """An interval's ends, e.g. "0.871–0.923", or "+0.011 to +0.042" where signed."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return "no interval"
    return f"{interval.low:+.3f} to {interval.high:+.3f}" if signed else f"{interval.low:.3f}–{interval.high:.3f}"


def score_text(interval: Interval) -> str:
    """A score and, on a second line, its interval; a dash where it is not defined."""
    return f"{number(interval.value)}\n{bounds(interval)}" if math.isfinite(interval.value) else "–"


def tall_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """`html.table` of fields that may hold several lines."""
    return html.table(headers, rows, left).replace("\n", "<br>")


def difference(interval: Interval) -> str:
    """A difference with its interval, e.g. "+0.026 (+0.011 to +0.042)"."""
    return f"{interval.value:+.3f} ({bounds(interval, signed=True)})" if math.isfinite(interval.value) else "–"


def grid_axes(result: ProtocolResult) -> list[str]:
    """The axes that the grid's table has columns for: the first three always, the others where they vary."""
    return [axis for k, axis in enumerate(AXES[:-1]) if k < 3 or len({r.cell.axes[axis] for r in result.grid}) > 1]


def grid_table(result: ProtocolResult) -> tuple[list[str], list[list[str]], int]:
    """Headers, rows and the number of leading word columns: a row per cell, two lines in each score's field.

    The first line has mean ± sd over the cell's runs, the second the interval over patients. How many runs a cell has
    is a column where cells differ in it (see `common_runs`). A cell's other settings stand in a column of their own
    where they are all that tells it from another.
    """
    axes, names = grid_axes(result), grid_scores(result.protocol.task, result.options.metric)
    extra = len({tuple(r.cell.axes[axis] for axis in axes) for r in result.grid}) < len(result.grid)
    counted = not common_runs(result)
    headers = [*axes, *(["settings"] if extra else []), *(["runs"] if counted else [])]
    rows = []
    for r in result.grid:
        own = [r.cell.axes[axis] for axis in axes] + ([_settings(r.cell.name)] if extra else [])
        rows.append([*own, *([runs_of(r, result)] if counted else []), *(_field(r, name) for name in names)])
    return [*headers, *(_narrow(score_label(name)) for name in names)], rows, len(headers)


def common_runs(result: ProtocolResult) -> str:
    """How many runs each cell has, if all have as many, e.g. "single seed × 5 folds"; else ""."""
    found = {runs_of(r, result) for r in result.grid}
    return found.pop() if len(found) == 1 else ""


def runs_of(r: CellResult, result: ProtocolResult) -> str:
    """How many seeds and folds a cell's scores are from, e.g. "3 seeds × 5 folds" or "single seed"."""
    seeds = "single seed" if len(r.cell.seeds) == 1 else f"{len(r.cell.seeds)} seeds"
    folds = len(result.protocol.folds)
    return f"{seeds} × {folds} folds" if folds > 1 else seeds


def published_table(result: ProtocolResult) -> tuple[list[str], list[list[str]], int]:
    """Headers, rows and the number of leading word columns of what others published for the same task."""
    task = result.protocol.task
    names = [name for name in grid_scores(task, "accuracy") if name != "macro_auroc"]
    rows = []
    for reference, same in references(task, result.protocol.data):
        scores, interval = reference.scores(), reference.accuracy(result.options.level)
        fields = [number(scores.get(name, math.nan)) for name in names]
        if interval is not None:
            fields[names.index("accuracy")] += f"\n{bounds(interval)}"
        rows.append([reference.work, reference.model, "the DarkCovidNet set" if same else "other images", *fields])
    return ["published by", "model", "measured on", *(_narrow(score_label(n)) for n in names)], rows, 3


def results_csv(results: Sequence[ProtocolResult]) -> str:
    """results.csv: one row per cell or probe and score; numbers to the last digit, nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for result in results:
        images, patients = len(result.table), len(np.unique(patient_codes(result.table)))
        folds = len(result.protocol.folds)
        for r in result.cells.values():
            for name in r.scores.seeds:
                interval = r.intervals.get(name, Interval(r.scores.value(name), math.nan, math.nan, "none"))
                mean, sd = r.spread.get(name, (math.nan, math.nan))
                own = [result.protocol.name, r.cell.name, *(r.cell.axes[axis] for axis in AXES), name]
                counts = [len(r.cell.seeds), folds, images, patients]
                writer.writerow([*own, *_digits(interval), *(_digit(x) for x in (mean, sd)), *counts])
        for probe in result.probes:
            for name, interval in probe.intervals.items():
                own = [result.protocol.name, f"probe: {probe.name}", *[""] * len(AXES), name]
                writer.writerow([*own, *_digits(interval), "", "", 1, folds, images, patients])
    return text.getvalue()


def results_md(results: Sequence[ProtocolResult], disclaimer: str) -> str:
    """results.md: per protocol its verdict lines and the grid's table."""
    parts = []
    for result in results:
        headers, rows, _ = grid_table(result)
        parts.append(f"### {result.protocol.name}")
        parts.append("\n".join(f"- {line}" for line in result.verdict.lines))
        parts.append(markdown_table(headers, rows))
        runs = common_runs(result)
        each = f"Each cell: {runs}. " if runs else ""
        parts.append(
            f"{each}Mean ± sd over runs, below it the {result.options.level:.0%} interval of the score pooled over "
            f"folds and averaged over seeds ({result.options.resamples} resamples of patients)."
        )
    return "\n\n".join([*parts, disclaimer]) + "\n"


def _field(r: CellResult, name: str) -> str:
    mean, sd = r.spread[name]
    return f"{number(mean)}{f' ± {sd:.3f}' if math.isfinite(sd) else ''}\n{bounds(r.intervals[name])}"


def _narrow(label: str) -> str:
    """A header on two lines: the table has many columns."""
    return label.replace(" ", "\n", 1)


def _settings(name: str) -> str:
    return ", ".join(part for part in name.split(", ") if "=" in part)


def _digits(interval: Interval) -> list[str]:
    return [*(_digit(x) for x in interval[:3]), interval.method]


def _digit(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""
