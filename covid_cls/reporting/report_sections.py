"""The sections of a sweep's report that set its cells beside one another and beside what sees no lungs."""

import math
from collections.abc import Sequence

import numpy as np

from covid_cls.reporting import html
from covid_cls.reporting.beside import STRESS
from covid_cls.reporting.measure import Twin
from covid_cls.reporting.report_figures import Mark, interval_chart
from covid_cls.reporting.report_tables import difference, number, score_label, score_text, tall_table
from covid_cls.reporting.standing import CellResult, ProtocolResult

_P_SHOWN = 0.001


def chart(result: ProtocolResult) -> str:
    """All cells and probes on one axis, in the order of the leaderboard and then of the probes' scores."""
    metric = result.options.metric
    marks = [Mark(s.name, s.interval, "network") for s in result.standings]
    probes = [(probe.name, probe.intervals[metric]) for probe in result.probes]
    probes += [(r.cell.name, r.intervals[metric]) for r in result.cells.values() if r.cell.probe]
    probes = [probe for probe in probes if math.isfinite(probe[1].value)]
    marks += [Mark(name, interval, "probe") for name, interval in sorted(probes, key=lambda p: -p[1].value)]
    caption = (
        f"{result.protocol.name}: {score_label(metric)} with {result.options.level:.0%} intervals over patients. "
        "A probe sees a part of the image or its file, and most of them no lung."
    )
    return html.figure(interval_chart(marks, score_label(metric), _chance(result)), caption)


def probes(result: ProtocolResult) -> str:
    """Tabular probes, the network's own recipe on parts of the image, and what changed test images do to each cell."""
    metric, parts = result.options.metric, []
    rows = [
        [
            p.name,
            p.sees,
            "yes" if p.sees_lungs else "no",
            score_text(p.intervals[metric]),
            score_text(p.intervals["macro_auroc"]),
        ]
        for p in sorted(result.probes, key=lambda p: -np.nan_to_num(p.scores.value(metric), nan=-1))
    ]
    if rows:
        parts.append(_heading("Small classifiers, fitted on the training images of the same folds"))
        parts.append(tall_table(["probe", "sees", "lungs", score_label(metric), "macro AUROC"], rows, 3))
        parts.append(_beyond(result))
    rows = [_recipe_row(result, r) for r in result.cells.values() if r.cell.probe]
    if rows:
        parts.append(_heading("The network's own recipe, trained on a part of each image"))
        headers = ["network", "sees", score_label(metric), "probe - the same network on whole images"]
        parts.append(tall_table(headers, rows, 2))
    rows = [[s.cell, STRESS[s.stress], f"{s.changed:.1%}", difference(s.change)] for s in result.stress]
    if rows:
        parts.append(_heading("The trained network on changed test images"))
        headers = ["cell", "change", "decisions that change", f"change of {score_label(metric)}"]
        parts.append(html.table(headers, rows, 2))
    return "".join(parts) or html.paragraph(
        "No probes beside these runs: nothing here tells a score of the lungs from one of the frame, the file or the "
        "source. Train with probes=true and add cells with preprocess.seen=border.",
        "bad",
    )


def comparisons(result: ProtocolResult) -> str:
    """The leaderboard in groups that cannot be told apart, then every pair of cells."""
    metric = score_label(result.options.metric)
    rows = [[str(s.group), s.name, score_text(s.interval)] for s in result.standings]
    parts = [tall_table(["group", "cell", metric], rows, 2)]
    if not result.comparisons:
        return "".join([*parts, html.paragraph("One cell: nothing to compare.", "quiet")])
    differ = sum(c.p_holm < 0.05 for c in result.comparisons)
    parts.append(
        html.paragraph(
            f"{differ} of {len(result.comparisons)} pairs differ at Holm-corrected p < 0.05. Cells of one group cannot "
            "be told from the group's first; their order within it means nothing."
        )
    )
    rows = [
        [
            *(c.first, c.second, difference(c.difference), _p(c.p), _p(c.p_holm), _p(c.delong_p)),
            f"{c.mcnemar_b} / {c.mcnemar_c}",
            _p(c.mcnemar_p),
        ]
        for c in sorted(result.comparisons, key=lambda c: (c.p_holm, -abs(c.difference.value)))
    ]
    headers = ["first", "second", f"first - second, {metric}", "p", "p (Holm)", "covid AUROC: p (DeLong)"]
    headers += ["patients that the first / the second decides better", "p (McNemar)"]
    table = html.table(headers, rows, 2)
    return (
        "".join(parts) + f"<details{' open' if len(rows) <= 10 else ''}><summary>All pairs</summary>{table}</details>"
    )


def effects(result: ProtocolResult) -> str:
    """What each axis does, and what its levels cost."""
    parts = []
    if result.effects:
        rows = [
            [
                e.axis,
                f"{e.first} - {e.second}",
                str(len(e.pairs)),
                difference(e.difference),
                _confounders(result, e.pairs),
            ]
            for e in result.effects
        ]
        headers = [
            "axis",
            "levels",
            "matched cells",
            f"difference of {score_label(result.options.metric)}",
            "differs too",
        ]
        parts.append(html.table(headers, rows, 2))
    else:
        parts.append(html.paragraph("No two cells differ in one axis alone.", "quiet"))
    rows = [
        [
            r.cell.name,
            f"{_trainable(r):,}",
            number(float(np.mean([run.record.get("seconds", math.nan) for run in r.cell.runs])), 0),
            _devices(r),
        ]
        for r in result.cells.values()
    ]
    parts.append(_heading("Cost"))
    parts.append(html.table(["cell", "trainable parameters", "seconds a run", "on"], rows))
    return "".join(parts)


def variance(result: ProtocolResult) -> str:
    """How far another training seed and other test patients would move a run's score."""
    rows = []
    for r in result.grid:
        split = r.variance
        sds = [number(math.sqrt(v)) if math.isfinite(v) else "–" for v in (split.seed, split.test, split.both)]
        share = (
            "single seed" if len(r.cell.seeds) == 1 else (f"{split.seed_share:.0%}" if split.seed_share >= 0 else "–")
        )
        rows.append([r.cell.name, str(len(r.cell.seeds)), *sds, share])
    headers = [
        "cell",
        "seeds",
        "sd: training seed",
        "sd: test patients",
        "sd: both together",
        "seed's share of variance",
    ]
    return html.table(headers, rows)


def twins(rows: Sequence[Twin], metric: str) -> str:
    """What a split by image, with patients on both sides, adds to a score."""
    if not rows:
        text = "No protocol was trained with data.group=image and with data.group=patient: what a leak adds is unknown."
        return html.paragraph(text, "quiet")
    cells = [[twin.protocol, twin.cell, twin.why or difference(twin.difference)] for twin in rows]
    return html.table(["honest protocol", "cell", f"leaky - honest, {score_label(metric)}"], cells, 2)


def _heading(text: str) -> str:
    return f'<h4 class="quiet">{text}</h4>'


def _p(p: float) -> str:
    return "–" if not math.isfinite(p) else f"< {_P_SHOWN}" if p < _P_SHOWN else f"{p:.3f}"


def _chance(result: ProtocolResult) -> float | None:
    metric = result.options.metric
    if metric == "balanced_accuracy":
        return 1 / len(result.protocol.task.classes)
    return 0.5 if metric.endswith("auroc") else None


def _beyond(result: ProtocolResult) -> str:
    """Each cell against the lungless probe that scores best: chosen on the test images, in the probe's favour."""
    metric = result.options.metric
    blind = [p for p in result.probes if not p.sees_lungs and math.isfinite(p.scores.value(metric))]
    if not blind:
        return ""
    best = max(blind, key=lambda probe: probe.scores.value(metric))
    rows = [[r.cell.name, difference(result.difference(r.scores, best.scores))] for r in result.grid]
    return html.table(["cell", f"{score_label(metric)} beyond the probe {best.name}"], rows)


def _recipe_row(result: ProtocolResult, r: CellResult) -> list[str]:
    metric = result.options.metric
    whole = result.sibling(r.cell)
    name = r.cell.name.removesuffix(f", {r.cell.axes['seen']} seen")
    beside = difference(result.difference(r.scores, whole.scores)) if whole else "no such cell on whole images"
    return [name, r.cell.axes["seen"].replace("_", " "), score_text(r.intervals[metric]), beside]


def _confounders(result: ProtocolResult, pairs: Sequence[tuple[str, str]]) -> str:
    """Settings besides the axes that differ within a matched pair."""
    found = set()
    for first, second in pairs:
        a, b = (dict(result.cells[name].cell.settings) for name in (first, second))
        found |= {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
    found -= {key for key in found if key.startswith(("loss.", "backbone.", "augment."))}
    return ", ".join(sorted(found)) or "nothing"


def _trainable(r: CellResult) -> int:
    return sum(int(stage["trainable"]) for stage in r.cell.runs[0].record.get("freeze", []))


def _devices(r: CellResult) -> str:
    records = [run.record.get("device", {}) for run in r.cell.runs]
    return ", ".join(sorted({str(d.get("gpu") or f"CPU, threads: {d.get('threads', '?')}") for d in records}))
