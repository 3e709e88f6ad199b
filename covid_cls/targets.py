"""Which code a configuration may name: Lightning's Trainer, callbacks and loggers, Hydra's plugins, nothing else.

Configuration is text that people pass on, and Hydra calls whatever a `_target_` or a logging factory in it names. Its
own list of what it refuses is, in its own words, no security boundary: of Hydra 1.3.8 it lets `torch.load`,
`pandas.read_pickle` and `Path.write_text` through.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, flag_override
from yaml import YAMLError  # type: ignore[import-untyped]

from covid_cls.errors import InputError, listed

_PLUGIN = r"(hydra_plugins|hydra\._internal\.core_plugins)\.[\w.]+"  # Hydra asks besides that it is a plugin it knows
_TARGETS = {  # where a _target_ may stand, and what it may be there
    r"trainer": r"pytorch_lightning\.Trainer",
    r"logger": r"pytorch_lightning\.loggers\.[A-Z]\w*",
    r"callbacks\.[^.]+": r"pytorch_lightning\.callbacks\.[A-Z]\w*",
    r"hydra\.callbacks\.sweep": r"covid_cls\.multirun\.SweepStart",
    r"hydra\.(launcher|sweeper)": _PLUGIN,
}
_HANDLERS = (
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "covid_cls.command.ConsoleHandler",
)
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check_targets(settings: dict[str, Any]) -> None:
    """InputError, one line with the key, where a `_target_` at any depth of plain settings is not an allowed one."""
    for place, key, value in _entries(settings):
        if key != "_target_":
            continue
        allowed = next((what for where, what in _TARGETS.items() if re.fullmatch(where, place, re.ASCII)), None)
        if allowed is None or not re.fullmatch(allowed, str(value), re.ASCII):
            raise InputError(
                f"{place}._target_={value}: refused; a configuration names classes of pytorch_lightning.callbacks and "
                "pytorch_lightning.loggers in these two groups and nothing else: remove it, or write it in Python"
            )


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's loader; it refuses what would run other code before Hydra's callbacks, logging or plugins see it.

    A class, and not a check in the command, because a launcher's processes compose their jobs themselves.
    """

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        """The composed configuration. ConfigCompositionException from an InputError where it is refused."""
        try:
            cfg = super().load_configuration(*args, **kwargs)
            _check_hydra(cfg)
        except YAMLError as error:  # of a file's tags or grammar
            raise ConfigCompositionException(str(error)) from InputError(" ".join(str(error).split()))
        except InputError as error:
            raise ConfigCompositionException(str(error)) from error
        return cfg


def check_compositions() -> None:
    """From now on the commands of this process compose their configuration with `CheckedLoader`."""
    hydra._internal.hydra.ConfigLoaderImpl = CheckedLoader  # type: ignore[attr-defined]  # Hydra takes no other loader


def _check_hydra(cfg: DictConfig) -> None:
    """InputError where Hydra's own part of `cfg` names code that is not allowed, or the rest does without resolving."""
    rest = _plain(cfg, resolve=False)
    del rest["hydra"]
    check_targets(rest)  # what Hydra's part interpolates; resolved, it is checked by the command
    copy = deepcopy(cfg)
    with flag_override(copy, ["readonly", "struct"], False):
        copy.hydra.runtime.output_dir = "."  # known later, and logs are named after it
    parts = ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging")
    own = {name: _plain(copy.hydra[name], resolve=True) if copy.hydra[name] else {} for name in parts}
    check_targets({"hydra": own})
    for place, key, value in _entries({name: own[name] for name in parts[3:]}):
        named = key in ("class", "()", "factory") and value not in _HANDLERS
        if named or (str(value).startswith(("ext://", "cfg://")) and value not in _STREAMS):
            raise InputError(f"hydra.{place}.{key}={value}: refused; logging may use {listed(_HANDLERS)}")
    if any(str(key).lstrip("+~").startswith("hydra") for key in own["sweeper"].get("params") or {}):
        raise InputError("hydra.sweeper.params: a sweep cannot vary Hydra itself; remove what begins with hydra")
    if copy.hydra.job.env_set:
        raise InputError("hydra.job.env_set: refused, for variables can pick libraries; set them in your shell")


def _plain(node: DictConfig, resolve: bool) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=resolve))


def _entries(node: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(place, key, value) of every entry of nested dicts and lists; place: the keys above it, with dots."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield place, key, value
        yield from _entries(value, f"{place}.{key}" if place else str(key))
