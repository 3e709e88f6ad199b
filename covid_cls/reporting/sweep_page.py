"""The HTML page of a sweep's report."""

import datetime
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup

import covid_cls
from covid_cls.evaluation.calibration import calibrated, calibration_error, logits
from covid_cls.evaluation.comparison import mean_score, score_seeds
from covid_cls.evaluation.intervals import patient_codes
from covid_cls.evaluation.metrics import confusion, decide
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.evaluation.thresholds import fit_operating
from covid_cls.evaluation.verdict import CONFOUNDED, source_association
from covid_cls.io import read_json, read_predictions
from covid_cls.reporting import html
from covid_cls.reporting.figures import (
    Mark,
    interval_chart,
    loss_panel,
    precision_recall_panel,
    reliability_panel,
    roc_panel,
)
from covid_cls.reporting.html import Table, number, score_label, svg_figure, with_interval
from covid_cls.reporting.sweep_analysis import (
    PERTURBATIONS,
    ConfigurationResult,
    ProtocolResult,
    SplitPair,
    resample_weights,
)
from covid_cls.reporting.sweep_loading import LoadedRun, LoadedSweep, Omission
from covid_cls.reporting.sweep_tables import (
    common_runs,
    grid_table,
    published_table,
    references,
    score_text,
)
from covid_cls.tasks import POSITIVE

_MIN_P = 0.001  # smaller ones are shown as "< 0.001"
# An evaluation uses 500. A report has one null distribution per configuration and seed, with and without temperature.
_NULL_DRAWS = 200
_SOURCE_SCORES = ("accuracy", "balanced_accuracy")


class About(NamedTuple):
    """Facts about a report.

    Attributes:
        title: Title of the page.
        command: The command as typed.
        started: When the report was made.
    """

    title: str
    command: str
    started: datetime.datetime


def report_page(
    sweep: LoadedSweep,
    results: Sequence[ProtocolResult],
    split_pairs: Sequence[SplitPair],
    omissions: Sequence[Omission],
    about: About,
) -> str:
    """Return index.html."""
    options = results[0].options
    notes = sorted(sweep.notes.items(), key=lambda note: -note[1])
    return html.render(
        "sweep.html.j2",
        title=about.title,
        facts=_fact_table(sweep, results, about),
        warnings=[warning for result in results for warning in result.warnings],
        notes=[f"{note} ({count} run{'s' if count > 1 else ''})" for note, count in notes],
        metric=score_label(options.metric),
        intervals=f"Intervals: {options.level:.0%}, {options.resamples} resamples of patients, seed {options.seed}.",
        protocols=[_protocol(result) for result in results],
        split_pairs=_split_pair_table(split_pairs, options.metric),
        omissions=Table(["what", "state", "reason"], omissions, 3),
    )


def ranking_table(result: ProtocolResult) -> Table:
    """Return the configurations from best to worst, with their groups."""
    rows = [[str(r.group), r.name, with_interval(r.interval)] for r in result.ranking]
    return Table(["group", "configuration", score_label(result.options.metric)], rows, 2)


def comparison_table(result: ProtocolResult) -> Table:
    """Return all pairs of configurations, the smallest p first."""
    headers = ["first", "second", f"first - second, {score_label(result.options.metric)}", "p", "p (Holm)"]
    headers += ["covid AUROC:\np (DeLong)", "patients decided better by\nthe first / the second", "p (McNemar)"]
    rows = [
        [
            *(c.first, c.second, with_interval(c.difference, sign="+"), _p(c.p), _p(c.p_holm), _p(c.delong_p)),
            *(f"{c.mcnemar_b} / {c.mcnemar_c}", _p(c.mcnemar_p)),
        ]
        for c in sorted(result.comparisons, key=lambda c: (c.p_holm, -abs(c.difference.value)))
    ]
    return Table(headers, rows, 2)


def effect_table(result: ProtocolResult) -> Table:
    """Return the main effect of each axis of the grid."""
    headers = ["axis", "levels", "matched pairs", f"difference of {score_label(result.options.metric)}", "differs too"]
    rows = [
        [
            *(e.axis, f"{e.first} - {e.second}", str(len(e.pairs)), with_interval(e.difference, sign="+")),
            _confounders(result, e.pairs),
        ]
        for e in result.effects
    ]
    return Table(headers, rows, 2)


def cost_table(result: ProtocolResult) -> Table:
    """Return the number of trained parameters and the training time of each configuration."""
    rows = []
    for r in result.configurations.values():
        runs = r.configuration.runs
        # All runs of a configuration train the same parameters.
        trainable = sum(int(stage["trainable"]) for stage in runs[0].record.get("freeze", []))
        seconds = float(np.mean([run.record.get("seconds", math.nan) for run in runs]))
        rows.append([r.name, f"{trainable:,}", number(seconds, 0), _listed(map(_device, runs))])
    return Table(["configuration", "trainable parameters", "seconds per run", "device"], rows)


def _protocol(result: ProtocolResult) -> dict[str, Any]:
    """Return what the template shows of a protocol."""
    grid, association = grid_table(result), source_association(result.table)
    published = references(result.protocol.task, result.protocol.data)
    return {
        "name": result.protocol.name,
        "verdict": result.verdict,
        "runs": common_runs(result),
        # On three lines, so that all scores are visible without scrolling.
        "grid": grid._replace(rows=[[field.replace(" ± ", "\n± ") for field in row] for row in grid.rows]),
        "chart": _chart(result),
        "published": published_table(result),
        # Several networks share a protocol, which is described once.
        "published_protocols": list(dict.fromkeys(f"{r.work}: {r.protocol}." for r, _ in published)),
        "baselines": _baseline_table(result),
        "margins": _margin_table(result),
        "trained_baselines": _trained_baseline_table(result),
        "perturbations": _perturbation_table(result),
        "ranking": ranking_table(result),
        "comparisons": comparison_table(result),
        "n_different": sum(c.p_holm < 0.05 for c in result.comparisons),
        "effects": effect_table(result),
        "cost": cost_table(result),
        "variance": _variance_table(result),
        "confusions": [_confusion(r, result) for r in result.configurations.values()],
        "curves": {r.name: _curves(r, result) for r in result.grid},
        "sources": _source_table(result),
        "association": number(association, 2),
        "confounded": association >= CONFOUNDED,
        "source_scores": _source_score_table(result),
        "calibration": _calibration_table(result),
    }


def _fact_table(sweep: LoadedSweep, results: Sequence[ProtocolResult], about: About) -> Table:
    configurations = [configuration for r in results for configuration in r.protocol.configurations]
    runs = [run for configuration in configurations for run in configuration.runs]
    rows = [["made", f"{about.started:%Y-%m-%d %H:%M} by covid_cls {covid_cls.__version__}: {about.command}"]]
    for r in results:
        labels, folds = r.table["label"], r.protocol.folds
        classes = ", ".join(f"{(labels == name).sum():,} {name}" for name in r.protocol.task.classes)
        images = f"{len(labels):,} of {len(np.unique(patient_codes(r.table))):,} patients: {classes}"
        if len(folds) < r.protocol.of_folds:
            images += f"; only {len(folds)} of {r.protocol.of_folds} folds are complete"
        rows.append([f"test images, {r.protocol.name}", images])
    days = sorted({str(run.record.get("ended", "unknown"))[:10] for run in runs})
    versions = pd.DataFrame([run.record.get("versions", {}) for run in runs])
    accesses = sweep.test_accesses
    rows += [
        ["test-set accesses", f"{accesses.times}, including this report; the first was on {accesses.first[:10]}"],
        ["runs", f"{len(runs)}, configurations: {len(configurations)}, ended {_span(days[0], days[-1])}"],
        ["devices", _listed(map(_device, runs))],
        ["versions", ", ".join(f"{name} {' and '.join(sorted(set(versions[name].dropna())))}" for name in versions)],
    ]
    # Runs of version 0.1 have a digest of the source code instead of a version of the training.
    digests = [run.record.get("digests", {}) for run in runs]
    codes = {digest.get("training", digest.get("code")) for digest in digests}
    if len(codes) > 1:
        rows.append(["code", f"trained by {len(codes)} versions of the training code"])
    return Table(["about this report", ""], rows, 2)


def _chart(result: ProtocolResult) -> Markup:
    """Draw all configurations in the order of their ranking, then all baselines, the best first."""
    metric, level = result.options.metric, result.options.level
    baselines = [(baseline.name, baseline.intervals[metric]) for baseline in result.baselines]
    baselines += [(r.name, r.intervals[metric]) for r in result.configurations.values() if r.configuration.baseline]
    baselines = [baseline for baseline in baselines if math.isfinite(baseline[1].value)]
    marks = [Mark(r.name, r.interval, "network") for r in result.ranking]
    marks += [Mark(*baseline, "baseline") for baseline in sorted(baselines, key=lambda b: -b[1].value)]
    chance = 0.5 if metric.endswith("auroc") else None
    if metric == "balanced_accuracy":
        chance = 1 / len(result.protocol.task.classes)
    caption = (
        f"{result.protocol.name}: {score_label(metric)} with {level:.0%} intervals over patients. "
        "A baseline sees only a part of the image or of its file, and most baselines see no lung."
    )
    return svg_figure(interval_chart(marks, score_label(metric), chance), caption)


def _baseline_table(result: ProtocolResult) -> Table:
    metric = result.options.metric
    rows = [
        [
            *(b.name, b.sees, "yes" if b.sees_lungs else "no"),
            *(with_interval(b.intervals[name]) for name in (metric, "macro_auroc")),
        ]
        # Undefined scores come last.
        for b in sorted(result.baselines, key=lambda b: -np.nan_to_num(b.scores.value(metric), nan=-1))
    ]
    return Table(["baseline", "sees", "lungs", score_label(metric), "macro AUROC"], rows, 3)


def _margin_table(result: ProtocolResult) -> Table | None:
    """Compare each configuration with the best baseline that sees no lungs; None if there is no such baseline."""
    metric = result.options.metric
    # The best one is chosen by its test score, which favours the baseline and not the networks.
    blind = [b for b in result.baselines if not b.sees_lungs and math.isfinite(b.scores.value(metric))]
    if not blind:
        return None
    best = max(blind, key=lambda b: b.scores.value(metric))
    rows = [[r.name, with_interval(result.difference(r.scores, best.scores), sign="+")] for r in result.grid]
    return Table(["configuration", f"{score_label(metric)}: network - {best.name} baseline"], rows)


def _trained_baseline_table(result: ProtocolResult) -> Table:
    metric, rows = result.options.metric, []
    for r in result.configurations.values():
        if r.configuration.baseline:
            seen, sibling = r.configuration.axes["seen"], result.sibling(r.configuration)
            difference = result.difference(r.scores, sibling.scores) if sibling else None
            scores = [with_interval(r.intervals[metric]), with_interval(difference, sign="+")]
            rows.append([r.name.removesuffix(f", {seen} seen"), seen.replace("_", " "), *scores])
    return Table(["network", "sees", score_label(metric), "baseline - same network on entire images"], rows, 2)


def _perturbation_table(result: ProtocolResult) -> Table:
    rows = [
        [p.configuration, PERTURBATIONS[p.perturbation], f"{p.changed:.1%}", with_interval(p.change, sign="+")]
        for p in result.perturbations
    ]
    metric = score_label(result.options.metric)
    return Table(["configuration", "change of the images", "changed decisions", f"change of {metric}"], rows, 2)


def _confounders(result: ProtocolResult, pairs: Sequence[tuple[str, str]]) -> str:
    """Return the settings other than the axes that differ within a matched pair."""
    # Options of a loss, backbone or augmentation differ because the axis does.
    different: set[str] = set()
    for pair in pairs:
        first, second = (set(result.configurations[name].configuration.settings) for name in pair)
        different |= {key for key, _ in first ^ second}
    return ", ".join(sorted(k for k in different if not k.startswith(("loss.", "backbone.", "augment.")))) or "nothing"


def _variance_table(result: ProtocolResult) -> Table:
    rows = []
    for r in result.grid:
        n_seeds, variance = len(r.configuration.seeds), r.variance
        share = "single seed" if n_seeds == 1 else number(100 * variance.seed_share, 0)
        rows.append([r.name, str(n_seeds), *(number(math.sqrt(part)) for part in variance), share])
    headers = ["configuration", "seeds", "sd: training seed", "sd: test patients", "sd: interaction"]
    return Table([*headers, "variance due to the seed, %"], rows)


def _confusion(r: ConfigurationResult, result: ProtocolResult) -> Markup:
    task, tables = result.protocol.task, r.configuration.tables
    counts = np.zeros((len(task.classes), len(task.classes)), dtype=np.int64)
    for table in tables:
        truth, prob = truth_and_prob(table, task)
        counts += confusion(truth, decide(prob, task), len(task.classes))
    caption = r.name if len(tables) == 1 else f"{r.name}; sum over {len(tables)} seeds"
    return html.confusion(task.classes, counts.tolist(), caption)


def _curves(r: ConfigurationResult, result: ProtocolResult) -> list[Markup]:
    tables, task = r.configuration.tables, result.protocol.task
    files = [run.folder / "history.csv" for run in r.configuration.runs]
    histories = [pd.read_csv(file) for file in files if file.is_file()]
    runs = "1 run" if len(histories) == 1 else f"{len(histories)} runs"
    name = f"{r.name} ({result.protocol.name})"
    return [
        svg_figure(roc_panel(tables, task), f"ROC, each class against the rest: {name}"),
        svg_figure(precision_recall_panel(tables, task), f"Precision and recall: {name}"),
        svg_figure(reliability_panel(tables, task), f"Reliability of p(covid): {name}"),
        svg_figure(loss_panel(histories), f"Loss, mean and range over {runs}: {name}"),
    ]


def _source_table(result: ProtocolResult) -> Table:
    counts = pd.crosstab(_sources(result), result.table["label"])
    counts = counts.reindex(columns=list(result.protocol.task.classes), fill_value=0)
    remark = "one class: a high score may come from recognising the source"
    rows = [
        [str(source), *map(str, row), remark if (row > 0).sum() == 1 else ""]
        for source, row in zip(counts.index, counts.to_numpy(), strict=True)
    ]
    return Table(["source", *counts.columns, ""], rows)


def _source_score_table(result: ProtocolResult) -> Table | None:
    """Return the scores of each configuration within each source; None for a single source."""
    sources, task, level = _sources(result), result.protocol.task, result.options.level
    names = sorted(set(sources))
    if len(names) == 1:
        return None
    rows = [[r.name] for r in result.grid]
    for source in names:
        within = (sources == source).to_numpy()
        with warnings.catch_warnings():
            # Within a source, a class often has a single patient. Its interval is wide, which needs no warning.
            warnings.simplefilter("ignore")
            weights = resample_weights(result.table[within], task, result.options)
        for row, r in zip(rows, result.grid, strict=True):
            tables = [table[within] for table in r.configuration.tables]
            scores = score_seeds(tables, task, weights, _SOURCE_SCORES)
            row += [score_text(mean_score(scores, name, level)) for name in _SOURCE_SCORES]
    return Table(["configuration", *(f"{source}: {score_label(n)}" for source in names for n in _SOURCE_SCORES)], rows)


def _calibration_table(result: ProtocolResult) -> Table:
    rows = []
    for r in result.grid:
        temperatures = [_temperature(run) for run in r.configuration.runs]
        known = [temperature for temperature in temperatures if temperature is not None]
        after, span = "no validation table", "–"
        # If a run has no temperature, the mean would be over other runs than before the calibration.
        if len(known) == len(temperatures):
            after = _covid_error(r, known, result)
            span = _span(number(min(known), 2), number(max(known), 2))
        before = _covid_error(r, [1.0] * len(temperatures), result)
        rows.append([r.name, before, after, *(score_text(r.intervals[name]) for name in ("brier", "nll")), span])
    headers = ["configuration", "ECE of p(covid)", "ECE with temperature", "Brier score", "NLL", "temperature"]
    return Table(headers, rows)


def _temperature(run: LoadedRun) -> float | None:
    """Return the frozen temperature of a run, or fit it to its validation predictions; None without any."""
    # `evaluate` freezes the temperature; without it, the same validation predictions give the same one.
    frozen, validation = run.folder / "operating.json", run.folder / "predictions-val.csv"
    if frozen.is_file():
        return float(read_json(frozen)["temperature"])
    if not validation.is_file():
        return None
    return float(fit_operating(read_predictions(validation, run.task.classes), run.task)["temperature"])


def _covid_error(r: ConfigurationResult, temperatures: Sequence[float], result: ProtocolResult) -> str:
    """Return the calibration error of p(covid), averaged over seeds, and that of a perfectly calibrated model."""
    task, errors = result.protocol.task, []
    for seed in r.configuration.seeds:
        # Each fold has a temperature of its own, so runs are calibrated before their folds are pooled.
        parts = [
            (run.table["label"] == POSITIVE, calibrated(logits(run.table, task), temperature, task))
            for run, temperature in zip(r.configuration.runs, temperatures, strict=True)
            if run.seed == seed and run.table is not None
        ]
        covid, prob = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        prob = prob[:, task.classes.index(POSITIVE)]
        errors.append(calibration_error(prob, covid, draws=_NULL_DRAWS, seed=result.options.seed))
    value, null, null_p95 = np.mean(errors, axis=0)
    return f"{number(value)}\nperfect: {number(null)}, 95 % below {number(null_p95)}"


def _split_pair_table(pairs: Sequence[SplitPair], metric: str) -> Table:
    rows = [[p.protocol, p.configuration, p.problem or with_interval(p.difference, sign="+")] for p in pairs]
    return Table(["patient-wise protocol", "configuration", f"leaky - patient-wise, {score_label(metric)}"], rows, 2)


def _sources(result: ProtocolResult) -> "pd.Series[str]":
    return result.table["source"].replace("", "unknown")


def _device(run: LoadedRun) -> str:
    # The speed of a CPU depends on the number of threads.
    device = run.record.get("device", {})
    return str(device.get("gpu") or f"CPU ({device.get('machine', 'unknown')}, threads: {device.get('threads', '?')})")


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(sorted(set(texts)))


def _p(p: float) -> str:
    return f"< {_MIN_P}" if p < _MIN_P else number(p)
