"""Model folders are read as they were written; changed files are refused and nothing in them is executed."""

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

from covid_cls.bundle.card import model_card
from covid_cls.bundle.files import (
    CARD,
    RECORD,
    WEIGHTS,
    add_test_scores,
    load_or_fit_ood,
    read_model_folder,
    read_record,
)
from covid_cls.bundle.model import load
from covid_cls.bundle.ood import fit_ood
from covid_cls.errors import InputError
from covid_cls.io import DISCLAIMER, file_sha256
from covid_cls.models.inference import Scorer
from covid_cls.training.split_predictions import predict_split
from tests.bundle.small import small_model
from tests.training.small import compose_small, make_classifier, make_data

Change = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def valid(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model folder. Tests must not change it."""
    folder = tmp_path_factory.mktemp("run") / "model"
    small_model(folder, cache, "task=three_class")
    return folder


@pytest.fixture
def model(valid: Path, tmp_path: Path) -> Path:
    """A copy that tests may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (WEIGHTS, RECORD, CARD):
        (folder / name).write_bytes((valid / name).read_bytes())
    return folder


@pytest.mark.parametrize("words", [("task=binary",), ("task=three_class_multilabel", "head.hidden=null")])
@pytest.mark.parametrize("backbone", ["resnet18", "vgg11_bn"])
def test_a_model_gives_the_scores_of_its_run(
    cache: Path, tmp_path: Path, backbone: str, words: tuple[str, ...]
) -> None:
    words = (*words, f"backbone={backbone}", *(("head.hidden=4",) if len(words) == 1 else ()))
    data = small_model(tmp_path, cache, *words)
    settings = compose_small("augment=none", *words)
    expected = predict_split(make_classifier(settings, data.class_counts).scorer(), data, "test")
    _, scorer, _ = read_model_folder(tmp_path)
    found = predict_split(scorer, data, "test")
    scores = [name for name in expected.columns if name.startswith(("logit_", "prob_"))]
    assert (found[scores] == expected[scores]).all(axis=None)


def test_the_record_describes_the_model(valid: Path) -> None:
    record = read_record(valid)
    assert record["task"]["classes"] == ["covid", "normal", "pneumonia"]
    assert record["preprocessing"] == {"size": 32, "crop": 32, "mean": 0.449, "sd": 0.226, "seen": "whole"}
    assert record["digests"]["weights"] == file_sha256(valid / WEIGHTS)
    assert record["training"]["best_epoch"] == 2
    assert record["metrics"][0]["on"] == "validation split of phantom"
    assert record["metrics"][0]["n_images"] == sum(record["data"]["images_per_split_and_class"]["val"].values())
    assert "someone" not in (valid / RECORD).read_text()  # the folder of the initial weights


def test_the_card_depends_on_the_record_only(valid: Path) -> None:
    text = (valid / CARD).read_text()
    record = read_record(valid)
    assert text == model_card(record)
    assert DISCLAIMER in text
    assert "| 3; epoch 2 was selected by auroc/val = 0.75 |" in text
    accuracy = record["metrics"][0]["scores"]["accuracy"]
    assert f"| accuracy | {accuracy['value']:.3f} ({accuracy['low']:.3f}–{accuracy['high']:.3f}) |" in text
    other = copy.deepcopy(record)
    other["operating"]["temperature"] = 3.25
    assert "Temperature 3.25" in model_card(other)


def test_scores_of_the_test_split_are_added_once(model: Path) -> None:
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
        add_test_scores(model, assessed)
    blocks = read_record(model)["metrics"]
    assert [block["on"] for block in blocks] == ["validation split of phantom", "test split of phantom"]
    text = (model / CARD).read_text()
    assert "The test set was accessed 3 times, first on 2026-01-31. Intervals are 90%, by patient" in text
    assert "0.750 (0.500–0.900)" in text
    read_model_folder(model)  # still valid


def write_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record))


def changed(*keys: str, value: object) -> Change:
    """Return a change of one value of the record."""

    def change(folder: Path, record: dict[str, Any]) -> None:
        section = record
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value
        write_record(folder, record)

    return change


def without(*keys: str) -> Change:
    """Return a change that removes one value of the record."""

    def change(folder: Path, record: dict[str, Any]) -> None:
        section = record
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]
        write_record(folder, record)

    return change


def content(name: str, data: bytes, update: bool = False) -> Change:
    """Return a change of a file's content.

    Args:
        name: The file.
        data: Its new content.
        update: Also write the new digest to the record.
    """

    def change(folder: Path, record: dict[str, Any]) -> None:
        (folder / name).write_bytes(data)
        if update:
            record["digests"]["weights"] = file_sha256(folder / WEIGHTS)
            write_record(folder, record)

    return change


def tensors(change_state: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    """Return a change of the weights that also writes the new digest to the record."""

    def change(folder: Path, record: dict[str, Any]) -> None:
        state = load_file(folder / WEIGHTS)
        change_state(state)
        save_file(state, folder / WEIGHTS)
        record["digests"]["weights"] = file_sha256(folder / WEIGHTS)
        write_record(folder, record)

    return change


def header(declared: dict[str, Any]) -> bytes:
    text = json.dumps(declared).encode()
    return struct.pack("<Q", len(text)) + text


def replaced(name: str, make: Callable[[Path], None]) -> Change:
    """Return a change that replaces a file by something else."""

    def change(folder: Path, record: dict[str, Any]) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


class Evil:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


HUGE = {"net.head.hidden.bias": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
DAMAGED: dict[str, tuple[Change, str]] = {
    "pickle-as-weights": (content(WEIGHTS, pickle.dumps(Evil()), update=True), "not a safetensors file"),
    "pickle-as-record": (content(RECORD, pickle.dumps(Evil())), "not valid JSON"),
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
    "fifo-weights": (replaced(WEIGHTS, os.mkfifo), "not a regular file"),
    "fifo-record": (replaced(RECORD, os.mkfifo), "not a regular file"),
    "folder-as-record": (replaced(RECORD, Path.mkdir), "not a regular file"),
    "device-as-record": (replaced(RECORD, lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
    "link-loop": (replaced(RECORD, lambda path: path.symlink_to(path.name)), "no such file"),
    "huge-record": (content(RECORD, b" " * 3_000_000 + b"{}"), "3,000,002 bytes"),
    "deep-record": (content(RECORD, b"[" * 100_000), "not valid JSON"),
    "list-record": (content(RECORD, b"[1]"), "schema None is unknown"),
    "other-schema": (changed("schema", value=99), "schema 99 is unknown"),
    "text-schema": (changed("schema", value="os.system"), "is unknown"),
    "huge-header": (content(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}", update=True), "not a safetensors file"),
    "huge-shape": (content(WEIGHTS, header(HUGE), update=True), "not a safetensors file"),
    "huge-head": (changed("network", "head", "hidden", value=1 << 20), "has no head with 1048576"),
    "huger-head": (changed("network", "head", "hidden", value=1 << 40), "out of range"),
    "negative-head": (changed("network", "head", "hidden", value=-1), "out of range"),
    "huge-image": (changed("preprocessing", "size", value=1 << 30), "preprocessing.size: out of range"),
    "no-spread": (changed("preprocessing", "sd", value=0), "preprocessing.sd: out of range"),
    "text-mean": (changed("preprocessing", "mean", value="0.4"), "preprocessing.mean: out of range"),
    "other-view": (changed("preprocessing", "seen", value="os.system"), "preprocess.seen=os.system"),
    "code-as-backbone": (changed("network", "backbone", value="os.system"), "backbone.name=os.system: unknown"),
    "other-backbone": (changed("network", "backbone", value="resnet34"), "do not match the network resnet34"),
    "other-classes": (changed("task", "classes", value=["normal", "covid", "pneumonia"]), "task: out of range"),
    "other-task": (changed("task", "name", value="binary"), "task: out of range"),
    "unhashable-task": (changed("task", "name", value=[]), "task: out of range"),
    "nan-temperature": (changed("operating", "temperature", value=float("nan")), "temperature: out of range"),
    "true-temperature": (changed("operating", "temperature", value=True), "temperature: out of range"),
    "threshold-of-two": (changed("operating", "thresholds", "youden", value=2), "thresholds: out of range"),
    "list-thresholds": (changed("operating", "thresholds", value=[0.5]), "a value is missing or has another type"),
    "no-task": (without("task"), "a value is missing or has another type"),
    "no-crop": (without("preprocessing", "crop"), "a value is missing or has another type"),
    "no-digest": (without("digests", "weights"), "a value is missing or has another type"),
    "escaping-name": (
        tensors(lambda state: state.update({"../../evil": torch.zeros(1)})),
        "do not match the network resnet18",
    ),
    "missing-tensor": (
        tensors(lambda state: state.pop("net.head.out.bias") is None),
        "do not match the network resnet18",
    ),
    "nan-weights": (tensors(lambda state: state["net.head.out.bias"].fill_(float("nan")) is None), "not finite"),
    "half-weights": (
        tensors(lambda state: state.update({"net.head.out.bias": state["net.head.out.bias"].half()})),
        "of another type",
    ),
}


@pytest.mark.parametrize(("change", "words"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_changed_folder_is_refused_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    change(model, json.loads((model / RECORD).read_text()))
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        load(model)
    assert words in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_an_interrupted_write_is_refused(valid: Path, cache: Path, tmp_path: Path) -> None:
    small_model(tmp_path, cache, "task=three_class", "seed=1")
    (tmp_path / RECORD).write_bytes((valid / RECORD).read_bytes())  # new weights, the old record
    with pytest.raises(InputError, match="its sha256 is not the one"):
        load(tmp_path)


def test_a_missing_folder_is_an_error_with_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"model=nowhere: no such folder .looked in {tmp_path}"):
        load("nowhere")


def test_a_run_folder_can_be_given_instead_of_its_model_folder(valid: Path) -> None:
    assert load(valid.parent).folder == valid


@pytest.mark.slow(reason="starts a process to test its imports")
def test_predictions_in_python_need_no_internet_and_no_hydra(valid: Path) -> None:
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "import covid_cls\n"
        "assert 'torch' not in sys.modules\n"
        f"model = covid_cls.load({str(valid)!r})\n"
        "import numpy as np\n"
        "table = model.predict([np.tile(np.arange(200, dtype=np.uint8), (180, 1))])\n"
        "assert list(table['image_id']) == ['0'] and 0 <= table['prob_covid'][0] <= 1\n"
        "assert not {'hydra', 'omegaconf'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_model_folders_of_version_0_1_0_are_read(model: Path) -> None:
    names = load_file(model / WEIGHTS)
    assert {name.partition(".")[0] for name in names} == {"net", "screen"}
    record = read_record(model)
    for key in ("monitor", "monitor_value"):
        del record["training"][key]
    write_record(model, record)
    assert load(model).record == record
    assert "epoch 2 was selected by loss/val |" in model_card(record)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that networks have embedded during the test."""
    seen: list[int] = []
    embed = Scorer.embed

    def counted(scorer: Scorer, canvases: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(canvases))
        return embed(scorer, canvases)

    monkeypatch.setattr(Scorer, "embed", counted)
    return seen


def test_networks_that_differ_in_the_head_share_an_ood_check(tmp_path: Path, passes: list[int]) -> None:
    settings = compose_small("augment=none")
    data, classifier = make_data(settings, tmp_path), make_classifier(settings)
    expected = fit_ood(classifier.scorer(), data)
    passes.clear()
    first = load_or_fit_ood(classifier.scorer(), data)
    assert sum(passes) == len(data.dataset("train")) + len(data.dataset("val"))
    assert first.keys() == expected.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in expected.items())
    passes.clear()
    torch.nn.init.normal_(classifier.net.get_parameter("head.out.weight"))
    again = load_or_fit_ood(classifier.scorer(), data)
    assert passes == []
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_another_network_preprocessing_or_split_has_a_separate_ood_check(tmp_path: Path, passes: list[int]) -> None:
    settings = compose_small("augment=none")
    data, classifier = make_data(settings, tmp_path), make_classifier(settings)
    load_or_fit_ood(classifier.scorer(), data)
    others = (compose_small("augment=none", "seed=1"), compose_small("augment=none", "preprocess.sd=0.3"))
    for scorer, split in (
        *((make_classifier(other).scorer(), data) for other in others),
        (classifier.scorer(), make_data(compose_small("augment=none", "data.seed=1"), tmp_path)),
    ):
        passes.clear()
        load_or_fit_ood(scorer, split)
        assert passes


def test_a_damaged_cache_file_is_written_again(tmp_path: Path, passes: list[int]) -> None:
    settings = compose_small("augment=none")
    data, scorer = make_data(settings, tmp_path), make_classifier(settings).scorer()
    expected = load_or_fit_ood(scorer, data)
    (file,) = (tmp_path / "ood").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    passes.clear()
    again = load_or_fit_ood(scorer, data)
    assert passes
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    assert len(file.read_bytes()) > 100
