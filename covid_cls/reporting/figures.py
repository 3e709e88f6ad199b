"""Figures of runs, evaluations, sweeps and attribution maps."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import precision_recall_curve, roc_curve

from covid_cls.evaluation.calibration import reliability
from covid_cls.evaluation.intervals import Interval, proportion_interval
from covid_cls.evaluation.metrics import Floats, Indices, class_scores, decide, positives, roc_points
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.io import DISCLAIMER, atomic_file
from covid_cls.reporting.style import CLASS_COLOURS, INK, KIND_COLOURS, QUIET, QUIET_TEXT, SPLIT_COLOURS
from covid_cls.tasks import POSITIVE, Task

# Importing it takes seconds, for torch, which only `overlay` and `contact_sheet` need.
if TYPE_CHECKING:
    from covid_cls.attribution.map_metrics import MappedImage

_DASHES = (0, (4, 3))
_AFTER, _BEFORE = CLASS_COLOURS["covid"], QUIET
# Light enough for INK to be legible on the darkest shade.
_SHARES = LinearSegmentedColormap.from_list("shares", ["#F3F6F9", "#5B9BC9"])
# Its lightness increases evenly, and colour-blind readers can tell its colours apart.
_MAP_COLOURS = "viridis"
# Opacity where a map is highest: bones and opacities stay visible below it.
_MAP_OPACITY = 0.7
_LABEL_CHARACTERS = 36  # per line
# Points per curve: enough at the size of a panel, and the page of 24 configurations stays below 3 MB.
_CURVE_POINTS = 60


class Mark(NamedTuple):
    """A row of a chart of intervals.

    Attributes:
        label: Text to the left of the row.
        interval: The score and its interval.
        kind: "network", "baseline" or "published".
    """

    label: str
    interval: Interval
    kind: str


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG at 150 dpi, atomically."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def learning_curves(history: pd.DataFrame, metric: str, *, best_epoch: int | None = None) -> Figure:
    """Draw a metric over the epochs, with a curve for training and one for validation.

    Args:
        history: Columns `epoch`, `{metric}/train` and `{metric}/val`. The latter two may be missing or hold nan.
        metric: For example "loss".
        best_epoch: The epoch whose weights were selected, which is marked by a vertical line.
    """
    figure, axes = _canvas(6.4, 4.0)
    for split, colour in SPLIT_COLOURS.items():
        # Validation may not run in every epoch; the curve connects those in which it did.
        curve = history.reindex(columns=["epoch", f"{metric}/{split}"]).dropna()
        if len(curve):
            # A single epoch would give no visible line.
            marker = "o" if len(curve) <= 15 else None
            axes.plot(*curve.to_numpy().T, color=colour, linewidth=1.8, marker=marker, markersize=4, label=split)
    if not axes.lines:
        _show_text(axes, f"no {metric} was logged")
    if best_epoch is not None:
        axes.axvline(best_epoch, color=INK, linewidth=0.8, linestyle=_DASHES, label=f"selected: epoch {best_epoch}")
    axes.set(xlabel="epoch", ylabel="accuracy (fraction of images)" if metric == "accuracy" else metric)
    if history["epoch"].nunique() == 1:
        axes.set_xticks([int(history["epoch"].iloc[0])])
    elif axes.lines:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    if axes.get_legend_handles_labels()[0]:
        _legend_above(axes, 10)
    return figure


def confusion_matrix(counts: npt.ArrayLike, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix: rows are the truth, columns the decision.

    Args:
        counts: Number of images, shape (K, K). Below it, and as its shade, each field shows the share of its row.
        classes: Names in the order of the rows.
        title: Text above the figure.
    """
    fields = np.asarray(counts)
    totals = fields.sum(axis=1, keepdims=True)
    shares = fields / np.maximum(totals, 1)
    size = 1.9 + 1.15 * len(classes)
    figure, axes = _canvas(size + 0.5, size)
    axes.imshow(shares, cmap=_SHARES, vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(fields):
        share = f"{shares[row, column]:.1%}" if totals[row, 0] else "–"
        axes.text(column, row, f"{count}\n{share}", ha="center", va="center", color=INK, fontsize=12)
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), [f"{name}\nn = {n}" for name, n in zip(classes, totals[:, 0], strict=True)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="decision", ylabel="truth")
    axes.set_title(title, fontsize=12, color=INK, wrap=True)
    return figure


def roc_curves(table: pd.DataFrame, task: Task) -> Figure:
    """Draw the ROC curve of each class against the rest, with its AUROC in the legend.

    In a multilabel task a covid image is positive for pneumonia too, as the legend states. A class whose AUROC is
    undefined has no curve but is in the legend.

    Args:
        table: Predictions table.
        task: Task of the table.

    Raises:
        InputError: If the table is invalid, see `truth_and_prob`.
    """
    truth, prob = truth_and_prob(table, task)
    scores = class_scores(truth, prob, decide(prob, task), task)
    points = roc_points(truth, prob, task)
    figure, axes = _unit_square(5.2, 5.2, "false positive rate (1 − specificity)", "true positive rate (sensitivity)")
    _diagonal(axes, "chance, AUROC 0.5")
    for name in task.classes:
        shown = f"{name} (with covid)" if task.multilabel and name == "pneumonia" else name
        auroc = f"AUROC {scores[name]['auroc']:.3f}" if name in points else "AUROC undefined"
        x, y = points.get(name, ([], []))
        axes.plot(x, y, color=CLASS_COLOURS[name], linewidth=1.8, label=f"{shown}, {auroc}")
    axes.set_aspect("equal")
    # It may cover a poor curve, which must stay visible below it.
    axes.legend(loc="lower right", fontsize=10, frameon=True, edgecolor="none", framealpha=0.85)
    return figure


def reliability_curves(calibration: dict[str, Any]) -> Figure:
    """Draw the share of covid images against the mean p(covid) of ten bins, before and after temperature scaling.

    Args:
        calibration: That part of an evaluation's record. Without a temperature, there is one curve. Bars are 95 %
            Wilson intervals of the last curve, as if images were independent.
    """
    figure, axes = _unit_square(4.6, 4.4, "p(covid), mean of a bin", "share that is covid")
    _diagonal(axes)
    after = calibration["after"]
    curves = [("before", calibration["before"], _BEFORE if after else _AFTER)]
    curves += [(f"after, T = {calibration['temperature']:.2f}", after, _AFTER)] if after else []
    for name, part, colour in curves:
        bins = part["covid_reliability"]
        x, y = ([bin_[key] for bin_ in bins] for key in ("mean_prob", "share"))
        axes.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=4, label=name)
    # `bins` and `colour` are those of the last curve.
    ends = [proportion_interval(bin_["events"], bin_["n"]) for bin_ in bins]
    reach = [[i.value - i.low for i in ends], [i.high - i.value for i in ends]]
    axes.errorbar(x, y, yerr=reach, fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.6)
    _legend_above(axes)
    return figure


def decision_curves(curve: dict[str, list[float | None]]) -> Figure:
    """Draw the net benefit over the threshold of p(covid), for the model, for treating all and for treating none."""
    figure, axes = _canvas(4.6, 3.9)
    styles = {"treat_none": (INK, 0.8, "-"), "treat_all": (QUIET, 1.4, _DASHES), "model": (_AFTER, 1.8, "-")}
    # An undefined value is None in JSON and becomes nan here.
    values = {name: np.array(column, dtype=np.float64) for name, column in curve.items()}
    for name, (colour, width, style) in styles.items():
        label = name.replace("_", " ")
        axes.plot(values["threshold"], values[name], color=colour, linewidth=width, linestyle=style, label=label)
    top = np.nanmax([0.05, *values["model"], *values["treat_all"]])
    axes.set(xlim=(0, 1), ylim=(-0.3 * top, 1.08 * top), xlabel="threshold of p(covid)", ylabel="net benefit")
    _legend_above(axes)
    return figure


def interval_chart(marks: Sequence[Mark], metric: str, chance: float | None) -> Figure:
    """Draw scores as dots and their intervals as bars, a row per mark from top to bottom.

    Args:
        marks: The rows.
        metric: Name of the score.
        chance: Score of guessing, which is marked by a vertical line; None for no line.
    """
    labels = [fill(mark.label, _LABEL_CHARACTERS) for mark in marks]
    figure, axes = _canvas(7.2, 1.3 + 0.27 * len(marks) + 0.17 * sum(label.count("\n") for label in labels))
    for row, mark in enumerate(marks):
        colour = KIND_COLOURS[mark.kind]
        axes.plot([mark.interval.low, mark.interval.high], [row, row], color=colour, linewidth=2, alpha=0.55)
        axes.plot([mark.interval.value], [row], color=colour, marker="o", markersize=5, linestyle="none")
    if chance is not None:
        axes.axvline(chance, color=QUIET, linewidth=0.8, linestyle=_DASHES)
        axes.annotate("chance", (chance, 1), xycoords=("data", "axes fraction"), fontsize=9, color=QUIET, ha="center")
    axes.set_yticks(range(len(marks)), labels)
    axes.set_ylim(len(marks) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(metric)
    # Empty curves, which give one entry per kind in the legend.
    for kind, colour in KIND_COLOURS.items():
        if any(mark.kind == kind for mark in marks):
            axes.plot([], [], color=colour, marker="o", markersize=5, linestyle="none", label=kind)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9, borderaxespad=0.3, labelcolor=INK
    )
    return figure


def roc_panel(tables: Sequence[pd.DataFrame], task: Task) -> Figure:
    """Draw the true over the false positive rate, a curve per class and table (one table per seed)."""
    figure, axes = _unit_square(3.6, 3.3, "false positive rate", "true positive rate")
    _diagonal(axes)
    for name, target, score in _class_targets(tables, task):
        false_positive, true_positive, _ = roc_curve(target, score)
        _draw_curve(axes, false_positive, true_positive, name, len(tables))
    _class_legend(axes, task, "lower right")
    return figure


def precision_recall_panel(tables: Sequence[pd.DataFrame], task: Task) -> Figure:
    """Draw precision (PPV) over recall (sensitivity), a curve per class and table (one table per seed)."""
    figure, axes = _unit_square(3.6, 3.3, "recall (sensitivity)", "precision (PPV)")
    for name, target, score in _class_targets(tables, task):
        precision, recall, _ = precision_recall_curve(target, score)
        _draw_curve(axes, recall, precision, name, len(tables))
    _class_legend(axes, task, "lower left")
    return figure


def reliability_panel(tables: Sequence[pd.DataFrame], task: Task) -> Figure:
    """Draw the share of covid images over p(covid) in ten bins, a curve per table (one table per seed).

    The area of a dot grows with the number of images in its bin.
    """
    figure, axes = _unit_square(3.6, 3.3, "p(covid), mean of a bin", "share that is covid")
    _diagonal(axes)
    for name, target, score in _class_targets(tables, task):
        if name == POSITIVE:
            bins = reliability(score, target)
            x, y = ([bin_[key] for bin_ in bins] for key in ("mean_prob", "share"))
            axes.plot(x, y, color=CLASS_COLOURS[name], linewidth=1, alpha=0.8)
            sizes = [6 + 60 * bin_["n"] / len(score) for bin_ in bins]
            axes.scatter(x, y, s=sizes, color=CLASS_COLOURS[name], alpha=0.8, linewidths=0)
    return figure


def loss_panel(histories: Sequence[pd.DataFrame]) -> Figure:
    """Draw the loss over the epochs, in training and validation: its mean over runs, and its range as a band."""
    figure, axes = _canvas(3.6, 3.3)
    columns = ["epoch", *(f"loss/{split}" for split in SPLIT_COLOURS)]
    rows = (pd.concat(histories) if histories else pd.DataFrame()).reindex(columns=columns)
    for split, colour in SPLIT_COLOURS.items():
        band = rows.dropna(subset=[f"loss/{split}"]).groupby("epoch")[f"loss/{split}"].agg(["mean", "min", "max"])
        if len(band):
            band = band.iloc[_thin(len(band))]
            axes.fill_between(band.index, band["min"], band["max"], color=colour, alpha=0.2, linewidth=0)
            marker = "o" if len(band) == 1 else None
            axes.plot(band.index, band["mean"], color=colour, linewidth=1.6, marker=marker, label=split)
    if axes.lines:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=INK)
    else:
        _show_text(axes, "no history was kept")
    axes.set(xlabel="epoch", ylabel="loss")
    return figure


def overlay(image: "MappedImage", method: str) -> Figure:
    """Draw a radiograph as the network sees it and, next to it, with its map and the outline of the lungs if known."""
    figure = _map_figure(7.4, 4.2, f"p: calibrated probability. {DISCLAIMER}")
    plain, mapped = figure.subplots(1, 2)
    plain.imshow(image.canvas, cmap="gray", vmin=0, vmax=255)
    plain.set_axis_off()
    _draw_map(mapped, image)
    # parse_math=False: a $ in a file name must not start a formula.
    figure.suptitle(_shorten(image.row["image_id"], 80), fontsize=10, color=INK, parse_math=False)
    label = f", label: {image.row['label']}" if image.row["label"] else ""
    plain.set_title(f"decision: {image.row['decision']}{label}", fontsize=9, color=INK)
    mapped.set_title(f"{method} map for {_target_text(image)}", fontsize=9, color=INK)
    _colour_bar(figure, [mapped], "right", shrink=0.8)
    return figure


def contact_sheet(images: Sequence["MappedImage"], title: str, method: str) -> Figure:
    """Draw the maps of one or more images over their radiographs, with class, probability and label."""
    columns = min(6, max(3, len(images)))
    rows = math.ceil(len(images) / columns)
    note = f"{method} maps; p: calibrated probability. {DISCLAIMER}"
    figure = _map_figure(1.9 * columns, 2.3 * rows + 0.9, note)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image in zip(grid.flat, images, strict=False):
        _draw_map(axes, image)
        lines = [_shorten(f"{image.number + 1}: {Path(image.row['image_id']).name}", 30), _target_text(image)]
        lines += [f"label: {image.row['label']}"] if image.row["label"] else []
        axes.set_title("\n".join(lines), fontsize=7, color=INK, parse_math=False)
    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    _colour_bar(figure, grid.ravel().tolist(), "bottom", shrink=0.4)
    return figure


def image_sheet(images: Sequence[npt.NDArray[np.uint8]], captions: Sequence[str], columns: int = 6) -> Figure:
    """Draw uint8 images (H, W) row by row, each below its caption. Black is 0 and white 255 in every image."""
    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure((1.5 * columns, 1.75 * rows), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        grid[k].imshow(image, cmap="gray", vmin=0, vmax=255)
        grid[k].set_title(caption, fontsize=8, color=INK)
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of `width` x `height` inches."""
    # Not by pyplot, which keeps every figure in memory and is not safe for threads.
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(labelsize=10, color=QUIET, labelcolor=INK)
    axes.xaxis.label.set(fontsize=11, color=INK)
    axes.yaxis.label.set(fontsize=11, color=INK)
    return figure, axes


def _unit_square(width: float, height: float, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure, axes = _canvas(width, height)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _diagonal(axes: Axes, label: str | None = None) -> None:
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, linestyle=_DASHES, label=label)


def _show_text(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=QUIET)
    axes.set(xticks=[], yticks=[])


def _legend_above(axes: Axes, size: float = 9) -> None:
    # Above the axes, a legend cannot cover a curve.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=size, labelcolor=INK)


def _class_legend(axes: Axes, task: Task, where: Literal["lower left", "lower right"]) -> None:
    for name in task.classes:
        axes.plot([], [], color=CLASS_COLOURS[name], linewidth=1.5, label=name)
    axes.legend(loc=where, fontsize=9, frameon=False, labelcolor=INK)


def _class_targets(tables: Sequence[pd.DataFrame], task: Task) -> Iterator[tuple[str, Indices, Floats]]:
    """Yield class, 0/1 targets and probabilities of each table and each class with positive and negative images."""
    for table in tables:
        truth, prob = truth_and_prob(table, task)
        for name, target, score in zip(task.classes, positives(truth, task).T, prob.T, strict=True):
            if 0 < target.sum() < len(target):
                yield name, target, score


def _draw_curve(axes: Axes, x: Floats, y: Floats, name: str, seeds: int) -> None:
    kept = _thin(len(x))
    axes.plot(x[kept], y[kept], color=CLASS_COLOURS[name], linewidth=1.5 if seeds == 1 else 1.0, alpha=0.85)


def _thin(n: int) -> Indices:
    """Return the positions of at most `_CURVE_POINTS` of n points, including the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, _CURVE_POINTS)).round().astype(np.int64))


def _map_figure(width: float, height: float, note: str) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05), facecolor="white")
    figure.supxlabel(note, fontsize=8, color=QUIET_TEXT)
    return figure


def _draw_map(axes: Axes, image: "MappedImage") -> None:
    axes.set_axis_off()
    axes.imshow(image.canvas, cmap="gray", vmin=0, vmax=255)
    axes.imshow(image.heat, cmap=_MAP_COLOURS, vmin=0, vmax=1, alpha=_MAP_OPACITY * image.heat)
    # An empty or a full mask has no outline.
    if image.lungs is not None and image.lungs.any() and not image.lungs.all():
        axes.contour(image.lungs, levels=[0.5], colors="white", linewidths=0.8)


def _colour_bar(figure: Figure, axes: list[Axes], where: str, shrink: float) -> None:
    scale = ScalarMappable(cmap=_MAP_COLOURS)
    bar = figure.colorbar(scale, ax=axes, location=where, shrink=shrink, aspect=30, pad=0.02)
    bar.set_label("share of the map's own highest value", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, color=QUIET_TEXT, labelcolor=INK)
    bar.outline.set_visible(False)


def _target_text(image: "MappedImage") -> str:
    target = image.row["target"]
    return f"{target}, p = {image.row[f'calibrated_{target}']:.2f}"


def _shorten(name: str, length: int) -> str:
    """Return at most `length` characters of a name, leaving out its middle, with "?" for those that fonts may lack."""
    plain = name.encode("ascii", "replace").decode()
    return plain if len(plain) <= length else f"{plain[: length // 3]}…{plain[-(length - length // 3 - 1) :]}"
