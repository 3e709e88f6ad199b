"""Checkpoint writes that are killed with SIGKILL, with the temporary folder on another file system."""

import os
import random
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from covid_cls.errors import InputError
from covid_cls.io import remove_temporary_files
from covid_cls.training.checkpoints import LAST, AtomicCheckpointIO, newest_valid, read_checkpoint
from tools.soak.crowd import Member
from tools.soak.outcome import Outcome

_NUMBERS = 1 << 20  # float32 values in a checkpoint, 4 MB
_SEED = 8


def saves(rounds: int, folder: Path) -> Outcome:
    """Kill `rounds` processes during one of their first saves; each next process continues from the files left.

    The outcome is unexpected, too, if fewer than half of the kills hit a save or there is no second file system.
    """
    planted = f"{rounds} kills with SIGKILL during saves of 4 MB, TMPDIR on another file system"
    expected = (
        f"{rounds} of {rounds} last checkpoints complete, the old or the new one; at most 1 orphan per kill, "
        "0 after a restart"
    )
    elsewhere = _other_file_system(folder)
    if elsewhere is None:
        return Outcome(planted, expected, f"nothing: there is no second file system next to that of {folder}", False)
    draw, faults, orphans, landed = random.Random(_SEED), [], 0, Counter[str]()
    with tempfile.TemporaryDirectory(dir=elsewhere) as temporary:
        for number in range(rounds):
            saver = Member(_saver, folder, temporary)
            found = saver.connection.recv()
            begun = [saver.connection.recv() for _ in range(draw.randrange(1, 4) * 2 - 1)][-1]
            # A save takes about 0.02 s.
            time.sleep(draw.uniform(0, 0.04))
            saver.process.kill()
            saver.process.join()
            begun, ended = _progress(saver.connection, begun)
            saver.connection.close()
            landed["within a save" if ended < begun else "between saves"] += 1
            left = len([path for path in folder.iterdir() if path.suffix != ".ckpt"])
            orphans += left
            fault = _fault(folder, begun, ended) or (f"{left} orphans" if left > 1 else "")
            fault = fault or (f"{found} orphans after a restart" if found else "")
            faults += [f"kill {number + 1}: {fault}"] if fault else []
    where = ", ".join(f"{count} {where}" for where, count in landed.items())
    seen = f"{rounds - len(faults)} of {rounds} ({where}); {orphans} orphans in total, 0 after a restart"
    hit = landed["within a save"] * 2 > rounds
    return Outcome(
        planted, expected, "; ".join([seen if not faults else seen.partition(";")[0], *faults]), not faults and hit
    )


def _saver(writer: Connection, folder: Path, temporary: str) -> None:
    """Continue from the checkpoints in `folder` as `train` does, and save until killed.

    Sends the number of orphaned files, then the epoch at the beginning and at the end of each save.
    """
    os.environ["TMPDIR"] = temporary
    tempfile.tempdir = None
    torch.set_num_threads(1)
    remove_temporary_files(folder)
    writer.send(len([path for path in folder.iterdir() if path.suffix != ".ckpt"]))
    io = AtomicCheckpointIO()
    path, contents, _ = newest_valid(folder)
    if path:
        io.load_checkpoint(path)
    epoch = contents.get("epoch", -1)
    while True:
        epoch += 1
        state = {"w": torch.full((_NUMBERS,), float(epoch))}
        writer.send(epoch)
        io.save_checkpoint({"state_dict": state, "hyper_parameters": {}, "epoch": epoch}, folder / LAST)
        writer.send(epoch)


def _progress(reader: Connection, begun: int) -> tuple[int, int]:
    """Read all pending messages; return the last epoch whose save began and the last one whose save ended."""
    ended = begun - 1
    while True:
        try:
            epoch = reader.recv()
        except (EOFError, OSError):
            return begun, ended
        if epoch > begun:
            begun = epoch
        else:
            ended = epoch


def _fault(folder: Path, begun: int, ended: int) -> str:
    """Return what is wrong after a kill during or after the save of epoch `begun`; "" if nothing is."""
    if ended < 0 and not (folder / LAST).exists():
        return ""
    try:
        contents = read_checkpoint(folder / LAST)
    except InputError as error:
        return str(error)
    epoch = contents["epoch"]
    if epoch not in (ended, begun):
        return f"holds epoch {epoch}, although {ended} was saved and {begun} begun"
    if not torch.equal(contents["state_dict"]["w"], torch.full((_NUMBERS,), float(epoch))):
        return f"does not hold the values of epoch {epoch}"
    return "" if newest_valid(folder)[0] == folder / LAST else "is not the checkpoint that a restart continues from"


def _other_file_system(folder: Path) -> Path | None:
    """Return a folder on a different file system from `folder`; None if there is none."""
    # On Linux, the first one is in memory.
    places = (Path("/dev/shm"), Path.home(), Path("/var/tmp"))
    found = [place for place in places if place.is_dir() and os.access(place, os.W_OK)]
    return next((place for place in found if place.stat().st_dev != folder.stat().st_dev), None)
