"""Run folders: their names, the lock of the process that trains, and the record run.json."""

import copy
import itertools
import logging
import os
import re
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

from covid_cls.errors import InputError
from covid_cls.io import read_json, write_json
from covid_cls.training import run_folder
from covid_cls.training.run_folder import finished_folder, open_run, run_name
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
    changed = copy.deepcopy(settings)
    part = changed
    for section in sections:
        part = part[section]
    part[last] = value
    return changed


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
def test_a_run_is_named_by_its_choices(overrides: tuple[str, ...], name: str, tmp_path: Path) -> None:
    settings = compose_small(*overrides)
    assert run_name(settings) == name
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
def test_settings_that_affect_the_weights_give_another_folder(
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
def test_settings_that_affect_no_result_give_the_same_folder(
    settings: dict[str, Any], tmp_path: Path, key: str, value: object
) -> None:
    assert folder_of(tmp_path, settings) == folder_of(tmp_path, changed_at(settings, key, value))


def test_the_order_of_the_settings_does_not_matter(settings: dict[str, Any], tmp_path: Path) -> None:
    assert folder_of(tmp_path, settings) == folder_of(tmp_path, dict(reversed(settings.items())))


def test_other_data_give_another_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    assert folder_of(tmp_path, settings, "d") != folder_of(tmp_path, settings, "e")


def test_another_version_of_training_gives_another_folder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_of(tmp_path, settings)
    monkeypatch.setattr(run_folder, "TRAINING_VERSION", run_folder.TRAINING_VERSION + 1)
    assert folder_of(tmp_path, settings) != before


def test_a_run_of_version_0_1_0_is_reported_and_trained_again(
    settings: dict[str, Any], cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = changed_at(changed_at(settings, "output_root", str(tmp_path)), "data.cache", str(cache))
    former = tmp_path / "phantom" / f"{run_name(settings)}-0123abcd"
    write_json(former / "run.json", {"status": "finished", "digests": {"config": "c", "data": "d", "code": "e"}})
    assert finished_folder(settings, "phantom") is None
    caplog.set_level("INFO")
    with open_run(former.parent, settings, "d") as run:
        assert (run.folder == former, run.finished) == (False, False)
        with run.training():
            pass
    assert f"{former.name}: trained by covid_cls 0.1.0" in caplog.text
    caplog.clear()
    with open_run(former.parent, settings, "d") as again:
        assert again.finished
    assert former.name not in caplog.text


def test_a_run_that_ends_normally_is_finished(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as run:
        assert (run.finished, run.record["status"]) == (False, "new")
        with run.training():
            assert read_json(run.folder / "run.json")["status"] == "running"
            logging.getLogger("covid_cls").warning("logged while training")
        assert run.finished
    record = read_json(run.folder / "run.json")
    assert record["status"] == "finished"
    assert record["cell"] == run.folder.name
    assert record["config"] == settings
    assert record["digests"]["data"] == "d"
    assert set(record["digests"]) == {"config", "data", "training"}
    assert record["started"] <= record["ended"]
    assert record["versions"]["torch"]
    assert "logged while training" in (run.folder / "run.log").read_text()
    with open_run(tmp_path, settings, "d") as again:
        assert again.finished


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("no such thing"), "failed", "ValueError: no such thing"),
        (InputError("fix the file"), "failed", "InputError: fix the file"),
        (MemoryError(), "failed", "MemoryError: "),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (SystemExit(1), "interrupted", "SystemExit"),
        (SIGTERMException(), "interrupted", "SIGTERMException"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_run_that_stops_records_the_reason_and_can_be_continued(
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


def test_a_run_continues_from_the_last_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as run:
        assert run.last_checkpoint() == (None, {})
        (run.folder / "checkpoints").mkdir()
        contents = {"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": {}}
        torch.save(contents, run.folder / "checkpoints" / "last.ckpt")
        path, found = run.last_checkpoint()
        assert path == run.folder / "checkpoints" / "last.ckpt"
        assert torch.equal(found["state_dict"]["weight"], torch.ones(2))


HOUR = 3600.0  # no test is so slow that a living process is regarded as dead in the meantime


def hold(connection: Connection, root: Path, settings: dict[str, Any], host: str, timeout: float) -> None:
    """In a separate process that reports the host name `host`: open the run until the parent sends a message."""
    socket.gethostname = lambda: host
    run_folder._TIMEOUT = timeout
    with open_run(root, settings, "d") as run, run.training():
        connection.send("holding")
        connection.recv()
        run.note(written="after the wait")


@contextmanager
def holder(
    root: Path, settings: dict[str, Any], host: str = HOST, timeout: float = run_folder._TIMEOUT
) -> Iterator[Member]:
    """Yield a process that trains the run."""
    member = Member(hold, root, settings, host, timeout)
    try:
        assert member.connection.recv() == "holding"
        yield member
    finally:
        member.kill()


def refusal(root: Path, settings: dict[str, Any], *, rerun: bool = False) -> str:
    with pytest.raises(InputError) as error, open_run(root, settings, "d", rerun=rerun):
        pytest.fail("the run was opened twice")
    return str(error.value)


@pytest.mark.slow(reason="a lock between processes")
def test_a_second_process_of_the_same_run_is_refused_until_the_first_has_ended(
    settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with holder(tmp_path, settings) as other:
        (record,) = tmp_path.glob("*/run.json")
        before = record.read_bytes()
        since = read_json(record)["started"]
        for rerun in (False, True):
            assert refusal(tmp_path, settings, rerun=rerun) == (
                f"{record.parent}: process {other.process.pid} on host {HOST} (since {since}) is training "
                f"this run. Wait for it or stop it (its lock is {tmp_path / f'.{record.parent.name}.lock'})"
            )
        assert record.read_bytes() == before
        other.kill()
        request.getfixturevalue("patient")
        # Without waiting for a timeout.
        with open_run(tmp_path, settings, "d") as run:
            # A killed process cannot record that it was killed.
            assert run.record["status"] == "running"
            assert not run.finished
            with run.training():
                pass
    logged = f"the start of {since} exited without reporting a status (process {other.process.pid} on host {HOST})"
    assert logged in (run.folder / "run.log").read_text()
    # No lock is left.
    assert [entry.name for entry in tmp_path.iterdir()] == [run.folder.name]


def after_each_check(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Call `happens` each time after this process has checked a lock for a sign of life."""
    last_sign = run_folder._last_sign

    def watched(lease: SoftFileLease) -> int | None:
        found = last_sign(lease)
        happens()
        return found

    monkeypatch.setattr(run_folder, "_last_sign", watched)


@pytest.mark.slow(reason="a lock between processes")
def test_the_lock_of_a_living_process_on_another_host_is_not_taken_over(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_TIMEOUT", HOUR)
    with holder(tmp_path, settings, "node7", HOUR) as other:
        (marker,) = tmp_path.glob(".*.lock")
        seconds = itertools.count(int(marker.stat().st_mtime) + 1)
        # The heartbeat of a living process does the same.
        after_each_check(monkeypatch, lambda: os.utime(marker, (now := next(seconds), now)))
        assert f"process {other.process.pid} on host node7 (since " in refusal(tmp_path, settings)


@pytest.mark.slow(reason="a lock between processes")
def test_the_lock_of_a_process_on_another_host_is_taken_over_after_the_timeout_and_not_before(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, hours = time.monotonic, 0

    def an_hour_later() -> None:
        nonlocal hours
        hours += 1

    monkeypatch.setattr(run_folder, "_TIMEOUT", HOUR)
    # filelock measures the timeout by this clock.
    monkeypatch.setattr(time, "monotonic", lambda: clock() + hours * HOUR)
    after_each_check(monkeypatch, an_hour_later)
    with holder(tmp_path, settings, "node7", HOUR) as other:
        other.kill()
        with open_run(tmp_path, settings, "d") as run:
            assert run.record["host"] == "node7"
    assert hours > 0
    assert f"process {other.process.pid} on host node7 has this lock; waiting up to 3600 s" in caplog.text


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process wait for a lock without a time limit: on a busy machine half a second can be too short."""

    class Patient(SoftFileLease):
        def acquire(self, timeout: float | None = None, **options: Any) -> Any:
            return super().acquire(-1, **options)

    monkeypatch.setattr(run_folder, "SoftFileLease", Patient)


@pytest.mark.slow(reason="a lock between processes")
def test_a_process_that_lost_its_lock_exits_and_writes_nothing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    monkeypatch.setattr(run_folder, "_TIMEOUT", 1.0)
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
    """Start one process for each of these settings at the same moment.

    Returns:
        The processes that may train, their run folders, and the error messages of the others.
    """
    members = [Member(start, root, settings) for settings in each]
    for member in members:
        # The moment is in the past, so each starts at once.
        member.connection.send((0.0, None))
    answers = [member.connection.recv() for member in members]
    holders = [member for member, (holds, _) in zip(members, answers, strict=True) if holds]
    folders, refusals = ([told for holds, told in answers if holds == wanted] for wanted in (True, False))
    for member in members:
        if member not in holders:
            member.process.join()
    return holders, folders, refusals


@pytest.mark.slow(reason="a lock between processes")
def test_many_starts_at_once_leave_each_run_one_process(settings: dict[str, Any], tmp_path: Path) -> None:
    # The second time the run's earlier process was killed.
    for _ in range(2):
        (one,), (folder,), refusals = started_at_once(tmp_path, [settings] * 5)
        assert len(refusals) == 4
        # A process that has the lock, but has not yet written its name into it, is "another process".
        who = f"(process {one.process.pid} on host {re.escape(HOST)}.*|another process) is training this run"
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


def test_opening_a_run_twice_in_one_process_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as run, run.training():
        assert f"process {os.getpid()} on host" in refusal(tmp_path, settings)
        assert read_json(run.folder / "run.json")["status"] == "running"


def test_other_runs_can_be_opened_at_the_same_time(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as first, open_run(tmp_path, changed_at(settings, "seed", 1), "d") as second:
        assert first.folder != second.folder


def test_a_run_that_is_refused_before_it_starts_leaves_no_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError), open_run(tmp_path, settings, "d"):
        raise InputError("weights are missing")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_resume_keeps_the_files_of_the_earlier_start(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as run, run.training():
        (run.folder / "figures").mkdir()
    with pytest.raises(InputError), open_run(tmp_path, settings, "d"):
        raise InputError("weights are missing")
    assert (run.folder / "figures").is_dir()
    assert read_json(run.folder / "run.json")["status"] == "finished"


def test_rerun_empties_the_folder_and_starts_again(settings: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path, settings, "d") as run, run.training():
        (run.folder / "checkpoints").mkdir()
        (run.folder / "checkpoints" / "last.ckpt").touch()
        (run.folder / "metrics.json").touch()
        (run.folder / "test_accesses.csv").touch()  # the test images stay the same
        run.note(weights={"used": "imagenet"})
    with open_run(tmp_path, settings, "d", rerun=True) as again:
        assert again.folder == run.folder
        assert {entry.name for entry in again.folder.iterdir()} == {"test_accesses.csv"}
        assert again.record["status"] == "new"
        assert "weights" not in again.record
        assert again.last_checkpoint() == (None, {})
        with again.training():
            pass
    assert read_json(run.folder / "run.json")["status"] == "finished"


def test_a_process_that_does_not_write_changes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
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
        ("{}", "status None"),
        ('{"status": "done"}', "status 'done'"),
        ('{"status": ["finished"]}', "status ['finished']"),
        ('{"status": "failed", "seconds": "long"}', "seconds 'long'"),
        (None, "missing, but there are checkpoints"),
    ],
)
def test_a_damaged_record_is_refused_with_its_path_and_keeps_the_checkpoints(
    damage: str | None, reason: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with open_run(tmp_path, settings, "d") as run, run.training():
        (run.folder / "checkpoints").mkdir()
    record = run.folder / "run.json"
    if damage is None:
        record.unlink()
    else:
        record.write_text(damage)
    message = refusal(tmp_path, settings)
    assert message.startswith(f"{record}: ")
    assert reason in message
    assert "rerun=true" in message
    assert (run.folder / "checkpoints").is_dir()
    with open_run(tmp_path, settings, "d", rerun=True) as run, run.training():
        pass
    assert read_json(record)["status"] == "finished"
