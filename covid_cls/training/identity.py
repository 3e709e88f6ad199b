"""What a run is: a readable name, and digests of its configuration, its data and its code. Without torch."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import covid_cls
from covid_cls.records import digest, files_digest, read_json

# What decides neither weights nor predictions, or is in the data digest already.
_NOT_IN_DIGEST = (
    "output_root",
    "name",
    "rerun",
    "logger",
    "feature_cache_gb",
    "checkpoint_seconds",
    "audit",
    "probes",
    "operating",
    "sweep",
)
_DATA_NOT_IN_DIGEST = ("path", "root", "cache", "workers")


def run_digests(settings: dict[str, Any], data_digest: str) -> dict[str, str]:
    """What decides a run's numbers, as `config`, `data` and `code`; settings: the resolved configuration."""
    identity = {key: value for key, value in settings.items() if key not in _NOT_IN_DIGEST}
    identity["data"] = {key: value for key, value in settings["data"].items() if key not in _DATA_NOT_IN_DIGEST}
    return {"config": digest(json.dumps(identity, sort_keys=True)), "data": data_digest, "code": code_digest()}


def finished_folder(settings: dict[str, Any], experiment: str) -> Path | None:
    """The folder of a finished run of these settings, their data as they are now and this code; None if there is none.

    experiment: name of the folder below output_root, or "*". The data are read only where a run of this name is
    finished; nothing else takes time.
    """
    records = {
        path.parent: read_json(path)
        for path in Path(settings["output_root"]).glob(f"{experiment}/{cell_name(settings)}-*/run.json")
    }
    finished = {folder: record for folder, record in records.items() if record.get("status") == "finished"}
    if not finished:
        return None
    of_data = {key: settings[key] for key in ("task", "data", "augment", "preprocess")} | {"seed": 0}
    digests = run_digests(settings, _data_digest(json.dumps(of_data)))
    return next((folder for folder, record in finished.items() if record.get("digests") == digests), None)


def cell_name(settings: dict[str, Any]) -> str:
    """A readable name of a grid cell: task-backbone-strategy-loss-s<seed>, and what sets it apart.

    what is seen where that is not the whole view, views<K> where it is trained on K fixed draws, fold<k> in a
    cross-validation, "leaky" where splits are.
    """
    strategy = settings["strategy"]
    depth = f"until_{strategy['freeze_until']}" if strategy["freeze_until"] else strategy["name"]
    loss = settings["loss"]
    kind = "weighted_ce" if loss["name"] == "ce" and loss.get("class_weights") is not None else loss["name"]
    parts = [settings["task"]["name"], settings["backbone"]["name"], depth, kind, f"s{settings['seed']}"]
    if settings["preprocess"]["seen"] != "whole":
        parts.append(f"{settings['preprocess']['seen']}_seen")
    if settings["feature_cache"].startswith("views:"):
        parts.append(settings["feature_cache"].replace(":", ""))
    if settings["data"]["folds"] is not None:
        parts.append(f"fold{settings['data']['fold']}")
    if settings["data"]["group"] == "image":
        parts.append("leaky")
    return "-".join(parts)


def code_digest() -> str:
    """Stands for the code that decides weights and predictions: labels, models, data and training."""
    package = Path(covid_cls.__file__).parent
    files = [package / "labels.py"]
    for layer in ("models", "data", "training"):
        files += sorted((package / layer).glob("*.py"))
    return files_digest(files)


@cache  # hundreds of cells may share one set
def _data_digest(settings: str) -> str:
    from covid_cls.training.sections import read_data  # torch

    return read_data(json.loads(settings)).digest
