"""The two sides in turn, and what is to be known of them besides."""

import logging
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from covid_cls.errors import InputError
from covid_cls.labels import TASKS
from covid_cls.speed.child import Child, in_child
from covid_cls.speed.clock import PARTS
from covid_cls.speed.ours import cold_fit, run_ours, staged_settings
from covid_cls.speed.peak import count_flops, dtype_name
from covid_cls.speed.plain import run_plain
from covid_cls.speed.plain_lightning import run_plain_lightning
from covid_cls.speed.staging import stage_images, usable_images

log = logging.getLogger(__name__)
SIDES = ("plain", "ours")
_BUSY = 0.5  # processes that want a core
_NOTES = (
    "Rounds time an epoch from its start to the end of its last training step. Of covid_cls, validation, the epoch's "
    "metrics, logging and checkpoints lie outside; what it is compared with has none of them.",
    "What it is compared with trains from random weights, with cross-entropy, rotation, centre crop and mirror; frozen "
    "batch norms are in training mode there.",
    "Peak memory: of the process that trains, at the end of its first epoch; libraries included, workers not.",
)


def check_options(settings: dict[str, Any]) -> None:
    """InputError where one of the benchmark's own keys, or a trainer on several devices, cannot be measured with."""
    classes = len(TASKS[settings["task"]["name"]].classes)
    workers, growth = settings["plain"]["workers"], settings["growth"]
    if growth is not None and not (isinstance(growth, list) and growth):
        raise InputError(f"growth={growth}: must be a list of numbers of images, such as [1000,2000]")
    for key, value, least in (
        ("images", 2 * classes if settings["images"] is None else settings["images"], 2 * classes),
        ("rounds", settings["rounds"], 1),
        ("epochs", settings["epochs"], 0),
        ("plain.workers", workers, 0),
        *(("growth", count, 1) for count in growth or []),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{key}={value}: must be a whole number of at least {least}")
    for key, value in (("start", settings["start"]), ("plain.lightning", settings["plain"]["lightning"])):
        if not isinstance(value, bool):
            raise InputError(f"{key}={value}: must be true or false")
    devices = settings["trainer"].get("devices", 1)
    several = len(devices) > 1 if isinstance(devices, list) else str(devices) != "1"
    if several or settings["trainer"].get("strategy", "auto") != "auto":
        raise InputError("the benchmark measures one device: leave trainer=ddp, trainer.strategy and devices alone")


def measure(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `summarise` makes of the rounds, with the device's peak and the time from cold; scratch lies in `folder`."""
    task = TASKS[settings["task"]["name"]]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    flops = count_flops(settings)
    table = usable_images(settings["data"], task)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as name:
        scratch = Path(name)
        others = max(settings["data"]["batch_size"], len(task.classes))
        staged = stage_images(table, task, settings["images"], others, scratch / "images", settings["seed"])
        found = run_rounds(settings, scratch)
        cold = None
        if settings["epochs"]:
            log.info("training %d epochs from cold", settings["epochs"])
            fresh = staged_settings(settings, scratch / "images", scratch / "cold", settings["epochs"])
            cold = in_child(cold_fit, fresh, scratch / "cold_run")
    result = {
        "images": staged.facts,
        "load_before": load,
        **summarise(found, staged.images, flops, cold, settings["epochs"]),
    }
    if staged.distinct < staged.images:
        result["notes"].append(f"{staged.distinct} files were repeated to make {staged.images} images.")
    if load > _BUSY:
        result["notes"].append(f"Before the run the machine's load average was {load:.1f}: not all of it was ours.")
    return result


def run_rounds(settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Both sides in turn: `rounds`, a list per side of an epoch's seconds and those of its parts, and more by side.

    A first epoch of each does not count. On a GPU the parts come from one further epoch, `profile`, which waits for the
    device at each mark; None elsewhere. loader, bare: seconds of bringing the images to the device, and seconds per
    image of training steps alone. peak: the best of `measure_peak` in each round.
    """
    images, rounds = scratch / "images", settings["rounds"]
    ours = staged_settings(settings, images, scratch / "cache", rounds + 3)
    plain = run_plain_lightning if settings["plain"]["lightning"] else run_plain
    with Child(run_ours, ours, scratch / "run") as b, Child(plain, settings, images, b.hello["device"]) as a:
        sides = {"plain": a, "ours": b}
        log.info("warming up: an epoch of each on %s", b.hello["device"])
        found: dict[str, Any] = {"device": b.hello["device"], "notes": b.hello["notes"], "bare": [], "peak": {}}
        for side in sides.values():
            side.ask("epoch")
        found["memory"] = {name: side.ask("memory") for name, side in sides.items()}
        found["precision"] = {name: side.hello["precision"] for name, side in sides.items()}
        found["rounds"], found["loader"] = {name: [] for name in sides}, {name: [] for name in sides}
        for number in range(1, rounds + 1):
            for word, kept in (("epoch", "rounds"), ("loader", "loader")):
                for name, side in sides.items():
                    found[kept][name].append(side.ask(word))
            found["bare"].append(b.ask("bare"))
            found["peak"] = _best(found["peak"], b.ask("peak"))
            first, second = (found["rounds"][name][-1]["seconds"] for name in SIDES)
            log.info(f"round {number}/{rounds}: plain {first:.3f} s, covid_cls {second:.3f} s, {first / second:.2f} x")
        gpu = found["device"] != "cpu"
        found["profile"] = {name: side.ask("profile") for name, side in sides.items()} if gpu else None
    return found


def summarise(
    found: dict[str, Any],
    images: int,
    flops: dict[str, float],
    cold: dict[str, float] | None,
    epochs: int,
) -> dict[str, Any]:
    """The result in plain values: `ratio` of the median epochs (plain / ours) with the least and most of the rounds.

    found: from `run_rounds`; images: of an epoch; flops, cold: from `count_flops` and `cold_fit`.
    The plain loop's time to `epochs` epochs is its median epoch times as many: it is extrapolated, and says so.
    """
    seconds = {side: [epoch["seconds"] for epoch in found["rounds"][side]] for side in SIDES}
    middle = {side: median(seconds[side]) for side in SIDES}
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    peak = found["peak"]
    result: dict[str, Any] = {
        "device": found["device"],
        "ratio": {"median": middle["plain"] / middle["ours"], "least": min(ratios), "most": max(ratios)},
        "rounds": {**seconds, "ratios": ratios},
        "peak_tflops": peak,
    }
    for side in SIDES:
        parts = [found["profile"][side]] if found["profile"] else found["rounds"][side]
        speed = images / middle[side]
        precision = found["precision"][side]
        result[side] = {
            "precision": precision,
            "images_per_second": speed,
            "ms_per_image": {part: 1000 * median(epoch[part] for epoch in parts) / images for part in PARTS},
            "loader_images_per_second": images / median(found["loader"][side]),
            "gflop_per_image": flops[side] / 1e9,
            "tflops": flops[side] * speed / 1e12,
            "share_of_peak": flops[side] * speed / 1e12 / max(peak[dtype_name(precision)].values()),
            "peak_memory_mb": found["memory"][side],
        }
    bare = 1 / median(found["bare"])
    result["bare"] = {"images_per_second": bare, "share": result["ours"]["images_per_second"] / bare}
    result["to_epochs"] = None
    if cold is not None:
        plain = {"seconds": epochs * middle["plain"], "extrapolated": True}
        result["to_epochs"] = {"epochs": epochs, "plain": plain, "ours": {**cold, "extrapolated": False}}
    result["notes"] = [*found["notes"], *_NOTES]
    if found["profile"]:
        result["notes"].append("data, forward, backward: from an epoch that waits for the GPU at each of these marks.")
    return result


def _best(known: dict[str, dict[str, float]], new: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The faster of two measurements of each product: on a busy machine one may lie below what training reaches."""
    return {
        dtype: {name: max(speed, known.get(dtype, {}).get(name, 0.0)) for name, speed in products.items()}
        for dtype, products in new.items()
    }
