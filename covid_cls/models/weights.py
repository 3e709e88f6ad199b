"""Files of tensors: reading them without executing code, and filling a network with pretrained weights."""

import logging
import mmap
import stat
import textwrap
import threading
import urllib.request
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision import models

from covid_cls.errors import InputError, listed
from covid_cls.io import file_sha256
from covid_cls.models.backbones import BACKBONES, Staged

log = logging.getLogger(__name__)

# A firewall that drops packets never answers, and a user should not wait for it.
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class WeightsReport:
    """Where the weights of a network came from.

    Attributes:
        asked: The setting `backbone.weights`.
        used: "imagenet", "none" or the path of a file.
        sha256: Of the file, if there is one.
        fresh: Backbone tensors that keep their random initialisation.
        pretrained_stages: Stages whose tensors all came from the file.
        note: One line about random initialisation that the user did not ask for.
    """

    asked: str
    used: str
    sha256: str | None = None
    fresh: tuple[str, ...] = ()
    pretrained_stages: tuple[str, ...] = ()
    note: str | None = None


class _RefusedError(Exception):
    """The reason why a file is refused."""


def read_tensors(path: Path, remedy: str, legacy: bool = False) -> Any:
    """Return the tensors, numbers, strings, lists and dicts in a file of safetensors or torch, on the CPU.

    Nothing in the file is executed or unpacked to disk, and its contents take at most a few times its size in memory.

    Args:
        path: A .safetensors file, or one written by `torch.save`.
        remedy: The last sentence of the error message.
        legacy: Also accept torch's format from before 1.6, which has no checksums.

    Raises:
        InputError: The file is damaged or of another kind.
    """
    try:
        _check_file(path)
        if path.suffix == ".safetensors":
            contents: Any = load_file(path)
        else:
            _check_archive(path, legacy)
            contents = torch.load(path, map_location="cpu", weights_only=True)
        _check_contents(contents, path.stat().st_size)
    # torch raises UnpicklingError, RuntimeError, EOFError, UnicodeDecodeError, KeyError and others for damaged files.
    except Exception as error:
        readable = isinstance(error, _RefusedError | SafetensorError)
        why = str(error).strip().partition("\n")[0] if readable else type(error).__name__
        raise InputError(
            f"{path}: not a file of plain tensors ({why}); pickled code is never executed. {remedy}"
        ) from error
    return contents


def load_pretrained(network: Staged, backbone: str, source: str, download: bool = True) -> WeightsReport:
    """Copy pretrained weights into the backbone of `network`; its head is not changed.

    Args:
        network: Frozen as it will be trained, because frozen stages need all of their weights.
        backbone: The network's name in `BACKBONES`.
        source: "none"; "imagenet", torchvision's IMAGENET1K_V1; "auto", the same or else random initialisation with a
            warning; or a .pth or .safetensors file in torchvision's layout. A tensor of a trainable stage that the file
            lacks keeps its random initialisation.
        download: Fetch ImageNet weights that are not cached.

    Raises:
        InputError: The weights are unavailable, do not fit, or lack a tensor of a frozen stage.
    """
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("head.")}
    if source == "none":
        return WeightsReport(source, "none", fresh=tuple(own))
    try:
        path = imagenet_file(backbone, download) if source in ("auto", "imagenet") else _local_file(source)
    except InputError as error:
        if source != "auto":
            raise
        unavailable = "ImageNet weights are unavailable: training started from RANDOM weights"
        log.warning("\n%s\n%s\n%s", "!" * 100, "\n".join(textwrap.wrap(f"{unavailable}. {error}", 100)), "!" * 100)
        return WeightsReport(source, "none", fresh=tuple(own), note=unavailable)
    found = _backbone_tensors(path, backbone, own)
    # Older files do not count batches, and nothing depends on that count.
    fresh = tuple(name for name in own if name not in found and not name.endswith("num_batches_tracked"))
    missing = [name for name in fresh if name.partition(".")[0] in network.frozen_names]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} tensors of the frozen stages are missing: {listed(missing, 4)}. A frozen stage "
            f"needs its weights: give a complete file, or freeze less (strategy=partial, strategy=full)"
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    incomplete = {name.partition(".")[0] for name in fresh}
    pretrained = tuple(stage for stage in network.stage_names[:-2] if stage not in incomplete)
    note = None
    if fresh:
        note = f"{len(fresh)} tensors are not in {path.name} and are randomly initialised: {listed(fresh, 3)}"
        log.warning(note)
    used = "imagenet" if source in ("auto", "imagenet") else source
    return WeightsReport(source, used, file_sha256(path), fresh, pretrained, note)


def imagenet_file(backbone: str, download: bool = True) -> Path:
    """Return the cached file of torchvision's IMAGENET1K_V1 weights, and download it before if necessary.

    Raises:
        InputError: The file is neither cached nor available within seconds, or its sha256 is wrong.
    """
    url: str = models.get_model_weights(backbone).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    # torchvision puts the first digits of the sha256 into the file's name.
    prefix = path.stem.rpartition("-")[2]
    if not path.is_file():
        remedy = f"Place {url} at {path}, or set backbone.weights to a local file or to none."
        if not download:
            raise InputError(f"{path} does not exist, and a sweep does not download. {remedy}")
        if not _reachable(url):
            raise InputError(f"{path} does not exist, and {url} is out of reach. {remedy}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{url}: the download failed ({error}). {remedy}") from error
    if not file_sha256(path).startswith(prefix):
        raise InputError(f"{path}: its sha256 does not begin with {prefix}; delete it and fetch {url} again")
    return path


def _reachable(url: str) -> bool:
    """Return whether the server answers within CONNECT_SECONDS."""
    answered = threading.Event()

    def ask() -> None:
        # The URL is torchvision's own https address. A malformed proxy setting is a ValueError, all else an OSError.
        with suppress(OSError, ValueError):
            request = urllib.request.Request(url, method="HEAD")  # noqa: S310
            with urllib.request.urlopen(request, timeout=CONNECT_SECONDS):  # noqa: S310
                answered.set()

    # In a thread, since the lookup of a host name ignores the time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return answered.is_set()


def _local_file(source: str) -> Path:
    if "://" in source:
        raise InputError(f"backbone.weights={source}: addresses are not loaded; download the file and give its path")
    path = Path(source)
    if not path.exists() or path.is_dir():
        raise InputError(
            f"backbone.weights={source}: no such file (searched in {Path.cwd()}). Correct the path, or give auto, "
            "imagenet or none"
        )
    return path


def _backbone_tensors(path: Path, backbone: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file in torchvision's layout under our names, after a comparison with `own`."""
    state = read_tensors(path, "Give a state dict (.pth) or .safetensors", legacy=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path}: not a dictionary of tensors; give a state dict in torchvision's layout")
    theirs = BACKBONES[backbone]
    ours = {theirs.torchvision_name(name): name for name in own}
    state = {name: tensor for name, tensor in state.items() if name.partition(".")[0] != theirs.classifier}
    found = {ours[name]: tensor for name, tensor in sorted(state.items()) if name in ours}
    first = next(iter(own))
    grey = own[first].shape
    # Summing the filters of the three colours is exact for grey images, see `grey_convolution`.
    if first in found and found[first].shape == (grey[0], 3, *grey[2:]):
        found[first] = found[first].sum(dim=1, keepdim=True)
    pairs = [(name, tensor, own[name]) for name, tensor in found.items()]
    faults = {
        # resnet34 holds every tensor of resnet18 and others between them, so names that we do not have are a fault.
        f"has tensors of another network than {backbone}": [name for name in state if name not in ours],
        f"has tensors that do not fit {backbone}": [
            f"{name} {tuple(tensor.shape)} {tensor.dtype} instead of {tuple(right.shape)} {right.dtype}"
            for name, tensor, right in pairs
            if tensor.shape != right.shape or _kind(tensor) != _kind(right)
        ],
        "has non-finite values": [name for name, tensor, _ in pairs if not torch.isfinite(tensor).all()],
    }
    if not found:
        raise InputError(f"{path}: no tensor has a name of torchvision's {backbone}; give a file of this network")
    for fault, names in faults.items():
        if names:
            raise InputError(f"{path}: {fault}: {listed(names, 5)}. Give an intact file of this network")
    return found


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _check_file(path: Path) -> None:
    status = path.stat()
    # Opening a named pipe would wait for a writer.
    if not stat.S_ISREG(status.st_mode):
        raise _RefusedError("no regular file")
    if status.st_size == 0:
        raise _RefusedError("empty")


def _check_archive(path: Path, legacy: bool) -> None:
    """Raise _RefusedError if torch would read beyond the file, or take memory that its size does not account for."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # torch itself distinguishes its formats by these four bytes.
        zipped = data[:4] == b"PK\x03\x04"
        # The only call that torch lets a pickle make whose memory is no tensor's: 60 bytes took 1.5 GB.
        if data.find(b"\nbytearray\n") >= 0:
            raise _RefusedError("asks for a bytearray")
    if not zipped:
        if legacy:
            return
        raise _RefusedError("not the zip file that torch writes")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # 262 kB of compressed members expanded to 268 MB.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise _RefusedError("has compressed members, which torch never writes")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise _RefusedError("declares more bytes than it has")
        names = [PurePosixPath(member.filename) for member in members]
        if any(name.is_absolute() or ".." in name.parts for name in names):
            raise _RefusedError("has paths that leave it")
        # torch writes checksums but does not compare them.
        if archive.testzip():
            raise _RefusedError("a checksum is wrong")


def _check_contents(contents: Any, size: int) -> None:
    """Raise _RefusedError for a tensor that is not dense, not on the CPU, or larger than the file's `size` in bytes."""
    waiting, seen = [contents], set[int]()
    while waiting:
        value = waiting.pop()
        # A list of ten times the same list of ten times ... takes a few bytes in a pickle: visit each object once.
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            dense = value.layout is torch.strided and not (value.is_quantized or value.is_nested)
            if not dense or value.device.type != "cpu":
                raise _RefusedError("has a tensor that is sparse, quantised, nested or without data")
            if value.numel() * value.element_size() > size:
                raise _RefusedError(f"declares a tensor of shape {tuple(value.shape)}, larger than itself")
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
