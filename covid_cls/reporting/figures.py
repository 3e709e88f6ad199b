"""Pictures of one run: drawn from evaluation's results, returned as a Figure, never shown.

Every Figure is built by itself, without pyplot and rcParams, so that threads and headless machines can draw.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from covid_cls.evaluation.metrics import class_scores, decide, roc_points
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.labels import Task
from covid_cls.records import whole_file

# Okabe and Ito's palette, told apart by colour-blind readers.
CLASS_COLOURS = {"covid": "#D55E00", "normal": "#0072B2", "pneumonia": "#009E73"}
_SPLIT_COLOURS = {"train": "#8A8F98", "val": "#0072B2"}
INK = "#22262B"  # on a page, what is drawn in this colour takes the page's own, light or dark
_QUIET = "#8A8F98"
_SHARES = LinearSegmentedColormap.from_list("shares", ["#F3F6F9", "#5B9BC9"])  # ink stays legible on the darkest
_AXIS_LABELS = {"accuracy": "accuracy (fraction of images)"}


def learning_curves(history: pd.DataFrame, metric: str, *, best_epoch: int | None = None) -> Figure:
    """`metric` over the epochs, one curve for training and one for validation.

    history: column `epoch`, and `{metric}/train` and `{metric}/val`, either of which may be missing or hold nan where
    nothing was logged; a curve joins the finite values. best_epoch: the epoch whose weights were selected, marked by
    a vertical line.
    """
    figure, axes = canvas(6.4, 4.0)
    for split, colour in _SPLIT_COLOURS.items():
        values = history.get(f"{metric}/{split}")
        if values is None:
            continue
        drawn = np.isfinite(values.to_numpy(dtype=float))
        epochs = history["epoch"].to_numpy()[drawn]
        if len(epochs):
            marker = "o" if len(epochs) <= 15 else None  # one epoch alone would draw no line
            axes.plot(epochs, values[drawn], color=colour, linewidth=1.8, marker=marker, markersize=4, label=split)
    if not axes.lines:
        axes.text(0.5, 0.5, f"no {metric} was logged", transform=axes.transAxes, ha="center", color=_QUIET)
        axes.set(xticks=[], yticks=[])
    if best_epoch is not None:
        axes.axvline(best_epoch, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label=f"selected: epoch {best_epoch}")
    axes.set_xlabel("epoch")
    axes.set_ylabel(_AXIS_LABELS.get(metric, metric))
    if history["epoch"].nunique() == 1:
        axes.set_xticks([int(history["epoch"].iloc[0])])
    elif axes.lines:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    if axes.get_legend_handles_labels()[0]:  # above the axes, where it can cover no curve
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=10, borderaxespad=0.3)
    return figure


def confusion_matrix(counts: npt.ArrayLike, classes: Sequence[str], title: str) -> Figure:
    """Counts with the share of their row in each cell; rows are the truth, columns the decision.

    counts: (K, K). A cell is as dark as its share; a row without images has no shares.
    """
    cells = np.asarray(counts)
    totals = cells.sum(axis=1, keepdims=True)
    shares = cells / np.maximum(totals, 1)
    size = 1.9 + 1.15 * len(classes)
    figure, axes = canvas(size + 0.5, size)
    axes.imshow(shares, cmap=_SHARES, vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(cells):
        share = f"{shares[row, column]:.1%}" if totals[row, 0] else "–"
        axes.text(column, row, f"{count}\n{share}", ha="center", va="center", color=INK, fontsize=12)
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), [f"{name}\nn = {n}" for name, n in zip(classes, totals[:, 0], strict=True)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("decision")
    axes.set_ylabel("truth")
    axes.set_title(title, fontsize=12, color=INK, wrap=True)
    return figure


def roc_curves(table: pd.DataFrame, task: Task) -> Figure:
    """One curve per class against the rest, its AUROC in the legend; a class without one is named there all the same.

    table: a predictions table. In a multilabel task a covid image is positive for pneumonia too, and the legend says
    so. InputError as in `truth_and_prob`.
    """
    truth, prob = truth_and_prob(table, task)
    scores = class_scores(truth, prob, decide(prob, task), task)
    points = roc_points(truth, prob, task)
    figure, axes = canvas(5.2, 5.2)
    axes.plot([0, 1], [0, 1], color=_QUIET, linewidth=0.8, linestyle=(0, (4, 3)), label="chance, AUROC 0.5")
    for name in task.classes:
        shown = f"{name} (with covid)" if task.multilabel and name == "pneumonia" else name
        auroc = f"AUROC {scores[name]['auroc']:.3f}" if name in points else "AUROC undefined"
        false_positive, true_positive = points.get(name, ([], []))
        axes.plot(false_positive, true_positive, color=CLASS_COLOURS[name], linewidth=1.8, label=f"{shown}, {auroc}")
    axes.set_aspect("equal")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("false positive rate (1 − specificity)")
    axes.set_ylabel("true positive rate (sensitivity)")
    axes.legend(loc="lower right", fontsize=10, frameon=True, edgecolor="none", framealpha=0.85)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as PNG at 150 dpi, whole or not at all."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of `width` x `height` inches in the house's style."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)
    axes.tick_params(labelsize=10, color=_QUIET, labelcolor=INK)
    axes.xaxis.label.set(fontsize=11, color=INK)
    axes.yaxis.label.set(fontsize=11, color=INK)
    return figure, axes
