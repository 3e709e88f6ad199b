"""Each command once as a user starts it: as a process of its own, from another folder than the package's."""

import json
from pathlib import Path

import pytest

from tests.conftest import SMALL, starter

pytestmark = pytest.mark.slow(reason="each command is started as a process")


@pytest.fixture(scope="module")
def run_folder(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that `train` left as a process of its own."""
    folder = tmp_path_factory.mktemp("processes")
    words = (*SMALL, "trainer.max_epochs=1", "probes=false", "logger=none")
    done = starter("train", environment)(folder, *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (record,) = folder.glob("outputs/phantom/*/run.json")
    return record.parent


def test_train_leaves_a_finished_run_below_the_folder_it_was_started_in(run_folder: Path) -> None:
    assert json.loads((run_folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


@pytest.mark.parametrize(
    ("name", "words", "left"),
    [
        ("evaluate", "run={run} output=made resamples=100", "made/metrics.json"),
        ("report", "runs={run} output=made resamples=100", "made/index.html"),
        ("predict", "model={run} input={images} output=made.csv", "made.csv"),
        ("explain", "model={run} input={images} output=made device=cpu", "made"),
        ("export", "model={run} output=made.onnx", "made.onnx"),
        ("audit", "data.images=48 data.size=48 probes=false output=made", "made/audit.json"),
    ],
)
def test_a_command_leaves_its_results(
    name: str, words: str, left: str, run_folder: Path, phantoms: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (source,) = list(phantoms.parent.rglob("*.png"))[:1]
    (images / "one.png").write_bytes(source.read_bytes())
    done = starter(name, environment)(tmp_path, *words.format(run=run_folder, images=images).split())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / left).exists()


def test_search_tries_its_rates(environment: dict[str, str], tmp_path: Path) -> None:
    words = (*SMALL, "trainer.max_epochs=1", "strategy=fc", "logger=none", "search.trials=2")
    done = starter("search", environment)(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.rglob("search.json")
    assert len(json.loads(found.read_text(encoding="utf-8"))["trials"]) == 2


def test_benchmark_compares_both_loops(environment: dict[str, str], tmp_path: Path) -> None:
    words = (*SMALL, "rounds=1", "epochs=1", "images=16", "start=false", "output=made")
    done = starter("benchmark", environment)(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "benchmark.json").is_file()
