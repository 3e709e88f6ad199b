"""The run folders of a sweep as cells that may be compared, and a list of what could not be used and why."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pandas as pd

from covid_cls.errors import InputError, listed
from covid_cls.labels import Task
from covid_cls.reporting.ledger import Openings
from covid_cls.reporting.runs import AXES, Omission, Run, Settings, read_run

_GRID_AXES = ("backbone", "strategy", "loss")  # a name always gives them; the others where they vary
_Key = tuple[Settings, Settings]  # axes and other settings of a cell


@dataclass
class Cell:
    """Runs that differ only in seed and fold. tables: one per seed of `seeds`, over all test images, by image_id."""

    name: str
    axes: dict[str, str]
    settings: Settings
    runs: list[Run]
    seeds: list[int]
    tables: list[pd.DataFrame]

    @property
    def probe(self) -> bool:
        """Whether its networks saw only a part of each image."""
        return self.axes["seen"] != "whole"


@dataclass
class Protocol:
    """Cells that were tested on the same images. folds: those that are pooled, [""] without any, of `of_folds`."""

    name: str
    task: Task
    data: str
    settings: dict[str, str]
    folds: list[str]
    of_folds: int
    cells: list[Cell] = field(default_factory=list)

    @property
    def grid(self) -> list[Cell]:
        """The cells whose networks saw whole images."""
        return [cell for cell in self.cells if not cell.probe]

    @property
    def leaky(self) -> bool:
        """Whether a patient's images may be in training and test."""
        return self.settings.get("group") == "image"


@dataclass
class Sweep:
    """All that lies below a folder."""

    protocols: list[Protocol]
    omissions: list[Omission]
    openings: Openings
    notes: dict[str, int]


def run_folders(root: Path) -> list[Path]:
    """Return the run folders at any depth below `root`, sorted. Raises InputError if there is none."""
    folders = sorted(path.parent for path in root.rglob("run.json"))
    if not folders:
        raise InputError(f"runs={root}: no run.json below it; give the folder of a sweep, e.g. runs=outputs/grid")
    return folders


def collect(root: Path, command: str) -> Sweep:
    """The finished runs below `root`, pooled over folds and grouped into protocols and cells; the rest is listed.

    command: what is written to the ledger of each run whose test predictions are read. InputError where `root` holds
    no run or none that is finished, where folds overlap, or cells of one protocol were tested on different images.
    """
    folders = run_folders(root)
    omissions = [
        Omission(path.parent.relative_to(root).as_posix(), "half-written", "test predictions without a run.json")
        for path in sorted(root.rglob("predictions-test.csv"))
        if path.parent not in folders and path.parent.name != "probes"
    ]
    runs: list[Run] = []
    for folder in folders:
        found, said = read_run(folder, root, command)
        omissions += said
        runs += found
    runs, replaced = _newest(runs, root)
    omissions += replaced
    finished = [run for run in runs if run.table is not None]
    if not finished:
        raise InputError(
            f"runs={root}: none of its {len(folders)} runs is finished and readable: "
            + listed([f"{o.what} is {o.state} ({o.reason})" for o in omissions], 3)
        )
    protocols = []
    for key in dict.fromkeys(run.protocol for run in finished):
        members = [run for run in runs if run.protocol == key]
        protocol, said = _protocol(members)
        omissions += said
        if protocol.grid:
            protocols.append(protocol)
    _tell_apart(protocols)
    if not protocols:
        raise InputError(f"runs={root}: no cell is complete: {listed([f'{o.what}: {o.reason}' for o in omissions], 3)}")
    openings = [run.openings for run in finished if run.openings is not None]
    most = Openings(max(opening.times for opening in openings), min(opening.first for opening in openings))
    return Sweep(sorted(protocols, key=lambda p: p.name), omissions, most, _notes(finished))


def _newest(runs: Sequence[Run], root: Path) -> tuple[list[Run], list[Omission]]:
    """Of runs that repeat one cell, seed and fold (with other code), the one that ended last; the others are listed."""
    kept: dict[object, Run] = {}
    replaced = []
    for run in sorted(runs, key=lambda r: str(r.record.get("ended", ""))):
        if run.table is None:
            continue
        place = (run.protocol, run.cell, run.seed, run.fold)
        if place in kept:
            older, newer = (r.folder.relative_to(root).as_posix() for r in (kept[place], run))
            replaced.append(Omission(older, "superseded", f"{newer} repeats this cell, seed and fold and ended later"))
        kept[place] = run
    chosen = {run.folder for run in kept.values()}
    return [run for run in runs if run.table is None or run.folder in chosen], replaced


def _protocol(members: Sequence[Run]) -> tuple[Protocol, list[Omission]]:
    """The cells of runs of one protocol, and what is missing from their grid."""
    held: dict[_Key, dict[int, dict[str, Run]]] = {}
    for run in members:
        if run.table is not None:
            held.setdefault(run.cell, {}).setdefault(run.seed, {})[run.fold] = run
    covered = Counter(frozenset(folds) for seeds in held.values() for folds in seeds.values())
    folds = max(covered, key=lambda found: (len(found), covered[found], sorted(found)))
    first = members[0]
    settings = dict(first.protocol)
    of_folds = 1 if settings["folds"] == "null" else int(settings["folds"])
    protocol = Protocol(_title(settings), first.task, settings["data"], settings, sorted(folds, key=_number), of_folds)
    names = _names(list(held))
    omissions = []
    for key, seeds in sorted(held.items(), key=lambda item: (_depth(item[0]), names[item[0]])):
        complete = {seed: by_fold for seed, by_fold in sorted(seeds.items()) if by_fold.keys() == folds}
        omissions += [
            Omission(f"{names[key]}, seed {seed}", "incomplete", _lacking(by_fold, protocol.folds))
            for seed, by_fold in sorted(seeds.items())
            if seed not in complete
        ]
        if complete:
            tables = [_pooled(names[key], seed, by_fold.values()) for seed, by_fold in complete.items()]
            runs = [run for by_fold in complete.values() for _, run in sorted(by_fold.items())]
            protocol.cells.append(Cell(names[key], dict(key[0]), key[1], runs, list(complete), tables))
    _check_same_images(protocol)
    if not protocol.grid:
        omissions += [
            Omission(c.name, "alone", "no network that saw whole images to set it beside") for c in protocol.cells
        ]
    return protocol, omissions + _holes(members, of_folds)


def _pooled(name: str, seed: int, runs: Iterable[Run]) -> pd.DataFrame:
    from covid_cls.evaluation.grid import pool_folds  # with scipy: a folder without runs is refused before

    try:
        return pool_folds([run.table for run in runs if run.table is not None])
    except InputError as error:
        raise InputError(f"{name}, seed {seed}: {error}") from error


def _lacking(found: Iterable[str], folds: Sequence[str]) -> str:
    missing = [fold for fold in folds if fold not in found]
    return f"fold {listed(missing)} is not finished, so its scores would be of other images; left out of all scores"


def _check_same_images(protocol: Protocol) -> None:
    """InputError where two tables of the protocol do not hold the same images with the same labels."""
    first, reference = "", pd.Series(dtype="string")
    for cell in protocol.cells:
        for seed, table in zip(cell.seeds, cell.tables, strict=True):
            name, labels = f"{cell.name}, seed {seed}", table.set_index("image_id")["label"]
            if not first:
                first, reference = name, labels
            elif not labels.equals(reference):
                only = sorted(set(labels.items()) ^ set(reference.items()))
                raise InputError(
                    f"{protocol.name}: the test images of {name} and {first} are not the same: "
                    f"{listed([image for image, _ in only], 3)}; report data sets of one name from folders of their own"
                )


def _holes(members: Sequence[Run], of_folds: int) -> list[Omission]:
    """Cells, seeds and folds that the product of what was found would have, and that no folder stands for.

    The product is of backbones, strategies and losses within each choice of augmentation and features, and of all
    seeds of that choice; a probe's cell lacks only seeds and folds of its own.
    """
    folds = [str(k) for k in range(of_folds)] if of_folds > 1 else [""]
    own_axes = ("augment", "features", "seen")
    recipes: dict[tuple[str, ...], list[Run]] = {}
    for run in members:
        own = () if run.axes["seen"] == "whole" else tuple(run.axes[axis] for axis in _GRID_AXES)
        recipes.setdefault((*(run.axes[axis] for axis in own_axes), *own), []).append(run)
    expected: set[tuple[str, ...]] = set()
    for recipe, runs in recipes.items():
        levels = [sorted({run.axes[axis] for run in runs}) for axis in _GRID_AXES]
        seeds = sorted({str(run.seed) for run in runs}, key=_number)
        expected |= {(*recipe[:3], *cell) for cell in product(*levels, seeds, folds)}
    axes = (*own_axes, *_GRID_AXES)
    present = {(*(run.axes[axis] for axis in axes), str(run.seed), run.fold) for run in members}
    lacking: dict[tuple[str, ...], list[str]] = {}
    for *cell, seed, fold in sorted(expected - present):
        lacking.setdefault(tuple(cell), []).append(f"seed {seed}" + (f" fold {fold}" if fold else ""))
    shown = [axis for axis in axes if axis != "augment" or len({run.axes[axis] for run in members}) > 1]
    omissions = []
    for found, lacks in lacking.items():
        levels_of = dict(zip(axes, found, strict=True))
        omissions.append(
            Omission(_label({axis: levels_of[axis] for axis in shown}), "missing", f"no run for {listed(lacks)}")
        )
    return omissions


def _names(cells: Sequence[_Key]) -> dict[_Key, str]:
    """Names that tell the cells apart: the grid's axes, the others where they vary, then single settings."""
    varying = [axis for axis in AXES if axis in _GRID_AXES or len({dict(axes)[axis] for axes, _ in cells}) > 1]
    names = {cell: _label({axis: dict(cell[0])[axis] for axis in varying}) for cell in cells}
    for name in {name for name, count in Counter(names.values()).items() if count > 1}:
        same = [cell for cell in cells if names[cell] == name]
        keys = sorted({key for _, settings in same for key, _ in settings})
        keys = [key for key in keys if len({dict(settings).get(key) for _, settings in same}) > 1]
        for cell in same:
            names[cell] = ", ".join([name, *(f"{key}={dict(cell[1]).get(key, 'unset')}" for key in keys)])
    return names


def _depth(cell: _Key) -> tuple[str, int]:
    """The backbone, and how much of it is trained: from the head alone to everything."""
    axes = dict(cell[0])
    return axes["backbone"], {"fc": 0, "partial": 1, "full": 3}.get(axes["strategy"], 2)


def _label(axes: dict[str, str]) -> str:
    shown = [axes[axis] for axis in _GRID_AXES]
    shown += [f"{axes[axis]} {axis}" for axis in ("augment", "weights") if axis in axes]
    shown += [axes["features"]] if axes.get("features", "off") != "off" else []
    return ", ".join(shown + ([f"{axes['seen']} seen"] if axes.get("seen", "whole") != "whole" else []))


def _title(settings: dict[str, str]) -> str:
    parts = [settings["task"].replace("_", " "), settings["data"]]
    parts.append("split by image: LEAKY" if settings["group"] == "image" else "split by patient")
    return ", ".join(parts + ([f"{settings['folds']} folds"] if settings["folds"] != "null" else []))


def _tell_apart(protocols: Sequence[Protocol]) -> None:
    """Give protocols of one name the settings that differ between them."""
    for name in {protocol.name for protocol in protocols}:
        same = [protocol for protocol in protocols if protocol.name == name]
        keys = sorted({key for protocol in same for key in protocol.settings})
        differ = [key for key in keys if len({protocol.settings.get(key) for protocol in same}) > 1]
        for protocol in same:
            protocol.name = ", ".join([name, *(f"{key}={protocol.settings.get(key, 'unset')}" for key in differ)])


def _notes(runs: Sequence[Run]) -> dict[str, int]:
    """What the runs say limits their scores, and how many say it."""
    return dict(Counter(str(note) for run in runs for note in run.record.get("notes", [])))


def _number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (0, text)
