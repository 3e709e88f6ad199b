"""Shared by all commands: composing the configuration, exit codes, one-line errors."""

import copy
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, TextIO, Union, get_args, get_origin

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from covid_cls.errors import InputError, NonFiniteError, listed
from covid_cls.interrupts import Interrupted, interruptible
from covid_cls.multirun import run_job
from covid_cls.sweep import Sweep, end_with_sweep
from covid_cls.targets import check_compositions, check_targets


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stdout`, which a live progress bar replaces to stay below the log lines."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stdout
        super().emit(record)


def conf_folder() -> Path:
    """Return the folder of the configuration: covid_cls/conf in a wheel, conf next to the package in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def run_command(
    task: Callable[[DictConfig], None],
    config_name: str,
    words: Sequence[str],
    stopped: str = "the results are incomplete",
    finished: Callable[[DictConfig], Path | None] | None = None,
) -> int:
    """Run `task` on the configuration that the words of a command line describe.

    An error of the input, or a training that diverged, is one line on stderr; the traceback is shown only if
    HYDRA_FULL_ERROR=1. In a multirun the other jobs go on.

    Args:
        task: The command's function; it takes the composed configuration without Hydra's own section.
        config_name: The main file of conf/, and the name of the module that a job of a multirun runs.
        words: What follows `python -m covid_cls.<command>`: overrides, and options such as --help or -m.
        stopped: What to tell the user whose signal ended the command.
        finished: Returns the folder of a job of which nothing is left to do. With it each job of a multirun is a
            process of its own, see `multirun.run_job`.

    Returns:
        The exit code: 0 done, 2 the input is at fault, 130 or 143 stopped by a signal, 1 anything else.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    code = 0
    end_with_sweep()
    check_compositions()
    try:
        with interruptible():
            cfg = _single_run(config_name, words)
            if cfg is None:
                code = _run_with_hydra(task, config_name, words, full, finished)
            else:
                with _as_hydra_job(cfg) as job:
                    code = _guarded(task, job, full)
    except SystemExit as end:  # of --help, and of a task that has printed why it failed
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except (HydraException, OmegaConfBaseException) as error:
        if full or isinstance(error, InstantiationException):  # a constructor raised it, so it may be a bug
            raise
        reason = error.__cause__ if isinstance(error.__cause__, InputError) else error  # raised by one of our resolvers
        print(f"error: {_one_line(reason)}", file=sys.stderr)
        code = 2
    except Interrupted as stop:
        print(f"stopped by {stop}: {stopped}", file=sys.stderr)
        code = stop.exit_code
    except Exception:
        if not Sweep.current:
            raise
        traceback.print_exc()  # a launcher failed; its jobs are listed all the same
        code = 1
    return (Sweep.current.close() if Sweep.current else 0) or code


def _single_run(config_name: str, words: Sequence[str]) -> DictConfig | None:
    """Return the configuration of a single run, composed once; None if Hydra's own command line is needed.

    That is the case for options (--help, -m, --config-dir) and for sweeps. For a single run `hydra.main` would compose
    the configuration twice: the first time only to learn that it is no sweep.
    """
    if any(word.startswith("-") for word in words):
        return None
    if any(override.is_sweep_override() for override in OverridesParser.create().parse_overrides(list(words))):
        return None
    with hydra.initialize_config_dir(str(conf_folder()), job_name=config_name, version_base="1.3"):
        cfg = hydra.compose(config_name, list(words), return_hydra_config=True)
    return None if cfg.hydra.mode == RunMode.MULTIRUN else cfg


@contextmanager
def _as_hydra_job(cfg: DictConfig) -> Iterator[DictConfig]:
    """Set up HydraConfig and logging as Hydra does for a job; yields the configuration without Hydra's section."""
    before = HydraConfig.instance().cfg
    with open_dict(cfg):
        cfg.hydra.mode = RunMode.RUN
        cfg.hydra.runtime.output_dir = str(Path(cfg.hydra.run.dir).resolve())
    HydraConfig.instance().set_config(cfg)
    try:
        configure_log(cfg.hydra.job_logging, cfg.hydra.verbose)
        job = copy.deepcopy(cfg)
        with read_write(job), open_dict(job):
            del job["hydra"]
        yield job
    finally:
        HydraConfig.instance().cfg = before


def _run_with_hydra(
    task: Callable[[DictConfig], None],
    config_name: str,
    words: Sequence[str],
    full: bool,
    finished: Callable[[DictConfig], Path | None] | None,
) -> int:
    """Let Hydra's own command line run `task`, once or for each job of a multirun; return the exit code."""
    code = 0

    def job(cfg: DictConfig) -> None:
        nonlocal code
        if finished is not None and _sweeping():
            run_job(f"covid_cls.{config_name}", cfg, full, finished)
        else:
            code = _guarded(task, cfg, full) or code

    main = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(job)
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR", "0")
    # Hydra reads its words from sys.argv. Without full errors it would print what goes wrong its own way and exit
    # with 1, whatever it was.
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [sys.argv[0], *words], "1"
    try:
        main()
    finally:
        sys.argv, os.environ["HYDRA_FULL_ERROR"] = before
    return code


def _guarded(task: Callable[[DictConfig], None], cfg: DictConfig, full: bool) -> int:
    """Run `task` and return the exit code; an error of the input becomes one line on stderr unless `full`."""
    try:
        task(cfg)
    except (InputError, NonFiniteError) as error:
        if full:
            raise
        job = f" ({' '.join(HydraConfig.get().overrides.task)})" if _sweeping() else ""
        print(f"error: {error}{job}", file=sys.stderr)
        return error.exit_code
    return 0


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as resolved dicts, lists, strings and numbers.

    Raises:
        InputError: A mandatory value is not set.
    """
    try:
        settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key} is not set: give {error.full_key}=… on the command line") from error
    assert isinstance(settings, dict)
    named = {str(key): value for key, value in settings.items()}
    check_targets(named)
    return named


def check_section(name: str, constructor: Callable[..., Any], section: dict[str, Any]) -> None:
    """Check a section of the configuration against the signature of the constructor that takes it.

    The signature is the only schema of a section of conf/.

    Raises:
        InputError: A key is unknown, or a value has another type than the constructor's annotation.
    """
    known = inspect.signature(constructor, eval_str=True).parameters
    for key, value in section.items():
        if key not in known:
            raise InputError(f"{name}.{key}: no such setting; {name} takes {listed(sorted(known), 30)}")
        hint = known[key].annotation
        if not _fits(value, hint):
            raise InputError(f"{name}.{key}={value}: expected {getattr(hint, '__name__', hint)}")


def existing_folder(settings: dict[str, Any], name: str) -> Path:
    """Return the folder that the setting `name` gives, relative to the working directory or else to output_root.

    Called before the libraries that would use the folder are imported, which takes seconds.

    Raises:
        InputError: There is no such folder in either place.
    """
    root = Path(settings["output_root"]).expanduser()
    given = Path(str(settings[name])).expanduser()
    for folder in (given, root / given):
        if folder.is_dir():
            return folder
    raise InputError(f"{name}={given}: no such folder (looked in {Path.cwd()} and in {root}); correct the path")


def existing_file(settings: dict[str, Any], name: str) -> Path:
    """Return the path that the setting `name` gives. Raises InputError if it does not exist."""
    path = Path(str(settings[name])).expanduser()
    if not path.exists():  # not is_file(): a shell's <(...) is a pipe
        raise InputError(f"{name}={path}: no such file (looked in {Path.cwd()}); correct the path")
    return path


def check_paths(settings: dict[str, Any], *names: str) -> None:
    """Raise InputError if one of these settings is not a string: Hydra parses some paths as lists or numbers."""
    for name in names:
        if not isinstance(settings[name], str):
            raise InputError(
                f"{name}={settings[name]}: Hydra does not read this as a path; quote it twice: '{name}=\"…\"'"
            )


def check_name(name: str | None) -> None:
    """Raise InputError if results of this name would be outside output_root."""
    if name is not None and (Path(str(name)).is_absolute() or ".." in Path(str(name)).parts):
        raise InputError(f"name={name}: must be a folder below output_root; output_root=… chooses another place")


def recipe() -> str | None:
    """Return the name of the chosen experiment, e.g. "grid", or None."""
    choice = HydraConfig.get().runtime.choices.get("experiment")
    return None if choice in (None, "null") else str(choice)


def _sweeping() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value has an annotated type; the items of a list are not checked."""
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
    """Return an error of Hydra or OmegaConf, with its cause, on one line, without object dumps and search paths."""
    parts = [str(error), str(error.__cause__ or "")]
    dull = ("full_key:", "object_type=", "reference_type=", "provider=", "Config search path")
    lines = [line.strip() for part in parts for line in part.splitlines()]
    return " ".join(line for line in dict.fromkeys(lines) if line and not line.startswith(dull))
