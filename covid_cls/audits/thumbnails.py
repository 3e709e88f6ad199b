"""Every image of a set as a small grey square, decoded once per host."""

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from covid_cls.data import readers
from covid_cls.data.limits import BadImage
from covid_cls.data.readers import read_image
from covid_cls.data.store import hash_files
from covid_cls.errors import InputError
from covid_cls.records import digest, files_digest

_CHUNK = 256  # images between two commits: a build that is killed goes on from there


def thumbnails(table: pd.DataFrame, side: int, cache: Path) -> NDArray[np.uint8]:
    """The whole of each image, squashed to `side` × `side` grey pixels, uint8 (N, side, side); row i is the table's.

    table: as `read_manifest` gives it. PIL's antialiased bilinear; the image's edge is the thumbnail's edge, whatever
    its shape. A file that `read_image` refuses is black. They are kept by content in `cache`/thumbnails, so that all
    tables, folds and tasks over the same files decode them once. InputError where a file does not have the sha256 of
    its row, or the cache is damaged.
    """
    keys = [Path(path).suffix.lower() + sha for path, sha in zip(table["path"], hash_files(table, cache), strict=True)]
    path = cache / "thumbnails" / f"{side}-{_version()[:16]}.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(path, timeout=60)) as store:  # 60 s: another process may be writing its chunk
            store.execute("CREATE TABLE IF NOT EXISTS thumbnails (key TEXT PRIMARY KEY, pixels BLOB) WITHOUT ROWID")
            known = dict(_known(store, keys))
            files = {key: Path(file) for key, file in zip(keys, table["file"], strict=True) if key not in known}
            known.update(_decode(store, files, side))
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"{path}: thumbnails cannot be kept there ({error}); delete the file, or set data.cache"
        ) from error
    black = bytes(side * side)
    pixels = np.frombuffer(b"".join(known.get(key, black) for key in keys), np.uint8)
    return pixels.reshape(len(keys), side, side)


def _known(store: sqlite3.Connection, keys: list[str]) -> Iterator[tuple[str, bytes]]:
    for key in set(keys):
        found = store.execute("SELECT pixels FROM thumbnails WHERE key = ?", (key,)).fetchone()
        if found:
            yield key, found[0]


def _decode(store: sqlite3.Connection, files: dict[str, Path], side: int) -> Iterator[tuple[str, bytes]]:
    """The thumbnails of `files`, kept in `store` as they come. One that cannot be read is tried again next time."""
    keys = list(files)
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter lock
        for start in track(range(0, len(keys), _CHUNK), "thumbnails", transient=True, disable=not keys):
            chunk = keys[start : start + _CHUNK]
            drawn = zip(chunk, pool.map(lambda key: _thumbnail(files[key], side), chunk), strict=True)
            readable = [(key, pixels) for key, pixels in drawn if pixels is not None]
            with store:
                store.executemany("INSERT OR REPLACE INTO thumbnails VALUES (?, ?)", readable)
            yield from readable


def _thumbnail(file: Path, side: int) -> bytes | None:
    try:
        return Image.fromarray(read_image(file)).resize((side, side), Image.Resampling.BILINEAR).tobytes()
    except BadImage:
        return None


def _version() -> str:
    """Stands for the code that turns a file into a thumbnail."""
    sources = [Path(readers.__file__).with_name(f"{name}.py") for name in ("limits", "readers", "dicom")]
    return digest(files_digest([*sources, Path(__file__)]) + PIL.__version__)
