"""Processes that measure, the start of a training, and memory."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from covid_cls.benchmarking import timing
from covid_cls.benchmarking.timing import (
    PARTS,
    STEPPED,
    TRAIN_ONE_STEP,
    Stopwatch,
    run_separately,
    seconds_to_first_step,
    step_flops,
)
from covid_cls.data.manifest import read_folder
from covid_cls.errors import InputError
from tests.conftest import SMALL

STARTS_PROCESS = pytest.mark.slow(reason="a process is started that imports torch")


@STARTS_PROCESS
def test_a_separate_process_returns_the_result() -> None:
    assert run_separately(math.sqrt, 16.0) == 4.0


@STARTS_PROCESS
@pytest.mark.parametrize(
    ("function", "argument", "kind", "message"),
    [
        (read_folder, Path("nowhere"), InputError, "nowhere: no such folder"),
        (math.sqrt, -1.0, RuntimeError, "ValueError"),
        (os._exit, 3, RuntimeError, "exit code 3"),
    ],
)
def test_an_error_in_a_separate_process_is_raised_again(
    function: Any, argument: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        run_separately(function, argument)


@STARTS_PROCESS
def test_an_error_before_the_first_request_is_raised_again() -> None:
    with pytest.raises(RuntimeError, match="TypeError"), timing.separate_process(math.sqrt) as ask:
        ask("about")


def test_parts_of_an_epoch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(100.0)
    # Each reading of this clock advances it by a second.
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    watch = Stopwatch()
    for part in (*PARTS, "data"):
        watch.mark(part)
    assert watch.stop() == {"seconds": 5.0, "data": 2.0, "forward": 1.0, "backward": 1.0}


@STARTS_PROCESS
def test_a_training_is_ended_after_its_first_step(tmp_path: Path) -> None:
    # A stand-in for `train`, which would have to import Lightning.
    package = tmp_path / "covid_cls"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "Path('started').write_text(' '.join(sys.argv[1:]))\n"
        "torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()\n"
        "Path('continued').touch()\n"
    )
    done = subprocess.run([sys.executable, "-c", TRAIN_ONE_STEP, "a=1", "b=2"], cwd=tmp_path)
    assert done.returncode == STEPPED
    assert (tmp_path / "started").read_text() == "a=1 b=2"
    assert not (tmp_path / "continued").exists()


@STARTS_PROCESS
def test_the_first_step_of_train_is_found(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = timing.time_starts([*SMALL, "logger=none"], pairs=1)
    assert all(found["medians"][name] > 0 for name in ("first_step", "imports"))


@STARTS_PROCESS
def test_a_training_without_a_first_step_is_reported() -> None:
    with pytest.raises(InputError, match=r"exit code 2 before its first step: error: .*no_such_setting"):
        seconds_to_first_step(["no_such_setting=1"])


def test_memory_is_measured_in_bytes() -> None:
    found = timing.process_memory()
    if found["resident_bytes"] is not None:
        assert 50e6 < found["resident_bytes"] <= found["peak_bytes"] < 20e9
    assert timing.peak_memory(torch.device("cpu"))["host"] == pytest.approx(found["peak_bytes"] / 1e6, rel=0.1)


def test_a_linear_layer_costs_two_flop_per_weight_in_each_direction() -> None:
    layer = nn.Linear(10, 5)
    assert step_flops(layer, torch.empty(4, 10)) == 2 * 50 + 2 * 50  # to the output, to the weights
    assert step_flops(nn.Sequential(layer, nn.Linear(5, 3)), torch.empty(4, 10)) == 2 * 65 + 2 * 65 + 2 * 15
