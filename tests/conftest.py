"""What several test folders share: commands in this process or in their own, small finished runs, drawn radiographs."""

import contextlib
import functools
import hashlib
import importlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a test process for each core is enough
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from covid_cls import system
from covid_cls.runtime.cli import Job, conf_folder
from covid_cls.runtime.schema import plain_settings
from covid_cls.runtime.sweep import Sweep

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("data.images=48", "data.size=48", "preprocess.crop=48", "data.batch_size=8", "trainer=cpu")

Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a slow test without a reason: it is left out of the quick tier."""
    for item in items:
        for mark in item.iter_markers("slow"):
            if not mark.kwargs.get("reason"):
                raise pytest.UsageError(f"{item.nodeid}: give @pytest.mark.slow a reason=")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this call of pytest share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def cache(shared: Path) -> Path:
    """A cache folder for the session: phantoms are drawn and decoded once."""
    folder = shared / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a run folder that is deleted after the test: checkpoints have 80 MB each."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def environment(cache: Path, shared: Path) -> dict[str, str]:
    """The environment of a user's shell: no pretrained weights available, one thread per process."""
    return {
        **os.environ,
        "COVID_CLS_CACHE": str(cache),
        "TORCH_HOME": str(shared / "torch_home"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@contextlib.contextmanager
def restored_state() -> Iterator[None]:
    """Restore what a command changes in its process: Hydra, logging, random seeds, signal handlers, threads, folder."""
    root, folder, threads = logging.getLogger(), Path.cwd(), torch.get_num_threads()
    handlers, level, lightning = list(root.handlers), root.level, logging.getLogger("pytorch_lightning").level
    seeds = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  # the global generator
    signals = {number: signal.getsignal(number) for number in (*system.SIGNALS, signal.SIGCHLD)}
    try:
        with mock.patch.dict(os.environ), warnings.catch_warnings():
            yield
    finally:
        os.chdir(folder)
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        Sweep.current = None
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("pytorch_lightning").setLevel(lightning)
        logging.disable(logging.NOTSET)
        random.setstate(seeds[0])
        np.random.set_state(seeds[1])  # noqa: NPY002
        torch.set_rng_state(seeds[2])
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
        for number, handler in signals.items():
            signal.signal(number, handler)
        system._state.received, system._state.deferred = None, False


def command(name: str, environment: dict[str, str]) -> Command:
    """`covid_cls.<name>` run in this process, in `folder`, with its exit code and what it printed."""

    def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with restored_state(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            os.environ.update(environment)
            os.chdir(folder)
            try:
                code = importlib.import_module(f"covid_cls.{name}").main(words)
            except Exception:
                traceback.print_exc()
                code = 1
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    return run


@functools.cache
def _defaults(config_name: str) -> DictConfig:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(config_name)


def quick_job(config_name: str, *words: str) -> Job:
    """Return the job of words that only set values. The configuration is composed once, which takes half a second."""
    merged = OmegaConf.merge(_defaults(config_name), OmegaConf.from_dotlist(list(words)))
    assert isinstance(merged, DictConfig)
    return Job(plain_settings(merged), f"python -m covid_cls.{config_name}", None, list(words))


def starter(name: str, environment: dict[str, str]) -> Command:
    """`python -m covid_cls.<name> *words` as a process, started in `folder`, with its exit code and what it printed."""

    def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        words_of_process = [sys.executable, "-m", f"covid_cls.{name}", *words]
        return subprocess.run(words_of_process, cwd=folder, env=environment, capture_output=True, text=True)

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
    """`train` in this process."""
    return command("train", environment)


@pytest.fixture(scope="session")
def train_process(environment: dict[str, str]) -> Command:
    """`train` as a user starts it: a process of its own."""
    return starter("train", environment)


class FinishedRuns:
    """Small runs that are trained once per call of pytest and configuration, whichever test process asks first.

    Tests only read them; a test that changes a run works on a `copy`.
    """

    def __init__(self, folder: Path, train: Command) -> None:
        self.folder, self.train = folder, train

    def __call__(self, *words: str) -> Path:
        """Return the folder of the finished run of these words: of one epoch on small phantoms unless they differ."""
        return self._trained(*words)[0]

    def printed(self, *words: str) -> str:
        """Return what the training of these words printed to stdout."""
        return self._trained(*words)[1]

    def copy(self, folder: Path, *words: str) -> Path:
        """Copy the run to outputs/phantom/<its name> in `folder`, for a test that changes it."""
        run = self(*words)
        copied = folder / "outputs" / "phantom" / run.name
        shutil.copytree(run, copied)
        return copied

    def _trained(self, *words: str) -> tuple[Path, str]:
        place = self.folder / hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]
        self.folder.mkdir(exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            if not (place / "stdout.txt").is_file():
                place.mkdir(exist_ok=True)
                done = self.train(place, *SMALL, "trainer.max_epochs=1", "logger=none", *words)
                assert done.returncode == 0, done.stderr
                (place / "stdout.txt").write_text(done.stdout, encoding="utf-8")
        (record,) = place.rglob("run.json")
        return record.parent, (place / "stdout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def finished_runs(train: Command, shared: Path) -> FinishedRuns:
    """Small finished runs, trained once; see `FinishedRuns`."""
    return FinishedRuns(shared / "finished_runs", train)


@pytest.fixture(scope="session")
def run(finished_runs: FinishedRuns) -> Path:
    """The folder of a finished run on phantoms, not to be changed."""
    return finished_runs("baselines=false")


@pytest.fixture(scope="session")
def phantoms(cache: Path, run: Path) -> Path:
    """The manifest of the phantoms that the run was trained on."""
    images = json.loads((run / "run.json").read_text())["config"]["data"]["images"]
    (path,) = cache.glob(f"phantoms/{images}-0-none-*/manifest.csv")
    return path
