"""The one place that reads a file of torch: what is in it, without running any of it."""

import mmap
import stat
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from covid_cls.errors import InputError


class _FaultError(Exception):
    """Why a file is refused, in words."""


def read_tensors(path: Path, remedy: str, legacy: bool = False) -> Any:
    """The tensors, numbers, texts, lists and dictionaries in a .safetensors file or one that torch saved, on the CPU.

    Nothing in the file is executed or unpacked to disk, and what it holds takes no more memory than a few times its
    own size. legacy: also take torch's format from before 1.6, which has no checksums. InputError, one line that ends
    in `remedy`, where the file is anything else or damaged.
    """
    try:
        _check_file(path)
        if path.suffix == ".safetensors":
            contents: Any = load_file(path)
        else:
            _check_archive(path, legacy)
            contents = torch.load(path, map_location="cpu", weights_only=True)
        _check_contents(contents, path.stat().st_size)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, UnicodeDecodeError, KeyError …
        worded = isinstance(error, _FaultError | SafetensorError)
        why = str(error).strip().partition("\n")[0] if worded else type(error).__name__
        raise InputError(
            f"{path}: not a file of plain tensors ({why}); pickled code is never executed. {remedy}"
        ) from error
    return contents


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for somebody who writes
        raise _FaultError("no regular file")
    if status.st_size == 0:
        raise _FaultError("empty")


def _check_archive(path: Path, legacy: bool) -> None:
    """_FaultError where torch would read beyond the file, or take memory that its bytes do not account for."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        zipped = whole[:4] == b"PK\x03\x04"  # torch tells by the same four bytes
        # The only call that torch lets a pickle make whose memory is no tensor's: 60 bytes took 1.5 GB.
        if whole.find(b"\nbytearray\n") >= 0:
            raise _FaultError("asks for a bytearray")
    if not zipped:
        if legacy:
            return
        raise _FaultError("not the zip file that torch writes")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):  # 262 kB of it expanded to 268 MB
            raise _FaultError("holds compressed members, which torch never writes")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise _FaultError("declares more bytes than it has")
        names = [PurePosixPath(member.filename) for member in members]
        if any(name.is_absolute() or ".." in name.parts for name in names):
            raise _FaultError("holds paths that leave it")
        damaged = archive.testzip()  # torch.load does not look at the checksums that it wrote
    if damaged:
        raise _FaultError("a checksum is wrong")


def _check_contents(contents: Any, size: int) -> None:
    """_FaultError for a tensor that is not dense, on the CPU, and within the file's `size` in bytes."""
    waiting, seen = [contents], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:  # a list of ten times the same list of ten times … is a few bytes in a pickle
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            dense = value.layout is torch.strided and not (value.is_quantized or value.is_nested)
            if not dense or value.device.type != "cpu":
                raise _FaultError("holds a tensor that is sparse, quantised, nested or without data")
            if value.numel() * value.element_size() > size:
                raise _FaultError(f"declares a tensor of shape {tuple(value.shape)}, larger than itself")
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
