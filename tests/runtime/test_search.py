"""The search for a learning rate: it sees validation only, ranks its runs and marks ties."""

import json
from pathlib import Path

import pandas as pd
import pytest

from covid_cls import search
from covid_cls.io import prediction_columns, write_json, write_predictions
from covid_cls.reporting.search_ranking import rank_by_validation
from covid_cls.runtime.cli import compose_job
from tests.conftest import SMALL, Command

SEARCH = ("-m", "experiment=learning_rate")


def test_the_recipe_leaves_the_test_split_alone() -> None:
    settings = compose_job("train", ["experiment=learning_rate"]).settings
    assert (settings["test"], settings["baselines"], settings["audit"]) == (False, False, "off")


def test_a_search_that_would_see_the_test_split_is_refused(train: Command, tmp_path: Path) -> None:
    done = train(tmp_path, *SEARCH, *SMALL, "test=true")
    assert done.returncode == 2
    assert "test=True: a search must not see the test split; leave test out" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_former_command_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["backbone=resnet18", "search.trials=30"]) == 2
    printed = capsys.readouterr().err
    assert "python -m covid_cls.train -m experiment=learning_rate backbone=resnet18" in printed
    assert "search.trials is now hydra.sweeper.n_trials" in printed


def job(folder: Path, rate: str, covid: list[float]) -> dict[str, object]:
    """A finished job whose run predicts `covid` for eight images, of which the first four are covid."""
    labels = ["covid"] * 4 + ["normal"] * 4
    table = pd.DataFrame(
        [
            [f"{k}.png", f"p{k}", "", "val", "", label, p, 1 - p, p, 1 - p]
            for k, (label, p) in enumerate(zip(labels, covid, strict=True))
        ],
        columns=prediction_columns(["covid", "normal"]),
    )
    write_predictions(table, folder / rate / "predictions-val.csv")
    write_json(folder / rate / "run.json", {"config": {"task": {"name": "binary"}}})
    return {"words": [f"optimizer.lr={rate}", "seed=0"], "run": str(folder / rate)}


def test_runs_are_ranked_and_ties_are_marked(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "0.1", [0.4, 0.3, 0.2, 0.1, 0.9, 0.8, 0.7, 0.6]),
        job(tmp_path, "0.01", [0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1]),
    ]
    lines = "\n".join(rank_by_validation(jobs)).splitlines()
    assert "optimizer.lr=0.01" in lines[2]
    assert "1.000" in lines[2]
    assert "optimizer.lr=0.1 " in lines[3]
    assert "0.000" in lines[3]
    assert "seed=0" not in "".join(lines)
    tied = rank_by_validation([jobs[1], {**jobs[1], "words": ["optimizer.lr=0.02", "seed=0"]}])
    assert any("1 of 1 other runs cannot be told apart from the best one by 8 images" in line for line in tied)


@pytest.mark.slow(reason="a sweep starts a process for each run")
def test_the_same_search_continues_with_the_runs_that_are_finished(train_process: Command, tmp_path: Path) -> None:
    words = (*SEARCH, *SMALL, "trainer.max_epochs=1", "strategy=fc", "logger=none", "backbone.weights=none")
    first = train_process(tmp_path, *words, "hydra.sweeper.n_trials=1")
    assert first.returncode == 0, first.stderr
    again = train_process(tmp_path, *words, "hydra.sweeper.n_trials=2")
    assert again.returncode == 0, again.stderr
    assert "[0] finished before:" in again.stdout
    assert "runs of the search by macro AUROC on validation" in again.stdout
    runs = sorted((tmp_path / "outputs" / "learning_rate").iterdir())
    assert len(runs) == 2
    assert not list(tmp_path.rglob("predictions-test.csv"))
    rates = {json.loads((run / "run.json").read_text())["config"]["optimizer"]["lr"] for run in runs}
    assert len(rates) == 2
