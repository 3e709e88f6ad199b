"""Tables for the console."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """`rows` as lines of text with aligned columns, the first one flush left."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
