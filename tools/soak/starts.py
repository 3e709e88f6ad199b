"""Processes that start one cell, or a cell each, at the same moment."""

import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from covid_cls.errors import InputError
from covid_cls.records import read_json
from covid_cls.training.run import open_run
from tools.soak.crowd import Member, at_once, take
from tools.soak.outcome import Outcome
from tools.soak.training import compose_small

_RECOVERY = 10.0  # seconds from the death of a holder to the next one, with the start of all who ask


def starts(rounds: int, folder: Path) -> Outcome:
    """`rounds` starts of one cell at once; again when its holder has been killed; then as many of a cell each."""
    settings = compose_small()
    same = [settings] * rounds
    first = Round(folder, same)
    before = time.monotonic()
    first.holders[0].kill()
    second = Round(folder, same)
    recovery = time.monotonic() - before
    second.end()
    others = Round(folder, [{**settings, "seed": 1 + k} for k in range(rounds)])
    folders = {told for _, told in others.answers}
    others.end()
    finished = sum(read_json(path)["status"] == "finished" for path in folder.glob("*/run.json"))
    for member in first.members:
        member.kill()
    counts = [len(first.holders), first.named, len(second.holders), second.named]
    counts += [len(others.holders), len(folders), finished]
    wanted = [1, rounds - 1, 1, rounds - 1, rounds, rounds, rounds + 1]
    return Outcome(
        f"{rounds} processes that start one cell at once; the same when its holder was killed with SIGKILL; then "
        f"{rounds} that start a cell each",
        _told(*wanted),
        f"{_told(*counts)}; the killed holder was followed within {recovery:.1f} s",
        counts == wanted and recovery < _RECOVERY,
    )


class Round:
    """Starts of these settings at the same moment. holders: who may train. named: how many were told who does."""

    def __init__(self, folder: Path, settings: list[dict[str, Any]]) -> None:
        self.members = [Member(start, folder, each) for each in settings]
        self.answers: list[tuple[bool, str]] = [answer or (False, "") for answer in at_once(self.members)]
        held = [held for held, _ in self.answers]
        self.holders = [member for member, holds in zip(self.members, held, strict=True) if holds]
        pid = self.holders[0].process.pid if self.holders else None
        name = f"process {pid} on host {socket.gethostname()} "
        self.named = sum(name in told for holds, told in self.answers if not holds)

    def end(self) -> None:
        """Let the holders come to the end of their training."""
        for holder in self.holders:
            holder.connection.send(None)
        for member in self.members:
            member.process.join()


def start(connection: Connection, root: Path, settings: dict[str, Any]) -> None:
    """In a process of its own: tells whether it may train, with the run's folder or the refusal; trains until told."""
    take(connection)
    try:
        with open_run(root, settings, "d") as run, run.training():
            connection.send((True, str(run.folder)))
            connection.recv()
    except InputError as error:
        connection.send((False, str(error)))


def _told(first: int, named: int, second: int, named_again: int, others: int, folders: int, finished: int) -> str:
    """The counts in words."""
    return (
        f"{first} trains and {named} are told its host and process; then {second} and {named_again}; "
        f"then {others} train in {folders} folders; {finished} finish"
    )
