"""DICOM radiographs as 8-bit grey, in the order the standard sets: modality, VOI, photometric interpretation.

| Found in the file                        | What comes back                                                           |
|------------------------------------------|---------------------------------------------------------------------------|
| Modality LUT Sequence; rescale           | applied first                                                             |
| VOI LUT Sequence                         | applied; 0..2^bits-1 of its descriptor → 0..255                           |
| else Window Center and Width             | the first window, LINEAR, LINEAR_EXACT or SIGMOID; its own range → 0..255 |
| neither                                  | the image's minimum..maximum → 0..255                                     |
| Pixel Padding Value (and Range Limit)    | black, and left out of minimum and maximum                                |
| MONOCHROME1                              | turned round last                                                         |
| RGB, YBR, PALETTE COLOR                  | ITU-R 601 luma; of 16-bit colour the high byte                            |
| several frames, over 16 bits, no pixels  | refused                                                                   |
| a deflated file                          | refused: pydicom inflates it as a whole, 3 MB to 3 GB                     |
| compressed pixels of another size than   | refused before they are decoded                                           |
| the header's, or of too many JPEG scans  |                                                                           |

Only the tags in `_TAGS` are ever parsed, so no name, number or date of a patient can reach a message. What pydicom says
of a damaged file is not passed on either: it may quote values.
"""

import logging
import mmap
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_windowing
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    RLELossless,
)

from covid_cls.data.limits import MOST_SCANS, TOO_MANY_SCANS, BadImage, check_size

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT", "PALETTE COLOR")
_TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData",
]  # fmt: skip
_SYNTAX_WITHOUT_META: dict[tuple[bool | None, bool | None], UID] = {  # of (implicit VR, little endian), pydicom's guess
    (True, True): ImplicitVRLittleEndian,
    (False, True): ExplicitVRLittleEndian,
    (False, False): ExplicitVRBigEndian,
}
# SOF0 to SOF15 but for the tables between them, and SOF55 of JPEG-LS
_FRAME_HEADERS = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_Levels = NDArray[np.float64]  # (n,) the distinct values of an image, on their way from stored to shown
_EXTRA = 'pip install "covid_cls[dicom]"'

# Set once, here: `warnings.catch_warnings` around each read is not safe with threads, and pydicom logs every warning
# and every decoder's traceback besides.
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


def read_dicom(path: Path) -> NDArray[np.uint8]:
    """The one frame in `path` as uint8 grey (H, W); 0 = black, 255 = white.

    Raises BadImage if the file is damaged, or is not one radiograph that this module can show.
    """
    with _own_words("damaged DICOM file: its header cannot be read"):
        _refuse_deflated(path)
        image = dcmread(path, force=True, specific_tags=_TAGS)
        _check(image)
    pixels = _pixels(image)
    with _own_words("its rescale, window or look-up table is damaged or not supported"):
        return _grey(pixels, image) if image.PhotometricInterpretation in _GREY else _luma(pixels, image)


@contextmanager
def _own_words(reason: str) -> Iterator[None]:
    """Raises BadImage(reason) in place of whatever is raised inside, but for a BadImage."""
    try:
        yield
    except BadImage:
        raise
    except Exception:  # damaged values draw any type of exception from pydicom and its decoders
        raise BadImage(reason) from None


def _refuse_deflated(path: Path) -> None:
    """Raises BadImage if the file says anywhere that it is deflated; pydicom inflates it before it reads a tag."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(DeflatedExplicitVRLittleEndian.encode()) >= 0:
            raise BadImage("its transfer syntax (deflated) is not supported: save it without compression")


def _check(image: Dataset) -> None:
    """Raises BadImage if the header alone shows that `image` cannot be read; no pixel is decoded."""
    if "PixelData" not in image:
        raise BadImage("DICOM file without an image")
    frames = int(image.get("NumberOfFrames") or 1)
    if frames > 1:
        raise BadImage(f"DICOM file with {frames} frames: save the frame to be used as a file of its own")
    if image.PhotometricInterpretation not in _GREY + _COLOUR:
        raise BadImage(f"its photometric interpretation is none of {', '.join(_GREY + _COLOUR)}")
    if image.BitsAllocated > 16:
        raise BadImage(f"{image.BitsAllocated} bits per pixel: 16 at most can be read")
    check_size(image.Columns, image.Rows)


def _pixels(image: Dataset) -> NDArray[np.integer]:
    """The stored values: (H, W), or (H, W, 3) for colour other than palette. Raises BadImage."""
    with _own_words("damaged DICOM file: its transfer syntax cannot be read"):
        if "TransferSyntaxUID" not in image.file_meta:
            image.file_meta.TransferSyntaxUID = _SYNTAX_WITHOUT_META[image.original_encoding]
        syntax = UID(image.file_meta.TransferSyntaxUID)
        name = "unknown" if syntax.name == syntax else syntax.name
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise BadImage(f"its transfer syntax ({name}) is not supported") from None
    if not decoder.is_available:
        raise BadImage(f"its transfer syntax ({name}) needs a decoder: {_EXTRA}")
    reason = f"its pixel data ({name}) is damaged, truncated or of a kind that is not supported"
    if syntax.is_compressed and syntax != RLELossless and "pylibjpeg" not in decoder.available_plugins:
        reason += f"; {_EXTRA} brings another decoder"
    with _own_words(reason):
        if syntax.is_compressed:
            _check_compressed(image, syntax)
        return pixel_array(image)


def _check_compressed(image: Dataset, syntax: UID) -> None:
    """Raises BadImage or ValueError where decoding would take far more than the header's rows and columns.

    Decoders believe the compressed data: 48 × 64 pixels by the header took 6 GB and 20 s.
    """
    if syntax == RLELossless:
        raw = image.Rows * image.Columns * image.SamplesPerPixel * image.BitsAllocated // 8
        if len(image.PixelData) > 2 * raw + 2**16:  # a run of 2 bytes becomes up to 128
            raise BadImage("its compressed pixels are longer than they would be without compression")
        return
    frame = next(generate_frames(image.PixelData, number_of_frames=1))
    if frame.count(b"\xff\xda") > MOST_SCANS and syntax not in JPEG2000TransferSyntaxes:
        raise BadImage(TOO_MANY_SCANS)
    sizes = _jpeg_2000_sizes(frame) if syntax in JPEG2000TransferSyntaxes else [_jpeg_size(frame)]
    if any(size != (image.Columns, image.Rows) for size in sizes):
        raise ValueError("of another size than the header says")


def _jpeg_2000_sizes(frame: bytes) -> list[tuple[int, int]]:
    """(width, height) of every codestream in `frame`, whatever wraps it. ValueError where there is none."""
    starts = [found.end() for found in re.finditer(rb"\xff\x4f\xff\x51", frame)]
    right, bottom, left, top = zip(*(struct.unpack_from(">4I", frame, start + 4) for start in starts), strict=True)
    return [(r - x, b - y) for r, b, x, y in zip(right, bottom, left, top, strict=True)]


def _jpeg_size(frame: bytes) -> tuple[int, int]:
    """(width, height) in the first frame header of a JPEG or JPEG-LS. ValueError where it has none."""
    place = 2
    while frame[:2] == b"\xff\xd8" and frame[place : place + 1] == b"\xff":
        marker, length = struct.unpack_from(">BH", frame, place + 1)
        if marker in _FRAME_HEADERS:
            height, width = struct.unpack_from(">HH", frame, place + 5)
            return width, height
        place += 2 + length
    raise ValueError


def _grey(pixels: NDArray[np.integer], image: Dataset) -> NDArray[np.uint8]:
    """Stored values (H, W) shown as uint8 grey. Works on the distinct values: 65,536 at most, whatever the size."""
    lowest = int(pixels.min())
    offsets = pixels.astype(np.int32) - lowest
    present = np.flatnonzero(np.bincount(offsets.ravel()))
    present = present[~_is_padding(present + lowest, image)]
    table = np.zeros(int(offsets.max()) + 1, np.uint8)
    if present.size:
        stored = (present + lowest).astype(np.float64)
        with np.errstate(all="ignore"):  # exp overflows far below a sigmoid's centre; damaged numbers end in _voi
            shown = np.rint(255 * _voi(_modality(stored, image), image)).astype(np.uint8)
        table[present] = 255 - shown if image.PhotometricInterpretation == "MONOCHROME1" else shown
    return np.take(table, offsets)


def _is_padding(stored: NDArray[np.intp], image: Dataset) -> NDArray[np.bool_]:
    """Which of the stored values mean that the image ends there."""
    padding = image.get("PixelPaddingValue")
    if padding is None:
        return np.zeros(stored.shape, bool)
    limit = image.get("PixelPaddingRangeLimit")
    low, high = sorted((padding, padding if limit is None else limit))
    inside: NDArray[np.bool_] = (stored >= low) & (stored <= high)
    return inside


def _modality(stored: _Levels, image: Dataset) -> _Levels:
    """Stored values as the modality means them (optical density, exposure, ...)."""
    if image.get("ModalityLUTSequence"):
        return _looked_up(stored, image.ModalityLUTSequence[0], image)
    if image.get("RescaleSlope") is None or image.get("RescaleIntercept") is None:
        return stored
    return stored * float(image.RescaleSlope) + float(image.RescaleIntercept)


def _voi(values: _Levels, image: Dataset) -> _Levels:
    """Modality values as they are shown: 0..1, from the first VOI LUT, else the first window, else their range."""
    shown = values
    low, high = float(values.min()), float(values.max())
    if image.get("VOILUTSequence"):
        item = image.VOILUTSequence[0]
        shown = _looked_up(values, item, image)
        low, high = 0.0, float((1 << item.LUTDescriptor[2]) - 1)
    elif image.get("WindowCenter") is not None and image.get("WindowWidth") is not None:
        ends = apply_windowing(np.append(values, (-np.inf, np.inf)), image)
        shown, low, high = ends[:-2], float(ends[-2]), float(ends[-1])
    if not np.isfinite(high - low):
        raise BadImage("its rescale or window is not a number")
    # high < low where the rescale slope is negative: pydicom's windowing then runs downwards
    return ((shown - low) / ((high - low) or 1)).clip(0, 1)


def _looked_up(values: _Levels, item: Dataset, image: Dataset) -> _Levels:
    """The entries of the look-up table in `item` at `values`; those beyond its ends take its first or last entry.

    pydicom 3.0's apply_voi is up to 240 grey levels off where a table of 8-bit entries is longer than 256, and fails
    where such entries are packed, or where unsigned pixels meet a negative first value.
    """
    entries, first, _ = item.LUTDescriptor
    entries = entries % 65536 or 65536  # 0 stands for 65,536; a signed descriptor shows 40,000 as negative
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if image.original_encoding[1] else ">"
        data = np.frombuffer(data, f"{order}u2" if len(data) >= 2 * entries else "u1")
    index: NDArray[np.intp] = np.clip(np.rint(values) - first, 0, entries - 1).astype(np.intp)
    table: _Levels = np.asarray(data, np.float64)
    return np.take(table, index)


def _luma(pixels: NDArray[np.integer], image: Dataset) -> NDArray[np.uint8]:
    """Colour pixels as uint8 luma (H, W)."""
    bits = image.BitsStored
    if image.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, image)
        bits = pixels.dtype.itemsize * 8
    rgb = (pixels[..., :3] >> max(bits - 8, 0)).astype(np.uint8)
    return np.array(Image.fromarray(rgb).convert("L"))
