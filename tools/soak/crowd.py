"""Processes that do a thing at the same moment, cheaply: they are forked from one that has imported everything."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

PATIENCE = 120.0  # seconds for an answer
_CONTEXT = multiprocessing.get_context("forkserver")
# There is one such server in a process, with the modules that it was started with: those of all who ask it.
_CONTEXT.set_forkserver_preload([f"tools.soak.{kind}" for kind in ("saves", "caches", "starts")])


class Member:
    """A process that runs `target(connection, *arguments)`, and this end of its connection."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """What it sends next; None where it has died or keeps silent."""
        try:
            return self.connection.recv() if self.connection.poll(PATIENCE) else None
        except (EOFError, ConnectionResetError):
            return None

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def at_once(members: Sequence[Member], question: object = None) -> list[Any]:
    """The answers of `members`, which get `question` and act on it at the same moment."""
    moment = time.monotonic() + 0.05 + len(members) / 1000  # all of them have it by then
    for member in members:
        member.connection.send((moment, question))
    return [member.answer() for member in members]


def take(connection: Connection) -> Any:
    """The question that `at_once` sends, at its moment."""
    moment, question = connection.recv()
    time.sleep(max(0.0, moment - time.monotonic()))
    return question
