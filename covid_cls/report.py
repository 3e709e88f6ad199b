"""python -m covid_cls.report: the finished runs below a folder on one page, and what their scores are evidence of."""

import datetime
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covid_cls.io import DISCLAIMER, atomic_file
from covid_cls.runtime.cli import Job, call_command, run_command
from covid_cls.runtime.schema import check_section, existing_folder

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
_OPTIONS = ("metric", "resamples", "seed", "level")


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        folder: Where index.html, results.csv and results.md are.
        verdict: Statements about the evidence, one per line.
    """

    folder: Path
    verdict: list[str]

    @property
    def results(self) -> "pd.DataFrame":
        """Return results.csv: scores with intervals, one row per configuration and score."""
        import pandas as pd

        return pd.read_csv(self.folder / "results.csv")


def report(*overrides: str, **settings: Any) -> Report:
    """Report on all finished runs below a folder, e.g. `report(runs="outputs/grid")`.

    Args:
        *overrides: Words as on the command line.
        **settings: More settings by their names.

    Raises:
        InputError: The folder does not exist or holds no run.
    """
    return call_command(_report, "report", overrides, settings)


def _report(job: Job) -> Report:
    # Imported late: --help, a misspelt key and a folder without runs need neither scipy nor matplotlib.
    from covid_cls.reporting.sweep_loading import find_runs, load_sweep

    settings = job.settings
    runs = existing_folder(settings, "runs")
    found = find_runs(runs)

    from covid_cls.reporting.sweep_analysis import ReportOptions, analyse_protocol, compare_split_pairs
    from covid_cls.reporting.sweep_page import About, report_page
    from covid_cls.reporting.sweep_tables import results_csv, results_md

    chosen = {name: settings[name] for name in _OPTIONS}
    check_section("report", ReportOptions, chosen)
    # Before any access to test predictions is logged.
    options = ReportOptions(**chosen)
    output = Path(settings["output"] or runs / "report").expanduser()
    about = About(f"Report of {runs.resolve().name}", job.command, datetime.datetime.now().astimezone())
    sweep = load_sweep(found, job.command)
    results, omissions = [], list(sweep.omissions)
    for protocol in sweep.protocols:
        log.info(f"{protocol.name}: {len(protocol.configurations)} configurations")
        result, left_out = analyse_protocol(protocol, options)
        results.append(result)
        omissions += left_out
    documents = {
        "index.html": report_page(sweep, results, compare_split_pairs(results), omissions, about),
        "results.csv": results_csv(results),
        "results.md": results_md(results, DISCLAIMER),
    }
    for name, text in documents.items():
        with atomic_file(output / name) as file:
            file.write(text.encode())
    verdict = [f"{r.protocol.name}: {line}" for r in results for line in r.verdict.lines]
    missing = [f"Missing and failed: {len(omissions)}"] if omissions else []
    log.info("\n".join([*verdict, *missing, f"results in {output}", DISCLAIMER]))
    return Report(output, verdict)


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line and return the exit code."""
    return run_command(_report, "report", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
