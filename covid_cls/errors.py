"""The one exception a command turns into exit code 2."""

from collections.abc import Sequence


class InputError(Exception):
    """The user's input is at fault: the message says what, where and the remedy, in words a user can act on."""


def listed(items: Sequence[object], most: int = 10) -> str:
    """One string naming the first `most` items and how many more there are."""
    shown = ", ".join(str(item) for item in items[:most])
    return f"{shown} … and {len(items) - most} more" if len(items) > most else shown
