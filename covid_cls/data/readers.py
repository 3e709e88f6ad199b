"""One file in, one 8-bit grey image out, or one sentence that says why not.

A file is known by its first bytes, never by its name; only a `.dcm` or `.dicom` file that has no preamble is believed.

| Found in the file                          | What comes back                                                         |
|--------------------------------------------|-------------------------------------------------------------------------|
| 8-bit grey; 1-bit                          | unchanged; 0 and 255                                                    |
| RGB, palette, CMYK (Adobe-inverted too)    | ITU-R 601 luma of the RGB picture                                       |
| 16-bit colour, or 16-bit grey with alpha   | its high byte (Pillow reads no more), then as above                     |
| alpha, transparent palette entry or colour | laid over black                                                         |
| 16-bit grey, 32-bit integers 0..65535      | 0..2^b-1 → 0..255, b the least of 8, 10, 12, 14, 16 that holds the      |
|                                            | maximum: a 16-bit file whose maximum is 255 or less is 8-bit data       |
| other integers                             | refused: convert to 8 or 16 bits                                        |
| float 0..1; float 0..65535                 | × 255; as 16-bit grey                                                   |
| other floats, NaN, infinity                | refused                                                                 |
| TIFF with photometric MinIsWhite           | turned round: black is 0                                                |
| EXIF orientation                           | applied                                                                 |
| animation, pages                           | the first frame                                                         |
| DICOM                                      | modality → VOI → MONOCHROME1 turned round; see `dicom.py`               |
| over 50 megapixels or 512 MiB; JPEG of     | refused before a pixel is decoded: nothing that is read takes more than |
| over 64 scans; TIFF of absurd tiles or     | 1 GB or a few seconds                                                   |
| tags                                       |                                                                         |
| shorter side < 32, sides beyond 5:1, blank | refused (blank: all pixels equal in the result)                         |
| truncated; PNG with a wrong checksum       | refused; a flipped bit in a JPEG goes unseen, as JPEG has no checksum   |
| empty, text, web page, git-lfs pointer     | refused, and named                                                      |
| directory, FIFO, device                    | refused unopened                                                        |
"""

import logging
import re
import stat
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from covid_cls.data.limits import (
    MOST_BYTES,
    MOST_PIXELS,
    MOST_SCANS,
    TOO_MANY_BYTES,
    TOO_MANY_PIXELS,
    TOO_MANY_SCANS,
    BadImage,
    check_size,
)

_BIT_DEPTHS = (8, 10, 12, 14, 16)
_MOST_EXIF = 2**20  # bytes; cameras write 64 kB
_MOST_NUMBERS = 1_000_000  # in a tag of a TIFF; 50 megapixels in tiles of 16 × 16 and 4 planes have 780,000 offsets
_BYTES = (1, 2, 7)  # types of TIFF's tags that Pillow keeps as they are: bytes, text, undefined
_POINTERS = (0x8769, 0x8825, 0xA005)  # tags that lead to further tags: EXIF, GPS, interoperability
_SIGNATURES = {  # Pillow's name of the format: how such a file begins
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "BMP": re.compile(rb"BM"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
}

# A damaged file is reported by BadImage alone. Filters are set once, here: `warnings.catch_warnings` around each read
# is not safe with threads, and `Image.MAX_IMAGE_PIXELS` belongs to the whole process.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image in `path` as uint8 grey (H, W); 0 = black (air), 255 = white.

    The table at the top of this module says how each kind of file is read. Raises BadImage for every other.
    """
    kind = _kind(_head(path), path.suffix.lower())
    if kind == "DICOM":
        from covid_cls.data.dicom import read_dicom  # pydicom is not imported for a set of PNG files

        grey = read_dicom(path)
    else:
        grey = _read_raster(path, kind)
    if grey.min() == grey.max():
        raise BadImage("blank: all pixels are equal")
    return grey


def _head(path: Path) -> bytes:
    """The first bytes of `path`, enough to know its kind. Raises BadImage unless it is a regular file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for a writer
            raise BadImage("not a regular file")
        if status.st_size > MOST_BYTES:
            raise BadImage(TOO_MANY_BYTES)
        if not status.st_size:  # some of /proc's files wait for ever, too
            return b""
        with path.open("rb") as file:
            return file.read(132)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadImage(_one_line(error)) from None


def _kind(head: bytes, suffix: str) -> str:
    """Pillow's name of the file's format, or "DICOM". Raises BadImage if it is neither."""
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
    if suffix in (".dcm", ".dicom"):
        return "DICOM"
    raise BadImage("no known image format; PNG, JPEG, TIFF, BMP, WebP, GIF and DICOM are read")


def _read_raster(path: Path, kind: str) -> NDArray[np.uint8]:
    """The first frame of a file that Pillow reads as `kind`, as uint8 grey (H, W). Raises BadImage."""
    try:
        with path.open("rb") as file:
            if kind == "JPEG":
                _check_jpeg(file.read())
            if kind == "TIFF":
                _check_tags(file)
            with Image.open(file, formats=(kind,)) as image:
                check_size(*image.size)
                image.verify()  # PNG checksums: decoding alone passes over those of the pixel data
            with Image.open(file, formats=(kind,)) as image:
                if isinstance(image, TiffImageFile):
                    _check_tiff(image, path)
                image.load()
                if len(image.info.get("exif") or b"") > _MOST_EXIF:
                    raise BadImage("EXIF of more than a megabyte")
                ImageOps.exif_transpose(image, in_place=True)
                return grey_of(image)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(
            f"damaged {kind} file, or a variant that is not supported: convert to 8- or 16-bit PNG"
        ) from None
    except Image.DecompressionBombError:
        raise BadImage(TOO_MANY_PIXELS) from None
    except Exception as error:  # damaged files draw a dozen types of exception from Pillow
        raise BadImage(f"damaged or unsupported {kind} file: {_one_line(error)}") from None


def _check_jpeg(data: bytes, pictures: int = 1) -> None:
    """Raises BadImage for JPEG data that takes minutes: a scan visits every pixel, an EXIF block copies the last."""
    if data.count(b"\xff\xda") > MOST_SCANS * pictures:
        raise BadImage(TOO_MANY_SCANS)
    if data.count(b"Exif\0\0") > MOST_SCANS:
        raise BadImage("a JPEG of many EXIF blocks")


def _check_tags(file: BinaryIO) -> None:
    """Raises BadImage for a TIFF with a tag of more numbers than a picture needs: Pillow makes a tuple of each.

    A tag of 200 million numbers in a sparse file took Pillow 13.0 half a minute and 6 GB.
    """
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
            if kind not in _BYTES and count > _MOST_NUMBERS:
                raise BadImage("a TIFF with a tag of over a million numbers")
            if tag in _POINTERS:
                pending.append(value)
            left -= 1


def _check_tiff(image: TiffImageFile, path: Path) -> None:
    """Raises BadImage for a TIFF that libtiff would fill the memory for, or that Pillow reads wrong."""
    tags = image.tag_v2
    if tags.get(322, 0) * tags.get(323, 0) > MOST_PIXELS:  # width and length of a tile, which is decoded as a whole
        raise BadImage("a TIFF with tiles of " + TOO_MANY_PIXELS)
    if image.info.get("compression") in ("jpeg", "tiff_jpeg"):
        _check_jpeg(path.read_bytes(), len(image.tile))
    # Seen in Pillow 13.0: libtiff decompresses 32-bit and signed pixels to the machine's byte order, and Pillow swaps
    # their bytes once more.
    if tags.prefix == b"MM" and image.mode in ("I", "F") and image.tile[0].codec_name == "libtiff":
        raise BadImage("compressed big-endian TIFF of signed, 32-bit or float pixels: convert to 8- or 16-bit PNG")


def grey_of(image: Image.Image) -> NDArray[np.uint8]:
    """An image as uint8 grey (H, W), whatever its mode; see the table of this module. Raises BadImage."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return np.array(_opaque(image).convert("L"))
    values = np.array(image)
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 0
    grey = _from_floats(values) if image.mode == "F" else _from_integers(values)
    # Pillow turns MinIsWhite round up to 8 bits, and leaves it as it is in the modes read here
    inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    return np.subtract(255, grey, dtype=np.uint8) if inverted else grey


def _opaque(image: Image.Image) -> Image.Image:
    """`image` in mode 1, L or RGB, laid over black where it is transparent."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGB", image.size)
        black.paste(rgba, mask=rgba)
        return black
    return image if image.mode in ("1", "L") else image.convert("RGB")


def _from_integers(values: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Integers 0..65535 scaled to 0..255 from the bit depth that holds their maximum. Raises BadImage beyond."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BadImage(f"integer pixels from {low} to {high} do not fit 0..65535: convert to 8- or 16-bit grey")
    top = _full_scale(high)
    table: NDArray[np.uint8] = np.rint(np.arange(top + 1) * (255 / top)).astype(np.uint8)
    return np.take(table, values)


def _from_floats(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Floats scaled to 0..255, from 0..1 or else from the bit depth that holds their maximum. Raises BadImage."""
    if not np.isfinite(values).all():
        raise BadImage("some pixels are NaN or infinite: convert to 8- or 16-bit grey")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        raise BadImage(f"float pixels from {low:g} to {high:g} lie outside 0..1 and 0..65535: rescale to one of these")
    top = 1 if high <= 1 else _full_scale(high)
    grey: NDArray[np.uint8] = np.rint(values * (255 / top)).astype(np.uint8)
    return grey


def _full_scale(high: float) -> int:
    """The largest value of the least bit depth that holds `high`, which is 65535 at most."""
    return next((1 << bits) - 1 for bits in _BIT_DEPTHS if high < 1 << bits)


def _one_line(error: Exception) -> str:
    """What `error` says, on one line and without the path an OSError carries."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())
