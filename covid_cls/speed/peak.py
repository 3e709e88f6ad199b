"""What the device can do at most, and how much a training step asks of it."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from covid_cls.labels import TASKS
from covid_cls.models.backbones import build_network, freeze_depth
from covid_cls.speed.clock import synchronise
from covid_cls.speed.plain import plain_network

_SECONDS, _LEAST = 0.3, 2  # for each product: as many times as fit, two at least; the best counts


def measure_peak(device: torch.device, precision: str) -> dict[str, dict[str, float]]:
    """TFLOP/s of a large `matmul` and a large 3x3 `convolution` on the device, by the name of a dtype.

    In float32, in the dtype of `precision` and, on a GPU, in bfloat16; with torch's settings as they are: on recent
    NVIDIA GPUs a float32 convolution computes in TF32.
    """
    names = {"float32", dtype_name(precision)} | ({"bfloat16"} if device.type == "cuda" else set())
    return {name: _products(device, getattr(torch, name)) for name in sorted(names)}


def dtype_name(precision: str) -> str:
    """What one of Lightning's precisions multiplies in, e.g. bfloat16 for bf16-mixed."""
    return {"32": "float32", "bf16": "bfloat16", "16": "float16", "64": "float64"}[precision.partition("-")[0]]


def count_flops(settings: dict[str, Any]) -> dict[str, float]:
    """FLOP per image of a training step of the `plain` network and of `ours`, a multiplication and an addition as two.

    The whole forward pass, or what follows a feature cache; the backward pass of what is trained. Convolutions and
    matrix products are counted, as torch.utils.flop_counter does; nothing is computed.
    """
    crop, strategy, head = settings["preprocess"]["crop"], settings["strategy"], settings["head"]
    with torch.device("meta"):
        plain = plain_network(settings)
        classes = len(TASKS[settings["task"]["name"]].classes)
        ours = build_network(settings["backbone"]["name"], classes, head["hidden"], head["dropout"])
    ours.freeze(freeze_depth(ours, strategy["name"], strategy["freeze_until"]))
    ours = ours.to("meta").train()
    start = 0 if settings["feature_cache"] == "off" else ours.entry
    entering = ours.run(torch.empty(2, 1, crop, crop, device="meta"), stop=start).detach()
    return {
        "plain": step_flops(plain, torch.empty(2, 3, crop, crop, device="meta")),
        "ours": step_flops(nn.Sequential(*list(ours.children())[start:]), entering),
    }


def step_flops(network: nn.Module, x: Tensor) -> float:
    """FLOP per image of a forward pass over `x` and of the backward pass to what requires a gradient."""
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    return float(counter.get_total_flops()) / len(x)


def _products(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    # Larger ones are no faster on two cores: 0.42 and 0.46 TFLOP/s in bfloat16, with 4096 and 32 0.40 and 0.43.
    side, batch = (8192, 256) if device.type == "cuda" else (2048, 8)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(batch, 256, 56, 56, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        matmul = _best_seconds(lambda: a @ b, device)
        convolution = _best_seconds(lambda: F.conv2d(x, w, padding=1), device)
    # Padding included: what the flop counter counts, too.
    flops = {"matmul": 2 * side**3, "convolution": 2 * 9 * 256**2 * 56**2 * batch}
    return {"matmul": flops["matmul"] / matmul / 1e12, "convolution": flops["convolution"] / convolution / 1e12}


def _best_seconds(product: Callable[[], Tensor], device: torch.device) -> float:
    product()
    synchronise(device)
    end, times = time.perf_counter() + _SECONDS, list[float]()
    while len(times) < _LEAST or time.perf_counter() < end:
        began = time.perf_counter()
        product()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return min(times)
