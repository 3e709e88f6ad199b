"""A data set as the audit sees it: everything readable, in the splits that it has, however faulty these are."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from covid_cls.data.datamodule import Radiographs, decode_images, find_images, set_name
from covid_cls.data.splits import assign_splits
from covid_cls.data.store import default_cache
from covid_cls.errors import InputError
from covid_cls.labels import TASKS, Task

log = logging.getLogger(__name__)
_IMAGES = ("kind", "path", "root", "images", "phantom_seed", "shortcut", "shortcut_strength")
_SPLITS = ("seed", "group", "val_share", "test_share", "folds", "fold")


class Collection(NamedTuple):
    """The readable images of a task's classes; the index of `table` is the row of `images`, uint8 (M, S, S).

    key: stands for the content of `images`. unreadable: path, line, reason. splits: where the table's splits come from,
    in words. notes: what else a reader must know.
    """

    name: str
    task: Task
    table: pd.DataFrame
    images: NDArray[np.uint8]
    key: str
    cache: Path
    unreadable: pd.DataFrame
    splits: str
    notes: list[str]


def of_radiographs(data: Radiographs) -> Collection:
    """What a run trains on, with its splits. To be asked before images are moved to a GPU."""
    images = np.asanyarray(data.images)  # a memory map stays one
    return Collection(
        str(data.name),
        data.task,
        data.table,
        images,
        data.store_digest,
        data.cache,
        data.quarantined,
        "of this run",
        [],
    )


def open_collection(task: Task, section: dict[str, Any]) -> Collection:
    """The images that `section`, the settings of data=, names. Unreadable files are listed, not refused.

    Splits, or folds, that the data set brings are kept as they are; else they are drawn as training would, or are ""
    where there are too few patients. A task of three classes becomes the binary one where pneumonia is absent.
    InputError for faults of the manifest, as in training.
    """
    cache = Path(section["cache"]).expanduser() if section["cache"] else default_cache()
    images = {key: value for key, value in section.items() if key in _IMAGES}
    table = find_images(cache, **images)
    table, splits = _with_splits(table, {key: section[key] for key in _SPLITS})
    size = section["size"]
    store, table, bad = decode_images(table, size=size, canvas=size, cache=cache, on_bad_image="quarantine")
    notes = []
    present = set(table["label"])
    if task.name != "binary" and present and present <= set(TASKS["binary"].classes):
        notes.append(f"no image of pneumonia: audited as task binary, not {task.name}")
        task = TASKS["binary"]
    left_out = int((~table["label"].isin(task.classes)).sum())
    if left_out:
        notes.append(f"{left_out} images of classes outside the task {task.name} were left out")
    table = table[table["label"].isin(task.classes)]
    if table.empty:
        raise InputError(
            f"data: none of the images is readable and of {', '.join(task.classes)}; add images, or change task="
        )
    name = set_name(section["kind"], section.get("path"), section.get("root"))
    return Collection(name, task, table, store.images, store.digest, cache, bad, splits, notes)


def _with_splits(table: pd.DataFrame, settings: dict[str, Any]) -> tuple[pd.DataFrame, str]:
    if settings["folds"] is not None and (table["fold"] != "").all():
        return table.assign(split="fold " + table["fold"]), "folds of the data set"
    if settings["folds"] is None and (table["split"] != "").any():
        return table, "of the data set"
    try:
        return assign_splits(table, **settings), f"drawn by {settings['group']}, data.seed={settings['seed']}"
    except InputError as error:
        log.info("no splits: %s", error)
        return table.assign(split=""), "none: there are too few patients to draw them"
