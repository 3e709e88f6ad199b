"""What a report knows of a protocol's cells: their scores, what they are compared with, and what that amounts to."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from covid_cls.errors import InputError
from covid_cls.evaluation.comparison import Comparison, Standing
from covid_cls.evaluation.grid import CellScores, Effect, VarianceSplit, mean_difference
from covid_cls.evaluation.intervals import Interval
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.evaluation.resampling import patient_codes, patient_weights
from covid_cls.labels import Task
from covid_cls.reporting.collect import Cell, Protocol


@dataclass(frozen=True)
class Options:
    """How a report measures: the score that ranks and compares, resamples and their seed, the intervals' level.

    InputError where resamples or level are out of range; `measure` checks the metric.
    """

    metric: str = "balanced_accuracy"
    resamples: int = 2000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.resamples < 2:
            raise InputError(f"resamples={self.resamples}: must be at least 2")
        if not 0 < self.level < 1:
            raise InputError(f"level={self.level}: must lie between 0 and 1")


class CellResult(NamedTuple):
    """A cell's scores and their intervals over patients; by score, mean and sd over its runs; the variance of one run.

    The runs are single trainings: seeds x folds. The variance is that of the report's score.
    """

    cell: Cell
    scores: CellScores
    intervals: dict[str, Interval]
    spread: dict[str, tuple[float, float]]
    variance: VarianceSplit


class ProbeResult(NamedTuple):
    """A classifier that sees only `sees` of each image, on the protocol's test images."""

    name: str
    sees: str
    sees_lungs: bool
    table: pd.DataFrame
    scores: CellScores
    intervals: dict[str, Interval]


class StressResult(NamedTuple):
    """What a change of the test images does to a trained cell.

    changed: share of decisions that differ, mean over seeds; change: score on changed - score on whole images.
    """

    cell: str
    stress: str
    changed: float
    change: Interval


class Verdict(NamedTuple):
    """What a protocol's scores are evidence of: lines for all cells, and a line per cell about its strongest probe."""

    lines: list[str]
    cells: list[str]


@dataclass
class ProtocolResult:
    """All that a report says of one protocol. Differences are paired: all cells and probes share the resamples."""

    protocol: Protocol
    options: Options
    cells: dict[str, CellResult] = field(default_factory=dict)
    probes: list[ProbeResult] = field(default_factory=list)
    stress: list[StressResult] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    verdict: Verdict = field(default_factory=lambda: Verdict([], []))
    warnings: list[str] = field(default_factory=list)

    @property
    def grid(self) -> list[CellResult]:
        """The cells whose networks saw whole images."""
        return [self.cells[cell.name] for cell in self.protocol.grid]

    @property
    def table(self) -> pd.DataFrame:
        """One predictions table of the test images."""
        return self.protocol.cells[0].tables[0]

    def sibling(self, probe: Cell) -> CellResult | None:
        """The cell that was trained on whole images and in all else as `probe` was."""
        for r in self.grid:
            if {**r.cell.axes, "seen": probe.axes["seen"]} == probe.axes and r.cell.settings == probe.settings:
                return r
        return None

    def difference(self, first: CellScores, second: CellScores) -> Interval:
        """The report's score of first - second, paired."""
        return mean_difference([(first, second)], self.options.metric, self.options.level)


def resample(table: pd.DataFrame, task: Task, options: Options) -> npt.NDArray[np.integer]:
    """How often each image of a table counts in each resample of its patients, (resamples, N)."""
    truth, _ = truth_and_prob(table, task)
    return patient_weights(truth, patient_codes(table), options.resamples, options.seed)
