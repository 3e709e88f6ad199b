"""Processes that start the same run, or a run each, at the same moment."""

import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from covid_cls.errors import InputError
from covid_cls.io import read_json
from covid_cls.training.run_folder import open_run
from tools.soak.crowd import Member, at_once, take
from tools.soak.outcome import Outcome
from tools.soak.training import compose_small

_RECOVERY = 10.0  # seconds from the death of the lock's holder to its next holder, including the start of the processes


def starts(rounds: int, folder: Path) -> Outcome:
    """Start one run in `rounds` processes at once; again after its process was killed; then one run per process."""
    settings = compose_small()
    same = [settings] * rounds
    first = Round(folder, same)
    before = time.monotonic()
    first.holders[0].kill()
    second = Round(folder, same)
    recovery = time.monotonic() - before
    second.end()
    others = Round(folder, [{**settings, "seed": 1 + k} for k in range(rounds)])
    folders = {message for _, message in others.answers}
    others.end()
    finished = sum(read_json(path)["status"] == "finished" for path in folder.glob("*/run.json"))
    for member in first.members:
        member.kill()
    counts = [len(first.holders), first.named, len(second.holders), second.named]
    counts += [len(others.holders), len(folders), finished]
    wanted = [1, rounds - 1, 1, rounds - 1, rounds, rounds, rounds + 1]
    return Outcome(
        f"{rounds} processes that start one run at once; the same after its process was killed with SIGKILL; then "
        f"{rounds} that start a run each",
        _as_text(*wanted),
        f"{_as_text(*counts)}; the killed process was replaced within {recovery:.1f} s",
        counts == wanted and recovery < _RECOVERY,
    )


class Round:
    """Starts of these settings at the same moment.

    Attributes:
        members: All processes.
        answers: For each process, whether it may train, and the run's folder or the error message.
        holders: The processes that may train.
        named: How many of the others were told which process trains.
    """

    def __init__(self, folder: Path, settings: list[dict[str, Any]]) -> None:
        self.members = [Member(start, folder, each) for each in settings]
        self.answers: list[tuple[bool, str]] = [answer or (False, "") for answer in at_once(self.members)]
        held = [held for held, _ in self.answers]
        self.holders = [member for member, holds in zip(self.members, held, strict=True) if holds]
        pid = self.holders[0].process.pid if self.holders else None
        name = f"process {pid} on host {socket.gethostname()} "
        self.named = sum(name in message for holds, message in self.answers if not holds)

    def end(self) -> None:
        """Let the holders finish their training, and wait for all processes."""
        for holder in self.holders:
            holder.connection.send(None)
        for member in self.members:
            member.process.join()


def start(connection: Connection, root: Path, settings: dict[str, Any]) -> None:
    """Open the run in a separate process and keep it open until the parent sends a message.

    Sends whether the process may train, and the run's folder or the error message.
    """
    take(connection)
    try:
        with open_run(root, settings, "d") as run, run.training():
            connection.send((True, str(run.folder)))
            connection.recv()
    except InputError as error:
        connection.send((False, str(error)))


def _as_text(first: int, named: int, second: int, named_again: int, others: int, folders: int, finished: int) -> str:
    """Return the counts as text."""
    return (
        f"{first} trains and {named} are told which host and process; then {second} and {named_again}; "
        f"then {others} train in {folders} folders; {finished} finish"
    )
