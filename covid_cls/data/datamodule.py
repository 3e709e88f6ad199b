"""Batches of a data set: read its table, split it, decode the images once and serve them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from covid_cls.data.dataset import EpochBatches, Features, OrderedBatches, RadiographDataset, on_device
from covid_cls.data.image_source import DataSettings, ImageSource
from covid_cls.data.manifest import SPLITS
from covid_cls.data.splits import assign_splits, check_classes
from covid_cls.data.store import Store, hash_files, open_store
from covid_cls.errors import InputError, listed
from covid_cls.io import Batch, digest
from covid_cls.tasks import Task

# The name of the only split of `ExternalRadiographs`.
EXTERNAL_SPLIT = "external"


class Radiographs(pl.LightningDataModule):
    """Training, validation and test batches of one task.

    Attributes:
        table: One row per usable image of the task, sorted by path, with the columns of `read_manifest`; split, fold
            and sha256 are filled in. The index is the row of the image in the store.
        images: The canvases of the store, uint8 (M, S, S).
        digest: Identifies the content, labels and splits of the images.
        store_digest: Identifies the content of the store.
        quarantined: Undecodable images: path, line, reason.
        left_out: Number of images whose class the task does not have.
        features: Outputs of a frozen network that training uses in place of the images, or None.
    """

    def __init__(self, task: Task, canvas: int, order_seed: int, settings: DataSettings) -> None:
        """Read, split and decode the images, so that every error in the data is found before training.

        Args:
            task: The classes; images of other classes are left out.
            canvas: Side in pixels of the stored squares.
            order_seed: Random seed of the training order. That of the splits is `settings.seed`.
            settings: The section `data` of the configuration.

        Raises:
            InputError: A setting, the manifest, an image or a split is at fault.
        """
        super().__init__()
        if settings.batch_size < 2:
            raise InputError(f"data.batch_size={settings.batch_size}: batch norm needs at least 2 images per batch")
        self.task, self.order_seed, self.settings, self._next_epoch = task, order_seed, settings, 0
        self.name, self.cache = settings.name, settings.cache_folder
        self.batch_size, self.workers = settings.batch_size, settings.workers
        # Images are split before classes and bad images are left out, so that a patient is in the same split in
        # every task.
        table = assign_splits(settings.read_table(), settings)
        store, usable, self.quarantined = decode_images(
            table, size=settings.size, canvas=canvas, cache=self.cache, on_bad_image=settings.on_bad_image
        )
        self.images: NDArray[np.uint8] | Tensor = store.images
        self.store_digest = store.digest
        self.features: Features | None = None
        self.table: pd.DataFrame = usable[usable["label"].isin(task.classes)]
        check_classes(self.table, task.classes)
        self.left_out = int((~table["label"].isin(task.classes)).sum())
        columns = ["path", "label", "patient_id", "split", "sha256"]
        self.digest = digest(self.table[columns].to_csv(index=False))

    @property
    def class_counts(self) -> list[int]:
        """Number of training images per class, in the task's order."""
        train = self.table.loc[self.table["split"] == "train", "label"]
        return [int((train == name).sum()) for name in self.task.classes]

    def facts(self) -> dict[str, Any]:
        """Return counts and notes on the data as plain values for run.json."""
        table = self.table
        alone = int(table["patient_id"].str.startswith("image:").sum())
        counts = pd.crosstab(table["split"], table["label"]).reindex(index=SPLITS, columns=self.task.classes)
        notes = {
            f"{alone} of {len(table)} images have no patient_id: each counts as a separate patient": alone,
            "LEAKY SPLIT: images of one patient can be in several splits (data.group=image)": (
                self.settings.group == "image"
            ),
            f"{self.left_out} images of classes outside the task {self.task.name} were left out": self.left_out,
            f"{len(self.quarantined)} undecodable images were quarantined": len(self.quarantined),
        }
        return {
            "images": len(table),
            "patients": int(table["patient_id"].nunique()),
            "images_per_split_and_class": {split: row.to_dict() for split, row in counts.iterrows()},
            "patients_per_split": table.groupby("split")["patient_id"].nunique().to_dict(),
            "sources": table["source"].replace("", "unknown").value_counts().to_dict(),
            "quarantined": self.quarantined.to_dict("records"),
            "notes": [note for note, applies in notes.items() if applies],
        }

    def keep_on(self, device: torch.device) -> None:
        """Serve images from the memory of `device` from now on, if it is a GPU and they fit."""
        if not isinstance(self.images, Tensor):
            self.images = on_device(self.images, device)

    def dataset(self, split: str, features: Features | None = None) -> RadiographDataset:
        """Return the images of one split, or their features, in the order of `table`."""
        views: Any = [self.images]
        if features is not None:
            views = features.train if split == "train" else [features.centre]
        part = self.table[self.table["split"] == split]
        return _dataset(views, part, self.task, features.stage if features else 0)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled training batches of images, or of `features` if these are set."""
        rank, world = self._rank()
        dataset = self.dataset("train", self.features)
        batches = EpochBatches(
            dataset.labels, self.batch_size, self.order_seed, self.settings.sampler, rank, world, len(dataset.views)
        )
        batches.set_epoch(self._next_epoch)
        return batch_loader(dataset, batches, self.workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return validation batches of images, or of `features` if these are set."""
        return self.ordered_loader("val", *self._rank(), features=self.features)

    def ordered_loader(
        self, split: str, rank: int = 0, world: int = 1, features: Features | None = None
    ) -> DataLoader[Batch]:
        """Return batches that contain every image of `split`, or its features, once and in the order of `table`."""
        dataset = self.dataset(split, features)
        return batch_loader(dataset, OrderedBatches(len(dataset), self.batch_size, rank, world), self.workers)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch with which a resumed run starts."""
        # Lightning starts worker processes before it sets the epoch (its issue 21938), so a resumed run with workers
        # would otherwise get the order of epoch 0 again.
        assert self.trainer is not None
        return {"next_epoch": self.trainer.current_epoch + 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start with the epoch of a `state_dict`."""
        self._next_epoch = int(state_dict["next_epoch"])

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class ExternalRadiographs:
    """All usable images of a data set as one split, on which a trained network is evaluated.

    The data set need not contain every class.

    Attributes:
        table: As in `Radiographs`, but split is `EXTERNAL_SPLIT` everywhere.
        notes: Which images were left out and which classes are absent.
    """

    def __init__(self, task: Task, size: int, crop: int, settings: DataSettings) -> None:
        """Read and decode the images.

        Args:
            task: The task of the network.
            size: Short side in pixels to which the training images were scaled.
            crop: Side in pixels of the network's input.
            settings: Only `EXTERNAL_SETTINGS` are used.

        Raises:
            InputError: A setting, the manifest or an image is at fault, or no image has a class of the task.
        """
        self.task, self.settings, self.name = task, settings, settings.name
        table, cache = settings.read_table(), settings.cache_folder
        store, usable, quarantined = decode_images(
            table, size=size, canvas=crop, cache=cache, on_bad_image=settings.on_bad_image
        )
        self.images = store.images
        known = usable["label"].isin(task.classes)
        self.table: pd.DataFrame = usable[known].assign(split=EXTERNAL_SPLIT, fold="")
        if self.table.empty:
            raise InputError(f"data: {self.name} has no usable image of {listed(task.classes)}. Give other images")
        self.notes = [
            f"{n} images of {label} were left out: the task {task.name} has no such class"
            for label, n in usable.loc[~known, "label"].value_counts().items()
        ]
        self.notes += [
            f"{self.name} has no image of {label}: scores that need this class are undefined"
            for label in task.classes
            if not (self.table["label"] == label).any()
        ]
        if len(quarantined):
            paths = listed(quarantined["path"].tolist())
            self.notes.append(f"{len(quarantined)} undecodable images were quarantined: {paths}")

    def ordered_loader(self, split: str, features: Features | None = None) -> DataLoader[Batch]:
        """Return batches of all images in the order of `table`; `split` is `EXTERNAL_SPLIT`, without features."""
        assert (split, features) == (EXTERNAL_SPLIT, None)
        dataset = _dataset([self.images], self.table, self.task)
        return batch_loader(dataset, OrderedBatches(len(dataset), self.settings.batch_size), self.settings.workers)


def decode_images(
    table: pd.DataFrame, *, size: int, canvas: int, cache: Path, on_bad_image: str
) -> tuple[Store, pd.DataFrame, pd.DataFrame]:
    """Decode the images of a table into a store, and remove those that cannot be decoded from the table.

    Args:
        table: As `read_manifest` returns it, with the index 0 to N - 1.
        size: Short side in pixels to which every image is scaled.
        canvas: Side in pixels of the stored squares.
        cache: The folder of the stores.
        on_bad_image: "stop" or "quarantine".

    Returns:
        The store; the table of decodable images, with every sha256, whose index is the row in the store; and the
        undecodable images (path, line, reason).

    Raises:
        InputError: Some images cannot be decoded and on_bad_image is "stop", or a sha256 is wrong.
    """
    if on_bad_image not in ("stop", "quarantine"):
        raise InputError(f"data.on_bad_image={on_bad_image}: must be stop or quarantine")
    table = table.assign(sha256=hash_files(table, cache))
    store = open_store(table, table["sha256"].tolist(), size=size, canvas=canvas, cache=cache)
    quarantined = table.loc[list(store.bad), ["path", "line"]].assign(reason=list(store.bad.values()))
    if store.bad and on_bad_image == "stop":
        rows = zip(quarantined["path"], quarantined["line"], quarantined["reason"], strict=True)
        faults = [f"{path} (line {line}): {reason}" if line else f"{path}: {reason}" for path, line, reason in rows]
        raise InputError(
            f"data: {len(faults)} images cannot be used: {listed(faults)}. "
            "Fix or remove them, or set data.on_bad_image=quarantine to leave them out"
        )
    return store, table.drop(index=list(store.bad)), quarantined


def batch_loader(dataset: RadiographDataset, batches: EpochBatches | OrderedBatches, workers: int) -> DataLoader[Batch]:
    """Return a loader whose items are the complete batches that `batches` lists."""
    # Worker processes and pinned memory only help if images are read from disk: features are cheap to read, and
    # tensors are on the GPU already.
    on_disk = not isinstance(dataset.views[0], Tensor)
    workers = workers if on_disk and dataset.stage == 0 else 0
    return DataLoader(
        dataset,
        # The sampler yields complete batches, so the loader must not collect items itself.
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=on_disk and torch.cuda.is_available(),
        persistent_workers=workers > 0,
        # Without its own generator a loader draws from the global one whenever it is iterated.
        generator=torch.Generator(),
    )


def seen_in_training(table: pd.DataFrame, data: Mapping[str, Any]) -> list[str]:
    """Return notes on images that a run may have been trained on.

    Args:
        table: The table of `ExternalRadiographs`.
        data: The section `data` of the run's configuration.

    Returns:
        A note that names the images of `table` that are in the run's data set, or that the data set was not found;
        an empty list if no image is in it.
    """
    source = ImageSource.from_settings(data)
    try:
        known = set(hash_files(source.read_table(), source.cache_folder))
    except InputError:
        return ["the data set of the run was not found: whether it contains some of these images was not checked"]
    seen = table.loc[table["sha256"].isin(known), "path"].tolist()
    note = f"{len(seen)} of these images are in the data set of the run, byte for byte: {listed(seen)}"
    return [note] if seen else []


def _dataset(views: Any, part: pd.DataFrame, task: Task, stage: int = 0) -> RadiographDataset:
    rows = part.index.to_numpy(dtype=np.int64)
    labels = pd.Index(task.classes).get_indexer(pd.Index(part["label"])).astype(np.int64)
    return RadiographDataset(views, rows, labels, stage)
