"""A seed determines every bit of the results: after a kill, with any number of workers, and anywhere in a sweep."""

from pathlib import Path

import psutil
import pytest
import torch
from pytorch_lightning import seed_everything

from covid_cls.experiment import run_experiment
from covid_cls.training.checkpoints import read_checkpoint
from covid_cls.training.run_folder import open_run
from tests.conftest import Command
from tests.training.small import compose_small, make_data
from tools.soak.kills import WORDS, Start

SHORT = (*WORDS, "trainer.max_epochs=2")


def finished(run: Start) -> dict[str, str]:
    """Wait until the command of a run has ended, and return the digests of its results."""
    run.process.wait()
    run.end()
    return run.results()


@pytest.mark.slow(reason="a process is killed while it trains")
def test_a_killed_run_continues_to_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    expected = finished(Start(tmp_path / "undisturbed", 3))
    words = ("data.workers=2", "checkpoint_seconds=0")
    killed = Start(tmp_path / "killed", 3, *words)
    killed.wait_for("epoch 1/")
    workers = killed.kill()
    # Immediately, as an impatient user does.
    again = Start(tmp_path / "killed", 3, *words)
    # The workers exit without being killed.
    psutil.wait_procs(workers)
    assert finished(again) == expected


def trained_here(folder: Path, cache: Path, *words: str) -> Path:
    """Train the run of these settings in this process, whatever it has done before, and return its folder."""
    settings = compose_small(*SHORT, *words)
    seed_everything(settings["seed"], verbose=False)
    data = make_data(settings, cache)
    with open_run(folder, settings, data.digest) as run:
        run_experiment(settings, data, run, [])
    return run.folder


def assert_same_bits(one: Path, two: Path) -> None:
    for name in ("best", "last"):
        expected, found = (read_checkpoint(run / "checkpoints" / f"{name}.ckpt")["state_dict"] for run in (one, two))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    for name in ("predictions-val.csv", "predictions-test.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.slow(reason="a sweep starts a process for each run")
# The test uses more workers than this machine may have cores.
@pytest.mark.filterwarnings("ignore:.*worker processes in total:UserWarning")
def test_neither_workers_nor_the_position_in_a_sweep_change_a_bit(
    train_process: Command, cache: Path, tmp_path: Path
) -> None:
    swept = train_process(tmp_path, "-m", *SHORT, "seed=1,0", "data.workers=2", "hydra.launcher.n_jobs=2")
    assert swept.returncode == 0, swept.stderr
    first, second = sorted((tmp_path / "outputs" / "phantom").iterdir(), key=lambda run: "-s0-" in run.name)
    none, four = (trained_here(tmp_path / n, cache, f"data.workers={n}") for n in ("0", "4"))
    assert_same_bits(none, four)
    assert_same_bits(none, second)
    # With another seed the compared values do differ.
    with pytest.raises(AssertionError):
        assert_same_bits(none, first)
