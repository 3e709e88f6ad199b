"""The command `benchmark`: its files and its output, with given and with measured numbers."""

import contextlib
import json
import os
import signal
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest

from covid_cls.benchmarking import measure
from tests.benchmarking.small import result
from tests.conftest import SMALL, Command, command, start, starter

WORDS = (*SMALL, "images=16", "rounds=1", "epochs=1", "output=result")


@pytest.fixture
def benchmark(environment: dict[str, str]) -> Command:
    """Return the command, run in this process."""
    return command("benchmark", environment)


def test_results_are_written_and_printed(benchmark: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure", lambda settings, folder: result())
    done = benchmark(tmp_path, *WORDS, "keep=kept.md")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "result").iterdir()) == ["benchmark.json", "benchmark.png"]
    record = json.loads((tmp_path / "result" / "benchmark.json").read_text(encoding="utf-8"))
    assert record["ratio"] == result()["ratio"]
    assert record["command"] == f"python -m covid_cls.benchmark {' '.join(WORDS)} keep=kept.md"
    assert f"{record['ratio']['median']:.2f} times as fast as the plain loop" in done.stdout
    assert record["command"] in (tmp_path / "kept.md").read_text(encoding="utf-8")


@pytest.mark.slow(reason="the two sides are measured in separate processes")
def test_a_small_benchmark_writes_consistent_results(environment: dict[str, str], tmp_path: Path) -> None:
    ended = starter("benchmark", environment)(tmp_path, *WORDS, "keep=kept.md")
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
    """Check that the numbers of a record agree with each other."""
    for side in ("plain", "ours"):
        found = record[side]
        assert set(found["ms_per_image"]) == {"data", "forward", "backward"}
        assert found["images_per_second"] == pytest.approx(16 / median(record["rounds"][side]))
        # The parts are consecutive sections of the epoch. The time between them depends on the load of the machine.
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


def test_an_input_error_is_one_line_and_exit_code_2(benchmark: Command, tmp_path: Path) -> None:
    ended = benchmark(tmp_path, *SMALL, "images=1")
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: images=1: must be an integer of at least 4."]
    ended = benchmark(tmp_path, *SMALL, "plain.lightning=yesterday")
    assert ended.stderr.splitlines() == ["error: plain.lightning=yesterday: expected bool"]


@pytest.mark.slow(reason="a signal stops several processes")
@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_leaves_no_process_and_no_file(environment: dict[str, str], tmp_path: Path) -> None:
    process = start("benchmark", tmp_path, environment, *WORDS, "rounds=1000")
    assert process.stdout is not None
    for line in process.stdout:
        if "round 1/" in line:
            break
    # As a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors.splitlines() == ["stopped by SIGINT: nothing was written"]
    assert list((tmp_path / "result").iterdir()) == []
    # The pipes are closed, so no process uses them any more. Python's resource tracker may still be ending.
    for member in group_of(process.pid):
        member.wait()
    assert group_of(process.pid) == []


def group_of(number: int) -> list[psutil.Process]:
    """Return the running processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
