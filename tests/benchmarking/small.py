"""Settings of the benchmark for small phantoms, and a result with known numbers."""

from pathlib import Path
from typing import Any

from covid_cls.benchmarking.measure import summarise
from covid_cls.runtime.cli import compose_job
from tests.conftest import SMALL


def settings(*overrides: str, config: str = "benchmark") -> dict[str, Any]:
    return compose_job(config, [*SMALL, *overrides]).settings


def table_settings(cache: Path, *overrides: str) -> dict[str, Any]:
    return settings(f"data.cache={cache}", *overrides)


def epoch(seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "data": seconds / 2, "forward": seconds / 4, "backward": seconds / 4}


def found() -> dict[str, dict[str, Any]]:
    """Return what `run_rounds` would return for 100 images: 4 s against 1 s, as the median of three rounds."""
    memory = {"host": 1000.0, "device": None}
    plain = {
        "about": {"precision": "32-true"},
        "memory": memory,
        "flops": 1e10,
        "epoch": [epoch(4), epoch(3), epoch(8)],
        "loader": [2.0, 2.0, 4.0],
        "profile": None,
    }
    ours = {
        "about": {"device": "cpu", "precision": "bf16-mixed", "notes": []},
        "memory": memory,
        "flops": 5e9,
        "epoch": [epoch(1), epoch(0.5), epoch(1)],
        "loader": [0.1, 0.1, 0.1],
        "bare": [0.008, 0.005, 0.009],
        "peak": [
            {"float32": {"matmul": 0.5, "convolution": 0.9}, "bfloat16": {"matmul": 2.0, "convolution": 0.7}},
            {"float32": {"matmul": 0.4, "convolution": 1.0}, "bfloat16": {"matmul": 1.0, "convolution": 1.0}},
        ],
        "profile": None,
    }
    return {"plain": plain, "ours": ours}


def result(measured: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    cold = {"store": 1.0, "prepare": 0.5, "fit": 6.0, "seconds": 8.0}
    return {"baseline": "plain loop", "images": {"images": 100}, **summarise(measured or found(), 100, cold, 5)}
