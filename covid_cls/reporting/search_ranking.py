"""The ranking of a search's runs by their validation scores."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from covid_cls.evaluation.comparison import compare_configurations, leaderboard, score_configurations
from covid_cls.io import DISCLAIMER, read_json, read_predictions
from covid_cls.reporting.html import text_table
from covid_cls.tasks import TASKS

_METRIC = "macro_auroc"


def rank_by_validation(jobs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of a search's finished runs, best first, and what it allows to conclude.

    Runs are compared in pairs on the same validation images, with Holm's correction over all pairs. A run is tied if it
    cannot be told apart from the best one.

    Args:
        jobs: Records of finished jobs, with their words and the run folders.
    """
    common = set.intersection(*(set(job["words"]) for job in jobs)) if len(jobs) > 1 else set()
    tables: dict[str, list[pd.DataFrame]] = {}
    for job in jobs:
        folder = Path(job["run"])
        task = TASKS[read_json(folder / "run.json")["config"]["task"]["name"]]
        name = " ".join(word for word in job["words"] if word not in common)
        tables[name] = [read_predictions(folder / "predictions-val.csv", task.classes)]
    with warnings.catch_warnings():
        # Few images give undefined scores in some resamples; the intervals say so.
        warnings.simplefilter("ignore")
        scores = score_configurations(tables, task)
        ranks = leaderboard(scores, compare_configurations(scores, _METRIC), _METRIC)
    rows = [("settings", "macro AUROC", "95 %", "tied with the best")]
    for rank in ranks:
        interval = rank.interval
        tied = "yes" if rank.group == 1 else "no"
        rows.append((rank.name, f"{interval.value:.3f}", f"{interval.low:.3f}–{interval.high:.3f}", tied))
    others = sum(rank.group == 1 for rank in ranks) - 1
    images = len(next(iter(tables.values()))[0])
    return [
        "runs of the search by macro AUROC on validation:",
        text_table(rows),
        f"note: {others} of {len(ranks) - 1} other runs cannot be told apart from the best one by {images} images",
        "note: the best score is too optimistic, because it was selected; judge it by the test split of a new run",
        DISCLAIMER,
    ]
