"""Measure the plain loop and covid_cls in alternating rounds, and how the cost of a data set grows."""

import copy
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import IMG_EXTENSIONS

from covid_cls.benchmarking import timing
from covid_cls.benchmarking.plain_loops import measure_plain, measure_plain_lightning
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.image_source import ImageSource
from covid_cls.data.manifest import SPLITS
from covid_cls.errors import InputError, listed
from covid_cls.experiment import build_classifier, build_trainer, prepare_fit
from covid_cls.models.transforms import Augment, Preprocess
from covid_cls.tasks import TASKS, Task
from covid_cls.training.callbacks import EpochHistory
from covid_cls.training.feature_cache import feature_note
from covid_cls.training.module import Classifier
from covid_cls.training.run_folder import Run
from covid_cls.training.settings import read_data

SIDES = ("plain", "ours")
NOTES = (
    "A round times an epoch from its start to the end of its last training step. Validation, metrics, logging and "
    "checkpoints of covid_cls are not included; the loop that it is compared with has none of them.",
    "The loop that covid_cls is compared with trains from random weights with cross-entropy, rotation, centre crop and "
    "mirroring. Its frozen batch norms are in training mode.",
    "Peak memory is measured in the training process after its first epoch. It includes libraries but no workers.",
)
# Processes that want a core. Above it, other programs disturb the measurement.
BUSY_LOAD = 0.5
# In `measure_growth`, one of this many images is for validation and one for the test.
HELD_OUT = 7

log = logging.getLogger(__name__)


class Fit(NamedTuple):
    """A fit that is ready to start.

    Attributes:
        notes: What a reader of the results must know, for example that weights are random.
        seconds: Time for decoding the images (`store`) and for computing frozen stages (`prepare`).
    """

    trainer: pl.Trainer
    classifier: Classifier
    data: Radiographs
    notes: list[str]
    seconds: dict[str, float]

    def to_device(self, batch: Any) -> Any:
        """Return a batch as the network takes it: on the device, augmented and normalised."""
        batch = self.classifier.transfer_batch_to_device(batch, self.trainer.strategy.root_device, 0)
        return self.classifier.on_after_batch_transfer(batch, 0)


def check_options(settings: dict[str, Any]) -> None:
    """Check the ranges of the settings that only this command has, and that the trainer uses one device.

    Raises:
        InputError: A setting is out of range.
    """
    classes = len(TASKS[settings["task"]["name"]].classes)
    images, growth = settings["images"], settings["growth"]
    if growth == []:
        raise InputError("growth=[]: give numbers of images, for example [1000,2000].")
    for key, value, least in (
        ("images", 2 * classes if images is None else images, 2 * classes),
        ("rounds", settings["rounds"], 1),
        ("epochs", settings["epochs"], 0),
        ("plain.workers", settings["plain"]["workers"], 0),
        *(("growth", count, HELD_OUT * classes) for count in growth or []),
    ):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{key}={value}: must be an integer of at least {least}.")
    # The plain loop trains on one device.
    devices = settings["trainer"].get("devices", 1)
    several = len(devices) > 1 if isinstance(devices, list) else str(devices) != "1"
    if several or settings["trainer"].get("strategy", "auto") != "auto":
        raise InputError("The benchmark measures one device. Remove trainer=ddp, trainer.strategy and trainer.devices.")


def measure(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compare the two sides and return the result of `summarise`, with `images` and `load_before`.

    Args:
        settings: The resolved configuration of the command.
        folder: Folder for temporary files.
    """
    task, load = TASKS[settings["task"]["name"]], os.getloadavg()[0]
    table = usable_images(settings["data"], task)
    folder.mkdir(parents=True, exist_ok=True)
    # Below the output folder: decoded images can be too large for the system's folder of temporary files.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as name:
        scratch, cold = Path(name), None
        # Validation is not measured; one batch is enough for the fit.
        others = max(settings["data"]["batch_size"], len(task.classes))
        staged = stage_images(table, task, settings["images"], others, scratch / "images", settings["seed"])
        found = run_rounds(settings, scratch)
        if settings["epochs"]:
            log.info("training %d epochs from an empty cache", settings["epochs"])
            cold_settings = staged_settings(settings, scratch / "images", scratch / "cold", settings["epochs"])
            cold = timing.run_separately(cold_fit, cold_settings, scratch / "cold_run")
    baseline = "Lightning loop" if settings["plain"]["lightning"] else "plain loop"
    result = {"baseline": baseline, **summarise(found, staged["images"], cold, settings["epochs"])}
    if staged["distinct"] < staged["images"]:
        result["notes"].append(f"{staged['distinct']} files were repeated to give {staged['images']} images.")
    if load > BUSY_LOAD:
        result["notes"].append(f"The load average was {load:.1f} before the start: other programs were running.")
    return {"images": staged, "load_before": load, **result}


def measure_growth(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure the start and an epoch without a network for each of `settings["growth"]` numbers of images.

    The images are links to files of the data set, repeated as often as necessary.

    Returns:
        `notes`, and as `growth` a record per number of `images`. write_seconds: for the links. store_bytes: of the
        decoded images with their index. build_seconds: for reading the data set, with hashing and decoding.
        reopen_seconds: the same in a new process when everything is in the cache. epoch_seconds and images_per_second:
        for all training batches, augmented and normalised. peak_bytes, resident_bytes: memory of the process that
        reopened the data set.

    Raises:
        InputError: The decoded images do not fit on the disk.
    """
    task = TASKS[settings["task"]["name"]]
    table = usable_images(settings["data"], task)
    canvas = Augment(**settings["augment"]).canvas(settings["preprocess"]["crop"])
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for count in settings["growth"]:
        need, free = count * canvas**2, shutil.disk_usage(folder).free
        if need > 0.9 * free:
            raise InputError(f"{folder}: {count:,} images need {need:,} bytes and {free:,} are free. Use fewer images.")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as name:
            scratch, others = Path(name), count // HELD_OUT
            start = time.perf_counter()
            stage_images(table, task, count - 2 * others, others, scratch / "images", settings["seed"])
            record = {"images": count, "write_seconds": time.perf_counter() - start}
            staged = staged_settings(settings, scratch / "images", scratch / "cache", 1)
            record["build_seconds"] = timing.run_separately(_read_seconds, staged)
            # A new process, whose memory does not include what building the store needed.
            record |= timing.run_separately(_epoch_without_network, staged)
            record["store_bytes"] = sum(file.stat().st_size for file in scratch.glob("cache/store/*/*"))
        records.append(record)
    return {"growth": records, "notes": ["An epoch is every training batch: read, augmented, normalised, no network."]}


def _read_seconds(settings: dict[str, Any]) -> float:
    start = time.perf_counter()
    read_data(settings, Augment(**settings["augment"]))
    return time.perf_counter() - start


def _epoch_without_network(settings: dict[str, Any]) -> dict[str, Any]:
    augment, preprocess = Augment(**settings["augment"]), Preprocess(**settings["preprocess"])
    start = time.perf_counter()
    data = read_data(settings, augment)
    reopen = time.perf_counter() - start

    def prepare(batch: Any) -> Tensor:
        if augment.random:
            return preprocess.normalise(augment(batch.x, batch.index, preprocess.crop, 0, 0))
        return preprocess.normalise(preprocess.centre(batch.x))

    epoch = timing.load_seconds(data.train_dataloader(), prepare)
    speed = len(data.dataset("train")) / epoch
    return {"reopen_seconds": reopen, "epoch_seconds": epoch, "images_per_second": speed, **timing.process_memory()}


def usable_images(data: dict[str, Any], task: Task) -> pd.DataFrame:
    """Return path, label and file of each image of the task's classes, sorted by path; no image is decoded.

    Args:
        data: The section `data` of the configuration.
        task: The classes.

    Raises:
        InputError: The data set cannot be read, a class has no image, or torchvision's ImageFolder, which the plain
            loop reads with, would ignore a file.
    """
    table = ImageSource.from_settings(data).read_table()
    table = table.loc[table["label"].isin(task.classes), ["path", "label", "file"]]
    ignored = [path for path in table["path"] if not path.lower().endswith(IMG_EXTENSIONS)]
    if ignored:
        types = " ".join(IMG_EXTENSIONS)
        raise InputError(
            f"data: the plain loop cannot read {len(ignored)} files: {listed(ignored, 3)}. Use images of types {types}."
        )
    missing = [name for name in task.classes if name not in set(table["label"])]
    if missing:
        raise InputError(f"data: there is no image of {listed(missing)}. Task {task.name} needs images of each class.")
    return table.sort_values("path", kind="stable", ignore_index=True)


def stage_images(
    table: pd.DataFrame, task: Task, images: int | None, others: int, root: Path, seed: int = 0
) -> dict[str, Any]:
    """Link files of `table` as `root`/<split>/<class>/<number>-<name>, so that both sides read the same ones.

    Files are selected at random in class proportion. Validation and test get other files than training. A class with
    too few files repeats them.

    Args:
        table: As from `usable_images`.
        task: The classes.
        images: Number of training images; None for all.
        others: Number of validation images and of test images.
        root: Folder to create.
        seed: Random seed of the selection.

    Returns:
        The number of training `images`, of `distinct` files among them, and of images `per_class`.
    """
    counts = [int((table["label"] == name).sum()) for name in task.classes]
    train = class_shares(counts, len(table) if images is None else images)
    for k, (name, first, more) in enumerate(zip(task.classes, train, class_shares(counts, others), strict=True)):
        # One generator per class: the selection of a class does not depend on the sizes of the others.
        files = np.random.default_rng([seed, k]).permutation(table.loc[table["label"] == name, "file"].to_numpy())
        chosen = np.resize(files, first + 2 * more)
        for split, part in zip(SPLITS, np.split(chosen, [first, first + more]), strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            # The number gives a repeated file a different name.
            for number, file in enumerate(part):
                (folder / f"{number:06d}-{Path(file).name}").symlink_to(file)
    distinct = sum(min(pair) for pair in zip(counts, train, strict=True))
    return {"images": sum(train), "distinct": distinct, "per_class": dict(zip(task.classes, train, strict=True))}


def class_shares(counts: Sequence[int], total: int) -> list[int]:
    """Divide `total` in proportion to `counts`, with at least one each; the largest share absorbs the rounding."""
    shares = np.maximum(1, np.rint(total * np.asarray(counts) / sum(counts))).astype(int)
    shares[shares.argmax()] += total - shares.sum()
    return [int(share) for share in shares]


def staged_settings(settings: dict[str, Any], root: Path, cache: Path, epochs: int) -> dict[str, Any]:
    """Return `settings` for a fit of the staged images in `root` over `epochs` complete epochs, with another cache."""
    images = {"kind": "folder", "root": str(root), "cache": str(cache), "folds": None, "group": "patient"}
    # Every image once per epoch, as in the plain loop.
    data = {**settings["data"], **images, "sampler": "shuffle", "on_bad_image": "stop"}
    trainer = {**settings["trainer"], "max_epochs": epochs, "limit_train_batches": 1.0, "limit_val_batches": 1.0}
    return {
        **settings,
        "data": data,
        "trainer": trainer,
        "callbacks": {**settings["callbacks"], "early_stopping": None},
    }


def run_rounds(settings: dict[str, Any], scratch: Path) -> dict[str, dict[str, Any]]:
    """Measure both sides alternately, after one epoch of each that does not count.

    Returns:
        For each side, its answers to "about", "memory" and "flops"; a list over the rounds of those to "epoch" and
        "loader", for covid_cls also "bare" and "peak"; and `profile`, on a GPU an epoch that waits for the device after
        each part, else None.
    """
    images, rounds = scratch / "images", settings["rounds"]
    # One epoch to warm up, one for the profile, and one so that the fit does not end before its last epoch is reported.
    ours_settings = staged_settings(settings, images, scratch / "cache", rounds + 3)
    work = measure_plain_lightning if settings["plain"]["lightning"] else measure_plain
    with (
        timing.separate_process(measure_ours, ours_settings, scratch / "run") as ours,
        timing.separate_process(work, settings, images, ours("about")["device"]) as plain,
    ):
        sides = {"plain": plain, "ours": ours}
        log.info("warming up: one epoch of each side on %s", ours("about")["device"])
        found: dict[str, dict[str, Any]] = {}
        for name, side in sides.items():
            # The first epoch fills the page cache, and libraries select their algorithms in it.
            side("epoch")
            # Memory first, because counting FLOP copies the network.
            found[name] = {what: side(what) for what in ("about", "memory", "flops")}
            found[name] |= {"epoch": [], "loader": [], "bare": [], "peak": []}
        for number in range(1, rounds + 1):
            for what, measured in (("epoch", SIDES), ("loader", SIDES), ("bare", ["ours"]), ("peak", ["ours"])):
                for name in measured:
                    found[name][what].append(sides[name](what))
            first, second = (found[name]["epoch"][-1]["seconds"] for name in SIDES)
            log.info(f"round {number}/{rounds}: plain {first:.3f} s, covid_cls {second:.3f} s, {first / second:.2f} x")
        gpu = ours("about")["device"] != "cpu"
        return {name: {**found[name], "profile": sides[name]("profile") if gpu else None} for name in SIDES}


def measure_ours(pipe: Connection, settings: dict[str, Any], folder: Path) -> None:
    """Train an epoch of covid_cls each time the parent process requests one."""
    measurements: dict[str, Callable[[], Any]] = {}
    fit = assemble_fit(settings, folder, [timing.TimedEpochs(pipe, measurements)])
    device, precision = fit.trainer.strategy.root_device, str(fit.trainer.precision)
    measurements |= {
        "about": lambda: {"device": str(device), "precision": precision, "notes": fit.notes},
        "memory": lambda: timing.peak_memory(device),
        "flops": lambda: count_flops(fit),
        "loader": lambda: timing.load_seconds(fit.data.train_dataloader(), fit.to_device),
        "bare": lambda: bare_step_seconds(fit),
        "peak": lambda: measure_peak(device, precision),
    }
    fit.trainer.fit(fit.classifier, fit.data)


def assemble_fit(settings: dict[str, Any], folder: Path, watchers: Sequence[pl.Callback] = ()) -> Fit:
    """Build a fit that is ready to start and writes below `folder`, as `train` does, but without run.json."""
    pl.seed_everything(settings["seed"], workers=True, verbose=False)
    start = time.perf_counter()
    data = read_data(settings, Augment(**settings["augment"]))
    store = time.perf_counter() - start
    run = Run(folder, {"status": "running"}, writes=False)
    # The speed does not depend on the weights, so none are downloaded.
    classifier = build_classifier(settings, data, run, download=False)
    trainer = build_trainer(settings, folder, [EpochHistory(), *watchers])
    start = time.perf_counter()
    prepare_fit(classifier, data, trainer, settings)
    seconds = {"store": store, "prepare": timing.timer() - start}
    weights = run.record["weights"]["note"]
    notes = [*([weights] if weights else []), *feature_note(settings["feature_cache"])]
    return Fit(trainer, classifier, data, notes, seconds)


def cold_fit(settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Run a complete fit and return its seconds.

    Returns:
        `store` for decoding, `prepare` for frozen stages, `fit` with validation, checkpoints and logs, and the total
        `seconds`.
    """
    start = time.perf_counter()
    fit = assemble_fit(settings, folder)
    ready = time.perf_counter()
    fit.trainer.fit(fit.classifier, fit.data)
    end = timing.timer()
    return {**fit.seconds, "fit": end - ready, "seconds": end - start}


def bare_step_seconds(fit: Fit) -> float:
    """Return the seconds per image of an epoch's training steps on one batch that is ready on the device."""
    (optimizer,) = fit.trainer.optimizers
    loader = fit.data.train_dataloader()
    batch = fit.to_device(next(iter(loader)))
    # Restored afterwards, because many steps on one batch would spoil the epochs that follow.
    weights = copy.deepcopy(fit.classifier.state_dict())
    start = timing.timer()
    for _ in range(len(loader)):
        loss: Any = fit.trainer.strategy.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = timing.timer() - start
    fit.classifier.load_state_dict(weights)
    fit.classifier.train_metrics.reset()
    return seconds / (len(loader) * len(batch.y))


def count_flops(fit: Fit) -> float:
    """Return the FLOP per image of a training step, from the image or from the output of a feature cache on."""
    # A batch from a feature cache enters the network at a later stage.
    batch = fit.to_device(next(iter(fit.data.train_dataloader())))
    return timing.step_flops(nn.Sequential(*list(fit.classifier.net.children())[batch.stage :]), batch.x)


def measure_peak(device: torch.device, precision: str) -> dict[str, dict[str, float]]:
    """Measure the speed of a large matrix product and a large convolution on the device.

    Torch's settings are not changed: on recent NVIDIA GPUs a float32 convolution computes in TF32.

    Returns:
        TFLOP/s of `matmul` and `convolution` for float32, for the data type of `precision` and, on a GPU, for bfloat16.
    """
    # Larger products are no faster on two cores: 0.42 and 0.46 TFLOP/s in bfloat16; with 4096 and 32, 0.40 and 0.43.
    side, batch = (8192, 256) if device.type == "cuda" else (2048, 8)
    found = {}
    for name in sorted({"float32", dtype_name(precision)} | ({"bfloat16"} if device.type == "cuda" else set())):
        options: dict[str, Any] = {"device": device, "dtype": getattr(torch, name)}
        # channels_last is the memory format in which covid_cls trains.
        a, b = torch.randn(2, side, side, **options)
        x = torch.randn(batch, 256, 56, 56, **options).to(memory_format=torch.channels_last)
        w = torch.randn(256, 256, 3, 3, **options).to(memory_format=torch.channels_last)
        found[name] = {"matmul": _tflops(torch.matmul, a, b), "convolution": _tflops(F.conv2d, x, w, None, 1, 1)}
    return found


def _tflops(function: Callable[..., Tensor], *operands: Any) -> float:
    # Imported here: with nvcc but without a GPU, this import logs a warning, which only these processes suppress.
    from torch.utils.benchmark import Timer

    with FlopCounterMode(display=False) as counter:
        function(*operands)
    names = {"function": function, "operands": operands}
    measured = Timer("function(*operands)", globals=names, num_threads=torch.get_num_threads())
    # The fastest repetition: on a busy machine, the median would be below what training reaches.
    return float(counter.get_total_flops() / min(measured.blocked_autorange(min_run_time=0.3).times) / 1e12)


def dtype_name(precision: str) -> str:
    """Return the data type in which one of Lightning's precisions multiplies, such as bfloat16 for bf16-mixed."""
    return {"32": "float32", "bf16": "bfloat16", "16": "float16", "64": "float64"}[precision.partition("-")[0]]


def summarise(
    found: dict[str, dict[str, Any]], images: int, cold: dict[str, float] | None, epochs: int
) -> dict[str, Any]:
    """Return the result as plain values.

    The time of the plain loop for `epochs` epochs is extrapolated from its median epoch.

    Args:
        found: As from `run_rounds`.
        images: Number of images in an epoch.
        cold: As from `cold_fit`, or None.
        epochs: Number of epochs of `cold`.
    """
    about, peaks = found["ours"]["about"], found["ours"]["peak"]
    rounds = pd.DataFrame({side: [epoch["seconds"] for epoch in found[side]["epoch"]] for side in SIDES})
    rounds["ratios"] = rounds["plain"] / rounds["ours"]
    medians, ratios = rounds.median(), rounds["ratios"]
    # The best of all rounds, for the reason given in `_tflops`.
    peak = {name: {kind: max(one[name][kind] for one in peaks) for kind in kinds} for name, kinds in peaks[0].items()}
    ratio = {"median": medians["plain"] / medians["ours"], "least": ratios.min(), "most": ratios.max()}
    result: dict[str, Any] = {
        "device": about["device"],
        "ratio": {name: float(value) for name, value in ratio.items()},
        "rounds": rounds.to_dict("list"),
        "peak_tflops": peak,
    }
    for side in SIDES:
        of_side, speed = found[side], images / float(medians[side])
        # In the rounds, a GPU is not waited for, so that the times of their parts are not correct there.
        parts = pd.DataFrame([of_side["profile"]] if of_side["profile"] else of_side["epoch"])[
            list(timing.PARTS)
        ].median()
        precision, tflops = of_side["about"]["precision"], of_side["flops"] * speed / 1e12
        result[side] = {
            "precision": precision,
            "images_per_second": speed,
            "ms_per_image": (1000 * parts / images).to_dict(),
            "loader_images_per_second": images / float(np.median(of_side["loader"])),
            "gflop_per_image": of_side["flops"] / 1e9,
            "tflops": tflops,
            "share_of_peak": tflops / max(peak[dtype_name(precision)].values()),
            "peak_memory_mb": of_side["memory"],
        }
    bare = 1 / float(np.median(found["ours"]["bare"]))
    result["bare"] = {"images_per_second": bare, "share": result["ours"]["images_per_second"] / bare}
    result["to_epochs"] = None
    if cold is not None:
        plain = {"seconds": epochs * float(medians["plain"]), "extrapolated": True}
        result["to_epochs"] = {"epochs": epochs, "plain": plain, "ours": {**cold, "extrapolated": False}}
    result["notes"] = [*about["notes"], *NOTES]
    if found["ours"]["profile"]:
        result["notes"].append("data, forward and backward are from an epoch that waits for the GPU after each part.")
    return result
