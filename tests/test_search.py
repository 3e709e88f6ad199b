"""The search for the learning rate: validation decides alone, and what was tried is not tried again."""

import json
import os
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.summary import summarise
from covid_cls.labels import TASKS
from covid_cls.records import read_predictions, write_json, write_predictions
from covid_cls.reporting.search import RateSearch, rate_name
from tests.conftest import Command, command, start

BINARY = TASKS["binary"]
OPTIMUM = 1e-3


def leave_cell(search: RateSearch, rate: float, **facts: Any) -> None:
    """What a cell leaves that was trained with `rate`: the farther from OPTIMUM, the more noise is in its scores."""
    cell = search.folder / rate_name(rate) / "binary-resnet18"
    write_json(cell / "run.json", {"status": "finished", "seconds": 1.0, **facts})
    labels = np.arange(60) % 2
    noise = np.random.default_rng(0).normal(size=60) * (0.3 + abs(np.log10(rate / OPTIMUM)))
    prob = 1 / (1 + np.exp(-(1 - 2 * labels + noise)))
    table = pd.DataFrame({"image_id": [f"i{k}" for k in range(60)], "patient_id": [f"p{k}" for k in range(60)]})
    table = table.assign(source="", label=[BINARY.classes[k] for k in labels], split="val", fold=np.nan)
    table = table.assign(logit_covid=np.log(prob / (1 - prob)), logit_normal=0.0, prob_covid=prob, prob_normal=1 - prob)
    write_predictions(table, cell / "predictions-val.csv")


def new_search(trials: int = 14, seed: int = 0) -> RateSearch:
    return RateSearch(trials, 1e-5, 1e-1, seed)


def tried(folder: Path, search: RateSearch) -> list[float]:
    """The rates that a search tries where nothing stops it."""
    rates = []
    with search.opened(folder, BINARY):
        while search.left:
            number, rate = search.ask()
            leave_cell(search, rate)
            search.tell(number, rate)
            rates.append(rate)
    return rates


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The folder of a finished search, and its rates in turn; the last four are Optuna's, the first ten random."""
    folder = tmp_path_factory.mktemp("search")
    return folder, tried(folder, new_search())


def test_a_search_that_is_stopped_at_every_trial_tries_the_same_rates(
    undisturbed: tuple[Path, list[float]], tmp_path: Path
) -> None:
    rates = []
    for _ in range(14):
        stopped, again = new_search(), new_search()
        with stopped.opened(tmp_path, BINARY):
            asked = stopped.ask()
        with again.opened(tmp_path, BINARY):
            number, rate = again.ask()
            assert (number, rate) == asked
            leave_cell(again, rate)
            again.tell(number, rate)
        rates.append(rate)
    assert rates == undisturbed[1]
    assert len(set(rates)) == 14
    with again.opened(tmp_path, BINARY):
        assert again.left == 0


def test_the_seed_decides_the_rates_and_the_range_holds_them(
    undisturbed: tuple[Path, list[float]], tmp_path: Path
) -> None:
    others = tried(tmp_path, new_search(3, seed=1))
    assert not set(others) & set(undisturbed[1])
    assert all(1e-5 <= rate <= 1e-1 for rate in [*others, *undisturbed[1]])


def test_trials_that_run_at_once_are_different_ones(tmp_path: Path) -> None:
    search = new_search(12)

    def one(_: int) -> int:
        number, rate = search.ask()
        leave_cell(search, rate)
        search.tell(number, rate)
        return number

    with search.opened(tmp_path, BINARY), ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(one, range(search.left))) == list(range(12))
        assert len({trial.rate for trial in search.trials()}) == 12
        assert search.left == 0


def test_a_known_optimum_is_found_and_reported(undisturbed: tuple[Path, list[float]]) -> None:
    folder, rates = undisturbed
    search = new_search()
    with search.opened(folder, BINARY):
        lines = search.write_results({"command": "search"}, ["python", "-m", "covid_cls.train", "data.root=my set"])
    result = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    away = abs(np.log10(np.array(rates) / OPTIMUM))
    assert away[rates.index(result["best"])] < 0.2
    scores = [trial["macro_auroc"] for trial in result["trials"]]
    assert scores == sorted(scores, reverse=True)
    assert {trial["rate"] for trial in result["trials"]} == set(rates)
    tied = [trial["tied"] for trial in result["trials"]]
    assert tied[0]
    assert not tied[-1]
    assert any(f"{sum(tied) - 1} of 13 others are tied: these 60 images" in line for line in lines)
    assert any("optimistic, for it was selected" in note for note in result["notes"])
    assert result["train"] == f"python -m covid_cls.train 'data.root=my set' optimizer.lr={result['best']}"
    assert f"the best one: {result['train']}" in lines


def test_a_rate_that_diverges_is_done_with_and_a_cell_that_was_killed_is_not(tmp_path: Path) -> None:
    search = new_search(4)
    with search.opened(tmp_path, BINARY):
        (_, first), (_, second), (_, third), (_, fourth) = asked = [search.ask() for _ in range(4)]
        for rate in (first, second):
            leave_cell(search, rate)
        leave_cell(search, third, status="failed", reason="NonFiniteError: the training loss became nan")
        leave_cell(search, fourth, status="failed", reason="OSError: No space left on device")
        said = [search.tell(*trial) for trial in asked]
        assert [line.split(": ")[-1] for line in said[2:]] == ["diverged", "failed"]
        assert search.left == 1
        states = {trial.rate: trial.state for trial in search.trials()}
        assert states == {first: "finished", second: "finished", third: "diverged", fourth: "not finished"}
        assert "in 1 s" in said[0]
    again = new_search(5)
    with again.opened(tmp_path, BINARY):
        assert again.left == 2
        assert again.ask() == asked[3]
        assert again.ask()[1] not in states


def test_the_end_of_the_range_is_named_where_the_best_rate_lies_there(tmp_path: Path) -> None:
    search = RateSearch(3, 1e-5, 1e-4, 0)
    tried(tmp_path, search)
    with search.opened(tmp_path, BINARY):
        lines = search.write_results({}, ["train"])
    assert any("the best rate is the highest that was tried; another search.high" in line for line in lines)


def test_a_damaged_journal_and_a_search_that_runs_are_refused(tmp_path: Path) -> None:
    tried(tmp_path, new_search(1))
    with (
        new_search().opened(tmp_path, BINARY),
        pytest.raises(InputError, match=rf"process {os.getpid()} on host .* is at this very search"),
        new_search().opened(tmp_path, BINARY),
    ):
        pass
    journal = tmp_path / "trials.journal"
    journal.write_bytes(journal.read_bytes()[:40] + b"\n" + journal.read_bytes()[40:])
    with pytest.raises(InputError, match=r"trials\.journal: damaged"), new_search().opened(tmp_path, BINARY):
        pass
    anew = new_search()
    with anew.opened(tmp_path, BINARY, anew=True):
        assert anew.trials() == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trials": 0}, r"search\.trials=0"),
        ({"low": 0.0}, r"search\.low=0\.0"),
        ({"low": 1.0}, "0 < low < high"),
        ({"high": float("inf")}, "0 < low < high"),
        ({"seed": -1}, r"search\.seed=-1"),
    ],
)
def test_settings_that_make_no_search_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        RateSearch(**{"trials": 1, "low": 1e-5, "high": 1e-1, "seed": 0, **settings})


WORDS = (
    *("data.images=36", "data.size=32", "preprocess.crop=32", "data.batch_size=6", "trainer=cpu"),
    *("trainer.max_epochs=1", "backbone.weights=none", "logger=none"),
)


@pytest.fixture(scope="module")
def search(environment: dict[str, str]) -> Command:
    """`search` in this process; each rate that it tries is trained in a process of its own."""
    return command("search", environment)


@pytest.mark.slow(reason="a search starts a process for each rate, and a signal stops it")
def test_a_search_reads_validation_alone_and_goes_on_where_it_was_stopped(
    search: Command, environment: dict[str, str], tmp_path: Path
) -> None:
    with start("search", tmp_path, environment, *WORDS, "search.trials=2") as process:
        assert process.stdout is not None
        second = next(line for line in process.stdout if line.startswith("[1] $ "))
        os.kill(process.pid, signal.SIGINT)
        errors = process.communicate()[1]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    ((first, before),) = [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("predictions-val.csv")]

    # The trial that was under way, with its rate, and another one; the one that was finished is not started again.
    done = search(tmp_path, *WORDS, "search.trials=3")
    assert done.returncode == 0, done.stderr
    assert second in done.stdout
    assert [line[:3] for line in done.stdout.splitlines() if "] $ " in line] == ["[1]", "[2]"]
    assert first.stat().st_mtime_ns == before
    assert not list(tmp_path.rglob("predictions-test.csv"))

    (path,) = tmp_path.glob("outputs/phantom/search-*/search.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert len({trial["rate"] for trial in result["trials"]}) == 3
    for trial in result["trials"]:
        assert trial["state"] == "finished"
        (cell,) = (path.parent / rate_name(trial["rate"])).iterdir()
        config = json.loads((cell / "run.json").read_text(encoding="utf-8"))["config"]
        assert (config["test"], config["probes"], config["audit"]) == (False, False, "off")
        assert config["optimizer"]["lr"] == trial["rate"]
        table = read_predictions(cell / "predictions-val.csv", BINARY.classes)
        assert trial["macro_auroc"] == pytest.approx(summarise(table, BINARY)["overall"]["macro_auroc"])
    assert result["best"] == max(result["trials"], key=lambda trial: trial["macro_auroc"])["rate"]
    assert result["train"] == shlex.join(["python", "-m", "covid_cls.train", *WORDS, f"optimizer.lr={result['best']}"])
    assert f"the best one: {result['train']}" in done.stdout


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("test=true", "error: test=True: what selects must not see the test split"),
        ("optimizer.lr=0.1", "error: optimizer.lr: is what is searched"),
        ("search.trials=many", "error: search.trials=many: expected int"),
    ],
)
def test_words_that_do_not_fit_a_search_are_refused_before_any_cell(
    search: Command, tmp_path: Path, word: str, says: str
) -> None:
    done = search(tmp_path, *WORDS, word)
    assert done.returncode == 2
    assert done.stderr.startswith(says)
    assert len(done.stderr.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_multirun_of_searches_is_refused(search: Command, tmp_path: Path) -> None:
    done = search(tmp_path, "-m", *WORDS, "strategy=fc,partial")
    assert done.returncode == 2
    assert "error: -m: a search is of one cell; give one value for each key" in done.stderr
    assert "sweep of" not in done.stdout


@pytest.mark.slow(reason="a search starts a process for each rate")
def test_what_fails_at_every_rate_is_tried_once(search: Command, tmp_path: Path) -> None:
    done = search(tmp_path, *WORDS, "preprocess.sd=0")
    assert done.returncode == 2
    assert done.stdout.count("] $ ") == 1
    assert "error: preprocess.sd=0: must be above 0" in done.stderr


def test_without_optuna_the_remedy_is_named(search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)  # an import of it raises ImportError
    done = search(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: Optuna 4.4 or later is not installed: pip install 'covid_cls[search]'\n"
