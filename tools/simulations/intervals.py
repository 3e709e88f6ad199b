"""Estimate the coverage of the intervals and the type I error of the tests by simulation; print Markdown tables.

OMP_NUM_THREADS=1 python -m tools.simulations.intervals [simulations] >> docs/simulations.md
"""

import os
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy
import sklearn
from scipy.special import softmax

from covid_cls.evaluation.comparison import compare_configurations, score_configurations
from covid_cls.evaluation.delong import delong_interval
from covid_cls.evaluation.intervals import patient_codes, proportion_interval, score_intervals
from covid_cls.evaluation.metrics import decide, point_scores
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.io import prediction_columns
from covid_cls.tasks import TASKS

# Shares of patients per class, covid first.
SHARES = {"binary": (1, 2), "three_class": (1, 2, 2)}
# Correlation of the noise of images of one patient.
WITHIN_PATIENT = 0.5
# Correlation of the noise of two models on one image.
BETWEEN_MODELS = 0.7
SCORES = (
    *("covid.auroc", "covid.sensitivity", "covid.specificity", "accuracy", "balanced_accuracy", "macro_f1"),
    *("covid.average_precision", "covid.ppv", "covid.npv", "covid.f1", "macro_auroc", "mcc", "brier", "nll"),
)
# Intervals that are often published, for comparison.
OTHERS = ("covid.auroc, DeLong", "covid.auroc, DeLong by image", "covid.sensitivity, Wilson by image")
COMPARED = ("balanced_accuracy", "covid.auroc")
TESTS = (*(f"bootstrap, {metric}" for metric in COMPARED), "DeLong, covid.auroc", "McNemar, exact")
# Simulations per job. Each job has a separate random seed, so the result does not depend on the number of processes.
PIECE = 50


class Design(NamedTuple):
    """A simulated test set.

    Attributes:
        task: Name of the task.
        patients: Number of patients.
        images: Images per patient.
        distance: Distance between class means in standard deviations. For two classes 1.13 gives a covid AUROC of
            0.87, and 2.1 gives 0.98.
    """

    task: str
    patients: int
    images: int = 1
    distance: float = 1.13

    def __str__(self) -> str:
        return f"{self.patients} x {self.images}" if self.images > 1 else f"{self.patients}"


SIZES = (60, 200, 1000)
DESIGNS = {
    "two classes": [Design("binary", n, images) for images in (1, 4) for n in SIZES],
    # The design 1000 x 4 would take a third of the total time.
    "three classes": [Design("three_class", n, images, 1.6) for images in (1, 4) for n in SIZES if n * images < 4000],
    "two classes, a strong model": [Design("binary", n, images, 2.1) for images in (1, 4) for n in SIZES[:2]],
}


def simulate(design: Design, rng: np.random.Generator, models: int = 1) -> list[pd.DataFrame]:
    """Return the predictions tables of `models` equally good models on the same images.

    The features of each class are a Gaussian with unit variance around a separate corner of a simplex. The logits are
    calibrated for equally frequent classes.
    """
    task, shares, distance = TASKS[design.task], SHARES[design.task], design.distance
    per_class = [design.patients * share // sum(shares) for share in shares]
    per_class[-1] = design.patients - sum(per_class[:-1])
    truth = np.repeat(np.repeat(np.arange(len(shares)), per_class), design.images)
    patient = np.repeat(np.arange(design.patients), design.images)

    def noise() -> np.ndarray:
        own = rng.normal(size=(len(truth), len(shares)))
        if design.images == 1:
            return own
        shared = rng.normal(size=(design.patients, len(shares)))[patient]
        return np.asarray(np.sqrt(WITHIN_PATIENT) * shared + np.sqrt(1 - WITHIN_PATIENT) * own)

    # Models share part of their noise, because the same images are difficult for both.
    common = noise()
    tables = []
    for _ in range(models):
        each = np.sqrt(BETWEEN_MODELS) * common + np.sqrt(1 - BETWEEN_MODELS) * noise()
        logit = distance * (distance * np.eye(len(shares))[truth] + each)
        columns = {
            "image_id": np.arange(len(truth)).astype(str),
            "patient_id": patient.astype(str),
            **dict.fromkeys(("source", "split", "fold"), "simulated"),
            "label": np.array(task.classes)[truth],
            **{f"logit_{name}": logit[:, k] for k, name in enumerate(task.classes)},
            **{f"prob_{name}": values for name, values in zip(task.classes, softmax(logit, axis=1).T, strict=True)},
        }
        tables.append(pd.DataFrame(columns)[prediction_columns(task.classes)])
    return tables


def true_scores(design: Design, patients: int = 1_000_000) -> dict[str, float]:
    """Return the true scores of `design`, which its intervals should contain, estimated from very many patients."""
    (table,) = simulate(design._replace(patients=patients, images=1), np.random.default_rng(0))
    return point_scores(table, TASKS[design.task])


def covered_scores(design: Design, rng: np.random.Generator, resamples: int, truths: dict[str, float]) -> Iterator[str]:
    """Simulate one test set and yield the names of the scores whose 95 % interval contains the true value."""
    (table,) = simulate(design, rng)
    task = TASKS[design.task]
    found = score_intervals(table, task, resamples=resamples, seed=int(rng.integers(2**31)))
    truth, prob = truth_and_prob(table, task)
    # Covid is the first class of every task.
    covid = truth == 0
    others = (
        delong_interval(covid, prob[:, 0], patients=patient_codes(table)),
        delong_interval(covid, prob[:, 0]),
        proportion_interval(int((decide(prob, task)[covid] == 0).sum()), int(covid.sum())),
    )
    for name, interval in {**found, **dict(zip(OTHERS, others, strict=True))}.items():
        if interval.low <= truths[name.split(",")[0]] <= interval.high:
            yield name


def rejecting_tests(design: Design, rng: np.random.Generator, resamples: int, _: dict[str, float]) -> Iterator[str]:
    """Simulate two equally good models and yield the tests that reject their equality at the 5 % level."""
    first, second = simulate(design, rng, models=2)
    seed = int(rng.integers(2**31))
    tables = {"first": [first], "second": [second]}
    scores = score_configurations(tables, TASKS[design.task], resamples=resamples, seed=seed)
    for metric in COMPARED:
        (pair,) = compare_configurations(scores, metric)
        if pair.p < 0.05:
            yield f"bootstrap, {metric}"
    if pair.delong_p < 0.05:
        yield "DeLong, covid.auroc"
    if pair.mcnemar_p < 0.05:
        yield "McNemar, exact"


Simulation = Callable[[Design, np.random.Generator, int, dict[str, float]], Iterator[str]]


def count(
    simulation: Simulation, design: Design, simulations: int, resamples: int, seed: int, truths: dict[str, float]
) -> Counter[str]:
    """Return how often `simulation` yields each name in `simulations` test sets of `design`."""
    rng = np.random.default_rng([seed, design.patients, design.images])
    return Counter(name for _ in range(simulations) for name in simulation(design, rng, resamples, truths))


def _table(counts: dict[Design, Counter[str]], rows: tuple[str, ...], first: str, simulations: int) -> str:
    designs = list(counts)
    lines = [f"| {first} | " + " | ".join(map(str, designs)) + " |", "|---|" + "---:|" * len(designs)]
    for name in rows:
        shares = (f"{100 * counts[design][name] / simulations:.1f}" for design in designs)
        lines.append(f"| {name} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def main(simulations: int = 1000, resamples: int = 400) -> None:
    """Run all simulations and print the tables for docs/simulations.md.

    Args:
        simulations: Test sets per design, rounded down to a multiple of 50.
        resamples: Bootstrap resamples per interval.
    """
    # A warning would mean that a simulated table is degenerate, such as a class with a single patient.
    warnings.simplefilter("error")
    pieces = simulations // PIECE
    jobs: list[tuple[Simulation, Design, dict[str, float]]] = []
    for designs in DESIGNS.values():
        truths = true_scores(designs[0])
        jobs += [(covered_scores, design, truths) for design in designs]
    jobs += [(rejecting_tests, design, {}) for design in DESIGNS["two classes"]]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        running = {
            (simulation, design): [
                pool.submit(count, simulation, design, PIECE, resamples, piece, truths) for piece in range(pieces)
            ]
            for simulation, design, truths in jobs
        }
        counts = {key: sum((each.result() for each in futures), Counter()) for key, futures in running.items()}
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    print(f"\n### {date.today()}: {pieces * PIECE} simulations, {resamples} resamples each\n")
    print(f"{versions}, pandas {pd.__version__}, sklearn {sklearn.__version__}.")
    for title, designs in DESIGNS.items():
        print(f"\nCoverage in %, {title}:\n")
        print(_table({d: counts[covered_scores, d] for d in designs}, (*SCORES, *OTHERS), "score", pieces * PIECE))
    print("\nEqual models found different at the 5 % level, in %, two classes:\n")
    null = {d: counts[rejecting_tests, d] for d in DESIGNS["two classes"]}
    print(_table(null, TESTS, "test", pieces * PIECE))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
