"""What stands beside a protocol's networks: probes, changed test images, and the verdict that they give."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from covid_cls.audits.probe_features import PROBES
from covid_cls.errors import InputError, listed
from covid_cls.evaluation.grid import mean_score, pool_folds, score_cell
from covid_cls.evaluation.metrics import Indices, decide
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.evaluation.verdict import source_association, verdict
from covid_cls.labels import Task
from covid_cls.records import read_predictions
from covid_cls.reporting.collect import Cell
from covid_cls.reporting.runs import Omission
from covid_cls.reporting.standing import ProbeResult, ProtocolResult, StressResult, Verdict

# What `training.stress` changes about the test images, in words.
STRESS = {"corners": "the four corners blacked out", "marker": "a bright tag pasted into a corner"}
_BLIND_VIEWS = ("border", "lungs_blurred")  # of preprocess.seen: no opacity is left in them


def measure_probes(result: ProtocolResult, weights: npt.NDArray[np.integer]) -> list[Omission]:
    """Fill in the probes, which are the same beside every cell; what keeps one from being read comes back."""
    omissions: list[Omission] = []
    task, options = result.protocol.task, result.options
    for name, probe in PROBES.items():
        for cell in result.protocol.grid:
            table, reason = _beside(cell, cell.seeds[0], name, result)
            if table is not None:
                scores = score_cell([table], task, weights)
                intervals = {s: mean_score(scores, s, options.level) for s in scores.seeds if s != "ece"}
                result.probes.append(ProbeResult(name, probe.sees, probe.sees_lungs, table, scores, intervals))
                break
            if reason:
                omissions.append(Omission(f"{cell.name}: probe {name}", "unreadable", reason))
    return omissions


def measure_stress(result: ProtocolResult, weights: npt.NDArray[np.integer]) -> list[Omission]:
    """Fill in what changed test images do to each cell of the grid; what keeps one from being read comes back."""
    omissions: list[Omission] = []
    for cell in result.protocol.grid:
        for stress in STRESS:
            found = [_beside(cell, seed, stress, result) for seed in cell.seeds]
            omissions += [Omission(f"{cell.name}: {stress}", "unreadable", reason) for _, reason in found if reason]
            tables = [table for table, _ in found if table is not None]
            if len(tables) == len(cell.seeds):
                scores = score_cell(tables, result.protocol.task, weights, [result.options.metric])
                change = result.difference(scores, result.cells[cell.name].scores)
                changed = _changed(tables, cell.tables, result.protocol.task)
                result.stress.append(StressResult(cell.name, stress, changed, change))
    return omissions


def _beside(cell: Cell, seed: int, name: str, result: ProtocolResult) -> tuple[pd.DataFrame | None, str]:
    """The pooled `probes/<name>-test.csv` of a cell's runs of one seed; or None, with a reason if they are at fault."""
    paths = [run.folder / "probes" / f"{name}-test.csv" for run in cell.runs if run.seed == seed]
    present = [path for path in paths if path.is_file()]
    if not present:
        return None, ""
    if len(present) < len(paths):
        return None, f"missing: {listed([_short(path) for path in paths if path not in present], 3)}"
    try:
        table = pool_folds([read_predictions(path, result.protocol.task.classes) for path in paths])
        truth_and_prob(table, result.protocol.task)
    except InputError as error:
        return None, str(error)
    if not table[["image_id", "label"]].equals(result.table[["image_id", "label"]]):
        return None, f"{_short(paths[0])} is of other images than the run's own predictions"
    return table, ""


def _short(path: Path) -> str:
    return "/".join(path.parts[-3:])


def _changed(tables: Sequence[pd.DataFrame], originals: Sequence[pd.DataFrame], task: Task) -> float:
    def decided(table: pd.DataFrame) -> Indices:
        return decide(truth_and_prob(table, task)[1], task)

    return float(np.mean([(decided(a) != decided(b)).mean() for a, b in zip(tables, originals, strict=True)]))


def judge(result: ProtocolResult) -> Verdict:
    """Each cell against what cannot see the disease: lungless probes, its own recipe on borders and blurred lungs."""
    blind = {probe.name: [probe.table] for probe in result.probes if not probe.sees_lungs}
    source_v, options = source_association(result.table), result.options
    records = []
    for r in result.grid:
        own = {
            cell.axes["seen"]: cell.tables
            for cell in result.protocol.cells
            if cell.axes["seen"] in _BLIND_VIEWS and result.sibling(cell) is r
        }
        drawn: dict[str, Any] = {"metric": options.metric, "resamples": options.resamples, "seed": options.seed}
        records.append(
            verdict(r.cell.name, r.cell.tables, blind | own, result.protocol.task, source_v=source_v, **drawn)
        )
    cells = [record["lines"][-1] for record in records]
    lines = records[0]["lines"][:-1]
    if len(records) == 1:
        return Verdict([*lines, *cells], [])
    if not any(record["probes"] for record in records):
        return Verdict([*lines, "no cell was compared with any shortcut probe"], [])
    beating = sum(record["beats_probes"] is True for record in records)
    beaten = f"{beating} of {len(records)} cells are shown to beat every probe that cannot see the disease"
    return Verdict([*lines, beaten], cells)
