"""Every statistic of a sweep's report, computed from the predictions tables alone."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

from covid_cls.errors import InputError, listed
from covid_cls.evaluation.comparison import compare_cells, leaderboard
from covid_cls.evaluation.grid import (
    CellScores,
    main_effects,
    mean_difference,
    mean_score,
    mean_sd,
    point_scores,
    score_cell,
    split_variance,
)
from covid_cls.evaluation.intervals import UNDEFINED, Interval
from covid_cls.labels import Task
from covid_cls.reporting.beside import judge, measure_probes, measure_stress
from covid_cls.reporting.collect import Cell, Protocol
from covid_cls.reporting.runs import AXES, Omission
from covid_cls.reporting.standing import CellResult, Options, ProtocolResult, resample

_LESS_IS_BETTER = ("nll", "brier", "ece")


class Twin(NamedTuple):
    """A cell under a leaky and an honest split: difference = leaky - honest; why: what keeps it from being computed."""

    protocol: str
    cell: str
    difference: Interval
    why: str = ""


def measure(protocol: Protocol, options: Options) -> tuple[ProtocolResult, list[Omission]]:
    """Every statistic of a protocol, and the probe files that could not be used.

    InputError where `options.metric` is no score of the task.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result, omissions = _measured(protocol, options)
    result.warnings = list(dict.fromkeys(str(warning.message) for warning in caught))
    return result, omissions


def _measured(protocol: Protocol, options: Options) -> tuple[ProtocolResult, list[Omission]]:
    task, weights = protocol.task, resample(protocol.cells[0].tables[0], protocol.task, options)
    result = ProtocolResult(protocol, options)
    for cell in protocol.cells:
        scores = score_cell(cell.tables, task, weights)
        _check_metric(options.metric, scores)
        result.cells[cell.name] = CellResult(
            cell,
            scores,
            {name: mean_score(scores, name, options.level) for name in scores.seeds if name != "ece"},
            _spread(cell, task),
            split_variance(scores.seeds[options.metric], scores.draws[options.metric]),
        )
    tables = {cell.name: cell.tables for cell in protocol.grid}
    chosen = asdict(options)
    if len(tables) > 1:
        result.comparisons = compare_cells(tables, task, **chosen)
    result.standings = leaderboard(tables, task, **chosen)
    axes = {cell.name: {**cell.axes} for cell in protocol.grid}
    scored = {cell.name: result.cells[cell.name].scores for cell in protocol.grid}
    for axis in AXES:
        result.effects += main_effects(scored, axes, axis, options.metric, options.level)
    omissions = measure_probes(result, weights) + measure_stress(result, weights)
    result.verdict = judge(result)
    return result, omissions


def measure_twins(results: Sequence[ProtocolResult]) -> list[Twin]:
    """What a leak adds: each cell that was trained under both splits, and the mean over these cells.

    Twins are protocols that are equal but for data.group and tested on the same images as a whole. The difference is
    paired by image, patients are resampled; the networks of the two splits were trained on different images.
    """
    rows = []
    for leaky in (r for r in results if r.protocol.leaky):
        for honest in (r for r in results if not r.protocol.leaky):
            ours, theirs = ({**r.protocol.settings, "group": "", "data.group": ""} for r in (leaky, honest))
            if ours == theirs:
                rows += _twins(leaky, honest)
    return rows


def _twins(leaky: ProtocolResult, honest: ProtocolResult) -> list[Twin]:
    name = honest.protocol.name
    if not leaky.table[["image_id", "label"]].equals(honest.table[["image_id", "label"]]):
        why = "tested on different images: give both all folds of a cross-validation"
        return [Twin(name, "all", UNDEFINED, why)]
    twin = {(tuple(r.cell.axes.items()), r.cell.settings): r for r in honest.grid}
    pairs = [(r, twin[key]) for r in leaky.grid if (key := (tuple(r.cell.axes.items()), r.cell.settings)) in twin]
    if not pairs:
        return [Twin(name, "all", UNDEFINED, "no cell was trained under both splits")]
    rows = [Twin(name, b.cell.name, leaky.difference(a.scores, b.scores)) for a, b in pairs]
    if len(pairs) > 1:
        scores = [(a.scores, b.scores) for a, b in pairs]
        overall = mean_difference(scores, leaky.options.metric, leaky.options.level)
        rows.append(Twin(name, f"mean over {len(pairs)} cells", overall))
    return rows


def _check_metric(metric: str, scores: CellScores) -> None:
    known = sorted(set(scores.seeds) - set(_LESS_IS_BETTER))
    if metric not in known:
        reason = (
            "less of it is better, and cells are ranked by what is to be high"
            if metric in scores.seeds
            else "no such score"
        )
        raise InputError(f"metric={metric}: {reason}; choose one of {listed(known, 60)}")


def _spread(cell: Cell, task: Task) -> dict[str, tuple[float, float]]:
    each = [point_scores(run.table, task) for run in cell.runs if run.table is not None]
    return {name: mean_sd([scores[name] for scores in each]) for name in each[0]}
