"""The image store: every image is decoded once into a memory-mapped array, which all runs on the machine share."""

import json
import logging
import mmap
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from covid_cls.data.limits import BadImage
from covid_cls.data.readers import READERS_VERSION, read_image
from covid_cls.errors import InputError, listed
from covid_cls.io import atomic_file, digest, file_sha256, read_json, write_json
from covid_cls.system import cores, shielded

log = logging.getLogger(__name__)

# Increase it when the same files and settings give other canvases, or when the files of a store change.
STORE_VERSION = 1
_CHUNK = 32
# With fewer images, starting processes costs more than it saves: 0.5 s per start and 2 ms per image on 2 cores.
_MIN_FOR_PROCESSES = 512
_DECODERS = ("pillow", "pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pyjpegls", "python-gdcm")

# The .npy file to fill, the image file of each row to decode, size, canvas.
_Job = tuple[Path, dict[int, str], int, int]
_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True)
class Store:
    """The decoded images of a table.

    Attributes:
        images: Canvases, uint8 (N, S, S), read-only; row i belongs to row i of the table.
        bad: Why an image cannot be decoded, by row; such an image is black.
        digest: Identifies the content, order and names of the images, the settings and the code that decoded them.
    """

    images: NDArray[np.uint8]
    bad: dict[int, str]
    digest: str


def default_cache() -> Path:
    """Return the folder of stores and phantoms: $COVID_CLS_CACHE, or covid_cls in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("COVID_CLS_CACHE") or Path(home) / "covid_cls")


def hash_files(table: pd.DataFrame, cache: Path) -> list[str]:
    """Return the SHA-256 of each row's `file`.

    A file whose size and modification time are known from an earlier call is not read again.

    Raises:
        InputError: A hash differs from the column sha256.
    """
    files = table["file"].tolist()
    known_at = cache / "hashes" / f"{digest(os.path.commonpath([Path(file).parent for file in files]))}.json"
    known = read_json(known_at) if known_at.is_file() else {}
    states = {file: Path(file).stat() for file in files}
    identities = {file: f"{state.st_size}:{state.st_mtime_ns}" for file, state in states.items()}
    stale = [file for file, identity in identities.items() if known.get(file, ("", ""))[0] != identity]
    if stale:
        # Threads are enough: hashlib releases the interpreter lock.
        with ThreadPoolExecutor() as pool:
            fresh = list(pool.map(file_sha256, map(Path, stale)))
        known |= {file: (identities[file], sha256) for file, sha256 in zip(stale, fresh, strict=True)}
        write_json(known_at, known)
    hashes = [str(known[file][1]) for file in files]
    wrong = [
        f"line {line}: {path}"
        for line, path, want, have in zip(table["line"], table["path"], table["sha256"], hashes, strict=True)
        if want and want.lower() != have
    ]
    if wrong:
        raise InputError(
            f"data: {len(wrong)} files do not have the sha256 that the manifest gives: {listed(wrong, 5)}. "
            "Restore the files, or correct the column sha256 if they were changed on purpose"
        )
    return hashes


def open_store(table: pd.DataFrame, hashes: Sequence[str], *, size: int, canvas: int, cache: Path) -> Store:
    """Open the store of a table; build it if this machine has none with the same content and settings.

    Images that another store of the cache contains with the same settings are copied from it, so that a growing data
    set is not decoded again. Processes that ask at the same time build only once, and a killed build leaves nothing
    that a later run uses.

    Args:
        table: As `read_manifest` returns it.
        hashes: The SHA-256 of each row.
        size: Short side in pixels to which every image is scaled, with PIL's antialiased bilinear filter.
        canvas: Side in pixels of the black square on which the image is centred; parts outside are cropped.
        cache: The folder of the stores.

    Raises:
        InputError: The disk is full, or a decoding process was killed.
    """
    # A file that no decoder could read is tried again once another decoder is installed.
    decoders = [[dist.version for dist in metadata.distributions(name=name)] for name in _DECODERS]
    settings = digest(json.dumps([READERS_VERSION, STORE_VERSION, decoders, size, canvas]))
    content = digest(json.dumps([settings, list(zip(table["path"], hashes, strict=True))]))
    folder = cache / "store" / f"{settings[:8]}-{content}"
    if not folder.is_dir():
        # A worker process that runs the user's script again would wait for the lock of its parent. multiprocessing uses
        # this attribute for the same check.
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError("worker processes import this script: put its code below `if __name__ == '__main__':`")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            # Another process may have built it while this one waited.
            if not folder.is_dir():
                _build(table, hashes, folder, size, canvas)
    images = np.load(folder / "images.npy", mmap_mode="r")
    faults = pd.read_csv(folder / "index.csv", usecols=["fault"], dtype=str, keep_default_na=False)["fault"]
    return Store(images, {row: fault for row, fault in enumerate(faults) if fault}, content)


def read_rows(images: NDArray[_Number], rows: NDArray[np.int64]) -> NDArray[_Number]:
    """Copy rows of an array, in the given order.

    Rows of a memory map are read from its file, so that the memory of the process does not grow.

    Args:
        images: Any array of M rows.
        rows: Row numbers from 0 to M - 1, shape (n,).

    Raises:
        OSError: The file has become shorter.
    """
    # Measured for 32 rows of 312 x 312 bytes from a warm cache of 3 GB: this takes 10 µs per image with 3 MB resident;
    # indexing the map 7 µs and 3.1 GB; madvise(MADV_DONTNEED) after each call 11 µs with peaks of 150 MB, after every
    # 32nd call 10 µs and 1.5 GB.
    path = mapped_file(images)
    if path is None:
        return images[rows]
    assert isinstance(images, np.memmap)
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        # The file was removed while in use; the map still has its content.
        return np.asarray(images[rows])
    copy = np.empty((len(rows), *images.shape[1:]), images.dtype)
    with file:
        for k, row in enumerate(rows.tolist()):
            into = copy[k : k + 1]
            file.seek(images.offset + row * into.nbytes)
            if file.readinto(into.data) != into.nbytes:
                raise OSError(f"{path}: ends before row {row}; remove its folder and start again")
    return copy


def mapped_file(array: NDArray[_Number]) -> Path | None:
    """Return the .npy file that an array maps completely, read-only and in C order; None for any other array."""
    # A view's base is the complete map; the base of the map itself is an mmap.
    if not isinstance(array, np.memmap) or not isinstance(array.base, mmap.mmap):
        return None
    if array.flags.writeable or not array.flags.c_contiguous:
        return None
    return Path(str(array.filename))


def draw_on_canvas(image: NDArray[np.uint8], size: int, canvas: int) -> NDArray[np.uint8]:
    """Scale an image (H, W) to a short side of `size` and centre it on a black (canvas, canvas) square."""
    height, width = image.shape
    short = min(height, width)
    scaled = Image.fromarray(image).resize(
        (int(size * width / short), int(size * height / short)), Image.Resampling.BILINEAR
    )
    # Rounded as in torchvision's CenterCrop. A crop beyond the edge is filled with black.
    left, top = (round((side - canvas) / 2) for side in scaled.size)
    return np.asarray(scaled.crop((left, top, left + canvas, top + canvas)))


def end_with_parent() -> None:
    """Let this worker process end when its parent does, even if the parent is killed; otherwise it waits for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _build(table: pd.DataFrame, hashes: Sequence[str], folder: Path, size: int, canvas: int) -> None:
    files = table["file"].tolist()
    need, free = len(files) * canvas * canvas, shutil.disk_usage(folder.parent).free
    if free < 1.05 * need:
        raise InputError(f"{folder.parent}: the image store needs {need:,} bytes and {free:,} are free; set data.cache")
    # Left by a build that was killed: nobody else builds this store while this process has its lock.
    for left in folder.parent.glob(f"{folder.name}.tmp*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.tmp"))
    try:
        target = scratch / "images.npy"
        np.lib.format.open_memmap(target, "w+", np.uint8, (len(files), canvas, canvas)).flush()
        index = pd.DataFrame({"path": table["path"].to_numpy(), "sha256": hashes})
        faults = _copy_known(index, folder, target)
        rest = [row for row in range(len(files)) if row not in faults]
        log.info("decoding %d of %d images, %d known", len(rest), len(files), len(faults))
        chunks = [rest[start : start + _CHUNK] for start in range(0, len(rest), _CHUNK)]
        jobs = [(target, {row: files[row] for row in rows}, size, canvas) for rows in chunks]
        for found in track(_decode(jobs, len(rest)), "decoding images", total=len(jobs), transient=True):
            faults |= found
        with atomic_file(scratch / "index.csv") as file:
            index.assign(fault=[faults[row] for row in range(len(files))]).to_csv(file, index=False)
        with target.open("rb+") as images:
            # Without it a power failure could leave a store of zeros.
            os.fsync(images.fileno())
        scratch.chmod(0o755)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _copy_known(index: pd.DataFrame, folder: Path, target: Path) -> dict[int, str]:
    """Copy the images that other stores with the same settings contain to `target`; return the fault ("") by row."""
    missing: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(_keys(index)):
        missing.setdefault(key, []).append(row)
    faults: dict[int, str] = {}
    settings = folder.name.partition("-")[0]
    for other in folder.parent.glob(f"{settings}-{'?' * 32}"):
        if not missing:
            break
        try:
            theirs = pd.read_csv(other / "index.csv", dtype=str, keep_default_na=False)
            images = np.load(other / "images.npy", mmap_mode="r")
            places = {key: k for k, key in enumerate(_keys(theirs)) if key in missing}
            pairs = sorted((row, k) for key, k in places.items() for row in missing[key])
            for start in range(0, len(pairs), _CHUNK):
                rows, their_rows = np.array(pairs[start : start + _CHUNK]).T
                np.load(target, mmap_mode="r+")[rows] = read_rows(images, their_rows)
            faults |= {row: str(theirs["fault"][k]) for row, k in pairs}
            missing = {key: rows for key, rows in missing.items() if key not in places}
        # A store that was removed meanwhile or is damaged makes numpy and pandas raise a dozen types of exception.
        except Exception as error:
            log.warning("%s: nothing could be copied from this store (%s); it can be deleted", other, error)
    return faults


def _keys(index: pd.DataFrame) -> list[tuple[str, str]]:
    """Return what the pixels of each image depend on: its bytes, and its suffix, which decides for some DICOM files."""
    return [(Path(path).suffix.lower(), sha256) for path, sha256 in zip(index["path"], index["sha256"], strict=True)]


def _decode(jobs: list[_Job], images: int) -> Iterator[dict[int, str]]:
    if images < _MIN_FOR_PROCESSES:
        yield from map(_decode_chunk, jobs)
        return
    # Not fork: it can deadlock the child of a process that runs torch's threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores(), mp_context=spawn, initializer=end_with_parent) as pool:
        # `map` starts the processes.
        with shielded():
            found = pool.map(_decode_chunk, jobs)
        try:
            yield from found
        except BrokenProcessPool as error:
            raise InputError(
                "a process that decodes images was killed, probably because memory ran out. Give this job more memory "
                "or fewer processors, and start the command again"
            ) from error


def _decode_chunk(job: _Job) -> dict[int, str]:
    """Decode the rows of a job into its array; return the fault of each row, or ""."""
    target, files, size, canvas = job
    images = np.load(target, mmap_mode="r+")
    faults = dict.fromkeys(files, "")
    for row, file in files.items():
        try:
            images[row] = draw_on_canvas(read_image(Path(file)), size, canvas)
        except BadImage as error:
            faults[row] = str(error)
    return faults
