"""Where a backbone's first weights come from, and proof that they did."""

import logging
import textwrap
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision import models

from covid_cls.errors import InputError, listed
from covid_cls.models.backbones import Staged, family_of
from covid_cls.models.files import read_tensors
from covid_cls.records import file_sha256

log = logging.getLogger(__name__)
PROBE_SECONDS = 5.0  # a machine behind a firewall that drops packets answers neither yes nor no


@dataclass(frozen=True)
class WeightsReport:
    """Where the weights came from. asked: the user's word; used: "imagenet", "none" or a file's path.

    sha256: of the file, or None. fresh: backbone tensors that kept their random start. pretrained_stages: stages all
    of whose tensors came from the file. note: one line for a reader where `used` is not what was asked for.
    """

    asked: str
    used: str
    sha256: str | None = None
    fresh: tuple[str, ...] = ()
    pretrained_stages: tuple[str, ...] = ()
    note: str | None = None


def load_pretrained(network: Staged, backbone: str, source: str, download: bool = True) -> WeightsReport:
    """Fill `network`'s backbone from `source` and say what came of it; the head stays as it is.

    source: "none"; "imagenet" (torchvision's IMAGENET1K_V1, or InputError naming the file to place); "auto" (ImageNet
    if cached or reachable, else random with a loud warning); or a .pth or .safetensors file in torchvision's layout.
    `network` must be frozen as it will be trained: a tensor of its frozen stages that the file lacks is an
    InputError, one of its trainable stages starts fresh. download=False uses what is on disk.
    """
    if source == "none":
        return WeightsReport(source, "none", fresh=tuple(_backbone_tensors(network)))
    if source in ("auto", "imagenet"):
        try:
            path = imagenet_file(backbone, download)
        except InputError as error:
            if source == "imagenet":
                raise
            note = "ImageNet weights were not to be had: training started from RANDOM weights"
            log.warning("\n%s\n%s\n%s", "!" * 100, "\n".join(textwrap.wrap(f"{note}. {error}", 100)), "!" * 100)
            return WeightsReport(source, "none", fresh=tuple(_backbone_tensors(network)), note=note)
        return _fill(network, backbone, path, source, used="imagenet")
    return _fill(network, backbone, _existing(source), source, used=source)


def imagenet_file(backbone: str, download: bool = True) -> Path:
    """The cached file of torchvision's IMAGENET1K_V1 weights, fetched if need be.

    InputError naming the file to place where it is neither cached nor reachable within seconds, or where its sha256
    does not begin with the digits in its name.
    """
    url: str = models.get_model_weights(backbone).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    prefix = path.stem.rpartition("-")[2]
    if not path.is_file():
        remedy = f"Place {url} at {path}, or set backbone.weights to a local file or to none."
        if not download:
            raise InputError(f"{path} is not there and a sweep does not download. {remedy}")
        if not _reachable(url):
            raise InputError(f"{path} is not there and {url} is out of reach. {remedy}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{url}: the download failed ({error}). {remedy}") from error
    if not file_sha256(path).startswith(prefix):
        raise InputError(f"{path}: its sha256 does not begin with {prefix}; delete it and fetch {url} again")
    return path


def _existing(source: str) -> Path:
    if "://" in source:
        raise InputError(f"backbone.weights={source}: addresses are not loaded; download the file and give its path")
    path = Path(source)
    if not path.exists() or path.is_dir():
        raise InputError(f"backbone.weights={source}: no such file (looked in {Path.cwd()}); or auto, imagenet, none")
    return path


def _read(path: Path) -> dict[str, Tensor]:
    state = read_tensors(path, "Give a state dict (.pth) or .safetensors", legacy=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path}: expected a dictionary of tensors in torchvision's layout")
    return state


def _fill(network: Staged, backbone: str, path: Path, asked: str, used: str) -> WeightsReport:
    own, family = _backbone_tensors(network), family_of(backbone)
    theirs = {family.torchvision_name(name): name for name in own}
    state = {name: tensor for name, tensor in _read(path).items() if name.partition(".")[0] != family.classifier}
    found = {theirs[name]: tensor for name, tensor in state.items() if name in theirs}
    first = next(iter(own))
    grey = own[first].shape
    if first in found and found[first].shape == (grey[0], 3, *grey[2:]):
        found[first] = found[first].sum(dim=1, keepdim=True)  # exact for grey: see build_network
    foreign = [name for name in state if name not in theirs]
    if found and foreign:  # resnet34 holds every tensor of resnet18, and more between them
        raise InputError(f"{path}: is another network's than {backbone}, which has no {listed(foreign, 3)}")
    # Older files count no batches, and the count decides nothing.
    fresh = tuple(name for name in own if name not in found and not name.endswith("num_batches_tracked"))
    _check(network, backbone, path, own, found, fresh)
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    touched = {name.partition(".")[0] for name in fresh}
    stages = tuple(s for s in network.stage_names if s not in touched | {"pool", "head"})
    note = f"{len(fresh)} tensors are not in {path.name} and start at random: {listed(fresh, 3)}" if fresh else None
    if note:
        log.warning(note)
    return WeightsReport(asked, used, file_sha256(path), fresh, stages, note)


def _check(
    network: Staged,
    backbone: str,
    path: Path,
    own: dict[str, Tensor],
    found: dict[str, Tensor],
    fresh: tuple[str, ...],
) -> None:
    """InputError where the tensors `found` in the file, or its want of the `fresh` ones, do not do for `network`."""
    if not found:
        raise InputError(f"{path}: holds no tensor of {backbone} under torchvision's names; is it another network's?")
    wrong = [
        f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}"
        for name, tensor in sorted(found.items())
        if tensor.shape != own[name].shape
    ]
    if wrong:
        raise InputError(f"{path}: shapes are not those of {backbone}: {listed(wrong, 5)}")
    kinds = [f"{name} {t.dtype}" for name, t in sorted(found.items()) if _kind(t) != _kind(own[name])]
    if kinds:
        raise InputError(f"{path}: holds numbers of another kind than {backbone}'s: {listed(kinds, 5)}")
    broken = [name for name, tensor in sorted(found.items()) if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(f"{path}: holds non-finite values in {listed(broken, 5)}")
    missing = [name for name in fresh if name.partition(".")[0] in network.frozen_names]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} tensors of the frozen stages are missing: {listed(missing, 4)}. A frozen stage "
            f"needs its weights: take a complete file, or freeze less (strategy=partial, strategy=full)"
        )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _backbone_tensors(network: Staged) -> dict[str, Tensor]:
    return {name: t for name, t in network.state_dict().items() if not name.startswith("head.")}


def _reachable(url: str) -> bool:
    """Whether the server answers within PROBE_SECONDS; in a thread, since looking a name up heeds no time limit."""
    answer: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")  # noqa: S310  # torchvision's own https address
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):  # noqa: S310
                answer.append(True)
        except (urllib.error.URLError, OSError, ValueError):
            answer.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answer == [True]
