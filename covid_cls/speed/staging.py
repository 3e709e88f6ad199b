"""One folder of images that both sides of a benchmark read."""

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torchvision.datasets.folder import IMG_EXTENSIONS

from covid_cls.data.datamodule import find_images
from covid_cls.data.manifest import SPLITS
from covid_cls.data.store import default_cache
from covid_cls.errors import InputError, listed
from covid_cls.labels import Task


@dataclass(frozen=True)
class Staged:
    """Images staged for training: how many, how many of them are different files, and how many of each class."""

    images: int
    distinct: int
    per_class: dict[str, int]

    @property
    def facts(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def usable_images(data: dict[str, Any], task: Task) -> pd.DataFrame:
    """Label and file of each image of the task's classes, sorted by path; decodes nothing.

    data: the section of the configuration. InputError as in `find_images`, and where torchvision's ImageFolder, which
    the plain loop reads with, passes over a file.
    """
    cache = Path(data["cache"]).expanduser() if data.get("cache") else default_cache()
    keys = inspect.signature(find_images).parameters.keys() & data.keys() - {"cache"}
    table = find_images(cache, **{key: data[key] for key in keys})
    table = table.loc[table["label"].isin(task.classes), ["path", "label", "file"]]
    strange = [path for path in table["path"] if not path.lower().endswith(IMG_EXTENSIONS)]
    if strange:
        raise InputError(
            f"{listed(strange, 3)}: the plain loop cannot read these ({len(strange)} files); torchvision's ImageFolder "
            f"knows files by {' '.join(IMG_EXTENSIONS)}. Measure on a set of such images"
        )
    missing = [name for name in task.classes if not (table["label"] == name).any()]
    if missing:
        raise InputError(f"data: no image of {listed(missing)}, which the task {task.name} needs")
    return table.sort_values("path", kind="stable", ignore_index=True)


def stage_images(table: pd.DataFrame, task: Task, images: int | None, others: int, root: Path, seed: int = 0) -> Staged:
    """Make `root`/<train|val|test>/<class>/<number>-<name>, links to files of `table`; what lies in train comes back.

    images: how many to train on, None for all; others: how many each in val and test. All are drawn in class
    proportion, at least one of each class; val and test get files that train has not, where there are any. A class
    with fewer files than asked for repeats them.
    """
    files = {name: table.loc[table["label"] == name, "file"].to_numpy() for name in task.classes}
    counts = [len(found) for found in files.values()]
    train = class_shares(counts, len(table) if images is None else images)
    rest = class_shares(counts, others)
    distinct = 0
    for name, first, more in zip(task.classes, train, rest, strict=True):
        order = np.random.default_rng([seed, task.classes.index(name)]).permutation(len(files[name]))
        chosen = np.resize(order, first + 2 * more)
        distinct += min(first, len(order))
        for split, part in zip(SPLITS, np.split(chosen, [first, first + more]), strict=True):
            _link(files[name][np.sort(part)], root / split / name)
    return Staged(sum(train), distinct, dict(zip(task.classes, train, strict=True)))


def class_shares(counts: list[int], total: int) -> list[int]:
    """`total` shared out in proportion to `counts` by largest remainders, at least one each; they sum to `total`.

    total >= len(counts).
    """
    exact = [total * count / sum(counts) for count in counts]
    shares = [max(1, int(share)) for share in exact]
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        movable = [k for k, share in enumerate(shares) if share + step >= 1]
        k = max(movable, key=lambda k: step * (exact[k] - shares[k]))
        shares[k] += step
    return shares


def _link(files: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, file in enumerate(files):  # the number tells a repeated file from itself
        (folder / f"{number:06d}-{Path(file).name}").symlink_to(file)
