"""Hydra's multirun over `sweep`: its launchers decide where and when a job runs; what they run is here."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from covid_cls.errors import InputError
from covid_cls.records import write_json
from covid_cls.sweep import Sweep, gpu_slots, run_cell


class SweepStart(Callback):
    """Tells the process that was started with -m that a multirun begins; Hydra has no other place for it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Open the sweep's folder, and share out the GPUs where its jobs run on this machine."""
        launcher = config.hydra.launcher
        here = "joblib" in launcher._target_.lower()  # a cluster gives each job its GPUs itself
        try:
            gpus = gpu_slots(config.trainer, config.sweep.jobs_per_gpu) if here else []
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)  # Hydra makes a mere warning of any other exception of a callback
        if here and launcher.n_jobs == 0:
            with read_write(launcher):
                launcher.n_jobs = max(1, len(gpus))
        Sweep(Path(config.hydra.sweep.dir), gpus)


def run_job(module: str, cfg: DictConfig, full_error: bool, finished: Callable[[DictConfig], Path | None]) -> None:
    """Run the present Hydra job as `run_cell` does, unless `finished` gives its folder.

    full_error: whether faults of the input show a traceback, too.
    """
    hydra_config = HydraConfig.get()
    if Sweep.current is None:
        _serve_launcher()
    folder, number = Path(hydra_config.sweep.dir).resolve(), hydra_config.job.num
    words = list(hydra_config.overrides.task)
    try:
        done = finished(cfg)
    except InputError:  # the cell itself will say so
        done = None
    if done:
        record = {"job": number, "words": words, "status": "finished", "cell": str(done)}
        write_json(folder / f"job-{number}.json", record)
        print(f"[{number}] finished before: {done}", flush=True)
        return
    os.environ["HYDRA_FULL_ERROR"] = str(int(full_error))  # `run_command` has set it for Hydra's own sake
    run_cell(module, words, folder, number, cfg.sweep.fail_fast, cell_options(hydra_config, module))


def this_start() -> str:
    """A name that no other start of a command has: time, host and process."""
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{socket.gethostname()}-{os.getpid()}"


OmegaConf.register_new_resolver("this_start", this_start, use_cache=True, replace=True)


def cell_options(hydra_config: Any, module: str) -> list[str]:
    """What else was on the command line: another configuration's folder or name, and settings of Hydra for jobs."""
    folders = [source.path for source in hydra_config.runtime.config_sources if source.provider == "command-line"]
    of_sweep = ("hydra.mode", "hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper")
    settings = [word for word in hydra_config.overrides.hydra if not word.lstrip("+~").startswith(of_sweep)]
    name = hydra_config.job.config_name
    names = [] if module.endswith(f".{name}") else [f"--config-name={name}"]
    return [*names, *(f"--config-dir={path}" for path in folders), *settings]


def _serve_launcher() -> None:
    """Let a launcher's process leave Ctrl-C to the one that was started with -m, and end when that one is gone.

    joblib's processes would wait for ever for one that was killed; how they end is how their cells learn of it.
    """
    if signal.getsignal(signal.SIGINT) is _leave_be:
        return
    signal.signal(signal.SIGINT, _leave_be)
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _leave_be(number: int, frame: FrameType | None) -> None:
    pass
