"""Results of the benchmark as text, tables and charts."""

import datetime
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import covid_cls
from covid_cls.benchmarking.measure import SIDES
from covid_cls.benchmarking.timing import PARTS
from covid_cls.io import atomic_file
from covid_cls.reporting.style import INK, QUIET
from covid_cls.system import cores

Rows = list[tuple[str, ...]]
OURS, BARE = "#0072B2", "#A9CCE3"
# From the palette of Okabe and Ito, which colour-blind readers can tell apart.
PART_COLOURS = {"data": "#E69F00", "forward": "#56B4E9", "backward": "#0072B2"}
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "numpy", "pillow", "opencv-python-headless")


def surroundings() -> dict[str, Any]:
    """Return the local `date`, the `hardware` and the `versions` of the packages as plain values."""
    hardware = {
        "cpu": processor_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }
    versions = {"covid_cls": covid_cls.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in PACKAGES}
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"date": date, "hardware": hardware, "versions": versions}


def processor_name() -> str:
    """Return the model of the CPU, or its architecture if the system does not report a model."""
    # On Linux, platform.processor() is empty or only the architecture.
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def result_title(result: dict[str, Any]) -> str:
    """Return the network, how much of it is trained, the number of images and the device."""
    backbone, strategy = result["config"]["backbone"], result["config"]["strategy"]
    depth = strategy["freeze_until"] or strategy["name"]
    return f"{backbone['name']}, {depth}, {result['images']['images']} images on {result['device']}"


def headline(result: dict[str, Any]) -> str:
    """Return the ratio with its spread as one sentence."""
    ratio, rounds = result["ratio"], len(result["rounds"]["ratios"])
    return (
        f"covid_cls trains {ratio['median']:.2f} times as fast as the {result['baseline']} "
        f"(ratio of medians; {ratio['least']:.2f} to {ratio['most']:.2f} over {rounds} rounds)"
    )


def result_rows(result: dict[str, Any]) -> Rows:
    """Return a heading and a row per quantity: its name, the value of the plain side, the value of covid_cls."""
    both, bare, times = [result[side] for side in SIDES], result["bare"], result["to_epochs"]
    rows: Rows = [
        ("", str(result["baseline"]), "covid_cls"),
        ("precision", *(side["precision"] for side in both)),
        ("images/s", *(_number(side["images_per_second"]) for side in both)),
        ("images/s, loader alone", *(_number(side["loader_images_per_second"]) for side in both)),
        ("images/s, step alone, image on the device", "", _number(bare["images_per_second"])),
        ("share of that speed in training", "", f"{bare['share']:.0%}"),
        *((f"ms per image, {part}", *(f"{side['ms_per_image'][part]:.3f}" for side in both)) for part in PARTS),
        ("GFLOP per image", *(f"{side['gflop_per_image']:.2f}" for side in both)),
        ("share of the device's measured peak", *(f"{side['share_of_peak']:.0%}" for side in both)),
    ]
    for place, name in (("host", "process"), ("device", "GPU")):
        if both[1]["peak_memory_mb"][place] is not None:
            rows.append((f"peak memory of the {name}, MB", *(f"{side['peak_memory_mb'][place]:,.0f}" for side in both)))
    if times:
        plain, ours = times["plain"]["seconds"], times["ours"]
        name = f"seconds to {times['epochs']} epoch{'s' * (times['epochs'] > 1)} from an empty cache"
        rows.append((name, f"{plain:.1f} (extrapolated)", f"{ours['seconds']:.1f}"))
        for part, what in (("store", "decoding"), ("prepare", "frozen stages"), ("fit", "fit, with validation")):
            rows.append((f"- of these: {what}", "", f"{ours[part]:.1f}"))
    if result.get("start"):
        medians = result["start"]["medians"]
        rows.append(("seconds from the command to the first step", "", f"{medians['first_step']:.1f}"))
        rows.append(("- of these: importing torch, Lightning, torchvision", "", f"{medians['imports']:.1f}"))
    return rows


def growth_rows(records: Sequence[dict[str, Any]]) -> Rows:
    """Return a heading and a row per number of images."""
    rows: Rows = [("images", "store, MB", "build, s", "reopen, s", "epoch, s", "images/s", "peak, MB")]
    for record in records:
        store, peak = (f"{record[key] / 1e6:,.0f}" for key in ("store_bytes", "peak_bytes"))
        seconds = (f"{record[key]:.2f}" for key in ("build_seconds", "reopen_seconds", "epoch_seconds"))
        rows.append((f"{record['images']:,}", store, *seconds, _number(record["images_per_second"]), peak))
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def result_chart(result: dict[str, Any], title: str) -> Figure:
    """Draw the images per second of both sides and of steps alone, and the milliseconds per image by part.

    A thin line spans the slowest and the fastest round of a side.
    """
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ratio = result["ratio"]
    title = f"{title}: {ratio['median']:.2f} times as fast ({ratio['least']:.2f} to {ratio['most']:.2f})"
    figure.suptitle(title, fontsize=13, x=0.015, ha="left")
    names = [result["baseline"], "covid_cls", "covid_cls, images\nready on the device"]
    speeds = [result[side]["images_per_second"] for side in (*SIDES, "bare")]
    spread = [[result["images"]["images"] / seconds for seconds in result["rounds"][side]] for side in SIDES]
    # Steps alone have no rounds to show.
    spread.append(speeds[2:])
    errors = np.array([[speed - min(s), max(s) - speed] for speed, s in zip(speeds, spread, strict=True)]).T
    bars = left.barh(names, speeds, 0.62, xerr=errors, ecolor=INK, color=[QUIET, OURS, BARE])
    left.bar_label(bars, [_number(speed) for speed in speeds], padding=4)
    left.set_xlabel("images per second")
    start = np.zeros(2)
    for part in PARTS:
        widths = [result[side]["ms_per_image"][part] for side in SIDES]
        bars = right.barh(names[:2], widths, 0.62, left=start, color=PART_COLOURS[part], label=part)
        start = start + widths
    right.bar_label(bars, [f"{total:.2f}" if total < 10 else f"{total:.1f}" for total in start], padding=4)
    right.set_xlabel("milliseconds per image")
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    for axes in (left, right):
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return figure


def growth_chart(records: Sequence[dict[str, Any]]) -> Figure:
    """Draw memory, time before training and speed against the number of images."""
    figure = Figure(figsize=(11.0, 3.4), layout="constrained")
    images = [record["images"] for record in records]
    quantities = (
        ("peak_bytes", 1e6, "peak memory, MB"),
        ("build_seconds", 1, "seconds to decode the set"),
        ("images_per_second", 1, "images per second, loader"),
    )
    for axes, (key, unit, label) in zip(figure.subplots(1, 3), quantities, strict=True):
        axes.plot(images, [record[key] / unit for record in records], color=OURS, marker="o", markersize=4)
        # Both axes start at 0, so that a cost in proportion to the images is a line through the corner.
        axes.set(xlabel="images", ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.6g}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    return figure


def markdown_section(title: str, lead: str, result: dict[str, Any], rows: Rows) -> str:
    """Return a Markdown section with date, hardware, versions, command and a table.

    Args:
        title: Heading of the section.
        lead: A sentence above the table; "" for none.
        result: With the values of `surroundings`, `command` and `notes`.
        rows: The table, its heading first.
    """
    hardware = result["hardware"]
    place = f"{hardware['gpu']}; " if hardware["gpu"] else ""
    place += f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, {hardware['system']}"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    # pandas could write the table, but only with a further package.
    heading, *body = ["| " + " | ".join(row) + " |" for row in rows]
    parts = [
        f"### {result['date'][:10]}: {title}",
        f"{place}.\n{versions}.",
        f"```sh\n{result['command']}\n```",
        lead,
        "\n".join([heading, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body]),
        "\n".join(f"- {note}" for note in result["notes"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def append_section(path: Path, section: str) -> None:
    """Add `section` at the end of the Markdown file `path` atomically; create the file if it does not exist."""
    before = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n" if path.is_file() else ""
    with atomic_file(path) as file:
        file.write((before + section).encode())
