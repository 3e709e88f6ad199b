"""The files of a model folder: weights, the record of the model, and its card."""

import datetime
import hashlib
import json
import math
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

import covid_cls
from covid_cls.bundle.card import model_card
from covid_cls.bundle.ood import OOD_VERSION, fit_ood
from covid_cls.data.datamodule import Radiographs
from covid_cls.errors import InputError, listed
from covid_cls.evaluation.intervals import patient_codes, score_intervals
from covid_cls.evaluation.predictions import without_nan
from covid_cls.evaluation.thresholds import frozen_operating
from covid_cls.io import MODEL, atomic_file, digest, file_sha256, read_predictions, write_json
from covid_cls.models.backbones import build_network
from covid_cls.models.inference import Scorer
from covid_cls.models.names import loss_label
from covid_cls.models.transforms import Preprocess
from covid_cls.tasks import POSITIVE, TASKS, Task

SCHEMA = 1
WEIGHTS, RECORD, CARD = "model.safetensors", "model.json", "MODEL_CARD.md"
# Prefixes of the tensors in the weights file. Version 0.1.0 called the out-of-distribution (OOD) check a screen.
_NETWORK, _OOD = "net.", "screen."
# The settings that determine the input of the network.
_PREPROCESSING = ("size", "crop", "mean", "sd", "seen")
# Limits for untrusted files. A record has about 10,000 bytes.
_MAX_RECORD_BYTES, _MAX_SIDE = 2_000_000, 4096

INTENDED_USE = (
    "For research on the behaviour of such networks: to reproduce, compare and explain their scores on frontal chest "
    "radiographs. The model has not been validated for clinical use. Its scores describe a data set, not a patient."
)
_VALIDATION_NOTE = "Epoch, temperature and thresholds were chosen on this split, so its scores are optimistic."
_CODE_LICENCE = "Apache-2.0"
_WEIGHTS_LICENCE = (
    "The weights are derived from the training images and the initial weights, whose licence terms apply to them."
)


def write_model(folder: Path, run: dict[str, Any], scorer: Scorer, data: Radiographs, epochs: int) -> None:
    """Write the model folder of a run, and operating.json. Both depend on training and validation images only.

    Args:
        folder: The run folder, which must contain predictions-val.csv.
        run: The content of run.json.
        scorer: The trained network.
        data: The images of the run.
        epochs: Number of epochs that were trained.
    """
    frozen = frozen_operating(folder, scorer.task, **run["config"]["operating"])
    # Scores are computed from the file, so that users can compute the same ones.
    val = read_predictions(folder / "predictions-val.csv", scorer.task.classes)
    metrics = [validation_block(val, scorer.task, str(data.name))]
    record = model_record(scorer, data, run, frozen, metrics, epochs)
    write_model_folder(folder / MODEL, scorer, load_or_fit_ood(scorer, data), record)


def model_record(
    scorer: Scorer,
    data: Radiographs,
    run: dict[str, Any],
    operating: dict[str, Any],
    metrics: list[dict[str, Any]],
    epochs: int,
) -> dict[str, Any]:
    """Return the content of model.json without its schema and the digest of the weights.

    Args:
        scorer: The trained network.
        data: The images of the run.
        run: The content of run.json.
        operating: Temperature and thresholds, from `frozen_operating`.
        metrics: Scores, from `validation_block`.
        epochs: Number of epochs that were trained.
    """
    config, task, weights, selected = run["config"], scorer.task, run["weights"], run["selected"]
    licences = data.table.get("license", pd.Series("", index=data.table.index)).value_counts()
    return {
        # run.json has the name of the run folder under this key.
        "name": run["cell"],
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "intended_use": INTENDED_USE,
        "task": {"name": task.name, "classes": list(task.classes), "multilabel": task.multilabel, "positive": POSITIVE},
        "network": {
            "backbone": config["backbone"]["name"],
            "strategy": config["strategy"]["name"],
            "freeze_until": config["strategy"]["freeze_until"],
            "head": {"hidden": config["head"]["hidden"], "dropout": config["head"]["dropout"]},
        },
        "preprocessing": _preprocessing(scorer),
        "operating": operating,
        "metrics": metrics,
        # Without the folder of the weights, which is private to the machine.
        "weights": {"used": Path(weights["used"]).name, "sha256": weights["sha256"], "note": weights["note"]},
        "training": {
            "loss": loss_label(config["loss"]),
            "optimizer": config["optimizer"]["name"],
            "augment": config["augment"]["name"],
            "epochs": epochs,
            "best_epoch": selected["epoch"],
            "monitor": selected["monitor"],
            "monitor_value": selected["value"],
            "seed": config["seed"],
            "precision": run["precision"],
        },
        "data": {"name": data.name, **run["data"]},
        "licence": {
            "code": _CODE_LICENCE,
            "weights": _WEIGHTS_LICENCE,
            "images": {str(name): int(n) for name, n in licences.items()},
        },
        **{key: run[key] for key in ("notes", "digests", "versions")},
    }


def validation_block(val: pd.DataFrame, task: Task, name: str) -> dict[str, Any]:
    """Return the scores of a validation table with their 95 % intervals, for the list of metrics in a record.

    Args:
        val: Predictions table of the validation split.
        task: The task of the predictions.
        name: Name of the data set.
    """
    # The warnings state the limits of the intervals, for instance few patients.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = {score: interval._asdict() for score, interval in score_intervals(val, task).items()}
    limits = dict.fromkeys(f" {str(warning.message).capitalize()}." for warning in caught)
    return without_nan(
        {
            "on": f"validation split of {name}",
            "note": "".join([_VALIDATION_NOTE, *limits]),
            "level": 0.95,
            "n_images": len(val),
            "n_patients": len(np.unique(patient_codes(val))),
            "scores": scores,
        }
    )


def add_test_scores(folder: Path, assessed: dict[str, Any]) -> None:
    """Add the scores of a run's test split to the record and the card of its model, or replace earlier ones.

    Args:
        folder: The model folder.
        assessed: The result of `assess` with the number of test-set accesses.
    """
    # metrics.json has the test-set accesses under this key.
    record, image, accesses = read_record(folder), assessed["image"], assessed["openings"]
    times = "once" if accesses["times"] == 1 else f"{accesses['times']} times"
    per_class = {f"{name}.{score}": value for name, row in image["per_class"].items() for score, value in row.items()}
    block = {
        "on": f"test split of {record['data']['name']}",
        "note": f"The test set was accessed {times}, first on {accesses['first'][:10]}.",
        "level": assessed["settings"]["level"],
        "n_images": assessed["n_images"],
        "n_patients": assessed["n_patients"],
        "scores": {**image["overall"], **per_class},
    }
    kept = [known for known in record["metrics"] if known["on"] != block["on"]]
    _write_record(folder, {**record, "metrics": [*kept, block]})


def load_or_fit_ood(scorer: Scorer, data: Radiographs) -> dict[str, Tensor]:
    """Return the tensors of `fit_ood`, from the cache if they were fitted for a network with the same features."""
    # The runs of a sweep over heads share one fit. A fit needs the network's features of up to 2,000 images, which
    # takes longer than the training of a head on cached features.
    features = {name: tensor for name, tensor in scorer.net.state_dict().items() if not name.startswith("head.")}
    weights = hashlib.sha256(_safetensors(features)).hexdigest()
    facts = [OOD_VERSION, weights, _preprocessing(scorer), data.digest, data.store_digest]
    path = data.cache / "ood" / f"{digest(json.dumps(facts))}.safetensors"
    try:
        return load_file(path)
    # The file does not exist yet, or is damaged.
    except (OSError, SafetensorError):
        tensors = fit_ood(scorer, data)
    with atomic_file(path) as file:
        file.write(_safetensors(tensors))
    return tensors


def write_model_folder(folder: Path, scorer: Scorer, ood: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write model.safetensors, model.json and MODEL_CARD.md.

    Args:
        folder: The model folder.
        scorer: The trained network.
        ood: Tensors of the out-of-distribution check, from `fit_ood`.
        record: From `model_record`; the schema and the digest of the weights are added.
    """
    tensors = {f"{_NETWORK}{name}": tensor for name, tensor in scorer.net.state_dict().items()}
    tensors |= {f"{_OOD}{name}": tensor for name, tensor in ood.items()}
    with atomic_file(folder / WEIGHTS) as file:
        file.write(_safetensors(tensors))
    # The record is written after the weights: if that is interrupted, the digest does not match and loading fails.
    digests = {**record["digests"], "weights": file_sha256(folder / WEIGHTS)}
    _write_record(folder, {"schema": SCHEMA, **record, "digests": digests})


def read_model_folder(folder: Path) -> tuple[dict[str, Any], Scorer, dict[str, Tensor]]:
    """Read a model folder, which may come from an untrusted source.

    Nothing in the files is executed, downloaded or imported by its name. Digest, names, shapes and types are checked
    before a tensor is created, so memory is limited by the size of the file.

    Returns:
        The record, the network in eval mode on the CPU, and the tensors of the out-of-distribution check.

    Raises:
        InputError: A file is missing, damaged or inconsistent.
    """
    if not folder.is_dir():
        raise InputError(f"model={folder}: no such folder (looked in {Path.cwd()}). Give the model folder of a run.")
    record = read_record(folder)
    path = _regular_file(folder / WEIGHTS)
    if file_sha256(path) != record["digests"]["weights"]:
        raise InputError(f"{path}: its sha256 is not the one in {RECORD}. It is damaged or changed: copy it again.")
    try:
        with safe_open(path, framework="pt") as file:
            # Slices know their shapes without reading the tensors.
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            scorer = _build_scorer(record, shapes, path)
            state = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({_first_line(error)}). Copy it again.") from error
    expected = {f"{_NETWORK}{name}": tensor for name, tensor in scorer.net.state_dict().items()}
    types = {name: tensor.dtype for name, tensor in expected.items()}
    bad = [name for name, t in state.items() if t.dtype != types.get(name, t.dtype) or not torch.isfinite(t).all()]
    if bad:
        raise InputError(f"{path}: {listed(bad, 4)} have values that are not finite or of another type. Copy it again.")
    scorer.net.load_state_dict({name.removeprefix(_NETWORK): state[name] for name in expected})
    # With the memory format of training, the same kernels run and give the same last digits.
    scorer.net.to(memory_format=torch.channels_last)
    ood = {name.removeprefix(_OOD): tensor for name, tensor in state.items() if name not in expected}
    return record, scorer.eval().requires_grad_(False), ood


def read_record(folder: Path) -> dict[str, Any]:
    """Read model.json of a model folder, and check every value that affects a score.

    Raises:
        InputError: The file is missing, damaged, of another schema, or a value is out of range.
    """
    path = folder / RECORD
    text = _regular_file(path, _MAX_RECORD_BYTES).read_bytes()
    try:
        record = json.loads(text)
    # Deeply nested JSON exceeds the recursion limit.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({_first_line(error)}). Copy the model folder again.") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        # Cut, because an untrusted file can have a text of any length here.
        raise InputError(
            f"{path}: schema {str(schema)[:20]} is unknown, covid_cls {covid_cls.__version__} reads schema {SCHEMA}. "
            "Install the version that wrote the file."
        )
    fault = _find_fault(record)
    if fault:
        raise InputError(f"{path}: {fault}. Copy the model folder again, or train the run again.")
    return dict(record)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with atomic_file(folder / CARD) as file:
        file.write(model_card(record).encode())
    write_json(folder / RECORD, record)


def _safetensors(tensors: dict[str, Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _preprocessing(scorer: Scorer) -> dict[str, Any]:
    return {name: getattr(scorer.preprocess, name) for name in _PREPROCESSING}


def _regular_file(path: Path, max_bytes: float = math.inf) -> Path:
    # Opening a FIFO would wait for a writer for ever.
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no such file. Give the model folder of a run.") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: not a regular file. Give the model folder of a run.")
    if found.st_size > max_bytes:
        raise InputError(f"{path}: has {found.st_size:,} bytes, at most {max_bytes:,} are allowed. Copy it again.")
    return path


def _find_fault(record: dict[str, Any]) -> str | None:
    try:
        task, network, view, operating = (record[key] for key in ("task", "network", "preprocessing", "operating"))
        known, hidden = TASKS.get(str(task["name"])), network["head"]["hidden"]
        checks = {
            "task": known is not None and task["classes"] == list(known.classes),
            "network.backbone": isinstance(network["backbone"], str),
            "network.head.hidden": hidden is None or _in_range(hidden, 1, 1 << 20, int),
            "preprocessing.size": _in_range(view["size"], 32, _MAX_SIDE, int),
            "preprocessing.crop": _in_range(view["crop"], 32, _MAX_SIDE, int),
            "preprocessing.mean": _in_range(view["mean"], -1e3, 1e3),
            "preprocessing.sd": _in_range(view["sd"], 1e-6, 1e3),
            "preprocessing.seen": isinstance(view["seen"], str),
            "operating.temperature": _in_range(operating["temperature"], 1e-6, 1e6),
            "operating.thresholds": all(t is None or _in_range(t, 0, 1) for t in operating["thresholds"].values()),
            "digests.weights": isinstance(record["digests"]["weights"], str),
        }
    except (KeyError, TypeError, AttributeError) as error:
        return f"a value is missing or has another type ({type(error).__name__}: {error})"
    wrong = [name for name, valid in checks.items() if not valid]
    return f"{listed(wrong)}: out of range or of another type" if wrong else None


def _in_range(value: Any, low: float, high: float, types: type[float] | tuple[type[float], ...] = (int, float)) -> bool:
    # JSON's true is an int in Python, and nan is in no range.
    return isinstance(value, types) and not isinstance(value, bool) and low <= value <= high


def _build_scorer(record: dict[str, Any], shapes: dict[str, tuple[int, ...]], path: Path) -> Scorer:
    """Return an untrained network after checking that its tensors have the `shapes` in the weights file.

    Raises:
        InputError: They do not match.
    """
    backbone, hidden = record["network"]["backbone"], record["network"]["head"]["hidden"]
    # Checked before the network is built, because a huge head would fill the memory.
    if hidden is not None and shapes.get(f"{_NETWORK}head.hidden.bias") != (hidden,):
        raise InputError(
            f"{path}: has no head with {hidden} hidden units, unlike {RECORD}. Copy the model folder again."
        )
    task, view = TASKS[record["task"]["name"]], record["preprocessing"]
    # The dropout rate has no effect in eval mode.
    net = build_network(backbone, len(task.classes), hidden, 0.0)
    needed = {f"{_NETWORK}{name}": tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: shape for name, shape in shapes.items() if not name.startswith(_OOD)}
    wrong = [name for name in needed | found if needed.get(name) != found.get(name)]
    if wrong:
        raise InputError(
            f"{path}: {listed(wrong, 4)} do not match the network {backbone}. Copy the model folder again."
        )
    return Scorer(task, net, Preprocess(**{name: view[name] for name in _PREPROCESSING}))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
