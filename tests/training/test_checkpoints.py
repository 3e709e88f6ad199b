"""Checkpoints rebuild their classifier alone, on a bare machine, and never run what somebody hid in one."""

import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from covid_cls.errors import InputError
from covid_cls.records import remove_scratch
from covid_cls.training import checkpoints
from covid_cls.training.checkpoints import WholeCheckpointIO, load_classifier, newest_good, read_checkpoint
from covid_cls.training.classifier import Classifier
from covid_cls.training.predict import predict_split
from tests.training.small import compose_small, make_classifier, make_data, make_trainer, snapshot
from tools.soak.crowd import Member
from tools.soak.flips import flips

ROOT = Path(__file__).parents[2]

# A machine without hydra and omegaconf: they can be neither imported nor found among the installed packages.
ALONE = """
import importlib.metadata as metadata, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hydra", "omegaconf"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
found = metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name.replace("_", "-").lower() in ("omegaconf", "hydra-core"):
        raise metadata.PackageNotFoundError(name)
    return found(cls, name)

metadata.Distribution.from_name = classmethod(from_name)

import json, torch
from pathlib import Path
torch.set_num_threads(1)
path, settings, cache, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
contents = torch.load(path, weights_only=True)
assert {"state_dict", "hyper_parameters"} <= contents.keys()

from covid_cls.data.datamodule import Radiographs
from covid_cls.labels import TASKS
from covid_cls.models.transforms import Augment
from covid_cls.training.checkpoints import load_classifier
from covid_cls.training.predict import predict_split

canvas = Augment(**settings["augment"]).canvas(settings["preprocess"]["crop"])
data = Radiographs(TASKS[settings["task"]["name"]], canvas, settings["seed"], **{**settings["data"], "cache": cache})
table = predict_split(load_classifier(Path(path)).scorer(), data, "test")
assert not {"hydra", "omegaconf"} & sys.modules.keys()
table.to_pickle(output)
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in the same order as in a process of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as Lightning writes it, of an untrained resnet18."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.ckpt"
    settings = compose_small()
    classifier = make_classifier(settings)
    trainer, _ = make_trainer(settings, path.parent, checkpoints=False)
    trainer.strategy.connect(classifier)
    WholeCheckpointIO().save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(weights_only=True), path)
    return path


@pytest.mark.slow(reason="a process without Lightning's trainer reads the checkpoint")
def test_a_bare_machine_predicts_from_a_checkpoint_what_training_predicted(
    cache: Path, folder: Path, one_thread: None
) -> None:
    settings = compose_small("trainer.max_epochs=1", "task=three_class", "loss=focal", "augment=seed")
    data, classifier = make_data(settings, cache), make_classifier(settings)
    trainer, _ = make_trainer(settings, folder)
    trainer.fit(classifier, data)
    best, output = folder / "checkpoints" / "best.ckpt", folder / "table.pkl"
    expected = predict_split(classifier.scorer(), data, "test")
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(best), json.dumps(settings), str(cache), str(output)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = pd.read_pickle(output)
    logits = [column for column in expected.columns if column.startswith("logit_")]
    assert len(logits) == len(classifier.task.classes)
    np.testing.assert_array_equal(found[logits].to_numpy(), expected[logits].to_numpy())
    assert found["image_id"].tolist() == expected["image_id"].tolist()


def test_a_loaded_classifier_is_the_saved_one_in_eval_mode(checkpoint: Path) -> None:
    loaded = load_classifier(checkpoint)
    saved = make_classifier(compose_small())
    assert isinstance(loaded, Classifier)
    assert not any(module.training for module in loaded.modules())
    assert dict(loaded.hparams) == dict(saved.hparams)
    first, second = snapshot(loaded), snapshot(saved)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def plain_values(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain_values(item) for key, item in value.items()) and type(value) is dict
    if isinstance(value, list):
        return type(value) is list and all(map(plain_values, value))
    return value is None or type(value) in (str, int, float, bool)


def test_hyper_parameters_are_plain_values(checkpoint: Path) -> None:
    contents = read_checkpoint(checkpoint)
    assert all(plain_values(value) for value in contents["hyper_parameters"].values())
    assert contents["hyper_parameters"]["backbone"] == "resnet18"


class Evil:
    """What a malicious pickle looks like: unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.marker}'",)


def resume_from(path: Path) -> None:
    settings = compose_small("strategy=fc")
    trainer, _ = make_trainer(settings, path.parent, checkpoints=False)
    loader = torch.utils.data.DataLoader([0])
    trainer.fit(make_classifier(settings), loader, ckpt_path=str(path), weights_only=True)


LOADERS: dict[str, Callable[[Path], object]] = {
    "read_checkpoint": read_checkpoint,
    "load_classifier": load_classifier,
    "io": WholeCheckpointIO().load_checkpoint,
    "io as text": lambda path: WholeCheckpointIO().load_checkpoint(str(path)),
    "io against its will": lambda path: WholeCheckpointIO().load_checkpoint(path, weights_only=False),
    "fit": resume_from,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "hyper_parameters"])
def test_hidden_code_is_refused_and_does_not_run(
    load: Callable[[Path], object], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # turns the default round, not what is asked for
    marker, path = tmp_path / "marker", tmp_path / "evil.ckpt"
    whole = {"state_dict": {}, "hyper_parameters": {}, "extra": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(whole, protocol=2))
    elif form == "hyper_parameters":
        torch.save({"state_dict": {}, "hyper_parameters": {"task": Evil(marker)}}, path)
    else:
        torch.save(whole, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match="never executed") as error:
        load(path)
    assert str(path) in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-20],
        lambda data: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
        lambda data: b"epoch,loss\n1,0.5\n",
        lambda data: bytes(4096),
        lambda data: data[:500] + bytes([data[500] ^ 0xFF]) + data[501:],
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x40]) + data[len(data) // 2 + 1 :],
    ],
    ids=["empty", "truncated", "end cut", "web page", "csv", "zeros", "a bit of the pickle", "a bit of a weight"],
)
def test_a_broken_checkpoint_is_refused_by_its_name(
    damage: Callable[[bytes], bytes], checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "broken.ckpt"
    path.write_bytes(damage(checkpoint.read_bytes()))
    try:
        with pytest.raises(InputError) as error:
            load_classifier(path)
    finally:
        path.unlink()
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)  # torch advises to turn the protection off


@pytest.mark.parametrize(
    "contents",
    [
        [1, 2],
        {"weight": torch.zeros(2)},
        {"state_dict": {}},
        {"state_dict": {}, "hyper_parameters": {}},
        {"state_dict": {}, "hyper_parameters": {"lr": 0.1, "hidden": 64}},
        {"state_dict": {}, "hyper_parameters": None},
    ],
    ids=["a list", "a state dict", "no settings", "empty", "another project's", "none"],
)
def test_a_checkpoint_of_something_else_is_refused(contents: object, tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(contents, path)
    with pytest.raises(InputError, match=r"other\.ckpt"):
        load_classifier(path)


def test_a_checkpoint_without_its_tensors_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    contents = read_checkpoint(checkpoint)
    torch.save({**contents, "state_dict": {"net.head.out.bias": torch.zeros(2)}}, tmp_path / "gutted.ckpt")
    with pytest.raises(InputError, match=r"gutted\.ckpt"):
        load_classifier(tmp_path / "gutted.ckpt")


@pytest.mark.parametrize("load", [LOADERS[name] for name in ("read_checkpoint", "load_classifier", "io")])
def test_a_missing_checkpoint_is_refused(load: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.ckpt: no such checkpoint"):
        load(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/evil.ckpt", "https://127.0.0.1:9/evil.ckpt"])
def test_an_address_is_not_fetched(address: str) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        WholeCheckpointIO().load_checkpoint(address)


def numbered(epoch: int) -> dict[str, Any]:
    """A checkpoint of nothing but its epoch."""
    return {"state_dict": {"w": torch.full((4,), epoch)}, "hyper_parameters": {}, "epoch": epoch}


def flip(path: Path, place: int) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB: what a full disk does in the middle of a save.

    Only for the save itself: the limit also holds for the file that pytest's own output goes to.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_costs_the_newest_checkpoint_and_says_what_it_needs(existing: bool, tmp_path: Path) -> None:
    io, path = WholeCheckpointIO(), tmp_path / "last.ckpt"
    if existing:
        io.save_checkpoint(numbered(0), path)
        io.save_checkpoint(numbered(1), path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    says = r"last\.ckpt: cannot be written \(File too large\): 1,048,576 bytes"
    with pytest.raises(InputError, match=says) as error, small_files():
        io.save_checkpoint({**numbered(2), "state_dict": {"w": torch.rand(1 << 18)}}, path)
    assert re.search(r"needed and [\d,]+ are free", str(error.value))
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    assert set(before) == ({"last.ckpt", "previous.ckpt"} if existing else set())


def test_a_checkpoint_that_cannot_be_pickled_leaves_the_old_file(tmp_path: Path) -> None:
    io, path = WholeCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {}, "hyper_parameters": {}}, path)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        io.save_checkpoint({"state_dict": {"w": torch.zeros(8)}, "hyper_parameters": lambda: None}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_save_does_not_pass_through_the_temporary_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", None)
    path = tmp_path / "deep" / "er" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"state_dict": {}, "hyper_parameters": {}}, path)
    assert read_checkpoint(path) == {"state_dict": {}, "hyper_parameters": {}}


def test_every_byte_of_a_checkpoint_counts(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(numbered(0), path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        flip(path, place)
        with pytest.raises(InputError, match=r"last\.ckpt"):
            read_checkpoint(path)
        path.write_bytes(whole)
    assert read_checkpoint(path)["epoch"] == 0
    path.write_bytes(whole + b"x")
    with pytest.raises(InputError, match="checksum"):
        read_checkpoint(path)


@pytest.mark.parametrize("mmap", [True, False])
def test_others_read_a_checkpoint_as_torch_wrote_it(mmap: bool, checkpoint: Path, tmp_path: Path) -> None:
    expected, found = read_checkpoint(checkpoint), torch.load(checkpoint, weights_only=True, mmap=mmap)
    assert all(torch.equal(expected["state_dict"][name], tensor) for name, tensor in found["state_dict"].items())
    torch.save(found, tmp_path / "theirs.ckpt")  # without a checksum of ours
    assert read_checkpoint(tmp_path / "theirs.ckpt")["hyper_parameters"] == expected["hyper_parameters"]


def test_the_checkpoint_before_the_last_is_kept_and_used_where_the_last_is_damaged(tmp_path: Path) -> None:
    io, last, previous = WholeCheckpointIO(), tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    assert newest_good(tmp_path) == (None, {}, [])
    for epoch in range(3):
        io.save_checkpoint(numbered(epoch), tmp_path / "best.ckpt")
        io.save_checkpoint(numbered(epoch), last)
    path, contents, warnings = newest_good(tmp_path)
    assert (path, contents["epoch"], warnings) == (last, 2, [])

    flip(last, last.stat().st_size // 2)
    path, contents, (warning,) = newest_good(tmp_path)
    assert (path, contents["epoch"]) == (previous, 1)
    assert warning.startswith(f"going on from {previous}, epoch 2: {last}: not a file of plain tensors (damaged")
    flip(previous, 100)
    path, contents, warnings = newest_good(tmp_path)
    assert (path, contents) == (None, {})
    assert [warning.split(":")[:2] for warning in warnings] == [
        ["training from the beginning", f" {name}"] for name in (last, previous)
    ]


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(tmp_path: Path) -> None:
    io, last, previous = WholeCheckpointIO(), tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for epoch in range(3):
        io.save_checkpoint(numbered(epoch), last)
    flip(last, 100)
    resumed = WholeCheckpointIO()
    assert resumed.load_checkpoint(previous)["epoch"] == 1
    resumed.save_checkpoint(numbered(2), last)
    assert [read_checkpoint(path)["epoch"] for path in (previous, last)] == [1, 2]
    resumed.save_checkpoint(numbered(3), last)
    assert [read_checkpoint(path)["epoch"] for path in (previous, last)] == [2, 3]


def test_a_file_system_without_hard_links_keeps_the_previous_checkpoint_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    io = WholeCheckpointIO()
    for epoch in range(3):
        io.save_checkpoint(numbered(epoch), tmp_path / "last.ckpt")
    assert [read_checkpoint(tmp_path / name)["epoch"] for name in ("previous.ckpt", "last.ckpt")] == [1, 2]


def test_a_changed_byte_is_recognised_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    outcome = flips(6, tmp_path)
    assert outcome.held, outcome


# Where a save is held: the function that it has come to, and whether that has been called; then the last checkpoint's
# epoch, and how many scratch files are left.
MOMENTS: dict[str, tuple[Any, str, bool, int, int]] = {
    "a part is written": (checkpoints._Digesting, "write", True, 1, 1),
    "all is written": (checkpoints, "_keep_previous", False, 1, 1),
    "the one before is kept": (checkpoints, "_keep_previous", True, 1, 1),
    "the new one is in its place": (Path, "replace", True, 2, 0),
}


def hold_in_save(connection: Connection, folder: Path, moment: str) -> None:
    """In a process of its own: saves epochs 0 and 1, and stays at `moment` of the save of epoch 2."""
    io = WholeCheckpointIO()
    for epoch in (0, 1):
        io.save_checkpoint(numbered(epoch), folder / "last.ckpt")
    owner, name, called, _, _ = MOMENTS[moment]
    function = getattr(owner, name)

    def then_stay(*arguments: Any) -> None:
        if called:
            function(*arguments)
        connection.send("held")
        signal.pause()

    setattr(owner, name, then_stay)
    io.save_checkpoint(numbered(2), folder / "last.ckpt")


@pytest.mark.slow(reason="a process is killed while it saves")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_save_that_is_killed_leaves_the_old_checkpoint_or_the_new_one(moment: str, tmp_path: Path) -> None:
    saver = Member(hold_in_save, tmp_path, moment)
    assert saver.connection.recv() == "held"
    saver.kill()
    *_, epoch, scratch = MOMENTS[moment]
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    path, contents, warnings = newest_good(tmp_path)
    assert (path, contents["epoch"], warnings) == (last, epoch, [])
    assert len([entry for entry in tmp_path.iterdir() if entry.suffix != ".ckpt"]) == scratch
    remove_scratch(tmp_path)  # as the next start does
    assert {entry.name for entry in tmp_path.iterdir()} == {last.name, previous.name}
    io = WholeCheckpointIO()
    io.load_checkpoint(last)
    io.save_checkpoint(numbered(3), last)
    assert [read_checkpoint(path)["epoch"] for path in (previous, last)] == [epoch, 3]
