"""A run's folder is named by what decides its numbers, held by one process, and says how far it came."""

import copy
import itertools
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import SoftFileLease
from pytorch_lightning.utilities.exceptions import SIGTERMException

import covid_cls
from covid_cls.errors import InputError
from covid_cls.records import read_json
from covid_cls.training import lock
from covid_cls.training.identity import cell_name, code_digest
from covid_cls.training.run import open_run
from tests.training.small import compose_small
from tools.soak.crowd import Member
from tools.soak.starts import start

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return compose_small()


def folder_of(root: Path, settings: dict[str, Any], data_digest: str = "d") -> Path:
    with open_run(root, settings, data_digest) as run:
        return run.folder


def changed_at(settings: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    *sections, last = key.split(".")
    whole = copy.deepcopy(settings)
    part = whole
    for section in sections:
        part = part[section]
    part[last] = value
    return whole


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), "binary-resnet18-partial-ce-s0"),
        (("seed=3", "strategy=full", "backbone=vgg16_bn"), "binary-vgg16_bn-full-ce-s3"),
        (("task=three_class", "loss=focal"), "three_class-resnet18-partial-focal-s0"),
        (("task=three_class_multilabel", "loss=weighted_ce"), "three_class_multilabel-resnet18-partial-weighted_ce-s0"),
        (("strategy.freeze_until=layer2",), "binary-resnet18-until_layer2-ce-s0"),
        (("loss=weighted_ce", "loss.class_weights=null"), "binary-resnet18-partial-ce-s0"),
        (("data.folds=5", "data.fold=2"), "binary-resnet18-partial-ce-s0-fold2"),
        (("preprocess.seen=border",), "binary-resnet18-partial-ce-s0-border_seen"),
    ],
    ids=str,
)
def test_a_cell_is_named_by_its_choices(overrides: tuple[str, ...], name: str, tmp_path: Path) -> None:
    settings = compose_small(*overrides)
    assert cell_name(settings) == name
    folder = folder_of(tmp_path, settings)
    assert folder.parent == tmp_path
    assert folder.name.startswith(f"{name}-")
    assert len(folder.name) == len(name) + 9
    assert set(folder.name[-8:]) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("optimizer.lr", 0.02),
        ("head.dropout", 0.1),
        ("loss.name", "focal"),
        ("augment.rotation", 11.0),
        ("trainer.max_epochs", 3),
        ("backbone.weights", "auto"),
        ("data.batch_size", 7),
        ("data.sampler", "balanced"),
        ("data.seed", 5),
        ("preprocess.mean", 0.5),
        ("callbacks.early_stopping", None),
    ],
)
def test_what_decides_the_weights_gives_another_folder(
    settings: dict[str, Any], tmp_path: Path, key: str, value: object
) -> None:
    assert folder_of(tmp_path, settings).name != folder_of(tmp_path, changed_at(settings, key, value)).name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_root", "/elsewhere"),
        ("name", "my_name"),
        ("rerun", True),
        ("logger", {"_target_": "pytorch_lightning.loggers.CSVLogger"}),
        ("data.cache", "/scratch/cache"),
        ("data.workers", 4),
        ("data.root", "/other/place"),
        ("data.path", "/other/place.csv"),
    ],
)
def test_what_decides_no_number_gives_the_same_folder(
    settings: dict[str, Any], tmp_path: Path, key: str, value: object
) -> None:
    assert folder_of(tmp_path, settings) == folder_of(tmp_path, changed_at(settings, key, value))


def test_the_order_of_the_settings_does_not_count(settings: dict[str, Any], tmp_path: Path) -> None:
    assert folder_of(tmp_path, settings) == folder_of(tmp_path, dict(reversed(settings.items())))


def test_other_data_give_another_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    assert folder_of(tmp_path, settings, "d") != folder_of(tmp_path, settings, "e")


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("labels.py", True),
        ("models/losses.py", True),
        ("data/store.py", True),
        ("training/optim.py", True),
        ("reporting/figures.py", False),
        ("evaluation/metrics.py", False),
        ("train.py", False),
    ],
)
def test_code_that_decides_weights_gives_another_folder(
    settings: dict[str, Any], tmp_path: Path, file: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "covid_cls"
    shutil.copytree(Path(covid_cls.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before, digest = folder_of(tmp_path, settings), code_digest()
    monkeypatch.setattr(covid_cls, "__file__", str(package / "__init__.py"))
    assert code_digest() == digest  # of the content, not of the place
    with (package / file).open("a") as source:
        source.write("# another comment\n")
    assert (folder_of(tmp_path, settings) != before) == counts


def test_a_run_that_comes_to_its_end_is_finished(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as run:
        assert (run.finished, run.record["status"]) == (False, "new")
        with run.training():
            assert read_json(run.folder / "run.json")["status"] == "running"
            logging.getLogger("covid_cls").warning("said while training")
        assert run.finished
    record = read_json(run.folder / "run.json")
    assert record["status"] == "finished"
    assert record["cell"] == run.folder.name
    assert record["config"] == settings
    assert record["digests"]["data"] == "d"
    assert set(record["digests"]) == {"config", "data", "code"}
    assert record["started"] <= record["ended"]
    assert record["versions"]["torch"]
    assert "said while training" in (run.folder / "run.log").read_text()
    with open_run(tmp_path, settings, "d") as again:
        assert again.finished


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("no such thing"), "failed", "ValueError: no such thing"),
        (InputError("mend the file"), "failed", "InputError: mend the file"),
        (MemoryError(), "failed", "MemoryError: "),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (SystemExit(1), "interrupted", "SystemExit"),
        (SIGTERMException(), "interrupted", "SIGTERMException"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_run_that_breaks_off_says_why_and_can_go_on(
    error: BaseException, status: str, reason: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(type(error)), open_run(tmp_path, settings, "d") as run, run.training():  # noqa: PT012
        run.note(weights={"used": "none"})
        raise error
    record = read_json(run.folder / "run.json")
    assert (record["status"], record["reason"]) == (status, reason)
    assert "ended" in record
    with open_run(tmp_path, settings, "d") as again:
        assert not again.finished
        assert again.record["weights"] == {"used": "none"}
        with again.training():
            pass
    assert read_json(run.folder / "run.json")["status"] == "finished"


def test_a_finished_run_does_not_keep_the_reason_of_an_earlier_failure(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="first"), open_run(tmp_path, settings, "d") as run, run.training():
        raise ValueError("first")
    with open_run(tmp_path, settings, "d") as run, run.training():
        pass
    assert "reason" not in read_json(run.folder / "run.json")


def test_the_last_checkpoint_is_what_a_run_goes_on_from(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as run:
        assert run.last_checkpoint() == (None, {})
        (run.folder / "checkpoints").mkdir()
        contents = {"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": {}}
        torch.save(contents, run.folder / "checkpoints" / "last.ckpt")
        path, found = run.last_checkpoint()
        assert path == run.folder / "checkpoints" / "last.ckpt"
        assert torch.equal(found["state_dict"]["weight"], torch.ones(2))


HOUR = 3600.0  # no test is so slow that a process which lives is taken for dead meanwhile


def hold(connection: Connection, root: Path, settings: dict[str, Any], host: str, silence: float) -> None:
    """In a process of its own, which believes to be on `host`: trains the cell until it is told."""
    socket.gethostname = lambda: host
    lock._SILENCE = silence
    with open_run(root, settings, "d") as run, run.training():
        connection.send("holding")
        connection.recv()
        run.note(written="after the wait")


@contextmanager
def holder(root: Path, settings: dict[str, Any], host: str = HOST, silence: float = lock._SILENCE) -> Iterator[Member]:
    """A process that trains the cell."""
    member = Member(hold, root, settings, host, silence)
    try:
        assert member.connection.recv() == "holding"
        yield member
    finally:
        member.kill()


def refusal(root: Path, settings: dict[str, Any], *, rerun: bool = False) -> str:
    with pytest.raises(InputError) as error, open_run(root, settings, "d", rerun=rerun):
        pytest.fail("was let in")
    return str(error.value)


@pytest.mark.slow(reason="a lock between processes")
def test_a_second_process_on_the_same_cell_is_refused_until_the_first_is_gone(
    settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with holder(tmp_path, settings) as other:
        (record,) = tmp_path.glob("*/run.json")
        before = record.read_bytes()
        since = read_json(record)["started"]
        for rerun in (False, True):
            assert refusal(tmp_path, settings, rerun=rerun) == (
                f"{record.parent}: process {other.process.pid} on host {HOST} (since {since}) is training "
                f"this very cell; wait for it or stop it (its lock is {tmp_path / f'.{record.parent.name}.lock'})"
            )
        assert record.read_bytes() == before
        other.kill()
        request.getfixturevalue("patient")
        with open_run(tmp_path, settings, "d") as run:  # at once
            assert run.record["status"] == "running"  # it could not say that it was killed
            assert not run.finished
            with run.training():
                pass
    said = f"the start of {since} ended without a word (process {other.process.pid} on host {HOST})"
    assert said in (run.folder / "run.log").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == [run.folder.name]  # no lock is left


def after_each_look(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Whenever this process has looked for a sign of life in a lock, let something happen before it looks again."""
    look = lock._touched

    def looked(lease: SoftFileLease) -> int | None:
        found = look(lease)
        happens()
        return found

    monkeypatch.setattr(lock, "_touched", looked)


@pytest.mark.slow(reason="a lock between processes")
def test_a_process_on_another_host_that_gives_a_sign_of_life_is_not_followed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_SILENCE", HOUR)
    with holder(tmp_path, settings, "node7", HOUR) as other:
        (marker,) = tmp_path.glob(".*.lock")
        seconds = itertools.count(int(marker.stat().st_mtime) + 1)
        after_each_look(monkeypatch, lambda: os.utime(marker, (now := next(seconds), now)))  # as its heartbeat does
        assert f"process {other.process.pid} on host node7 (since " in refusal(tmp_path, settings)


@pytest.mark.slow(reason="a lock between processes")
def test_a_process_on_another_host_is_followed_after_its_silence_and_not_before(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, hours = time.monotonic, 0

    def an_hour_later() -> None:
        nonlocal hours
        hours += 1

    monkeypatch.setattr(lock, "_SILENCE", HOUR)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + hours * HOUR)  # by which filelock measures the silence
    after_each_look(monkeypatch, an_hour_later)
    with holder(tmp_path, settings, "node7", HOUR) as other:
        other.kill()
        with open_run(tmp_path, settings, "d") as run:
            assert run.record["host"] == "node7"
    assert hours > 0
    assert f"process {other.process.pid} on host node7 has this lock; waiting up to 3600 s" in caplog.text


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process asks for a lock until it has it: on a busy machine half a second can be too short."""

    class Patient(SoftFileLease):
        def acquire(self, timeout: float | None = None, **options: Any) -> Any:
            return super().acquire(-1, **options)

    monkeypatch.setattr(lock, "SoftFileLease", Patient)


@pytest.mark.slow(reason="a lock between processes")
def test_who_was_taken_for_dead_ends_and_writes_no_more(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    monkeypatch.setattr(lock, "_SILENCE", 1.0)
    with holder(tmp_path, settings, "node7", 1.0) as other:
        process = psutil.Process(other.process.pid)
        process.suspend()
        while process.status() != psutil.STATUS_STOPPED:
            pass
        with open_run(tmp_path, settings, "d") as run:
            process.resume()
            other.process.join()
            assert other.process.exitcode == 1
            assert "written" not in read_json(run.folder / "run.json")
            with run.training():
                pass


def started_at_once(root: Path, each: list[dict[str, Any]]) -> tuple[list[Member], list[str], list[str]]:
    """A process for each of these settings, all told to start together; who may train, and what each was told.

    That is the run's folder for those who may, and the refusal for the others.
    """
    members = [Member(start, root, settings) for settings in each]
    for member in members:
        member.connection.send((0.0, None))  # a moment that is past
    answers = [member.connection.recv() for member in members]
    holders = [member for member, (holds, _) in zip(members, answers, strict=True) if holds]
    folders, refusals = ([told for holds, told in answers if holds == wanted] for wanted in (True, False))
    for member in members:
        if member not in holders:
            member.process.join()
    return holders, folders, refusals


@pytest.mark.slow(reason="a lock between processes")
def test_many_starts_at_once_leave_each_run_one_process(settings: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):  # the second time its last process was killed
        (one,), (folder,), refusals = started_at_once(tmp_path, [settings] * 5)
        assert len(refusals) == 4
        # A process that has the lock and has not yet put its name into it is "another process".
        who = f"(process {one.process.pid} on host {re.escape(HOST)}.*|another process) is training this very cell"
        assert all(re.search(who, refusal) for refusal in refusals), refusals
        assert read_json(Path(folder) / "run.json")["pid"] == one.process.pid
        one.kill()
    holders, folders, refusals = started_at_once(tmp_path, [changed_at(settings, "seed", 1 + k) for k in range(3)])
    assert refusals == []
    assert len(set(folders)) == 3
    for one in holders:
        one.connection.send(None)
        one.process.join()
    assert {read_json(Path(folder) / "run.json")["status"] for folder in folders} == {"finished"}


def test_a_second_opening_in_the_same_process_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as run, run.training():
        assert f"process {os.getpid()} on host" in refusal(tmp_path, settings)
        assert read_json(run.folder / "run.json")["status"] == "running"


def test_other_cells_can_be_opened_meanwhile(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as first, open_run(tmp_path, changed_at(settings, "seed", 1), "d") as second:
        assert first.folder != second.folder


def test_a_run_that_is_refused_before_it_starts_leaves_no_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError), open_run(tmp_path, settings, "d"):
        raise InputError("weights are missing")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_rerun_or_resume_does_not_remove_what_was_begun(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as run, run.training():
        (run.folder / "figures").mkdir()
    with pytest.raises(InputError), open_run(tmp_path, settings, "d"):
        raise InputError("weights are missing")
    assert (run.folder / "figures").is_dir()
    assert read_json(run.folder / "run.json")["status"] == "finished"


def test_rerun_empties_the_folder_and_starts_anew(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as run, run.training():
        (run.folder / "checkpoints").mkdir()
        (run.folder / "checkpoints" / "last.ckpt").touch()
        (run.folder / "metrics.json").touch()
        (run.folder / "openings.csv").touch()  # the test images stay the same
        run.note(weights={"used": "imagenet"})
    with open_run(tmp_path, settings, "d", rerun=True) as again:
        assert again.folder == run.folder
        assert {entry.name for entry in again.folder.iterdir()} == {"openings.csv"}
        assert again.record["status"] == "new"
        assert "weights" not in again.record
        assert again.last_checkpoint() == (None, {})
        with again.training():
            pass
    assert read_json(run.folder / "run.json")["status"] == "finished"


def test_a_process_that_does_not_write_touches_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as first, first.training():
        with open_run(tmp_path, settings, "d", writes=False) as second, second.training():
            second.note(weights={"used": "none"})
        assert second.folder == first.folder
        assert "weights" not in read_json(first.folder / "run.json")
        assert read_json(first.folder / "run.json")["status"] == "running"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ('{"status": ', "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "status: None"),
        ('{"status": "done"}', "status: 'done'"),
        ('{"status": ["finished"]}', "status: "),
        ('{"status": "failed", "seconds": "long"}', "not what a run writes"),
        (None, "is missing beside the checkpoints"),
    ],
)
def test_a_damaged_record_is_refused_by_its_name_and_costs_no_checkpoint(
    damage: str | None, reason: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with open_run(tmp_path, settings, "d") as run, run.training():
        (run.folder / "checkpoints").mkdir()
    record = run.folder / "run.json"
    if damage is None:
        record.unlink()
    else:
        record.write_text(damage)
    said = refusal(tmp_path, settings)
    assert said.startswith(f"{record}: ")
    assert reason in said
    assert "rerun=true" in said
    assert (run.folder / "checkpoints").is_dir()
    with open_run(tmp_path, settings, "d", rerun=True) as run, run.training():  # the lock was let go
        pass
    assert read_json(record)["status"] == "finished"
