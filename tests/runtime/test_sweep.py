"""Runs of a sweep are processes: the end of one does not affect the others, and each failure is named."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from covid_cls.errors import InputError
from covid_cls.io import read_json
from covid_cls.runtime.sweep import Sweep, gpu_slots, run_in_process, visible_gpus
from tests.conftest import Command, start
from tests.test_commands import SMALL, record, run_folders
from tools.soak.sweep import sweep as soak_sweep

# Stands for a command: a process that ends as its first word says.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
word = sys.argv[1]
print("this is", word, flush=True)
if word == "raise": raise ValueError("planted")
if word.isdigit(): sys.exit(int(word))
if word == "kill": os.kill(os.getpid(), signal.SIGKILL)
if word == "wait": time.sleep(600)
if word == "gpu":
    with Path("used.txt").open("a") as file:
        file.write(f"+{os.environ['CUDA_VISIBLE_DEVICES']}\\n"); file.flush()
        while Path("used.txt").read_text().count("+") < 4: time.sleep(0.02)  # until every slot has been taken
        file.write(f"-{os.environ['CUDA_VISIBLE_DEVICES']}\\n")
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweep]:
    """A sweep on four slots of two GPUs, and the module `script` for its runs."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    sweep = Sweep(tmp_path / "sweep", ["a", "b", "a", "b"])
    yield sweep
    if Sweep.current:
        sweep.close()


def statuses(sweep: Sweep) -> list[str]:
    return [read_json(path)["status"] for path in sorted(sweep.folder.glob("job-*.json"))]


@pytest.mark.parametrize(
    ("word", "status", "code", "exit_code", "said"),
    [
        ("fine", "finished", 0, 0, ""),
        ("raise", "failed", 1, 1, "ValueError: planted"),
        ("3", "failed", 3, 1, "exit code 3"),
        ("2", "refused", 2, 2, "this is 2"),
        ("kill", "failed", -9, 1, "killed by SIGKILL, as the system does when memory runs out"),
    ],
)
def test_the_end_of_a_run_is_recorded_and_does_not_affect_the_others(
    sweep: Sweep, word: str, status: str, code: int, exit_code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in_process("script", ["fine", "seed=1"], sweep.folder, 0)
    found = run_in_process("script", [word, "seed=2"], sweep.folder, 1)
    run_in_process("script", ["fine", "seed=3"], sweep.folder, 2)
    assert (found["status"], found["code"]) == (status, code)
    assert statuses(sweep) == ["finished", status, "finished"]
    assert sweep.close() == exit_code
    printed = capsys.readouterr()
    assert f"[1] this is {word}\n" in printed.out
    assert f"this is {word}\n" in Path(found["log"]).read_text()
    assert said in printed.err
    assert (f"failed: {word} seed=2: " in printed.err) == (status != "finished")
    assert str(found["log"]) in printed.err or status == "finished"


def test_no_gpu_is_shared_by_more_runs_than_it_has_slots(sweep: Sweep) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: run_in_process("script", ["gpu"], sweep.folder, number), range(8)))
    assert statuses(sweep) == ["finished"] * 8
    held = {"a": 0, "b": 0}
    most = dict(held)
    for line in Path("used.txt").read_text().split():
        held[line[1:]] += 1 if line[0] == "+" else -1
        most[line[1:]] = max(most[line[1:]], held[line[1:]])
    assert held == {"a": 0, "b": 0}
    assert most == {"a": 2, "b": 2}


def test_a_signal_ends_the_current_run_and_starts_no_further_one(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    log = sweep.folder / "job-0.log"

    def kill() -> None:
        while not (log.is_file() and "this is wait" in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill, daemon=True).start()
    assert run_in_process("script", ["wait"], sweep.folder, 0)["status"] == "stopped"
    assert run_in_process("script", ["fine"], sweep.folder, 1)["status"] == "not started"
    assert sweep.close() == 143
    assert "1 stopped, 1 not started" in capsys.readouterr().out


def test_fail_fast_starts_no_run_after_a_failure(sweep: Sweep) -> None:
    for number, word in enumerate(("fine", "raise", "fine")):
        run_in_process("script", [word], sweep.folder, number, fail_fast=True)
    assert statuses(sweep) == ["finished", "failed", "not started"]
    assert sweep.close() == 1


def test_a_run_whose_watching_process_died_is_named(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_in_process("script", ["fine"], sweep.folder, 0)
    lost = {key: value for key, value in found.items() if key != "code"} | {"status": "running"}
    (sweep.folder / "job-0.json").write_text(json.dumps(lost))
    assert sweep.close() == 1
    assert "exited without reporting a status" in capsys.readouterr().err


def test_slots_are_the_gpus_that_runs_may_share() -> None:
    assert gpu_slots({"accelerator": "cpu"}, 2) == []
    assert gpu_slots({"accelerator": "auto", "strategy": "ddp"}, 2) == []
    with pytest.raises(InputError, match=r"sweep\.jobs_per_gpu=0"):
        gpu_slots({"accelerator": "auto"}, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpus_are_named_as_cuda_names_them() -> None:
    assert visible_gpus("auto")[0] == os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


@pytest.mark.slow(reason="a sweep starts a process for each run")
def test_a_sweep_continues_after_a_refused_run(train_process: Command, tmp_path: Path) -> None:
    words = ("-m", *SMALL, "trainer.max_epochs=1", "loss=ce,focal", "preprocess.sd=0.2,0.0", "test=false", "name=sweep")
    done = train_process(tmp_path, *words)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(("failed: ", "    "))]
    assert said[0].startswith("failed: loss=ce preprocess.sd=0.0: exit code 2; ")
    assert said[1].startswith("    error: preprocess.sd=0.0: must be above 0")
    assert said[2].startswith("failed: loss=focal preprocess.sd=0.0: exit code 2; ")
    assert said[3:] == ["    the same error as above"]
    assert "2 finished, 2 refused" in done.stdout
    found = run_folders(tmp_path / "outputs" / "sweep")
    assert len(found) == 2
    assert {record(folder)["status"] for folder in found} == {"finished"}
    assert not list(found[0].glob("predictions-test.csv"))
    before = [(folder / "run.json").stat().st_mtime_ns for folder in found]
    again = train_process(tmp_path, *words)
    assert again.returncode == 2
    assert again.stdout.count("finished before: outputs/sweep/binary-resnet18-") == 2
    assert again.stdout.count("] $ ") == 2  # processes for the two that failed alone
    assert [(folder / "run.json").stat().st_mtime_ns for folder in found] == before


@pytest.mark.slow(reason="a sweep starts a process for each run")
def test_submitit_runs_even_of_several_processes(train_process: Command, tmp_path: Path) -> None:
    words = [word for word in SMALL if word != "trainer=cpu"]
    ddp = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=1")
    done = train_process(tmp_path, "-m", "hydra/launcher=submitit_local", *words, *ddp, "seed=4", "strategy=fc")
    assert done.returncode == 0, done.stderr
    (folder,) = run_folders(tmp_path)
    assert record(folder)["status"] == "finished"
    (job,) = (tmp_path / "outputs" / "sweeps").glob("*/job-0.json")
    assert Path(read_json(job)["run"]) == folder.relative_to(tmp_path)


@pytest.mark.slow(reason="a sweep starts a process for each run")
def test_a_sweep_names_what_failed_and_does_only_that_again(tmp_path: Path) -> None:
    outcome = soak_sweep(5, tmp_path)
    assert outcome.held, outcome


@pytest.mark.slow(reason="a sweep starts a process for each run")
def test_a_preempted_job_is_started_again_and_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    words = [*SMALL, "trainer.max_epochs=40", "callbacks=no_early_stopping", "baselines=false", "logger=none", "seed=0"]
    process = start("train", tmp_path, environment, "-m", "hydra/launcher=submitit_local", *words, "test=false")
    while "epoch 3/40" not in printed(tmp_path):
        assert process.poll() is None
        time.sleep(0.2)
    for child in psutil.Process(process.pid).children(recursive=True):  # as Slurm does: to each process of the job
        if "submitit.core._submit" in child.cmdline() or "hydra.mode=RUN" in child.cmdline():
            child.send_signal(signal.SIGUSR2)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "epoch 1/40" not in printed(tmp_path)  # of the job that was put back
    assert "epoch 40/40" in printed(tmp_path)
    (folder,) = run_folders(tmp_path)
    assert record(folder)["status"] == "finished"


def printed(folder: Path) -> str:
    """Return what the last start of the first run has printed."""
    return "".join(path.read_text() for path in folder.glob("outputs/sweeps/*/job-0.log"))


@pytest.mark.parametrize("word", ["sweep.jobs_per_gpu=0", "sweep.fail_first=true"])
def test_a_wrong_setting_of_the_sweep_is_refused_before_any_run(train: Command, tmp_path: Path, word: str) -> None:
    done = train(tmp_path, "-m", *SMALL, word)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("outputs/sweeps/*/job-*"))


@pytest.fixture
def two_at_once(environment: dict[str, str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A sweep of three runs, two at a time, after both have finished an epoch; and its words."""
    words = ["-m", *SMALL, "trainer.max_epochs=40", "callbacks=no_early_stopping", "seed=0,1,2", "strategy=fc"]
    words += ["baselines=false", "logger=none", "checkpoint_seconds=0", "hydra.launcher.n_jobs=2"]
    process = start("train", tmp_path, environment, *words)
    assert process.stdout is not None
    held: list[int] = []
    for line in process.stdout:
        if "epoch 2/40" in line:  # held there: the other may start so much later that this one would be through
            held.append(next(job["pid"] for job in jobs(tmp_path) if str(job["job"]) == line[1]))
            os.kill(held[-1], signal.SIGSTOP)
        if len(held) == 2:
            break
    assert len(held) == 2, process.communicate()[1]
    for pid in held:
        os.kill(pid, signal.SIGCONT)
    yield process, words
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def jobs(folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted(folder.glob("outputs/sweeps/*/job-*.json"))]


@pytest.mark.slow(reason="signals and kills end the processes of a sweep")
def test_ctrl_c_stops_a_sweep_that_goes_on(
    two_at_once: tuple[subprocess.Popen[str], list[str]], train_process: Command, tmp_path: Path
) -> None:
    process, words = two_at_once
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to every process of the group
    out, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "2 stopped, 1 not started" in out
    assert "Traceback" not in out + errors
    assert {record(folder)["status"] for folder in run_folders(tmp_path)} == {"interrupted"}
    again = train_process(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert "epoch 1/40" not in "".join(line for line in again.stdout.splitlines() if line.startswith(("[0]", "[1]")))
    assert {record(folder)["status"] for folder in run_folders(tmp_path)} == {"finished"}
    assert len(run_folders(tmp_path)) == 3


@pytest.mark.slow(reason="signals and kills end the processes of a sweep")
def test_a_killed_sweep_leaves_no_process_running(
    two_at_once: tuple[subprocess.Popen[str], list[str]], tmp_path: Path
) -> None:
    process, _ = two_at_once
    assert [job["status"] for job in jobs(tmp_path)] == ["running", "running"]
    running = [job["pid"] for job in jobs(tmp_path)]
    process.kill()
    process.wait()
    while any(map(alive, [*running, -process.pid])):  # the runs and the launcher's processes end by themselves
        time.sleep(0.2)
    assert {record(folder)["status"] for folder in run_folders(tmp_path)} == {"interrupted"}


def alive(pid: int) -> bool:
    """Whether there is such a process, or one of the group -pid."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
