"""The sections of a sweep's report that look into its cells: confusions, curves, sources, calibration."""

import math
import warnings
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd

from covid_cls.evaluation.calibration import calibrated, calibration_error, logits
from covid_cls.evaluation.grid import mean_score, score_cell
from covid_cls.evaluation.intervals import Interval
from covid_cls.evaluation.operating import fit_operating
from covid_cls.evaluation.verdict import CONFOUNDED, source_association
from covid_cls.labels import POSITIVE
from covid_cls.records import read_json, read_predictions
from covid_cls.reporting import html
from covid_cls.reporting.report_figures import (
    confusion_panel,
    loss_figure,
    precision_recall_figure,
    reliability_figure,
    roc_figure,
)
from covid_cls.reporting.report_tables import number, score_label, score_text, tall_table
from covid_cls.reporting.runs import Run
from covid_cls.reporting.standing import CellResult, ProtocolResult, resample


def confusions(result: ProtocolResult) -> str:
    """The confusion matrix of each cell, small, side by side."""
    task = result.protocol.task
    return html.panels([confusion_panel(r.cell.tables, task, r.cell.name) for r in result.cells.values()])


def curves(result: ProtocolResult) -> str:
    """ROC, precision-recall, reliability and loss of each cell, folded away but for the first."""
    parts, task = [], result.protocol.task
    for k, r in enumerate(result.grid):
        histories = [pd.read_csv(p) for run in r.cell.runs if (p := run.folder / "history.csv").is_file()]
        name = f"{r.cell.name} ({result.protocol.name})"
        panels = [
            html.figure(roc_figure(r.cell.tables, task), f"ROC, each class against the rest: {name}"),
            html.figure(precision_recall_figure(r.cell.tables, task), f"Precision and recall: {name}"),
            html.figure(reliability_figure(r.cell.tables, task), f"Reliability of p(covid): {name}"),
            html.figure(loss_figure(histories), f"Loss, mean and range over {len(histories)} runs: {name}"),
        ]
        is_open = " open" if k == 0 else ""
        parts.append(f"<details{is_open}><summary>{escape(r.cell.name)}</summary>{html.panels(panels)}</details>")
    return "".join(parts)


def sources(result: ProtocolResult) -> str:
    """Images of each class by source, and each cell's scores there."""
    table, task = result.table, result.protocol.task
    counts = pd.crosstab(table["source"].replace("", "unknown"), table["label"])
    counts = counts.reindex(columns=list(task.classes), fill_value=0)
    pure = "one class: a score here cannot be told from a source detector's"
    rows = [
        [str(source), *(str(n) for n in row), pure if (row > 0).sum() == 1 else ""]
        for source, row in zip(counts.index, counts.to_numpy(), strict=True)
    ]
    parts = [html.table(["source", *task.classes, ""], rows)]
    association = source_association(table)
    if math.isfinite(association):
        parts.append(
            html.paragraph(
                f"Cramér's V of source and label: {association:.2f} (0: a source says nothing of the label; 1: it "
                "gives the label away).",
                "bad" if association >= CONFOUNDED else "",
            )
        )
    if len(counts) > 1:
        names = ["accuracy", "balanced_accuracy"]
        scored = {str(source): _scores_within(result, str(source), names) for source in counts.index}
        headers = ["cell", *(f"{source}: {score_label(n)}" for source in scored for n in names)]
        rows = [
            [r.cell.name, *(score_text(scored[source][r.cell.name][n]) for source in scored for n in names)]
            for r in result.grid
        ]
        parts.append(tall_table(headers, rows))
    return "".join(parts)


def calibration(result: ProtocolResult) -> str:
    """Calibration of p(covid) of each cell, as trained and with the temperature that each run's validation gave."""
    rows = []
    for r in result.grid:
        temperatures = [_temperature(run) for run in r.cell.runs]
        known = [t for t in temperatures if t is not None]
        scaled = len(known) == len(temperatures)
        span = f"{min(known):.2f} to {max(known):.2f}" if len(set(known)) > 1 else number(known[0], 2) if known else ""
        rows.append(
            [
                r.cell.name,
                _covid_gap(r, [1.0] * len(temperatures), result),
                _covid_gap(r, known, result) if scaled else "no validation table",
                score_text(r.intervals["brier"]),
                score_text(r.intervals["nll"]),
                span if scaled else "–",
            ]
        )
    headers = ["cell", "ECE of p(covid)", "ECE at the temperature", "Brier", "NLL", "temperature"]
    return tall_table(headers, rows)


def _temperature(run: Run) -> float | None:
    """What the run's validation gave: as it was frozen, else fitted now to the same validation table."""
    frozen, validation = run.folder / "operating.json", run.folder / "predictions-val.csv"
    if frozen.is_file():
        return float(read_json(frozen)["temperature"])
    if not validation.is_file():
        return None
    table = read_predictions(validation, run.task.classes)
    return float(fit_operating(table, run.task)["temperature"])


def _covid_gap(r: CellResult, temperatures: Sequence[float], result: ProtocolResult) -> str:
    """The mean over seeds of the ECE of p(covid), with its null value below it."""
    task, gaps = result.protocol.task, []
    for seed in r.cell.seeds:
        parts = [
            (run.table, calibrated(logits(run.table, task), temperature, task))
            for run, temperature in zip(r.cell.runs, temperatures, strict=True)
            if run.seed == seed and run.table is not None
        ]
        covid = np.concatenate([(table["label"] == POSITIVE).to_numpy() for table, _ in parts])
        prob = np.concatenate([prob[:, task.classes.index(POSITIVE)] for _, prob in parts])
        gaps.append(calibration_error(prob, covid, draws=200, seed=result.options.seed))
    value, null, p95 = np.mean(gaps, axis=0)
    return f"{number(value)}\nperfect: {number(null)}, 95 % below {number(p95)}"


def _scores_within(result: ProtocolResult, source: str, names: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """Per cell, scores on the test images of one source."""
    rows = (result.table["source"].replace("", "unknown") == source).to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a lone patient of a class is likely in one source, and its interval is wide
        weights = resample(result.table[rows], result.protocol.task, result.options)
    found = {}
    for r in result.grid:
        tables = [table[rows] for table in r.cell.tables]
        scores = score_cell(tables, result.protocol.task, weights, names)
        found[r.cell.name] = {name: mean_score(scores, name, result.options.level) for name in names}
    return found
