"""First weights come from where the user says, whole and finite, or the run refuses; no file ever runs code."""

import contextlib
import copy
import logging
import math
import os
import pickle
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from covid_cls.errors import InputError
from covid_cls.models import weights
from covid_cls.models.backbones import Staged, build_network, freeze_depth
from covid_cls.models.weights import imagenet_file, load_pretrained
from covid_cls.records import file_sha256

State = dict[str, Tensor]
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
RESNET18_FILE = "resnet18-f37072fd.pth"  # torchvision's IMAGENET1K_V1
ADDRESS = f"https://download.pytorch.org/models/{RESNET18_FILE}"


@pytest.fixture(scope="module")
def complete() -> State:
    """A state dict of torchvision's resnet18, as it would come out of somebody's training."""
    torch.manual_seed(7)
    whole = models.resnet18()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            module.num_batches_tracked.fill_(5)
    return dict(whole.state_dict())


@pytest.fixture(scope="module")
def built() -> Staged:
    torch.manual_seed(8)
    return build_network("resnet18", 3)


@pytest.fixture
def network(built: Staged) -> Staged:
    return copy.deepcopy(built)


def frozen(network: Staged, strategy: str) -> Staged:
    network.freeze(freeze_depth(network, strategy))
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


def test_none_changes_nothing_and_says_that_all_is_fresh(network: Staged) -> None:
    before = snapshot(network)
    report = load_pretrained(network, "resnet18", "none")
    assert same(before, snapshot(network))
    assert (report.used, report.pretrained_stages, report.sha256, report.note) == ("none", (), None, None)
    assert set(report.fresh) == set(backbone_of(before))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("strategy", ["fc", "full"])
def test_every_tensor_comes_from_the_file(
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


def test_a_file_of_one_grey_channel_is_taken_as_it_is(network: Staged, complete: State, tmp_path: Path) -> None:
    grey = complete["conv1.weight"].mean(dim=1, keepdim=True)
    load_pretrained(network, "resnet18", str(written({**complete, "conv1.weight": grey}, tmp_path)))
    assert torch.equal(snapshot(network)["stem.conv1.weight"], grey)


@pytest.mark.parametrize("strategy", ["partial", "full"])
def test_a_tensor_missing_from_the_trainable_part_starts_fresh_and_is_listed(
    network: Staged, complete: State, tmp_path: Path, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = snapshot(network)
    path = written(without(complete, "layer4.0.conv1", "layer4.0.bn1"), tmp_path)
    report = load_pretrained(frozen(network, strategy), "resnet18", str(path))
    assert set(report.fresh) == {
        "layer4.0.conv1.weight",
        *(f"layer4.0.bn1.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
    }
    assert report.pretrained_stages == STAGES[:-1]  # layer4 is not wholly pretrained
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
def test_a_tensor_missing_from_the_frozen_part_is_refused(
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
    ("change", "says"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, r"shapes.*layer1.0.conv1.weight \(64, 64, 1, 1\)"),
        ({"conv1.weight": torch.zeros(64, 4, 7, 7)}, r"shapes.*stem.conv1.weight \(64, 4, 7, 7\)"),
        ({"layer2.0.bn1.running_var": torch.full((128,), torch.nan)}, "non-finite.*layer2.0.bn1.running_var"),
        ({"layer3.1.conv2.weight": torch.full((256, 256, 3, 3), torch.inf)}, "non-finite.*layer3.1.conv2.weight"),
        ({"conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}, "non-finite.*stem.conv1.weight"),
        ({"bn1.weight": torch.ones(64, dtype=torch.int8)}, "another kind than resnet18's: stem.bn1.weight torch.int8"),
        ({"projector.weight": torch.zeros(2)}, "another network's than resnet18, which has no projector.weight"),
    ],
    ids=["kernel", "four channels", "nan statistics", "inf weights", "nan first layer", "integers", "a layer too many"],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(
    network: Staged, complete: State, tmp_path: Path, change: State, says: str
) -> None:
    before = snapshot(network)
    with pytest.raises(InputError, match=says):
        load_pretrained(network, "resnet18", str(written({**complete, **change}, tmp_path)))
    assert same(before, snapshot(network))


@pytest.mark.parametrize("other", ["resnet34", "resnet50"])
def test_a_file_of_another_network_is_refused(network: Staged, tmp_path: Path, other: str) -> None:
    path = written(models.get_model(other).state_dict(), tmp_path)  # resnet34 holds every tensor of resnet18, and more
    with pytest.raises(InputError, match="resnet18"):
        load_pretrained(frozen(network, "fc"), "resnet18", str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_foreign_names_are_refused(network: Staged, complete: State, tmp_path: Path, suffix: str) -> None:
    path = written({f"module.encoder.{name}": tensor for name, tensor in complete.items()}, tmp_path, suffix)
    with pytest.raises(InputError, match="holds no tensor of resnet18"):
        load_pretrained(network, "resnet18", str(path))


class Evil:
    """What a malicious pickle looks like: unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("form", ["torch", "torch, beside tensors", "bare pickle", "legacy torch"])
def test_pickled_code_is_never_executed(
    network: Staged, complete: State, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # turns the default round, not what is asked for
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Evil(marker), protocol=2))
    else:
        contents = {**complete, "extra": Evil(marker)} if form.endswith("tensors") else Evil(marker)
        torch.save(contents, path, _use_new_zipfile_serialization=form != "legacy torch")
    with pytest.raises(InputError, match="never executed"):
        load_pretrained(network, "resnet18", str(path))
    assert not marker.exists()
    torch.load(path, weights_only=False) if form != "bare pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # the file was live


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
def test_a_broken_file_is_refused_by_its_name(
    network: Staged, complete: State, tmp_path: Path, suffix: str, damage: object
) -> None:
    path = written(without(complete, "layer", "fc"), tmp_path, suffix)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(InputError) as error:
        load_pretrained(network, "resnet18", str(path))
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)  # torch advises to turn the protection off


@pytest.mark.parametrize("contents", [[torch.zeros(3)], {"conv1.weight": "text"}, torch.zeros(3), {"a": 1}], ids=type)
def test_a_file_of_something_else_is_refused(network: Staged, tmp_path: Path, contents: object) -> None:
    with pytest.raises(InputError, match="dictionary of tensors"):
        load_pretrained(network, "resnet18", str(written(contents, tmp_path)))


@pytest.mark.parametrize("source", ["https://example.org/w.pth", "http://localhost/w.pth", "file:///tmp/w.pth"])
def test_an_address_is_refused(network: Staged, source: str) -> None:
    with pytest.raises(InputError, match="addresses are not loaded"):
        load_pretrained(network, "resnet18", source)


@pytest.mark.parametrize("source", ["nowhere.pth", "ImageNet", ""])
def test_a_missing_file_is_refused_with_the_words_that_exist(network: Staged, source: str) -> None:
    with pytest.raises(InputError, match=r"no such file.*auto, imagenet, none"):
        load_pretrained(network, "resnet18", source)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, float]]]:
    """The address and time limit of each request that was made; all go to a server that accepts and never answers.

    That is what a firewall that drops packets looks like.
    """
    made: list[tuple[str, float]] = []
    open_address = urllib.request.OpenerDirector.open

    def counted(opener: Any, request: Any, data: Any = None, timeout: float = math.inf) -> Any:
        made.append((request.full_url, timeout))
        return open_address(opener, request, data, timeout)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", counted)
    monkeypatch.setattr(weights, "PROBE_SECONDS", 0.5)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        yield made
    join_others(before)


def join_others(before: set[threading.Thread]) -> None:
    """Wait for the threads that were started since: a request that is late must not reach into the next test."""
    for thread in set(threading.enumerate()) - before:
        thread.join()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub; the path where resnet18's file belongs."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "torch" / "hub" / "checkpoints" / RESNET18_FILE


def test_imagenet_out_of_reach_names_the_file_to_place(
    network: Staged, hub: Path, requests: list[tuple[str, float]]
) -> None:
    before, threads = snapshot(network), set(threading.enumerate())
    with pytest.raises(InputError, match="out of reach") as error:
        load_pretrained(network, "resnet18", "imagenet")
    join_others(threads)
    assert f"Place {ADDRESS} at {hub}" in str(error.value)
    assert same(before, snapshot(network))
    assert requests == [(ADDRESS, weights.PROBE_SECONDS)]  # asked once, with a time limit
    assert not hub.exists()


def test_auto_out_of_reach_starts_at_random_and_says_so_loudly(
    network: Staged, hub: Path, requests: list[tuple[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    before, threads = snapshot(network), set(threading.enumerate())
    report = load_pretrained(frozen(network, "fc"), "resnet18", "auto")
    join_others(threads)
    assert requests == [(ADDRESS, weights.PROBE_SECONDS)]
    assert same(before, snapshot(network))
    assert (report.asked, report.used, report.pretrained_stages) == ("auto", "none", ())
    assert report.note is not None
    assert "RANDOM" in report.note
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "RANDOM weights" in caplog.text
    assert "!" * 50 in caplog.text
    assert not hub.exists()


def test_a_refused_connection_is_out_of_reach(network: Staged, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    assert load_pretrained(network, "resnet18", "auto").used == "none"


def test_a_download_that_breaks_off_names_the_file_to_place(
    network: Staged, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer_and_break_off(opener: Any, request: Any, data: Any = None, timeout: Any = None) -> Any:
        asked.append(request.get_method())
        if request.get_method() == "HEAD":
            return contextlib.nullcontext()
        raise urllib.error.URLError(ConnectionResetError(104, "Connection reset by peer"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", answer_and_break_off)
    monkeypatch.setattr(weights, "PROBE_SECONDS", threading.TIMEOUT_MAX)  # the answer comes, however long it takes
    before = snapshot(network)
    with pytest.raises(InputError, match=r"the download failed .*Connection reset by peer") as error:
        load_pretrained(network, "resnet18", "imagenet")
    assert f"Place {ADDRESS} at {hub}" in str(error.value)
    assert asked == ["HEAD", "GET"]
    assert same(before, snapshot(network))
    assert not hub.exists()


@pytest.mark.parametrize("source", ["auto", "imagenet"])
def test_without_leave_to_download_the_network_is_left_alone(
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


def test_a_cached_file_with_the_right_digits_is_used_without_the_network(
    network: Staged, complete: State, hub: Path, requests: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.parent.mkdir(parents=True)
    path = written(complete, hub.parent)
    digits = file_sha256(path)[:8]

    class Renamed:  # torchvision's file cannot be forged, so the file is given the name that it deserves
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


PARTIAL = Path(__file__).parents[3] / "shared" / "weights" / "resnet18_imagenet_partial.pth"


@pytest.mark.real
@pytest.mark.skipif(not PARTIAL.is_file(), reason="needs ../shared/weights")
def test_the_partial_imagenet_file_serves_partial_and_not_fc(network: Staged) -> None:
    report = load_pretrained(frozen(network, "partial"), "resnet18", str(PARTIAL))
    assert report.pretrained_stages == STAGES[:-1]
    assert {name.partition(".")[0] for name in report.fresh} == {"layer4"}
    with pytest.raises(InputError, match="frozen stages are missing"):
        load_pretrained(frozen(network, "fc"), "resnet18", str(PARTIAL))
