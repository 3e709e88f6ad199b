"""python -m covid_cls.report: the finished runs below a folder as one page, with what their scores are evidence of."""

import datetime
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from covid_cls.command import check_section, existing_folder, plain, run_command
from covid_cls.records import DISCLAIMER, whole_file

log = logging.getLogger(__name__)
_OPTIONS = ("metric", "resamples", "seed", "level")


def report(cfg: DictConfig) -> None:
    """index.html, results.csv and results.md of the sweep that `cfg` names, and its verdict on the console."""
    # Imported late: --help, a misspelt key and a folder without runs need neither scipy nor matplotlib.
    from covid_cls.reporting.collect import collect, run_folders

    settings = plain(cfg)
    runs = existing_folder(settings, "runs")
    run_folders(runs)  # raises InputError if there is none

    from covid_cls.reporting.measure import measure, measure_twins
    from covid_cls.reporting.report_page import About, report_page
    from covid_cls.reporting.report_tables import results_csv, results_md
    from covid_cls.reporting.standing import Options

    chosen = {name: settings[name] for name in _OPTIONS}
    check_section("report", Options, chosen)
    options = Options(**chosen)
    output = Path(settings["output"] or runs / "report").expanduser()
    command = shlex.join(["python", "-m", "covid_cls.report", *HydraConfig.get().overrides.task])
    about = About(f"Report of {runs.resolve().name}", command, datetime.datetime.now().astimezone())
    sweep = collect(runs, command)
    results, omissions = [], list(sweep.omissions)
    for protocol in sweep.protocols:
        log.info(f"{protocol.name}: cells: {len(protocol.cells)}")
        result, said = measure(protocol, options)
        results.append(result)
        omissions += said
    documents = {
        "index.html": report_page(sweep, results, measure_twins(results), omissions, about),
        "results.csv": results_csv(results),
        "results.md": results_md(results, DISCLAIMER),
    }
    for name, text in documents.items():
        with whole_file(output / name) as file:
            file.write(text.encode())
    lines = [f"{r.protocol.name}: {line}" for r in results for line in r.verdict.lines]
    left_out = [f"Missing and failed: {len(omissions)}"] if omissions else []
    log.info("\n".join([*lines, *left_out, f"results in {output}", DISCLAIMER]))


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line; return the exit code."""
    return run_command(report, "report", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
