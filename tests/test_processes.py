"""Each command once as a user starts it: as a process of its own, from another folder than the package's.

`search` and `benchmark` start processes themselves: tests/test_search.py and
tests/benchmarking/test_benchmark.py start them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from covid_cls.io import write_predictions
from covid_cls.tasks import TASKS
from tests.conftest import SMALL, starter
from tests.evaluation.test_assessment import cohort

pytestmark = pytest.mark.slow(reason="each command is started as a process")


@pytest.fixture(scope="module")
def run_folder(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that `train` left as a process of its own."""
    folder = tmp_path_factory.mktemp("processes")
    words = (*SMALL, "trainer.max_epochs=1", "baselines=false", "logger=none")
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
        ("predict", "model={run} input={images} output=made.csv threshold=argmax", "made.csv"),
        ("explain", "model={run} input={images} output=made device=cpu threshold=argmax", "made"),
        ("export", "model={run} output=made.onnx", "made.onnx"),
        ("audit", "data.images=48 data.size=48 baselines=false output=made", "made/audit.json"),
    ],
)
def test_a_command_leaves_its_results(
    name: str, words: str, left: str, run_folder: Path, phantoms: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    source = next(phantoms.parent.rglob("*.png"))
    (images / "one.png").write_bytes(source.read_bytes())
    done = starter(name, environment)(tmp_path, *words.format(run=run_folder, images=images).split())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / left).exists()


@pytest.mark.parametrize(
    ("name", "words", "code"),
    [
        ("train", ["--help"], 0),
        ("train", ["seeed=1"], 2),
        ("evaluate", ["predictions=scores.csv", "resamples=100"], 0),
        ("evaluate", ["predictions=missing.csv"], 2),
        ("report", ["runs=."], 2),
    ],
)
def test_what_needs_no_network_imports_neither_torch_nor_lightning(
    name: str, words: list[str], code: int, environment: dict[str, str], tmp_path: Path
) -> None:
    write_predictions(cohort(TASKS["binary"]), tmp_path / "scores.csv")
    script = (
        f"import sys; from covid_cls.{name} import main; code = main({words}); "
        "heavy = {'torch', 'torchvision', 'pytorch_lightning'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
