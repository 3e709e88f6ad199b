"""Image files in memory: readable ones with the pixels that a reader must return, and ones that it must refuse."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

RAMP = (np.arange(64)[:, None] * 2 + np.arange(96)[None, :]).astype(np.uint8)  # 0..221
COLOURS = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=-1)
ALPHA = np.where(np.arange(96) < 48, 128, 255).astype(np.uint8) * np.ones((64, 1), np.uint8)


def encoded(picture: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def luma(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(rgb @ np.array([0.299, 0.587, 0.114]))


def tiff(pixels: np.ndarray, photometric: int = 1, compressed: bool = False) -> bytes:
    """Return a TIFF of one strip in the byte order of the pixels' dtype; Pillow cannot write most of these."""
    order = ">" if pixels.dtype.byteorder == ">" else "<"
    strip = zlib.compress(pixels.tobytes()) if compressed else pixels.tobytes()
    height, width = pixels.shape
    tags = {
        256: width,
        257: height,
        258: pixels.dtype.itemsize * 8,
        259: 8 if compressed else 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(strip),
        339: {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind],
    }
    strip += b"\0" * (len(strip) % 2)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(strip))
    # SHORT values are left-aligned in their four bytes; LONG avoids that
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    return head + strip + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)


def png16(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels.astype(np.uint16)), "PNG")


def full_range(top: int) -> np.ndarray:
    return np.linspace(0, top, RAMP.size).round().reshape(RAMP.shape)


def scaled(pixels: np.ndarray, top: float) -> np.ndarray:
    return np.rint(pixels * 255.0 / top)


def palette(transparent: bool) -> bytes:
    image = Image.fromarray(RAMP // 2, "P")
    image.putpalette([level for entry in range(256) for level in (entry, 255 - entry, 7)])
    return encoded(image, "PNG", **({"transparency": 3} if transparent else {}))


def palette_grey(transparent: bool) -> np.ndarray:
    index = (RAMP // 2).astype(float)
    grey = luma(np.stack([index, 255 - index, np.full(index.shape, 7)], axis=-1))
    return np.where(index == 3, 0, grey) if transparent else grey


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bare_png(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    packer = zlib.compressobj(9)
    line = bytes(side + 1)
    return bare_png(side, side, b"".join(packer.compress(line) for _ in range(side)) + packer.flush())


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


GREY = Image.fromarray(RAMP)
RGB = Image.fromarray(COLOURS)
ONE_BIT = RAMP > 100
# name: (bytes, expected grey levels, tolerance in grey levels)
GOOD: dict[str, tuple[bytes, np.ndarray, float]] = {
    "png": (encoded(RAMP, "PNG"), RAMP, 0),
    "png-1-bit": (encoded(Image.fromarray(ONE_BIT), "PNG"), ONE_BIT * 255, 0),
    "png-rgb": (encoded(COLOURS, "PNG"), luma(COLOURS), 0.51),
    "png-rgba": (encoded(np.dstack([COLOURS, ALPHA]), "PNG"), luma(COLOURS) * (ALPHA / 255), 1.1),
    "png-la": (encoded(np.dstack([RAMP, ALPHA]), "PNG"), RAMP * (ALPHA / 255), 0.51),
    "png-grey-key": (encoded(GREY, "PNG", transparency=200), np.where(RAMP == 200, 0, RAMP), 0),
    "png-rgb-key": (
        encoded(RGB, "PNG", transparency=tuple(map(int, COLOURS[9, 9]))),
        np.where((COLOURS[9, 9] == COLOURS).all(-1), 0, luma(COLOURS)),
        0.51,
    ),
    "png-palette": (palette(False), palette_grey(False), 0.51),
    "png-palette-transparent": (palette(True), palette_grey(True), 0.51),
    "png-16": (png16(full_range(65535)), scaled(full_range(65535), 65535), 0),
    "png-14-in-16": (png16(full_range(9000)), scaled(full_range(9000), 16383), 0),
    "png-12-in-16": (png16(full_range(4095)), scaled(full_range(4095), 4095), 0),
    "png-10-in-16": (png16(full_range(1023)), scaled(full_range(1023), 1023), 0),
    "png-8-in-16": (png16(RAMP), RAMP, 0),
    "png-orientation": (encoded(GREY, "PNG", exif=turned(3)), RAMP[::-1, ::-1], 0),
    "png-16-orientation": (
        encoded(Image.fromarray(full_range(4095).astype(np.uint16)), "PNG", exif=turned(6)),
        np.rot90(scaled(full_range(4095), 4095), -1),
        0,
    ),
    "jpeg": (encoded(RAMP, "JPEG", quality=95), RAMP, 4),
    "jpeg-rgb": (encoded(COLOURS, "JPEG", quality=95, subsampling=0), luma(COLOURS), 4),
    "jpeg-cmyk": (encoded(RGB.convert("CMYK"), "JPEG", quality=95, subsampling=0), luma(COLOURS), 4),
    "jpeg-orientation": (encoded(GREY, "JPEG", quality=95, exif=turned(6)), np.rot90(RAMP, -1), 4),
    "jpeg-mpo": (encoded(GREY, "MPO", quality=95, save_all=True, append_images=[GREY]), RAMP, 4),
    "tiff-8": (tiff(RAMP), RAMP, 0),
    "tiff-8-min-is-white": (tiff(255 - RAMP, photometric=0), RAMP, 0),
    "tiff-8-min-is-white-deflate": (tiff(255 - RAMP, photometric=0, compressed=True), RAMP, 0),
    "tiff-1-group4": (encoded(Image.fromarray(ONE_BIT), "TIFF", compression="group4"), ONE_BIT * 255, 0),
    "tiff-cmyk": (encoded(RGB.convert("CMYK"), "TIFF"), luma(COLOURS), 1.1),
    "tiff-rgba": (encoded(np.dstack([COLOURS, ALPHA]), "TIFF"), luma(COLOURS) * (ALPHA / 255), 1.1),
    "tiff-orientation": (encoded(GREY, "TIFF", exif=turned(8)), np.rot90(RAMP), 0),
    "tiff-float-1": (tiff((RAMP / np.float32(255)).astype("<f4")), RAMP, 0),
    "tiff-float-1-min-is-white": (tiff((1 - RAMP / 255).astype("<f4"), photometric=0), RAMP, 0),
    "tiff-float-4095": (tiff(full_range(4095).astype(">f4")), scaled(full_range(4095), 4095), 0),
    "tiff-int32": (tiff(full_range(4095).astype("<i4")), scaled(full_range(4095), 4095), 0),
    "bmp": (encoded(RAMP, "BMP"), RAMP, 0),
    "bmp-rgb": (encoded(COLOURS, "BMP"), luma(COLOURS), 0.51),
    "webp": (encoded(COLOURS, "WEBP", lossless=True), luma(COLOURS), 0.51),
    "webp-lossy": (encoded(RGB, "WEBP", quality=95), luma(COLOURS), 12),
    "gif": (encoded(RAMP, "GIF"), RAMP, 0),
    "gif-animated": (animation("GIF"), RAMP, 0),
    "png-animated": (animation("PNG"), RAMP, 0),
} | {
    f"tiff-16{order}{'-min-is-white' * (1 - photometric)}{'-deflate' * compressed}": (
        tiff(full_range(4095).astype(order + "u2"), photometric, compressed),
        scaled(full_range(4095), 4095) if photometric else 255 - scaled(full_range(4095), 4095),
        0,
    )
    for order, photometric in (("<", 1), (">", 1), ("<", 0))
    for compressed in (False, True)
}
PNG = GOOD["png"][0]
NOISE = np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)
# name: (bytes, part of the error message)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "text": (b"path,label\na.png,covid\n", "text file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "zeros": (bytes(5000), "no known image format"),
    "zip": (b"PK\3\4" + bytes(500) + b"\xff", "no known image format"),
    "png-truncated": (PNG[: len(PNG) // 2], "PNG"),
    "png-without-end": (PNG[:-8], "PNG"),
    "png-header-only": (PNG[:20], "PNG"),
    "png-no-data": (bare_png(64, 64, zlib.compress(b"")), "PNG"),
    "jpeg-truncated": (encoded(NOISE, "JPEG")[:2000], "truncated"),
    "jpeg-header-only": (GOOD["jpeg"][0][:100], "JPEG"),
    "gif-truncated": (encoded(NOISE, "GIF")[:2000], "GIF"),
    "webp-truncated": (encoded(NOISE, "WEBP")[:1000], "WEBP"),
    "bmp-truncated": (encoded(NOISE, "BMP")[:3000], "BMP"),
    "tiff-truncated": (encoded(NOISE, "TIFF")[:3000], "TIFF"),
    "tiff-deflate-truncated": (encoded(NOISE, "TIFF", compression="tiff_deflate")[:3000], "TIFF"),
    "1x1": (encoded(RAMP[:1, :1], "PNG"), "below 32"),
    "1x20000": (encoded(np.zeros((1, 20000), np.uint8), "PNG"), "below 32"),
    "31-wide": (encoded(RAMP[:, :31], "PNG"), "below 32"),
    "long": (encoded(np.tile(RAMP[:32], (1, 2))[:, :161], "PNG"), "over 5 times"),
    "blank": (encoded(np.full((64, 64), 9, np.uint8), "PNG"), "blank"),
    "alpha-0": (encoded(np.dstack([COLOURS, np.zeros_like(RAMP)]), "PNG"), "blank"),
    "bomb": (bomb(9000), "more than 50 megapixels"),
    "bomb-header": (bare_png(100_000, 100_000, zlib.compress(b"")), "more than 50 megapixels"),
    "png-huge-text": (PNG[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21))) + PNG[33:], "too large"),
    "tiff-nan": (tiff(np.where(RAMP == 9, np.nan, RAMP / 255).astype("<f4")), "NaN"),
    "tiff-float-negative": (tiff((RAMP - 100.0).astype("<f4")), "-100 to 121"),
    "tiff-float-large": (tiff((RAMP * 1e6).astype("<f4")), "2.21e+08"),
    "tiff-int-negative": (tiff(RAMP.astype("<i4") - 5), "from -5 to 216"),
    "tiff-int-large": (tiff(RAMP.astype("<i4") * 1000), "from 0 to 221000"),
    "tiff-double": (tiff(RAMP.astype("<f8")), "variant that is not supported"),
    "tiff-big-endian-float-deflate": (tiff((RAMP / 255).astype(">f4"), compressed=True), "big-endian"),
    "tiff-big-endian-signed-deflate": (tiff((RAMP // 2).astype(">i2"), compressed=True), "big-endian"),
    "fake-dicom": (bytes(128) + b"DICM" + b"junk" * 20, "DICOM"),
}
