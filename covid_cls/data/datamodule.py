"""From a named data set to loaders: find, check, split, decode once, serve."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from covid_cls.data import phantom
from covid_cls.data.dataset import EpochBatches, Features, OrderedBatches, RadiographDataset, on_device
from covid_cls.data.manifest import SPLITS, read_folder, read_manifest
from covid_cls.data.splits import assign_splits, check_classes
from covid_cls.data.store import Store, default_cache, hash_files, open_store
from covid_cls.errors import InputError, listed
from covid_cls.labels import Task
from covid_cls.records import Batch, digest

log = logging.getLogger(__name__)


def find_images(
    cache: Path,
    *,
    kind: str,
    path: str | None = None,
    root: str | None = None,
    images: int = 600,
    phantom_seed: int = 0,
    shortcut: str = "none",
    shortcut_strength: float = 1.0,
) -> pd.DataFrame:
    """The table of a data set as `read_manifest` gives it: a "manifest" at `path`, a "folder" at `root`, or "phantom".

    Phantoms (see `build_phantoms`) are drawn into `cache` on first use. Nothing is decoded.
    """
    if kind == "phantom":
        name = f"{images}-{phantom_seed}-{shortcut}-{shortcut_strength}-{phantom.drawing_version()[:8]}"
        folder = cache / "phantoms" / name
        log.info("phantoms: %s", folder)
        return read_manifest(
            phantom.build_phantoms(
                folder, images=images, seed=phantom_seed, shortcut=shortcut, shortcut_strength=shortcut_strength
            )
        )
    if kind == "folder":
        return read_folder(Path(str(root)).expanduser())
    return read_manifest(Path(str(path)).expanduser())


def set_name(kind: str, path: str | None, root: str | None) -> str:
    """What results call a data set: its folder's name, or "phantom"."""
    if kind == "phantom":
        return kind
    return Path(root or "").resolve().name if kind == "folder" else Path(path or "").resolve().parent.name


def decode_images(
    table: pd.DataFrame, *, size: int, canvas: int, cache: Path, on_bad_image: str
) -> tuple[Store, pd.DataFrame, pd.DataFrame]:
    """The store of `table`'s images, `table` without undecodable ones and with every sha256, and those, quarantined.

    `table` is numbered from 0, and its index stays the image's row in the store. quarantined: path, line, reason.
    InputError naming the undecodable images where on_bad_image is "stop".
    """
    if on_bad_image not in ("stop", "quarantine"):
        raise InputError(f"data.on_bad_image={on_bad_image}: must be stop or quarantine")
    table = table.assign(sha256=hash_files(table, cache))
    store = open_store(table, table["sha256"].tolist(), size=size, canvas=canvas, cache=cache)
    quarantined = table.loc[list(store.bad), ["path", "line"]].assign(reason=list(store.bad.values()))
    if store.bad and on_bad_image == "stop":
        raise InputError(_bad_images(quarantined))
    return store, table.drop(index=list(store.bad)), quarantined


def batch_loader(dataset: RadiographDataset, batches: EpochBatches | OrderedBatches, workers: int) -> DataLoader[Batch]:
    """A loader of whole batches; `workers` processes where images come from disk, which alone gains from them."""
    # Only images on disk gain from other processes, and only they can be copied to a GPU while it works.
    on_disk = not isinstance(dataset.views[0], Tensor)
    workers = workers if on_disk and dataset.stage == 0 else 0
    return DataLoader(
        dataset,
        sampler=batches,  # yields whole batches, so the loader itself must not batch
        batch_size=None,
        num_workers=workers,
        pin_memory=on_disk and torch.cuda.is_available(),
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # starting a loader then draws nothing from the global generator
    )


def class_indices(table: pd.DataFrame, task: Task) -> NDArray[np.int64]:
    """The class index of each row, (N,), in the task's order."""
    index = {name: k for k, name in enumerate(task.classes)}
    return np.array([index[name] for name in table["label"]], dtype=np.int64)


class Radiographs(pl.LightningDataModule):
    """Train, val and test loaders of `Batch`es for one task over phantoms, a folder or a manifest.

    After construction `table` has one row per usable image of the task (see `read_manifest`; split, fold and sha256 are
    filled in), sorted by path; its index is the image's row in the store. `digest` stands for content, labels and
    splits. canvas: side of the stored squares. order_seed: of the training order; `seed` is that of the splits.
    Everything wrong with the data is an InputError here, before any training. See conf/data for the settings.
    """

    def __init__(
        self,
        task: Task,
        canvas: int,
        order_seed: int,
        *,
        kind: str,
        path: str | None = None,
        root: str | None = None,
        images: int = 600,
        phantom_seed: int = 0,
        shortcut: str = "none",
        shortcut_strength: float = 1.0,
        size: int = 256,
        batch_size: int = 32,
        sampler: str = "shuffle",
        seed: int = 0,
        group: str = "patient",
        val_share: float = 0.15,
        test_share: float = 0.15,
        folds: int | None = None,
        fold: int = 0,
        workers: int = 0,
        on_bad_image: str = "stop",
        cache: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise InputError(f"data.batch_size={batch_size}: batch norm needs at least 2")
        self.task, self.group, self.batch_size, self.sampler = task, group, batch_size, sampler
        self.workers, self.order_seed, self._next_epoch = workers, order_seed, 0
        self.name = set_name(kind, path, root)
        cache_root = Path(cache).expanduser() if cache else default_cache()
        table = find_images(
            cache_root,
            kind=kind,
            path=path,
            root=root,
            images=images,
            phantom_seed=phantom_seed,
            shortcut=shortcut,
            shortcut_strength=shortcut_strength,
        )
        # Splits are drawn before classes and bad images are set aside: a patient stays where it is in every task.
        table = assign_splits(
            table, seed=seed, group=group, val_share=val_share, test_share=test_share, folds=folds, fold=fold
        )
        store, self.table, self.quarantined = decode_images(
            table, size=size, canvas=canvas, cache=cache_root, on_bad_image=on_bad_image
        )
        self.images: NDArray[np.uint8] | Tensor = store.images
        self.store_digest, self.cache = store.digest, cache_root
        self.features: Features | None = None
        self.table = self.table[self.table["label"].isin(task.classes)]
        check_classes(self.table, task.classes)
        self.left_out = int((~table["label"].isin(task.classes)).sum())
        columns = ["path", "label", "patient_id", "split", "sha256"]
        self.digest = digest(self.table[columns].to_csv(index=False))

    @property
    def class_counts(self) -> list[int]:
        """Training images per class, in the task's order."""
        train = self.table.loc[self.table["split"] == "train", "label"]
        return [int((train == name).sum()) for name in self.task.classes]

    def facts(self) -> dict[str, Any]:
        """What a reader of the results must know about the data, in plain values."""
        table = self.table
        alone = int(table["patient_id"].str.startswith("image:").sum())
        counts = pd.crosstab(table["split"], table["label"]).reindex(index=SPLITS, columns=self.task.classes)
        notes = []
        if alone:
            notes.append(f"{alone} of {len(table)} images have no patient_id: each counts as a patient of its own")
        if self.group == "image":
            notes.append("LEAKY SPLIT: images were split without regard to patients (data.group=image)")
        if self.left_out:
            notes.append(f"{self.left_out} images of classes outside the task {self.task.name} were left out")
        if len(self.quarantined):
            notes.append(f"{len(self.quarantined)} undecodable images were quarantined")
        return {
            "images": len(table),
            "patients": int(table["patient_id"].nunique()),
            "images_per_split_and_class": {split: row.to_dict() for split, row in counts.iterrows()},
            "patients_per_split": table.groupby("split")["patient_id"].nunique().to_dict(),
            "sources": table["source"].replace("", "unknown").value_counts().to_dict(),
            "quarantined": self.quarantined.to_dict("records"),
            "notes": notes,
        }

    def keep_on(self, device: torch.device) -> None:
        """Serve images from the memory of `device` from now on, if it is a GPU and they fit."""
        if not isinstance(self.images, Tensor):
            self.images = on_device(self.images, device)

    def dataset(self, split: str, features: Features | None = None) -> RadiographDataset:
        """The images of one split, in the order of `table`; or what a network made of them."""
        part = self.table[self.table["split"] == split]
        labels = class_indices(part, self.task)
        rows = part.index.to_numpy(dtype=np.int64)
        if features is None:
            return RadiographDataset([self.images], rows, labels)
        return RadiographDataset(
            features.train if split == "train" else [features.centre], rows, labels, features.stage
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training batches: images, or `features` where these are set."""
        rank, world = self._rank()
        dataset = self.dataset("train", self.features)
        views = len(dataset.views)
        batches = EpochBatches(dataset.labels, self.batch_size, self.order_seed, self.sampler, rank, world, views)
        batches.set_epoch(self._next_epoch)
        return batch_loader(dataset, batches, self.workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches, in order: images, or `features` where these are set."""
        return self.ordered_loader("val", *self._rank(), features=self.features)

    def ordered_loader(
        self, split: str, rank: int = 0, world: int = 1, features: Features | None = None
    ) -> DataLoader[Batch]:
        """Every image of `split` once, or its features, in the order of `table`."""
        dataset = self.dataset(split, features)
        return batch_loader(dataset, OrderedBatches(len(dataset), self.batch_size, rank, world), self.workers)

    def state_dict(self) -> dict[str, Any]:
        """The epoch that a resumed run starts with.

        Worker processes are started before Lightning sets the epoch (Lightning issue 21938), so a resumed run with
        workers would otherwise see the order of epoch 0 again.
        """
        assert self.trainer is not None
        return {"next_epoch": self.trainer.current_epoch + 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the epoch that `state_dict` names."""
        self._next_epoch = int(state_dict["next_epoch"])

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _bad_images(bad: pd.DataFrame) -> str:
    faults = [
        f"{path} (line {line}): {reason}" if line else f"{path}: {reason}"
        for path, line, reason in zip(bad["path"], bad["line"], bad["reason"], strict=True)
    ]
    return (
        f"data: {len(bad)} images cannot be used: {listed(faults)}. "
        "Mend or remove them, or set data.on_bad_image=quarantine to go on without them"
    )
