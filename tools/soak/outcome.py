"""What the soak saw of one kind of fault."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """One line of the soak's table.

    planted: the faults, with their number. expected, seen: what should come of them, and what did. held: whether seen
    is what was expected.
    """

    planted: str
    expected: str
    seen: str
    held: bool
