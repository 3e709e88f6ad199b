"""Many cells, each in a process of its own, spread over the GPUs, and a list of what failed.

An exception, `sys.exit`, a kill or a leak in one cell touches no other.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from covid_cls.errors import InputError
from covid_cls.interrupts import SIGNALS
from covid_cls.records import read_json, write_json

_JOB = "COVID_CLS_SWEEP_JOB"  # in the process of a cell: <the sweep's folder>/job-<number>
_PATIENCE = 120.0  # seconds for a cell to save and end before it is killed, where the sweep itself is forced to end
_POLL = 0.2  # seconds


class Sweep:
    """Many cells, watched by the process that the user started: its signals, the GPUs to share, the list of failures.

    folder: a new one, for job-<number>.json, .log and .cell of each job. gpus: as `visible_gpus` names them, once for
    each cell that may use it at a time; none where cells need none or something else deals them out.
    """

    current: "Sweep | None" = None

    def __init__(self, folder: Path, gpus: Sequence[str]) -> None:
        self.folder, self.signal = folder.resolve(), 0
        self.folder.mkdir(parents=True)
        if gpus:
            write_json(self.folder / "slots.json", {"gpus": list(gpus)})
        self._before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        Sweep.current = self

    def close(self) -> int:
        """The exit code, after what failed is printed to stderr: 0, 2 if the input alone is at fault, 1, 130 or 143."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        Sweep.current = None
        jobs = sorted((read_json(path) for path in self.folder.glob("job-*.json")), key=lambda job: int(job["job"]))
        counts = Counter(job["status"] for job in jobs)
        listed = ", ".join(f"{count} {status}" for status, count in counts.items())
        if jobs:  # none where a fault of the words ended the command first
            print(f"sweep of {len(jobs)} cells: {listed}; {self.folder}", flush=True)
        common = set.intersection(*(set(job["words"]) for job in jobs)) if len(jobs) > 1 else set()
        failed = [job for job in jobs if job["status"] not in ("finished", "stopped", "not started")]
        said: list[str] = []
        for job in failed:
            words = shlex.join(word for word in job["words"] if word not in common)
            print(f"failed: {words}: {_ending(job)}; {job['log']}", file=sys.stderr)
            before, said = said, _last_lines(job)
            for line in said if said != before else ["the same"]:
                print(f"    {line}", file=sys.stderr)
        if len(jobs) > counts["finished"]:
            print("the same command again does only what is left", file=sys.stderr)
        if self.signal:
            return 130 if self.signal == signal.SIGINT else 143
        if failed:
            return 2 if all(job["status"] == "refused" for job in failed) else 1
        return 0 if len(jobs) == counts["finished"] else 143

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        (self.folder / "stop").touch()
        signal.signal(number, self._before[signal.Signals(number)])  # a second one ends the sweep itself, too
        print("stopping: no cell is started any more, and the running ones save what they have", file=sys.stderr)


def inside_sweep() -> bool:
    """Whether this process is a cell of a sweep."""
    return _JOB in os.environ


def name_cell(folder: Path) -> None:
    """Returns at once; a sweep, if there is one, then knows in which run folder this cell is."""
    if inside_sweep():
        Path(os.environ[_JOB] + ".cell").write_text(str(folder), encoding="utf-8")


def end_with_sweep() -> None:
    """Returns at once; a cell whose sweep is gone, however it went, then stops as by SIGTERM and saves."""

    def wait() -> None:
        while os.read(0, 1024):  # the sweep holds the other end and never writes
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if inside_sweep():
        threading.Thread(target=wait, daemon=True).start()


def run_cell(
    module: str, words: list[str], folder: Path, number: int, fail_fast: bool = False, options: Sequence[str] = ()
) -> dict[str, Any]:
    """What became of `python -m <module> <options> <words>`, as in job-<number>.json; its output is shown meanwhile.

    status: running, finished, failed, refused (the input's fault), stopped or not started. code: the exit code, or
    minus the signal that killed it. log: where its output went. cell: its run folder, if it came so far.
    """
    job, stop = folder / f"job-{number}", folder / "stop"
    output = job.with_suffix(".log")
    record: dict[str, Any] = {"job": number, "words": words, "status": "not started", "log": str(output)}
    if stop.exists() or (fail_fast and _any_failed(folder)):
        write_json(job.with_suffix(".json"), record)
        return record
    command = [sys.executable, "-u", "-m", module, *options, *words, "hydra.mode=RUN"]
    with _slot(folder) as gpu, output.open("wb") as log_file:
        log_file.write(f"$ {shlex.join(command)}\n".encode())
        log_file.flush()
        start = time.monotonic()
        process = subprocess.Popen(  # noqa: S603  # the command that the user gave
            command,
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env={**os.environ, _JOB: str(job), **gpu},
            start_new_session=True,  # a terminal's Ctrl-C would reach it twice
        )
        record |= {"status": "running", "pid": process.pid, "host": socket.gethostname()}
        write_json(job.with_suffix(".json"), record)
        code = _wait(process, output, f"[{number}] ", stop)
    statuses = {0: "finished", 2: "refused", 130: "stopped", 143: "stopped", -signal.SIGTERM: "stopped"}
    status = statuses.get(code, "failed")
    record |= {"status": status, "code": code, "seconds": round(time.monotonic() - start, 1)}
    named = job.with_suffix(".cell")
    record["cell"] = named.read_text(encoding="utf-8") if named.is_file() else None
    write_json(job.with_suffix(".json"), record)
    return record


def gpu_slots(trainer: Any, jobs_per_gpu: int) -> list[str]:
    """The GPUs of this machine, each as often as it is shared; none for cells on the CPU or over several GPUs.

    trainer: the section of the configuration. InputError where jobs_per_gpu is no number of at least 1.
    """
    if not isinstance(jobs_per_gpu, int) or jobs_per_gpu < 1:
        raise InputError(f"sweep.jobs_per_gpu={jobs_per_gpu}: must be a number of at least 1")
    if str(trainer.get("strategy", "auto")).startswith("ddp"):
        return []
    return visible_gpus(trainer["accelerator"]) * jobs_per_gpu


def visible_gpus(accelerator: str) -> list[str]:
    """The GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them; none where `accelerator` wants none."""
    if accelerator not in ("auto", "gpu", "cuda"):
        return []
    import torch  # 1.5 s that a sweep on a CPU does not need

    listed = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()  # asks the driver's library, and takes no memory on a GPU
    return listed[:count] if listed else [str(number) for number in range(count)]


@contextmanager
def _slot(folder: Path) -> Iterator[dict[str, str]]:
    """The environment that gives a cell its GPU; waits where each slot of the sweep has its cell."""
    path = folder / "slots.json"
    gpus = read_json(path)["gpus"] if path.is_file() else []
    while gpus:
        for number, gpu in enumerate(gpus):
            lock = FileLock(folder / f"slot-{number}.lock")  # the system lets go of it when its holder dies
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield {"CUDA_VISIBLE_DEVICES": gpu}
            finally:
                lock.release()
            return
        time.sleep(_POLL)
    yield {}


def _wait(process: "subprocess.Popen[bytes]", output: Path, prefix: str, stop: Path) -> int:
    """The exit code of `process`, whose output is passed on meanwhile; once `stop` exists it is asked to end."""
    asked, code, rest = False, None, b""
    with output.open("rb") as reader:
        try:
            while code is None:
                code = process.poll()  # before reading: what it wrote last is passed on, too
                *lines, rest = (rest + reader.read()).split(b"\n")
                for line in lines if code is None or not rest else [*lines, rest]:
                    print(prefix + line.decode(errors="replace"), flush=True)
                if not asked and stop.exists():
                    process.terminate()
                    asked = True
                time.sleep(_POLL if code is None else 0)
        except BaseException:  # the launcher's own end: a second Ctrl-C, or Slurm's warning through submitit
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return code


def _any_failed(folder: Path) -> bool:
    return any(read_json(path)["status"] in ("failed", "refused") for path in folder.glob("job-*.json"))


def _last_lines(job: dict[str, Any]) -> list[str]:
    """The end of a failed cell's output: the line that says why, if there is one."""
    text = Path(job["log"]).read_text(encoding="utf-8", errors="replace")
    lines = [line[:400] for line in text.splitlines()[1:] if line.strip()]
    return lines[-1 if lines and lines[-1].startswith("error: ") else -4 :]


def _ending(job: dict[str, Any]) -> str:
    code = job.get("code")
    if code is None:
        return "ended without a word, with the process that watched it"
    if code >= 0:
        return f"exit code {code}"
    killed = signal.Signals(-code).name
    return f"killed by {killed}" + (", as the system does when memory runs out" if killed == "SIGKILL" else "")
