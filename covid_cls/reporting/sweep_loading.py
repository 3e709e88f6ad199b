"""The run folders of a sweep, read and grouped into configurations and protocols."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pandas as pd

from covid_cls.errors import InputError, listed
from covid_cls.evaluation.predictions import pool_folds, truth_and_prob
from covid_cls.io import read_json, read_predictions
from covid_cls.models.names import loss_label, strategy_label
from covid_cls.reporting.access_log import AccessCount, record_test_access
from covid_cls.tasks import TASKS, Task

# The main settings of a configuration, in the order in which its name lists them. A name always has the grid axes; the
# others are added where they vary.
_GRID_AXES = ("backbone", "strategy", "loss")
AXES = (*_GRID_AXES, "augment", "weights", "features", "seen")
# Recorded settings that change no prediction, or that tell the runs of one configuration apart.
_IGNORED = {
    *("seed", "output_root", "name", "rerun", "test", "image_every", "logger", "audit", "baselines", "operating"),
    *("checkpoint_seconds", "feature_cache_gb", "compile", "sweep"),
    # The name that earlier versions used for baselines.
    "probes",
}
_IGNORED_DATA = {"data.path", "data.root", "data.cache", "data.workers", "data.fold"}
# Settings of data that change the training, but not the test images.
_TRAINING_DATA = {"data.batch_size", "data.sampler", "data.size", "data.val_share"}
# Settings that the axes or the protocol contain.
_IN_AXES = ("backbone.name", "strategy.", "loss.name", "augment.name", "feature_cache", "preprocess.seen", "task.")
# In a run folder: the predictions of baselines and perturbation tests, and the name that earlier versions used.
_BASELINE_FOLDERS = ("baselines", "probes")

Settings = tuple[tuple[str, str], ...]
_Key = tuple[Settings, Settings]  # axes and other settings of a configuration


class FoundRuns(NamedTuple):
    """The folders of a sweep.

    Attributes:
        root: The folder that was searched.
        folders: Folders with a run.json, sorted.
        orphans: Folders with test predictions but without a run.json, sorted.
    """

    root: Path
    folders: list[Path]
    orphans: list[Path]


class Omission(NamedTuple):
    """Something that the report leaves out.

    Attributes:
        what: A run folder or a configuration.
        state: Its state in a word or two, such as "failed" or "missing".
        reason: Why it is left out.
    """

    what: str
    state: str
    reason: str


@dataclass(frozen=True)
class LoadedRun:
    """A run folder.

    Attributes:
        record: Content of run.json.
        protocol: Settings that decide on which images the run is tested.
        axes: Level on each of `AXES`.
        settings: All other settings that can change a prediction.
        fold: Number of the fold, "" without cross-validation.
        table: Test predictions; None if the run is not finished.
        test_accesses: Number of times that they were read; None if they were not.
    """

    folder: Path
    record: dict[str, Any]
    task: Task
    protocol: Settings
    axes: dict[str, str]
    settings: Settings
    seed: int
    fold: str
    table: pd.DataFrame | None = None
    test_accesses: AccessCount | None = None

    @property
    def key(self) -> _Key:
        """Axes and settings, which are equal for the runs of a configuration and differ between configurations."""
        return tuple(self.axes.items()), self.settings

    def baseline_file(self, name: str) -> Path:
        """Return the path of the test predictions of a baseline or perturbation test, which may not exist."""
        paths = [self.folder / folder / f"{name}-test.csv" for folder in _BASELINE_FOLDERS]
        return next((path for path in paths if path.is_file()), paths[0])


@dataclass
class Configuration:
    """Runs that differ in seed and fold only.

    Attributes:
        name: Text that differs between the configurations of a protocol.
        axes: Level on each of `AXES`.
        settings: All other settings that can change a prediction.
        runs: Its runs, by seed and fold.
        seeds: Random seeds for which all folds of the protocol are finished.
        tables: Per seed, the test predictions of all folds, sorted by image_id.
    """

    name: str
    axes: dict[str, str]
    settings: Settings
    runs: list[LoadedRun]
    seeds: list[int]
    tables: list[pd.DataFrame]

    @property
    def baseline(self) -> bool:
        """Whether its networks saw only a part of each image."""
        return self.axes["seen"] != "whole"


@dataclass
class Protocol:
    """Configurations that were tested on the same images.

    Attributes:
        name: Text that differs between the protocols of a sweep.
        data: Name of the data set.
        settings: Settings that decide on which images the runs are tested.
        folds: Numbers of the folds that are pooled; [""] without cross-validation.
        of_folds: Number of folds of the cross-validation; 1 without.
        configurations: Ordered by backbone, depth of training and name.
    """

    name: str
    task: Task
    data: str
    settings: dict[str, str]
    folds: list[str]
    of_folds: int
    configurations: list[Configuration] = field(default_factory=list)

    @property
    def grid(self) -> list[Configuration]:
        """The configurations whose networks saw entire images."""
        return [configuration for configuration in self.configurations if not configuration.baseline]

    @property
    def leaky(self) -> bool:
        """Whether images of one patient may be in both training and test."""
        return self.settings.get("group") == "image"


@dataclass
class LoadedSweep:
    """All finished runs below a folder.

    Attributes:
        protocols: Sorted by name.
        omissions: Runs and configurations that are not in the report.
        test_accesses: Maximum number of accesses to the test predictions of a run, and the earliest one.
        notes: Notes on the limits of the scores in run.json, each with the number of runs that have it.
    """

    protocols: list[Protocol]
    omissions: list[Omission]
    test_accesses: AccessCount
    notes: dict[str, int]


def find_runs(root: Path) -> FoundRuns:
    """Find the run folders at any depth below `root`. Raises InputError if there is no run.json."""
    folders, orphans = [], []
    # A single pass, since a sweep may have many thousand files on a slow network disk.
    for folder, _, files in os.walk(root):
        if "run.json" in files:
            folders.append(Path(folder))
        elif "predictions-test.csv" in files:
            orphans.append(Path(folder))
    if not folders:
        raise InputError(f"runs={root}: no run.json below it; give the folder of a sweep, e.g. runs=outputs/grid")
    return FoundRuns(root, sorted(folders), sorted(orphans))


def load_sweep(found: FoundRuns, command: str) -> LoadedSweep:
    """Load the finished runs, pool their folds, and group them into configurations and protocols.

    Args:
        found: The run folders of the sweep.
        command: The command that reads the test predictions. It is logged in each run whose predictions are read.

    Raises:
        InputError: If no run is finished and readable, the folds of a configuration overlap, or the configurations of a
            protocol were tested on different images.
    """
    root, runs = found.root, []
    reason = "there are test predictions but no run.json"
    omissions = [Omission(str(folder.relative_to(root)), "damaged", reason) for folder in found.orphans]
    for folder in found.folders:
        run, omission = _load_run(folder, root, command)
        runs += [run] if run else []
        omissions += [omission] if omission else []
    runs, superseded = _newest_runs(runs, root)
    omissions += superseded
    finished = [run for run in runs if run.table is not None]
    protocols = []
    for key in dict.fromkeys(run.protocol for run in finished):
        protocol, omitted = _build_protocol([run for run in runs if run.protocol == key])
        omissions += omitted
        protocols += [protocol] if protocol.grid else []
    if not protocols:
        reasons = listed([f"{o.what} is {o.state} ({o.reason})" for o in omissions], 3)
        raise InputError(f"runs={root}: none of its {len(found.folders)} runs can be reported: {reasons}")
    names = _distinct_names([p.name for p in protocols], [p.settings for p in protocols])
    for protocol, name in zip(protocols, names, strict=True):
        protocol.name = name
    accesses = [run.test_accesses for run in finished if run.test_accesses]
    return LoadedSweep(
        sorted(protocols, key=lambda p: p.name),
        omissions,
        AccessCount(max(count.times for count in accesses), min(count.first for count in accesses)),
        dict(Counter(str(note) for run in finished for note in run.record.get("notes", []))),
    )


def _load_run(folder: Path, root: Path, command: str) -> tuple[LoadedRun | None, Omission | None]:
    """Return the run, if its run.json is valid, and why it is not in the report, if it is not."""
    name = str(folder.relative_to(root))
    try:
        record = read_json(folder / "run.json")
        run = _parse_record(folder, record)
    except InputError as error:
        return None, Omission(name, "damaged", str(error))
    except (KeyError, TypeError, AttributeError) as error:
        return None, Omission(name, "damaged", f"run.json: {error} is missing or has the wrong type")
    status = str(record.get("status", "without status"))
    if status != "finished":
        reason = record.get("reason") or "no end was recorded; the same train command continues the run"
        return run, Omission(name, status, str(reason))
    path = folder / "predictions-test.csv"
    if not path.is_file():
        reason = "trained with test=false" if record["config"].get("test") is False else f"{path.name} is missing"
        return run, Omission(name, "without test predictions", reason)
    # Before the predictions are read, so that no access is missed.
    accesses = record_test_access(folder, command)
    try:
        table = read_predictions(path, run.task.classes)
        truth_and_prob(table, run.task)
        if set(table["split"]) != {"test"}:
            raise InputError(f"{path}: images of the splits {sorted(set(table['split']))} instead of test only")
    except InputError as error:
        return run, Omission(name, "broken predictions", str(error))
    return replace(run, table=table, test_accesses=accesses), None


def _parse_record(folder: Path, record: dict[str, Any]) -> LoadedRun:
    config = record["config"]
    task, data, folds = config["task"]["name"], config["data"], config["data"].get("folds")
    if task not in TASKS:
        raise InputError(f"run.json: unknown task {task}; the known tasks are {listed(sorted(TASKS))}")
    flat = dict(_flatten(config))
    # The last two parts of its path name the data set, since machines keep it in different places.
    path = data.get("path") or data.get("root")
    name = "/".join(PurePath(path).parts[-2:]) if path else data["kind"]
    # In a cross-validation the folds decide on the test images, and test_share has no effect.
    not_protocol = _IGNORED_DATA | _TRAINING_DATA | ({"data.test_share"} if folds is not None else set())
    protocol = {"task": task, "data": name, "group": data["group"], "folds": json.dumps(folds)}
    protocol |= {key: value for key, value in flat.items() if key.startswith("data.") and key not in not_protocol}
    settings = {
        key: value
        for key, value in flat.items()
        if (key in _TRAINING_DATA or not key.startswith("data."))
        and key.partition(".")[0] not in _IGNORED
        and not key.startswith(_IN_AXES)
    }
    # The same weights may lie in different places, and different weights in the same place.
    weights = record.get("weights") or {}
    identity = weights.get("sha256") or PurePath(str(config["backbone"]["weights"])).name
    settings["backbone.weights"] = json.dumps(identity)
    return LoadedRun(
        folder,
        record,
        TASKS[task],
        tuple(protocol.items()),
        _axes(config, weights.get("used", "not loaded")),
        tuple(sorted(settings.items())),
        int(config["seed"]),
        "" if folds is None else str(data["fold"]),
    )


def _axes(config: dict[str, Any], weights: str) -> dict[str, str]:
    return {
        "backbone": config["backbone"]["name"],
        "strategy": strategy_label(config["strategy"]),
        "loss": loss_label(config["loss"]),
        # Earlier versions called augment=original "seed".
        "augment": {"seed": "original"}.get(config["augment"]["name"], config["augment"]["name"]),
        "weights": {"none": "random", "imagenet": "imagenet", "not loaded": "not loaded"}.get(weights, "file"),
        "features": config["feature_cache"],
        # Runs of version 0.1 do not record it; they saw entire images.
        "seen": config["preprocess"].get("seen", "whole"),
    }


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        # As text, values of any type can be compared and hashed.
        yield prefix, json.dumps(value)


def _newest_runs(runs: Sequence[LoadedRun], root: Path) -> tuple[list[LoadedRun], list[Omission]]:
    """Keep the run that ended last of those with equal configuration, seed and fold, which other code has trained."""
    repeated: dict[object, list[LoadedRun]] = {}
    for run in sorted(runs, key=lambda r: str(r.record.get("ended", ""))):
        if run.table is not None:
            repeated.setdefault((run.protocol, run.key, run.seed, run.fold), []).append(run)
    superseded = {}
    for *older, newest in repeated.values():
        reason = f"{newest.folder.relative_to(root)} has the same configuration, seed and fold and ended later"
        for run in older:
            superseded[run.folder] = Omission(str(run.folder.relative_to(root)), "superseded", reason)
    return [run for run in runs if run.folder not in superseded], list(superseded.values())


def _build_protocol(runs: Sequence[LoadedRun]) -> tuple[Protocol, list[Omission]]:
    """Group runs of one protocol into configurations and list what is missing from their grid."""
    by_key: dict[_Key, dict[int, dict[str, LoadedRun]]] = {}
    for run in runs:
        if run.table is not None:
            by_key.setdefault(run.key, {}).setdefault(run.seed, {})[run.fold] = run
    # Scores are comparable only if they are of the same folds: the largest set of folds, the most frequent of several.
    counts = Counter(frozenset(folds) for seeds in by_key.values() for folds in seeds.values())
    folds = max(counts, key=lambda found: (len(found), counts[found], sorted(found)))
    settings = dict(runs[0].protocol)
    split = "split by image: LEAKY" if settings["group"] == "image" else "split by patient"
    name = ", ".join([settings["task"].replace("_", " "), settings["data"], split])
    of_folds = json.loads(settings["folds"]) or 1
    if of_folds > 1:
        name += f", {of_folds} folds"
    ordered = sorted(folds, key=lambda fold: int(fold or 0))
    protocol = Protocol(name, runs[0].task, settings["data"], settings, ordered, of_folds)
    names = _configuration_names(list(by_key))
    omissions = []
    for key in sorted(by_key, key=lambda key: (_depth(key), names[key])):
        complete = {}
        for seed, by_fold in sorted(by_key[key].items()):
            missing = [fold for fold in ordered if fold not in by_fold]
            if missing:
                reason = f"fold {listed(missing)} is not finished, so the scores would be of other images"
                omissions.append(Omission(f"{names[key]}, seed {seed}", "incomplete", reason))
            else:
                complete[seed] = by_fold
        if complete:
            tables = [_pool(names[key], seed, by_fold.values()) for seed, by_fold in complete.items()]
            members = [run for by_fold in complete.values() for _, run in sorted(by_fold.items())]
            configuration = Configuration(names[key], dict(key[0]), key[1], members, list(complete), tables)
            protocol.configurations.append(configuration)
    _check_same_images(protocol)
    if not protocol.grid:
        reason = "there is no network trained on entire images to compare it with"
        omissions += [Omission(c.name, "not compared", reason) for c in protocol.configurations]
    return protocol, omissions + _missing_runs(runs, of_folds)


def _pool(name: str, seed: int, runs: Iterable[LoadedRun]) -> pd.DataFrame:
    try:
        return pool_folds([run.table for run in runs if run.table is not None])
    except InputError as error:
        raise InputError(f"{name}, seed {seed}: {error}") from error


def _check_same_images(protocol: Protocol) -> None:
    """Raise InputError if two tables of the protocol differ in their images or labels."""
    labels = {
        f"{c.name}, seed {seed}": table.set_index("image_id")["label"]
        for c in protocol.configurations
        for seed, table in zip(c.seeds, c.tables, strict=True)
    }
    first = next(iter(labels), "")
    for name, own in labels.items():
        if not own.equals(labels[first]):
            images = listed([image for image, _ in sorted(set(own.items()) ^ set(labels[first].items()))], 3)
            raise InputError(
                f"{protocol.name}: the test images of {name} and {first} are not the same: {images}; "
                "keep runs on different data sets of the same name in separate folders and report each folder"
            )


def _missing_runs(runs: Sequence[LoadedRun], of_folds: int) -> list[Omission]:
    """List the runs of the full grid for which there is no folder.

    The full grid has all combinations of backbone, strategy, loss and seed that are found together with one choice of
    augmentation, features and seen part, and all folds.
    """
    folds = [str(k) for k in range(of_folds)] if of_folds > 1 else [""]
    recipe_axes = ("augment", "features", "seen")
    axes = (*recipe_axes, *_GRID_AXES)
    recipes: dict[tuple[str, ...], list[LoadedRun]] = {}
    for run in runs:
        # Networks that see a part of each image are rarely trained for the full grid: they lack seeds and folds only.
        own_axes = recipe_axes if run.axes["seen"] == "whole" else axes
        recipes.setdefault(tuple(run.axes[axis] for axis in own_axes), []).append(run)
    present = {(*(run.axes[axis] for axis in axes), run.seed, run.fold) for run in runs}
    missing: dict[tuple[str, ...], list[str]] = {}
    for recipe, members in recipes.items():
        levels = [sorted({run.axes[axis] for run in members}) for axis in _GRID_AXES]
        for *grid, seed, fold in product(*levels, sorted({run.seed for run in members}), folds):
            key = (*recipe[:3], *map(str, grid))
            if (*key, seed, fold) not in present:
                missing.setdefault(key, []).append(f"seed {seed}" + (f" fold {fold}" if fold else ""))
    shown = [axis for axis in axes if axis != "augment" or len({run.axes[axis] for run in runs}) > 1]
    omissions = []
    for key, places in sorted(missing.items()):
        level = dict(zip(axes, key, strict=True))
        name = _label({axis: level[axis] for axis in shown})
        omissions.append(Omission(name, "missing", f"there is no run for {listed(places)}"))
    return omissions


def _configuration_names(keys: Sequence[_Key]) -> dict[_Key, str]:
    """Name configurations by the grid axes, other axes that vary and, where these are equal, single settings."""
    varying = [axis for axis in AXES if axis in _GRID_AXES or len({dict(axes)[axis] for axes, _ in keys}) > 1]
    labels = [_label({axis: dict(axes)[axis] for axis in varying}) for axes, _ in keys]
    return dict(zip(keys, _distinct_names(labels, [dict(settings) for _, settings in keys]), strict=True))


def _label(axes: Mapping[str, str]) -> str:
    parts = [axes[axis] for axis in _GRID_AXES]
    parts += [f"{axes[axis]} {axis}" for axis in ("augment", "weights") if axis in axes]
    if axes.get("features", "off") != "off":
        parts.append(axes["features"])
    if axes.get("seen", "whole") != "whole":
        parts.append(f"{axes['seen']} seen")
    return ", ".join(parts)


def _distinct_names(names: Sequence[str], settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Append to equal names the settings in which they differ."""
    distinct = []
    for name, own in zip(names, settings, strict=True):
        same = [other for other_name, other in zip(names, settings, strict=True) if other_name == name]
        differ = sorted(key for key in set().union(*same) if len({other.get(key) for other in same}) > 1)
        distinct.append(", ".join([name, *(f"{key}={own.get(key, 'unset')}" for key in differ)]))
    return distinct


def _depth(key: _Key) -> tuple[str, int]:
    """Return the sort key of a configuration: its backbone and how much of it is trained."""
    axes = dict(key[0])
    return axes["backbone"], {"fc": 0, "partial": 1, "full": 3}.get(axes["strategy"], 2)
