"""A file of tensors is read without running any of it, and without more memory than it has bytes."""

import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from covid_cls.errors import InputError
from covid_cls.models.backbones import build_network
from covid_cls.models.files import read_tensors
from covid_cls.models.weights import load_pretrained
from covid_cls.training.checkpoints import load_classifier

Read = Callable[[Path], object]
READERS: dict[str, Read] = {
    "weights": lambda path: load_pretrained(build_network("resnet18", 2), "resnet18", str(path)),
    "checkpoint": load_classifier,
}
STATE = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
WHOLE = {"state_dict": STATE, "hyper_parameters": {}, **STATE}  # reads as weights and as a checkpoint


@pytest.fixture(params=READERS.values(), ids=READERS)
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Both ways in, with the variable set that makes torch.load forget its default."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    reader: Read = request.param
    return reader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file lies: some folders down, so that what escapes from it is still in the test's own folder."""
    folder = tmp_path / "down" / "below"
    folder.mkdir(parents=True)
    return folder / "evil.ckpt"


pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Validating sparse tensor")


def refuse(read: Read, path: Path, says: str = "not a file of plain tensors") -> None:
    """Reading `path` is one line that names it."""
    with pytest.raises(InputError, match=says) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # torch advises to turn the protection off


@contextmanager
def within(mebibytes: int) -> Iterator[None]:
    """Fails where the resident set grows by more than `mebibytes` at any time."""

    def resident(line: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition(f"{line}:")[2].split()[0]) >> 10

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts from here
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < mebibytes


class Reduced:
    """Unpickling it calls `function(*values)`."""

    def __init__(self, function: Callable[..., Any], *values: object) -> None:
        self.call = function, values

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def rewritten(source: Path, target: Path, **members: bytes) -> None:
    """torch's archive with the members of these file names replaced; with checksums that are right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.rpartition("/")[2].replace(".", "_"), old.read(name)))


def archive(path: Path, pickled: bytes) -> None:
    """A file as torch writes it, around any pickle."""
    whole = path.with_suffix(".whole")
    torch.save(WHOLE, whole)
    rewritten(whole, path, data_pkl=pickled)
    whole.unlink()


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
    pickle.loads(pickled)
    assert marker.exists()  # the payload was live


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_no_payload_that_torch_saved_runs(form: str, read: Read, path: Path) -> None:
    marker = path.with_name("marker")
    contents = {**WHOLE, "extra": Reduced(os.system, shell(marker).decode())}
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
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever comes of it, the file was live
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_compressed_member_is_refused_before_it_is_expanded(read: Read, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("evil/data.pkl", pickle.dumps(WHOLE["hyper_parameters"], protocol=2))
        bomb.writestr("evil/data/0", bytes(1 << 28))
    assert path.stat().st_size < 300_000
    with within(mebibytes=160):  # a resnet18 is built, too
        refuse(read, path, "compressed members")


def test_a_member_that_declares_more_than_the_file_is_refused(read: Read, path: Path) -> None:
    archive(path, b"\x80\x02}.")
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data.pkl"))
    data[entry + 20 : entry + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(data)
    refuse(read, path, "declares more bytes than it has")


def test_members_that_share_their_bytes_are_refused(read: Read, path: Path) -> None:
    """A thousand names for one member: each within the file, all together not."""
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
    torch.save(WHOLE, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name.format(root=tmp_path), b"outside")
    refuse(read, path, "paths that leave it")
    assert not list(tmp_path.rglob("escaped"))


def tensor_pickle(path: Path, count: int, claimed: int) -> None:
    """An archive of `count` numbers whose pickle claims `claimed` of them."""
    whole = path.with_suffix(".whole")
    torch.save({**WHOLE, "w": torch.zeros(count)}, whole)
    with zipfile.ZipFile(whole) as old:
        (name,) = [name for name in old.namelist() if name.endswith("/data.pkl")]
        pickled = old.read(name)
    number, more = b"J" + struct.pack("<i", count), b"\x8a\x08" + claimed.to_bytes(8, "little")
    assert number in pickled
    rewritten(whole, path, data_pkl=pickled.replace(number, more))
    whole.unlink()


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


def test_a_huge_declared_size_is_refused(read: Read, path: Path) -> None:
    tensor_pickle(path, 70_000, 10**12)
    refuse(read, path)


@pytest.mark.parametrize("bare", [False, True], ids=["zip", "legacy"])
def test_a_pickle_cannot_ask_for_memory(bare: bool, read: Read, path: Path) -> None:
    pickled = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (1 << 32).to_bytes(5, "little") + b"\x85R."
    path.write_bytes(pickled) if bare else archive(path, pickled)
    with within(mebibytes=160):
        refuse(read, path, "asks for a bytearray")


def test_lists_of_the_same_list_are_looked_at_once(path: Path) -> None:
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
    ("content", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n", "not a file of plain tensors"),
        (b"PK\x03\x04" + bytes(500), "not a file of plain tensors"),
        (bytes(2000), "not a file of plain tensors"),
    ],
    ids=["empty", "web page", "a zip's first bytes", "zeros"],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_what_is_no_file_of_tensors_is_refused(content: bytes, says: str, suffix: str, read: Read, path: Path) -> None:
    path = path.with_suffix(suffix)
    path.write_bytes(content)
    refuse(read, path, says)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, read: Read, path: Path) -> None:
    torch.save(WHOLE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refuse(read, path)


def test_a_flipped_bit_is_refused(read: Read, path: Path) -> None:
    torch.save(WHOLE, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    refuse(read, path, "a checksum is wrong")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_named_pipe_is_not_waited_for(suffix: str, read: Read, path: Path) -> None:
    path = path.with_suffix(suffix)
    os.mkfifo(path)
    refuse(read, path, "no regular file")


def test_a_device_is_not_read(read: Read) -> None:
    refuse(read, Path("/dev/zero"), "no regular file")


def test_a_link_to_itself_does_not_exist(read: Read, path: Path) -> None:
    path.symlink_to(path)
    refuse(read, path, "no such")


def test_what_is_plain_comes_back_as_it_was(path: Path) -> None:
    state = {"w": torch.randn(3, 4), "n": torch.tensor(5), "half": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"state": state, "epoch": 3, "names": ["a", None]}, path)
    found = read_tensors(path, "")
    assert found["epoch"] == 3
    assert found["names"] == ["a", None]
    save_file(state, path.with_suffix(".safetensors"))
    for read in (found["state"], read_tensors(path.with_suffix(".safetensors"), "")):
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in state)


def test_the_old_format_is_read_where_it_is_allowed(path: Path) -> None:
    torch.save({"w": torch.arange(4)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(path, "", legacy=True)["w"], torch.arange(4))
    with pytest.raises(InputError, match="not the zip file that torch writes"):
        read_tensors(path, "")
