"""Each measured side lives in a process of its own, so that the settings and memory of one do not colour another."""

import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from covid_cls.data.store import end_with_parent
from covid_cls.errors import InputError

Wire = Connection  # carries words one way, and back a pair: how it went, and what came of it


class Stopped(Exception):  # noqa: N818  # no error
    """The parent has hung up."""


class Child:
    """A fresh process in which `work(wire, *arguments)` runs; it is gone when the `with` block is left.

    hello: the first thing that it says.
    """

    hello: Any

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        # spawn: forking a process that runs torch's threads can deadlock the child
        spawn = multiprocessing.get_context("spawn")
        self._wire, self._theirs = spawn.Pipe()
        self._process = spawn.Process(target=_live, args=(self._theirs, work, arguments))

    def __enter__(self) -> Self:
        # A terminal sends Ctrl-C to all; the parent alone acts on it. What a process ignores, its children ignore.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        self._theirs.close()
        try:
            self.hello = self._receive()
        except BaseException:
            self._end(0.0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(10.0 if error is None else 0.0)

    def ask(self, word: str) -> Any:
        """What the process answers to `word`. InputError where it found the user's input at fault."""
        self._wire.send(word)
        return self._receive()

    def _end(self, patience: float) -> None:
        self._wire.close()
        self._process.join(patience)
        self._process.kill()  # Lightning turns SIGTERM into something that a waiting process would never see
        self._process.join()

    def _receive(self) -> Any:
        try:
            went, value = self._wire.recv()
        except EOFError as error:
            self._process.join()
            raise RuntimeError(
                f"a measured process ended with exit code {self._process.exitcode} (-9: killed, as for want of memory)"
            ) from error
        if went == "fault":
            raise InputError(value)
        if went == "crash":
            raise RuntimeError(f"in a measured process:\n{value}")
        return value


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, computed in a process of its own."""
    with Child(_once, function, arguments) as child:
        return child.hello


def say(wire: Wire, value: Any) -> None:
    """Send `value` to the parent."""
    wire.send(("done", value))


def wait_for_word(wire: Wire, answers: Mapping[str, Callable[[], Any]]) -> str:
    """The next word that `answers` does not hold; until it comes, those that it holds are answered. Or Stopped."""
    try:
        while (word := wire.recv()) in answers:
            say(wire, answers[word]())
    except (EOFError, ConnectionError) as error:
        raise Stopped from error
    return str(word)


def _live(wire: Wire, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    logging.disable(logging.WARNING)  # what must be known comes back with the results
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # for as long as the process lives; so it has no bar
    try:
        work(wire, *arguments)
    except InputError as error:
        wire.send(("fault", str(error)))
    except Stopped:
        pass
    except BaseException:
        wire.send(("crash", traceback.format_exc()))


def _once(wire: Wire, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    say(wire, function(*arguments))
