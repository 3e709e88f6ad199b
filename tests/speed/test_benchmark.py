"""The benchmark as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.conftest import SMALL, start

WORDS = (*SMALL, "images=16", "rounds=1", "epochs=1", "output=result")
COMMAND = [sys.executable, "-u", "-m", "covid_cls.benchmark"]


def test_a_small_benchmark_writes_what_is_promised(environment: dict[str, str], tmp_path: Path) -> None:
    command = [*COMMAND, *WORDS, "keep=kept.md"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
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
        # On a CPU the parts of an epoch make up the whole, but for the calls of hooks.
        assert sum(found["ms_per_image"].values()) == pytest.approx(1000 / found["images_per_second"], rel=0.1)
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
        [*COMMAND, *SMALL, "images=1"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
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
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.splitlines() == ["stopped by SIGINT: nothing was written"]
    assert list((tmp_path / "result").iterdir()) == []
    deadline = time.monotonic() + 60
    while (left := alive(process.pid)) and time.monotonic() < deadline:  # Python's own helper ends a moment later
        time.sleep(0.1)
    assert left == []


def alive(group: int) -> list[str]:
    """What still runs in a process group."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]
