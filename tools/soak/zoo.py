"""Files that a folder of radiographs may contain: unusual ones with known pixels, damaged and malicious ones."""

import io
import os
import random
import socket
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    RLELossless,
)

from tools.soak.pictures import BAD, GOOD, NOISE, bare_png, chunk, encoded, tiff, turned
from tools.soak.radiographs import RAMP as RAMP12
from tools.soak.radiographs import RAMP8, radiograph, spread

SUFFIXES = (".png", ".jpg", ".tif", ".bmp", ".webp", ".gif", ".dat", "")
NAMES = (
    "é",
    "胸部 x線",
    "a, b",
    "-rf",
    'quo"te',
    " blank",
    "#1",
    "100%s",
    "${oc.env:HOME}",
    "$(touch marker)",
    "\u202egnp",
    "🫁",
    "n" * 240,
)


class Specimen(NamedTuple):
    """One file and the expected result of reading it.

    If `grey` and `refusal` are both given, either result is correct (a truncated file whose image is complete). If
    neither is, any result is correct except a crash, a hang or another exception (a flipped bit in a format without
    checksums).

    Attributes:
        name: Path below the folder of the specimens.
        grey: Expected pixels, if the file is to be read.
        tolerance: Largest accepted difference from `grey`, in grey levels.
        refusal: Part of the error message, if the file is to be refused.
    """

    name: str
    grey: np.ndarray | None = None
    tolerance: float = 0
    refusal: str | None = None

    @property
    def listable(self) -> bool:
        """Whether a manifest may list the file; odd files are refused when the manifest is read."""
        return not self.name.startswith("odd/")


def plant(folder: Path, count: int, seed: int) -> list[Specimen]:
    """Write `count` specimens below `folder`: odd ones first, then unusual and malicious ones, then random damage.

    If `count` is small, the unusual and malicious ones are a random selection.
    """
    rng = random.Random(seed)
    specimens = _odd(folder / "odd")
    known = [*_known(), *_bombs(), *_dicoms()]
    rng.shuffle(known)
    for number, (specimen, data) in enumerate(known[: (count - len(specimens)) * 3 // 4]):
        title = NAMES[number % len(NAMES)] if rng.random() < 0.3 else specimen.name
        specimens.append(_written(folder, specimen, data, f"{number:03d} {title}{rng.choice(SUFFIXES)}"))
    for number in range(count - len(specimens)):
        specimen, data = _damaged(number, rng)
        specimens.append(_written(folder, specimen, data, f"{specimen.name}-{number:03d}{rng.choice(SUFFIXES)}"))
    return specimens


def _written(folder: Path, specimen: Specimen, data: bytes, name: str) -> Specimen:
    (folder / name).write_bytes(data)
    return specimen._replace(name=name)


def _odd(folder: Path) -> list[Specimen]:
    """Create entries that are not regular files, that may not be read, or whose name does not fit into a table."""
    folder.mkdir(parents=True)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "fifo.png")
    for name, target in {
        "dangling.png": "gone",
        "loop.png": "loop.png",
        "to-fifo.png": "fifo.png",
        "zero.png": "/dev/zero",
        "stdin.png": "/dev/stdin",
        "memory.png": "/proc/self/mem",
        # A regular file, but reading it waits for the next kernel message.
        "kernel.png": "/proc/kmsg",
    }.items():
        (folder / name).symlink_to(target)
    # The path of a socket is limited to 108 bytes, hence a relative one.
    with socket.socket(socket.AF_UNIX) as listener, chdir(folder):
        listener.bind("socket.png")
    with (folder / "sparse.tif").open("wb") as file:
        file.write(_tag_bomb(200_000_000))
        file.truncate(2_000_000_000)
    unread = [path.name for path in folder.iterdir() if path.name != "folder.png"]
    specimens = [Specimen(f"odd/{name}", refusal="") for name in sorted(unread)]
    grey = GOOD["png"][1]
    for raw in (b"two\nlines.png", b"latin-\xe9.png", b"\x1b[2J.png"):
        (folder / os.fsdecode(raw)).write_bytes(GOOD["png"][0])
        specimens.append(Specimen(f"odd/{os.fsdecode(raw)}", grey))
    # Root may read the file in any case.
    if os.geteuid():
        (folder / "locked.png").write_bytes(GOOD["png"][0])
        (folder / "locked.png").chmod(0)
        specimens.append(Specimen("odd/locked.png", refusal="ermission"))
    return specimens


def _known() -> Iterator[tuple[Specimen, bytes]]:
    """Return the image files of pictures.py, and three EXIF orientations that change nothing."""
    for name, (data, grey, tolerance) in GOOD.items():
        yield Specimen(name, grey, tolerance), data
    for name, (data, reason) in BAD.items():
        yield Specimen(name, refusal=reason), data
    for orientation in (0, 9, 65535):
        yield (
            Specimen(f"orientation-{orientation}", GOOD["png"][1]),
            encoded(GOOD["png"][1], "PNG", exif=turned(orientation)),
        )


def scans(side: int, count: int) -> bytes:
    """Return a progressive JPEG with `count` superfluous scans of a few bytes each."""
    data = encoded(np.tile(GOOD["png"][1], (side // 64 + 1, side // 96 + 1))[:side, :side], "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def many_exif(count: int) -> bytes:
    """Return a JPEG with `count` EXIF blocks; Pillow copies all previous blocks for each one."""
    block = b"\xff\xe1" + struct.pack(">H", 8002) + b"Exif\0\0" + bytes(7994)
    data = GOOD["jpeg"][0]
    return data[:2] + block * count + data[2:]


def tiff_of(tags: dict[int, tuple[int, int]], body: bytes) -> bytes:
    """Return a little-endian TIFF of `body` and LONG tags, each (count, value)."""
    entries = b"".join(struct.pack("<HHII", tag, 4, *pair) for tag, pair in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


GREY_64 = {256: (1, 64), 257: (1, 64), 258: (1, 8), 259: (1, 8), 262: (1, 1), 277: (1, 1)}


def _tag_bomb(count: int) -> bytes:
    return tiff_of({**GREY_64, 259: (1, 1), 273: (count, 200), 278: (1, 64), 279: (1, 4096)}, bytes(4096))


def tile_bomb() -> bytes:
    """Return a TIFF of 64 × 64 pixels in one tile of nominally 1.9 GB; its data decompress to 200 MB."""
    body = _deflated(200_000_000)
    tile = {322: (1, 60_000), 323: (1, 32_000), 324: (1, 8), 325: (1, len(body))}
    return tiff_of({**GREY_64, **tile}, body)


def _deflated(length: int) -> bytes:
    """Return a zlib stream of `length` zeros, rounded down to ten million; fast, since one block is repeated."""
    times = length // 10_000_000
    adler = times * 10_000_000 % 65521 << 16 | 1
    return b"\x78\xda" + _repeated(bytes(10_000_000), times) + b"\3\0" + struct.pack(">I", adler)


def _repeated(block: bytes, times: int) -> bytes:
    """Return a raw deflate stream of `times` copies of `block`, without the end marker."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)) * times


def _bombs() -> Iterator[tuple[Specimen, bytes]]:
    """Return small files that need much memory or time to decode."""
    png, jpeg = GOOD["png"][0], bytearray(GOOD["jpeg"][0])
    place = jpeg.index(b"\xff\xc0")
    jpeg[place + 5 : place + 9] = struct.pack(">HH", 65500, 65500)
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + b"\xfe\x3f\0" * 2
    profile = chunk(b"iCCP", b"icc\0\0" + _deflated(2_000_000_000))
    texts = b"".join(chunk(b"zTXt", b"k%d\0\0" % k + zlib.compress(bytes(1_000_000))) for k in range(80))
    gif = bytearray(GOOD["gif"][0])
    gif[6:10] = b"\xff" * 4
    header = struct.pack("<IHHI", 1078, 0, 0, 1078) + struct.pack("<IiiHHIIiiII", 40, 60000, -60000, 1, 8, *[0] * 6)
    bombs: dict[str, tuple[bytes, str]] = {
        "jpeg-scans": (scans(640, 5000), "64 scans"),
        "jpeg-exif": (many_exif(200), "EXIF"),
        "jpeg-65500": (bytes(jpeg), "50 megapixels"),
        "tiff-tile": (tile_bomb(), "tiles"),
        "tiff-tags": (_tag_bomb(2_000_000) + bytes(8_000_000), "million numbers"),
        "tiff-100000": (tiff_of({**GREY_64, 256: (1, 100_000), 257: (1, 100_000)}, b""), ""),
        "webp-16383": (webp, "50 megapixels"),
        "gif-65535": (bytes(gif), "50 megapixels"),
        "bmp-60000": (b"BM" + header + bytes(1024), "50 megapixels"),
        "png-profile": (png[:33] + profile + png[33:], ""),
        "png-texts": (png[:33] + texts + png[33:], ""),
        "png-12000": (bare_png(12000, 12000, _deflated(140_000_000)), "50 megapixels"),
        "png-20000": (bare_png(20000, 20000, _deflated(400_000_000)), "50 megapixels"),
        "png-0": (bare_png(0, 64, zlib.compress(b"")), ""),
        "png-2147483647": (bare_png(2**31 - 1, 2**31 - 1, b""), "50 megapixels"),
        "png-exif": (png[:33] + chunk(b"eXIf", b"II*\0" + bytes(2**21)) + png[33:], "EXIF"),
    }
    for name, (data, reason) in bombs.items():
        yield Specimen(name, refusal=reason), data
    # It decompresses to more than its rows, and the rest must be ignored.
    more = bare_png(64, 64, _deflated(2_000_000_000))
    yield Specimen("png-more", refusal="blank"), more
    looped = bytearray(GOOD["tiff-8"][0])
    # The next page is the first one.
    looped[-4:] = looped[4:8]
    yield Specimen("tiff-loop", GOOD["tiff-8"][1]), bytes(looped)


def dicom(image: Dataset, syntax: UID | None = None, frame: bytes = b"") -> bytes:
    """Return the bytes of a DICOM file; with `syntax`, `frame` is its compressed image."""
    if syntax:
        image.file_meta.TransferSyntaxUID = syntax
    if frame:
        image.PixelData = encapsulate([frame])
        image["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def grown(frame: bytes, side: int) -> bytes:
    """Return a JPEG or JPEG 2000 codestream whose header declares side × side pixels."""
    data = bytearray(frame)
    if data[:4] == b"\xff\x4f\xff\x51":
        data[8:16] = data[24:32] = struct.pack(">II", side, side)
    else:
        place = data.index(b"\xff\xc0")
        data[place + 5 : place + 9] = struct.pack(">HH", side, side)
    return bytes(data)


JPEG = encoded(RAMP8, "JPEG", quality=95)
JPEG_2000 = encoded(RAMP8, "JPEG2000")
JPEG_2000 = JPEG_2000[JPEG_2000.index(b"\xff\x4f\xff\x51") :]


def deflate_bomb(megabytes: int) -> bytes:
    """Return a deflated DICOM file with `megabytes` MB of zeros after its image."""
    data = dicom(radiograph(), DeflatedExplicitVRLittleEndian)
    start = 144 + struct.unpack("<I", data[140:144])[0]
    zeros = struct.pack("<HH2sHI", 0x7FE1, 0x10, b"OB", 0, 10**6) + bytes(10**6)
    picture = _repeated(zlib.decompress(data[start:], -15), 1)
    return data[:start] + picture + _repeated(zeros, megabytes) + b"\3\0"


def _dicoms() -> Iterator[tuple[Specimen, bytes]]:
    shown = spread(RAMP12.astype(float), 0, 4095)
    eight = spread(RAMP8.astype(float), 0, 255)
    yield Specimen("dicom", shown), dicom(radiograph())
    yield Specimen("dicom-1", shown), dicom(radiograph(4095 - RAMP12, PhotometricInterpretation="MONOCHROME1"))
    yield Specimen("dicom-jpeg-2000", eight), dicom(radiograph(RAMP8, 8), JPEG2000Lossless, JPEG_2000)
    yield Specimen("dicom-jpeg", eight, 6), dicom(radiograph(RAMP8, 8), JPEGBaseline8Bit, JPEG)
    nested = b"\x40\x00\x75\x02SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    data = dicom(radiograph())
    start = 144 + struct.unpack("<I", data[140:144])[0]
    yield Specimen("dicom-deep", shown, refusal=""), data[:start] + nested * 20_000 + data[start:]
    yield Specimen("dicom-endless", refusal=""), data[:start] + b"\x09\0\x10\0UN\0\0\xff\xff\xff\xff" + data[start:]
    yield Specimen("dicom-bytes", refusal=""), data[:start] + b"\xff" * 500_000
    runs = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x05" * 1_000_000
    refused: dict[str, tuple[bytes, str]] = {
        "dicom-deflated": (deflate_bomb(2000), "deflated"),
        "dicom-jpeg-2000-bomb": (
            dicom(radiograph(RAMP8, 8), JPEG2000Lossless, grown(JPEG_2000, 40_000)),
            "pixel data",
        ),
        "dicom-jpeg-bomb": (dicom(radiograph(RAMP8, 8), JPEGBaseline8Bit, grown(JPEG, 65_500)), "pixel data"),
        "dicom-jpeg-12-bomb": (dicom(radiograph(RAMP8, 8), JPEGExtended12Bit, grown(JPEG, 65_500)), "pixel data"),
        "dicom-rle-bomb": (dicom(radiograph(RAMP8, 8), RLELossless, runs), "longer"),
        "dicom-scans": (
            dicom(radiograph(np.zeros((640, 640), np.uint8), 8), JPEGBaseline8Bit, scans(640, 5000)),
            "64 scans",
        ),
        "dicom-60000": (dicom(radiograph(Rows=60_000, Columns=60_000)), "50 megapixels"),
        "dicom-frames": (dicom(radiograph(NumberOfFrames=2**31 - 1)), "frames"),
        "dicom-samples": (dicom(radiograph(SamplesPerPixel=65535)), ""),
    }
    for name, (bad, reason) in refused.items():
        yield Specimen(name, refusal=reason), bad


DICOMS = {
    "dicom": (dicom(radiograph()), spread(RAMP12.astype(float), 0, 4095), 0.0),
    "jpeg": (dicom(radiograph(RAMP8, 8), JPEGBaseline8Bit, JPEG), spread(RAMP8.astype(float), 0, 255), 6.0),
    "jpeg-2000": (dicom(radiograph(RAMP8, 8), JPEG2000Lossless, JPEG_2000), spread(RAMP8.astype(float), 0, 255), 0.0),
}
PICTURES = {
    **DICOMS,
    **GOOD,
    # Noise has no long runs of equal values, so that each byte matters.
    "PNG": (encoded(NOISE, "PNG"), NOISE, 0.0),
    "GIF": (encoded(NOISE, "GIF"), NOISE, 0.0),
    "BMP": (encoded(NOISE, "BMP"), NOISE, 0.0),
    "TIFF": (tiff(NOISE, compressed=True), NOISE, 0.0),
    "WEBP": (encoded(np.dstack([NOISE] * 3), "WEBP", lossless=True), NOISE, 0.51),
    "JPEG": (encoded(NOISE, "JPEG", quality=100), NOISE, 8.0),
}


def _damaged(number: int, rng: random.Random) -> tuple[Specimen, bytes]:
    """Return a file with damage; the kinds of damage alternate.

    A damaged PNG and a truncated file must be read correctly or refused.
    """
    kinds = ("png-flip", "cut", "flip", "dicom-flip", "dicom-cut", "png-hole", "intact", "noise")
    kind = kinds[number % len(kinds)]
    groups: dict[str, Sequence[str]] = {
        "png": ["PNG", *(name for name in GOOD if name.startswith("png"))],
        "dicom": list(DICOMS),
    }
    data, grey, tolerance = PICTURES[rng.choice(groups.get(kind.partition("-")[0]) or list(PICTURES))]
    if kind == "intact":
        return Specimen(kind, grey, tolerance), data
    if kind == "noise":
        return Specimen(kind), data[: rng.randrange(4, 40)] + rng.randbytes(2000)
    if kind in ("flip", "dicom-flip"):
        return Specimen(kind), flipped(data, rng)
    change = {"png-flip": flipped, "png-hole": holed}.get(kind, cut)
    return Specimen(kind, grey, tolerance, refusal=""), change(data, rng)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Return a random part of `data` from its beginning."""
    return data[: rng.randrange(1, len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with one to three flipped bits."""
    changed = bytearray(data)
    for place in rng.sample(range(len(data) * 8), rng.choice((1, 1, 2, 3))):
        changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def holed(data: bytes, rng: random.Random) -> bytes:
    """Return `data` without some bytes in the middle."""
    start = rng.randrange(8, len(data) - 20)
    return data[:start] + data[start + rng.randrange(1, 16) :]
