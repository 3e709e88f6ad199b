"""The page of a sweep: what its scores are evidence of, the grid, what stands beside it, and how to read it."""

import datetime
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

import covid_cls
from covid_cls.evaluation.resampling import patient_codes
from covid_cls.reporting import html, report_details, report_sections
from covid_cls.reporting.collect import Sweep
from covid_cls.reporting.measure import Twin
from covid_cls.reporting.published import references
from covid_cls.reporting.report_tables import common_runs, grid_table, published_table, score_label, tall_table
from covid_cls.reporting.runs import Omission, Run
from covid_cls.reporting.standing import ProtocolResult

_READING = (
    "A cell is one choice of every setting; its runs differ only in training seed and fold. Folds are pooled, so that "
    "each test image is scored once per seed, and a cell's score is the mean over its seeds. No seed is picked.",
    "mean ± sd is over single runs (seeds × folds) and says how far a repetition would scatter. The interval below it "
    "is of the pooled score and comes from resampling whole patients within each class: how far another sample of "
    "patients from the same sources would move it. Neither says how the network does in another hospital.",
    "Cells are compared only within a protocol, on identical test images, by paired resamples of the same patients. "
    "p (Holm) allows for the number of pairs. Cells of one group on the leaderboard cannot be told apart.",
    "A probe is a classifier that cannot see the disease. Where a probe scores nearly as much as a network, the score "
    "is no evidence that the network reads lungs, however high it is.",
    "Choosing a cell by the test scores of this page makes its score optimistic. Choose on validation, then read its "
    "row here.",
    "A published figure was measured on other images unless the row says otherwise, and mostly once.",
)


class About(NamedTuple):
    """What the page says of itself. command: as typed; started: when the report was made."""

    title: str
    command: str
    started: datetime.datetime


def report_page(
    sweep: Sweep,
    results: Sequence[ProtocolResult],
    twins: Sequence[Twin],
    omissions: Sequence[Omission],
    about: About,
) -> str:
    """index.html: one self-contained document."""
    options = results[0].options
    metric, level = score_label(options.metric), f"{options.level:.0%}"

    def each(part: Callable[[ProtocolResult], str]) -> str:
        if len(results) == 1:
            return part(results[0])
        return "".join(f"<h3>{escape(r.protocol.name)}</h3>{part(r)}" for r in results)

    interval = f"Intervals: {level}, {options.resamples} resamples of patients, seed {options.seed}."
    sections = [
        html.Section(
            "Grid", each(_grid), f"Mean ± sd over runs, and below it the interval of the pooled score. {interval}"
        ),
        html.Section(
            "Published", each(_published), "For reference only: other protocols, and other images unless said."
        ),
        html.Section("Probes", each(report_sections.probes), f"What is left of {metric} without the lungs. {interval}"),
        html.Section("Comparisons", each(report_sections.comparisons), "Paired on the same test images."),
        html.Section(
            "Main effects and cost",
            each(report_sections.effects),
            "Mean paired difference between two levels of one axis, over the cells that share every other axis. The "
            "interval covers the sampling of patients, not of seeds. Runs do not record energy.",
        ),
        html.Section(
            "Seeds and patients",
            each(report_sections.variance),
            f"What would move one run's {metric}: another training seed, other test patients, or both in ways of their "
            "own. With few seeds the first is a rough figure.",
        ),
        html.Section(
            "Confusion matrices", each(report_details.confusions), "Rows are the truth, columns the decision."
        ),
        html.Section(
            "Curves",
            each(report_details.curves),
            "One line per class and seed; the dashed line is chance, or perfect calibration.",
        ),
        html.Section("Sources", each(report_details.sources), "Where images come from, and scores within each source."),
        html.Section(
            "Leaky and honest splits",
            report_sections.twins(twins, options.metric),
            "The same images and settings, split by image or by patient.",
        ),
        html.Section(
            "Calibration",
            each(report_details.calibration),
            "The second line of an ECE is what a perfectly calibrated model shows on as many images. The temperature "
            "is fitted on validation alone and changes no decision.",
        ),
        html.Section("Missing and failed", _omitted(omissions)),
        html.Section("How to read this", html.bullets(_READING)),
    ]
    return html.page(about.title, _lead(sweep, results, about), sections)


def _lead(sweep: Sweep, results: Sequence[ProtocolResult], about: About) -> str:
    parts = []
    for result in results:
        verdict = result.verdict
        said = "".join(f"<br>{escape(line)}" for line in verdict.lines)
        parts.append(f'<div class="banner"><b>{escape(result.protocol.name)}</b>{said}</div>')
        if verdict.cells:
            parts.append(f"<details><summary>Verdict by cell</summary>{html.bullets(verdict.cells)}</details>")
    parts.append(html.table(["about this report", ""], _facts(sweep, results, about), 2))
    parts.append(html.bullets([w for r in results for w in r.warnings]))
    if sweep.notes:
        notes = [
            f"{note} ({count} run{'s' if count > 1 else ''})"
            for note, count in sorted(sweep.notes.items(), key=lambda n: -n[1])
        ]
        parts.append(html.bullets(notes))
    return "".join(parts)


def _facts(sweep: Sweep, results: Sequence[ProtocolResult], about: About) -> list[list[str]]:
    runs = [run for r in results for cell in r.protocol.cells for run in cell.runs]
    count = sweep.openings.times
    rows = [["made", f"{about.started:%Y-%m-%d %H:%M} by covid_cls {covid_cls.__version__}: {about.command}"]]
    for r in results:
        table = r.table
        classes = ", ".join(f"{(table['label'] == name).sum():,} {name}" for name in r.protocol.task.classes)
        patients = len(np.unique(patient_codes(table)))
        folds = r.protocol.folds
        part = (
            f"; only {len(folds)} of {r.protocol.of_folds} folds are here"
            if 1 <= len(folds) < r.protocol.of_folds
            else ""
        )
        rows.append([f"test images, {r.protocol.name}", f"{len(table):,} of {patients:,} patients: {classes}{part}"])
    times = "once" if count == 1 else f"{count} times"
    opened = f"The test predictions were opened {times}, first on {sweep.openings.first[:10]}"
    cells = sum(len(r.protocol.cells) for r in results)
    rows += [
        ["openings", f"{opened}; this report is opening {count}."],
        ["runs", f"{len(runs)}, cells: {cells}, ended {_span(runs)}"],
        ["devices", ", ".join(sorted({_device(run) for run in runs}))],
        ["versions", _versions(runs)],
    ]
    codes = {run.record.get("digests", {}).get("code") for run in runs}
    if len(codes) > 1:
        rows.append(["code", f"trained by {len(codes)} versions of the code"])
    return rows


def _grid(result: ProtocolResult) -> str:
    headers, rows, left = grid_table(result)
    grid = tall_table(headers, rows, left).replace(" ± ", "<br>± ")  # narrow enough for all scores on one screen
    runs = common_runs(result)
    said = html.paragraph(f"Each cell: {runs}.", "quiet") if runs else ""
    return said + grid + report_sections.chart(result)


def _published(result: ProtocolResult) -> str:
    headers, rows, left = published_table(result)
    if not rows:
        return html.paragraph("None for this task.", "quiet")
    found = references(result.protocol.task, result.protocol.data)
    protocols = dict.fromkeys(f"{reference.work}: {reference.protocol}" for reference, _ in found)
    return tall_table(headers, rows, left) + html.bullets(list(protocols))


def _omitted(omissions: Sequence[Omission]) -> str:
    if not omissions:
        return html.paragraph("None: every run below the folder is in the report, and no cell of the grid is missing.")
    return html.table(["what", "state", "reason"], [list(omission) for omission in omissions], 3)


def _span(runs: Sequence[Run]) -> str:
    days = sorted({str(run.record.get("ended", "unknown"))[:10] for run in runs})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _device(run: Run) -> str:
    device = run.record.get("device", {})
    return str(device.get("gpu") or f"CPU ({device.get('machine', 'unknown')}, threads: {device.get('threads', '?')})")


def _versions(runs: Sequence[Run]) -> str:
    found: dict[str, set[str]] = {}
    for run in runs:
        for package, version in run.record.get("versions", {}).items():
            found.setdefault(package, set()).add(version)
    return ", ".join(f"{package} {' and '.join(sorted(versions))}" for package, versions in found.items())
