"""One run folder as a report reads it: its record, its place in a grid, and its test predictions."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pandas as pd

from covid_cls.errors import InputError, listed
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.labels import TASKS, Task
from covid_cls.records import read_json, read_predictions
from covid_cls.reporting.ledger import Openings, record_opening

# What tells one cell from another at a glance, in the order in which a name gives it.
AXES = ("backbone", "strategy", "loss", "augment", "weights", "features", "seen")
# Decides no prediction, or is the run's place in its cell.
_NOT_COMPARED = (
    *("seed", "output_root", "name", "rerun", "test", "image_every", "logger", "audit", "probes"),
    *("checkpoint_seconds", "feature_cache_gb", "compile"),
    *("data.path", "data.root", "data.cache", "data.workers", "data.fold"),
)
_TRAINING = ("data.batch_size", "data.sampler", "data.size", "data.val_share")  # of data, but not of the test images
_IN_AXES = ("backbone.name", "strategy.", "loss.name", "augment.name", "feature_cache", "preprocess.seen", "task.")

Settings = tuple[tuple[str, str], ...]


class Omission(NamedTuple):
    """What the report leaves out: a run's folder or a cell, in which state it is, and why."""

    what: str
    state: str
    reason: str


@dataclass(frozen=True)
class Run:
    """One run folder; `table` are its test predictions, None where it is not finished."""

    folder: Path
    record: dict[str, Any]
    task: Task
    protocol: Settings
    axes: dict[str, str]
    settings: Settings
    seed: int
    fold: str
    table: pd.DataFrame | None = None
    openings: Openings | None = None

    @property
    def cell(self) -> tuple[Settings, Settings]:
        """What all runs of its cell share."""
        return tuple(self.axes.items()), self.settings


def read_run(folder: Path, root: Path, command: str) -> tuple[list[Run], list[Omission]]:
    """The run, if its record can be understood, and what keeps it out of the report."""
    what = folder.relative_to(root).as_posix()
    try:
        record = read_json(folder / "run.json")
        run = _understood(folder, record)
    except InputError as error:
        return [], [Omission(what, "half-written", str(error))]
    except (KeyError, TypeError, AttributeError) as error:
        return [], [Omission(what, "half-written", f"run.json lacks or misstates {error}")]
    status = str(record.get("status", "without status"))
    if status != "finished":
        reason = record.get("reason") or "no end was recorded; the same train command goes on with it"
        return [run], [Omission(what, status, str(reason))]
    path = folder / "predictions-test.csv"
    if not path.is_file():
        reason = "trained with test=false" if record["config"].get("test") is False else f"{path.name} is missing"
        return [run], [Omission(what, "without test predictions", reason)]
    openings = record_opening(folder, command)
    try:
        table = read_predictions(path, run.task.classes)
        truth_and_prob(table, run.task)
        if set(table["split"]) != {"test"}:
            raise InputError(f"{path}: holds images of the splits {sorted(set(table['split']))}, not of test alone")
    except InputError as error:
        return [run], [Omission(what, "broken predictions", str(error))]
    return [replace(run, table=table, openings=openings)], []


def _understood(folder: Path, record: dict[str, Any]) -> Run:
    config = record["config"]
    name = config["task"]["name"]
    if name not in TASKS:
        raise InputError(f"run.json: unknown task {name}; known are {listed(sorted(TASKS))}")
    flat = dict(_flattened(config))
    data, folds = config["data"], config["data"].get("folds")
    protocol = {"task": name, "data": _data_name(data), "group": data["group"], "folds": json.dumps(folds)}
    drawn = set(_NOT_COMPARED + _TRAINING) | ({"data.test_share"} if folds is not None else set())
    protocol |= {key: value for key, value in flat.items() if key.startswith("data.") and key not in drawn}
    settings = {
        key: value
        for key, value in flat.items()
        if (key in _TRAINING or not key.startswith("data."))
        and key.partition(".")[0] not in _NOT_COMPARED
        and not key.startswith(_IN_AXES)
    }
    weights = record.get("weights") or {}
    settings["backbone.weights"] = json.dumps(
        weights.get("sha256") or PurePath(str(config["backbone"]["weights"])).name
    )
    return Run(
        folder,
        record,
        TASKS[name],
        tuple(protocol.items()),
        _axes(config, weights),
        tuple(sorted(settings.items())),
        int(config["seed"]),
        "" if folds is None else str(data["fold"]),
    )


def _axes(config: dict[str, Any], weights: dict[str, Any]) -> dict[str, str]:
    strategy, loss = config["strategy"], config["loss"]
    used = weights.get("used", "not loaded")
    weighted = loss["name"] == "ce" and loss.get("class_weights") is not None
    return {
        "backbone": config["backbone"]["name"],
        "strategy": f"until {strategy['freeze_until']}" if strategy["freeze_until"] else strategy["name"],
        "loss": "weighted_ce" if weighted else loss["name"],
        "augment": config["augment"]["name"],
        "weights": {"none": "random", "imagenet": "imagenet", "not loaded": "not loaded"}.get(used, "file"),
        "features": config["feature_cache"],
        "seen": config["preprocess"].get("seen", "whole"),  # runs of version 0.1 saw whole images
    }


def _flattened(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flattened(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value)


def _data_name(data: dict[str, Any]) -> str:
    """The data set without the place where it lies: its last folder and file."""
    where = data.get("path") or data.get("root")
    return "/".join(PurePath(where).parts[-2:]) if where else str(data["kind"])
