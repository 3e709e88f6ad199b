"""Maps over their radiographs: one image at a time, and many on a sheet."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from covid_cls.records import DISCLAIMER
from covid_cls.reporting.explanations import MappedImage
from covid_cls.reporting.figures import INK

_COLOURS = mpl.colormaps["viridis"]  # even in lightness, told apart by colour-blind readers
_DENSEST = 0.7  # opacity where a map is highest: bones and opacities stay visible beneath
_QUIET = "#5D646D"


def overlay(image: MappedImage, method: str) -> Figure:
    """The radiograph as the network sees it, beside it the map over it, with the lungs' outline where it is known."""
    figure = Figure(figsize=(7.4, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06), facecolor="white")
    plain, mapped = figure.subplots(1, 2)
    plain.imshow(image.canvas, cmap="gray", vmin=0, vmax=255)
    _draw_map(mapped, image)
    for axes in (plain, mapped):
        axes.set_axis_off()
    figure.suptitle(_short(image.row["image_id"], 80), fontsize=10, color=INK, parse_math=False)
    decided = ", ".join([f"decision: {image.row['decision']}", *_label(image)])
    plain.set_title(decided, fontsize=9, color=INK)
    mapped.set_title(f"{method} map for {_score(image)}", fontsize=9, color=INK)
    _colour_bar(figure, [mapped], "right")
    figure.supxlabel(f"p: calibrated probability. {DISCLAIMER}", fontsize=8, color=_QUIET)
    return figure


def contact_sheet(images: Sequence[MappedImage], title: str, method: str) -> Figure:
    """The maps of at least one image over their radiographs, with class, probability and label."""
    columns = min(6, max(3, len(images)))
    rows = math.ceil(len(images) / columns)
    figure = Figure(
        figsize=(1.9 * columns, 2.3 * rows + 0.9),
        layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04),
        facecolor="white",
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image in zip(grid.flat, images, strict=False):
        _draw_map(axes, image)
        name = _short(f"{image.number + 1}: {Path(image.row['image_id']).name}", 30)
        axes.set_title("\n".join([name, _score(image), *_label(image)]), fontsize=7, color=INK, parse_math=False)
    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    _colour_bar(figure, grid.ravel().tolist(), "bottom")
    figure.supxlabel(f"{method} maps; p: calibrated probability. {DISCLAIMER}", fontsize=8, color=_QUIET)
    return figure


def _draw_map(axes: Axes, image: MappedImage) -> None:
    axes.imshow(image.canvas, cmap="gray", vmin=0, vmax=255)
    axes.imshow(_coloured(image.heat))
    if image.lungs is not None and image.lungs.any() and not image.lungs.all():
        axes.contour(image.lungs, levels=[0.5], colors="white", linewidths=0.8)


def _coloured(heat: NDArray[np.float32]) -> NDArray[np.float64]:
    """RGBA of values in [0, 1]: the lower, the clearer."""
    rgba = np.asarray(_COLOURS(heat), dtype=np.float64)
    rgba[..., 3] = _DENSEST * heat
    return rgba


def _colour_bar(figure: Figure, beside: list[Axes], where: str) -> None:
    shrink = 0.8 if where == "right" else 0.4
    bar = figure.colorbar(ScalarMappable(cmap=_COLOURS), ax=beside, location=where, shrink=shrink, aspect=30, pad=0.02)
    bar.set_label("share of the map's own highest value", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, color=_QUIET, labelcolor=INK)
    bar.outline.set_visible(False)


def _score(image: MappedImage) -> str:
    target = image.row["target"]
    return f"{target}, p = {image.row[f'calibrated_{target}']:.2f}"


def _label(image: MappedImage) -> list[str]:
    return [f"label: {image.row['label']}"] if image.row["label"] else []


def _short(name: str, most: int) -> str:
    """`name` in `most` characters that the font has: the middle is left out."""
    plain = name.encode("ascii", "replace").decode()
    return plain if len(plain) <= most else f"{plain[: most // 3]}…{plain[-(most - most // 3 - 1) :]}"
