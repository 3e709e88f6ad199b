"""What no reader lets through, whatever the format."""

MOST_PIXELS = 50_000_000
MOST_BYTES = 512 * 2**20  # 50 megapixels of 16-bit RGBA take 400 MB
MOST_SCANS = 64  # of a JPEG; encoders write 10. 100 scans of 49 megapixels take 3 s, and 5 kB of a file hold 2000
LEAST_SIDE = 32
MOST_ASPECT = 5
TOO_MANY_BYTES = f"a file of more than {MOST_BYTES // 2**20} MiB"
TOO_MANY_SCANS = f"a JPEG of more than {MOST_SCANS} scans"
TOO_MANY_PIXELS = f"more than {MOST_PIXELS // 1_000_000} megapixels"


class BadImage(Exception):  # noqa: N818 - it names what the file is
    """Why a file cannot be used as a radiograph; the message names no patient data and no path."""


def check_size(width: int, height: int) -> None:
    """Raises BadImage unless an image of `width` × `height` pixels can be a radiograph; to be asked before decoding."""
    if width * height > MOST_PIXELS:
        raise BadImage(TOO_MANY_PIXELS)
    short, long = sorted((width, height))
    if short < LEAST_SIDE:
        raise BadImage(f"{width} × {height} pixels: the shorter side is below {LEAST_SIDE}")
    if long > MOST_ASPECT * short:
        raise BadImage(f"{width} × {height} pixels: one side is over {MOST_ASPECT} times the other")
