"""Sweeps: each run of a Hydra multirun is a separate process."""

import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from covid_cls.errors import InputError
from covid_cls.io import read_json, write_json
from covid_cls.system import SIGNALS

# Environment variable of a run's process: <folder of the sweep>/job-<number>.
_JOB = "COVID_CLS_SWEEP_JOB"
# Seconds that a run has to save and end before it is killed, if the sweep itself is forced to end.
_PATIENCE = 120.0
_POLL = 0.2  # seconds


class Sweep:
    """A sweep in the process that the user started: it handles signals, shares GPUs and lists failures.

    Args:
        folder: A new folder for job-<number>.json, .log and .run of each job.
        gpus: Names as `visible_gpus` gives them, each as often as runs may share the GPU; empty if runs need no GPU or
            something else assigns them.
        search: Whether the sweep is a search, whose runs are ranked by their validation scores at the end.
    """

    current: "Sweep | None" = None

    def __init__(self, folder: Path, gpus: Sequence[str], search: bool = False) -> None:
        self.folder, self.signal, self.search = folder.resolve(), 0, search
        self.folder.mkdir(parents=True)
        if gpus:
            write_json(self.folder / "slots.json", {"gpus": list(gpus)})
        self._before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        Sweep.current = self

    def close(self) -> int:
        """Print the failed jobs to stderr and return the exit code.

        Returns:
            0 if all runs are finished, 2 if every failed job was refused for its input, 1 if one failed otherwise, 130
            or 143 after a signal.
        """
        for number, handler in self._before.items():
            signal.signal(number, handler)
        Sweep.current = None
        jobs = sorted((read_json(path) for path in self.folder.glob("job-*.json")), key=lambda job: int(job["job"]))
        counts = Counter(job["status"] for job in jobs)
        # There is no job if an error in the words ended the command first.
        if jobs:
            listed = ", ".join(f"{count} {status}" for status, count in counts.items())
            print(f"sweep of {len(jobs)} runs: {listed}; {self.folder}", flush=True)
        failed = [job for job in jobs if job["status"] not in ("finished", "stopped", "not started")]
        _print_failures(jobs, failed)
        if len(jobs) > counts["finished"]:
            print("the same command continues with the unfinished runs", file=sys.stderr)
        if self.search and counts["finished"]:
            # Imported late: it needs scipy, which other sweeps do not.
            from covid_cls.reporting.search_ranking import rank_by_validation

            print("\n".join(rank_by_validation([job for job in jobs if job["status"] == "finished"])), flush=True)
        if self.signal:
            return 130 if self.signal == signal.SIGINT else 143
        if failed:
            return 2 if all(job["status"] == "refused" for job in failed) else 1
        return 0 if len(jobs) == counts["finished"] else 143

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        (self.folder / "stop").touch()
        # A second signal ends the sweep itself.
        signal.signal(number, self._before[signal.Signals(number)])
        print("stopping: no further run is started, and the running ones save their state", file=sys.stderr)


def _print_failures(jobs: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]]) -> None:
    """Print each failed job with its last lines; only the words that not all jobs share."""
    common = set.intersection(*(set(job["words"]) for job in jobs)) if len(jobs) > 1 else set()
    lines: list[str] = []
    for job in failed:
        words = shlex.join(word for word in job["words"] if word not in common)
        print(f"failed: {words}: {_ending(job)}; {job['log']}", file=sys.stderr)
        previous, lines = lines, _last_lines(job)
        for line in lines if lines != previous else ["the same error as above"]:
            print(f"    {line}", file=sys.stderr)


def inside_sweep() -> bool:
    """Return whether this process is a run of a sweep."""
    return _JOB in os.environ


def report_run_folder(folder: Path) -> None:
    """Tell the sweep, if there is one, which run folder this process writes."""
    if inside_sweep():
        Path(os.environ[_JOB] + ".run").write_text(str(folder), encoding="utf-8")


def end_with_sweep() -> None:
    """Start a thread that stops this run as SIGTERM would once its sweep has ended, however that ended."""

    def wait() -> None:
        # The sweep holds the other end of the pipe and never writes, so that this ends when the sweep does.
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if inside_sweep():
        threading.Thread(target=wait, daemon=True).start()


def run_in_process(
    module: str, words: list[str], folder: Path, number: int, fail_fast: bool = False, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Run `python -m <module> <options> <words>` as a process, and pass its output on.

    Returns:
        The record that is also written to job-<number>.json, with these entries. status: running, finished, failed,
        refused (its input is wrong), stopped or not started. code: the exit code, or minus the signal that killed it.
        log: the path of its output. run: its run folder, or None.
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
        process = subprocess.Popen(  # noqa: S603  # the words are those of the user
            command,
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env={**os.environ, _JOB: str(job), **gpu},
            # In a separate session, because a terminal's Ctrl-C would reach it a second time.
            start_new_session=True,
        )
        record |= {"status": "running", "pid": process.pid, "host": socket.gethostname()}
        write_json(job.with_suffix(".json"), record)
        code = _wait(process, output, f"[{number}] ", stop)
    statuses = {0: "finished", 2: "refused", 130: "stopped", 143: "stopped", -signal.SIGTERM: "stopped"}
    record |= {"status": statuses.get(code, "failed"), "code": code, "seconds": round(time.monotonic() - start, 1)}
    reported = job.with_suffix(".run")
    record["run"] = reported.read_text(encoding="utf-8") if reported.is_file() else None
    write_json(job.with_suffix(".json"), record)
    return record


def gpu_slots(trainer: Any, jobs_per_gpu: int) -> list[str]:
    """Return the GPUs of this machine, each as often as runs may share it; none for runs on the CPU or on several GPUs.

    Args:
        trainer: The section of the configuration.
        jobs_per_gpu: How many runs share a GPU.

    Raises:
        InputError: jobs_per_gpu is not an integer of at least 1.
    """
    if not isinstance(jobs_per_gpu, int) or jobs_per_gpu < 1:
        raise InputError(f"sweep.jobs_per_gpu={jobs_per_gpu}: give an integer of at least 1")
    if str(trainer.get("strategy", "auto")).startswith("ddp"):
        return []
    return visible_gpus(trainer["accelerator"]) * jobs_per_gpu


def visible_gpus(accelerator: str) -> list[str]:
    """Return the GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them; none if `accelerator` is no GPU."""
    if accelerator not in ("auto", "gpu", "cuda"):
        return []
    # Imported late: it takes 1.5 s, which a sweep on a CPU does not need.
    import torch

    listed = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    # The driver's library answers it without taking memory on a GPU.
    count = torch.cuda.device_count()
    return listed[:count] if listed else [str(number) for number in range(count)]


@contextmanager
def _slot(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment variables that give a run its GPU, once a slot of the sweep is free."""
    path = folder / "slots.json"
    gpus = read_json(path)["gpus"] if path.is_file() else []
    while gpus:
        for number, gpu in enumerate(gpus):
            # The operating system releases the lock if its holder dies.
            lock = FileLock(folder / f"slot-{number}.lock")
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
    """Pass the output of `process` on until it ends, ask it to end once `stop` exists, and return its exit code."""
    asked, code, rest = False, None, b""
    with output.open("rb") as reader:
        try:
            while code is None:
                # Polled before reading, so that its last output is passed on.
                code = process.poll()
                *lines, rest = (rest + reader.read()).split(b"\n")
                for line in lines if code is None or not rest else [*lines, rest]:
                    print(prefix + line.decode(errors="replace"), flush=True)
                if not asked and stop.exists():
                    process.terminate()
                    asked = True
                time.sleep(_POLL if code is None else 0)
        except BaseException:
            # The launcher itself is ended, by a second Ctrl-C or by Slurm's warning through submitit.
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
    """Return the error line of a failed job's output, or its last four lines."""
    text = Path(job["log"]).read_text(encoding="utf-8", errors="replace")
    lines = [line[:400] for line in text.splitlines()[1:] if line.strip()]
    return lines[-1 if lines and lines[-1].startswith("error: ") else -4 :]


def _ending(job: dict[str, Any]) -> str:
    code = job.get("code")
    if code is None:
        return "exited without reporting a status, together with the process that watched it"
    if code >= 0:
        return f"exit code {code}"
    killed = signal.Signals(-code).name
    return f"killed by {killed}" + (", as the system does when memory runs out" if killed == "SIGKILL" else "")


class SweepStart(Callback):
    """Opens the sweep in the process that was started with -m; only a callback of Hydra's is called at that moment."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Create the sweep's folder, and assign the GPUs if the jobs run on this machine."""
        launcher = config.hydra.launcher
        # A cluster assigns the GPUs of each job itself.
        local = "joblib" in launcher._target_.lower()
        search = _is_search(config.hydra)
        try:
            if search and config.test is not False:
                raise InputError(f"test={config.test}: a search must not see the test split; leave test out")
            gpus = gpu_slots(config.trainer, config.sweep.jobs_per_gpu) if local else []
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            # Hydra turns every other exception of a callback into a warning.
            sys.exit(error.exit_code)
        if search:
            # An extra, imported to hide its messages about each trial.
            import optuna

            optuna.logging.set_verbosity(logging.WARNING)
        if local and launcher.n_jobs == 0:
            with read_write(launcher):
                launcher.n_jobs = max(1, len(gpus))
        Sweep(Path(config.hydra.sweep.dir), gpus, search)


def run_job(module: str, finished: Callable[[], Path | None], fail_fast: bool, full_error: bool) -> float | None:
    """Run the present Hydra job as a separate process, unless `finished` returns its run folder.

    Args:
        module: The module of the command.
        finished: Returns the run folder if the run is already finished, else None.
        fail_fast: Whether no run is started after one has failed.
        full_error: Whether errors of the input show a traceback.

    Returns:
        The macro AUROC on validation, which a search maximises; 0 for a training that diverged; None without a run.

    Raises:
        InputError: The run of a search was refused for its input, so that its other runs would be refused, too.
        RuntimeError: The run of a search failed in another way than by diverging.
    """
    own = HydraConfig.get()
    if Sweep.current is None:
        _serve_launcher()
    folder, number = Path(own.sweep.dir).resolve(), own.job.num
    words = list(own.overrides.task)
    try:
        done = finished()
    except InputError:
        # The process of the run will report it.
        done = None
    if done:
        record = {"job": number, "words": words, "status": "finished", "run": str(done)}
        write_json(folder / f"job-{number}.json", record)
        print(f"[{number}] finished before: {done}", flush=True)
    else:
        # `run_command` changed it for Hydra; the process of the run gets the user's choice.
        os.environ["HYDRA_FULL_ERROR"] = str(int(full_error))
        record = run_in_process(module, words, folder, number, fail_fast, job_options(own, module))
    return _objective(record, search=_is_search(own))


def _is_search(hydra_config: Any) -> bool:
    """Return whether the sweeper chooses settings by the scores of earlier runs, as Optuna's does."""
    return "optuna" in str(hydra_config.sweeper._target_).lower()


def _objective(record: dict[str, Any], search: bool) -> float | None:
    if record["status"] == "finished" and record["run"]:
        overall = read_json(Path(record["run"]) / "metrics.json")["val"]["overall"]
        return float(overall["macro_auroc"])
    if not search:
        return None
    if record["status"] == "refused":
        raise InputError(_last_lines(record)[-1].removeprefix("error: "))
    reason = read_json(Path(record["run"]) / "run.json").get("reason", "") if record.get("run") else ""
    if "NonFiniteError" in reason:
        return 0.0
    raise RuntimeError(f"a run of the search ended with status {record['status']}; see {record['log']}")


def this_start() -> str:
    """Return a name that no other start of a command has: time, host and process number."""
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{socket.gethostname()}-{os.getpid()}"


OmegaConf.register_new_resolver("this_start", this_start, use_cache=True, replace=True)


def job_options(hydra_config: Any, module: str) -> list[str]:
    """Return the options and Hydra settings of the command line that a job's process needs, too."""
    folders = [source.path for source in hydra_config.runtime.config_sources if source.provider == "command-line"]
    of_sweep = ("hydra.mode", "hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper")
    settings = [word for word in hydra_config.overrides.hydra if not word.lstrip("+~").startswith(of_sweep)]
    name = hydra_config.job.config_name
    names = [] if module.endswith(f".{name}") else [f"--config-name={name}"]
    return [*names, *(f"--config-dir={path}" for path in folders), *settings]


def _serve_launcher() -> None:
    """Make a launcher's process ignore Ctrl-C, which the sweep handles, and end when the sweep's process has ended.

    joblib's processes would wait forever for a parent that was killed, and their end tells their runs to stop.
    """
    if signal.getsignal(signal.SIGINT) is _ignore:
        return
    signal.signal(signal.SIGINT, _ignore)
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
