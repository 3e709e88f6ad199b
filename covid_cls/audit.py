"""python -m covid_cls.audit: what in a data set predicts the label without being disease, before any training."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covid_cls.io import atomic_file, read_json, write_json
from covid_cls.runtime.cli import Job, call_command, run_command
from covid_cls.runtime.schema import check_section
from covid_cls.tasks import TASKS

if TYPE_CHECKING:
    from covid_cls.shortcuts.data_audit import Finding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataAudit:
    """A written audit.

    Attributes:
        folder: Where audit.html and audit.json are.
        findings: The findings, most severe first; their `level` is fail, warn or note.
    """

    folder: Path
    findings: "list[Finding]"

    @property
    def failed(self) -> bool:
        """Return whether a finding has the level fail."""
        return any(finding.level == "fail" for finding in self.findings)

    @property
    def record(self) -> dict[str, Any]:
        """Return the content of audit.json."""
        return read_json(self.folder / "audit.json")


def audit(*overrides: str, **settings: Any) -> DataAudit:
    """Audit a data set, e.g. `audit("data=folder", "data.root=my_set")`.

    Args:
        *overrides: Words as on the command line.
        **settings: More settings by their names.

    Raises:
        InputError: The data set cannot be read, or an option is wrong.
    """
    return call_command(_audit, "audit", overrides, settings)


def _audit(job: Job) -> DataAudit:
    settings = job.settings
    # Imported late: --help and a misspelt key need no torch.
    from covid_cls.data.image_source import DataSettings
    from covid_cls.reporting.audit_page import audit_page, audit_record
    from covid_cls.shortcuts.data_audit import (
        AuditOptions,
        audit_data,
        load_audited_data,
        most_severe_first,
        verdict_line,
    )

    check_section("data", DataSettings, settings["data"])
    chosen = {name: settings[name] for name in AuditOptions._fields}
    check_section("audit", AuditOptions, chosen)
    options = AuditOptions(**chosen)
    options.check()
    data = load_audited_data(TASKS[settings["task"]["name"]], settings["data"])
    found = audit_data(data, options)
    output = Path(str(settings["output"] or Path(settings["output_root"]) / "audit" / data.name)).expanduser()
    write_json(output / "audit.json", {"command": job.command, **audit_record(found)})
    with atomic_file(output / "audit.html") as file:
        file.write(audit_page(found, job.command).encode())
    findings = most_severe_first(found.findings)
    lines = [f"{finding.level}: {finding.title}. {finding.detail}" for finding in findings]
    log.info("\n".join([*lines, verdict_line(found.findings), f"results in {output}"]))
    return DataAudit(output, list(findings))


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line and return the exit code."""
    return run_command(_audit, "audit", words, exit_code=lambda result: int(result.failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
