"""Cache of the outputs of frozen stages, kept on disk for all runs of a sweep that share these stages."""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from rich.progress import track

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.dataset import Features, RadiographDataset, as_array, on_device
from covid_cls.errors import InputError
from covid_cls.io import atomic_file, digest, remove_temporary_files, write_json
from covid_cls.models.inference import Prefix
from covid_cls.models.transforms import Augment
from covid_cls.training.module import Classifier

# Increase it when the frozen stages give other features for the same images, or the files of the cache change.
FEATURES_VERSION = 1
_SEED = 0  # random seed of the fixed views, which all seeds of a sweep share
# All batches have this size, the last one by repetition: with another size, results are rounded differently, and they
# would depend on which run computed them.
_BATCH = 32
_SAVE = 32  # batches after which the finished rows are recorded, from which a killed build continues
log = logging.getLogger(__name__)


def fixed_views(feature_cache: str, augment: Augment, strategy: Mapping[str, Any]) -> int | None:
    """Return the number of fixed augmented views of each training image; 0: the centre view, None: no cache.

    Args:
        feature_cache: The setting: "off", "exact" or "views:K".
        augment: The augmentation of training.
        strategy: Section of the configuration.

    Raises:
        InputError: The setting has another value, or contradicts the augmentation or the strategy.
    """
    if feature_cache == "off":
        return None
    if strategy["name"] == "full" and strategy["freeze_until"] is None:
        raise InputError(f"feature_cache={feature_cache}: strategy=full freezes no stages; set feature_cache=off")
    if feature_cache == "exact":
        if augment.random:
            raise InputError(
                f"feature_cache=exact: augment={augment.name} changes each image in every epoch; set augment=none, or "
                "feature_cache=views:K to train on K fixed augmented views of each image, which is another augmentation"
            )
        return 0
    # The command line turns a value such as 3 into a number.
    views = re.fullmatch(r"views:([1-9]\d*)", str(feature_cache))
    if not views:
        raise InputError(f"feature_cache={feature_cache}: must be off, exact or views:K with K of at least 1")
    if not augment.random:
        raise InputError(f"feature_cache={feature_cache}: augment=none has one view of each image; use exact")
    return int(views[1])


def feature_note(feature_cache: str) -> list[str]:
    """Return the note that a run with fixed augmented views needs in its results, or an empty list."""
    if not feature_cache.startswith("views:"):
        return []
    views = feature_cache.removeprefix("views:")
    return [
        f"trained on {views} fixed augmented views of each image (feature_cache=views:{views}), not on a new view in "
        "each epoch"
    ]


def serve_features(classifier: Classifier, data: Radiographs, views: int, limit_gb: float) -> None:
    """Let `data` serve features in place of training and validation images.

    Args:
        classifier: Its `prefix` computes the features that are missing.
        data: The data set.
        views: See `fixed_views`.
        limit_gb: Maximum size of the cache, in 1e9 bytes.
    """
    assert classifier.prefix is not None
    cache = FeatureCache(classifier, data, classifier.prefix, limit_gb)
    device = classifier.prefix.device
    # Without fixed views, training uses the centre view, as validation does.
    train = [on_device(array, device) for array in cache.load(range(views), ["train"])]
    (array,) = cache.load([None], ["val"] if views else ["train", "val"])
    centre = on_device(array, device)
    data.features = Features(cache.prefix.stop, train or [centre], centre)


def prediction_features(classifier: Classifier, data: Radiographs, splits: Sequence[str], limit_gb: float) -> Features:
    """Return the float32 features of `splits` for predictions; runs with the same frozen stages share them."""
    prefix = Prefix(classifier.net, classifier.device)
    (centre,) = FeatureCache(classifier, data, prefix, limit_gb).load([None], splits)
    return Features(prefix.stop, [centre], centre)


class FeatureCache:
    """The outputs of a `Prefix` for the images of a store, in the folder `features` of the data set's cache.

    The key of a file is the prefix's weights and precision, the preprocessing, the view, the content of the store and
    `FEATURES_VERSION`.

    Args:
        classifier: Its preprocessing and augmentation are used.
        data: The data set.
        prefix: The frozen stages.
        limit_gb: Maximum size of the folder, in 1e9 bytes.
    """

    def __init__(self, classifier: Classifier, data: Radiographs, prefix: Prefix, limit_gb: float) -> None:
        self.classifier, self.data, self.prefix, self.limit = classifier, data, prefix, limit_gb * 1e9
        one = as_array(prefix.example(classifier.preprocess.crop))
        self.shape, self.dtype, self.bytes_each = one.shape[1:], one.dtype, one.nbytes
        self.root = data.cache / "features"

    def load(self, views: Sequence[int | None], splits: Sequence[str]) -> list[NDArray[Any]]:
        """Return one memory-mapped array per view, with a row per image of the store; compute the missing rows.

        Args:
            views: Numbers of augmented views, or None for the centre view.
            splits: Only the rows of these splits are computed.

        Raises:
            InputError: The folder would exceed its limit or the free space. Nothing has been computed then.
        """
        rows = self.data.table.index[self.data.table["split"].isin(splits)].to_numpy(dtype=np.int64)
        folders = [self.root / digest(json.dumps(self._key(view), sort_keys=True)) for view in views]
        self._check_room(sum(int((~self._known(folder)[rows]).sum()) for folder in folders))
        return [self._open(folder, view, rows) for folder, view in zip(folders, views, strict=True)]

    def _key(self, view: int | None) -> dict[str, Any]:
        hparams: Any = self.classifier.hparams
        return {
            "weights": self.prefix.digest,
            "backbone": hparams.backbone,
            "stages": self.prefix.stop,
            "precision": str(self.prefix.dtype),
            "compiled": self.prefix.compiled,
            "device": self.prefix.device.type,
            "preprocess": hparams.preprocess,
            "store": self.data.store_digest,
            "version": FEATURES_VERSION,
            "view": "centre" if view is None else {"augment": hparams.augment, "seed": _SEED, "draw": view},
        }

    def _known(self, folder: Path) -> NDArray[np.bool_]:
        """Return which rows of the store are computed."""
        images, path = len(self.data.images), folder / "known.npy"
        if path.is_file() and self._complete(folder):
            # numpy raises one of these for a damaged file.
            with suppress(ValueError, OSError, EOFError):
                known = np.load(path)
                if (known.shape, known.dtype) == ((images,), np.bool_):
                    return np.asarray(known)
            log.warning("%s: damaged; these features are computed again", path)
        return np.zeros(images, dtype=bool)

    def _complete(self, folder: Path) -> bool:
        """Return whether the file of the features has its full length, which includes a header."""
        path = folder / "features.npy"
        return path.is_file() and path.stat().st_size > len(self.data.images) * self.bytes_each

    def _check_room(self, missing: int) -> None:
        need = missing * self.bytes_each
        if not need:
            return
        used = sum(file.stat().st_blocks * 512 for file in self.root.glob("*/features.npy"))
        if need + used > self.limit:
            raise InputError(
                f"feature_cache_gb={self.limit / 1e9:g}: {missing:,} views of images need {need / 1e9:.2f} GB, and "
                f"{self.root} uses {used / 1e9:.2f} GB; raise feature_cache_gb to {(need + used) / 1e9 + 0.01:.2f}, "
                "reduce the number of views, or delete that folder while no run uses it"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if need > 0.95 * free:
            raise InputError(f"{self.root}: features need {need:,} bytes, {free:,} are free; set data.cache")

    def _open(self, folder: Path, view: int | None, rows: NDArray[np.int64]) -> NDArray[Any]:
        path = folder / "features.npy"
        folder.mkdir(parents=True, exist_ok=True)
        # Runs of a sweep that start together wait for the one that computes the features.
        with FileLock(folder / ".lock"):
            remove_temporary_files(folder)
            if not (folder / "about.json").is_file():
                write_json(folder / "about.json", self._key(view))
            known = self._known(folder)
            todo = rows[~known[rows]]
            if not self._complete(folder):
                (folder / "known.npy").unlink(missing_ok=True)
                # This creates a sparse file, which takes disk space only for rows that are written.
                np.lib.format.open_memmap(path, "w+", self.dtype, (len(self.data.images), *self.shape))
            if len(todo):
                self._compute(folder, view, todo, known)
        mapped: NDArray[Any] = np.load(path, mmap_mode="r")
        return mapped

    def _compute(self, folder: Path, view: int | None, todo: NDArray[np.int64], known: NDArray[np.bool_]) -> None:
        array: np.memmap[Any, Any] = np.load(folder / "features.npy", mmap_mode="r+")
        starts = range(0, len(todo), _BATCH)
        what = "centre view" if view is None else f"view {view + 1}"
        for number, start in enumerate(track(starts, f"frozen stages, {what}", transient=True), 1):
            rows = todo[start : start + _BATCH]
            array[rows] = self._compute_batch(np.resize(rows, _BATCH), view)[: len(rows)]
            known[rows] = True
            if number % _SAVE == 0 or start == starts[-1]:
                # The features reach the disk before their record, so that a power failure leaves no false record.
                array.flush()
                with atomic_file(folder / "known.npy") as file:
                    np.save(file, known)
        log.info("frozen stages, %s: %d images computed, kept in %s", what, len(todo), folder)

    def _compute_batch(self, rows: NDArray[np.int64], view: int | None) -> NDArray[Any]:
        classifier, prefix = self.classifier, self.prefix
        batch = RadiographDataset([self.data.images], rows, np.zeros_like(rows))[range(len(rows))]
        canvas = batch.x.to(prefix.device)
        if view is None:
            shown = classifier.preprocess.centre(canvas)
        else:
            shown = classifier.augment(canvas, batch.index, classifier.preprocess.crop, _SEED, view)
        return as_array(prefix(classifier.preprocess.normalise(shown)))
