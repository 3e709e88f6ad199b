"""One process to a run: a lock that names its holder, on one host or many, and that no dead process keeps."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import LeaseCompromise, SoftFileLease, Timeout

from covid_cls.errors import InputError
from covid_cls.records import read_json

log = logging.getLogger(__name__)
_SILENCE = 60.0  # seconds without a sign of life after which a process that cannot be seen from here counts as dead


@contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """Keeps other processes off the run in `folder` meanwhile; InputError, naming host and process, where one has it.

    doing: what that process is then said to be doing, "training this very cell".

    The lock lies beside the folder, so that this may be made and removed under it. A holder that died on this host is
    followed at once; one on another host, or in another container, when it has given no sign of life for a minute. Who
    was silent for so long and lives ends when it finds out, and writes no more.
    """
    # Not the system's own lock (flock): on the shared disks of clusters it may hold for one host alone, or not at all.
    lease = SoftFileLease(folder.with_name(f".{folder.name}.lock"), lease_duration=_SILENCE, on_compromise=_end)
    try:
        _acquire(lease)
    except Timeout as error:
        holder = _holder(lease, folder / "run.json")
        raise InputError(
            f"{folder}: {holder} is {doing}; wait for it or stop it (its lock is {lease.lock_file})"
        ) from error
    try:
        yield
    finally:
        lease.release()


def _acquire(lease: SoftFileLease) -> None:
    """Take the lock; Timeout where its holder lives."""
    try:
        lease.acquire(timeout=0.5)  # as long as a process may need to put its name into the lock that it has made
    except Timeout as error:
        owner = lease.owner
        # filelock names the holder where it cannot see from here whether that process lives: then it is watched.
        if owner is None or f"pid {owner.pid} on {owner.hostname}" not in str(error):
            raise
        log.warning(
            "%s: process %d on host %s has this lock; waiting up to %.0f s for a sign of life",
            lease.lock_file,
            owner.pid,
            owner.hostname,
            _SILENCE,
        )
        seen = _touched(lease)
        lease.acquire(timeout=2 * _SILENCE, cancel_check=lambda: _touched(lease) not in (None, seen))


def _touched(lease: SoftFileLease) -> int | None:
    """When the holder last gave a sign of life, in ns by the file system's clock; None where nobody holds the lock."""
    try:
        return Path(lease.lock_file).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _holder(lease: SoftFileLease, record_path: Path) -> str:
    """The process that has the lock, and since when if the run's record says so."""
    owner = lease.owner
    if owner is None:  # it has let go just now
        return "another process"
    host = owner.hostname.partition("?")[0]  # filelock appends the namespace of a container's processes
    record: dict[str, Any] = {}
    with suppress(InputError, FileNotFoundError):
        record = read_json(record_path)
    its_own = (record.get("host"), record.get("pid")) == (host, owner.pid)
    return f"process {owner.pid} on host {host}" + (f" (since {record.get('started')})" if its_own else "")


def _end(compromise: LeaseCompromise) -> None:
    """Ends this process where another may have its run by now: two must not write into one folder."""
    log.critical(
        "%s: this run's lock is lost (%s); the process ends at once, and the run goes on where it is started again",
        compromise.lock_file,
        compromise.reason,
    )
    os._exit(1)
