"""What several test folders share: a store for decoded phantoms, and commands started as a user starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a test process for each core is enough
ROOT = Path(__file__).resolve().parents[1]
SMALL = ("data.images=48", "data.size=48", "preprocess.crop=48", "data.batch_size=8", "trainer=cpu")

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for the whole session: phantoms are drawn and decoded once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def environment(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user's shell: no pretrained weights at hand, one thread per process."""
    return {
        **os.environ,
        "COVID_CLS_CACHE": str(cache),
        "TORCH_HOME": str(tmp_path_factory.mktemp("torch_home")),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def starter(name: str, environment: dict[str, str]) -> Command:
    """`python -m covid_cls.<name> *words`, started in `folder`, with its exit code and what it printed."""

    def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"covid_cls.{name}", *words]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)

    return run


def start(name: str, folder: Path, environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    """`python -m covid_cls.<name> *words`, running in `folder` as the head of a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", f"covid_cls.{name}", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="session")
def train(environment: dict[str, str]) -> Command:
    """`train` as a user starts it."""
    return starter("train", environment)


def trained_run(train: Command, folder: Path, *words: str) -> Path:
    """The folder of a run of one epoch on small phantoms, trained in `folder`."""
    done = train(folder, *SMALL, "trainer.max_epochs=1", "logger=none", *words)
    assert done.returncode == 0, done.stderr
    (record,) = folder.rglob("run.json")
    return record.parent


@pytest.fixture(scope="session")
def run(train: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on phantoms; tests may add to its ledger alone."""
    return trained_run(train, tmp_path_factory.mktemp("trained"), "probes=false")


@pytest.fixture(scope="session")
def phantoms(cache: Path, run: Path) -> Path:
    """The manifest of the phantoms that the run was trained on."""
    images = json.loads((run / "run.json").read_text())["config"]["data"]["images"]
    (path,) = cache.glob(f"phantoms/{images}-0-none-*/manifest.csv")
    return path
