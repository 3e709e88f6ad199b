"""python -m covid_cls.audit: what a data set gives away before anything is trained on it."""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from covid_cls.command import check_section, plain, run_command
from covid_cls.errors import InputError
from covid_cls.labels import TASKS

if TYPE_CHECKING:
    from covid_cls.audits.collection import Collection
    from covid_cls.reporting.audit_page import Audit

log = logging.getLogger(__name__)


def audit(cfg: DictConfig) -> None:
    """Audit the data set that `cfg` names; audit.html and audit.json in `output`. Exits with 1 if a finding fails."""
    settings = plain(cfg)
    # Imported late: --help and a misspelt key need no torch.
    from covid_cls.audits.collection import open_collection
    from covid_cls.audits.findings import gravest_first, verdict_line
    from covid_cls.data.datamodule import Radiographs
    from covid_cls.records import whole_file, write_json
    from covid_cls.reporting.audit_page import audit_page, audit_record

    check_section("data", Radiographs, settings["data"])
    probing = {name: settings[name] for name in ("probes", "probe_folds", "seed")}
    check_section("audit", check_options, probing)
    check_options(**probing)
    data = open_collection(TASKS[settings["task"]["name"]], settings["data"])
    done = audit_collection(data, **probing)
    output = Path(str(settings["output"] or Path(settings["output_root"]) / "audit" / data.name)).expanduser()
    command = shlex.join(["python", "-m", "covid_cls.audit", *HydraConfig.get().overrides.task])
    write_json(output / "audit.json", {"command": command, **audit_record(done)})
    with whole_file(output / "audit.html") as file:
        file.write(audit_page(done, command).encode())
    lines = [f"{finding.level}: {finding.title}. {finding.detail}" for finding in gravest_first(done.findings)]
    log.info("\n".join([*lines, verdict_line(done.findings), f"results in {output}"]))
    if any(finding.level == "fail" for finding in done.findings):
        sys.exit(1)


def check_options(probes: bool, probe_folds: int, seed: int) -> None:
    """InputError where an option is out of range."""
    if probe_folds < 2 or seed < 0:
        raise InputError(f"probe_folds={probe_folds} seed={seed}: must be at least 2 and 0")


def audit_collection(data: "Collection", *, probes: bool, probe_folds: int, seed: int) -> "Audit":
    """All findings on `data`; probes are left out, with a note, where folds cannot be drawn."""
    from covid_cls.audits.findings import attribute_findings, copies, data_findings, no_probes, probe_findings
    from covid_cls.audits.inventory import attributes
    from covid_cls.audits.probes import audit_probes, probe_notes, source_within_class
    from covid_cls.evaluation.intervals import score_intervals
    from covid_cls.reporting.audit_page import Audit

    pairs, table = copies(data), data.table
    found, known = data_findings(data, pairs), attributes(table, data.cache)
    found += attribute_findings(known)
    scores, notes, sources = {}, {}, {}
    if probes:
        log.info("shortcut probes")
        try:
            tables = audit_probes(table, data.task, data.cache, folds=probe_folds, seed=seed)
            scores = {name: score_intervals(predicted, data.task) for name, predicted in tables.items()}
            notes, sources = probe_notes(table, data.cache), source_within_class(table, data.cache)
        except InputError as error:
            found.append(no_probes(str(error)))
    return Audit(data, found + probe_findings(scores), pairs, known, scores, notes, sources)


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line; return the exit code."""
    return run_command(audit, "audit", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
