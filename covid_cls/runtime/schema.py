"""Checks of a composed configuration: which code it may name, which keys it may hold, and their types.

A configuration is text that people pass on to each other, and Hydra calls whatever a `_target_` or a logging factory in
it names. By its own documentation, Hydra's list of refused names is no security boundary: Hydra 1.3.8 accepts
`torch.load`, `pandas.read_pickle` and `Path.write_text`.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin

from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import MissingMandatoryValue

from covid_cls.errors import InputError, listed

# Hydra itself also requires that the class is a registered plugin.
_PLUGIN = r"(hydra_plugins|hydra\._internal\.core_plugins)\.[\w.]+"
# Where a _target_ may be, and what it may name there.
_TARGETS = {
    r"trainer": r"pytorch_lightning\.Trainer",
    r"logger": r"pytorch_lightning\.loggers\.[A-Z]\w*",
    r"callbacks\.[^.]+": r"pytorch_lightning\.callbacks\.[A-Z]\w*",
    r"hydra\.callbacks\.sweep": r"covid_cls\.runtime\.sweep\.SweepStart",
    r"hydra\.(launcher|sweeper)": _PLUGIN,
    r"hydra\.sweeper\.sampler": r"optuna\.samplers\.[A-Z]\w*",
}
_HANDLERS = (
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "covid_cls.runtime.cli.ConsoleHandler",
)
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")

# Former names of settings and of options of groups, with the present ones.
_RENAMED = {"probes": "baselines", "probe_folds": "baseline_folds"}
_RENAMED_OPTIONS = {
    ("augment", "seed"): "original",
    ("scheduler", "seed"): "original",
    **{("experiment", f"seed_part1/{name}"): f"original_part1/{name}" for name in ("fc", "partial", "full")},
    **{("experiment", f"seed_part2/{name}"): f"original_part2/{name}" for name in ("bce", "focal")},
}


def plain_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as resolved dicts, lists, strings and numbers, after `check_targets`.

    Raises:
        InputError: A mandatory value is not set, or a `_target_` is refused.
    """
    try:
        settings = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key} is not set: give {error.full_key}=… on the command line") from error
    check_targets(settings)
    return settings


# A schema is the function or class that takes a section, or several of them by the section's `name`.
Schema = Callable[..., Any] | Mapping[str, Callable[..., Any]]


def check_sections(settings: Mapping[str, Any], schemas: Mapping[str, Schema]) -> None:
    """Check each section that `schemas` names by `check_section`."""
    for name, schema in schemas.items():
        check_section(name, schema, settings[name])


def check_section(name: str, schema: Schema, section: Mapping[str, Any]) -> None:
    """Check a section of the configuration against the signature of the function or class that takes it.

    Args:
        name: Name of the section; "" for settings of the top level.
        schema: The function or class, whose signature is the only schema of the section. In a mapping of several of
            them, the section's own `name` selects one. Positional-only arguments are not settings.
        section: The settings.

    Raises:
        InputError: A key is unknown, a value has another type than the annotation, or the section's name is unknown.
    """
    prefix, taker = f"{name}." if name else "", name or "it"
    if isinstance(schema, Mapping):
        kind = section.get("name")
        if kind not in schema:
            raise InputError(f"{prefix}name={kind}: unknown; choose one of {listed(list(schema), 30)}")
        taker = f"{name}.name={kind}"
        schema, section = schema[str(kind)], {key: value for key, value in section.items() if key != "name"}
    parameters = inspect.signature(schema, eval_str=True).parameters
    known = {key: parameter for key, parameter in parameters.items() if parameter.kind != parameter.POSITIONAL_ONLY}
    for key, value in section.items():
        if key not in known:
            takes = listed(sorted(known), 30) or "no settings"
            raise InputError(f"{prefix}{key}: no such setting; {taker} takes {takes}")
        hint = known[key].annotation
        if not _fits(value, hint):
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("collections.abc.", "")
            raise InputError(f"{prefix}{key}={value}: expected {expected}")


def check_paths(settings: Mapping[str, Any], *names: str) -> None:
    """Raise InputError if one of these settings is not a string: Hydra parses some paths as lists or numbers."""
    for name in names:
        if not isinstance(settings[name], str):
            raise InputError(
                f"{name}={settings[name]}: Hydra does not read this as a path; quote it twice: '{name}=\"…\"'"
            )


def check_name(name: str | None) -> None:
    """Raise InputError if results of this name would be written outside output_root."""
    if name is not None and (Path(str(name)).is_absolute() or ".." in Path(str(name)).parts):
        raise InputError(f"name={name}: must be a folder below output_root; output_root=… chooses another place")


def existing_folder(settings: Mapping[str, Any], name: str) -> Path:
    """Return the folder that the setting `name` gives, relative to the working directory or else to output_root.

    Commands call it before they import the libraries that would use the folder, because those imports take seconds.

    Raises:
        InputError: There is no such folder in either place.
    """
    root = Path(settings["output_root"]).expanduser()
    given = Path(str(settings[name])).expanduser()
    for folder in (given, root / given):
        if folder.is_dir():
            return folder
    raise InputError(f"{name}={given}: no such folder (searched in {Path.cwd()} and in {root}); correct the path")


def existing_file(settings: Mapping[str, Any], name: str) -> Path:
    """Return the path that the setting `name` gives. Raises InputError if it does not exist."""
    path = Path(str(settings[name])).expanduser()
    # exists() and not is_file(), since a shell's <(...) is a pipe.
    if not path.exists():
        raise InputError(f"{name}={path}: no such file (searched in {Path.cwd()}); correct the path")
    return path


def check_renamed(words: Sequence[str]) -> None:
    """Raise InputError if an override uses the former name of a setting or of an option."""
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if key in _RENAMED:
            raise InputError(f"{key}: this setting is now called {_RENAMED[key]}; write {_RENAMED[key]}={value}")
        for option in value.split(","):
            if (key, option) in _RENAMED_OPTIONS:
                raise InputError(f"{key}={option}: this option is now called {key}={_RENAMED_OPTIONS[key, option]}")


def check_targets(settings: Mapping[str, Any]) -> None:
    """Raise InputError if a `_target_` at any depth of plain settings names code that is not allowed there."""
    for place, key, value in _entries(settings):
        if key != "_target_":
            continue
        allowed = next((what for where, what in _TARGETS.items() if re.fullmatch(where, place, re.ASCII)), None)
        if allowed is None or not re.fullmatch(allowed, str(value), re.ASCII):
            raise InputError(
                f"{place}._target_={value}: refused; a configuration may only name classes of "
                "pytorch_lightning.callbacks and pytorch_lightning.loggers, in these two groups: remove it, or use it "
                "from Python"
            )


def check_hydra(cfg: DictConfig) -> None:
    """Raise InputError if Hydra's own section, or an interpolation in the other sections, names refused code.

    Args:
        cfg: The composed configuration with its section `hydra`, before Hydra acts on it.
    """
    rest = _container(cfg, resolve=False)
    del rest["hydra"]
    check_targets(rest)
    copy = deepcopy(cfg)
    with flag_override(copy, ["readonly", "struct"], False):
        # Hydra sets it when a job starts, and the names of log files refer to it.
        copy.hydra.runtime.output_dir = "."
    parts = ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging")
    own = {name: _container(copy.hydra[name], resolve=True) if copy.hydra[name] else {} for name in parts}
    check_targets({"hydra": own})
    for place, key, value in _entries({name: own[name] for name in ("job_logging", "hydra_logging")}):
        factory = key in ("class", "()", "factory") and value not in _HANDLERS
        if factory or (str(value).startswith(("ext://", "cfg://")) and value not in _STREAMS):
            raise InputError(f"hydra.{place}.{key}={value}: refused; logging may use {listed(_HANDLERS)}")
    if any(str(key).lstrip("+~").startswith("hydra") for key in own["sweeper"].get("params") or {}):
        raise InputError(
            "hydra.sweeper.params: a sweep cannot vary Hydra itself; remove the keys that begin with hydra"
        )
    # Optuna's sweeper would import and call it.
    if own["sweeper"].get("custom_search_space"):
        raise InputError("hydra.sweeper.custom_search_space: refused; use hydra.sweeper.params")
    if copy.hydra.job.env_set:
        raise InputError("hydra.job.env_set: refused, since variables can select libraries; set them in your shell")


def hydra_actions(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of Hydra's section that acts in the jobs of a sweep, not resolved."""
    parts = ("callbacks", "launcher", "job_logging", "hydra_logging", "job.env_set", "job.env_copy")
    return {name: _plain_or_none(OmegaConf.select(cfg.hydra, name)) for name in parts}


def _plain_or_none(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def _container(node: DictConfig, resolve: bool) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=resolve))


def _entries(node: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (place, key, value) for every entry of nested dicts and lists; place is the dotted path of the parent."""
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield place, key, value
        yield from _entries(value, f"{place}.{key}" if place else str(key))


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value has an annotated type; the items of a list are not checked."""
    if hint in (Any, inspect.Parameter.empty):
        return True
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
