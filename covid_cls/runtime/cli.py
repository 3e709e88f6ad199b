"""Commands: settings from the words of a command line or from Python, exit codes, errors on one line."""

import argparse
import functools
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import configure_log
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from covid_cls.errors import ExportError, InputError, NonFiniteError
from covid_cls.runtime.schema import check_hydra, check_renamed, hydra_actions, plain_settings
from covid_cls.runtime.sweep import Sweep, end_with_sweep, run_job
from covid_cls.system import Interrupted, interruptible

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """What a command is asked to do.

    Attributes:
        settings: The composed configuration as plain dicts, lists, strings and numbers.
        command: The command line that repeats it.
        recipe: Name of the chosen experiment, e.g. "grid", or None.
        overrides: The words of the command line, without options.
    """

    settings: dict[str, Any]
    command: str
    recipe: str | None
    overrides: list[str]


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
    package = Path(__file__).resolve().parents[1]
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def run_command(
    task: Callable[[Job], Result],
    config_name: str,
    words: Sequence[str],
    *,
    stopped: str = "the results are incomplete",
    exit_code: Callable[[Result], int] = lambda result: 0,
    finished: Callable[[Job], Path | None] | None = None,
) -> int:
    """Run a command on the words of its command line, and report errors as a command does.

    An error of the input, or a training that diverged, is one line on stderr; the traceback is shown only if
    HYDRA_FULL_ERROR=1. In a multirun the other jobs continue.

    Args:
        task: The command's function.
        config_name: The main file of conf/, and the name of the module that a job of a multirun runs.
        words: What follows `python -m covid_cls.<command>`: overrides, and options such as --help or -m.
        stopped: What to tell the user whose signal ended the command.
        exit_code: Computes the exit code from the result of `task`.
        finished: Returns the run folder of a job that is already finished. If it is given, each job of a multirun is a
            process of its own, see `sweep.run_job`.

    Returns:
        The exit code: 0 done, 2 the input is wrong, 130 or 143 stopped by a signal, 1 anything else.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    code = 0
    end_with_sweep()
    try:
        with interruptible():
            check_renamed(words)
            cfg = _single_run(config_name, words)
            if cfg is None:
                _check_external(config_name, words)
                code = _run_with_hydra(task, config_name, words, full, exit_code, finished)
            else:
                with _hydra_job(cfg) as own:
                    configure_log(cfg.hydra.job_logging, cfg.hydra.verbose)
                    code = _guarded(task, config_name, own, full, exit_code)
    except SystemExit as end:
        # Raised by --help and by argparse.
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except InputError as error:
        if full:
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except (HydraException, OmegaConfBaseException) as error:
        # An InstantiationException comes from a constructor, so it may be a bug whose traceback is needed.
        if full or isinstance(error, InstantiationException):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        code = 2
    except Interrupted as stop:
        print(f"stopped by {stop}: {stopped}", file=sys.stderr)
        code = stop.exit_code
    except Exception:
        if not Sweep.current:
            raise
        # The launcher failed. The jobs that it started are listed all the same.
        traceback.print_exc()
        code = 1
    return (Sweep.current.close() if Sweep.current else 0) or code


def call_command(
    task: Callable[[Job], Result], config_name: str, overrides: Sequence[str], settings: Mapping[str, Any]
) -> Result:
    """Run a command from Python and return its result.

    Args:
        task: The command's function.
        config_name: The main file of conf/.
        overrides: Words as on the command line, such as "backbone=resnet18".
        settings: More settings by their names, with Python values instead of text.

    Raises:
        InputError: The input is wrong; the message is the one that the command prints.
    """
    words = [*overrides, *(f"{name}={_as_word(value)}" for name, value in settings.items())]
    check_renamed(words)
    try:
        cfg = _single_run(config_name, words)
        if cfg is None:
            raise InputError(
                f"{shlex.join(words)}: options and several values are for the command line, which runs sweeps: "
                f"python -m covid_cls.{config_name} -m …"
            )
        with interruptible(), _hydra_job(cfg) as own:
            return task(_job(config_name, own))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_one_line(error)) from error


def compose_job(config_name: str, words: Sequence[str]) -> Job:
    """Compose the configuration of a single job and check it; nothing is run.

    Raises:
        InputError: The configuration names refused code, or a file of it is not valid YAML.
    """
    cfg = _compose(config_name, words)
    check_hydra(cfg)
    with _hydra_job(cfg) as own:
        return _job(config_name, own)


def _compose(config_name: str, words: Sequence[str], folder: Path | None = None) -> DictConfig:
    """Compose a configuration with its section `hydra`, by Hydra's public API."""
    try:
        with hydra.initialize_config_dir(str(folder or conf_folder()), job_name=config_name, version_base="1.3"):
            return hydra.compose(config_name, list(words), return_hydra_config=True)
    except YAMLError as error:
        # Raised for tags such as !!python/object, and for syntax errors.
        raise InputError(" ".join(str(error).split())) from error


def _single_run(config_name: str, words: Sequence[str]) -> DictConfig | None:
    """Return the configuration of a single run, composed once; None if Hydra's own command line is needed.

    That is the case for options (--help, -m, --config-dir) and for sweeps. For a single run `hydra.main` would compose
    the configuration twice, the first time only to learn that it is no sweep.
    """
    if any(word.startswith("-") for word in words):
        return None
    if any(override.is_sweep_override() for override in OverridesParser.create().parse_overrides(list(words))):
        return None
    cfg = _compose(config_name, words)
    check_hydra(cfg)
    return None if cfg.hydra.mode == RunMode.MULTIRUN else cfg


def _check_external(config_name: str, words: Sequence[str]) -> None:
    """Check what a command line adds to the package's own configuration, before Hydra acts on it.

    Raises:
        InputError: Files of another folder, or words about Hydra itself, name refused code.
    """
    parser = argparse.ArgumentParser(add_help=False)
    for short, long in (("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir")):
        parser.add_argument(short, long)
    parser.add_argument("--experimental-rerun")
    options, rest = parser.parse_known_args(list(words))
    if options.experimental_rerun is not None:
        raise InputError("--experimental-rerun: not supported; the command of a run resumes it")
    lines = [word for word in rest if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    overrides = OverridesParser.create().parse_overrides(lines)
    about_hydra = [override for override in overrides if str(override.key_or_group).startswith("hydra")]
    if not (about_hydra or options.config_path or options.config_name or options.config_dir):
        return
    if swept := [override for override in about_hydra if override.is_sweep_override()]:
        raise InputError(f"{swept[0].input_line}: a sweep cannot vary Hydra itself; give one value")
    fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    if options.config_dir:
        if any("hydra.searchpath" in line for line in fixed):
            raise InputError("hydra.searchpath: does not go with --config-dir; give one of them")
        fixed.append(f"hydra.searchpath=[{_as_word('file://' + str(Path(options.config_dir).resolve()))}]")
    folder = Path(options.config_path).resolve() if options.config_path else None

    def compose(*choice: str) -> DictConfig:
        return _compose(options.config_name or config_name, [*fixed, *choice], folder)

    base = compose()
    check_hydra(base)
    _check_swept_options(base, [override for override in overrides if override.is_sweep_override()], compose)


def _check_swept_options(base: DictConfig, swept: Sequence[Override], compose: Callable[..., DictConfig]) -> None:
    """Raise InputError if an option of a group, which is a file, would change what Hydra does in a job of a sweep."""
    params = [f"{key}={value}" for key, value in (base.hydra.sweeper.get("params") or {}).items()]
    for override in [*swept, *OverridesParser.create().parse_overrides(params)]:
        group = override.key_or_group
        if group not in base.hydra.runtime.choices:
            continue
        for choice in _choices(override):
            if hydra_actions(compose(f"{group}={choice}")) != hydra_actions(base):
                raise InputError(f"{group}={choice}: an option of a sweep cannot change Hydra itself")


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.value())]
    if not override.is_choice_sweep():
        raise InputError(f"{override.input_line}: list the options of a group that another folder may define")
    return list(override.sweep_string_iterator())


@contextmanager
def _hydra_job(cfg: DictConfig) -> Iterator[DictConfig]:
    """Make `cfg` Hydra's present configuration, as in a job of Hydra, and yield it without the section `hydra`."""
    before = HydraConfig.instance().cfg
    with open_dict(cfg):
        cfg.hydra.mode = RunMode.RUN
        cfg.hydra.runtime.output_dir = str(Path(cfg.hydra.run.dir).resolve())
    HydraConfig.instance().set_config(cfg)
    try:
        yield OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    finally:
        HydraConfig.instance().cfg = before


def _run_with_hydra(
    task: Callable[[Job], Result],
    config_name: str,
    words: Sequence[str],
    full: bool,
    exit_code: Callable[[Result], int],
    finished: Callable[[Job], Path | None] | None,
) -> int:
    """Let Hydra's own command line run `task`, once or for each job of a multirun; return the exit code."""
    code = 0

    def job(cfg: DictConfig) -> float | None:
        nonlocal code
        if finished is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
            check = functools.partial(_finished_folder, finished, config_name, cfg)
            return run_job(f"covid_cls.{config_name}", check, cfg.sweep.fail_fast, full)
        code = _guarded(task, config_name, cfg, full, exit_code) or code
        return None

    main = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(job)
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR", "0")
    # Hydra reads its words from sys.argv. Without full errors it would print an error in its own way and exit with 1,
    # whatever the error was.
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [sys.argv[0], *words], "1"
    try:
        main()
    finally:
        sys.argv, os.environ["HYDRA_FULL_ERROR"] = before
    return code


def _finished_folder(finished: Callable[[Job], Path | None], config_name: str, cfg: DictConfig) -> Path | None:
    return finished(_job(config_name, cfg))


def _guarded(
    task: Callable[[Job], Result], config_name: str, cfg: DictConfig, full: bool, exit_code: Callable[[Result], int]
) -> int:
    """Run `task` and return the exit code; an expected error becomes one line on stderr unless `full`."""
    try:
        return exit_code(task(_job(config_name, cfg)))
    except (InputError, NonFiniteError, ExportError) as error:
        if full:
            raise
        own = HydraConfig.get()
        overrides = f" ({' '.join(own.overrides.task)})" if own.mode == RunMode.MULTIRUN else ""
        print(f"error: {error}{overrides}", file=sys.stderr)
        return error.exit_code


def _job(config_name: str, cfg: DictConfig) -> Job:
    """Return the job of a composed configuration without its section `hydra`, which HydraConfig holds."""
    overrides = list(HydraConfig.get().overrides.task)
    choice = HydraConfig.get().runtime.choices.get("experiment")
    return Job(
        settings=plain_settings(cfg),
        command=shlex.join(["python", "-m", f"covid_cls.{config_name}", *overrides]),
        recipe=None if choice in (None, "null") else str(choice),
        overrides=overrides,
    )


def _as_word(value: Any) -> str:
    """Return a Python value in the grammar of Hydra's overrides."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_as_word, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_as_word(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    quoted = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'


def _one_line(error: Exception) -> str:
    """Return an error of Hydra or OmegaConf, with its cause, on one line, without object dumps and search paths."""
    # An InputError is raised by one of the package's own resolvers or checks.
    if isinstance(error.__cause__, InputError):
        return str(error.__cause__)
    parts = [str(error), str(error.__cause__ or "")]
    noise = ("full_key:", "object_type=", "reference_type=", "provider=", "Config search path")
    lines = [line.strip() for part in parts for line in part.splitlines()]
    text = " ".join(line for line in dict.fromkeys(lines) if line and not line.startswith(noise))
    return f"{text} (pip install 'covid_cls[search]' adds it)" if "'optuna'" in text else text
