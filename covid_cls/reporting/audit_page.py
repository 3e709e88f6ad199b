"""The result of a data-set audit, as a page for readers and as plain values for audit.json."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from covid_cls.data.manifest import SPLITS
from covid_cls.data.store import read_rows
from covid_cls.evaluation.intervals import Interval
from covid_cls.evaluation.predictions import without_nan
from covid_cls.reporting.html import Table, data_uri, number, render, svg_figure, with_interval
from covid_cls.reporting.style import INK
from covid_cls.shortcuts.baselines import BASELINES, SourceScore
from covid_cls.shortcuts.data_audit import (
    BASELINE_AUROC_LIMIT,
    Audit,
    AuditedData,
    count_images,
    most_severe_first,
    sort_pairs,
    verdict_line,
)
from covid_cls.shortcuts.duplicates import central_squares, content_side

_MAX_EXAMPLES = 5  # of a finding on the page; audit.json lists all
_MAX_PAIRS = 12
_THUMBNAIL = 112  # pixels
_FAILED, _PASSED = "#B3261E", "#0060A0"
_BETWEEN = {"label": "two classes", "split": "two splits", "patient_id": "two patients", "": "one patient"}
_KIND = {"bytes": "same bytes", "pixels": "same pixels", "near": "changed copy", "mirrored": "mirrored copy"}


def audit_record(audit: Audit) -> dict[str, Any]:
    """Return the audit as plain values: the verdict, all findings with all examples, and the numbers behind them."""
    data = audit.data
    paths = data.table["path"]
    pairs = sort_pairs(data.table, audit.pairs)
    record = {
        "verdict": verdict_line(audit.findings),
        "findings": [asdict(finding) for finding in most_severe_first(audit.findings)],
        "data": {
            "name": data.name,
            "task": data.task.name,
            "images": len(data.table),
            "patients": int(data.table["patient_id"].nunique()),
            "splits": data.splits,
            "notes": data.notes,
            "counts": count_images(data.table).to_dict("records"),
            "unreadable": data.unreadable.to_dict("records"),
            "store": data.key,
        },
        "attributes": [attribute._asdict() for attribute in audit.attributes],
        "copies": pairs.assign(first=pairs["first"].map(paths), second=pairs["second"].map(paths)).to_dict("records"),
        "baselines": {
            name: {
                "sees": BASELINES[name].sees,
                "sees_lungs": BASELINES[name].sees_lungs,
                "note": note,
                "scores": {key: score._asdict() for key, score in audit.scores.get(name, {}).items()},
            }
            for name, note in audit.baseline_notes.items()
        },
        "source_within_class": {
            label: [{**score._asdict(), "auroc": score.auroc._asdict()} for score in scores]
            for label, scores in audit.sources.items()
        },
    }
    # JSON has no nan.
    plain: dict[str, Any] = without_nan(record)
    return plain


def audit_page(audit: Audit, command: str) -> str:
    """Return the audit as an HTML page; `command` is shown as the way in which the page was made."""
    data = audit.data
    pairs = sort_pairs(data.table, audit.pairs)
    return render(
        "audit.html.j2",
        data=data,
        verdict=verdict_line(audit.findings),
        failed=any(finding.level == "fail" for finding in audit.findings),
        size=f"{len(data.table):,} images of {data.table['patient_id'].nunique():,} patients",
        findings=most_severe_first(audit.findings),
        max_examples=_MAX_EXAMPLES,
        counts=_count_tables(data),
        attributes=_attribute_table(audit),
        limit=f"{BASELINE_AUROC_LIMIT:.2f}",
        baselines=_baseline_table(audit),
        baseline_chart=_baseline_chart(audit.scores) if audit.scores else None,
        sources=_source_table(audit.sources),
        copies=_copy_table(pairs),
        pictures=_pair_pictures(data, pairs.head(_MAX_PAIRS)),
        n_more_pairs=max(0, len(pairs) - _MAX_PAIRS),
        command=command,
    )


def _count_tables(data: AuditedData) -> list[Table]:
    rows = [
        [str(row["source"]), str(row["label"]), f"{row['images']:,}", f"{row['patients']:,}"]
        for row in count_images(data.table).to_dict("records")
    ]
    tables = [Table(["source", "class", "images", "patients"], rows, left=2)]
    if data.table["split"].nunique() > 1:
        splits = pd.crosstab(data.table["split"], data.table["label"])
        # Folds are no splits: they come last, by name.
        order = sorted(splits.index, key=lambda name: ((*SPLITS, name).index(name), name))
        splits = splits.reindex(index=order, columns=list(data.task.classes), fill_value=0)
        rows = [[str(name), *map(str, row)] for name, row in zip(order, splits.to_numpy(), strict=True)]
        tables.append(Table(["split", *(f"{label} images" for label in splits.columns)], rows))
    return tables


def _attribute_table(audit: Audit) -> Table:
    classes = audit.data.task.classes
    rows = [[a.name, number(a.v, 2), *(a.commonest.get(name, "") for name in classes)] for a in audit.attributes]
    return Table(["property", "Cramér's V", *classes], rows)


def _baseline_table(audit: Audit) -> Table:
    rows = []
    for name, note in audit.baseline_notes.items():
        scores = audit.scores.get(name, {})
        lungs = "lungs" if BASELINES[name].sees_lungs else "no lungs"
        numbers = [with_interval(scores.get(key), 2) for key in ("macro_auroc", "balanced_accuracy")]
        rows.append([name, f"{BASELINES[name].sees} ({lungs})" if scores else note, *numbers])
    return Table(["baseline", "sees", "macro AUROC", "balanced accuracy"], rows, left=2)


def _baseline_chart(scores: Mapping[str, Mapping[str, Interval]]) -> str:
    names = list(scores)
    figure = Figure(figsize=(8, 0.7 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        auroc = scores[name]["macro_auroc"]
        failed = not BASELINES[name].sees_lungs and auroc.low > BASELINE_AUROC_LIMIT
        colour = _FAILED if failed else _PASSED
        axes.plot([auroc.low, auroc.high], [row, row], color=colour, linewidth=2)
        axes.plot([auroc.value], [row], "o", color=colour, markersize=6)
    axes.axvline(0.5, color=INK, linewidth=0.8)
    axes.axvline(BASELINE_AUROC_LIMIT, color=INK, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(names)), [n if BASELINES[n].sees_lungs else f"{n} (no lungs)" for n in names])
    axes.invert_yaxis()
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.tick_params(colors=INK)
    # Few baselines are below chance, so most charts have the same axis.
    lowest = np.nanmin([0.3, *(score["macro_auroc"].low for score in scores.values())])
    axes.set_xlim(lowest - 0.02, 1.02)
    axes.set_xlabel("macro AUROC", color=INK)
    caption = (
        "Macro AUROC of each baseline with its 95 % interval over patients. Solid line: chance. Dashed line: a "
        "baseline without lungs fails if its interval is above this line."
    )
    return svg_figure(figure, caption)


def _source_table(sources: Mapping[str, Sequence[SourceScore]]) -> Table:
    rows = [
        [label, score.source, f"{score.images:,}", f"{score.patients:,}", with_interval(score.auroc, 2)]
        for label, scores in sources.items()
        for score in scores
    ]
    return Table(["class", "source", "images", "patients", "AUROC"], rows, left=2)


def _copy_table(pairs: pd.DataFrame) -> Table:
    counts = pd.crosstab(pairs["between"], pairs["kind"])
    order = [key for key in _BETWEEN if key in counts.index]
    rows = [[_BETWEEN[key], *map(str, counts.loc[key])] for key in order]
    return Table(["pairs in", *(_KIND[kind] for kind in counts.columns)], rows)


def _pair_pictures(data: AuditedData, pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the two thumbnails of each pair, as (URI, path), and a caption."""
    # Stored images are centred on a larger canvas, whose margin would waste most of a thumbnail.
    side = content_side(data.images, data.table.index.to_numpy())
    pictures = []
    for pair in pairs.to_dict("records"):
        rows = [pair["first"], pair["second"]]
        images = central_squares(read_rows(data.images, np.array(rows)), side)
        ends = data.table.loc[rows, ["path", "label", "split"]].to_numpy().tolist()
        names = [f"{path.rpartition('/')[2]} ({', '.join(filter(None, rest))})" for path, *rest in ends]
        # Equal bytes and pixels have a likeness of 1.
        likeness = "" if pair["kind"] in ("bytes", "pixels") else f" {pair['likeness']:.2f}"
        pictures.append(
            {
                "images": [(_thumbnail(image), path) for image, (path, *_) in zip(images, ends, strict=True)],
                "caption": f"{_KIND[pair['kind']]}{likeness}, {_BETWEEN[pair['between']]}: {' and '.join(names)}",
            }
        )
    return pictures


def _thumbnail(image: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    small = Image.fromarray(image).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    # 64 greys halve the size of the file and are enough to recognise an image.
    small.quantize(64).save(file, "PNG", optimize=True)
    return data_uri(file.getvalue(), "png")
