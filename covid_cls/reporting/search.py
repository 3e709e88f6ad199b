"""A search for the learning rate: which rate is tried next, what each one came to, and what may be said of the best.

Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) proposes the rates, on a log scale.
"""

import json
import math
import shlex
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import covid_cls
from covid_cls.errors import InputError
from covid_cls.evaluation.comparison import Standing, leaderboard
from covid_cls.evaluation.grid import point_scores
from covid_cls.evaluation.predictions import without_nan
from covid_cls.labels import Task
from covid_cls.records import DISCLAIMER, digest, read_json, read_predictions, write_json
from covid_cls.reporting.text import text_table
from covid_cls.training.identity import run_digests
from covid_cls.training.lock import held

METRIC = "macro_auroc"
_STATES = {"COMPLETE": "finished", "PRUNED": "diverged", "RUNNING": "not finished"}  # of Optuna's trials


class Trial(NamedTuple):
    """A rate and what became of it. state: finished, diverged or not finished; score: nan in all but the first."""

    rate: float
    state: str
    score: float


class RateSearch:
    """Learning rates to try, and a journal with which another process goes on.

    trials: how many, those of earlier processes included. low, high: their range. seed: of what is proposed. Where one
    is tried at a time, the rates are the same ones however often the search is stopped or extended: the k-th depends
    on seed, k and the scores of those before it. InputError where Optuna is missing, or these make no search.
    """

    def __init__(self, trials: int, low: float, high: float, seed: int) -> None:
        try:
            import optuna.storages.journal  # noqa: F401  # an extra; 0.3 s that no other command needs
        except ImportError as error:
            raise InputError("Optuna 4.4 or later is not installed: pip install 'covid_cls[search]'") from error
        if trials < 1:
            raise InputError(f"search.trials={trials}: must be at least 1")
        if not 0 < low < high < math.inf:
            raise InputError(f"search.low={low} search.high={high}: must be 0 < low < high")
        if seed < 0:
            raise InputError(f"search.seed={seed}: must be at least 0")
        self._count, self._low, self._high, self._seed = trials, low, high, seed
        self._lock = threading.Lock()

    @contextmanager
    def opened(self, folder: Path, task: Task, *, anew: bool = False) -> Iterator[None]:
        """A block in which this process alone goes on with the journal in `folder`, or with `anew` begins another.

        folder: of the search; the cell of each rate is in `rate_name` below it. InputError where another process has
        it, or the journal is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder, "at this very search"):
            self._open(folder, task, anew)
            yield

    def _open(self, folder: Path, task: Task, anew: bool) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self._task, journal = folder, task, folder / "trials.journal"
        if anew:
            journal.unlink(missing_ok=True)
        try:
            storage = JournalStorage(JournalFileBackend(str(journal)))
            self._study = optuna.create_study(
                storage=storage, study_name="optimizer.lr", direction="maximize", load_if_exists=True
            )
        except (ValueError, LookupError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{journal}: damaged ({reason}); delete it: trained cells are found again") from error
        self._begun = [t.number for t in self._study.trials if t.params and not t.state.is_finished()]

    @property
    def left(self) -> int:
        """How many trials are still to be finished."""
        return max(0, self._count - sum(trial.state != "not finished" for trial in self.trials()))

    def trials(self) -> list[Trial]:
        """All trials, the best score first; those without one behind, from the lowest rate to the highest."""
        found = [
            Trial(_rounded(t.params["lr"]), _STATES[t.state.name], math.nan if t.value is None else t.value)
            for t in self._study.trials
            if t.params and t.state.name in _STATES
        ]
        return sorted(found, key=lambda t: (t.state != "finished", 0 if math.isnan(t.score) else -t.score, t.rate))

    def ask(self) -> tuple[int, float]:
        """The number of the next trial and its rate, of three digits; first those that an earlier process left."""
        import optuna

        with self._lock:
            trials = self._study.trials
            if self._begun:
                number = self._begun.pop(0)
                return number, _rounded(trials[number].params["lr"])
            # One sampler of one seed would propose its first rates again after each start.
            entropy = np.random.SeedSequence([self._seed, sum(bool(t.params) for t in trials)])
            self._study.sampler = optuna.samplers.TPESampler(seed=int(entropy.generate_state(1)[0]))
            trial = self._study.ask()
            return trial.number, _rounded(trial.suggest_float("lr", self._low, self._high, log=True))

    def tell(self, number: int, rate: float) -> str:
        """A line about the trial whose cell has ended, after its score or its divergence is noted.

        Diverged trials are Optuna's pruned ones, worse than any score: from failed ones it would learn nothing. A trial
        whose cell ended in another way, as by a full disk, stays open, and the next start tries it again.
        """
        from optuna.trial import TrialState

        runs = list(self._cell(rate).glob("*/run.json"))
        run = read_json(runs[0]) if runs else {"status": "failed"}
        said = f"trial {number + 1}: optimizer.lr={rate:.3g}: "
        with self._lock:
            if run["status"] == "finished":
                score = point_scores(self._table(rate), self._task)[METRIC]
                self._study.tell(number, score)
                return f"{said}macro AUROC {score:.3f} on validation in {run['seconds']:.0f} s"
            if "NonFiniteError" in str(run.get("reason")):
                self._study.tell(number, state=TrialState.PRUNED)
                return f"{said}diverged"
        return f"{said}failed"

    def write_results(self, about: dict[str, Any], train: list[str]) -> list[str]:
        """The lines of a table and of what may be said of the best rate, after search.json is written.

        about: what else is to be in search.json. train: the command that the best rate completes.
        """
        trials = self.trials()
        tables = {rate_name(t.rate): self._table(t.rate) for t in trials if t.state == "finished"}
        standings, notes = _standings(tables, self._task)
        records = [_record(trial, standings.get(rate_name(trial.rate))) for trial in trials]
        best = trials[0].rate if tables else None
        command = shlex.join([*train, f"optimizer.lr={best:.3g}"]) if best else None
        notes = [*_notes(records, max(map(len, tables.values()), default=0)), *notes]
        versions = {"covid_cls": covid_cls.__version__, "optuna": version("optuna")}
        result = {"best": best, "train": command, "notes": notes, "trials": records}
        write_json(
            self.folder / "search.json",
            without_nan({**about, "versions": versions, **result, "disclaimer": DISCLAIMER}),
        )
        return [
            "learning rates by macro AUROC on validation",
            text_table([("optimizer.lr", "state", "macro AUROC", "95 %", "tied"), *map(_row, records)]),
            *(f"note: {note}" for note in notes),
            *([f"the best one: {command}"] if command else []),
            f"results in {self.folder}",
            DISCLAIMER,
        ]

    def _cell(self, rate: float) -> Path:
        return self.folder / rate_name(rate)

    def _table(self, rate: float) -> pd.DataFrame:
        (path,) = self._cell(rate).glob("*/predictions-val.csv")
        return read_predictions(path, self._task.classes)


def search_name(settings: dict[str, Any], experiment: str, data_digest: str) -> str:
    """<experiment>/search-<digest>, of what decides its rates and scores: more trials go on with the same search."""
    key = {name: value for name, value in settings["search"].items() if name != "trials"}
    return f"{experiment}/search-{digest(json.dumps(run_digests({**settings, 'search': key}, data_digest)))[:8]}"


def rate_name(rate: float) -> str:
    """The folder in which a search trains with `rate`."""
    return f"lr-{rate:.3g}"


def _record(trial: Trial, standing: Standing | None) -> dict[str, Any]:
    """tied: the paired comparison with the best, Holm-corrected over all pairs, cannot tell them apart."""
    record: dict[str, Any] = {"rate": trial.rate, "state": trial.state}
    if standing is not None:
        interval = standing.interval
        record |= {METRIC: trial.score, "low": interval.low, "high": interval.high, "tied": standing.group == 1}
    return record


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    rate = f"{record['rate']:.3g}"
    if METRIC not in record:
        return rate, record["state"], "", "", ""
    ends = f"{record['low']:.3f}–{record['high']:.3f}"
    return rate, record["state"], f"{record[METRIC]:.3f}", ends, "yes" if record["tied"] else "no"


def _standings(tables: dict[str, pd.DataFrame], task: Task) -> tuple[dict[str, Standing], list[str]]:
    """The places of the tables by their names, and what limits their intervals."""
    if not tables:
        return {}, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        places = leaderboard({name: [table] for name, table in tables.items()}, task, METRIC)
    return {place.name: place for place in places}, list(dict.fromkeys(str(warning.message) for warning in caught))


def _notes(records: list[dict[str, Any]], n_images: int) -> list[str]:
    """What may be said of the best of the records, which is the first."""
    scored = [record for record in records if METRIC in record]
    if not scored:
        return ["no rate could be trained with"]
    notes = [
        f"the best of {len(scored)} scores is optimistic, for it was selected: what counts is the test score of a cell "
        "that is trained anew"
    ]
    if len(scored) > 1:
        tied = sum(record["tied"] for record in scored) - 1
        notes.append(
            f"{tied} of {len(scored) - 1} others are tied: these {n_images} images cannot tell them from the best"
        )
    rates = [record["rate"] for record in records]
    for end, extreme in (("low", min(rates)), ("high", max(rates))):
        if len(rates) > 1 and records[0]["rate"] == extreme:
            notes.append(f"the best rate is the {end}est that was tried; another search.{end} may find a better one")
    return notes


def _rounded(rate: float) -> float:
    """`rate` to three digits, so that what is printed is what was trained with."""
    return float(f"{rate:.3g}")
