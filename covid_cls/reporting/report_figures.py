"""The pictures of a sweep's report: intervals side by side, the curves of a cell, its confusion matrix as HTML."""

from collections.abc import Sequence
from html import escape
from textwrap import fill
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import precision_recall_curve, roc_curve

from covid_cls.evaluation.calibration import reliability
from covid_cls.evaluation.intervals import Interval
from covid_cls.evaluation.metrics import Floats, Indices, confusion, decide, positives
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.labels import POSITIVE, Task
from covid_cls.reporting.figures import CLASS_COLOURS, INK, canvas

KIND_COLOURS = {"network": "#0072B2", "probe": "#D55E00", "published": "#8A8F98"}
_QUIET = "#8A8F98"
_SPLIT_COLOURS = {"train": "#8A8F98", "val": "#0072B2"}
_LABEL = 36  # characters of a label's line
_POINTS = 60  # of a curve: its shape at the size of a panel; 24 cells stay below 3 MB


class Mark(NamedTuple):
    """One line of a chart of intervals. kind: network, probe or published."""

    label: str
    interval: Interval
    kind: str


def interval_chart(marks: Sequence[Mark], metric: str, chance: float | None) -> Figure:
    """One row per mark, in their order from the top: its value as a dot, its interval as a bar.

    chance: a vertical line, e.g. 1/3; None: no line.
    """
    labels = [fill(mark.label, _LABEL) for mark in marks]
    figure, axes = canvas(7.2, 1.3 + 0.27 * len(marks) + 0.17 * sum(label.count("\n") for label in labels))
    for row, mark in enumerate(marks):
        colour = KIND_COLOURS[mark.kind]
        axes.plot([mark.interval.low, mark.interval.high], [row, row], color=colour, linewidth=2, alpha=0.55)
        axes.plot([mark.interval.value], [row], color=colour, marker="o", markersize=5, linestyle="none")
    if chance is not None:
        axes.axvline(chance, color=_QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate("chance", (chance, 1), xycoords=("data", "axes fraction"), fontsize=9, color=_QUIET, ha="center")
    axes.set_yticks(range(len(marks)), labels)
    axes.set_ylim(len(marks) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(metric)
    for kind, colour in KIND_COLOURS.items():
        if any(mark.kind == kind for mark in marks):
            axes.plot([], [], color=colour, marker="o", markersize=5, linestyle="none", label=kind)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9, borderaxespad=0.3, labelcolor=INK
    )
    return figure


def roc_figure(tables: Sequence[pd.DataFrame], task: Task) -> Figure:
    """True against false positive rate, one line per class and seed."""
    figure, axes = _square("false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], color=_QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
    for name, target, score in _class_scores(tables, task):
        false_positive, true_positive, _ = roc_curve(target, score)
        _curve(axes, false_positive, true_positive, name, len(tables))
    _class_legend(axes, task, "lower right")
    return figure


def precision_recall_figure(tables: Sequence[pd.DataFrame], task: Task) -> Figure:
    """Precision (PPV) against recall (sensitivity), one line per class and seed."""
    figure, axes = _square("recall (sensitivity)", "precision (PPV)")
    for name, target, score in _class_scores(tables, task):
        precision, recall, _ = precision_recall_curve(target, score)
        _curve(axes, recall, precision, name, len(tables))
    _class_legend(axes, task, "lower left")
    return figure


def reliability_figure(tables: Sequence[pd.DataFrame], task: Task) -> Figure:
    """The share of covid images against p(covid), in ten bins, one line per seed; dots grow with a bin's images."""
    figure, axes = _square("p(covid), mean of a bin", "share that is covid")
    axes.plot([0, 1], [0, 1], color=_QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
    for name, target, score in _class_scores(tables, task):
        if name == POSITIVE:
            bins = reliability(score, target)
            x, y = [b["mean_prob"] for b in bins], [b["share"] for b in bins]
            axes.plot(x, y, color=CLASS_COLOURS[name], linewidth=1, alpha=0.8)
            sizes = [6 + 60 * b["n"] / len(score) for b in bins]
            axes.scatter(x, y, s=sizes, color=CLASS_COLOURS[name], alpha=0.8, linewidths=0)
    return figure


def loss_figure(histories: Sequence[pd.DataFrame]) -> Figure:
    """The mean loss over a cell's runs at each epoch, in training and validation, between the smallest and largest."""
    figure, axes = canvas(3.6, 3.3)
    rows = pd.concat(histories) if histories else pd.DataFrame(columns=["epoch"])
    for split, colour in _SPLIT_COLOURS.items():
        name = f"loss/{split}"
        if name not in rows or rows[name].isna().all():
            continue
        band = rows.dropna(subset=[name]).groupby("epoch")[name].agg(["mean", "min", "max"])
        band = band.iloc[_thinned(len(band))]
        axes.fill_between(band.index, band["min"], band["max"], color=colour, alpha=0.2, linewidth=0)
        marker = "o" if len(band) == 1 else None
        axes.plot(band.index, band["mean"], color=colour, linewidth=1.6, marker=marker, label=split)
    if axes.lines:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no history was kept", transform=axes.transAxes, ha="center", color=_QUIET)
        axes.set(xticks=[], yticks=[])
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    return figure


def confusion_panel(tables: Sequence[pd.DataFrame], task: Task, title: str) -> str:
    """A cell's confusion matrix as an HTML table: counts summed over seeds, shares of the truth behind them.

    HTML and not SVG, so that shades and text keep their contrast in a dark page.
    """
    counts = np.zeros((len(task.classes), len(task.classes)), dtype=np.int64)
    for table in tables:
        truth, prob = truth_and_prob(table, task)
        counts += confusion(truth, decide(prob, task), len(task.classes))
    return confusion_table(counts, task, title, "" if len(tables) == 1 else f"counts over {len(tables)} seeds")


def confusion_table(counts: Indices, task: Task, title: str, note: str = "") -> str:
    """Counts (K, K), rows truth and columns decision, as an HTML table with a caption."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = "".join(f'<th class="n">{escape(name)}</th>' for name in task.classes)
    rows = ""
    for k, name in enumerate(task.classes):
        cells = "".join(
            f'<td class="n" style="background:color-mix(in srgb,var(--accent) {55 * share:.0f}%,transparent)">'
            f"{count}<br>{share:.1%}</td>"
            for count, share in zip(counts[k], shares[k], strict=True)
        )
        rows += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    caption = escape(title) + (f"; {escape(note)}" if note else "")
    return (
        f"<figure><table><thead><tr><th>truth \\ decision</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _square(across: str, up: str) -> tuple[Figure, Axes]:
    figure, axes = canvas(3.6, 3.3)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=across, ylabel=up)
    return figure, axes


def _class_scores(tables: Sequence[pd.DataFrame], task: Task) -> list[tuple[str, Indices, Floats]]:
    """Class, 0/1 targets and probabilities, for each table and each class that it can rank."""
    found = []
    for table in tables:
        truth, prob = truth_and_prob(table, task)
        targets = positives(truth, task)
        found += [
            (name, targets[:, k], prob[:, k])
            for k, name in enumerate(task.classes)
            if 0 < targets[:, k].sum() < len(truth)
        ]
    return found


def _curve(axes: Axes, x: Floats, y: Floats, name: str, seeds: int) -> None:
    kept = _thinned(len(x))
    axes.plot(x[kept], y[kept], color=CLASS_COLOURS[name], linewidth=1.5 if seeds == 1 else 1.0, alpha=0.85)


def _thinned(n: int) -> Indices:
    """Positions of at most `_POINTS` of n points, the first and last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, _POINTS)).round().astype(np.int64))


def _class_legend(axes: Axes, task: Task, where: Literal["lower left", "lower right"]) -> None:
    for name in task.classes:
        axes.plot([], [], color=CLASS_COLOURS[name], linewidth=1.5, label=name)
    axes.legend(loc=where, fontsize=9, frameon=False, labelcolor=INK)
