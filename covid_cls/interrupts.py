"""The signals that ask a command to end, in order: at a safe point, with what was finished saved."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import FrameType

# Ctrl-C, a request to end, and the warnings that a cluster sends some time before that; the last is submitit's.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS has asked this process to end; its text is the signal's name. exit_code: 130 or 143."""

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
    """A block that the first of SIGNALS ends with Interrupted, at once or, within `deferred`, at a safe point.

    Further ones are ignored until the process has ended: nothing breaks off the saving that the first one began, and
    SIGKILL is there for who cannot wait. Whatever else leaves the block after a signal becomes Interrupted, too: a
    worker process that the same signal killed may be noticed first. Does nothing outside the main thread, where Python
    handles no signals, and ignores them in a process that Lightning started for its share of a network: the process
    that the user started ends it.
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
    """A block in which a signal waits for the next `safe_point`, or for the end of the block."""
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False
    safe_point()


@contextmanager
def shielded() -> Iterator[None]:
    """A block in which processes are started that none of SIGNALS reaches; they have to end with this one.

    A terminal's Ctrl-C and a cluster's signals go to all processes of a command, and each would print a traceback from
    wherever it is, if only in its imports. What reaches this process meanwhile waits for the end of the block.
    """
    resource_tracker.ensure_running()  # multiprocessing's first start would do so, and lift the mask (Python 3.11)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def safe_point() -> None:
    """Returns where no signal has come; Interrupted where one has."""
    if _state.received:
        raise Interrupted(_state.received)


def received() -> signal.Signals | None:
    """The signal that has asked this process to end."""
    return _state.received


def _take(number: int, frame: FrameType | None) -> None:
    # Where the signal ends the workers of a DataLoader, too, torch's handler raises RuntimeError wherever this process
    # is by then: while it saves, in run.json, in its last destructors.
    signal.signal(signal.SIGCHLD, _ignore)
    if _state.received:
        return
    _state.received = signal.Signals(number)
    if not _state.deferred:
        raise Interrupted(_state.received)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Not SIG_IGN, which the processes that are started here would inherit, nor SIG_DFL, of which Python warns."""
