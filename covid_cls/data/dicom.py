"""DICOM files: grey values as a viewer shows them, and header tags.

Imported only when a DICOM file is read, because pydicom takes half a second to import.
"""

import difflib
import logging
import mmap
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread, uid
from pydicom.datadict import dictionary_VR, keyword_dict, tag_for_keyword
from pydicom.encaps import generate_frames
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_windowing
from pydicom.pixels.utils import pixel_array

from covid_cls.data.limits import MAX_JPEG_SCANS, TOO_MANY_SCANS, BadImage, check_size
from covid_cls.errors import InputError, listed

# Grey levels of an image, shape (n,), at any step from stored to displayed values.
_Levels = NDArray[np.float64]

_KIND_TAGS = ("Modality", "BodyPartExamined", "ViewPosition")
# SC, OT, DF and HC are scanned films and screenshots.
_RADIOGRAPHS = {"", "CR", "DX", "DR", "RG", "XR", "RF", "SC", "OT", "DF", "HC"}
_CHEST = ("CHEST", "THORA", "TORA", "LUNG", "PULM", "POUMON", "POITRINE", "PECHO", "BRUST")
_SIDEWAYS = {"LL", "RL", "LATERAL", "LAT", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "OBLIQUE", "SWIMMERS"}
_BINARY = {"SQ", "OB", "OD", "OF", "OL", "OV", "OW", "UN"}

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT", "PALETTE COLOR")
_PIXEL_TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData",
]  # fmt: skip
# By (implicit VR, little endian), which pydicom guesses from the first tags.
_SYNTAX_WITHOUT_META: dict[tuple[bool | None, bool | None], uid.UID] = {
    (True, True): uid.ImplicitVRLittleEndian,
    (False, True): uid.ExplicitVRLittleEndian,
    (False, False): uid.ExplicitVRBigEndian,
}
# SOF0 to SOF15, except the tables between them, and SOF55 of JPEG-LS.
_FRAME_HEADERS = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_EXTRA = 'pip install "covid_cls[dicom]"'

# Set once for the process: `warnings.catch_warnings` around each read is not safe with threads, and pydicom also logs
# every warning and the traceback of every decoder. Both may contain patient data.
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


def check_tags(names: Sequence[str]) -> None:
    """Check names of tags that are to be columns of a table.

    Raises:
        InputError: A name is not a keyword of the DICOM dictionary, or its value is not text.
    """
    for name in names:
        tag = tag_for_keyword(name)
        if tag is None:
            near = difflib.get_close_matches(name, keyword_dict, 3)
            hint = f"; did you mean {listed(near)}?" if near else ""
            raise InputError(f"dicom_tags: {name} is not a DICOM keyword such as PatientID or StudyDate{hint}")
        if _BINARY & set(dictionary_VR(tag).split(" or ")):
            raise InputError(f"dicom_tags: the value of {name} is not text; leave it out")


def check_header(path: Path, tags: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Find out from the header whether a readable DICOM file is a frontal chest radiograph.

    Returns:
        The `HEADER_REASONS` why it is not, and the text of each of `tags`: "" if it is absent or damaged. Several
        values of a tag are joined by a backslash, as in DICOM.
    """
    values = dict.fromkeys((*_KIND_TAGS, *tags), "")
    # Damaged values make pydicom raise exceptions of any type.
    with suppress(Exception):
        header = dcmread(path, force=True, stop_before_pixels=True, specific_tags=list(values))
        for name in values:
            with suppress(Exception):
                value = header.get(name)
                values[name] = "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")
    modality, part, view = (values[name].strip().upper() for name in _KIND_TAGS)
    reasons = []
    # A decubitus view, of a patient who lies on one side, is frontal.
    if set(view.replace("_", " ").split()) & _SIDEWAYS and "DECUB" not in view:
        reasons.append("lateral_view")
    # Body parts in other scripts than Latin are accepted.
    elsewhere = part.isascii() and part and not any(word in part for word in _CHEST)
    if modality not in _RADIOGRAPHS or elsewhere:
        reasons.append("not_a_chest_radiograph")
    return reasons, {name: values[name] for name in tags}


def read_dicom(path: Path) -> NDArray[np.uint8]:
    """Read the only frame of a DICOM file.

    Returns:
        Grey values, uint8 (H, W); 0 = black, 255 = white.

    Raises:
        BadImage: The file is damaged, or not a single radiograph of a supported kind.
    """
    with _any_error_is("damaged DICOM file: its header cannot be read"):
        _reject_deflated(path)
        image = dcmread(path, force=True, specific_tags=_PIXEL_TAGS)
        _check(image)
    pixels = _decode(image)
    with _any_error_is("its rescale, window or look-up table is damaged or not supported"):
        return _grey(pixels, image) if image.PhotometricInterpretation in _GREY else _luma(pixels, image)


@contextmanager
def _any_error_is(reason: str) -> Iterator[None]:
    """Replace every error in the block by BadImage(reason), except a BadImage.

    Damaged values make pydicom and its decoders raise exceptions of any type, whose text may contain patient data.
    """
    try:
        yield
    except BadImage:
        raise
    except Exception:
        raise BadImage(reason) from None


def _reject_deflated(path: Path) -> None:
    # pydicom decompresses such a file before it reads a tag, so the name of the syntax is searched in the bytes.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(uid.DeflatedExplicitVRLittleEndian.encode()) >= 0:
            raise BadImage("its transfer syntax (deflated) is not supported: save it without compression")


def _check(image: Dataset) -> None:
    """Raise BadImage if the header shows, without decoding a pixel, that the image cannot be read."""
    if "PixelData" not in image:
        raise BadImage("DICOM file without an image")
    frames = int(image.get("NumberOfFrames") or 1)
    if frames > 1:
        raise BadImage(f"DICOM file with {frames} frames: save one frame as a separate file")
    if image.PhotometricInterpretation not in _GREY + _COLOUR:
        raise BadImage(f"its photometric interpretation is not one of {', '.join(_GREY + _COLOUR)}")
    if image.BitsAllocated > 16:
        raise BadImage(f"{image.BitsAllocated} bits per pixel: at most 16 are supported")
    check_size(image.Columns, image.Rows)


def _decode(image: Dataset) -> NDArray[np.integer]:
    """Return the stored values: (H, W), or (H, W, 3) for colour other than palette. Raises BadImage."""
    with _any_error_is("damaged DICOM file: its transfer syntax cannot be read"):
        if "TransferSyntaxUID" not in image.file_meta:
            image.file_meta.TransferSyntaxUID = _SYNTAX_WITHOUT_META[image.original_encoding]
        syntax = uid.UID(image.file_meta.TransferSyntaxUID)
        name = "unknown" if syntax.name == syntax else syntax.name
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise BadImage(f"its transfer syntax ({name}) is not supported") from None
    if not decoder.is_available:
        raise BadImage(f"its transfer syntax ({name}) needs a decoder: {_EXTRA}")
    reason = f"its pixel data ({name}) is damaged, truncated or not supported"
    if syntax.is_compressed and syntax != uid.RLELossless and "pylibjpeg" not in decoder.available_plugins:
        reason += f"; another decoder may read it: {_EXTRA}"
    with _any_error_is(reason):
        if syntax.is_compressed:
            _check_compressed(image, syntax)
        return pixel_array(image)


def _check_compressed(image: Dataset, syntax: uid.UID) -> None:
    """Raise BadImage or ValueError if the compressed data describe a much larger image than the header."""
    # Decoders believe the compressed data: an image of 48 × 64 pixels by its header took 6 GB and 20 s.
    if syntax == uid.RLELossless:
        raw = image.Rows * image.Columns * image.SamplesPerPixel * image.BitsAllocated // 8
        # A run of 2 bytes becomes up to 128 bytes.
        if len(image.PixelData) > 2 * raw + 2**16:
            raise BadImage("its compressed pixels are longer than they would be without compression")
        return
    frame = next(generate_frames(image.PixelData, number_of_frames=1))
    if frame.count(b"\xff\xda") > MAX_JPEG_SCANS and syntax not in uid.JPEG2000TransferSyntaxes:
        raise BadImage(TOO_MANY_SCANS)
    sizes = _jpeg_2000_sizes(frame) if syntax in uid.JPEG2000TransferSyntaxes else [_jpeg_size(frame)]
    if any(size != (image.Columns, image.Rows) for size in sizes):
        raise ValueError("the frame has another size than the header")


def _jpeg_2000_sizes(frame: bytes) -> list[tuple[int, int]]:
    """Return (width, height) of every codestream in a frame. Raises ValueError if there is none."""
    starts = [found.end() for found in re.finditer(rb"\xff\x4f\xff\x51", frame)]
    right, bottom, left, top = zip(*(struct.unpack_from(">4I", frame, start + 4) for start in starts), strict=True)
    return [(r - x, b - y) for r, b, x, y in zip(right, bottom, left, top, strict=True)]


def _jpeg_size(frame: bytes) -> tuple[int, int]:
    """Return (width, height) in the first frame header of a JPEG or JPEG-LS. Raises ValueError if it has none."""
    place = 2
    while frame[:2] == b"\xff\xd8" and frame[place : place + 1] == b"\xff":
        marker, length = struct.unpack_from(">BH", frame, place + 1)
        if marker in _FRAME_HEADERS:
            height, width = struct.unpack_from(">HH", frame, place + 5)
            return width, height
        place += 2 + length
    raise ValueError("no frame header")


def _grey(pixels: NDArray[np.integer], image: Dataset) -> NDArray[np.uint8]:
    """Convert stored values (H, W) to displayed ones, uint8."""
    # Computed for the distinct values and then looked up: they are at most 65,536, however large the image is.
    lowest = int(pixels.min())
    offsets = pixels.astype(np.int32) - lowest
    present = np.flatnonzero(np.bincount(offsets.ravel()))
    padding = image.get("PixelPaddingValue")
    if padding is not None:
        limit = image.get("PixelPaddingRangeLimit")
        low, high = sorted((padding, padding if limit is None else limit))
        present = present[(present + lowest < low) | (present + lowest > high)]
    table = np.zeros(int(offsets.max()) + 1, np.uint8)
    if present.size:
        stored = (present + lowest).astype(np.float64)
        # exp overflows far below the centre of a sigmoid; damaged numbers are found in `_voi`.
        with np.errstate(all="ignore"):
            shown = np.rint(255 * _voi(_modality(stored, image), image)).astype(np.uint8)
        table[present] = 255 - shown if image.PhotometricInterpretation == "MONOCHROME1" else shown
    return np.take(table, offsets)


def _modality(stored: _Levels, image: Dataset) -> _Levels:
    """Convert stored values to those of the modality (optical density, exposure, ...)."""
    if image.get("ModalityLUTSequence"):
        return _looked_up(stored, image.ModalityLUTSequence[0], image)
    if image.get("RescaleSlope") is None or image.get("RescaleIntercept") is None:
        return stored
    return stored * float(image.RescaleSlope) + float(image.RescaleIntercept)


def _voi(values: _Levels, image: Dataset) -> _Levels:
    """Scale values of the modality to 0..1 by the first VOI LUT, else by the first window, else by their range."""
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
    # With a negative rescale slope pydicom's windowing decreases, so that high < low.
    return ((shown - low) / ((high - low) or 1)).clip(0, 1)


def _looked_up(values: _Levels, item: Dataset, image: Dataset) -> _Levels:
    """Return the entries of a look-up table at `values`; beyond its ends the first or last entry."""
    # Not pydicom 3.0's apply_voi: it is up to 240 grey levels off if a table of 8-bit entries is longer than 256, and
    # fails if such entries are packed or if unsigned pixels meet a negative first value.
    entries, first, _ = item.LUTDescriptor
    # 0 means 65,536, and a signed descriptor contains 40,000 as a negative number.
    entries = entries % 65536 or 65536
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if image.original_encoding[1] else ">"
        data = np.frombuffer(data, f"{order}u2" if len(data) >= 2 * entries else "u1")
    index: NDArray[np.intp] = np.clip(np.rint(values) - first, 0, entries - 1).astype(np.intp)
    table: _Levels = np.asarray(data, np.float64)
    return np.take(table, index)


def _luma(pixels: NDArray[np.integer], image: Dataset) -> NDArray[np.uint8]:
    """Convert colour pixels to uint8 luma (H, W)."""
    bits = image.BitsStored
    if image.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, image)
        bits = pixels.dtype.itemsize * 8
    rgb = (pixels[..., :3] >> max(bits - 8, 0)).astype(np.uint8)
    return np.array(Image.fromarray(rgb).convert("L"))
