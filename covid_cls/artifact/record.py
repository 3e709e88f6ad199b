"""What a finished run writes as its model: the network, when to doubt it, and a record of what it is worth."""

import datetime
import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from covid_cls.artifact import screen
from covid_cls.artifact.files import read_record, update_record, write_artifact
from covid_cls.data.datamodule import Radiographs
from covid_cls.evaluation.intervals import score_intervals
from covid_cls.evaluation.operating import frozen_operating
from covid_cls.evaluation.predictions import without_nan
from covid_cls.evaluation.resampling import patient_codes
from covid_cls.labels import POSITIVE, Task
from covid_cls.models.scorer import Scorer
from covid_cls.records import MODEL, digest, files_digest, read_predictions, whole_file

_VIEW = ("size", "crop", "mean", "sd", "seen")  # what decides the network's input
INTENDED_USE = (
    "For research on how such networks behave: to repeat, compare and explain their scores on frontal chest "
    "radiographs. It has not been validated for clinical use, and a score is a statement about a data set, never about "
    "a patient."
)
_CHOSE = "It chose the epoch, the temperature and the thresholds, so that these scores look too good."
_CODE_LICENCE = "Apache-2.0"
_WEIGHTS_LICENCE = (
    "The weights are derived from the training images and from the starting weights: the terms of these apply to them."
)


def write_model(
    folder: Path, run: dict[str, Any], scorer: Scorer, data: Radiographs, epochs: list[dict[str, float]]
) -> None:
    """Write a run's model/ and its operating.json; both are functions of training and validation, never of test.

    folder: of the run, with its predictions-val.csv. run: what run.json holds. epochs: a row of numbers for each, see
    `EpochHistory`.
    """
    frozen = frozen_operating(folder, scorer.task, **run["config"]["operating"])
    val = read_predictions(folder / "predictions-val.csv", scorer.task.classes)
    metrics = [validation_block(val, scorer.task, str(data.name))]
    record = model_record(scorer, data, run, frozen, metrics, epochs)
    write_artifact(folder / MODEL, scorer, known_screen(scorer, data), record)


def known_screen(scorer: Scorer, data: Radiographs) -> dict[str, Tensor]:
    """What `fit_screen` gives, from the cache of `data` where a network of the same stages before its head was there.

    A sweep over heads shares it: fitting costs a pass of the network over up to 2,000 images, which takes longer than
    training a head on cached features.
    """
    stages = {
        name: t.detach().cpu().contiguous()
        for name, t in scorer.net.state_dict().items()
        if not name.startswith("head.")
    }
    view = {name: getattr(scorer.preprocess, name) for name in _VIEW}
    facts = [hashlib.sha256(save(stages)).hexdigest(), view, data.digest, data.store_digest]
    path = data.cache / "screens" / f"{digest(json.dumps([*facts, files_digest([Path(screen.__file__)])]))}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError):  # not there yet, or damaged
        tensors = screen.fit_screen(scorer, data)
    with whole_file(path) as file:
        file.write(save(tensors))
    return tensors


def model_record(
    scorer: Scorer,
    data: Radiographs,
    run: dict[str, Any],
    operating: dict[str, Any],
    metrics: list[dict[str, Any]],
    epochs: list[dict[str, float]],
) -> dict[str, Any]:
    """model.json but for its schema and the digest of its weights, in plain values."""
    config, task, view = run["config"], scorer.task, scorer.preprocess
    loss = config["loss"]["name"]
    licences = data.table["license"] if "license" in data.table.columns else pd.Series("", index=data.table.index)
    return {
        "name": run["cell"],
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "intended_use": INTENDED_USE,
        "task": {
            "name": task.name,
            "classes": list(task.classes),
            "multilabel": task.multilabel,
            "positive": POSITIVE,
        },
        "network": {
            "backbone": config["backbone"]["name"],
            "strategy": config["strategy"]["name"],
            "freeze_until": config["strategy"]["freeze_until"],
            "head": {"hidden": config["head"]["hidden"], "dropout": config["head"]["dropout"]},
        },
        "preprocessing": {name: getattr(view, name) for name in _VIEW},
        "operating": operating,
        "metrics": metrics,
        "weights": {
            "used": Path(run["weights"]["used"]).name,  # not where it lies on this machine
            **{name: run["weights"][name] for name in ("sha256", "note")},
        },
        "training": {
            "loss": loss if config["loss"].get("class_weights") is None else f"{loss} with class weights",
            "optimizer": config["optimizer"]["name"],
            "augment": config["augment"]["name"],
            "epochs": len(epochs),
            "best_epoch": int(best_epoch(epochs)["epoch"]) + 1,
            "seed": config["seed"],
            "precision": run["precision"],
        },
        "data": {"name": data.name, **run["data"]},
        "licence": {
            "code": _CODE_LICENCE,
            "weights": _WEIGHTS_LICENCE,
            "images": {str(name): int(n) for name, n in licences.value_counts().items()},
        },
        "notes": run["notes"],
        "digests": run["digests"],
        "versions": run["versions"],
    }


def best_epoch(epochs: list[dict[str, float]]) -> dict[str, float]:
    """The row of the epoch whose weights are kept: that of the least validation loss, the first of several."""
    return min(epochs, key=lambda row: row.get("loss/val", math.inf))


def validation_block(val: pd.DataFrame, task: Task, name: str) -> dict[str, Any]:
    """The scores of a run's validation table with their 95 % intervals; name: of the data set."""
    with warnings.catch_warnings(record=True) as caught:  # of what limits the intervals
        warnings.simplefilter("always")
        scores = {score: interval._asdict() for score, interval in score_intervals(val, task).items()}
    limits = dict.fromkeys(f" {str(warning.message).capitalize()}." for warning in caught)
    block: dict[str, Any] = without_nan(
        {
            "on": f"validation split of {name}",
            "note": "".join([_CHOSE, *limits]),
            "level": 0.95,
            "n_images": len(val),
            "n_patients": len(np.unique(patient_codes(val))),
            "scores": scores,
        }
    )
    return block


def add_scores(folder: Path, assessed: dict[str, Any]) -> None:
    """Put what `assess` found on a run's test split into the record and the card of its model, in place of earlier."""
    record = read_record(folder)
    image, opened = assessed["image"], assessed["openings"]
    times = "once" if opened["times"] == 1 else f"{opened['times']} times"
    of_classes = {f"{name}.{score}": value for name, row in image["per_class"].items() for score, value in row.items()}
    block = {
        "on": f"test split of {record['data']['name']}",
        "note": f"Opened {times}, first on {opened['first'][:10]}.",
        "level": assessed["settings"]["level"],
        "n_images": assessed["n_images"],
        "n_patients": assessed["n_patients"],
        "scores": {**image["overall"], **of_classes},
    }
    kept = [known for known in record["metrics"] if known["on"] != block["on"]]
    update_record(folder, {**record, "metrics": [*kept, block]})
