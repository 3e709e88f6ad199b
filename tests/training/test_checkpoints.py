"""Checkpoints rebuild their classifier without a configuration, never execute code, and survive faults."""

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
from covid_cls.io import remove_temporary_files
from covid_cls.training import checkpoints
from covid_cls.training.checkpoints import AtomicCheckpointIO, load_classifier, newest_valid, read_checkpoint
from covid_cls.training.module import Classifier
from covid_cls.training.split_predictions import predict_split
from tests.training.small import compose_small, make_classifier, make_data, make_trainer, snapshot
from tools.soak.crowd import Member
from tools.soak.flips import flips

ROOT = Path(__file__).parents[2]

# A process without hydra and omegaconf: they can be neither imported nor found among the installed packages.
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

from covid_cls.models.transforms import Augment
from covid_cls.training.checkpoints import load_classifier
from covid_cls.training.settings import read_data
from covid_cls.training.split_predictions import predict_split

settings["data"]["cache"] = cache
data = read_data(settings, Augment(**settings["augment"]))
table = predict_split(load_classifier(Path(path)).scorer(), data, "test")
assert not {"hydra", "omegaconf"} & sys.modules.keys()
table.to_pickle(output)
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, so that sums are added in the same order as in a process with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of an untrained resnet18, written as by Lightning."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.ckpt"
    settings = compose_small()
    classifier = make_classifier(settings)
    trainer, _ = make_trainer(settings, path.parent, checkpoints=False)
    trainer.strategy.connect(classifier)
    AtomicCheckpointIO().save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(weights_only=True), path)
    return path


@pytest.mark.slow(reason="a process without Hydra reads the checkpoint")
def test_a_process_without_hydra_gives_the_predictions_of_training(cache: Path, folder: Path, one_thread: None) -> None:
    settings = compose_small("trainer.max_epochs=1", "task=three_class", "loss=focal", "augment=original")
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


class Malicious:
    """An object whose unpickling creates a file."""

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
    "io": AtomicCheckpointIO().load_checkpoint,
    "io as text": lambda path: AtomicCheckpointIO().load_checkpoint(str(path)),
    "io without weights_only": lambda path: AtomicCheckpointIO().load_checkpoint(path, weights_only=False),
    "fit": resume_from,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "hyper_parameters"])
def test_code_in_a_checkpoint_is_refused_and_not_executed(
    load: Callable[[Path], object], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The variable changes torch's default, but not an explicit weights_only.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "evil.ckpt"
    contents = {"state_dict": {}, "hyper_parameters": {}, "extra": Malicious(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(contents, protocol=2))
    elif form == "hyper_parameters":
        torch.save({"state_dict": {}, "hyper_parameters": {"task": Malicious(marker)}}, path)
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == "zip")
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
def test_a_broken_checkpoint_is_refused_with_its_path(
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
    # torch's own message advises to switch the protection off.
    assert "weights_only" not in str(error.value)


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
def test_an_address_is_not_downloaded(address: str) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        AtomicCheckpointIO().load_checkpoint(address)


def numbered(epoch: int) -> dict[str, Any]:
    """Return a checkpoint whose only tensor holds its epoch."""
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
    """Limit files to 64 KiB, which has the effect of a full disk during a save."""
    # Only for the save itself, because the limit also applies to the file that pytest's own output goes to.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_keeps_the_old_checkpoints_and_reports_the_space_that_is_needed(
    existing: bool, tmp_path: Path
) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    if existing:
        io.save_checkpoint(numbered(0), path)
        io.save_checkpoint(numbered(1), path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    message = r"last\.ckpt: cannot be written \(File too large\): 1,0[45]\d,\d{3} bytes"
    with pytest.raises(InputError, match=message) as error, small_files():
        io.save_checkpoint({**numbered(2), "state_dict": {"w": torch.rand(1 << 18)}}, path)
    assert re.search(r"needed and [\d,]+ are free", str(error.value))
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    assert set(before) == ({"last.ckpt", "previous.ckpt"} if existing else set())


def test_a_checkpoint_that_cannot_be_pickled_keeps_the_old_file(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {}, "hyper_parameters": {}}, path)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        io.save_checkpoint({"state_dict": {"w": torch.zeros(8)}, "hyper_parameters": lambda: None}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_save_does_not_use_the_temporary_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", None)
    path = tmp_path / "deep" / "er" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "hyper_parameters": {}}, path)
    assert read_checkpoint(path) == {"state_dict": {}, "hyper_parameters": {}}


def test_a_change_of_any_byte_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(numbered(0), path)
    data = path.read_bytes()
    for place in range(len(data)):
        flip(path, place)
        with pytest.raises(InputError, match=r"last\.ckpt"):
            read_checkpoint(path)
        path.write_bytes(data)
    assert read_checkpoint(path)["epoch"] == 0
    path.write_bytes(data + b"x")
    with pytest.raises(InputError, match="checksum"):
        read_checkpoint(path)


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_alone_reads_our_checkpoints_and_writes_ones_that_we_read(
    mmap: bool, checkpoint: Path, tmp_path: Path
) -> None:
    expected, found = read_checkpoint(checkpoint), torch.load(checkpoint, weights_only=True, mmap=mmap)
    assert all(torch.equal(expected["state_dict"][name], tensor) for name, tensor in found["state_dict"].items())
    # Without our checksum.
    torch.save(found, tmp_path / "theirs.ckpt")
    assert read_checkpoint(tmp_path / "theirs.ckpt")["hyper_parameters"] == expected["hyper_parameters"]


def test_the_previous_checkpoint_is_kept_and_used_if_the_last_one_is_damaged(tmp_path: Path) -> None:
    io, last, previous = AtomicCheckpointIO(), tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    assert newest_valid(tmp_path) == (None, {}, [])
    for epoch in range(3):
        io.save_checkpoint(numbered(epoch), tmp_path / "best.ckpt")
        io.save_checkpoint(numbered(epoch), last)
    path, contents, warnings = newest_valid(tmp_path)
    assert (path, contents["epoch"], warnings) == (last, 2, [])

    flip(last, last.stat().st_size // 2)
    path, contents, (warning,) = newest_valid(tmp_path)
    assert (path, contents["epoch"]) == (previous, 1)
    assert warning.startswith(f"resuming from {previous}, epoch 2: {last}: damaged")
    flip(previous, 100)
    path, contents, warnings = newest_valid(tmp_path)
    assert (path, contents) == (None, {})
    assert [warning.split(":")[:2] for warning in warnings] == [
        ["training from the first epoch again", f" {name}"] for name in (last, previous)
    ]


def test_a_damaged_last_checkpoint_does_not_replace_the_previous_one(tmp_path: Path) -> None:
    io, last, previous = AtomicCheckpointIO(), tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for epoch in range(3):
        io.save_checkpoint(numbered(epoch), last)
    flip(last, 100)
    resumed = AtomicCheckpointIO()
    assert resumed.load_checkpoint(previous)["epoch"] == 1
    resumed.save_checkpoint(numbered(2), last)
    assert [read_checkpoint(path)["epoch"] for path in (previous, last)] == [1, 2]
    resumed.save_checkpoint(numbered(3), last)
    assert [read_checkpoint(path)["epoch"] for path in (previous, last)] == [2, 3]


def test_waiting_checkpoints_are_written_in_the_order_of_their_arrival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, written = AtomicCheckpointIO(seconds=3600), []
    for epoch in range(2):
        for name in ("best.ckpt", "last.ckpt"):
            io.save_checkpoint(numbered(epoch), tmp_path / name)
    # The best checkpoint of the first epoch was written at once, and the other three waited.
    monkeypatch.setattr(
        checkpoints, "_write", lambda contents, path, **_: written.append((path.name, contents["epoch"]))
    )
    io.teardown()
    assert written == [("best.ckpt", 1), ("last.ckpt", 1)]


def test_a_removed_checkpoint_is_not_written_later(tmp_path: Path) -> None:
    io = AtomicCheckpointIO(seconds=3600)
    for epoch in range(2):
        io.save_checkpoint(numbered(epoch), tmp_path / f"epoch={epoch}.ckpt")
    io.remove_checkpoint(tmp_path / "epoch=0.ckpt")
    io.remove_checkpoint(tmp_path / "epoch=1.ckpt")
    io.teardown()
    assert list(tmp_path.iterdir()) == []


def test_a_moved_run_folder_keeps_its_best_epoch(cache: Path, folder: Path) -> None:
    # The loss falls from a very high value, so that with mode=max the first epoch stays the selected one.
    words = ("strategy=fc", "optimizer.lr=1000", "callbacks.best_checkpoint.mode=max", "checkpoint_seconds=0")
    settings = compose_small(*words, "trainer.max_epochs=2")
    trainer, _ = make_trainer(settings, folder / "old")
    trainer.fit(make_classifier(settings), make_data(settings, cache))
    (folder / "old").rename(folder / "new")
    longer = compose_small(*words, "trainer.max_epochs=3")
    trainer, history = make_trainer(longer, folder / "new")
    last = folder / "new" / "checkpoints" / "last.ckpt"
    trainer.fit(make_classifier(longer), make_data(longer, cache), ckpt_path=str(last), weights_only=True)
    losses = [row["loss/val"] for row in history.rows]
    assert len(losses) == 3
    assert losses.index(max(losses)) == 0
    assert read_checkpoint(last.with_name("best.ckpt"))["epoch"] == 0
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_the_previous_checkpoint_is_kept_on_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    io = AtomicCheckpointIO()
    for epoch in range(3):
        io.save_checkpoint(numbered(epoch), tmp_path / "last.ckpt")
    assert [read_checkpoint(tmp_path / name)["epoch"] for name in ("previous.ckpt", "last.ckpt")] == [1, 2]


def test_after_a_changed_byte_the_previous_checkpoint_is_used(tmp_path: Path) -> None:
    outcome = flips(6, tmp_path)
    assert outcome.held, outcome


# Moments of a save: the owner and the name of a function, whether it has been called; the expected epoch of the last
# checkpoint, and the expected number of temporary files.
MOMENTS: dict[str, tuple[Any, str, bool, int, int]] = {
    "a part is written": (checkpoints, "_comment", True, 1, 1),
    "everything is written": (checkpoints, "_keep_previous", False, 1, 1),
    "the previous checkpoint is kept": (checkpoints, "_keep_previous", True, 1, 1),
    "the new file is in place": (Path, "replace", True, 2, 0),
}


def wait_in_save(connection: Connection, folder: Path, moment: str) -> None:
    """In a separate process: save epochs 0 and 1, and wait at `moment` of the save of epoch 2."""
    io = AtomicCheckpointIO()
    for epoch in (0, 1):
        io.save_checkpoint(numbered(epoch), folder / "last.ckpt")
    owner, name, called, _, _ = MOMENTS[moment]
    function = getattr(owner, name)

    def wait(*arguments: Any) -> None:
        if called:
            function(*arguments)
        connection.send("waiting")
        signal.pause()

    setattr(owner, name, wait)
    io.save_checkpoint(numbered(2), folder / "last.ckpt")


@pytest.mark.slow(reason="a process is killed while it saves")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_save_that_is_killed_leaves_the_old_checkpoint_or_the_new_one(moment: str, tmp_path: Path) -> None:
    saver = Member(wait_in_save, tmp_path, moment)
    assert saver.connection.recv() == "waiting"
    saver.kill()
    *_, epoch, temporary = MOMENTS[moment]
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    path, contents, warnings = newest_valid(tmp_path)
    assert (path, contents["epoch"], warnings) == (last, epoch, [])
    assert len([entry for entry in tmp_path.iterdir() if entry.suffix != ".ckpt"]) == temporary
    # The next start does the same.
    remove_temporary_files(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {last.name, previous.name}
    io = AtomicCheckpointIO()
    io.load_checkpoint(last)
    io.save_checkpoint(numbered(3), last)
    assert [read_checkpoint(path)["epoch"] for path in (previous, last)] == [epoch, 3]
