"""A model's files come back as they were written, and what anybody changed in them is refused and never run."""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from covid_cls.artifact.card import model_card
from covid_cls.artifact.files import CARD, RECORD, WEIGHTS, read_artifact, read_record
from covid_cls.artifact.model import load
from covid_cls.artifact.record import add_scores
from covid_cls.errors import InputError
from covid_cls.records import DISCLAIMER, file_sha256
from covid_cls.training.predict import predict_split
from tests.artifact.small import small_model
from tests.training.small import compose_small, make_classifier

Change = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "model"
    small_model(folder, cache, "task=three_class")
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (WEIGHTS, RECORD, CARD):
        (folder / name).write_bytes((whole / name).read_bytes())
    return folder


@pytest.mark.parametrize("words", [("task=binary",), ("task=three_class_multilabel", "head.hidden=null")])
@pytest.mark.parametrize("backbone", ["resnet18", "vgg11_bn"])
def test_a_model_scores_as_the_run_did(cache: Path, tmp_path: Path, backbone: str, words: tuple[str, ...]) -> None:
    words = (*words, f"backbone={backbone}", *(("head.hidden=4",) if len(words) == 1 else ()))
    data = small_model(tmp_path, cache, *words)
    settings = compose_small("augment=none", *words)
    expected = predict_split(make_classifier(settings, data.class_counts).scorer(), data, "test")
    _, scorer, _ = read_artifact(tmp_path)
    found = predict_split(scorer, data, "test")
    scores = [name for name in expected.columns if name.startswith(("logit_", "prob_"))]
    assert (found[scores] == expected[scores]).all(axis=None)


def test_the_record_says_what_a_colleague_must_know(whole: Path) -> None:
    record = read_record(whole)
    assert record["task"]["classes"] == ["covid", "normal", "pneumonia"]
    assert record["preprocessing"] == {"size": 32, "crop": 32, "mean": 0.449, "sd": 0.226, "seen": "whole"}
    assert record["digests"]["weights"] == file_sha256(whole / WEIGHTS)
    assert record["training"]["best_epoch"] == 2
    assert record["metrics"][0]["on"] == "validation split of phantom"
    assert record["metrics"][0]["n_images"] == sum(record["data"]["images_per_split_and_class"]["val"].values())
    assert "someone" not in (whole / RECORD).read_text()  # where weights lie on the machine of the training


def test_the_card_is_made_of_the_record_alone(whole: Path) -> None:
    text = (whole / CARD).read_text()
    record = read_record(whole)
    assert text == model_card(record)
    assert DISCLAIMER in text
    accuracy = record["metrics"][0]["scores"]["accuracy"]
    assert f"| accuracy | {accuracy['value']:.3f} ({accuracy['low']:.3f}–{accuracy['high']:.3f}) |" in text
    other = copy.deepcopy(record)
    other["operating"]["temperature"] = 3.25
    assert "Temperature 3.25" in model_card(other)


def test_scores_on_the_test_split_are_added_once(model: Path) -> None:
    interval = {"value": 0.75, "low": 0.5, "high": 0.9, "method": "x"}
    assessed = {
        "image": {"overall": {"accuracy": interval}, "per_class": {"covid": {"auroc": interval}}},
        "openings": {"times": 2, "first": "2026-01-31T10:00:00+00:00"},
        "settings": {"level": 0.9},
        "n_images": 8,
        "n_patients": 5,
    }
    for times in (2, 3):
        assessed["openings"] = {"times": times, "first": "2026-01-31T10:00:00+00:00"}
        add_scores(model, assessed)
    blocks = read_record(model)["metrics"]
    assert [block["on"] for block in blocks] == ["validation split of phantom", "test split of phantom"]
    text = (model / CARD).read_text()
    assert "Opened 3 times, first on 2026-01-31. Intervals are 90%, by patient" in text
    assert "0.750 (0.500–0.900)" in text
    read_artifact(model)  # still sound


def written(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record))


def setting(*keys: str, value: object) -> Change:
    """The record with one value changed."""

    def change(folder: Path, record: dict[str, Any]) -> None:
        section = record
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value
        written(folder, record)

    return change


def lacking(*keys: str) -> Change:
    """The record without one value."""

    def change(folder: Path, record: dict[str, Any]) -> None:
        section = record
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]
        written(folder, record)

    return change


def bytes_of(name: str, content: bytes, honest: bool = False) -> Change:
    """Another content of a file; honest: with a record that gives its digest."""

    def change(folder: Path, record: dict[str, Any]) -> None:
        (folder / name).write_bytes(content)
        if honest:
            record["digests"]["weights"] = file_sha256(folder / WEIGHTS)
            written(folder, record)

    return change


def tensors(change_state: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    """Other weights, with a record that gives their digest."""

    def change(folder: Path, record: dict[str, Any]) -> None:
        state = load_file(folder / WEIGHTS)
        change_state(state)
        save_file(state, folder / WEIGHTS)
        record["digests"]["weights"] = file_sha256(folder / WEIGHTS)
        written(folder, record)

    return change


def header(declared: dict[str, Any]) -> bytes:
    text = json.dumps(declared).encode()
    return struct.pack("<Q", len(text)) + text


def replaced(name: str, make: Callable[[Path], None]) -> Change:
    """Something else in a file's place."""

    def change(folder: Path, record: dict[str, Any]) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


HUGE = {"net.head.hidden.bias": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
SPOILT: dict[str, tuple[Change, str]] = {
    "pickle-as-weights": (bytes_of(WEIGHTS, pickle.dumps(Evil()), honest=True), "not a safetensors file"),
    "pickle-as-record": (bytes_of(RECORD, pickle.dumps(Evil())), "not valid JSON"),
    "flipped-bit": (
        lambda folder, _: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1] + b"\xff") and None,
        "its sha256 is not the one",
    ),
    "truncated": (
        lambda folder, _: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]) and None,
        "its sha256 is not the one",
    ),
    "no-weights": (lambda folder, _: (folder / WEIGHTS).unlink(), "no such file"),
    "no-record": (lambda folder, _: (folder / RECORD).unlink(), "no such file"),
    "fifo-weights": (replaced(WEIGHTS, os.mkfifo), "no regular file"),
    "fifo-record": (replaced(RECORD, os.mkfifo), "no regular file"),
    "folder-as-record": (replaced(RECORD, Path.mkdir), "no regular file"),
    "device-as-record": (replaced(RECORD, lambda path: path.symlink_to("/dev/zero")), "no regular file"),
    "link-loop": (replaced(RECORD, lambda path: path.symlink_to(path.name)), "no such file"),
    "huge-record": (bytes_of(RECORD, b" " * 3_000_000 + b"{}"), "3,000,002 bytes"),
    "deep-record": (bytes_of(RECORD, b"[" * 100_000), "not valid JSON"),
    "list-record": (bytes_of(RECORD, b"[1]"), "schema None is not known"),
    "other-schema": (setting("schema", value=99), "schema 99 is not known"),
    "text-schema": (setting("schema", value="os.system"), "is not known"),
    "huge-header": (bytes_of(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}", honest=True), "not a safetensors file"),
    "huge-shape": (bytes_of(WEIGHTS, header(HUGE), honest=True), "not a safetensors file"),
    "huge-head": (setting("network", "head", "hidden", value=1 << 20), "holds no head of 1048576"),
    "huger-head": (setting("network", "head", "hidden", value=1 << 40), "out of range"),
    "negative-head": (setting("network", "head", "hidden", value=-1), "out of range"),
    "huge-image": (setting("preprocessing", "size", value=1 << 30), "preprocessing.size out of range"),
    "no-spread": (setting("preprocessing", "sd", value=0), "preprocessing.sd out of range"),
    "text-mean": (setting("preprocessing", "mean", value="0.4"), "preprocessing.mean out of range"),
    "other-view": (setting("preprocessing", "seen", value="os.system"), "preprocess.seen=os.system"),
    "code-as-backbone": (setting("network", "backbone", value="os.system"), "backbone.name=os.system: unknown"),
    "other-backbone": (setting("network", "backbone", value="resnet34"), "do not fit resnet34"),
    "other-classes": (setting("task", "classes", value=["normal", "covid", "pneumonia"]), "task out of range"),
    "other-task": (setting("task", "name", value="binary"), "task out of range"),
    "unhashable-task": (setting("task", "name", value=[]), "task out of range"),
    "nan-temperature": (setting("operating", "temperature", value=float("nan")), "temperature out of range"),
    "true-temperature": (setting("operating", "temperature", value=True), "temperature out of range"),
    "threshold-of-two": (setting("operating", "thresholds", "youden", value=2), "thresholds out of range"),
    "list-thresholds": (setting("operating", "thresholds", value=[0.5]), "lacks what a model's record has"),
    "no-task": (lacking("task"), "lacks what a model's record has"),
    "no-crop": (lacking("preprocessing", "crop"), "lacks what a model's record has"),
    "no-digest": (lacking("digests", "weights"), "lacks what a model's record has"),
    "escaping-name": (tensors(lambda state: state.update({"../../evil": torch.zeros(1)})), "do not fit resnet18"),
    "missing-tensor": (tensors(lambda state: state.pop("net.head.out.bias") is None), "do not fit resnet18"),
    "nan-weights": (tensors(lambda state: state["net.head.out.bias"].fill_(float("nan")) is None), "not finite"),
    "half-weights": (
        tensors(lambda state: state.update({"net.head.out.bias": state["net.head.out.bias"].half()})),
        "of another type",
    ),
}


@pytest.mark.parametrize(("change", "words"), SPOILT.values(), ids=SPOILT.keys())
def test_what_anybody_changed_is_refused_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    change(model, json.loads((model / RECORD).read_text()))
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        load(model)
    assert words in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_an_interrupted_write_is_refused(whole: Path, cache: Path, tmp_path: Path) -> None:
    small_model(tmp_path, cache, "task=three_class", "seed=1")
    (tmp_path / RECORD).write_bytes((whole / RECORD).read_bytes())  # new weights, the old record
    with pytest.raises(InputError, match="its sha256 is not the one"):
        load(tmp_path)


def test_a_missing_folder_names_where_was_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"model=nowhere: no such folder .looked in {tmp_path}"):
        load("nowhere")


def test_a_runs_folder_stands_for_its_model(whole: Path) -> None:
    assert load(whole.parent).folder == whole


@pytest.mark.slow(reason="what a process imports is tested")
def test_five_lines_of_python_need_no_network_and_no_hydra(whole: Path) -> None:
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "import covid_cls\n"
        "assert 'torch' not in sys.modules\n"
        f"model = covid_cls.load({str(whole)!r})\n"
        "import numpy as np\n"
        "table = model.predict([np.tile(np.arange(200, dtype=np.uint8), (180, 1))])\n"
        "assert list(table['image_id']) == ['0'] and 0 <= table['prob_covid'][0] <= 1\n"
        "assert not {'hydra', 'omegaconf'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
