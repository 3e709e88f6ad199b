"""What is wrong with a data set, how bad it is and what to do: for a page, an exit code, and a gate before training."""

import logging
from collections.abc import Mapping, Sequence

import pandas as pd

from covid_cls.audits.checks import (
    NO_EVIDENCE,
    NOTABLE,
    Finding,
    copy_findings,
    file_findings,
    patient_findings,
    series_findings,
    source_findings,
)
from covid_cls.audits.collection import Collection, of_radiographs
from covid_cls.audits.duplicates import find_pairs, searches_near
from covid_cls.audits.inventory import Attribute
from covid_cls.audits.probes import PROBES
from covid_cls.data.datamodule import Radiographs
from covid_cls.errors import InputError, listed
from covid_cls.evaluation.intervals import Interval

log = logging.getLogger(__name__)

LEVELS = ("fail", "warn", "note")
MODES = ("off", "warn", "fail")
SHORTCUT = 0.60  # macro AUROC of a probe that sees no lungs; above it with its whole interval it fails


_TOO_SMALL = Finding(
    "note",
    "changed copies were not searched for",
    "Images are stored too small to tell them from other patients; equal files and pixels were.",
    remedy="Run the audit with data.size=256",
)


def copies(data: Collection) -> pd.DataFrame:
    """Pairs of copies among the images, as `find_pairs` gives them."""
    return find_pairs(data.images, data.table["sha256"], data.cache, data.key)


def data_findings(data: Collection, pairs: pd.DataFrame) -> list[Finding]:
    """What patients, copies, sources and files give away; no shortcut probes. pairs: from `copies`."""
    return [
        *source_findings(data.table),
        *patient_findings(data.table),
        *series_findings(data.table),
        *copy_findings(data.table, pairs),
        *([] if searches_near(data.images, data.table.index.to_numpy()) else [_TOO_SMALL]),
        *file_findings(data.unreadable, len(data.table)),
    ]


def attribute_findings(attributes: Sequence[Attribute]) -> list[Finding]:
    """The attributes other than the source that go with the label."""
    strong = [one for one in attributes if one.name != "source" and one.v >= NOTABLE]
    if not strong:
        return []
    detail = f"Cramér's V: {', '.join(f'{one.name} {one.v:.2f}' for one in strong)}."
    cases = [f"{one.name}: " + "; ".join(f"{label} {most}" for label, most in one.commonest.items()) for one in strong]
    remedy = "Compare images that were made alike; read scores beside those of the shortcut probes"
    return [Finding("warn", "how images were made goes with the label", detail, cases, remedy)]


def probe_findings(scores: Mapping[str, Mapping[str, Interval]]) -> list[Finding]:
    """The probes that see no lungs and whose macro AUROC surely exceeds 0.60. scores: flat names per probe."""
    fired = {
        name: auroc
        for name, auroc in ((name, score["macro_auroc"]) for name, score in scores.items())
        if not PROBES[name].sees_lungs and auroc.low > SHORTCUT
    }
    remedy = "A network can read this, too: take it out of the images, or test on a source that was not trained on"
    return [
        Finding(
            "fail",
            f"the {name} probe tells the classes apart",
            f"Macro AUROC {auroc.value:.2f} ({auroc.low:.2f} to {auroc.high:.2f}), seeing {PROBES[name].sees}.",
            remedy=remedy,
            consequence=NO_EVIDENCE,
        )
        for name, auroc in fired.items()
    ]


def no_probes(reason: str) -> Finding:
    """That shortcut probes could not be computed, which leaves shortcuts unseen."""
    remedy = "Add patients; judge shortcuts from the table of what goes with the label until then"
    return Finding("note", "shortcut probes could not be computed", f"{reason}.", remedy=remedy)


def gravest_first(findings: Sequence[Finding]) -> list[Finding]:
    """The same findings: fail, warn, note, otherwise in their order."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def verdict_line(findings: Sequence[Finding]) -> str:
    """The whole audit in one line."""
    fails = [finding for finding in findings if finding.level == "fail"]
    warns = sum(finding.level == "warn" for finding in findings)
    if not fails:
        return f"No finding fails; {warns} {'warning' if warns == 1 else 'warnings'}"
    gravest = max(fails, key=lambda finding: finding.consequence == NO_EVIDENCE)  # the first, if none or several are
    number = "1 finding that fails" if len(fails) == 1 else f"{len(fails)} findings that fail"
    return f"{number}: scores on this set are {gravest.consequence} ({gravest.title})"


def gate(data: Radiographs, mode: str | bool) -> list[str]:
    """Notes for run.json on what makes scores of a run on `data` mislead; [] if nothing does, or mode is "off".

    mode: "off" (or False, YAML's reading of it), "warn" or "fail", which raises an InputError instead. No probes are
    computed; copies are searched for once per content of the store and split.
    """
    mode = "off" if mode is False else mode
    if mode not in MODES:
        raise InputError(f"audit={mode}: must be {listed(MODES)}")
    if mode == "off":
        return []
    seen = of_radiographs(data)
    fails = [finding for finding in data_findings(seen, copies(seen)) if finding.level == "fail"]
    lines = [f"audit: {finding.title}. {finding.detail}" for finding in fails]
    if fails and mode == "fail":
        remedies = listed([finding.remedy for finding in fails])
        raise InputError(
            f"{' '.join(lines)} {remedies}; or set audit=warn to train on it, which every report then says"
        )
    for line in lines:
        log.warning(line)
    return lines
