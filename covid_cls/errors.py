"""The exceptions that a command turns into one line and an exit code."""

from collections.abc import Sequence


class InputError(Exception):
    """The user's input is at fault: the message says what, where and the remedy, in words a user can act on."""

    exit_code = 2


class NonFiniteError(Exception):
    """Training has produced nan or inf; the last checkpoint before it is kept."""

    exit_code = 1


def listed(items: Sequence[object], most: int = 10) -> str:
    """One string naming the first `most` items and how many more there are."""
    shown = ", ".join(str(item) for item in items[:most])
    return f"{shown} … and {len(items) - most} more" if len(items) > most else shown
