"""The benchmark as a user starts it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest

from tests.conftest import SMALL, start

WORDS = (*SMALL, "images=16", "rounds=1", "epochs=1", "output=result")
COMMAND = [sys.executable, "-u", "-m", "covid_cls.benchmark"]


def test_a_small_benchmark_writes_what_is_promised(environment: dict[str, str], tmp_path: Path) -> None:
    command = [*COMMAND, *WORDS, "keep=kept.md"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    output = tmp_path / "result"
    assert sorted(path.name for path in output.iterdir()) == ["benchmark.json", "benchmark.png"]
    assert (output / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((output / "benchmark.json").read_text(encoding="utf-8"))
    check_numbers(record)
    assert f"{record['ratio']['median']:.2f} times as fast as the plain loop" in ended.stdout
    assert record["images"] == {"images": 16, "distinct": 16, "per_class": {"covid": 8, "normal": 8}}
    assert {"cpu", "cores", "gpu"} <= set(record["hardware"])
    assert {"torch", "covid_cls"} <= set(record["versions"])
    assert record["config"]["backbone"]["name"] == "resnet18"
    kept = (tmp_path / "kept.md").read_text(encoding="utf-8")
    assert f"python -m covid_cls.benchmark {' '.join(WORDS)} keep=kept.md\n" in kept
    assert "(extrapolated)" in kept


def check_numbers(record: dict[str, Any]) -> None:
    """The numbers of a record agree with one another."""
    for side in ("plain", "ours"):
        found = record[side]
        assert set(found["ms_per_image"]) == {"data", "forward", "backward"}
        assert found["images_per_second"] == pytest.approx(16 / median(record["rounds"][side]))
        # The parts lie within the epoch, one after the other. What is between them depends on the machine's load.
        assert all(part > 0 for part in found["ms_per_image"].values())
        assert sum(found["ms_per_image"].values()) <= 1000 / found["images_per_second"] * (1 + 1e-9)
        peak = record["peak_tflops"]["float32" if found["precision"] == "32-true" else "bfloat16"]
        achieved = found["gflop_per_image"] * found["images_per_second"] / 1000
        assert found["share_of_peak"] == pytest.approx(achieved / max(peak.values()))
        assert found["peak_memory_mb"]["host"] > 100
    ratios = [a / b for a, b in zip(record["rounds"]["plain"], record["rounds"]["ours"], strict=True)]
    assert record["rounds"]["ratios"] == pytest.approx(ratios)
    assert record["ratio"] == pytest.approx({"median": ratios[0], "least": ratios[0], "most": ratios[0]})
    cold = record["to_epochs"]["ours"]
    assert cold["store"] + cold["prepare"] + cold["fit"] <= cold["seconds"]
    assert record["to_epochs"]["plain"]["extrapolated"] is True


def test_a_fault_of_the_input_is_one_line_and_exit_code_2(environment: dict[str, str], tmp_path: Path) -> None:
    ended = subprocess.run(
        [*COMMAND, *SMALL, "images=1"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: images=1: must be a whole number of at least 4"]


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_leaves_no_process_and_no_file(environment: dict[str, str], tmp_path: Path) -> None:
    process = start("benchmark", tmp_path, environment, *WORDS, "rounds=1000")
    assert process.stdout is not None
    for line in process.stdout:
        if "round 1/" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors.splitlines() == ["stopped by SIGINT: nothing was written"]
    assert list((tmp_path / "result").iterdir()) == []
    # The pipes are closed, so no process holds them any more. Python's own helper may still be on its way out.
    for member in group_of(process.pid):
        member.wait()
    assert group_of(process.pid) == []


def group_of(number: int) -> list[psutil.Process]:
    """The processes of a process group that have not ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
