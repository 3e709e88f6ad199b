"""The outcome of one kind of fault."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """One row of the table.

    Attributes:
        planted: The injected faults and their number.
        expected: The outcome that the package promises.
        seen: The observed outcome.
        held: Whether the observed outcome is the expected one.
    """

    planted: str
    expected: str
    seen: str
    held: bool
