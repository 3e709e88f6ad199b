"""A run's folder: named by what determines its numbers, locked while it trains, and honest about how far it came."""

import datetime
import json
import logging
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pytorch_lightning.utilities.exceptions import SIGTERMException

import covid_cls
from covid_cls.errors import InputError
from covid_cls.records import LEDGER, digest, read_json, write_json
from covid_cls.training.identity import cell_name, run_digests

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

    @property
    def last_checkpoint(self) -> Path | None:
        """Where an interrupted training goes on from; None if it has not come to the end of an epoch."""
        path = self.folder / "checkpoints" / "last.ckpt"
        return path if path.is_file() else None

    def note(self, **facts: Any) -> None:
        """Put facts into run.json."""
        self.record.update(facts)
        if self.writes:
            write_json(self.folder / "run.json", self.record)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Record how the work inside ends and how long it took, earlier starts included; its exceptions go on."""
        start, before = time.monotonic(), self.record.get("seconds", 0.0)
        for stale in ("ended", "reason"):  # of an earlier start
            self.record.pop(stale, None)
        self.note(status="running", started=_now(), device=_device(), versions=_versions())

        def end(**facts: str) -> None:
            self.note(ended=_now(), seconds=round(before + time.monotonic() - start, 1), **facts)

        try:
            with _log_to(self.folder / "run.log") if self.writes else nullcontext():
                yield
        except (KeyboardInterrupt, SystemExit, SIGTERMException) as stop:
            end(status="interrupted", reason=type(stop).__name__)
            raise
        except BaseException as error:
            end(status="failed", reason=f"{type(error).__name__}: {error}")
            raise
        end(status="finished")


@contextmanager
def open_run(
    root: Path, settings: dict[str, Any], data_digest: str, *, rerun: bool = False, writes: bool = True
) -> Iterator[Run]:
    """The run in `root/<cell>` for these settings, data and code: a new one, or the one that was begun before.

    settings: the resolved configuration. rerun: delete what an earlier run left. writes: False in all but the first
    process of a distributed run. InputError where another process is training the same cell.
    """
    digests = run_digests(settings, data_digest)
    folder = root / f"{cell_name(settings)}-{digest(json.dumps(digests))[:8]}"
    if not writes:
        yield Run(folder, {"status": "running"}, writes=False)
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{folder}: another process is training this very cell; wait for it or stop it") from error
    try:
        if rerun:
            _empty(folder, keep=LEDGER)  # the same test images, however often the network is trained anew
        record_path = folder / "run.json"
        record = read_json(record_path) if record_path.is_file() else {"status": "new"}
        record |= {"cell": folder.name, "config": settings, "digests": digests, "code_version": covid_cls.__version__}
        yield Run(folder, record)
    finally:
        lock.release()
        if not (folder / "run.json").is_file():  # refused before it began
            _empty(folder)
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def _empty(folder: Path, keep: str = "") -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in (".lock", keep):
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
