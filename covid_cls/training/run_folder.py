"""Run folders: their names, their locks, and run.json, the record of settings, versions and outcome."""

import datetime
import json
import logging
import os
import platform
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import LeaseCompromise, SoftFileLease, Timeout

import covid_cls
from covid_cls.errors import InputError, listed
from covid_cls.io import FORMER_TEST_ACCESSES, TEST_ACCESSES, digest, read_json, remove_temporary_files, write_json
from covid_cls.models.names import loss_label, strategy_label
from covid_cls.models.transforms import Augment
from covid_cls.system import received
from covid_cls.training.checkpoints import newest_valid
from covid_cls.training.settings import read_data

# Increase it when the same settings and data give other weights or predictions. Runs of the earlier version are then
# trained again, so changes of wording or structure must not increase it.
TRAINING_VERSION = 1
# Settings that change neither weights nor predictions: of where and how a run is trained, and of its evaluation.
_PROCESS = ("output_root", "name", "rerun", "logger", "feature_cache_gb", "checkpoint_seconds", "sweep")
_EVALUATION = ("audit", "baselines", "operating")
# Settings of the section `data` that change no image, or whose effect is part of the data digest.
_DATA_NOT_IN_DIGEST = ("path", "root", "cache", "workers")
_PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "pillow",
    "scikit-learn",
)
_STATUSES = ("running", "finished", "failed", "interrupted")
_TIMEOUT = 60.0  # seconds without a sign of life after which a process on another host counts as dead
log = logging.getLogger(__name__)


@dataclass
class Run:
    """A run folder that is open in this process.

    Attributes:
        folder: The run folder.
        record: Content of run.json; `status` is new, running, finished, failed or interrupted.
        writes: Whether this process writes to the folder; of a distributed run only the first one does.
    """

    folder: Path
    record: dict[str, Any]
    writes: bool = True

    @property
    def finished(self) -> bool:
        """Return whether the run is finished."""
        return bool(self.record["status"] == "finished")

    def last_checkpoint(self) -> tuple[Path | None, dict[str, Any]]:
        """Return the path and the contents of the checkpoint from which the run continues, or None and an empty dict.

        Damaged checkpoints are logged, and recorded in run.json as `damage`; see `newest_valid`.
        """
        path, contents, warnings = newest_valid(self.folder / "checkpoints")
        for warning in warnings:
            log.warning(warning)
        if warnings:
            self.record["damage"] = [*self.record.get("damage", []), *warnings]
        return path, contents

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.record.update(facts)
        if self.writes:
            write_json(self.folder / "run.json", self.record)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Record the outcome of the block, and add its duration to the duration of earlier starts."""
        earlier, start = dict(self.record), time.monotonic()
        if self.writes:
            remove_temporary_files(self.folder)
        for key in ("ended", "reason"):
            self.record.pop(key, None)
        self.note(status="running", started=_now(), **_environment())
        outcome = {"status": "finished"}
        try:
            with _log_to(self.folder / "run.log") if self.writes else nullcontext():
                if self.writes and earlier["status"] == "running":
                    log.warning(
                        "the start of %s exited without reporting a status (process %s on host %s)",
                        *(earlier.get(key, "unknown") for key in ("started", "pid", "host")),
                    )
                yield
        except BaseException as error:
            # What a signal causes can be any exception, e.g. one of a worker process that the same signal killed.
            stop = received()
            if isinstance(error, KeyboardInterrupt | SystemExit) or (stop and not isinstance(error, InputError)):
                outcome = {"status": "interrupted", "reason": stop.name if stop else type(error).__name__}
            else:
                outcome = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            raise
        finally:
            seconds = earlier.get("seconds", 0.0) + time.monotonic() - start
            self.note(ended=_now(), seconds=round(seconds, 1), **outcome)


@contextmanager
def open_run(
    root: Path, settings: dict[str, Any], data_digest: str, *, rerun: bool = False, writes: bool = True
) -> Iterator[Run]:
    """Open the run folder for these settings, data and training version: a new one, or the folder of an earlier start.

    Args:
        root: The folder of the run folders.
        settings: The resolved configuration.
        data_digest: `digest` of the data set.
        rerun: Delete the files of earlier starts, except the list of test-set accesses.
        writes: False in all but the first process of a distributed run.

    Raises:
        InputError: Another process trains the same run, or run.json is damaged.
    """
    name, digests = run_name(settings), _digests(settings, data_digest)
    folder = root / f"{name}-{digest(json.dumps(digests))[:8]}"
    if not writes:
        yield Run(folder, {**_read_record(folder), "status": "running"}, writes=False)
        return
    root.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        existed = folder.is_dir()
        folder.mkdir(exist_ok=True)
        try:
            if rerun:
                # The test images stay the same when the network is trained again, and so do their accesses.
                _empty(folder, keep=(TEST_ACCESSES, FORMER_TEST_ACCESSES))
            record = _read_record(folder)
            if record["status"] == "new":
                _report_former_runs(root, name)
            record |= {"cell": folder.name, "config": settings, "digests": digests}
            yield Run(folder, record | {"code_version": covid_cls.__version__})
        finally:
            # A run that was refused before it started leaves no folder.
            if not existed and not (folder / "run.json").is_file():
                shutil.rmtree(folder)


def finished_folder(settings: dict[str, Any], experiment: str) -> Path | None:
    """Return the folder of a finished run with these settings, the present data and training version, or None.

    Args:
        settings: The resolved configuration.
        experiment: Name of the folder below `output_root`, or "*".
    """
    pattern = f"{experiment}/{run_name(settings)}-????????/run.json"
    records = [(path.parent, read_json(path)) for path in Path(settings["output_root"]).glob(pattern)]
    finished = [(folder, record) for folder, record in records if record.get("status") == "finished"]
    # Reading the data takes long, so it is done only if there is a candidate.
    if not finished:
        return None
    relevant = {key: settings[key] for key in ("task", "data", "augment", "preprocess")} | {"seed": 0}
    digests = _digests(settings, _data_digest(json.dumps(relevant)))
    return next((folder for folder, record in finished if record.get("digests") == digests), None)


def run_name(settings: dict[str, Any]) -> str:
    """Return the readable name of a run, to which its folder adds a digest.

    It is <task>-<backbone>-<strategy>-<loss>-s<seed>, followed by what deviates from the default: "<part>_seen"
    (preprocess.seen), "views<K>" (feature_cache), "fold<k>" (cross-validation) and "leaky" (data.group=image).
    """
    parts = [settings["task"]["name"], settings["backbone"]["name"]]
    parts += [strategy_label(settings["strategy"]), loss_label(settings["loss"]), f"s{settings['seed']}"]
    if settings["preprocess"]["seen"] != "whole":
        parts.append(f"{settings['preprocess']['seen']}_seen")
    if settings["feature_cache"].startswith("views:"):
        parts.append(settings["feature_cache"].replace(":", ""))
    if settings["data"]["folds"] is not None:
        parts.append(f"fold{settings['data']['fold']}")
    if settings["data"]["group"] == "image":
        parts.append("leaky")
    return "-".join(parts)


def _digests(settings: dict[str, Any], data_digest: str) -> dict[str, str]:
    """Return what determines the weights and predictions of a run, as `config`, `data` and `training`."""
    identity = {key: value for key, value in settings.items() if key not in (*_PROCESS, *_EVALUATION)}
    identity["data"] = {key: value for key, value in settings["data"].items() if key not in _DATA_NOT_IN_DIGEST}
    config = digest(json.dumps(identity, sort_keys=True))
    return {"config": config, "data": data_digest, "training": str(TRAINING_VERSION)}


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Prevent other processes from training the run in `folder` during the block.

    The lock is a file next to the folder, so that the folder can be created and removed under it. If the process that
    has the lock died on this host, the lock is taken over at once; if it is on another host or in another container,
    after a minute without a sign of life. A process that loses its lock in this way exits when it notices.

    Raises:
        InputError: Another process has the lock; the message names its host and number.
    """
    # The operating system's lock (flock) is not used: on the shared disks of clusters it may hold for one host only.
    lease = SoftFileLease(folder.with_name(f".{folder.name}.lock"), lease_duration=_TIMEOUT, on_compromise=_exit)
    try:
        _acquire(lease)
    except Timeout as error:
        raise InputError(
            f"{folder}: {_describe_owner(lease, folder / 'run.json')} is training this run. Wait for it or stop it "
            f"(its lock is {lease.lock_file})"
        ) from error
    try:
        yield
    finally:
        lease.release()


def _acquire(lease: SoftFileLease) -> None:
    try:
        # A process may need half a second to write its name into the lock that it has created.
        lease.acquire(timeout=0.5)
    except Timeout as error:
        owner = lease.owner
        # The message names the owner only if filelock cannot see whether that process lives. It must be watched then.
        if owner is None or f"pid {owner.pid} on {owner.hostname}" not in str(error):
            raise
        log.warning(
            f"{lease.lock_file}: process {owner.pid} on host {owner.hostname} has this lock; waiting up to "
            f"{_TIMEOUT:.0f} s for a sign of life"
        )
        seen = _last_sign(lease)
        lease.acquire(timeout=2 * _TIMEOUT, cancel_check=lambda: _last_sign(lease) not in (None, seen))


def _last_sign(lease: SoftFileLease) -> int | None:
    """Return when the owner last touched the lock, in ns of the file system's clock; None without a lock."""
    try:
        return Path(lease.lock_file).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _describe_owner(lease: SoftFileLease, record_path: Path) -> str:
    owner = lease.owner
    # The owner may have released the lock a moment ago.
    if owner is None:
        return "another process"
    # filelock appends the namespace of a process in a container.
    host = owner.hostname.partition("?")[0]
    record: dict[str, Any] = {}
    with suppress(InputError, FileNotFoundError):
        record = read_json(record_path)
    same = (record.get("host"), record.get("pid")) == (host, owner.pid)
    return f"process {owner.pid} on host {host}" + (f" (since {record.get('started')})" if same else "")


def _exit(compromise: LeaseCompromise) -> None:
    """Exit at once, since another process may have taken over the folder and two must not write to it."""
    log.critical(
        f"{compromise.lock_file}: this process has lost the lock of its run ({compromise.reason}) and exits. Start the "
        "command again to continue the run"
    )
    os._exit(1)


def _report_former_runs(root: Path, name: str) -> None:
    """Log which run folders of this name version 0.1.0 wrote: their digests contain the source code."""
    # The text is searched, not parsed, because a damaged record of another run must not stop this one.
    records = sorted(root.glob(f"{name}-????????/run.json"))
    former = [path.parent.name for path in records if b'"code": ' in path.read_bytes()]
    if former:
        log.info(
            "%s: trained by covid_cls 0.1.0, whose runs this version neither continues nor counts as finished. They "
            "stay readable for evaluate, report and predict; this command trains a new run next to them",
            listed(former),
        )


def _read_record(folder: Path) -> dict[str, Any]:
    """Return run.json of earlier starts, or {"status": "new"}. Raises InputError if it is damaged or missing."""
    path = folder / "run.json"
    remedy = "train this run again with rerun=true"
    if not path.is_file():
        if (folder / "checkpoints").is_dir():
            raise InputError(f"{path}: missing, but there are checkpoints. Restore it from a backup, or {remedy}")
        return {"status": "new"}
    try:
        record = read_json(path)
    except InputError as error:
        raise InputError(f"{error}, or {remedy}") from error
    status, seconds = record.get("status"), record.get("seconds", 0.0)
    if status not in _STATUSES or not isinstance(seconds, int | float):
        raise InputError(
            f"{path}: damaged (status {status!r}, seconds {seconds!r}). Restore it from a backup, or {remedy}"
        )
    return record


def _empty(folder: Path, keep: Collection[str]) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in keep:
            entry.unlink()


# Hundreds of runs of a sweep may have the same data set.
@cache
def _data_digest(settings: str) -> str:
    decoded = json.loads(settings)
    return read_data(decoded, Augment(**decoded["augment"])).digest


def _environment() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device: dict[str, Any] = {"gpu": gpu, "machine": platform.machine(), "system": platform.system()}
    device["threads"] = torch.get_num_threads()
    versions = {"python": platform.python_version(), "covid_cls": covid_cls.__version__}
    for package in _PACKAGES:
        # A package may be installed under another name, such as pillow-simd.
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"host": socket.gethostname(), "pid": os.getpid(), "device": device, "versions": versions}


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
