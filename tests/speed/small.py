"""The benchmark's settings for small phantoms, and a result whose numbers are known."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from covid_cls.command import conf_folder, plain
from covid_cls.speed.measure import summarise
from tests.conftest import SMALL


def settings(*overrides: str, config: str = "benchmark") -> dict[str, Any]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return plain(compose(config, [*SMALL, *overrides]))


def table_settings(cache: Path, *overrides: str) -> dict[str, Any]:
    return settings(f"data.cache={cache}", *overrides)


def epoch(seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "data": seconds / 2, "forward": seconds / 4, "backward": seconds / 4}


def found() -> dict[str, Any]:
    """What `run_rounds` would return for 100 images: 4 s against 1 s, at the median of three rounds."""
    return {
        "device": "cpu",
        "notes": [],
        "precision": {"plain": "32-true", "ours": "bf16-mixed"},
        "memory": {side: {"host": 1000.0, "device": None} for side in ("plain", "ours")},
        "rounds": {"plain": [epoch(4), epoch(3), epoch(8)], "ours": [epoch(1), epoch(0.5), epoch(1)]},
        "loader": {"plain": [2.0, 2.0, 4.0], "ours": [0.1, 0.1, 0.1]},
        "bare": [0.008, 0.005, 0.009],
        "peak": {"float32": {"matmul": 0.5, "convolution": 1.0}, "bfloat16": {"matmul": 2.0, "convolution": 1.0}},
        "profile": None,
    }


def result(**changes: Any) -> dict[str, Any]:
    flops = {"plain": 1e10, "ours": 5e9}
    cold = {"store": 1.0, "prepare": 0.5, "fit": 6.0, "seconds": 8.0}
    made = summarise(found() | changes, 100, flops, cold, 5)
    return {"baseline": "plain loop", "images": {"images": 100}, **made}
