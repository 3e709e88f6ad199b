"""Reading image files: every supported format becomes one 8-bit grey image, any other file an error message.

The first bytes of a file decide its format, not its name. The only exception are files without a DICOM preamble whose
name ends in `.dcm` or `.dicom`: they are read as DICOM.

| Content of the file                         | Result                                                             |
|---------------------------------------------|--------------------------------------------------------------------|
| 8-bit grey; 1-bit                           | unchanged; 0 and 255                                               |
| RGB, palette, CMYK (also Adobe's inverted)  | ITU-R 601 luma of the RGB image                                    |
| 16-bit colour, or 16-bit grey with alpha    | the high byte (Pillow reads no more), then as above                |
| alpha, transparent palette entry or colour  | composited over black                                              |
| 16-bit grey, 32-bit integers 0..65535       | 0..2^b-1 is scaled to 0..255, where b is the smallest of 8, 10,    |
|                                             | 12, 14, 16 that fits the maximum: a 16-bit file with a maximum of  |
|                                             | at most 255 contains 8-bit data                                    |
| other integers                              | error: convert to 8 or 16 bits                                     |
| float 0..1; float 0..65535                  | multiplied by 255; like 16-bit grey                                |
| other floats, NaN, infinity                 | error                                                              |
| TIFF with photometric MinIsWhite            | inverted, so that black is 0                                       |
| EXIF orientation                            | applied                                                            |
| animation, several pages                    | the first frame                                                    |
| DICOM                                       | modality LUT, VOI LUT, MONOCHROME1 inverted; see `dicom.py`        |
| over 50 megapixels or 512 MiB; JPEG of over | error before a pixel is decoded, so that reading a file never      |
| 64 scans; TIFF with huge tiles or tags      | takes more than 1 GB or a few seconds                              |
| shorter side below 32, aspect ratio over 5, | error                                                              |
| all pixels equal in the result ("blank")    |                                                                    |
| truncated; PNG with a wrong checksum        | error; a flipped bit in a JPEG is not noticed: it has no checksum  |
| empty, text, web page, git-lfs pointer      | error that names the content                                       |
| directory, FIFO, device                     | error without opening it                                           |
"""

import logging
import re
import stat
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from covid_cls.data import limits
from covid_cls.data.limits import BadImage

# Increase it when this module, dicom.py or limits.py return other grey values for any file, or reject other files.
READERS_VERSION = 1
HEADER_REASONS = {
    "lateral_view": "its DICOM header describes a lateral or oblique view (ViewPosition)",
    "not_a_chest_radiograph": "its DICOM header gives another modality or body part (Modality, BodyPartExamined)",
}
# How a file of each format begins; the keys are Pillow's names.
_SIGNATURES = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "BMP": re.compile(rb"BM"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
}
_DICOM_SUFFIXES = (".dcm", ".dicom")
# Bytes before the end of the magic number of a DICOM file, which is the last one among those of all formats.
_HEAD = 132
_BIT_DEPTHS = (8, 10, 12, 14, 16)
# Cameras write 64 kB of EXIF.
_MAX_EXIF_BYTES = 2**20
# 50 megapixels in tiles of 16 × 16 and 4 planes need 780,000 offsets.
_MAX_TAG_VALUES = 1_000_000
# Types of TIFF tags that Pillow keeps as bytes or text instead of a tuple.
_BYTE_TYPES = (1, 2, 7)
# Tags that point to further tags: EXIF, GPS, interoperability.
_POINTER_TAGS = (0x8769, 0x8825, 0xA005)
_TILE_WIDTH, _TILE_LENGTH = 322, 323

# The filters are set once for the process: `warnings.catch_warnings` around each read is not safe with threads. A
# damaged file is reported by BadImage alone.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image file as described in the table of this module.

    Returns:
        Grey values, uint8 (H, W); 0 = black (air), 255 = white.

    Raises:
        BadImage: The file is not a readable image, or its content cannot be a radiograph.
    """
    kind = _format(_read_head(path), path.suffix.lower())
    if kind == "DICOM":
        # Imported late: pydicom takes half a second, which a set of PNG files need not pay.
        from covid_cls.data.dicom import read_dicom

        grey = read_dicom(path)
    else:
        grey = _read_raster(path, kind)
    if grey.min() == grey.max():
        raise BadImage("blank: all pixels are equal")
    return grey


def read_header(path: Path, tags: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Read the header of a DICOM file that `read_image` accepts.

    Returns:
        The `HEADER_REASONS` why it is not a frontal chest radiograph, and the text of each of `tags` ("" if absent or
        damaged). Both are empty for a file of another format.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head[128:] != b"DICM" and path.suffix.lower() not in _DICOM_SUFFIXES:
        return [], {}
    from covid_cls.data.dicom import check_header

    return check_header(path, tags)


def grey_of(image: Image.Image) -> NDArray[np.uint8]:
    """Convert an image of any mode to uint8 grey (H, W) as in the table of this module. Raises BadImage."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return np.array(_opaque(image).convert("L"))
    values = np.array(image)
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 0
    grey = _to_8_bit(values)
    # Pillow inverts MinIsWhite in images of up to 8 bits only.
    inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    return np.subtract(255, grey, dtype=np.uint8) if inverted else grey


def _read_head(path: Path) -> bytes:
    """Return the first bytes of a file. Raises BadImage unless it is a regular file of acceptable size."""
    try:
        status = path.stat()
        # Opening a FIFO would wait for a writer.
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        if status.st_size > limits.MAX_BYTES:
            raise BadImage(limits.TOO_MANY_BYTES)
        # Files of size 0 are not opened either: reading some of those in /proc never ends.
        if not status.st_size:
            return b""
        with path.open("rb") as file:
            return file.read(_HEAD)
    # ValueError: the path contains a NUL.
    except (OSError, ValueError) as error:
        raise BadImage(_one_line(error)) from None


def _format(head: bytes, suffix: str) -> str:
    """Return Pillow's name of the format of a file, or "DICOM". Raises BadImage if it is neither."""
    if head[128:] == b"DICM":
        return "DICOM"
    for name, signature in _SIGNATURES.items():
        if signature.match(head):
            return name
    if not head:
        raise BadImage("empty file")
    if head.startswith(b"version https://git-lfs"):
        raise BadImage("git-lfs pointer: run git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise BadImage("a web page, not an image: download the file again")
    if head.isascii() and b"\0" not in head:
        raise BadImage("a text file, not an image")
    if suffix in _DICOM_SUFFIXES:
        return "DICOM"
    raise BadImage("no known image format: convert to PNG, JPEG, TIFF, BMP, WebP, GIF or DICOM")


def _read_raster(path: Path, kind: str) -> NDArray[np.uint8]:
    """Read the first frame of a file whose format Pillow calls `kind` as uint8 grey (H, W). Raises BadImage."""
    try:
        with path.open("rb") as file:
            if kind == "JPEG":
                _check_jpeg(file.read())
            if kind == "TIFF":
                _check_tags(file)
            with Image.open(file, formats=(kind,)) as image:
                limits.check_size(*image.size)
                # Decoding alone ignores wrong checksums of a PNG's pixels.
                image.verify()
            with Image.open(file, formats=(kind,)) as image:
                if isinstance(image, TiffImageFile):
                    _check_tiff(image, path)
                image.load()
                if len(image.info.get("exif") or b"") > _MAX_EXIF_BYTES:
                    raise BadImage("EXIF of more than a megabyte")
                ImageOps.exif_transpose(image, in_place=True)
                return grey_of(image)
    except BadImage:
        raise
    except UnidentifiedImageError:
        reason = f"damaged {kind} file, or a variant that is not supported: convert to 8- or 16-bit PNG"
        raise BadImage(reason) from None
    except Image.DecompressionBombError:
        raise BadImage(limits.TOO_MANY_PIXELS) from None
    # Pillow raises exceptions of a dozen types for damaged files.
    except Exception as error:
        raise BadImage(f"damaged or unsupported {kind} file: {_one_line(error)}") from None


def _check_jpeg(data: bytes, pictures: int = 1) -> None:
    """Raise BadImage for JPEG data that takes minutes to decode."""
    # Every scan visits all pixels, and for every EXIF block Pillow copies those before it.
    if data.count(b"\xff\xda") > limits.MAX_JPEG_SCANS * pictures:
        raise BadImage(limits.TOO_MANY_SCANS)
    if data.count(b"Exif\0\0") > limits.MAX_JPEG_SCANS:
        raise BadImage(f"a JPEG of more than {limits.MAX_JPEG_SCANS} EXIF blocks")


def _check_tags(file: BinaryIO) -> None:
    """Raise BadImage for a TIFF with a tag of more values than an image needs."""
    # Pillow makes a tuple of each tag. A tag of 200 million values in a sparse file took Pillow 13.0 half a minute and
    # 6 GB.
    head = file.read(16)
    order, big = {b"II": "<", b"MM": ">"}[head[:2]], b"+" in head[2:4]
    number, entry = struct.Struct(order + ("Q" if big else "H")), struct.Struct(order + ("HHQQ" if big else "HHII"))
    pending, seen = [struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])[0]], set[int]()
    while pending:
        place = pending.pop()
        if place in seen:
            continue
        seen.add(place)
        file.seek(place)
        counted = file.read(number.size)
        left = number.unpack(counted)[0] if len(counted) == number.size else 0
        while left and len(line := file.read(entry.size)) == entry.size:
            tag, kind, count, value = entry.unpack(line)
            if kind not in _BYTE_TYPES and count > _MAX_TAG_VALUES:
                raise BadImage("a TIFF with a tag of over a million numbers")
            if tag in _POINTER_TAGS:
                pending.append(value)
            left -= 1


def _check_tiff(image: TiffImageFile, path: Path) -> None:
    """Raise BadImage for a TIFF that takes too much memory, or that Pillow reads wrongly."""
    tags = image.tag_v2
    # libtiff decodes a complete tile at once.
    if tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0) > limits.MAX_PIXELS:
        raise BadImage(f"a TIFF with tiles of {limits.TOO_MANY_PIXELS}")
    if image.info.get("compression") in ("jpeg", "tiff_jpeg"):
        _check_jpeg(path.read_bytes(), len(image.tile))
    # Seen in Pillow 13.0: libtiff decompresses 32-bit and signed pixels to the machine's byte order, and Pillow then
    # swaps their bytes a second time.
    if tags.prefix == b"MM" and image.mode in ("I", "F") and image.tile[0].codec_name == "libtiff":
        raise BadImage("compressed big-endian TIFF of signed, 32-bit or float pixels: convert to 8- or 16-bit PNG")


def _opaque(image: Image.Image) -> Image.Image:
    """Return the image in mode 1, L or RGB, composited over black where it is transparent."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGB", image.size)
        black.paste(rgba, mask=rgba)
        return black
    return image if image.mode in ("1", "L") else image.convert("RGB")


def _to_8_bit(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale integers or floats to 0..255 as in the table of this module. Raises BadImage."""
    if not np.isfinite(values).all():
        raise BadImage("some pixels are NaN or infinite: convert to 8- or 16-bit grey")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        raise BadImage(f"pixels from {low:g} to {high:g} are outside 0..65535: convert to 8- or 16-bit grey")
    floats = values.dtype.kind == "f"
    top = 1 if floats and high <= 1 else next((1 << bits) - 1 for bits in _BIT_DEPTHS if high < 1 << bits)
    if floats:
        return np.asarray(np.rint(values * (255 / top)), np.uint8)
    # Looked up, because a float64 array of the size of the image would take up to 400 MB.
    table = np.rint(np.arange(top + 1) * (255 / top)).astype(np.uint8)
    return np.asarray(np.take(table, values))


def _one_line(error: Exception) -> str:
    """Return the message of an error on one line, without the path that an OSError adds."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())
