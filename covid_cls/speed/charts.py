"""A result as a picture."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from covid_cls.speed.clock import PARTS
from covid_cls.speed.measure import SIDES

_INK, _QUIET, _OURS, _BARE = "#22262B", "#8A8F98", "#0072B2", "#A9CCE3"
_PART_COLOURS = {"data": "#E69F00", "forward": "#56B4E9", "backward": "#0072B2"}  # Okabe and Ito's


def result_chart(result: dict[str, Any], title: str) -> Figure:
    """Images per second of both sides and of bare steps; beside it what an image's milliseconds go into.

    A thin line spans the slowest and the fastest of a side's rounds.
    """
    figure, (left, right) = _canvas(11.0, 3.6, 2)
    ratio = result["ratio"]
    title = f"{title}: {ratio['median']:.2f} times as fast ({ratio['least']:.2f} to {ratio['most']:.2f})"
    figure.suptitle(title, fontsize=13, color=_INK, x=0.015, ha="left")
    plain, ours, bare = result["plain"], result["ours"], result["bare"]
    names = [result["baseline"], "covid_cls", "covid_cls, images\nready on the device"]
    speeds = [side["images_per_second"] for side in (plain, ours, bare)]
    left.barh(names, speeds, height=0.62, color=[_QUIET, _OURS, _BARE])
    ends = []
    for row, (speed, seconds) in enumerate(zip(speeds, [result["rounds"][side] for side in SIDES] + [[]], strict=True)):
        spread = [result["images"]["images"] / one for one in seconds] or [speed]
        left.plot([min(spread), max(spread)], [row, row], color=_INK, linewidth=1.2)
        ends.append(max(spread))
        left.text(ends[-1], row, f" {speed:,.0f}" if speed >= 100 else f" {speed:.1f}", va="center", color=_INK)
    left.set_xlim(0, 1.15 * max(ends))
    left.set_xlabel("images per second")
    parts = [[side["ms_per_image"][part] for side in (plain, ours)] for part in PARTS]
    start = [0.0, 0.0]
    for part, widths in zip(PARTS, parts, strict=True):
        right.barh(names[:2], widths, left=start, height=0.62, color=_PART_COLOURS[part], label=part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for row, total in enumerate(start):
        right.text(total, row, f" {total:.2f}" if total < 10 else f" {total:.1f}", va="center", color=_INK)
    right.set_xlim(0, 1.15 * max(start))
    right.set_xlabel("milliseconds per image")
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=10, labelcolor=_INK)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return figure


def growth_chart(records: Sequence[dict[str, Any]]) -> Figure:
    """Memory, time before training and speed against the number of images."""
    figure, (memory, before, speed) = _canvas(11.0, 3.4, 3)
    images = [record["images"] for record in records]
    peaks = [None if r["peak_bytes"] is None else r["peak_bytes"] / 1e6 for r in records]
    for axes, values, label in (
        (memory, peaks, "peak memory, MB"),
        (before, [r["build_seconds"] for r in records], "seconds to decode the set"),
        (speed, [r["images_per_second"] for r in records], "images per second, loader"),
    ):
        drawn = [(n, value) for n, value in zip(images, values, strict=True) if value is not None]
        axes.plot(*zip(*drawn, strict=True), color=_OURS, linewidth=1.8, marker="o", markersize=4)
        axes.set_ylim(0, 1.08 * max(value for _, value in drawn))
        axes.set_xlim(0, 1.04 * max(images))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.6g}")
        axes.set_xlabel("images")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    return figure


def _canvas(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    axes = list(figure.subplots(1, columns))
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(_QUIET)
        one.tick_params(labelsize=10, color=_QUIET, labelcolor=_INK)
        one.xaxis.label.set(fontsize=11, color=_INK)
        one.yaxis.label.set(fontsize=11, color=_INK)
    return figure, axes
