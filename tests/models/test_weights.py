"""Pretrained weights are complete and finite, or they are refused; no file of weights runs code."""

import contextlib
import copy
import logging
import math
import os
import pickle
import socket
import struct
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from covid_cls.errors import InputError
from covid_cls.io import file_sha256
from covid_cls.models import weights
from covid_cls.models.backbones import Staged, apply_strategy, build_network
from covid_cls.models.weights import imagenet_file, load_pretrained, read_tensors
from covid_cls.training.checkpoints import load_classifier

State = dict[str, Tensor]
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
RESNET18_FILE = "resnet18-f37072fd.pth"  # torchvision's IMAGENET1K_V1
ADDRESS = f"https://download.pytorch.org/models/{RESNET18_FILE}"
PARTIAL = Path(__file__).parents[3] / "shared" / "weights" / "resnet18_imagenet_partial.pth"

Read = Callable[[Path], object]
READERS: dict[str, Read] = {
    "weights": lambda path: load_pretrained(build_network("resnet18", 2), "resnet18", str(path)),
    "checkpoint": load_classifier,
}
STATE = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
# Can be read as a file of weights and as a checkpoint.
BOTH = {"state_dict": STATE, "hyper_parameters": {}, **STATE}

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Validating sparse tensor")


@pytest.fixture(scope="module")
def complete() -> State:
    """Return a state dict of torchvision's resnet18 with batch norm statistics as after training."""
    torch.manual_seed(7)
    theirs = models.resnet18()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            module.num_batches_tracked.fill_(5)
    return dict(theirs.state_dict())


@pytest.fixture(scope="module")
def built() -> Staged:
    torch.manual_seed(8)
    return build_network("resnet18", 3)


@pytest.fixture
def network(built: Staged) -> Staged:
    return copy.deepcopy(built)


def frozen(network: Staged, strategy: str) -> Staged:
    apply_strategy(network, strategy)
    return network


def without(state: State, *beginnings: str) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(beginnings)}


def written(state: object, folder: Path, suffix: str = ".pth") -> Path:
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)  # type: ignore[attr-defined]
    else:
        torch.save(state, path)
    return path


def snapshot(network: Staged) -> State:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def backbone_of(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def test_none_changes_nothing_and_reports_random_initialisation(network: Staged) -> None:
    before = snapshot(network)
    report = load_pretrained(network, "resnet18", "none")
    assert same(before, snapshot(network))
    assert (report.used, report.pretrained_stages, report.sha256, report.note) == ("none", (), None, None)
    assert set(report.fresh) == set(backbone_of(before))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("strategy", ["fc", "full"])
def test_every_backbone_tensor_comes_from_the_file(
    network: Staged, complete: State, tmp_path: Path, suffix: str, strategy: str
) -> None:
    path = written(complete, tmp_path, suffix)
    head = {name: tensor for name, tensor in snapshot(network).items() if name.startswith("head.")}
    report = load_pretrained(frozen(network, strategy), "resnet18", str(path))
    assert (report.asked, report.used, report.fresh, report.note) == (str(path), str(path), (), None)
    assert report.pretrained_stages == STAGES
    assert report.sha256 == file_sha256(path)
    after = snapshot(network)
    assert all(torch.equal(after[name], tensor) for name, tensor in head.items())
    assert torch.equal(after["stem.conv1.weight"], complete["conv1.weight"].sum(dim=1, keepdim=True))
    assert torch.equal(after["stem.bn1.running_mean"], complete["bn1.running_mean"])
    for name in complete:
        if name.startswith("layer"):
            assert torch.equal(after[name], complete[name]), name


def test_a_training_checkpoint_with_a_state_dict_inside_is_read(
    network: Staged, complete: State, tmp_path: Path
) -> None:
    path = written({"epoch": 3, "state_dict": complete}, tmp_path)
    load_pretrained(network, "resnet18", str(path))
    assert torch.equal(snapshot(network)["layer4.1.conv2.weight"], complete["layer4.1.conv2.weight"])


def test_a_file_with_one_grey_channel_is_loaded_unchanged(network: Staged, complete: State, tmp_path: Path) -> None:
    grey = complete["conv1.weight"].mean(dim=1, keepdim=True)
    load_pretrained(network, "resnet18", str(written({**complete, "conv1.weight": grey}, tmp_path)))
    assert torch.equal(snapshot(network)["stem.conv1.weight"], grey)


@pytest.mark.parametrize("strategy", ["partial", "full"])
def test_a_tensor_missing_from_a_trainable_stage_is_randomly_initialised_and_reported(
    network: Staged, complete: State, tmp_path: Path, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = snapshot(network)
    path = written(without(complete, "layer4.0.conv1", "layer4.0.bn1"), tmp_path)
    report = load_pretrained(frozen(network, strategy), "resnet18", str(path))
    assert set(report.fresh) == {
        "layer4.0.conv1.weight",
        *(f"layer4.0.bn1.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
    }
    # layer4 is only partly pretrained.
    assert report.pretrained_stages == STAGES[:-1]
    assert report.note is not None
    assert "5 tensors" in report.note
    assert "layer4.0.conv1.weight" in caplog.text
    after = snapshot(network)
    assert all(torch.equal(after[name], before[name]) for name in report.fresh)
    assert torch.equal(after["layer4.1.conv1.weight"], complete["layer4.1.conv1.weight"])


@pytest.mark.parametrize(
    ("strategy", "missing"),
    [("fc", "layer4.1.conv2"), ("fc", "layer4.1.bn2.running_var"), ("partial", "layer3.0."), ("partial", "conv1")],
)
def test_a_tensor_missing_from_a_frozen_stage_is_refused(
    network: Staged, complete: State, tmp_path: Path, strategy: str, missing: str
) -> None:
    before = snapshot(network)
    path = written(without(complete, missing), tmp_path)
    with pytest.raises(InputError, match="frozen stages are missing") as error:
        load_pretrained(frozen(network, strategy), "resnet18", str(path))
    assert missing in str(error.value)
    assert str(path) in str(error.value)
    assert same(before, snapshot(network))


def test_a_file_without_batch_counts_is_complete(network: Staged, complete: State, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in complete.items() if not name.endswith("num_batches_tracked")}
    report = load_pretrained(frozen(network, "fc"), "resnet18", str(written(state, tmp_path)))
    assert (report.fresh, report.note, report.pretrained_stages) == ((), None, STAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)},
            r"do not fit resnet18: layer1.0.conv1.weight \(64, 64, 1, 1\)",
        ),
        ({"conv1.weight": torch.zeros(64, 4, 7, 7)}, r"do not fit resnet18: stem.conv1.weight \(64, 4, 7, 7\)"),
        ({"layer2.0.bn1.running_var": torch.full((128,), torch.nan)}, "non-finite.*layer2.0.bn1.running_var"),
        ({"layer3.1.conv2.weight": torch.full((256, 256, 3, 3), torch.inf)}, "non-finite.*layer3.1.conv2.weight"),
        ({"conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}, "non-finite.*stem.conv1.weight"),
        ({"bn1.weight": torch.ones(64, dtype=torch.int8)}, r"do not fit resnet18: stem.bn1.weight \(64,\) torch.int8"),
        ({"projector.weight": torch.zeros(2)}, "another network than resnet18: projector.weight"),
    ],
    ids=["kernel", "four channels", "nan statistics", "inf weights", "nan first layer", "integers", "a layer too many"],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(
    network: Staged, complete: State, tmp_path: Path, change: State, message: str
) -> None:
    before = snapshot(network)
    with pytest.raises(InputError, match=message):
        load_pretrained(network, "resnet18", str(written({**complete, **change}, tmp_path)))
    assert same(before, snapshot(network))


@pytest.mark.parametrize("other", ["resnet34", "resnet50"])
def test_a_file_of_another_network_is_refused(network: Staged, tmp_path: Path, other: str) -> None:
    # resnet34 has every tensor of resnet18, and more.
    path = written(models.get_model(other).state_dict(), tmp_path)
    with pytest.raises(InputError, match="resnet18"):
        load_pretrained(frozen(network, "fc"), "resnet18", str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_unknown_tensor_names_are_refused(network: Staged, complete: State, tmp_path: Path, suffix: str) -> None:
    path = written({f"module.encoder.{name}": tensor for name, tensor in complete.items()}, tmp_path, suffix)
    with pytest.raises(InputError, match="no tensor has a name of torchvision's resnet18"):
        load_pretrained(network, "resnet18", str(path))


class Evil:
    """A malicious object: unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("form", ["torch", "torch, among tensors", "bare pickle", "legacy torch"])
def test_pickled_code_is_never_executed(
    network: Staged, complete: State, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Changes the default of torch.load, but not an explicit weights_only=True.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Evil(marker), protocol=2))
    else:
        contents = {**complete, "extra": Evil(marker)} if form.endswith("tensors") else Evil(marker)
        torch.save(contents, path, _use_new_zipfile_serialization=form != "legacy torch")
    with pytest.raises(InputError, match="never executed"):
        load_pretrained(network, "resnet18", str(path))
    assert not marker.exists()
    # The file does run code where that is not prevented.
    torch.load(path, weights_only=False) if form != "bare pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:3],
        lambda data: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 46830571\n",
        lambda data: bytes(1000),
    ],
    ids=["empty", "truncated", "three bytes", "web page", "lfs pointer", "zeros"],
)
def test_a_damaged_file_is_refused_by_its_name(
    network: Staged, complete: State, tmp_path: Path, suffix: str, damage: object
) -> None:
    path = written(without(complete, "layer", "fc"), tmp_path, suffix)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(InputError) as error:
        load_pretrained(network, "resnet18", str(path))
    assert str(path) in str(error.value)
    # torch's own message advises to turn the protection off.
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("contents", [[torch.zeros(3)], {"conv1.weight": "text"}, torch.zeros(3), {"a": 1}], ids=type)
def test_a_file_of_something_else_is_refused(network: Staged, tmp_path: Path, contents: object) -> None:
    with pytest.raises(InputError, match="dictionary of tensors"):
        load_pretrained(network, "resnet18", str(written(contents, tmp_path)))


@pytest.mark.parametrize("source", ["https://example.org/w.pth", "http://localhost/w.pth", "file:///tmp/w.pth"])
def test_an_address_is_refused(network: Staged, source: str) -> None:
    with pytest.raises(InputError, match="addresses are not loaded"):
        load_pretrained(network, "resnet18", source)


@pytest.mark.parametrize("source", ["nowhere.pth", "ImageNet", ""])
def test_a_missing_file_is_refused_and_the_message_lists_the_alternatives(network: Staged, source: str) -> None:
    with pytest.raises(InputError, match=r"no such file.*auto, imagenet or none"):
        load_pretrained(network, "resnet18", source)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, float]]]:
    """Collect the address and time limit of each request. All go to a server that accepts and never answers.

    A firewall that drops packets has the same effect.
    """
    made: list[tuple[str, float]] = []
    open_address = urllib.request.OpenerDirector.open

    def counted(opener: Any, request: Any, data: Any = None, timeout: float = math.inf) -> Any:
        made.append((request.full_url, timeout))
        return open_address(opener, request, data, timeout)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", counted)
    monkeypatch.setattr(weights, "CONNECT_SECONDS", 0.5)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        yield made
    join_others(before)


def join_others(before: set[threading.Thread]) -> None:
    """Wait for the threads that were started since `before`: a late request must not affect the next test."""
    for thread in set(threading.enumerate()) - before:
        thread.join()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give torch.hub an empty cache; return the path of resnet18's file in it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "torch" / "hub" / "checkpoints" / RESNET18_FILE


def test_if_imagenet_is_out_of_reach_the_message_names_the_file_to_place(
    network: Staged, hub: Path, requests: list[tuple[str, float]]
) -> None:
    before, threads = snapshot(network), set(threading.enumerate())
    with pytest.raises(InputError, match="out of reach") as error:
        load_pretrained(network, "resnet18", "imagenet")
    join_others(threads)
    assert f"Place {ADDRESS} at {hub}" in str(error.value)
    assert same(before, snapshot(network))
    # One request, with a time limit.
    assert requests == [(ADDRESS, weights.CONNECT_SECONDS)]
    assert not hub.exists()


def test_if_auto_is_out_of_reach_random_initialisation_is_announced_loudly(
    network: Staged, hub: Path, requests: list[tuple[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    before, threads = snapshot(network), set(threading.enumerate())
    report = load_pretrained(frozen(network, "fc"), "resnet18", "auto")
    join_others(threads)
    assert requests == [(ADDRESS, weights.CONNECT_SECONDS)]
    assert same(before, snapshot(network))
    assert (report.asked, report.used, report.pretrained_stages) == ("auto", "none", ())
    assert report.note is not None
    assert "RANDOM" in report.note
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "RANDOM weights" in caplog.text
    assert "!" * 50 in caplog.text
    assert not hub.exists()


def test_a_refused_connection_counts_as_out_of_reach(
    network: Staged, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    assert load_pretrained(network, "resnet18", "auto").used == "none"


def test_if_a_download_is_interrupted_the_message_names_the_file_to_place(
    network: Staged, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer_and_interrupt(opener: Any, request: Any, data: Any = None, timeout: Any = None) -> Any:
        asked.append(request.get_method())
        if request.get_method() == "HEAD":
            return contextlib.nullcontext()
        raise urllib.error.URLError(ConnectionResetError(104, "Connection reset by peer"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", answer_and_interrupt)
    # The answer comes, however slow the machine is.
    monkeypatch.setattr(weights, "CONNECT_SECONDS", threading.TIMEOUT_MAX)
    before = snapshot(network)
    with pytest.raises(InputError, match=r"the download failed .*Connection reset by peer") as error:
        load_pretrained(network, "resnet18", "imagenet")
    assert f"Place {ADDRESS} at {hub}" in str(error.value)
    assert asked == ["HEAD", "GET"]
    assert same(before, snapshot(network))
    assert not hub.exists()


@pytest.mark.parametrize("source", ["auto", "imagenet"])
def test_with_download_false_nothing_is_requested(
    network: Staged, hub: Path, requests: list[tuple[str, float]], source: str
) -> None:
    if source == "auto":
        assert load_pretrained(network, "resnet18", source, download=False).used == "none"
    else:
        with pytest.raises(InputError, match="does not download"):
            load_pretrained(network, "resnet18", source, download=False)
    assert requests == []


@pytest.mark.parametrize("download", [True, False])
def test_a_tampered_cached_file_is_refused(
    network: Staged, complete: State, hub: Path, requests: list[tuple[str, float]], download: bool
) -> None:
    hub.parent.mkdir(parents=True)
    torch.save(complete, hub)
    before = snapshot(network)
    with pytest.raises(InputError, match="sha256 does not begin with f37072fd") as error:
        load_pretrained(network, "resnet18", "imagenet", download=download)
    assert str(hub) in str(error.value)
    assert same(before, snapshot(network))
    assert requests == []


def test_a_cached_file_with_the_right_sha256_is_used_without_a_request(
    network: Staged, complete: State, hub: Path, requests: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.parent.mkdir(parents=True)
    path = written(complete, hub.parent)
    digits = file_sha256(path)[:8]

    # No other file has the sha256 in the name of torchvision's file, so this file gets a name with its own sha256.
    class Renamed:
        class IMAGENET1K_V1:  # noqa: N801  # torchvision's name
            url = f"https://download.pytorch.org/models/resnet18-{digits}.pth"

    monkeypatch.setattr(models, "get_model_weights", lambda backbone: Renamed)
    path.rename(hub.with_name(f"resnet18-{digits}.pth"))
    assert imagenet_file("resnet18") == hub.with_name(f"resnet18-{digits}.pth")
    report = load_pretrained(frozen(network, "fc"), "resnet18", "auto")
    assert (report.asked, report.used, report.fresh, report.pretrained_stages) == ("auto", "imagenet", (), STAGES)
    assert report.sha256 is not None
    assert report.sha256.startswith(digits)
    assert requests == []


@pytest.mark.real
@pytest.mark.skipif(not PARTIAL.is_file(), reason="needs ../shared/weights")
def test_the_partial_imagenet_file_is_accepted_for_partial_and_refused_for_fc(network: Staged) -> None:
    report = load_pretrained(frozen(network, "partial"), "resnet18", str(PARTIAL))
    assert report.pretrained_stages == STAGES[:-1]
    assert {name.partition(".")[0] for name in report.fresh} == {"layer4"}
    with pytest.raises(InputError, match="frozen stages are missing"):
        load_pretrained(frozen(network, "fc"), "resnet18", str(PARTIAL))


@pytest.fixture(params=READERS.values(), ids=READERS)
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Return each function that reads such files, with the variable set that changes torch.load's default."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    reader: Read = request.param
    return reader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a path some folders down, so that files that escape from it are still in the test's folder."""
    folder = tmp_path / "down" / "below"
    folder.mkdir(parents=True)
    return folder / "evil.ckpt"


def refuse(read: Read, path: Path, message: str = "not a file of plain tensors") -> None:
    """Check that reading `path` is refused in one line that names it."""
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    # torch's own message advises to turn the protection off.
    assert "weights_only" not in str(error.value)


@contextmanager
def within(mebibytes: int) -> Iterator[None]:
    """Fail if the resident memory grows by more than `mebibytes` at any time in the block."""

    def resident(line: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition(f"{line}:")[2].split()[0]) >> 10

    # Reset the high-water mark.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < mebibytes


class Reduced:
    """An object whose unpickling calls `function(*values)`."""

    def __init__(self, function: Callable[..., Any], *values: object) -> None:
        self.call = function, values

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def rewritten(source: Path, target: Path, **members: bytes) -> None:
    """Copy an archive of torch with these members replaced, and with correct checksums."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.rpartition("/")[2].replace(".", "_"), old.read(name)))


def archive(path: Path, pickled: bytes) -> None:
    """Write a file as torch does, but with this pickle."""
    original = path.with_suffix(".original")
    torch.save(BOTH, original)
    rewritten(original, path, data_pkl=pickled)
    original.unlink()


def shell(marker: Path) -> bytes:
    return f"touch '{marker}'".encode()


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "global and reduce": lambda marker: b"\x80\x02cos\nsystem\n(S'" + shell(marker).replace(b"'", b"\\'") + b"'\ntR.",
    "instance": lambda marker: b"(S'" + shell(marker).replace(b"'", b"\\'") + b"'\nios\nsystem\n.",
    "object": lambda marker: b"(cos\nsystem\nS'" + shell(marker).replace(b"'", b"\\'") + b"'\no.",
    "exec": lambda marker: pickle.dumps(Reduced(exec, f"open({str(marker)!r}, 'w').close()"), protocol=2),
    "stack global": lambda marker: pickle.dumps(Reduced(os.system, shell(marker).decode()), protocol=4),
    "in a state dict": lambda marker: pickle.dumps(
        {"state_dict": {"w": Reduced(os.system, shell(marker).decode())}, "hyper_parameters": {}}, protocol=2
    ),
    "in a list": lambda marker: pickle.dumps([[1, [Reduced(os.system, shell(marker).decode())]]], protocol=2),
}


@pytest.mark.parametrize("bare", [False, True], ids=["zip", "bare pickle"])
@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_no_payload_runs(payload: Callable[[Path], bytes], bare: bool, read: Read, path: Path) -> None:
    marker = path.with_name("marker")
    pickled = payload(marker)
    path.write_bytes(pickled) if bare else archive(path, pickled)
    refuse(read, path)
    assert not marker.exists()
    # The payload does run where that is not prevented.
    pickle.loads(pickled)
    assert marker.exists()


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_no_payload_that_torch_saved_runs(form: str, read: Read, path: Path) -> None:
    marker = path.with_name("marker")
    contents = {**BOTH, "extra": Reduced(os.system, shell(marker).decode())}
    torch.save(contents, path, _use_new_zipfile_serialization=form == "zip")
    refuse(read, path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_the_oldest_format_runs_nothing_and_unpacks_nothing(read: Read, path: Path) -> None:
    marker = path.with_name("marker")
    members = {
        "storages": pickle.dumps(Reduced(os.system, shell(marker).decode()), protocol=2),
        "../escaped": b"outside",
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, BytesIO(data))
    refuse(read, path)
    assert not marker.exists()
    assert not (path.parents[1] / "escaped").exists()
    # The payload runs before torch fails.
    with pytest.raises(Exception):  # noqa: B017, PT011
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_compressed_member_is_refused_before_it_is_decompressed(read: Read, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("evil/data.pkl", pickle.dumps({}, protocol=2))
        bomb.writestr("evil/data/0", bytes(1 << 28))
    assert path.stat().st_size < 300_000
    # A resnet18 is built as well.
    with within(mebibytes=160):
        refuse(read, path, "compressed members")


def test_a_member_that_declares_more_than_the_file_is_refused(read: Read, path: Path) -> None:
    archive(path, b"\x80\x02}.")
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data.pkl"))
    data[entry + 20 : entry + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(data)
    refuse(read, path, "declares more bytes than it has")


def test_members_that_share_their_bytes_are_refused(read: Read, path: Path) -> None:
    # A thousand names for one member: each is smaller than the file, and all together are larger.
    with zipfile.ZipFile(path, "w") as quine:
        quine.writestr("evil/data.pkl", pickle.dumps({}, protocol=2))
        quine.writestr("evil/data/0", bytes(1 << 16))
        first = quine.getinfo("evil/data/0")
        for number in range(1, 1000):
            again = zipfile.ZipInfo(f"evil/data/{number}")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = first.file_size
            quine.filelist.append(again)
    refuse(read, path, "declares more bytes than it has")


@pytest.mark.parametrize("name", ["../../escaped", "{root}/escaped", "evil/../../escaped"])
def test_a_path_that_leaves_the_archive_is_refused(name: str, read: Read, path: Path, tmp_path: Path) -> None:
    torch.save(BOTH, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name.format(root=tmp_path), b"outside")
    refuse(read, path, "paths that leave it")
    assert not list(tmp_path.rglob("escaped"))


def tensor_pickle(path: Path, count: int, claimed: int) -> None:
    """Write an archive of `count` numbers whose pickle declares `claimed` of them."""
    original = path.with_suffix(".original")
    torch.save({**BOTH, "w": torch.zeros(count)}, original)
    with zipfile.ZipFile(original) as old:
        (name,) = [name for name in old.namelist() if name.endswith("/data.pkl")]
        pickled = old.read(name)
    number, more = b"J" + struct.pack("<i", count), b"\x8a\x08" + claimed.to_bytes(8, "little")
    assert number in pickled
    rewritten(original, path, data_pkl=pickled.replace(number, more))
    original.unlink()


ODD: dict[str, Callable[[], object]] = {
    "expanded": lambda: torch.zeros(1).expand(10**5, 3, 10**4, 10**4),
    "no data": lambda: torch.zeros(10**9, device="meta"),
    "sparse": lambda: torch.sparse_coo_tensor([[0]], [1.0], (10**12,), check_invariants=True),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_tensor_larger_than_its_file_is_refused(odd: Callable[[], object], read: Read, path: Path) -> None:
    state = {"conv1.weight": odd()}
    torch.save({"state_dict": state, "hyper_parameters": {}, "deep": [({"er": state},)]}, path)
    refuse(read, path, "declares a tensor of shape|tensor that is sparse, quantised, nested or without data")


def test_a_declared_size_beyond_the_file_is_refused(read: Read, path: Path) -> None:
    tensor_pickle(path, 70_000, 10**12)
    refuse(read, path)


@pytest.mark.parametrize("bare", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_allocates_memory_is_refused(bare: bool, read: Read, path: Path) -> None:
    pickled = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (1 << 32).to_bytes(5, "little") + b"\x85R."
    path.write_bytes(pickled) if bare else archive(path, pickled)
    with within(mebibytes=160):
        refuse(read, path, "asks for a bytearray")


def test_an_object_that_occurs_many_times_is_checked_once(path: Path) -> None:
    laughs: list[object] = ["ha"]
    for _ in range(30):
        laughs = [laughs] * 10
    torch.save(laughs, path)
    assert path.stat().st_size < 10_000
    found = read_tensors(path, "")
    for _ in range(30):
        assert len(found) == 10
        found = found[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n", "not a file of plain tensors"),
        (b"PK\x03\x04" + bytes(500), "not a file of plain tensors|damaged"),
        (bytes(2000), "not a file of plain tensors"),
    ],
    ids=["empty", "web page", "first bytes of a zip", "zeros"],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_file_without_tensors_is_refused(content: bytes, message: str, suffix: str, read: Read, path: Path) -> None:
    path = path.with_suffix(suffix)
    path.write_bytes(content)
    refuse(read, path, message)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, read: Read, path: Path) -> None:
    torch.save(BOTH, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refuse(read, path, "not a file of plain tensors|damaged")


def test_a_flipped_bit_is_refused(read: Read, path: Path) -> None:
    torch.save(BOTH, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    refuse(read, path, "a checksum is wrong")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_named_pipe_is_refused_without_waiting(suffix: str, read: Read, path: Path) -> None:
    path = path.with_suffix(suffix)
    os.mkfifo(path)
    refuse(read, path, "no regular file")


def test_a_device_is_not_read(read: Read) -> None:
    refuse(read, Path("/dev/zero"), "no regular file")


def test_a_link_to_itself_is_refused(read: Read, path: Path) -> None:
    path.symlink_to(path)
    refuse(read, path, "no such")


def test_plain_contents_are_returned_unchanged(path: Path) -> None:
    state = {"w": torch.randn(3, 4), "n": torch.tensor(5), "half": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"state": state, "epoch": 3, "names": ["a", None]}, path)
    found = read_tensors(path, "")
    assert found["epoch"] == 3
    assert found["names"] == ["a", None]
    save_file(state, path.with_suffix(".safetensors"))
    for read in (found["state"], read_tensors(path.with_suffix(".safetensors"), "")):
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in state)


def test_the_old_format_is_read_only_if_it_is_allowed(path: Path) -> None:
    torch.save({"w": torch.arange(4)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(path, "", legacy=True)["w"], torch.arange(4))
    with pytest.raises(InputError, match="not the zip file that torch writes"):
        read_tensors(path, "")
