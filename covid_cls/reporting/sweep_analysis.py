"""The statistics of a sweep's report, per protocol."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from covid_cls.errors import InputError, listed
from covid_cls.evaluation.comparison import (
    Comparison,
    ConfigurationScores,
    RankedConfiguration,
    compare_configurations,
    leaderboard,
    mean_difference,
    mean_score,
    score_configurations,
    score_seeds,
)
from covid_cls.evaluation.effects import Effect, VarianceSplit, main_effects, mean_sd, split_variance
from covid_cls.evaluation.intervals import UNDEFINED, Interval, patient_codes, patient_weights
from covid_cls.evaluation.metrics import LOWER_IS_BETTER, decide, point_scores
from covid_cls.evaluation.predictions import pool_folds, truth_and_prob
from covid_cls.evaluation.verdict import source_association, verdict
from covid_cls.io import read_predictions
from covid_cls.reporting.sweep_loading import AXES, Configuration, Omission, Protocol
from covid_cls.shortcuts.baselines import BASELINES
from covid_cls.tasks import Task

# The perturbation tests of `training.perturbations`, with what they change about the test images.
PERTURBATIONS = {"corners": "the four corners blacked out", "marker": "a bright tag pasted into a corner"}
# Values of preprocess.seen that leave no visible opacity in an image.
_SEEN_WITHOUT_LUNGS = ("border", "lungs_blurred")


@dataclass(frozen=True)
class ReportOptions:
    """How a report computes its statistics.

    Attributes:
        metric: Score by which configurations are ranked and compared.
        resamples: Number of bootstrap resamples.
        seed: Random seed of the resamples.
        level: Confidence level of the intervals.

    Raises:
        InputError: If resamples or level are out of range. `analyse_protocol` checks the metric.
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


class ConfigurationResult(NamedTuple):
    """The scores of a configuration.

    Attributes:
        configuration: What was scored.
        scores: Scores of each seed and their bootstrap replicates.
        intervals: Per score, its mean over seeds and the interval over patients.
        spread: Per score, mean and standard deviation over single runs (seeds x folds).
        variance: Variance components of the metric for one run.
    """

    configuration: Configuration
    scores: ConfigurationScores
    intervals: dict[str, Interval]
    spread: dict[str, tuple[float, float]]
    variance: VarianceSplit

    @property
    def name(self) -> str:
        """Name of the configuration."""
        return self.configuration.name


class BaselineResult(NamedTuple):
    """The scores of a shortcut baseline on the test images of a protocol.

    Attributes:
        name: Name of the baseline.
        sees: What its input is.
        sees_lungs: Whether that contains the lungs.
        scores: Scores and their bootstrap replicates.
        intervals: Per score, its value and interval.
    """

    name: str
    sees: str
    sees_lungs: bool
    scores: ConfigurationScores
    intervals: dict[str, Interval]


class PerturbationResult(NamedTuple):
    """The effect of a perturbation of the test images on a configuration.

    Attributes:
        configuration: Name of the configuration.
        perturbation: Key of `PERTURBATIONS`.
        changed: Share of decisions that differ, mean over seeds.
        change: Score on perturbed images minus score on the original ones.
    """

    configuration: str
    perturbation: str
    changed: float
    change: Interval


class Verdict(NamedTuple):
    """What the scores of a protocol are evidence of.

    Attributes:
        lines: Statements about all configurations, the most severe first.
        configurations: A line per configuration about its strongest baseline; empty if `lines` has it.
    """

    lines: list[str]
    configurations: list[str]


class SplitPair(NamedTuple):
    """A configuration under a leaky and a patient-wise split.

    Attributes:
        protocol: Name of the patient-wise protocol.
        configuration: Name of the configuration, or a description of several.
        difference: Leaky minus patient-wise score.
        problem: Why there is no difference, "" if there is one.
    """

    protocol: str
    configuration: str
    difference: Interval
    problem: str = ""


@dataclass
class ProtocolResult:
    """All statistics of a protocol.

    All configurations and baselines share their bootstrap resamples, so that differences between them are paired.
    """

    protocol: Protocol
    options: ReportOptions
    configurations: dict[str, ConfigurationResult] = field(default_factory=dict)
    baselines: list[BaselineResult] = field(default_factory=list)
    perturbations: list[PerturbationResult] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    ranking: list[RankedConfiguration] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    verdict: Verdict = field(default_factory=lambda: Verdict([], []))
    warnings: list[str] = field(default_factory=list)

    @property
    def grid(self) -> list[ConfigurationResult]:
        """The configurations whose networks saw entire images."""
        return [self.configurations[configuration.name] for configuration in self.protocol.grid]

    @property
    def table(self) -> pd.DataFrame:
        """A predictions table of the test images."""
        return self.protocol.configurations[0].tables[0]

    def sibling(self, baseline: Configuration) -> ConfigurationResult | None:
        """Return the configuration that differs from `baseline` only in having seen entire images."""
        for r in self.grid:
            axes = {**r.configuration.axes, "seen": baseline.axes["seen"]}
            if axes == baseline.axes and r.configuration.settings == baseline.settings:
                return r
        return None

    def difference(self, first: ConfigurationScores, second: ConfigurationScores) -> Interval:
        """Return the paired difference first - second of the report's metric."""
        return mean_difference([(first, second)], self.options.metric, self.options.level)


def analyse_protocol(protocol: Protocol, options: ReportOptions) -> tuple[ProtocolResult, list[Omission]]:
    """Compute all statistics of a protocol.

    Returns:
        The statistics, and the baseline files that could not be used.

    Raises:
        InputError: If `options.metric` is not a score of the task, or a score whose lower values are better.
    """
    result = ProtocolResult(protocol, options)
    # The page shows the warnings of the statistics, each once.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        omissions = _analyse(result)
    result.warnings = list(dict.fromkeys(str(warning.message) for warning in caught))
    return result, omissions


def _analyse(result: ProtocolResult) -> list[Omission]:
    protocol, options, task = result.protocol, result.options, result.protocol.task
    # Checked before the bootstrap, which may take minutes.
    _check_metric(options.metric, point_scores(result.table, task))
    tables = {configuration.name: configuration.tables for configuration in protocol.configurations}
    scored = score_configurations(tables, task, resamples=options.resamples, seed=options.seed)
    for configuration in protocol.configurations:
        scores = scored[configuration.name]
        runs = [point_scores(run.table, task) for run in configuration.runs if run.table is not None]
        result.configurations[configuration.name] = ConfigurationResult(
            configuration,
            scores,
            _intervals(scores, options.level),
            {name: mean_sd([each[name] for each in runs]) for name in runs[0]},
            split_variance(scores.per_seed[options.metric], scores.replicates[options.metric]),
        )
    grid = {r.name: r.scores for r in result.grid}
    result.comparisons = compare_configurations(grid, options.metric, options.level)
    result.ranking = leaderboard(grid, result.comparisons, options.metric, options.level)
    axes = {r.name: r.configuration.axes for r in result.grid}
    for axis in AXES:
        result.effects += main_effects(grid, axes, axis, options.metric, options.level)
    weights = resample_weights(result.table, task, options)
    omissions = _analyse_baselines(result, weights) + _analyse_perturbations(result, weights)
    result.verdict = _judge_protocol(result)
    return omissions


def resample_weights(table: pd.DataFrame, task: Task, options: ReportOptions) -> npt.NDArray[np.integer]:
    """Return how often each image counts in each resample of patients, shape (resamples, N)."""
    truth, _ = truth_and_prob(table, task)
    return patient_weights(truth, patient_codes(table), options.resamples, options.seed)


def compare_split_pairs(results: Sequence[ProtocolResult]) -> list[SplitPair]:
    """Compare configurations that were trained under both a leaky and a patient-wise split.

    The protocols of a pair differ in data.group only and were tested on the same images in total. A difference is
    paired by image and patients are resampled, but the networks of the two splits were trained on different images.

    Returns:
        The difference of each configuration and, if there are several, their mean.
    """
    pairs = []
    for leaky in (r for r in results if r.protocol.leaky):
        for patientwise in (r for r in results if not r.protocol.leaky):
            first, second = ({**r.protocol.settings, "group": "", "data.group": ""} for r in (leaky, patientwise))
            if first == second:
                pairs += _split_pairs(leaky, patientwise)
    return pairs


def _split_pairs(leaky: ProtocolResult, patientwise: ProtocolResult) -> list[SplitPair]:
    name, options = patientwise.protocol.name, leaky.options
    # Two splits into training and test have different test images. All folds together have the same ones.
    if not leaky.table[["image_id", "label"]].equals(patientwise.table[["image_id", "label"]]):
        problem = "tested on different images: train all folds of a cross-validation under both splits"
        return [SplitPair(name, "all", UNDEFINED, problem)]
    by_key = {r.configuration.runs[0].key: r for r in patientwise.grid}
    keys = [(r, r.configuration.runs[0].key) for r in leaky.grid]
    scores = {by_key[key].name: (r.scores, by_key[key].scores) for r, key in keys if key in by_key}
    if not scores:
        return [SplitPair(name, "all", UNDEFINED, "no configuration was trained under both splits")]
    pairs = [SplitPair(name, each, leaky.difference(*pair)) for each, pair in scores.items()]
    if len(pairs) > 1:
        overall = mean_difference(list(scores.values()), options.metric, options.level)
        pairs.append(SplitPair(name, f"mean over {len(pairs)} configurations", overall))
    return pairs


def _check_metric(metric: str, scores: Collection[str]) -> None:
    known = sorted(set(scores) - set(LOWER_IS_BETTER))
    if metric not in known:
        problem = "lower values are better" if metric in scores else "no such score"
        raise InputError(f"metric={metric}: {problem}; choose one of {listed(known, 60)}")


def _intervals(scores: ConfigurationScores, level: float) -> dict[str, Interval]:
    # The bootstrap does not know the bias of the ECE.
    return {name: mean_score(scores, name, level) for name in scores.per_seed if name != "ece"}


def _analyse_baselines(result: ProtocolResult, weights: npt.NDArray[np.integer]) -> list[Omission]:
    """Add the baselines to `result` and return the files that could not be used."""
    omissions: list[Omission] = []
    task, level = result.protocol.task, result.options.level
    for name, baseline in BASELINES.items():
        # A baseline does not depend on the network, so all configurations have the same: the first one is read.
        for configuration in result.protocol.grid:
            try:
                table = _read_baseline(configuration, configuration.seeds[0], name, result)
            except InputError as error:
                omissions.append(Omission(f"{configuration.name}: baseline {name}", "unreadable", str(error)))
                continue
            if table is not None:
                scores = score_seeds([table], task, weights)
                intervals = _intervals(scores, level)
                result.baselines.append(BaselineResult(name, baseline.sees, baseline.sees_lungs, scores, intervals))
                break
    return omissions


def _analyse_perturbations(result: ProtocolResult, weights: npt.NDArray[np.integer]) -> list[Omission]:
    """Add the perturbation tests to `result` and return the files that could not be used."""
    omissions: list[Omission] = []
    task, options = result.protocol.task, result.options
    for r in result.grid:
        for name in PERTURBATIONS:
            try:
                found = [_read_baseline(r.configuration, seed, name, result) for seed in r.configuration.seeds]
            except InputError as error:
                omissions.append(Omission(f"{r.name}: {name}", "unreadable", str(error)))
                continue
            # Runs that were trained with baselines=false have no perturbation tests.
            tables = [table for table in found if table is not None]
            if len(tables) == len(found):
                scores = score_seeds(tables, task, weights, [options.metric])
                probs = zip(scores.prob, r.scores.prob, strict=True)
                changed = float(np.mean([decide(a, task) != decide(b, task) for a, b in probs]))
                change = result.difference(scores, r.scores)
                result.perturbations.append(PerturbationResult(r.name, name, changed, change))
    return omissions


def _read_baseline(configuration: Configuration, seed: int, name: str, result: ProtocolResult) -> pd.DataFrame | None:
    """Read the test predictions of a baseline or perturbation test for all folds of a seed; None without any file.

    Raises:
        InputError: If the file of a fold is missing or invalid, or they hold other images than those of the protocol.
    """
    paths = [run.baseline_file(name) for run in configuration.runs if run.seed == seed]
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        return None
    if missing:
        raise InputError(f"missing: {listed([_short(path) for path in missing], 3)}")
    table = pool_folds([read_predictions(path, result.protocol.task.classes) for path in paths])
    truth_and_prob(table, result.protocol.task)
    if not table[["image_id", "label"]].equals(result.table[["image_id", "label"]]):
        raise InputError(f"{_short(paths[0])} holds other images than the predictions of the run")
    return table


def _short(path: Path) -> str:
    return "/".join(path.parts[-3:])


def _judge_protocol(result: ProtocolResult) -> Verdict:
    """Compare each configuration with baselines that cannot see the disease.

    These are the shortcut baselines without lungs, and networks of the same settings that were trained without lungs.
    """
    without_lungs = {baseline.name: baseline.scores for baseline in result.baselines if not baseline.sees_lungs}
    association, metric = source_association(result.table), result.options.metric
    records = []
    for r in result.grid:
        siblings = {
            configuration.axes["seen"]: result.configurations[configuration.name].scores
            for configuration in result.protocol.configurations
            if configuration.axes["seen"] in _SEEN_WITHOUT_LUNGS and result.sibling(configuration) is r
        }
        records.append(verdict(r.name, r.scores, without_lungs | siblings, source_v=association, metric=metric))
    # The last line of a verdict is about the baselines. The others are about the data set and the same for all.
    *lines, _ = records[0]["lines"]
    last = [record["lines"][-1] for record in records]
    if len(records) == 1:
        return Verdict([*lines, *last], [])
    if not any(record["baselines"] for record in records):
        return Verdict([*lines, "no configuration was compared with a shortcut baseline"], [])
    beating = sum(record["beats_baselines"] is True for record in records)
    beaten = f"{beating} of {len(records)} configurations are shown to beat every baseline that cannot see the disease"
    return Verdict([*lines, beaten], last)
