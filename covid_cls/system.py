"""The processor cores that a process may use, and its reaction to signals."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import FrameType


def cores() -> int:
    """Return the number of processor cores that this process may use; a cluster job or taskset can limit it."""
    # macOS has no sched_getaffinity.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Ctrl-C, a request to terminate, and the warnings that clusters send some time before it (SIGUSR2 by submitit).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """The process received one of SIGNALS; the message is the signal's name.

    Attributes:
        exit_code: 130 after Ctrl-C, 143 after any other signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_code = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


@dataclass
class _State:
    received: signal.Signals | None = None
    deferred: bool = False


_state = _State()


@contextmanager
def interruptible() -> Iterator[None]:
    """Run a block that the first of SIGNALS ends with Interrupted: immediately, or within `deferred` at a safe point.

    Further signals are ignored until the process has ended, so that they cannot interrupt the saving that the first one
    started. The function does nothing outside the main thread, because Python handles signals only there. In a process
    that Lightning started for one device of several, signals are ignored: the process that the user started ends it.

    Raises:
        Interrupted: A signal arrived, whatever exception left the block. A worker process that the same signal killed
            may be noticed first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _ignore if int(os.environ.get("LOCAL_RANK", "0")) > 0 else _take
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    except BaseException as error:
        if _state.received and not isinstance(error, Interrupted):
            raise Interrupted(_state.received) from error
        raise
    finally:
        if not _state.received:
            for number, earlier in before.items():
                signal.signal(number, earlier)


@contextmanager
def deferred() -> Iterator[None]:
    """Run a block in which a signal takes effect at the next `safe_point`, or at the end of the block."""
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False
    safe_point()


@contextmanager
def shielded() -> Iterator[None]:
    """Run a block whose child processes ignore SIGNALS; the children must end when this process ends.

    A signal that reaches this process during the block takes effect at its end.
    """
    # A terminal's Ctrl-C and a cluster's signals go to all processes of a command. Without the mask each child would
    # print a traceback, even in the middle of its imports.
    # The first start of multiprocessing's resource tracker would lift the mask (Python 3.11), so it is started before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def safe_point() -> None:
    """Raise Interrupted if a signal has arrived."""
    if _state.received:
        raise Interrupted(_state.received)


def received() -> signal.Signals | None:
    """Return the signal that has arrived, or None."""
    return _state.received


def _take(number: int, frame: FrameType | None) -> None:
    # If the signal also ends the workers of a DataLoader, torch's handler of SIGCHLD would raise RuntimeError at any
    # point of this process, for example while it saves run.json.
    signal.signal(signal.SIGCHLD, _ignore)
    if _state.received:
        return
    _state.received = signal.Signals(number)
    if not _state.deferred:
        raise Interrupted(_state.received)


def _ignore(number: int, frame: FrameType | None) -> None:
    # A separate handler, since child processes would inherit SIG_IGN, and Python warns about SIG_DFL.
    return
