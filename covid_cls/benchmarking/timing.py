"""Separate processes that measure on request, and what they measure: seconds, memory and the start of a training."""

import copy
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from covid_cls.data.store import end_with_parent
from covid_cls.errors import InputError, NonFiniteError
from covid_cls.system import shielded

PARTS = ("data", "forward", "backward")
Measurements = Mapping[str, Callable[[], Any]]
# Exit code of a training that was ended on purpose after its first step; no command of the package uses it.
STEPPED = 86
# The hook belongs to torch, so that it does not depend on how `train` is written.
TRAIN_ONE_STEP = f"""
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

register_optimizer_step_post_hook(lambda *step: os._exit({STEPPED}))
sys.argv = ["train", *sys.argv[1:]]
runpy.run_module("covid_cls.train", run_name="__main__", alter_sys=True)
"""
IMPORTS = "import torch, pytorch_lightning, torchvision"


@contextmanager
def separate_process(work: Callable[..., None], *arguments: Any) -> Iterator[Callable[[str], Any]]:
    """Run `work(pipe, *arguments)` in a new process, which is killed at the end of the block.

    Yields:
        A function that sends the name of a measurement to the process and returns its result. It raises the process's
        InputError or NonFiniteError again, and RuntimeError if the process failed in any other way.
    """
    # A forked child of a process that runs torch's threads can deadlock, hence spawn.
    spawn = multiprocessing.get_context("spawn")
    pipe, child_end = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(work, child_end, *arguments))
    with shielded():
        process.start()
    # Otherwise this process would not notice that the other one has ended.
    child_end.close()

    def ask(name: str) -> Any:
        # A process that failed before the request has left its exception in the pipe.
        with suppress(BrokenPipeError):
            pipe.send(name)
        try:
            result = pipe.recv()
        except (EOFError, ConnectionError) as error:
            process.join()
            raise RuntimeError(
                f"A measuring process ended with exit code {process.exitcode}. If that is -9, memory probably ran out: "
                "use a smaller data.batch_size."
            ) from error
        if isinstance(result, Exception):
            raise result
        return result

    try:
        yield ask
    finally:
        # Not terminate(): Lightning handles SIGTERM in a way that a waiting process would never notice.
        process.kill()
        process.join()
        pipe.close()


def answer(pipe: Connection, measurements: Measurements) -> str:
    """Answer requests of the parent process until one is not in `measurements`, and return its name."""
    while (name := pipe.recv()) in measurements:
        pipe.send(measurements[name]())
    return str(name)


def run_separately(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, computed in a new process."""
    with separate_process(_answer_result, function, *arguments) as ask:
        return ask("result")


def _answer_result(pipe: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    answer(pipe, {"result": lambda: function(*arguments)})


def _serve(work: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    end_with_parent()
    # The parent reports what matters. Without a terminal, `train` shows no progress bar.
    logging.disable(logging.WARNING)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        try:
            work(pipe, *arguments)
        except (InputError, NonFiniteError) as error:
            pipe.send(error)
        except Exception:
            pipe.send(RuntimeError(f"A measuring process failed:\n{traceback.format_exc()}"))


def timer() -> float:
    """Return the time in seconds, after a GPU has finished what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Time an epoch and its parts, from the creation of the object to `stop`.

    Args:
        waits: Wait for the device at each mark. A GPU computes while the host continues, so the times of the parts are
            correct only if the device is waited for; that slows the epoch down.
    """

    def __init__(self, waits: bool = False) -> None:
        self.waits, self.parts = waits, dict.fromkeys(PARTS, 0.0)
        self.start = self.last = timer()

    def mark(self, part: str) -> None:
        """Add the time since the last mark to `part`."""
        now = timer() if self.waits else time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now

    def stop(self) -> dict[str, float]:
        """Return the total as `seconds`, and the seconds of each part."""
        return {"seconds": timer() - self.start, **self.parts}


class TimedEpochs(Callback):
    """Stop a fit before each epoch until the parent process requests "epoch" or "profile", and time the epoch's steps.

    Validation, metrics, logging and checkpoints follow the last step and are not timed. The parent receives the times
    when they are finished, so that they do not disturb what it measures next.

    Args:
        pipe: Connection to the parent process.
        measurements: Further requests that are answered between two epochs.
    """

    watch: Stopwatch

    def __init__(self, pipe: Connection, measurements: Measurements) -> None:
        self.pipe, self.measurements = pipe, measurements
        self.seconds: dict[str, float] | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the previous epoch and wait for the next request."""
        # Only here are the validation and the checkpoints of the previous epoch finished.
        if self.seconds:
            self.pipe.send(self.seconds)
        self.watch = Stopwatch(waits=answer(self.pipe, self.measurements) == "profile")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """Mark the end of waiting for a batch, which is now on the device."""
        self.watch.mark("data")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        """Mark the end of the forward pass and the loss."""
        self.watch.mark("forward")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mark the end of the backward pass and the optimizer's step."""
        self.watch.mark("backward")
        if batch_idx + 1 == trainer.num_training_batches:
            self.seconds = self.watch.stop()


def load_seconds(batches: Iterable[Any], prepare: Callable[[Any], Any]) -> float:
    """Return the seconds that loading all batches takes; `prepare` moves a batch to the device."""
    start = timer()
    for batch in batches:
        prepare(batch)
    return timer() - start


def step_flops(network: nn.Module, x: Tensor) -> float:
    """Return the FLOP per image of a forward pass over `x` and of the backward pass to what requires a gradient.

    Convolutions and matrix products are counted, a multiplication and an addition as two. Nothing is computed.
    """
    # On the meta device, operations compute shapes only.
    network = copy.deepcopy(network).to("meta")
    with FlopCounterMode(display=False) as counter:
        network(x.float().to("meta")).sum().backward()
    return float(counter.get_total_flops()) / len(x)


def process_memory() -> dict[str, Any]:
    """Return `peak_bytes` and `resident_bytes` of this process with its libraries; the latter is None without /proc."""
    status = Path("/proc/self/status")
    if status.is_file():
        # On Linux, ru_maxrss also counts what the parent held when it started this process.
        lines = [line.split() for line in status.read_text(encoding="ascii", errors="replace").splitlines()]
        kilobytes = {words[0]: int(words[1]) for words in lines if words and words[-1] == "kB"}
        return {"peak_bytes": kilobytes["VmHWM:"] * 1024, "resident_bytes": kilobytes["VmRSS:"] * 1024}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": peak if sys.platform == "darwin" else peak * 1024, "resident_bytes": None}


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """Return the peak memory of this process in MB: `host` resident, `device` allocated on the GPU or None."""
    allocated = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    return {"host": process_memory()["peak_bytes"] / 1e6, "device": allocated}


def time_starts(overrides: Sequence[str], pairs: int = 3) -> dict[str, Any]:
    """Measure the seconds from starting `train` to its first training step; the images have been decoded before.

    Args:
        overrides: The command line of `train`.
        pairs: Number of repetitions.

    Returns:
        `first_step`, and `imports` of a Python process that only imports torch, Lightning and torchvision: one value
        per repetition, measured alternately. `medians` of both.

    Raises:
        InputError: `train` does not reach its first step.
    """
    found: dict[str, list[float]] = {"first_step": [], "imports": []}
    with tempfile.TemporaryDirectory() as name:
        words = [*overrides, f"output_root='{name}'", "trainer.max_epochs=1", "rerun=true"]
        # The first start decodes the images.
        seconds_to_first_step(words)
        for _ in range(pairs):
            found["first_step"].append(seconds_to_first_step(words))
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", IMPORTS], check=True)  # noqa: S603  # a constant
            found["imports"].append(time.perf_counter() - start)
    return {**found, "medians": {name: median(times) for name, times in found.items()}}


def seconds_to_first_step(words: Sequence[str]) -> float:
    """Run `train` with this command line, end it after its first training step and return the seconds until then.

    Raises:
        InputError: `train` ended before its first step; the message is the last line that it printed to stderr.
    """
    command = [sys.executable, "-c", TRAIN_ONE_STEP, *words]
    # A file and not a pipe: workers of a DataLoader could hold a pipe open for seconds after the process has ended.
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors, check=False).returncode  # noqa: S603
        seconds = time.perf_counter() - start
        errors.seek(0)
        reason = (errors.read().splitlines() or ["no message"])[-1]
    if code != STEPPED:
        raise InputError(f"start=true: `train` ended with exit code {code} before its first step: {reason}")
    return seconds
