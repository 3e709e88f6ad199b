"""The settings of a data set: where its images are, and how they are split and served."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import pandas as pd

from covid_cls.data.manifest import read_folder, read_manifest
from covid_cls.data.phantoms import PHANTOMS_VERSION, build_phantoms
from covid_cls.data.splits import SplitSettings
from covid_cls.data.store import default_cache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSource:
    """A set of images: a manifest, a folder with a subfolder per class, or phantoms.

    Attributes:
        kind: "manifest", "folder" or "phantom".
        path: The CSV file of a manifest.
        root: The folder of a folder data set.
        images: Number of phantoms.
        phantom_seed: Random seed of the phantoms.
        shortcut: Shortcut in the phantoms, see `build_phantoms`.
        shortcut_strength: How well the shortcut predicts the class, 0 to 1.
        cache: Folder of the decoded images and the phantoms; None is `default_cache`.
    """

    kind: str
    path: str | None = None
    root: str | None = None
    images: int = 600
    phantom_seed: int = 0
    shortcut: str = "none"
    shortcut_strength: float = 1.0
    cache: str | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Take the fields of this class from the section `data` of a configuration; ignore its other keys."""
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    @property
    def name(self) -> str:
        """The name of the data set in results: its folder's name, or "phantom"."""
        if self.kind == "folder":
            return Path(self.root or "").resolve().name
        return "phantom" if self.kind == "phantom" else Path(self.path or "").resolve().parent.name

    @property
    def cache_folder(self) -> Path:
        """The folder of the decoded images and the phantoms."""
        return Path(self.cache).expanduser() if self.cache else default_cache()

    def read_table(self) -> pd.DataFrame:
        """Return the table of the images as `read_manifest` does; draw phantoms on first use, decode no image."""
        if self.kind == "folder":
            return read_folder(Path(str(self.root)).expanduser())
        if self.kind != "phantom":
            return read_manifest(Path(str(self.path)).expanduser())
        # `build_phantoms` returns an existing set whatever its arguments were, so the name contains all of them.
        name = f"{self.images}-{self.phantom_seed}-{self.shortcut}-{self.shortcut_strength}-v{PHANTOMS_VERSION}"
        folder = self.cache_folder / "phantoms" / name
        log.info("phantoms: %s", folder)
        return read_manifest(
            build_phantoms(folder, self.images, self.phantom_seed, self.shortcut, self.shortcut_strength)
        )


@dataclass(frozen=True)
class DataSettings(SplitSettings, ImageSource):
    """The section `data` of a configuration: a set of images, its splits and its batches.

    Attributes:
        size: Short side in pixels to which every image is scaled.
        batch_size: Images per step, over all processes.
        sampler: Order of the training images, see `EpochBatches`.
        workers: Processes that load batches.
        on_bad_image: "stop" or "quarantine", see `decode_images`.
    """

    size: int = 256
    batch_size: int = 32
    sampler: str = "shuffle"
    workers: int = 0
    on_bad_image: str = "stop"


# Settings that also apply to images on which a trained network is evaluated. Its own preprocessing is used, and these
# images are not split.
EXTERNAL_SETTINGS = (*(field.name for field in fields(ImageSource)), "batch_size", "workers", "on_bad_image")
