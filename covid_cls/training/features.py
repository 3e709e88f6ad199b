"""Frozen prefixes computed once: what they make of each image, kept on disk for all cells of a sweep that share it."""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from rich.progress import track

from covid_cls import models
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.dataset import Features, RadiographDataset, as_array, on_device
from covid_cls.errors import InputError
from covid_cls.models.prefix import Prefix
from covid_cls.models.transforms import Augment
from covid_cls.records import digest, files_digest, remove_scratch, whole_file, write_json
from covid_cls.training.classifier import Classifier

log = logging.getLogger(__name__)
_SEED = 0  # of the fixed draws: all seeds of a sweep share them
_BATCH = 32  # always whole ones: another size rounds differently, and bits must not depend on which cell came first
_SAVE = 32  # batches after which finished rows are put on record: a build that is killed goes on from there


def fixed_views(feature_cache: str, augment: Augment, strategy: dict[str, Any]) -> int | None:
    """How many fixed draws of each training image are trained on; 0: the centre view alone, None: no cache.

    feature_cache: "off", "exact" or "views:K". InputError where it is something else, or contradicts `augment` or
    `strategy`.
    """
    if feature_cache == "off":
        return None
    if strategy["name"] == "full" and strategy["freeze_until"] is None:
        raise InputError(f"feature_cache={feature_cache}: strategy=full freezes nothing that could be computed once")
    if feature_cache == "exact":
        if augment.random:
            raise InputError(
                f"feature_cache=exact: augment={augment.name} draws each image anew in every epoch; set augment=none, "
                "or feature_cache=views:K to train on K fixed draws of each image, which is another augmentation"
            )
        return 0
    views = re.fullmatch(r"views:([1-9]\d*)", str(feature_cache))  # the command line makes 3 a number
    if not views:
        raise InputError(f"feature_cache={feature_cache}: must be off, exact or views:K with K of at least 1")
    if not augment.random:
        raise InputError(f"feature_cache={feature_cache}: augment=none has one view of each image; use exact")
    return int(views[1])


def feature_note(feature_cache: str) -> list[str]:
    """What a reader of the results must know about a cache, if anything."""
    if not feature_cache.startswith("views:"):
        return []
    drawn = feature_cache.removeprefix("views:")
    return [
        f"trained on {drawn} fixed draws of each image (feature_cache=views:{drawn}), not on a fresh one each epoch"
    ]


class FeatureCache:
    """Outputs of a `Prefix` over the images of a store, computed where they are missing, read from disk otherwise.

    They lie in `<cache>/features`, keyed by the prefix's weights and precision, the preprocessing, the view, the
    store's content and the code. limit_gb: what this folder may hold, in units of 1e9 bytes.
    """

    def __init__(self, classifier: Classifier, data: Radiographs, prefix: Prefix, limit_gb: float) -> None:
        self.classifier, self.data, self.prefix, self.limit = classifier, data, prefix, limit_gb * 1e9
        one = as_array(prefix.example(classifier.preprocess.crop))
        self.shape, self.dtype, self.bytes_each = one.shape[1:], one.dtype, one.nbytes
        self.root = data.cache / "features"
        hparams: Any = classifier.hparams
        self._key = {
            "weights": prefix.digest,
            "backbone": hparams.backbone,
            "stages": prefix.stop,
            "precision": str(prefix.dtype),
            "compiled": prefix.compiled,
            "device": prefix.device.type,
            "preprocess": hparams.preprocess,
            "store": data.store_digest,
            "code": files_digest(sorted(Path(models.__file__).parent.glob("*.py"))),
        }

    def views(self, draws: Sequence[int | None], splits: Sequence[str]) -> list[NDArray[Any]]:
        """One memory-mapped array (M, ...) per draw, in which the rows of `splits` are computed; None: the centre.

        InputError, before anything is computed, where the folder would outgrow its limit or the disk.
        """
        rows = self.data.table.index[self.data.table["split"].isin(splits)].to_numpy(dtype=np.int64)
        folders = [self._folder(draw) for draw in draws]
        missing = sum(int((~self._known(folder)[rows]).sum()) for folder in folders)
        self._check_room(missing)
        return [self._view(folder, draw, rows) for folder, draw in zip(folders, draws, strict=True)]

    def _about(self, draw: int | None) -> dict[str, Any]:
        hparams: Any = self.classifier.hparams
        return {
            **self._key,
            "view": "centre" if draw is None else {"augment": hparams.augment, "seed": _SEED, "draw": draw},
        }

    def _folder(self, draw: int | None) -> Path:
        folder = self.root / digest(json.dumps(self._about(draw), sort_keys=True))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _known(self, folder: Path) -> NDArray[np.bool_]:
        """Which rows of the store are computed."""
        images, path = len(self.data.images), folder / "known.npy"
        if path.is_file() and self._complete(folder):
            with suppress(ValueError, OSError, EOFError):  # what numpy makes of a damaged file
                known = np.load(path)
                if (known.shape, known.dtype) == ((images,), np.bool_):
                    return np.asarray(known)
            log.warning("%s: damaged; these features are computed anew", path)
        return np.zeros(images, dtype=bool)

    def _complete(self, folder: Path) -> bool:
        """Whether the file of the features has its whole length."""
        path = folder / "features.npy"
        return path.is_file() and path.stat().st_size > len(self.data.images) * self.bytes_each  # and a header

    def _check_room(self, missing: int) -> None:
        need = missing * self.bytes_each
        if not need:
            return
        held = sum(file.stat().st_blocks * 512 for file in self.root.glob("*/features.npy"))
        if need + held > self.limit:
            raise InputError(
                f"feature_cache_gb={self.limit / 1e9:g}: {missing:,} views of images need {need / 1e9:.2f} GB, and "
                f"{self.root} holds {held / 1e9:.2f} GB; raise feature_cache_gb to {(need + held) / 1e9 + 0.01:.2f}, "
                "ask for fewer views, or delete that folder while no run uses it"
            )
        free = shutil.disk_usage(self.root).free
        if need > 0.95 * free:
            raise InputError(f"{self.root}: features need {need:,} bytes and {free:,} are free; set data.cache")

    def _view(self, folder: Path, draw: int | None, rows: NDArray[np.int64]) -> NDArray[Any]:
        path = folder / "features.npy"
        with FileLock(folder / ".lock"):
            remove_scratch(folder)
            if not (folder / "about.json").is_file():
                write_json(folder / "about.json", self._about(draw))
            known = self._known(folder)
            todo = rows[~known[rows]]
            if not self._complete(folder):
                (folder / "known.npy").unlink(missing_ok=True)
                images = len(self.data.images)
                with whole_file(path) as file:
                    header = {"descr": self.dtype.str, "fortran_order": False, "shape": (images, *self.shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                    file.truncate(file.tell() + images * self.bytes_each)  # takes room only where rows are written
            if len(todo):
                self._compute(folder, draw, todo, known)
        mapped: NDArray[Any] = np.load(path, mmap_mode="r")
        return mapped

    def _compute(self, folder: Path, draw: int | None, todo: NDArray[np.int64], known: NDArray[np.bool_]) -> None:
        array: np.memmap[Any, Any] = np.load(folder / "features.npy", mmap_mode="r+")
        starts = range(0, len(todo), _BATCH)
        what = "the centre view" if draw is None else f"draw {draw + 1}"
        for number, start in enumerate(track(starts, f"frozen stages, {what}", transient=True), 1):
            rows = todo[start : start + _BATCH]
            array[rows] = self._features(np.resize(rows, _BATCH), draw)[: len(rows)]
            known[rows] = True
            if number % _SAVE == 0 or start == starts[-1]:
                array.flush()  # to the disk: not even a loss of power leaves rows on record that are not there
                with whole_file(folder / "known.npy") as file:
                    np.save(file, known)
        log.info("frozen stages, %s: %d images computed, kept in %s", what, len(todo), folder)

    def _features(self, rows: NDArray[np.int64], draw: int | None) -> NDArray[Any]:
        classifier, prefix = self.classifier, self.prefix
        batch = RadiographDataset([self.data.images], rows, np.zeros_like(rows))[range(len(rows))]
        canvas = batch.x.to(prefix.device)
        if draw is None:
            view = classifier.preprocess.centre(canvas)
        else:
            view = classifier.augment(canvas, batch.index, classifier.preprocess.crop, _SEED, draw)
        return as_array(prefix(classifier.preprocess.normalise(view)))


def serve_features(classifier: Classifier, data: Radiographs, views: int, limit_gb: float) -> None:
    """Make `data` serve training and validation from what the classifier's prefix computes once; see `fixed_views`."""
    assert classifier.prefix is not None
    cache = FeatureCache(classifier, data, classifier.prefix, limit_gb)
    device = classifier.prefix.device
    train = cache.views(range(views), ["train"])
    (centre,) = cache.views([None], ["val"] if views else ["train", "val"])
    centre_there = on_device(centre, device)
    data.features = Features(
        cache.prefix.stop, [on_device(array, device) for array in train] or [centre_there], centre_there
    )


def prediction_features(classifier: Classifier, data: Radiographs, splits: Sequence[str], limit_gb: float) -> Features:
    """The float32 features of `splits`, for predictions; a cell that shares its prefix has computed them already."""
    prefix = Prefix(classifier.net, classifier.device)
    (centre,) = FeatureCache(classifier, data, prefix, limit_gb).views([None], splits)
    return Features(prefix.stop, [centre], centre)
