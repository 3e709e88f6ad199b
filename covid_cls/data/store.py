"""Images decoded once: a memory-mapped array of grey canvases, shared by every run on the host."""

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

from covid_cls.data import readers
from covid_cls.data.limits import BadImage
from covid_cls.data.readers import read_image
from covid_cls.errors import InputError, listed
from covid_cls.interrupts import shielded
from covid_cls.machine import cores
from covid_cls.records import digest, file_sha256, files_digest, read_json, whole_file, write_json

log = logging.getLogger(__name__)
_CHUNK = 32
_DECODERS = ("pillow", "pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pyjpegls", "python-gdcm")
_ALONE = 512  # below this, starting processes costs more than it saves: 2 cores, 2 ms an image, 0.5 s a start


_Job = tuple[Path, dict[int, str], int, int]  # the array to fill, its rows with their files, size, canvas
_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True)
class Store:
    """images: uint8 (N, S, S), read-only, row i belongs to row i of the table that built it. bad: row to reason.

    digest: stands for the content of the images, their order and names, the settings and the code that decoded them.
    """

    images: NDArray[np.uint8]
    bad: dict[int, str]
    digest: str


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
    leaves nothing that a later run trusts. Undecodable images are black and listed in `bad`. Images that another
    store of this cache holds in these settings are copied from it, so that a set that grows is not decoded again.
    """
    settings = digest(json.dumps([_reader_version(), size, canvas]))
    content = digest(json.dumps([settings, list(zip(table["path"], hashes, strict=True))]))
    folder = cache / "store" / f"{settings[:8]}-{content}"
    if not folder.is_dir():
        _refuse_second_start()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _build(table, hashes, folder, size, canvas)
    images = np.load(folder / "images.npy", mmap_mode="r")
    faults = pd.read_csv(folder / "index.csv", usecols=["fault"], dtype=str, keep_default_na=False)["fault"]
    return Store(images, {row: fault for row, fault in enumerate(faults) if fault}, content)


def read_rows(images: NDArray[_Number], rows: NDArray[np.int64]) -> NDArray[_Number]:
    """A copy of these rows, (len(rows), ...) of `images`' type, in their order; 0 <= rows < len(images).

    Rows of a memory map are read from its file, so that a process which visits all of them stays as small as it was.
    OSError where the file has become shorter.
    """
    # 32 rows of 312 x 312 bytes from a warm cache of 3 GB: 10 µs an image and 3 MB resident. Indexing the map: 7 µs and
    # 3.1 GB. madvise(MADV_DONTNEED) after each call: 11 µs and peaks of 150 MB, after every 32nd: 10 µs and 1.5 GB.
    path = mapped_file(images)
    if path is None:
        return images[rows]
    assert isinstance(images, np.memmap)
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:  # removed while in use: the map still holds it
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
    """The .npy file of which `array` is the read-only memory map, whole and in C order; None for any other array."""
    whole = isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap)  # a view's base is the whole map
    if not whole or array.flags.writeable or not array.flags.c_contiguous:
        return None
    return Path(str(array.filename))  # type: ignore[attr-defined]


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


def _build(table: pd.DataFrame, hashes: Sequence[str], folder: Path, size: int, canvas: int) -> None:
    files = table["file"].tolist()
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
        index = pd.DataFrame({"path": table["path"].to_numpy(), "sha256": hashes})
        faults = _copy_known(index, folder, target)
        left_over = [row for row in range(len(files)) if row not in faults]
        log.info("decoding %d of %d images, %d known", len(left_over), len(files), len(faults))
        chunks = [left_over[start : start + _CHUNK] for start in range(0, len(left_over), _CHUNK)]
        jobs = [(target, {row: files[row] for row in rows}, size, canvas) for rows in chunks]
        for found in track(_run(jobs, len(left_over)), "decoding images", total=len(jobs), transient=True):
            faults.update(found)
        with whole_file(scratch / "index.csv") as file:
            index.assign(fault=[faults[row] for row in range(len(files))]).to_csv(file, index=False)
        with target.open("rb+") as images:
            os.fsync(images.fileno())  # or a loss of power could leave a store of zeros
        scratch.chmod(0o755)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _copy_known(index: pd.DataFrame, folder: Path, target: Path) -> dict[int, str]:
    """The rows of `index` that stores of the same settings hold, each with its fault or ""; copied to `target`."""
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
            place = {key: k for k, key in enumerate(_keys(theirs)) if key in missing}
            pairs = sorted((row, k) for key, k in place.items() for row in missing[key])
            for start in range(0, len(pairs), _CHUNK):
                rows, places = np.array(pairs[start : start + _CHUNK]).T
                np.load(target, mmap_mode="r+")[rows] = read_rows(images, places)
            faults.update({row: str(theirs["fault"][k]) for row, k in pairs})
        except Exception as error:  # removed meanwhile or damaged, which numpy and pandas report in a dozen ways
            log.warning("%s: nothing could be copied from this store (%s); it can be deleted", other, error)
            continue
        for key in place:
            del missing[key]
    return faults


def _keys(index: pd.DataFrame) -> list[tuple[str, str]]:
    """What an image's pixels depend on: its bytes, and its suffix where these do not tell the format."""
    suffixes = [Path(path).suffix.lower() for path in index["path"]]
    return list(zip(suffixes, index["sha256"], strict=True))


def _run(jobs: list[_Job], images: int) -> Iterator[dict[int, str]]:
    if images < _ALONE:
        yield from map(_decode_chunk, jobs)
        return
    # spawn: forking a process that runs torch's threads can deadlock the child
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores(), mp_context=spawn, initializer=end_with_parent) as pool:
        with shielded():  # map starts the processes
            found = pool.map(_decode_chunk, jobs)
        try:
            yield from found
        except BrokenProcessPool as error:
            raise InputError(
                "a process that decodes images was killed, as the system does where memory runs out: give this job "
                "more of it, or fewer processors, and start the command again"
            ) from error


def _refuse_second_start() -> None:
    """RuntimeError in a worker process that runs the user's script again, instead of waiting for its parent's lock."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing itself asks
        raise RuntimeError("put what your script does below `if __name__ == '__main__':`, for processes import it")


def end_with_parent() -> None:
    """Returns at once; this worker process then ends with its parent, even a killed one, or it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _decode_chunk(job: _Job) -> dict[int, str]:
    """The job's rows, each with its fault or ""; the pixels of those without one are now in the job's array."""
    target, files, size, canvas = job
    images = np.load(target, mmap_mode="r+")
    faults = dict.fromkeys(files, "")
    for row, file in files.items():
        try:
            images[row] = draw_on_canvas(read_image(Path(file)), size, canvas)
        except BadImage as error:
            faults[row] = str(error)
    return faults


def _reader_version() -> str:
    """A digest of the code that turns files into pixels and of the decoders it finds: a change builds stores anew."""
    names = ("limits", "readers", "dicom", "store")
    code = files_digest(Path(readers.__file__).with_name(f"{name}.py") for name in names)
    # A file that no decoder could read must be tried again when one has been installed.
    found = [[dist.version for dist in metadata.distributions(name=name)] for name in _DECODERS]
    return digest(json.dumps([code, found]))
