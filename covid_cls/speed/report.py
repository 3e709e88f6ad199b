"""A result in words: what was measured on, a table for the console, a section for a Markdown file."""

import datetime
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import covid_cls
from covid_cls.machine import cores
from covid_cls.records import whole_file

Rows = list[tuple[str, ...]]
_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "numpy", "pillow", "opencv-python-headless")


def surroundings() -> dict[str, Any]:
    """`date` (local, to the second), `hardware` and `versions`, in plain values."""
    hardware = {
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }
    versions = {"covid_cls": covid_cls.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in _PACKAGES}
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": hardware,
        "versions": versions,
    }


def headline(result: dict[str, Any]) -> str:
    """The ratio with its spread in one sentence."""
    ratio, rounds = result["ratio"], len(result["rounds"]["ratios"])
    return (
        f"covid_cls trains {ratio['median']:.2f} times as fast as the {result['baseline']} "
        f"(ratio of medians; {ratio['least']:.2f} to {ratio['most']:.2f} over {rounds} rounds)"
    )


def result_rows(result: dict[str, Any]) -> Rows:
    """A heading and a row per quantity: its name, the plain side, covid_cls."""
    plain, ours = result["plain"], result["ours"]
    both = (plain, ours)
    rows: Rows = [("", str(result["baseline"]), "covid_cls")]
    rows.append(("precision", *(side["precision"] for side in both)))
    rows.append(("images/s", *(_number(side["images_per_second"]) for side in both)))
    rows.append(("images/s, loader alone", *(_number(side["loader_images_per_second"]) for side in both)))
    rows.append(("images/s, step alone, image on the device", "", _number(result["bare"]["images_per_second"])))
    rows.append(("share of that speed in training", "", f"{result['bare']['share']:.0%}"))
    for part in ("data", "forward", "backward"):
        rows.append((f"ms per image, {part}", *(f"{side['ms_per_image'][part]:.3f}" for side in both)))
    rows.append(("GFLOP per image", *(f"{side['gflop_per_image']:.2f}" for side in both)))
    rows.append(("share of the device's measured peak", *(f"{side['share_of_peak']:.0%}" for side in both)))
    for place, name in (("host", "process"), ("device", "GPU")):
        if ours["peak_memory_mb"][place] is not None:
            held = (f"{side['peak_memory_mb'][place]:,.0f}" for side in both)
            rows.append((f"peak memory of the {name}, MB", *held))
    if result["to_epochs"]:
        times = result["to_epochs"]
        cells = (f"{times['plain']['seconds']:.1f} (extrapolated)", f"{times['ours']['seconds']:.1f}")
        rows.append((f"seconds to {times['epochs']} epoch{'s' * (times['epochs'] > 1)} from cold", *cells))
        for part, words in (("store", "decoding"), ("prepare", "frozen stages"), ("fit", "fit, with validation")):
            rows.append((f"- of these: {words}", "", f"{times['ours'][part]:.1f}"))
    if result.get("start"):
        medians = result["start"]["medians"]
        rows.append(("seconds from the command to the first step", "", f"{medians['first_step']:.1f}"))
        rows.append(("- of these: importing torch, Lightning, torchvision", "", f"{medians['imports']:.1f}"))
    return rows


def growth_rows(records: Sequence[dict[str, Any]]) -> Rows:
    """A heading and a row per number of images."""
    rows: Rows = [("images", "store, MB", "build, s", "reopen, s", "epoch, s", "images/s", "peak, MB")]
    for r in records:
        seconds = (f"{r[key]:.2f}" for key in ("build_seconds", "reopen_seconds", "epoch_seconds"))
        peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:,.0f}"
        store = f"{r['store_bytes'] / 1e6:,.0f}"
        rows.append((f"{r['images']:,}", store, *seconds, _number(r["images_per_second"]), peak))
    return rows


def markdown_section(title: str, lead: str, result: dict[str, Any], rows: Rows) -> str:
    """A section with date, hardware, versions, the command and a table. result: with `surroundings` and `command`."""
    hardware = result["hardware"]
    place = f"{hardware['gpu']}; " if hardware["gpu"] else ""
    place += f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, {hardware['system']}"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    heading, *body = ["| " + " | ".join(row) + " |" for row in rows]
    parts = [
        f"### {result['date'][:10]}: {title}",
        f"{place}.\n{versions}.",
        f"```sh\n{result['command']}\n```",
        *([lead] if lead else []),
        "\n".join([heading, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body]),
        *(["\n".join(f"- {note}" for note in result["notes"])] if result["notes"] else []),
    ]
    return "\n\n".join(parts) + "\n"


def append_section(path: Path, section: str) -> None:
    """Add `section` at the end of the Markdown file `path`, which is made if need be; whole or not at all."""
    before = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n" if path.is_file() else ""
    with whole_file(path) as file:
        file.write((before + section).encode())


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
