"""Image files of every format are read correctly or rejected with a reason, without side effects."""

import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covid_cls.data.limits import BadImage
from covid_cls.data.readers import read_image
from tools.soak.pictures import BAD, GOOD, NOISE, PNG, RAMP, chunk, encoded, full_range

# pytest sets its own warning filters; `test_reading_has_no_side_effects` therefore uses a separate process.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL.TiffImagePlugin")


def written(folder: Path, data: bytes, name: str = "image.png") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def outcome(path: Path) -> np.ndarray | str:
    try:
        return read_image(path)
    except BadImage as error:
        return str(error)


@pytest.mark.parametrize("name", GOOD)
def test_an_image_is_read_from_every_format(name: str, tmp_path: Path) -> None:
    data, expected, tolerance = GOOD[name]
    # The file is named .png, whatever its format.
    grey = read_image(written(tmp_path, data))
    assert grey.dtype == np.uint8
    assert grey.shape == expected.shape
    assert grey.flags.writeable
    assert np.abs(grey - expected.astype(float)).max() <= tolerance


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_file_is_rejected_with_a_reason_on_one_line(name: str, tmp_path: Path) -> None:
    data, reason = BAD[name]
    path = written(tmp_path, data)
    with pytest.raises(BadImage) as caught:
        read_image(path)
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    assert str(tmp_path) not in message
    assert len(message) < 160


def test_16_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + np.repeat(row * np.uint16(256) + np.uint16(77), 3).astype(">u2").tobytes() for row in RAMP)
    header = struct.pack(">IIBBBBB", 96, 64, 16, 2, 0, 0, 0)
    data = PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(read_image(written(tmp_path, data)), RAMP)


def test_a_transparent_16_bit_level_is_black(tmp_path: Path) -> None:
    pixels = full_range(4095)
    pixels[:, :10] = 4000
    data = encoded(Image.fromarray(pixels.astype(np.uint16)), "PNG", transparency=4000)
    grey = read_image(written(tmp_path, data))
    assert (grey[:, :10] == 0).all()
    assert grey[-1, -1] == 255


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.png"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, Path("/dev/zero")):
        # Reading one of these would wait for ever or never end.
        assert outcome(path) == "not a regular file"


def test_a_path_without_file_is_reported(tmp_path: Path) -> None:
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    dangling = tmp_path / "dangling.png"
    dangling.symlink_to(tmp_path / "gone.png")
    assert outcome(dangling) == outcome(tmp_path / "gone.png") == "No such file or directory"
    assert "symbolic links" in outcome(loop)
    assert "name too long" in outcome(tmp_path / ("x" * 4000)).lower()
    assert "null" in outcome(tmp_path / "a\0b.png")


def test_a_link_to_an_image_is_read(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(written(tmp_path, PNG))
    assert np.array_equal(read_image(link), RAMP)


def test_a_flipped_bit_in_a_png_is_always_noticed(tmp_path: Path) -> None:
    data = encoded(NOISE // 8 + RAMP // 2, "PNG")
    for seed in range(60):
        place = random.Random(seed).randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        assert isinstance(outcome(written(tmp_path, bytes(flipped))), str), f"bit {place} of {len(data) * 8}"


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_a_flipped_bit_in_other_formats_never_causes_a_crash(kind: str, tmp_path: Path) -> None:
    data = encoded(RAMP, kind)
    for seed in range(60):
        # Most bits are in the header.
        place = random.Random(seed).randrange(min(len(data), 400) * 8)
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        outcome(written(tmp_path, bytes(flipped)))


def test_reading_has_no_side_effects(tmp_path: Path) -> None:
    files = {name: data for name, (data, *_) in (GOOD | BAD).items() if name != "fake-dicom"}
    broken_exif = bytearray(GOOD["jpeg-orientation"][0])
    broken_exif[40:60] = b"\xff" * 20
    files["broken-exif"] = bytes(broken_exif)
    for name, data in files.items():
        written(tmp_path, data, f"{name}.png")
    script = """
import logging, sys
from pathlib import Path
from PIL import Image, ImageFile
logging.basicConfig(level=logging.INFO)
limit = Image.MAX_IMAGE_PIXELS
from covid_cls.data.limits import BadImage
from covid_cls.data.readers import read_image
good = 0
for path in Path(sys.argv[1]).iterdir():
    try:
        good += read_image(path).size > 0
    except BadImage:
        pass
assert Image.MAX_IMAGE_PIXELS == limit
assert not ImageFile.LOAD_TRUNCATED_IMAGES
assert "pydicom" not in sys.modules
print(good)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert int(done.stdout) >= len(GOOD)
