"""Processes that act at the same moment. They start fast: they are forked from one that has imported everything."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

PATIENCE = 120.0  # seconds to wait for an answer
_CONTEXT = multiprocessing.get_context("forkserver")
# A process has one fork server, which keeps the modules that it started with. These are the modules of all callers.
_CONTEXT.set_forkserver_preload([f"tools.soak.{kind}" for kind in ("saves", "caches", "starts")])


class Member:
    """A process that runs `target(connection, *arguments)`, and the parent's end of the connection."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """Return the next object that the process sends; None if it has died or does not answer in time."""
        try:
            return self.connection.recv() if self.connection.poll(PATIENCE) else None
        except (EOFError, ConnectionResetError):
            return None

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def at_once(members: Sequence[Member], question: object = None) -> list[Any]:
    """Send `question` to all members, let them act on it at the same moment, and return their answers."""
    moment = time.monotonic() + 0.05 + len(members) / 1000  # by then each has received the question
    for member in members:
        member.connection.send((moment, question))
    return [member.answer() for member in members]


def take(connection: Connection) -> Any:
    """Receive the question that `at_once` sends, and return it at the agreed moment."""
    moment, question = connection.recv()
    time.sleep(max(0.0, moment - time.monotonic()))
    return question
