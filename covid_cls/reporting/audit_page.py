"""The audit of a data set as one page, and as plain values for audit.json."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from covid_cls.audits.checks import Finding, pair_order
from covid_cls.audits.collection import Collection
from covid_cls.audits.duplicates import filled_side, squares
from covid_cls.audits.findings import SHORTCUT, gravest_first, verdict_line
from covid_cls.audits.inventory import Attribute, counts
from covid_cls.audits.probes import PROBES, SourceScore
from covid_cls.data.manifest import SPLITS
from covid_cls.data.store import read_rows
from covid_cls.evaluation.intervals import Interval
from covid_cls.evaluation.predictions import without_nan
from covid_cls.reporting.figures import INK
from covid_cls.reporting.html import Section, bullets, figure, page, paragraph, table

_SHOWN = 5  # examples of a finding on the page; audit.json has all
_MOST_PAIRS = 12
_THUMBNAIL = 112
_WORDS = {"fail": "fails", "warn": "warning", "note": "note"}
_BETWEEN = {"label": "two classes", "split": "two splits", "patient_id": "two patients", "": "one patient"}
_COPY = {
    "bytes": "same bytes",
    "pixels": "same pixels",
    "near": "changed copy",
    "mirrored": "mirrored copy",
}


class Audit(NamedTuple):
    """All that an audit found. scores: per probe its flat names; probe_notes: what each saw, or why it is left out."""

    data: Collection
    findings: list[Finding]
    pairs: pd.DataFrame
    attributes: list[Attribute]
    scores: Mapping[str, Mapping[str, Interval]]
    probe_notes: Mapping[str, str]
    sources: Mapping[str, Sequence[SourceScore]]


def audit_record(audit: Audit) -> dict[str, Any]:
    """The audit in plain values: verdict, findings with all their examples, and the figures behind them."""
    data = audit.data
    paths = data.table["path"]
    pairs = pair_order(data.table, audit.pairs)
    record = {
        "verdict": verdict_line(audit.findings),
        "findings": [asdict(finding) for finding in gravest_first(audit.findings)],
        "data": {
            "name": data.name,
            "task": data.task.name,
            "images": len(data.table),
            "patients": int(data.table["patient_id"].nunique()),
            "splits": data.splits,
            "notes": data.notes,
            "counts": counts(data.table).to_dict("records"),
            "unreadable": data.unreadable.to_dict("records"),
            "store": data.key,
        },
        "attributes": [attribute._asdict() for attribute in audit.attributes],
        "copies": [
            {**pair, "first": paths[pair["first"]], "second": paths[pair["second"]]}
            for pair in pairs.to_dict("records")
        ],
        "probes": {
            name: {
                "sees": PROBES[name].sees,
                "sees_lungs": PROBES[name].sees_lungs,
                "note": note,
                "scores": {key: score._asdict() for key, score in audit.scores.get(name, {}).items()},
            }
            for name, note in audit.probe_notes.items()
        },
        "source_within_class": {
            label: [{**score._asdict(), "auroc": score.auroc._asdict()} for score in scores]
            for label, scores in audit.sources.items()
        },
    }
    plain: dict[str, Any] = without_nan(record)
    return plain


def audit_page(audit: Audit, command: str) -> str:
    """The audit as a self-contained HTML page."""
    failed = any(finding.level == "fail" for finding in audit.findings)
    data = audit.data
    style = "bad" if failed else "good"
    verdict = f'<p class="banner"><span class="{style}">{escape(verdict_line(audit.findings))}</span></p>'
    facts = (
        f"{len(data.table):,} images of {data.table['patient_id'].nunique():,} patients, task {data.task.name}; "
        f"splits {data.splits}."
    )
    lead = verdict + paragraph(facts) + "".join(paragraph(note, "note") for note in data.notes)
    sections = [
        Section("Findings", _findings(audit.findings), "All cases of each finding are in audit.json."),
        Section("Images", _counts(data), "What the data set is made of, for the data item of CLAIM and TRIPOD+AI."),
        Section("What goes with the label", _attributes(audit), _ATTRIBUTES_NOTE),
        Section("Shortcut probes", _probes(audit), _PROBES_NOTE),
        Section("Copies", _copies(data, audit.pairs), _COPIES_NOTE),
        Section("How this was made", paragraph(command, "quiet")),
    ]
    return page(f"Audit of {data.name}", lead, sections)


_ATTRIBUTES_NOTE = (
    "Cramér's V: 0 if a property says nothing of the label, 1 if it gives the label away. "
    "Beside it the commonest value of each class."
)
_PROBES_NOTE = (
    "Small classifiers that see only what is named, each patient predicted from the folds that it is not in. A probe "
    f"without lungs whose whole interval lies above {SHORTCUT:.2f} reads the class from something else than disease."
)
_COPIES_NOTE = (
    "Pairs that are one image by bytes, by pixels, or after resizing, recompression, another window, labels, a crop or "
    "a mirror. Judge by eye: two exposures of one patient can be as alike."
)


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return paragraph("Nothing was found.", "good")
    return "".join(_finding(finding) for finding in gravest_first(findings))


def _finding(finding: Finding) -> str:
    style = ' class="bad"' if finding.level == "fail" else ""
    title = finding.title[0].upper() + finding.title[1:]
    parts = [f"<h3><span{style}>{_WORDS[finding.level]}:</span> {escape(title)}</h3>", paragraph(finding.detail)]
    if finding.remedy:
        parts.append(paragraph(f"{finding.remedy}.", "quiet"))
    if finding.examples:
        left = len(finding.examples) - _SHOWN
        shown = [*finding.examples[:_SHOWN], *([f"and {left} more"] if left > 0 else [])]
        parts.append(f"<details><summary>{_cases(len(finding.examples))}</summary>{bullets(shown)}</details>")
    return "".join(parts)


def _cases(number: int) -> str:
    return "1 case" if number == 1 else f"{number} cases"


def _counts(data: Collection) -> str:
    found = counts(data.table)
    rows = [
        [str(row["source"]), str(row["label"]), f"{row['images']:,}", f"{row['patients']:,}"]
        for row in found.to_dict("records")
    ]
    body = table(["source", "class", "images", "patients"], rows, left=2)
    if data.table["split"].nunique() > 1:
        splits = pd.crosstab(data.table["split"], data.table["label"]).reindex(columns=list(data.task.classes))
        splits = splits.sort_index(key=lambda names: names.map({name: str(k) for k, name in enumerate(SPLITS)}.get))
        lines = [[str(name), *map(str, row)] for name, row in zip(splits.index, splits.to_numpy(int), strict=True)]
        body += table(["split", *(f"{label} images" for label in splits.columns)], lines)
    return body


def _attributes(audit: Audit) -> str:
    classes = audit.data.task.classes
    rows = [
        [
            one.name,
            "–" if math.isnan(one.v) else f"{one.v:.2f}",
            *(one.commonest.get(name, "") for name in classes),
        ]
        for one in audit.attributes
    ]
    return table(["property", "Cramér's V", *classes], rows, left=1)


def _probes(audit: Audit) -> str:
    rows = []
    for name, note in audit.probe_notes.items():
        scores = audit.scores.get(name)
        lungs = "lungs" if PROBES[name].sees_lungs else "no lungs"
        figures = [_words(scores[key]) for key in ("macro_auroc", "balanced_accuracy")] if scores else ["–", "–"]
        rows.append([name, f"{PROBES[name].sees} ({lungs})" if scores else note, *figures])
    body = table(["probe", "sees", "macro AUROC", "balanced accuracy"], rows, left=2) if rows else ""
    if audit.scores:
        body = figure(_probe_figure(audit.scores), _PROBE_CAPTION) + body
    else:
        body += paragraph("No probe could be computed: see the findings.")
    lines = [
        [label, score.source, f"{score.images:,}", f"{score.patients:,}", _words(score.auroc)]
        for label, scores in audit.sources.items()
        for score in scores
    ]
    if lines:
        body += "<h3>Is the source read from the image, the class being the same?</h3>"
        body += table(["class", "source", "images", "patients", "AUROC"], lines, left=2)
    return body


_PROBE_CAPTION = "Macro AUROC of each probe with its 95 % interval by patient; the dashed line is where a probe fails."


def _probe_figure(scores: Mapping[str, Mapping[str, Interval]]) -> Figure:
    names = list(scores)[::-1]
    drawn = Figure(figsize=(8, 0.7 + 0.34 * len(names)), layout="constrained")
    axes = drawn.subplots()
    for k, name in enumerate(names):
        auroc = scores[name]["macro_auroc"]
        fires = not PROBES[name].sees_lungs and auroc.low > SHORTCUT
        colour = "#B3261E" if fires else "#0060A0"
        axes.plot([auroc.low, auroc.high], [k, k], color=colour, linewidth=2)
        axes.plot([auroc.value], [k], "o", color=colour, markersize=6)
    axes.axvline(0.5, color=INK, linewidth=0.8)
    axes.axvline(SHORTCUT, color=INK, linewidth=0.8, linestyle="--")
    axes.set_yticks(
        range(len(names)), [name if PROBES[name].sees_lungs else f"{name} (no lungs)" for name in names], color=INK
    )
    axes.set_xlim(0.3, 1.02)
    axes.set_xlabel("macro AUROC", color=INK)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
    return drawn


def _words(score: Interval) -> str:
    if math.isnan(score.value):
        return "–"
    return f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})"


def _copies(data: Collection, pairs: pd.DataFrame) -> str:
    if pairs.empty:
        return paragraph("None were found.")
    ordered = pair_order(data.table, pairs)
    tally = pd.crosstab(ordered["between"], ordered["kind"]).reindex(
        index=[key for key in _BETWEEN if (ordered["between"] == key).any()]
    )
    rows = [[_BETWEEN[key], *map(str, row)] for key, row in zip(tally.index, tally.to_numpy(), strict=True)]
    body = table(["pairs in", *(_COPY[kind] for kind in tally.columns)], rows)
    side = filled_side(data.images, data.table.index.to_numpy())
    shown = ordered.head(_MOST_PAIRS).to_dict("records")
    body += f'<div class="panels">{"".join(_pair(data, pair, side) for pair in shown)}</div>'
    left = len(ordered) - len(shown)
    return body + (paragraph(f"And {left:,} more in audit.json.", "quiet") if left > 0 else "")


def _pair(data: Collection, pair: Mapping[Any, Any], side: int) -> str:
    ends = [data.table.loc[pair[name]] for name in ("first", "second")]
    images = squares(read_rows(data.images, np.array([pair["first"], pair["second"]])), side)
    pictures = "".join(
        f'<img src="{_png(image)}" alt="{escape(str(end["path"]))}" width="{_THUMBNAIL}" height="{_THUMBNAIL}"> '
        for image, end in zip(images, ends, strict=True)
    )
    words = [
        f"{end['path'].rpartition('/')[2]} ({', '.join(filter(None, (end['label'], end['split'])))})" for end in ends
    ]
    likeness = "" if pair["kind"] in ("bytes", "pixels") else f" {pair['likeness']:.2f}"
    caption = f"{_COPY[pair['kind']]}{likeness}, {_BETWEEN[pair['between']]}: {' and '.join(words)}"
    return f'<figure>{pictures}<figcaption style="overflow-wrap: anywhere">{escape(caption)}</figcaption></figure>'


def _png(image: NDArray[np.uint8]) -> str:
    content = io.BytesIO()
    small = Image.fromarray(image).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    small.quantize(64).save(content, "PNG", optimize=True)  # 64 greys: half the size, and all that a glance needs
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
