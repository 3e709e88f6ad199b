"""Published results, and the tables of a sweep's report: the grid, results.csv and results.md."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from covid_cls.bundle.card import markdown_table
from covid_cls.evaluation.intervals import Interval, patient_codes, proportion_interval
from covid_cls.evaluation.metrics import weighted_scores
from covid_cls.reporting.html import Table, number, score_label
from covid_cls.reporting.sweep_analysis import ConfigurationResult, ProtocolResult
from covid_cls.reporting.sweep_loading import AXES
from covid_cls.tasks import TASKS, Task

CSV_COLUMNS = [
    *("protocol", "configuration", *AXES, "score", "value", "low", "high", "method", "mean", "sd"),
    *("n_seeds", "n_folds", "n_images", "n_patients"),
]
# Columns of the grid.
_SCORES = (
    *("accuracy", "balanced_accuracy", "covid.sensitivity", "covid.specificity"),
    *("covid.f1", "normal.f1", "macro_f1", "macro_auroc"),
)
_MULTILABEL_SCORES = ("label_accuracy", "covid_f1_at_half")
# Scores that a confusion matrix determines.
_DECISION_SCORES = ("accuracy", "balanced_accuracy", "macro_f1")
_DECISION_SCORES_PER_CLASS = ("sensitivity", "specificity", "ppv", "npv", "f1")

ORIGINAL = "original coursework (msds19005)"
DARKCOVIDNET = "DarkCovidNet (Ozturk et al. 2020)"
_ORIGINAL_PROTOCOL = (
    "one run on 1,500 images that are not public. The scores are computed from its confusion matrices and are within "
    "one percentage point of the accuracies that it reports (89, 92, 95 and 95 %)"
)
_ORIGINAL_MULTILABEL_PROTOCOL = (
    "one run on its own validation images. F1 is as published and does not match the counts that are published with it"
)
_DARKCOVIDNET_PROTOCOL = (
    "5-fold cross-validation split by image, without a separate test set. The scores are those of the validation parts"
)


class Reference(NamedTuple):
    """A published result.

    Attributes:
        work: Who published it.
        model: The network.
        task: Name of the task.
        protocol: How it was measured.
        counts: Confusion matrix, if published; rows are the truth, columns the decision, in the order of the task.
        correct: Correct decisions and test images, if only the accuracy was published.
        published: Other published scores by flat name.
    """

    work: str
    model: str
    task: str
    protocol: str
    counts: tuple[tuple[int, ...], ...] | None = None
    correct: tuple[int, int] | None = None
    published: tuple[tuple[str, float], ...] = ()

    def scores(self) -> dict[str, float]:
        """Return all scores that are published or follow from published counts, by flat name."""
        accuracy = self.accuracy()
        scores = {**dict(self.published), **({"accuracy": accuracy.value} if accuracy else {})}
        return scores | (_scores_of(self.counts, TASKS[self.task]) if self.counts else {})

    def accuracy(self, level: float = 0.95) -> Interval | None:
        """Return the accuracy with its Wilson interval, which assumes independent images; None without counts."""
        correct = self.correct
        if self.counts:
            correct = sum(row[k] for k, row in enumerate(self.counts)), sum(map(sum, self.counts))
        return proportion_interval(*correct, level) if correct else None


REFERENCES: Sequence[Reference] = (
    Reference(ORIGINAL, "ResNet18, fc", "binary", _ORIGINAL_PROTOCOL, counts=((504, 111), (49, 836))),
    Reference(ORIGINAL, "VGG16, fc", "binary", _ORIGINAL_PROTOCOL, counts=((550, 65), (65, 820))),
    Reference(ORIGINAL, "ResNet18, full", "binary", _ORIGINAL_PROTOCOL, counts=((554, 61), (5, 880))),
    Reference(ORIGINAL, "VGG16, full", "binary", _ORIGINAL_PROTOCOL, counts=((557, 58), (5, 880))),
    # Published as 98.08 % of 625 images and 87.02 % of 1,125, from which the counts follow.
    Reference(DARKCOVIDNET, "DarkCovidNet", "binary", _DARKCOVIDNET_PROTOCOL, correct=(613, 625)),
    Reference(DARKCOVIDNET, "DarkCovidNet", "three_class", _DARKCOVIDNET_PROTOCOL, correct=(979, 1125)),
    *(
        Reference(
            ORIGINAL,
            model,
            "three_class_multilabel",
            _ORIGINAL_MULTILABEL_PROTOCOL,
            published=(("label_accuracy", accuracy), ("covid_f1_at_half", f1)),
        )
        for model, accuracy, f1 in (
            ("ResNet18, focal", 0.95, 0.69),
            ("ResNet18, without focal", 0.96, 0.68),
            ("VGG16, focal", 0.96, 0.83),
            ("VGG16, without focal", 0.96, 0.90),
        )
    ),
)


def references(task: Task, data: str) -> list[tuple[Reference, bool]]:
    """Return the published results of a task, and whether each was measured on the data set named `data`."""
    return [(r, r.work == DARKCOVIDNET and "darkcovidnet" in data.lower()) for r in REFERENCES if r.task == task.name]


def score_text(interval: Interval) -> str:
    """Return a score and, on a second line, its interval; a dash if the score is undefined."""
    return f"{number(interval.value)}\n{_bounds(interval)}" if math.isfinite(interval.value) else "–"


def grid_table(result: ProtocolResult) -> Table:
    """Return the scores of each configuration of the grid.

    A score has two lines: mean ± standard deviation over the runs, and the interval of the pooled score over patients.
    The first columns are the axes of the grid and those other axes that vary. A column "settings" is added if the axes
    do not distinguish all configurations, and a column "runs" if their numbers of runs differ.
    """
    configurations = [r.configuration for r in result.grid]
    # Backbone, strategy and loss are always shown. The last axis, the part of the image seen, is the same in the grid.
    axes = [axis for k, axis in enumerate(AXES[:-1]) if k < 3 or len({c.axes[axis] for c in configurations}) > 1]
    columns = {axis: [c.axes[axis] for c in configurations] for axis in axes}
    if len(set(zip(*columns.values(), strict=True))) < len(configurations):
        # Names contain key=value for the settings that the axes do not cover.
        columns["settings"] = [", ".join(part for part in c.name.split(", ") if "=" in part) for c in configurations]
    if not common_runs(result):
        columns["runs"] = [_runs(r, result) for r in result.grid]
    names = _grid_scores(result.protocol.task, result.options.metric)
    rows = [
        [*words, *(_grid_field(r, name) for name in names)]
        for words, r in zip(zip(*columns.values(), strict=True), result.grid, strict=True)
    ]
    return Table([*columns, *map(_header, names)], rows, len(columns))


def common_runs(result: ProtocolResult) -> str:
    """Return the runs per configuration, e.g. "single seed × 5 folds"; "" if configurations differ in them."""
    runs = {_runs(r, result) for r in result.grid}
    return runs.pop() if len(runs) == 1 else ""


def published_table(result: ProtocolResult) -> Table:
    """Return published results of the same task."""
    task = result.protocol.task
    names = [name for name in _grid_scores(task, "accuracy") if name != "macro_auroc"]
    rows = []
    for reference, same in references(task, result.protocol.data):
        scores, interval = reference.scores(), reference.accuracy(result.options.level)
        fields = {name: number(scores.get(name)) for name in names}
        if interval is not None:
            fields["accuracy"] = score_text(interval)
        images = "the DarkCovidNet set" if same else "other images"
        rows.append([reference.work, reference.model, images, *fields.values()])
    return Table(["published by", "model", "measured on", *map(_header, names)], rows, 3)


def results_csv(results: Sequence[ProtocolResult]) -> str:
    """Return results.csv: one row per score of a configuration or baseline, numbers with all digits."""
    rows = []
    for result in results:
        n_patients = len(np.unique(patient_codes(result.table)))
        sizes = {"n_folds": len(result.protocol.folds), "n_images": len(result.table), "n_patients": n_patients}
        for r in result.configurations.values():
            own = {"protocol": result.protocol.name, "configuration": r.name, **r.configuration.axes}
            for name in r.scores.per_seed:
                # The ECE has no interval, because the bootstrap does not know its bias.
                interval = r.intervals.get(name, Interval(r.scores.value(name), math.nan, math.nan, "none"))
                mean, sd = r.spread[name]
                scores = {"score": name, **interval._asdict(), "mean": mean, "sd": sd}
                rows.append({**own, **scores, "n_seeds": len(r.configuration.seeds), **sizes})
        for baseline in result.baselines:
            own = {"protocol": result.protocol.name, "configuration": f"baseline: {baseline.name}"}
            for name, interval in baseline.intervals.items():
                rows.append({**own, "score": name, **interval._asdict(), "n_seeds": 1, **sizes})
    return pd.DataFrame(rows, columns=CSV_COLUMNS).to_csv(index=False, lineterminator="\n")


def results_md(results: Sequence[ProtocolResult], disclaimer: str) -> str:
    """Return results.md: the verdict and the grid of each protocol."""
    parts = []
    for result in results:
        table, options, runs = grid_table(result), result.options, common_runs(result)
        parts += [
            f"### {result.protocol.name}",
            "\n".join(f"- {line}" for line in result.verdict.lines),
            markdown_table(table.headers, table.rows),
            (f"Runs per configuration: {runs}. " if runs else "")
            + "First line: mean ± standard deviation over runs. Second line: "
            + f"{options.level:.0%} interval of the score, pooled over folds and averaged over seeds "
            + f"({options.resamples} resamples of patients).",
        ]
    return "\n\n".join([*parts, disclaimer]) + "\n"


def _scores_of(counts: Sequence[Sequence[int]], task: Task) -> dict[str, float]:
    """Return the scores that a confusion matrix determines, by flat name."""
    size = len(task.classes)
    # One image per entry of the matrix, weighted by its count.
    truth, decided = (index.ravel() for index in np.indices((size, size)))
    weights = np.array(counts).reshape(1, -1)
    names = [*_DECISION_SCORES, *(f"{name}.{score}" for name in task.classes for score in _DECISION_SCORES_PER_CLASS)]
    scores = weighted_scores(truth, np.eye(size)[decided], decided, task, weights, names)
    return {name: float(value[0]) for name, value in scores.items()}


def _grid_scores(task: Task, metric: str) -> list[str]:
    names = [*_SCORES, *(_MULTILABEL_SCORES if task.multilabel else ())]
    return names if metric in names else [metric, *names]


def _grid_field(r: ConfigurationResult, name: str) -> str:
    mean, sd = r.spread[name]
    return f"{number(mean)}{f' ± {sd:.3f}' if math.isfinite(sd) else ''}\n{_bounds(r.intervals[name])}"


def _bounds(interval: Interval) -> str:
    return f"{interval.low:.3f}–{interval.high:.3f}" if math.isfinite(interval.low) else "no interval"


def _header(name: str) -> str:
    # On two lines, because the grid has many columns.
    return score_label(name).replace(" ", "\n", 1)


def _runs(r: ConfigurationResult, result: ProtocolResult) -> str:
    n_seeds, n_folds = len(r.configuration.seeds), len(result.protocol.folds)
    seeds = "single seed" if n_seeds == 1 else f"{n_seeds} seeds"
    return f"{seeds} × {n_folds} folds" if n_folds > 1 else seeds
