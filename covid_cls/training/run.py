"""A run's folder: named by what determines its numbers, locked while it trains, and honest about how far it came."""

import datetime
import json
import logging
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import covid_cls
from covid_cls.errors import InputError
from covid_cls.interrupts import received
from covid_cls.records import LEDGER, digest, read_json, remove_scratch, write_json
from covid_cls.training.checkpoints import newest_good
from covid_cls.training.identity import cell_name, run_digests
from covid_cls.training.lock import held

log = logging.getLogger(__name__)
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


@dataclass
class Run:
    """The folder of one cell of a grid.

    record: what run.json holds; its status is new, running, finished, failed or interrupted.
    """

    folder: Path
    record: dict[str, Any]
    writes: bool = True

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.record["status"] == "finished")

    def last_checkpoint(self) -> tuple[Path | None, dict[str, Any]]:
        """Where an interrupted training goes on from, and what is in it; (None, {}) without an epoch to go on from.

        See `newest_good`. Its warnings are logged, and stay in the record as "damage".
        """
        path, contents, warnings = newest_good(self.folder / "checkpoints")
        for warning in warnings:
            log.warning(warning)
        if warnings:
            self.record["damage"] = [*self.record.get("damage", []), *warnings]
        return path, contents

    def note(self, **facts: Any) -> None:
        """Put facts into run.json."""
        self.record.update(facts)
        if self.writes:
            write_json(self.folder / "run.json", self.record)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Record how the work inside ends and how long it took, earlier starts included; its exceptions go on."""
        start, before = time.monotonic(), self.record.get("seconds", 0.0)
        earlier = dict(self.record)
        if self.writes:
            remove_scratch(self.folder)
        for stale in ("ended", "reason"):  # of an earlier start
            self.record.pop(stale, None)
        self.note(
            status="running",
            started=_now(),
            host=socket.gethostname(),
            pid=os.getpid(),
            device=_device(),
            versions=_versions(),
        )

        def end(**facts: str) -> None:
            self.note(ended=_now(), seconds=round(before + time.monotonic() - start, 1), **facts)

        try:
            with _log_to(self.folder / "run.log") if self.writes else nullcontext():
                if self.writes and earlier["status"] == "running":  # else it would say how it ended
                    log.warning(
                        "the start of %s ended without a word (process %s on host %s)",
                        *(earlier.get(key, "unknown") for key in ("started", "pid", "host")),
                    )
                yield
        except BaseException as error:
            stop = received()
            if isinstance(error, KeyboardInterrupt | SystemExit) or (stop and not isinstance(error, InputError)):
                end(status="interrupted", reason=stop.name if stop else type(error).__name__)
            else:
                end(status="failed", reason=f"{type(error).__name__}: {error}")
            raise
        end(status="finished")


@contextmanager
def open_run(
    root: Path, settings: dict[str, Any], data_digest: str, *, rerun: bool = False, writes: bool = True
) -> Iterator[Run]:
    """The run in `root/<cell>` for these settings, data and code: a new one, or the one that was begun before.

    settings: the resolved configuration. rerun: delete what an earlier run left. writes: False in all but the first
    process of a distributed run. InputError where another process is training the same cell, by its host and number.
    """
    digests = run_digests(settings, data_digest)
    folder = root / f"{cell_name(settings)}-{digest(json.dumps(digests))[:8]}"
    if not writes:
        yield Run(folder, {**_read_record(folder), "status": "running"}, writes=False)
        return
    root.mkdir(parents=True, exist_ok=True)
    with held(folder, "training this very cell"):
        begun = folder.is_dir()
        folder.mkdir(exist_ok=True)
        try:
            if rerun:
                _empty(folder, keep=LEDGER)  # the same test images, however often the network is trained anew
            record = _read_record(folder)
            record |= {
                "cell": folder.name,
                "config": settings,
                "digests": digests,
                "code_version": covid_cls.__version__,
            }
            yield Run(folder, record)
        finally:
            if not begun and not (folder / "run.json").is_file():  # refused before it began
                shutil.rmtree(folder)


def _read_record(folder: Path) -> dict[str, Any]:
    """What run.json says of earlier starts; InputError where somebody damaged it or took it away."""
    path = folder / "run.json"
    anew = "restore it from a backup, or train this cell anew with rerun=true"
    if not path.is_file():
        if (folder / "checkpoints").is_dir():
            raise InputError(f"{path}: is missing beside the checkpoints of an earlier start; {anew}")
        return {"status": "new"}
    try:
        record = read_json(path)
    except InputError as error:
        raise InputError(f"{error}, or train this cell anew with rerun=true") from error
    if record.get("status") not in _STATUSES or not isinstance(record.get("seconds", 0.0), int | float):
        raise InputError(f"{path}: not what a run writes (status: {record.get('status')!r}); {anew}")
    return record


def _empty(folder: Path, keep: str = "") -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != keep:
            entry.unlink()


def _device() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "machine": platform.machine(), "system": platform.system(), "threads": torch.get_num_threads()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "covid_cls": covid_cls.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


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
