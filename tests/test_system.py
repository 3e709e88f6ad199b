"""A signal ends a command in order, whatever it is at: what was finished is saved, and the same command goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from covid_cls.system import SIGNALS, Interrupted, deferred, interruptible, received, safe_point
from tests.conftest import Command, restored_state, start
from tests.test_commands import record, run_folders, weights
from tests.training.small import SMALL


@pytest.fixture(autouse=True)
def no_signal_yet() -> Iterator[None]:
    """A process that no signal has reached, and that handles signals afterwards as it did before."""
    with restored_state():
        yield


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)], ids=str
)
def test_a_signal_ends_the_block_and_names_itself(number: signal.Signals, exit_code: int) -> None:
    with pytest.raises(Interrupted) as stop, interruptible():  # noqa: PT012
        signal.raise_signal(number)
        pytest.fail("went on")
    assert (str(stop.value), stop.value.exit_code, received()) == (number.name, exit_code, number)


def test_further_signals_do_not_break_off_what_the_first_one_began() -> None:
    saved = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGUSR1)
        finally:
            for number in SIGNALS:
                signal.raise_signal(number)
            saved.append("all")

    with pytest.raises(Interrupted, match="SIGUSR1"), interruptible():
        work()
    signal.raise_signal(signal.SIGTERM)  # while the process ends
    assert saved == ["all"]


def test_a_deferred_signal_waits_for_the_next_safe_point() -> None:
    steps = []

    def fit() -> None:
        with deferred():
            for step in range(3):
                safe_point()
                if step == 1:
                    signal.raise_signal(signal.SIGTERM)
                steps.append(step)

    with pytest.raises(Interrupted, match="SIGTERM"), interruptible():
        fit()
    assert steps == [0, 1]


def test_a_deferred_signal_waits_no_longer_than_the_block() -> None:
    with pytest.raises(Interrupted, match="SIGINT"), interruptible():  # noqa: PT012
        with deferred():
            signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")


def test_what_else_comes_of_a_signal_is_put_down_to_it() -> None:
    with pytest.raises(Interrupted, match="SIGTERM") as stop, interruptible(), deferred():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("a worker process was killed, too")
    assert isinstance(stop.value.__cause__, RuntimeError)


def test_without_a_signal_nothing_changes() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError, match="ours"), interruptible(), deferred():  # noqa: PT012
        safe_point()
        raise ValueError("ours")
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert received() is None


def test_a_process_of_a_distributed_run_leaves_signals_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with interruptible():
        for number in SIGNALS:
            signal.raise_signal(number)
    assert received() is None


def test_another_thread_handles_no_signals() -> None:
    seen = []

    def work() -> None:
        with interruptible():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


class Started:
    """`train` in `folder` with these words, in a process group of its own; it has printed `mark`."""

    def __init__(self, folder: Path, environment: dict[str, str], mark: str, *words: str) -> None:
        self.process = start("train", folder, environment, *words)
        assert self.process.stdout is not None
        assert any(mark in line for line in self.process.stdout), self.process.communicate()[1]

    def stopped(self, *numbers: signal.Signals, all_processes: bool) -> tuple[int, list[str]]:
        """The exit code and the lines on stderr, after these signals; all its processes have ended."""
        for number in numbers:
            (os.killpg if all_processes else os.kill)(self.process.pid, number)
            time.sleep(0.05)
        _, errors = self.process.communicate()
        while self._left():  # its children may end after it
            time.sleep(0.1)
        return self.process.returncode, errors.splitlines()

    def _left(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


def said(number: signal.Signals) -> str:
    return f"stopped by {number.name}: the same command continues from the last finished epoch"


@pytest.mark.slow(reason="a signal stops a process")
def test_a_run_stopped_in_training_and_in_predicting_goes_on_to_the_same_weights(
    environment: dict[str, str], train_process: Command, tmp_path: Path
) -> None:
    words = (*SMALL, "strategy=fc", "trainer.max_epochs=6", "logger=none", "baselines=false")
    assert train_process(tmp_path, *words, "output_root=whole").returncode == 0
    (whole,) = run_folders(tmp_path / "whole")

    stopping = Started(tmp_path, environment, "epoch 2/6", *words)  # the checkpoint of the second waits in memory
    assert stopping.stopped(signal.SIGTERM, all_processes=False) == (143, [said(signal.SIGTERM)])
    (folder,) = run_folders(tmp_path / "outputs")
    assert (record(folder)["status"], record(folder)["reason"]) == ("interrupted", "SIGTERM")
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1

    stopping = Started(tmp_path, environment, "epoch 4/6", *words, "data.workers=2")
    code, errors = stopping.stopped(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, all_processes=True)
    assert (code, errors[-1], "Traceback" in str(errors)) == (143, said(signal.SIGUSR1), False)
    assert record(folder)["reason"] == "SIGUSR1"
    last, previous = (folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    before = torch.load(previous, weights_only=True)["epoch"] + 1
    last.write_bytes(last.read_bytes()[:-1])

    stopping = Started(tmp_path, environment, "epoch 6/6", *words, "baselines=true")
    time.sleep(0.3)
    code, errors = stopping.stopped(signal.SIGINT, all_processes=True)
    assert (code, errors[-1], "Traceback" in str(errors)) == (130, said(signal.SIGINT), False)
    assert record(folder)["reason"] == "SIGINT"
    assert not (folder / "metrics.json").exists()
    (note,) = [note for note in record(folder)["notes"] if last.name in note]
    assert f"{previous.relative_to(tmp_path)}, epoch {before}: {last.relative_to(tmp_path)}: damaged" in note

    done = train_process(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "epoch 6/6" not in done.stdout
    assert note in done.stdout  # among those of the results
    expected, found = weights(whole), weights(folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list(folder.rglob(".*.part"))


@pytest.mark.slow(reason="a signal stops a process")
@pytest.mark.parametrize("images", [36, 520])  # decoded in this process, and in others that are still being started
def test_a_command_stopped_before_it_trains_leaves_nothing(
    environment: dict[str, str], tmp_path: Path, images: int
) -> None:
    cache, number = tmp_path / "cache", signal.SIGTERM if images == 36 else signal.SIGINT
    words = [*SMALL, "data.size=1200", "preprocess.crop=1100", f"data.images={images}"]
    mark = f"decoding {images} of {images} images"
    stopping = Started(tmp_path, {**environment, "COVID_CLS_CACHE": str(cache)}, mark, *words)
    time.sleep(0.3)
    assert stopping.stopped(number, all_processes=True) == (128 + number, [said(number)])
    assert not list((cache / "store").glob("*.tmp*"))
    assert not run_folders(tmp_path)


@pytest.mark.slow(reason="a signal stops a run of two processes")
def test_all_processes_of_a_distributed_run_end(environment: dict[str, str], tmp_path: Path) -> None:
    small = [word for word in SMALL if word != "trainer=cpu"]
    words = [*small, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=20"]
    stopping = Started(tmp_path, environment, "epoch 2/20", *words, "strategy=fc", "logger=none")
    assert stopping.stopped(signal.SIGTERM, all_processes=True) == (143, [said(signal.SIGTERM)])
    (folder,) = run_folders(tmp_path)
    assert (record(folder)["status"], record(folder)["reason"]) == ("interrupted", "SIGTERM")
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to cores")
def test_a_process_bound_to_one_core_counts_one() -> None:
    lines = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import covid_cls.system as m; "
    done = subprocess.run(
        [sys.executable, "-c", lines + "print(m.cores())"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"
