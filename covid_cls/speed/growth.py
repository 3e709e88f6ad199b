"""How the data path takes to more images: time and memory at several sizes of one synthetic set."""

import csv
import multiprocessing
import shutil
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.phantom import build_phantoms
from covid_cls.data.store import end_with_parent
from covid_cls.errors import InputError
from covid_cls.labels import TASKS
from covid_cls.models.transforms import Augment, Preprocess
from covid_cls.speed.clock import process_memory

AUGMENT = {"name": "cxr", "rotation": 10.0, "shift": 0.05, "scale": 0.1, "contrast": 0.2}  # conf/augment/cxr.yaml
_TEMPLATES = 24
_SPLITS = ("train", "train", "train", "train", "train", "val", "test")
_FOLDER = 1000  # files in one folder


def measure_growth(
    counts: Sequence[int], folder: Path, *, size: int = 256, canvas: int = 312, crop: int = 224, batch_size: int = 32
) -> list[dict[str, Any]]:
    """One record for each of `counts`: what a set of so many PNG radiographs costs before and in a training epoch.

    images; store_bytes: of the decoded images with their index. write_seconds: for the files. build_seconds: until a
    data module stands, from files never seen, with hashing and decoding. reopen_seconds: the same in another process
    once all is known. epoch_seconds: for all training batches, augmented and normalised, with no network.
    images_per_second: training images in that epoch. peak_bytes, resident_bytes: memory of the process that reopened
    and ran the epoch, at most and at its end, libraries included; None where they are not known. Each set lies below
    `folder`, with its store, until it is measured. InputError where it would not fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for count in counts:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            settings = {"canvas": canvas, "size": size, "batch_size": batch_size, "cache": str(Path(name) / "cache")}
            start = time.perf_counter()
            manifest = write_set(Path(name), count, canvas)
            write = time.perf_counter() - start
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, spawn, end_with_parent, max_tasks_per_child=1) as fresh:
                build = fresh.submit(_open_seconds, manifest, settings).result()
                epoch = fresh.submit(_epoch, manifest, settings, crop).result()
            store = sum(file.stat().st_size for file in Path(name).glob("cache/store/*/*"))
            record = {"images": count, "store_bytes": store, "write_seconds": write, "build_seconds": build, **epoch}
        records.append(record)
    return records


def write_set(folder: Path, count: int, canvas: int) -> Path:
    """The manifest of `count` PNG radiographs in `folder`, all of different bytes, though of few pictures.

    Five of seven images of each class are for training. The splits stand in the manifest: to draw them takes
    scikit-learn 0.7 ms a patient, which is no matter of images.
    InputError if they and their store of side `canvas` do not fit on the disk.
    """
    drawn = build_phantoms(folder / "templates", images=_TEMPLATES)
    with drawn.open(encoding="utf-8", newline="") as file:
        templates = [((drawn.parent / row["path"]).read_bytes(), row["label"]) for row in csv.DictReader(file)]
    need = count * (max(len(png) for png, _ in templates) + 4096 + canvas**2)
    free = shutil.disk_usage(folder).free
    if need > 0.9 * free:
        raise InputError(f"{folder}: {count:,} images need {need:,} bytes and {free:,} are free; ask for fewer images")
    rows = []
    seen: Counter[str] = Counter()
    for number in range(count):
        png, label = templates[number % len(templates)]
        path = folder / f"{number // _FOLDER:04d}" / f"{number:07d}.png"
        if number % _FOLDER == 0:
            path.parent.mkdir()
        path.write_bytes(_stamped(png, number))
        rows.append((path.relative_to(folder).as_posix(), label, _SPLITS[seen[label] % len(_SPLITS)]))
        seen[label] += 1
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "label", "split"), *rows])
    return folder / "manifest.csv"


def _stamped(png: bytes, number: int) -> bytes:
    """The same picture with `number` in a text chunk before the end chunk, which has 12 bytes."""
    chunk = b"tEXtNumber\0" + str(number).encode()
    stamp = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return png[:-12] + stamp + png[-12:]


def _open_seconds(manifest: Path, settings: dict[str, Any]) -> float:
    start = time.perf_counter()
    _radiographs(manifest, settings)
    return time.perf_counter() - start


def _epoch(manifest: Path, settings: dict[str, Any], crop: int) -> dict[str, Any]:
    start = time.perf_counter()
    data = _radiographs(manifest, settings)
    reopen = time.perf_counter() - start
    augment, preprocess = Augment(**AUGMENT), Preprocess(settings["size"], crop)  # type: ignore[arg-type]
    loader = data.train_dataloader()
    images = 0
    start = time.perf_counter()
    for batch in loader:
        images += len(preprocess.normalise(augment(batch.x, batch.index, crop, 0, 0)))
    epoch = time.perf_counter() - start
    speed = {"reopen_seconds": reopen, "epoch_seconds": epoch, "images_per_second": images / epoch}
    return speed | process_memory()


def _radiographs(manifest: Path, settings: dict[str, Any]) -> Radiographs:
    return Radiographs(TASKS["three_class"], order_seed=0, kind="manifest", path=str(manifest), **settings)
