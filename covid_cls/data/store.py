"""Images decoded once: a memory-mapped array of grey canvases, shared by every run on the host."""

import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from covid_cls.data import readers
from covid_cls.data.limits import BadImage
from covid_cls.data.readers import read_image
from covid_cls.errors import InputError, listed
from covid_cls.records import digest, file_sha256, files_digest, read_json, write_json

log = logging.getLogger(__name__)
_CHUNK = 32
_ALONE = 512  # below this, starting processes costs more than it saves: 2 cores, 2 ms an image, 0.5 s a start


@dataclass(frozen=True)
class Store:
    """images: uint8 (N, S, S), read-only, row i belongs to row i of the table that built it. bad: row to reason."""

    images: NDArray[np.uint8]
    bad: dict[int, str]


def default_cache() -> Path:
    """Where stores and phantoms are kept: $COVID_CLS_CACHE, or covid_cls in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("COVID_CLS_CACHE") or Path(home) / "covid_cls")


def hash_files(table: pd.DataFrame, cache: Path) -> list[str]:
    """The sha256 of each row's `file`; a file whose size and mtime are known from an earlier run is not read again.

    InputError naming the lines whose `sha256` column says otherwise.
    """
    known_at = cache / "hashes" / f"{digest(os.path.commonpath([Path(file).parent for file in table['file']]))}.json"
    known = read_json(known_at) if known_at.is_file() else {}
    stats = [Path(file).stat() for file in table["file"]]
    identities = [f"{s.st_size}:{s.st_mtime_ns}" for s in stats]
    pairs = list(zip(table["file"], identities, strict=True))
    stale = [file for file, identity in pairs if known.get(file, ("", ""))[0] != identity]
    if stale:
        with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock
            fresh = dict(zip(stale, pool.map(file_sha256, map(Path, stale)), strict=True))
        known.update({file: (identity, fresh[file]) for file, identity in pairs if file in fresh})
        write_json(known_at, known)
    hashes = [str(known[file][1]) for file in table["file"]]
    wrong = [
        f"line {line}: {path}"
        for line, path, want, have in zip(table["line"], table["path"], table["sha256"], hashes, strict=True)
        if want and want.lower() != have
    ]
    if wrong:
        raise InputError(
            f"data: {len(wrong)} files do not have the sha256 that the manifest gives: {listed(wrong, 5)}. "
            "Restore the files, or mend the sha256 column if they were changed on purpose"
        )
    return hashes


def open_store(table: pd.DataFrame, hashes: Sequence[str], *, size: int, canvas: int, cache: Path) -> Store:
    """The decoded images of `table`, built if this content and these settings have not been seen on this host.

    Each image is scaled to a short side of `size` pixels (PIL's antialiased bilinear) and centred on a black square
    of side `canvas`, which cuts what is outside. Two processes that ask at once build once; a build that is killed
    leaves nothing that a later run trusts. Undecodable images are black and listed in `bad`.
    """
    content = json.dumps([_reader_version(), size, canvas, list(zip(table["path"], hashes, strict=True))])
    folder = cache / "store" / digest(content)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _build(list(table["file"]), folder, size, canvas)
    images = np.load(folder / "images.npy", mmap_mode="r")
    bad = {int(row): reason for row, reason in read_json(folder / "bad.json").items()}
    return Store(images, bad)


def draw_on_canvas(image: NDArray[np.uint8], size: int, canvas: int) -> NDArray[np.uint8]:
    """`image` (H, W) scaled to a short side of `size`, centred on a black (canvas, canvas) square."""
    height, width = image.shape
    short = min(height, width)
    scaled = Image.fromarray(image).resize(
        (int(size * width / short), int(size * height / short)), Image.Resampling.BILINEAR
    )
    left, top = (round((side - canvas) / 2) for side in scaled.size)
    # torchvision's CenterCrop rounds the same way; a crop beyond the edge is filled with black.
    return np.asarray(scaled.crop((left, top, left + canvas, top + canvas)))


def _build(files: list[str], folder: Path, size: int, canvas: int) -> None:
    room = len(files) * canvas * canvas
    free = shutil.disk_usage(folder.parent).free
    if free < 1.05 * room:
        raise InputError(f"{folder.parent}: the image store needs {room:,} bytes and {free:,} are free; set data.cache")
    for left in folder.parent.glob(f"{folder.name}.tmp*"):  # of a build that was killed; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.tmp"))
    try:
        target = scratch / "images.npy"
        np.lib.format.open_memmap(target, "w+", np.uint8, (len(files), canvas, canvas)).flush()
        jobs = [(target, start, files[start : start + _CHUNK], size, canvas) for start in range(0, len(files), _CHUNK)]
        bad: dict[str, str] = {}
        for found in track(_run(jobs, len(files)), "decoding images", total=len(jobs), transient=True):
            bad.update({str(row): reason for row, reason in found.items()})
        write_json(scratch / "bad.json", bad)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _run(jobs: list[tuple[Path, int, list[str], int, int]], images: int) -> Iterator[dict[int, str]]:
    if images < _ALONE:
        yield from map(_decode_chunk, jobs)
        return
    # spawn: forking a process that runs torch's threads can deadlock the child
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn, initializer=_end_with_parent) as pool:
        yield from pool.map(_decode_chunk, jobs)


def _end_with_parent() -> None:
    """Workers of a build that is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _decode_chunk(job: tuple[Path, int, list[str], int, int]) -> dict[int, str]:
    target, start, files, size, canvas = job
    images = np.load(target, mmap_mode="r+")
    bad = {}
    for row, file in enumerate(files, start):
        try:
            images[row] = draw_on_canvas(read_image(Path(file)), size, canvas)
        except BadImage as error:
            bad[row] = str(error)
    return bad


def _reader_version() -> str:
    """A digest of the code that turns files into pixels: when it changes, stores are built anew."""
    names = ("limits", "readers", "dicom", "store")
    return files_digest(Path(readers.__file__).with_name(f"{name}.py") for name in names)
