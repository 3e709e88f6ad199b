"""Exceptions that a command reports as one line, with the exit code that belongs to them."""

from collections.abc import Sequence


class InputError(Exception):
    """The user's input is wrong: the message states what is wrong, where, and what to do."""

    exit_code = 2


class NonFiniteError(Exception):
    """Training produced nan or inf; the last checkpoint before it is kept."""

    exit_code = 1


class ExportError(Exception):
    """An exported file does not give the scores of its model, so it was not written."""

    exit_code = 1


def listed(items: Sequence[object], most: int = 10) -> str:
    """Return the first `most` items as text, followed by the number of the remaining ones."""
    shown = ", ".join(str(item) for item in items[:most])
    return f"{shown} … and {len(items) - most} more" if len(items) > most else shown
