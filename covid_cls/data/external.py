"""Images of another data set than a network was trained on, to score it there."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import DataLoader

from covid_cls.data.datamodule import batch_loader, class_indices, decode_images, find_images, set_name
from covid_cls.data.dataset import Features, OrderedBatches, RadiographDataset
from covid_cls.data.store import default_cache, hash_files
from covid_cls.errors import InputError, listed
from covid_cls.labels import Task
from covid_cls.records import Batch

SPLIT = "external"
# The settings of conf/data that mean something without training.
SETTINGS = (
    *("kind", "path", "root", "images", "phantom_seed", "shortcut", "shortcut_strength"),
    *("batch_size", "workers", "on_bad_image", "cache"),
)


class ExternalRadiographs:
    """All usable images of a data set as the one split "external", for `predict_split`.

    size: the short side to which the network's images were scaled; crop: the side of what it sees. Neither split nor
    class is needed to be complete. `table`: as that of `Radiographs`. `notes`: images left out because their class is
    none of the task's, undecodable ones, absent classes. InputError where nothing is left. See conf/data for the rest.
    """

    def __init__(
        self,
        task: Task,
        size: int,
        crop: int,
        *,
        kind: str,
        path: str | None = None,
        root: str | None = None,
        images: int = 600,
        phantom_seed: int = 0,
        shortcut: str = "none",
        shortcut_strength: float = 1.0,
        batch_size: int = 32,
        workers: int = 0,
        on_bad_image: str = "stop",
        cache: str | None = None,
    ) -> None:
        self.task, self.batch_size, self.workers = task, batch_size, workers
        self.name = set_name(kind, path, root)
        cache_root = Path(cache).expanduser() if cache else default_cache()
        found = find_images(
            cache_root,
            kind=kind,
            path=path,
            root=root,
            images=images,
            phantom_seed=phantom_seed,
            shortcut=shortcut,
            shortcut_strength=shortcut_strength,
        )
        store, usable, quarantined = decode_images(
            found, size=size, canvas=crop, cache=cache_root, on_bad_image=on_bad_image
        )
        self.images = store.images
        known = usable["label"].isin(task.classes)
        self.table: pd.DataFrame = usable[known].assign(split=SPLIT, fold="")
        if self.table.empty:
            raise InputError(f"data: {self.name} has no usable image of {listed(task.classes)}; give other images")
        strangers = usable.loc[~known, "label"].value_counts()
        absent = [name for name in task.classes if name not in set(self.table["label"])]
        outside = f"were left out: task {task.name} has no such class"
        self.notes = [
            *(f"{n} images of {label} {outside}" for label, n in strangers.items()),
            *(f"{self.name} has no image of {label}: what needs one is undefined" for label in absent),
        ]
        if len(quarantined):
            self.notes.append(
                f"{len(quarantined)} undecodable images were quarantined: {listed(quarantined['path'].tolist())}"
            )

    def ordered_loader(self, split: str, features: Features | None = None) -> DataLoader[Batch]:
        """Every image of the split, which is "external", once and in the order of `table`; there are no features."""
        assert split == SPLIT
        assert features is None
        rows = self.table.index.to_numpy(dtype=np.int64)
        dataset = RadiographDataset([self.images], rows, class_indices(self.table, self.task))
        return batch_loader(dataset, OrderedBatches(len(dataset), self.batch_size), self.workers)


def seen_in_training(table: pd.DataFrame, data: dict[str, Any]) -> list[str]:
    """Notes on images of `table` whose very bytes are in the data set that a run's settings `data` name.

    One that says so where that data set is no longer to be found; none where no image is known.
    """
    names = {key for key in SETTINGS if key not in ("batch_size", "workers", "on_bad_image", "cache")}
    cache = Path(data["cache"]).expanduser() if data.get("cache") else default_cache()
    try:
        trained = find_images(cache, **{key: value for key, value in data.items() if key in names})
        known = set(hash_files(trained, cache))
    except InputError:
        return ["the run's own data set is not at hand: whether it holds some of these images was not checked"]
    seen = [path for path, sha in zip(table["path"], table["sha256"], strict=True) if sha in known]
    return [f"{len(seen)} of these images are in the run's own data set, byte for byte: {listed(seen)}"] if seen else []
