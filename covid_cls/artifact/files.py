"""The files of a model: written whole, and read as data that may come from anybody."""

import json
import math
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import covid_cls
from covid_cls.artifact.card import model_card
from covid_cls.errors import InputError, listed
from covid_cls.labels import TASKS
from covid_cls.models.backbones import build_network
from covid_cls.models.scorer import Scorer
from covid_cls.models.transforms import Preprocess
from covid_cls.records import file_sha256, whole_file, write_json

SCHEMA = 1
WEIGHTS, RECORD, CARD = "model.safetensors", "model.json", "MODEL_CARD.md"
_LARGEST_RECORD = 2_000_000  # bytes; a record has some 10,000
_LARGEST_SIDE = 4096


def write_artifact(folder: Path, scorer: Scorer, screen: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write model.safetensors, model.json and MODEL_CARD.md to `folder`.

    record: see `artifact.record.model_record`; schema and the digest of the weights are added here. The record comes
    last, so that weights without it, or other weights than it names, are an interrupted write and are refused.
    """
    tensors = {f"net.{name}": tensor for name, tensor in scorer.net.state_dict().items()}
    tensors |= {f"screen.{name}": tensor for name, tensor in screen.items()}
    with whole_file(folder / WEIGHTS) as file:
        file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
    digests = {**record["digests"], "weights": file_sha256(folder / WEIGHTS)}
    update_record(folder, {"schema": SCHEMA, **record, "digests": digests})


def update_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a model, and the card that is made of it."""
    with whole_file(folder / CARD) as file:
        file.write(model_card(record).encode())
    write_json(folder / RECORD, record)


def read_record(folder: Path) -> dict[str, Any]:
    """model.json of a model's folder, with every value that decides a score checked.

    InputError, beginning with the file's path, where it is missing, damaged, of another schema or out of range.
    """
    path = folder / RECORD
    text = _regular(path, _LARGEST_RECORD).read_bytes()
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid JSON ({str(error).partition(chr(10))[0]}); copy the model again"
        ) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        known = f"covid_cls {covid_cls.__version__} reads schema {SCHEMA}"
        raise InputError(f"{path}: schema {str(schema)[:20]} is not known, {known}; install the version that wrote it")
    fault = _fault(record)
    if fault:
        raise InputError(f"{path}: {fault}; copy the model again, or train the run anew")
    return dict(record)


def read_artifact(folder: Path) -> tuple[dict[str, Any], Scorer, dict[str, Tensor]]:
    """The record, the network in eval mode on the CPU, and the screen's tensors of a model's folder.

    Nothing is executed, downloaded or looked up by a name from the files. Digest, names, shapes and types are compared
    before a tensor is made, so that memory stays in proportion to the file. InputError where anything does not fit.
    """
    if not folder.is_dir():
        raise InputError(f"model={folder}: no such folder (looked in {Path.cwd()}); give the model folder of a run")
    record = read_record(folder)
    path = _regular(folder / WEIGHTS)
    if file_sha256(path) != record["digests"]["weights"]:
        raise InputError(f"{path}: its sha256 is not the one that {RECORD} gives; it was changed or cut: copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 # no mapping
            _check_head(record, shapes, path)
            scorer = _build(record)
            expected = {f"net.{name}": tensor for name, tensor in scorer.net.state_dict().items()}
            wrong = [name for name, tensor in expected.items() if shapes.get(name) != tuple(tensor.shape)]
            wrong += [name for name in shapes if name not in expected and not name.startswith("screen.")]
            if wrong:
                raise InputError(f"{path}: {listed(wrong, 4)} do not fit {record['network']['backbone']}")
            state = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({str(error).partition(chr(10))[0]})") from error
    broken = [name for name, tensor in state.items() if not _sound(tensor, expected.get(name))]
    if broken:
        raise InputError(f"{path}: {listed(broken, 4)} hold values that are not finite, or of another type")
    scorer.net.load_state_dict({name.removeprefix("net."): state[name] for name in expected})
    scorer.net.to(memory_format=torch.channels_last)  # as in training: the same kernels, the same last digits
    screen = {name.removeprefix("screen."): tensor for name, tensor in state.items() if name not in expected}
    return record, scorer.eval().requires_grad_(False), screen


def _regular(path: Path, most: int | None = None) -> Path:
    """`path`, which is a regular file of at most `most` bytes: to open a FIFO would wait for a writer."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no such file; give the model folder that a run wrote") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: no regular file; give the model folder that a run wrote")
    if most is not None and found.st_size > most:
        raise InputError(f"{path}: {found.st_size:,} bytes, where {most:,} are the most that is read")
    return path


def _fault(record: dict[str, Any]) -> str | None:
    """What is wrong with a record, or None."""
    try:
        task, network, view = record["task"], record["network"], record["preprocessing"]
        operating = record["operating"]
        known = TASKS.get(str(task["name"]))
        checks = {
            "task": known is not None and task["classes"] == list(known.classes),
            "network.backbone": isinstance(network["backbone"], str),
            "network.head.hidden": network["head"]["hidden"] is None or _whole(network["head"]["hidden"], 1, 1 << 20),
            "preprocessing.size": _whole(view["size"], 32, _LARGEST_SIDE),
            "preprocessing.crop": _whole(view["crop"], 32, _LARGEST_SIDE),
            "preprocessing.mean": _number(view["mean"], -1e3, 1e3),
            "preprocessing.sd": _number(view["sd"], 1e-6, 1e3),
            "preprocessing.seen": isinstance(view["seen"], str),
            "operating.temperature": _number(operating["temperature"], 1e-6, 1e6),
            "operating.thresholds": all(t is None or _number(t, 0, 1) for t in operating["thresholds"].values()),
            "digests.weights": isinstance(record["digests"]["weights"], str),
        }
    except (KeyError, TypeError, AttributeError) as error:
        return f"it lacks what a model's record has ({type(error).__name__}: {error})"
    wrong = [name for name, fine in checks.items() if not fine]
    return f"{listed(wrong)} out of range or of another kind" if wrong else None


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object, low: float, high: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type,operator]


def _check_head(record: dict[str, Any], shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """InputError where the record declares another width of the head than the file holds; before it is built."""
    hidden = record["network"]["head"]["hidden"]
    if hidden is not None and shapes.get("net.head.hidden.bias") != (hidden,):
        raise InputError(
            f"{path}: holds no head of {hidden} hidden units, which {RECORD} declares; copy the model again"
        )


def _build(record: dict[str, Any]) -> Scorer:
    task, view = TASKS[record["task"]["name"]], record["preprocessing"]
    net = build_network(record["network"]["backbone"], len(task.classes), record["network"]["head"]["hidden"], 0.0)
    return Scorer(task, net, Preprocess(**{name: view[name] for name in ("size", "crop", "mean", "sd", "seen")}))


def _sound(tensor: Tensor, expected: Tensor | None) -> bool:
    if expected is not None and tensor.dtype != expected.dtype:
        return False
    return bool(torch.isfinite(tensor).all())
