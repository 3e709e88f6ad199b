"""Inject the faults that a long sweep can meet, many of each kind, and print the outcomes as one Markdown table.

python -m tools.soak [--small] [--write] [kind ...]

kind: kinds of faults, all of them by default: kills, saves, flips, sweep, images, caches, starts.
--small: inject only a few faults of each kind.
--write: write the table to docs/soak.md.

The exit code is 1 if the outcome of any kind is not the expected one.
"""

import argparse
import datetime
import importlib
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tools.soak.commands import ROOT
from tools.soak.outcome import Outcome

# Name of the module and of its function: number of faults in a full run and with --small.
KINDS = {
    "kills": (12, 2),
    "saves": (200, 10),
    "flips": (200, 20),
    "sweep": (24, 6),
    "images": (500, 60),
    "caches": (200, 4),
    "starts": (50, 8),
}
PACKAGES = ("torch", "pytorch-lightning", "torchvision", "hydra-core", "pillow", "filelock", "covid_cls")
ANCHOR = "<!-- what follows is written by `python -m tools.soak --write` -->\n"


def main(arguments: Sequence[str]) -> int:
    """Run the chosen kinds, print the table and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("kinds", nargs="*", metavar="kind")
    wanted = parser.parse_args(arguments)
    if unknown := set(wanted.kinds) - set(KINDS):
        parser.error(f"unknown kind of fault: {sorted(unknown)}. Choose from {list(KINDS)}.")
    kinds = wanted.kinds or list(KINDS)
    # Each kind runs several processes; this must be set before torch is imported with the first kind.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    for kind in kinds:
        rounds = KINDS[kind][1 if wanted.small else 0]
        print(f"{kind}: {rounds} …", flush=True)
        start = time.monotonic()
        outcome = inject(kind, rounds)
        rows.append((outcome, time.monotonic() - start))
        print(f"{kind}: {outcome.seen}; {'as expected' if outcome.held else 'NOT AS EXPECTED'}", flush=True)
    command = " ".join(["python -m tools.soak", *(["--small"] if wanted.small else []), *wanted.kinds])
    text = page(command, rows)
    print("\n" + text)
    if wanted.write:
        path = ROOT / "docs" / "soak.md"
        path.write_text(path.read_text(encoding="utf-8").partition(ANCHOR)[0] + ANCHOR + text, encoding="utf-8")
    return 0 if all(outcome.held for outcome, _ in rows) else 1


def inject(kind: str, rounds: int) -> Outcome:
    """Inject `rounds` faults of a kind; an exception of the tool itself counts as an unexpected outcome."""
    with tempfile.TemporaryDirectory(prefix=f"soak-{kind}-") as folder:
        try:
            outcome: Outcome = getattr(importlib.import_module(f"tools.soak.{kind}"), kind)(rounds, Path(folder))
        except Exception as error:
            traceback.print_exc()
            return Outcome(f"{rounds} {kind}", "a result", f"the tool failed: {type(error).__name__}: {error}", False)
    return outcome


def page(command: str, rows: Sequence[tuple[Outcome, float]]) -> str:
    """Return the Markdown section: heading, versions, machine and the table of outcomes."""
    # Imported here, because it imports torch, whose number of threads `main` sets.
    from covid_cls.benchmarking.benchmark_page import processor_name

    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines = [
        f"## {datetime.date.today()}: `{command}`",
        "",
        f"Python {platform.python_version()}, {versions}; {platform.system()}, {os.cpu_count()} cores of "
        f"{processor_name()}, no GPU used.",
        "",
        "| planted | expected | seen | held | seconds |",
        "|---|---|---|---|---|",
    ]
    for outcome, seconds in rows:
        cells = [outcome.planted, outcome.expected, outcome.seen, "yes" if outcome.held else "**no**", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
