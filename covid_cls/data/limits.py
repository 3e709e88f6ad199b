"""Limits that apply to image files of every format."""

MAX_PIXELS = 50_000_000
# 50 megapixels of 16-bit RGBA take 400 MB.
MAX_BYTES = 512 * 2**20
# Encoders write about 10 scans per JPEG. 100 scans of 49 megapixels take 3 s, and 2,000 scans fit into 5 kB.
MAX_JPEG_SCANS = 64
MIN_SIDE = 32
MAX_ASPECT_RATIO = 5

TOO_MANY_BYTES = f"a file of more than {MAX_BYTES // 2**20} MiB"
TOO_MANY_SCANS = f"a JPEG of more than {MAX_JPEG_SCANS} scans"
TOO_MANY_PIXELS = f"more than {MAX_PIXELS // 1_000_000} megapixels"


class BadImage(Exception):  # noqa: N818 - it names the file's state
    """The reason why a file cannot be used as a radiograph; it contains no patient data and no path."""


def check_size(width: int, height: int) -> None:
    """Check the size that a file's header gives, before any pixel is decoded.

    Raises:
        BadImage: The image has too many pixels, or is too small or too long for a radiograph.
    """
    if width * height > MAX_PIXELS:
        raise BadImage(TOO_MANY_PIXELS)
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise BadImage(f"{width} × {height} pixels: the shorter side is below {MIN_SIDE}")
    if long > MAX_ASPECT_RATIO * short:
        raise BadImage(f"{width} × {height} pixels: one side is over {MAX_ASPECT_RATIO} times the other")
