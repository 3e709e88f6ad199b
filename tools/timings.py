"""Measure how long the commands take to start, and how long the tests take: `make timings`.

`python -m tools.timings` prints a Markdown table of the start-up of the commands. `--suite` adds the README's test
command, without the installation; `--ci` adds `.ci/run` in a fresh clone, installation included. `--against FOLDER`
measures another checkout alternately with this one, for a column "before" and a column "now".
"""

import argparse
import datetime
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from covid_cls.benchmarking.benchmark_page import processor_name
from covid_cls.data.phantoms import build_phantoms
from covid_cls.experiment import computes_bfloat16

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = [sys.executable, "-c", "import torch, torchvision, pytorch_lightning"]
# Runs `train` until it opens the first image file, without depending on where in the code that is.
UNTIL_FIRST_IMAGE = """
import os, runpy, sys

def end_at_image(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].endswith(".png"):
        os._exit(0)

sys.addaudithook(end_at_image)
sys.argv = ["train", *sys.argv[1:]]
runpy.run_module("covid_cls.train", run_name="__main__", alter_sys=True)
sys.exit("no image was read")
"""


class Seconds(NamedTuple):
    """The duration of a process.

    Attributes:
        elapsed: Elapsed time.
        cpu: Processor time of the process and its children.
    """

    elapsed: float
    cpu: float


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        what: The measured quantity.
        values: One value per checkout, this one last.
        limit: The target, in the same unit.
        unit: Unit of the values.
    """

    what: str
    values: list[float]
    limit: float
    unit: str


def run_timed(command: Sequence[str], folder: Path, checkout: Path, codes: Sequence[int] = (0,)) -> Seconds:
    """Run a command in `folder` with the package of `checkout` and return the seconds it took.

    Raises:
        SystemExit: The command ended with another exit code than `codes`; its output is printed.
    """
    env = {**os.environ, "PYTHONPATH": str(checkout), "COVID_CLS_CACHE": str(folder / "cache")}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in codes:
        sys.exit(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return Seconds(elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def start_rows(checkouts: Sequence[Path], rounds: int) -> list[Row]:
    """Measure the start of the commands for each checkout, alternating, and return the medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = build_phantoms(folder / "phantoms", images=48)
        (folder / "empty").mkdir()
        words = ["data=manifest", f"data.path={manifest}", "data.size=48", "preprocess.crop=48", "trainer=cpu"]
        first_image = [sys.executable, "-c", UNTIL_FIRST_IMAGE, *words]

        def train_ratio(checkout: Path) -> float:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            return run_timed(first_image, folder, checkout).elapsed / run_timed(IMPORTS, folder, checkout).elapsed

        def cpu(code: int, *words: str) -> Callable[[Path], float]:
            command = [sys.executable, "-m", *words]
            return lambda checkout: run_timed(command, folder, checkout, [code]).cpu

        ratio = "`train` until the first image is read / `import torch, torchvision, pytorch_lightning`"
        measures = [
            (ratio, 1.2, "", train_ratio),
            ("`train --help`, CPU time", 1.5, "s", cpu(0, "covid_cls.train", "--help")),
            ("`train` with a misspelt key, CPU time", 1.3, "s", cpu(2, "covid_cls.train", "seeed=1")),
            ("`evaluate` of a missing file, CPU time", 2.5, "s", cpu(2, "covid_cls.evaluate", "predictions=no.csv")),
            ("`report` of an empty folder, CPU time", 2.5, "s", cpu(2, "covid_cls.report", "runs=empty")),
        ]
        rows = []
        for what, limit, unit, measure in measures:
            for checkout in checkouts:
                # The first run compiles the modules and fills the page cache.
                measure(checkout)
            rounds_of = [[measure(checkout) for checkout in checkouts] for _ in range(rounds)]
            rows.append(Row(what, [statistics.median(column) for column in zip(*rounds_of, strict=True)], limit, unit))
    return rows


def suite_row() -> Row:
    """Run the quick tier in this checkout and return its minutes."""
    seconds = run_timed([sys.executable, "-m", "pytest", "-q"], ROOT, ROOT)
    return Row("README test command without the installation", [seconds.elapsed / 60], suite_limit(), "min")


def suite_limit() -> float:
    """Return the target of the quick tier in minutes, which depends on whether the CPU computes bfloat16."""
    return 5.0 if computes_bfloat16() else 8.0


def ci_row() -> Row:
    """Run .ci/run in a fresh clone and return its minutes."""
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if (ROOT.parent / "shared").is_dir():
            (Path(name) / "shared").symlink_to(ROOT.parent / "shared")
        seconds = run_timed(["bash", ".ci/run"], clone, clone)
    return Row("`.ci/run` in a fresh clone, installation included", [seconds.elapsed / 60], 25.0, "min")


def table(rows: Sequence[Row], compared: bool) -> str:
    """Return a Markdown table of the rows, with a line on the machine; a missed target is marked."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "pytorch-lightning", "pytest"))
    bfloat16 = "with" if computes_bfloat16() else "without"
    machine = f"{os.cpu_count()} cores {bfloat16} bfloat16 ({processor_name()}), Python {platform.python_version()}"
    head = ["what", *(["before"] if compared else []), "now", "target"]
    lines = [f"{datetime.datetime.now().astimezone():%Y-%m-%d}, {machine}, {packages}.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        shown = [f"{value:.2f} {row.unit}".strip() for value in row.values]
        if compared and len(shown) == 1:
            shown.insert(0, "–")
        shown[-1] += " (missed)" if row.values[-1] > row.limit else ""
        lines.append("| " + " | ".join([row.what, *shown, f"at most {row.limit:g} {row.unit}".strip()]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="store_true", help="also the README's test command, without installation")
    parser.add_argument("--ci", action="store_true", help="also .ci/run in a fresh clone")
    parser.add_argument("--against", type=Path, help="another checkout, measured alternately with this one")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of which the median is shown")
    options = parser.parse_args()
    checkouts = [*([options.against.resolve()] if options.against else []), ROOT]
    rows = [*([suite_row()] if options.suite else []), *([ci_row()] if options.ci else [])]
    rows += start_rows(checkouts, options.rounds)
    print(table(rows, compared=len(checkouts) > 1))


if __name__ == "__main__":
    main()
