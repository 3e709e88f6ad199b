"""What every command shares: composing its configuration, exit codes, and errors a user can act on."""

import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TextIO, Union, get_args, get_origin

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from covid_cls.errors import InputError, NonFiniteError, listed
from covid_cls.interrupts import Interrupted, interruptible
from covid_cls.multirun import run_job
from covid_cls.sweep import Sweep, end_with_sweep
from covid_cls.targets import check_compositions, check_targets


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stdout` is at that moment, so that a live progress bar stays below the log's lines."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stdout
        super().emit(record)


def conf_folder() -> Path:
    """The configuration: covid_cls/conf in a wheel, conf beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def run_command(
    task: Callable[[DictConfig], None],
    config_name: str,
    stopped: str = "before its results were whole",
    finished: Callable[[DictConfig], Path | None] | None = None,
) -> None:
    """Run `task` on the composed configuration and exit: 0 done, 2 the user's input is at fault, 1 anything else.

    A fault of the input, or a training that diverged, is one line on stderr, with a traceback only where
    HYDRA_FULL_ERROR=1; in a multirun the other jobs go on. finished: gives the folder of a job of which nothing is left
    to do; with it each job of a multirun is a process of its own, see `multirun.run_job`, of the module that has the
    configuration's name. Ctrl-C exits with 130 and says what was `stopped` with it.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra otherwise prints what goes wrong its own way and exits with 1, whatever it was.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    code = 0

    def guarded(cfg: DictConfig) -> None:
        nonlocal code
        if finished is not None and _sweeping():
            run_job(f"covid_cls.{config_name}", cfg, full, finished)
            return
        try:
            task(cfg)
        except (InputError, NonFiniteError) as error:
            if full:
                raise
            code = error.exit_code
            job = f" ({' '.join(HydraConfig.get().overrides.task)})" if _sweeping() else ""
            print(f"error: {error}{job}", file=sys.stderr)

    end_with_sweep()
    check_compositions()
    try:
        with interruptible():
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        if full or isinstance(error, InstantiationException):  # Hydra's word for whatever a constructor raised
            raise
        reason = error.__cause__ if isinstance(error.__cause__, InputError) else error  # of a resolver of ours
        print(f"error: {_one_line(reason)}", file=sys.stderr)
        code = 2
    except Interrupted as stop:
        print(f"stopped by {stop}: {stopped}", file=sys.stderr)
        code = stop.exit_code
    except Exception:
        if not Sweep.current:
            raise
        traceback.print_exc()  # of a launcher; what became of its cells is listed all the same
        code = 1
    sys.exit((Sweep.current.close() if Sweep.current else 0) or code)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as resolved dicts, lists, strings and numbers. InputError where a value is missing."""
    try:
        settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key} is not set: give {error.full_key}=… on the command line") from error
    assert isinstance(settings, dict)
    named = {str(key): value for key, value in settings.items()}
    check_targets(named)
    return named


def check_section(name: str, constructor: Callable[..., Any], section: dict[str, Any]) -> None:
    """InputError where `section` holds a key that `constructor` does not take, or a value of another type.

    The constructor's signature is the schema of its section of conf/: there is no second copy of it.
    """
    known = inspect.signature(constructor, eval_str=True).parameters
    for key, value in section.items():
        if key not in known:
            raise InputError(f"{name}.{key}: no such setting; {name} takes {listed(sorted(known), 30)}")
        hint = known[key].annotation
        if not _fits(value, hint):
            raise InputError(f"{name}.{key}={value}: expected {getattr(hint, '__name__', hint)}")


def existing_folder(name: str, output_root: str) -> Path:
    """The folder `name`, from here or else from the output root; as from here where neither is there."""
    here, below = Path(name).expanduser(), Path(output_root).expanduser() / name
    return below if below.is_dir() and not here.is_dir() else here


def check_paths(settings: dict[str, Any], *names: str) -> None:
    """InputError where one of these settings is no text: Hydra makes lists and numbers of some paths."""
    for name in names:
        if not isinstance(settings[name], str):
            raise InputError(f"{name}={settings[name]}: no path to Hydra; put it in quotes twice: '{name}=\"…\"'")


def check_name(name: str | None) -> None:
    """InputError where results of this name would leave output_root."""
    if name is not None and (Path(str(name)).is_absolute() or ".." in Path(str(name)).parts):
        raise InputError(f"name={name}: must be a folder below output_root; output_root=… chooses another place")


def recipe() -> str | None:
    """The name of the chosen experiment, e.g. "grid"."""
    choice = HydraConfig.get().runtime.choices.get("experiment")
    return None if choice in (None, "null") else str(choice)


def _sweeping() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type; a list is checked as such, its items are not."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    kind = get_origin(hint) or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is Sequence:
        return isinstance(value, list)
    return isinstance(value, kind)


def _one_line(error: Exception) -> str:
    """What Hydra or OmegaConf says over several lines, and why, without the object dumps and search paths."""
    parts = [str(error), str(error.__cause__ or "")]
    dull = ("full_key:", "object_type=", "reference_type=", "provider=", "Config search path")
    lines = [line.strip() for part in parts for line in part.splitlines()]
    return " ".join(line for line in dict.fromkeys(lines) if line and not line.startswith(dull))
