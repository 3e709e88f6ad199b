import io
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    MPEG2MPML,
    UID,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from covid_cls.data.limits import BadImage
from covid_cls.data.readers import read_image
from tools.soak.radiographs import RAMP, RAMP8, SECRET, radiograph, spread


def saved(image: Dataset, folder: Path, name: str = "image") -> Path:
    path = folder / name
    image.save_as(path, enforce_file_format=True)
    return path


def read(image: Dataset, folder: Path) -> np.ndarray:
    return read_image(saved(image, folder))


def reason(path: Path) -> str:
    with pytest.raises(BadImage) as caught:
        read_image(path)
    message = str(caught.value)
    assert "SECRET" not in message
    assert "\n" not in message
    return message


def table(entries: np.ndarray, bits: int, first: int = 0, kind: str = "US") -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", kind, [len(entries) % 65536, first, bits])
    item.add_new("LUTData", "OW", entries.astype(np.uint8 if bits == 8 else np.uint16).tobytes())
    return Sequence([item])


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (8, np.uint16), (10, np.uint16), (16, np.uint16)])
def test_a_picture_without_window_spans_its_own_range(bits: int, dtype: type, tmp_path: Path) -> None:
    pixels = (np.linspace(0.1, 0.9, RAMP.size).reshape(RAMP.shape) * (2**bits - 1)).astype(dtype)
    grey = read(radiograph(pixels, bits), tmp_path)
    assert grey.dtype == np.uint8
    assert np.array_equal(grey, spread(pixels.astype(float), pixels.min(), pixels.max()))


@pytest.mark.parametrize(
    "window", [{}, {"WindowCenter": 2047.5, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"}]
)
def test_monochrome_1_and_2_give_the_same_picture(window: dict[str, object], tmp_path: Path) -> None:
    two = read(radiograph(**window), tmp_path)
    one = read(radiograph(4095 - RAMP, PhotometricInterpretation="MONOCHROME1", **window), tmp_path)
    assert np.array_equal(one, two)
    assert two[0, 0] == 0
    assert two[-1, -1] == 255


def test_windows_follow_the_standard(tmp_path: Path) -> None:
    x = RAMP.astype(float)
    window = {"WindowCenter": [2000, 10], "WindowWidth": [1000, 10]}  # the first counts
    expected = {
        "LINEAR": np.clip((x - 1999.5) / 999 + 0.5, 0, 1),
        "LINEAR_EXACT": np.clip((x - 2000) / 1000 + 0.5, 0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (x - 2000) / 1000)),
    }
    for function, shown in expected.items():
        grey = read(radiograph(VOILUTFunction=function, **window), tmp_path)
        assert np.array_equal(grey, np.rint(shown * 255)), function
    assert np.array_equal(read(radiograph(**window), tmp_path), np.rint(expected["LINEAR"] * 255))


def test_an_empty_window_counts_as_none(tmp_path: Path) -> None:
    assert np.array_equal(read(radiograph(WindowCenter=None, WindowWidth=None), tmp_path), spread(RAMP, 0, 4095))


def test_a_sigmoid_far_below_its_centre_is_black_without_a_warning(tmp_path: Path) -> None:
    grey = read(radiograph(WindowCenter=4000, WindowWidth=1, VOILUTFunction="SIGMOID"), tmp_path)
    assert set(np.unique(grey)) <= set(range(256))
    assert grey[0, 0] == 0
    assert grey[-1, -1] == 255


def test_signed_pixels_are_rescaled_before_the_window(tmp_path: Path) -> None:
    pixels = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    rescaled = pixels * 2.0 + 100
    tags = {"RescaleSlope": 2, "RescaleIntercept": 100, "WindowCenter": 100, "WindowWidth": 2000}
    grey = read(radiograph(pixels, VOILUTFunction="LINEAR_EXACT", **tags), tmp_path)
    assert np.array_equal(grey, spread(rescaled, 100 - 1000, 100 + 1000))


def test_a_negative_slope_turns_the_picture_round(tmp_path: Path) -> None:
    tags = {"RescaleSlope": -1, "RescaleIntercept": 4095}
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    for voi in ({}, window):
        grey = read(radiograph(**tags, **voi), tmp_path)
        assert grey[0, 0] == 255
        assert grey[-1, -1] == 0


def test_a_fractional_slope_keeps_the_whole_range(tmp_path: Path) -> None:
    grey = read(radiograph(RescaleSlope="0.0001", RescaleIntercept=0), tmp_path)
    assert np.array_equal(grey, spread(RAMP, 0, 4095))


@pytest.mark.parametrize("implicit", [False, True])
def test_a_voi_table_is_scaled_by_its_bits_and_goes_before_a_window(implicit: bool, tmp_path: Path) -> None:
    entries = np.linspace(0, 1, 1000) ** 2 * 1023
    image = radiograph(VOILUTSequence=table(entries, 10, first=500), WindowCenter=10, WindowWidth=20)
    if implicit:
        image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    place = np.clip(RAMP.astype(int) - 500, 0, 999)
    assert np.array_equal(read(image, tmp_path), np.rint(entries.astype(int)[place] / 1023 * 255))


@pytest.mark.parametrize("packed", [False, True])
def test_an_8_bit_voi_table_may_be_longer_than_256(packed: bool, tmp_path: Path) -> None:
    entries = np.arange(4096) // 16
    voi = table(entries, 8)
    if not packed:
        voi[0].LUTData = entries.astype("<u2").tobytes()
    assert np.array_equal(read(radiograph(VOILUTSequence=voi), tmp_path), entries[RAMP])


def test_a_voi_table_follows_a_rescale_to_negative_values(tmp_path: Path) -> None:
    voi = table(np.arange(4096), 12, first=-1000, kind="SS")
    grey = read(radiograph(VOILUTSequence=voi, RescaleSlope=1, RescaleIntercept=-1000), tmp_path)
    assert np.array_equal(grey, spread(RAMP, 0, 4095))


def test_a_modality_table_goes_before_the_window(tmp_path: Path) -> None:
    entries = np.arange(4096)[::-1] * 10
    tags = {"WindowCenter": "20000.5", "WindowWidth": 9999, "VOILUTFunction": "LINEAR_EXACT"}
    grey = read(radiograph(ModalityLUTSequence=table(entries, 16), **tags), tmp_path)
    assert np.array_equal(grey, spread(entries[RAMP], 15001, 25000))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_outside_the_range(photometric: str, tmp_path: Path) -> None:
    pixels = RAMP // 2 + 1000
    pixels[:, :8] = 5
    pixels[:, 8:10] = 7
    tags = {"PixelPaddingValue": 7, "PixelPaddingRangeLimit": 3, "PhotometricInterpretation": photometric}
    grey = read(radiograph(pixels, **tags), tmp_path)
    inside = pixels[:, 10:].astype(float)
    expected = spread(inside, inside.min(), inside.max())
    assert (grey[:, :10] == 0).all()
    assert np.array_equal(grey[:, 10:], expected if photometric == "MONOCHROME2" else 255 - expected)


def test_signed_padding_is_found(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.int16)
    pixels[:5] = -2000
    image = radiograph(pixels, 16)
    image.add_new("PixelPaddingValue", "SS", -2000)
    grey = read(image, tmp_path)
    assert (grey[:5] == 0).all()
    assert np.array_equal(grey[5:], spread(pixels[5:], pixels[5:].min(), 4095))


def test_colour_becomes_luma(tmp_path: Path) -> None:
    colours = np.stack([RAMP8, RAMP8[::-1], 255 - RAMP8], axis=-1)
    luma = colours @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(radiograph(colours, 8), tmp_path) - luma).max() < 0.51
    deep = colours.astype(np.uint16) * 257
    assert np.abs(read(radiograph(deep, 16), tmp_path) - luma).max() < 0.51


def test_ybr_becomes_luma(tmp_path: Path) -> None:
    ybr = np.dstack([RAMP8, np.full((*RAMP.shape, 2), 128, np.uint8)])
    assert (
        np.abs(read(radiograph(ybr, 8, PhotometricInterpretation="YBR_FULL"), tmp_path) - RAMP8.astype(int)).max() <= 1
    )


def test_a_palette_becomes_luma(tmp_path: Path) -> None:
    levels = np.arange(256) * 257
    image = radiograph(RAMP8, 8, PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        image.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        image.add_new(f"{colour}PaletteColorLookupTableData", "OW", levels.astype("<u2").tobytes())
    assert np.array_equal(read(image, tmp_path), RAMP8)


@pytest.mark.parametrize("bits", [8, 12])
def test_rle_needs_no_extra(bits: int, tmp_path: Path) -> None:
    pixels = RAMP8 if bits == 8 else RAMP
    image = radiograph(pixels, bits)
    image.compress(RLELossless, encoding_plugin="pydicom")
    assert np.array_equal(read(image, tmp_path), spread(pixels, 0, pixels.max()))


@pytest.mark.parametrize(
    ("syntax", "needs", "tolerance"),
    [(JPEG2000Lossless, "openjpeg", 0), (JPEGLSLossless, "jpeg_ls", 0), (JPEG2000, "openjpeg", 2)],
)
@pytest.mark.parametrize("signed", [False, True])
def test_compressed_pixels_read_as_the_plain_ones(
    syntax: UID, needs: str, tolerance: int, signed: bool, tmp_path: Path
) -> None:
    pytest.importorskip(needs)
    pixels = (RAMP.astype(np.int16) - 2048).astype(np.int16) if signed else RAMP
    image = radiograph(pixels)
    image.compress(syntax, **({"j2k_psnr": [70.0]} if syntax == JPEG2000 else {}))
    assert np.abs(read(image, tmp_path) - spread(RAMP, 0, 4095)).max() <= tolerance


def compressed(syntax: UID, frame: bytes, pixels: np.ndarray = RAMP, bits: int = 12) -> Dataset:
    image = radiograph(pixels, bits)
    image.file_meta.TransferSyntaxUID = syntax
    image.PixelData = encapsulate([frame])
    image["PixelData"].VR = "OB"
    return image


def lossless_jpeg(pixels: np.ndarray, bits: int) -> bytes:
    """`pixels` as lossless JPEG, process 14: each is coded as its difference from the left, or the upper, neighbour."""
    values = pixels.astype(int)
    left = np.empty_like(values)
    left[:, 1:] = values[:, :-1]
    left[1:, 0] = values[:-1, 0]
    left[0, 0] = 1 << (bits - 1)
    stream = []
    for difference in ((values - left + 32767) % 65536 - 32767).ravel().tolist():
        size = abs(difference).bit_length()  # also its Huffman code, in 5 bits
        extra = difference if difference > 0 else difference + (1 << size) - 1
        stream.append(f"{size:05b}" + (f"{extra:0{size}b}" if 0 < size < 16 else ""))
    code = "".join(stream)
    code += "1" * (-len(code) % 8)
    scan = int(code, 2).to_bytes(len(code) // 8, "big").replace(b"\xff", b"\xff\0")
    height, width = pixels.shape
    return b"".join(
        [
            b"\xff\xd8",
            b"\xff\xc3" + struct.pack(">HBHHB3B", 11, bits, height, width, 1, 1, 0x11, 0),
            b"\xff\xc4" + struct.pack(">HB16B17B", 36, 0, *[0] * 4, 17, *[0] * 11, *range(17)),
            b"\xff\xda" + struct.pack(">HB2B3B", 8, 1, 1, 0, 1, 0, 0),
            scan,
            b"\xff\xd9",
        ]
    )


@pytest.mark.parametrize("bits", [12, 16])
def test_lossless_jpeg_reads_as_the_plain_pixels(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("libjpeg")
    pixels = RAMP << (bits - 12)
    image = compressed(JPEGLosslessSV1, lossless_jpeg(pixels, bits), pixels, bits)
    assert np.array_equal(read(image, tmp_path), spread(pixels, 0, pixels.max()))


def test_baseline_jpeg_needs_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = get_decoder(JPEGBaseline8Bit)
    monkeypatch.setattr(decoder, "_available", {"pillow": decoder._available["pillow"]})
    buffer = io.BytesIO()
    Image.fromarray(RAMP8).save(buffer, "JPEG", quality=95)
    grey = read(compressed(JPEGBaseline8Bit, buffer.getvalue(), RAMP8, 8), tmp_path)
    assert np.abs(grey - spread(RAMP8, 0, 255)).max() <= 4


def test_a_missing_decoder_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_decoder(JPEGLosslessSV1), "_available", {})
    message = reason(saved(compressed(JPEGLosslessSV1, b"\xff\xd8"), tmp_path))
    assert "JPEG Lossless, Non-Hierarchical, First-Order Prediction" in message
    assert 'pip install "covid_cls[dicom]"' in message


def test_a_decoder_that_fails_names_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = get_decoder(JPEGExtended12Bit)
    monkeypatch.setattr(decoder, "_available", {"pillow": decoder._available["pillow"]})
    message = reason(saved(compressed(JPEGExtended12Bit, b"\xff\xd8\xff\xd9"), tmp_path))
    assert 'pip install "covid_cls[dicom]"' in message


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("suffix", [".dcm", ".DICOM", ".png"])
def test_a_file_without_preamble_is_known_by_its_suffix(syntax: UID, suffix: str, tmp_path: Path) -> None:
    image = radiograph()
    del image.file_meta
    path = tmp_path / f"image{suffix}"
    image.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=True, enforce_file_format=False)
    if suffix == ".png":
        assert "no known image format" in reason(path)
    else:
        assert np.array_equal(read_image(path), spread(RAMP, 0, 4095))


def test_a_picture_named_dcm_is_read_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "image.dcm"
    Image.fromarray(RAMP8).save(path, "PNG")
    assert np.array_equal(read_image(path), RAMP8)


def without(image: Dataset, tag: str) -> Dataset:
    delattr(image, tag)
    return image


REFUSED: dict[str, tuple[Callable[[], Dataset], str]] = {
    "frames": (lambda: radiograph(NumberOfFrames=2, PixelData=RAMP.tobytes() * 2), "2 frames"),
    "no pixels": (lambda: without(radiograph(), "PixelData"), "without an image"),
    "no rows": (lambda: without(radiograph(), "Rows"), "header"),
    "no bits stored": (lambda: without(radiograph(), "BitsStored"), "pixel data"),
    "photometric": (lambda: radiograph(PhotometricInterpretation="HSV"), "photometric interpretation"),
    "32 bits": (lambda: radiograph(RAMP.astype(np.uint32), 32), "32 bits"),
    "too many pixels": (lambda: radiograph(Rows=10_000, Columns=10_000), "more than 50 megapixels"),
    "small": (lambda: radiograph(RAMP[:20]), "below 32"),
    "blank": (lambda: radiograph(np.full((64, 64), 7, np.uint16)), "blank"),
    "all padding": (lambda: radiograph(RAMP, PixelPaddingValue=0, PixelPaddingRangeLimit=4095), "blank"),
    "truncated": (lambda: radiograph(PixelData=RAMP.tobytes()[:-500]), "pixel data"),
    "wide window": (lambda: radiograph(WindowCenter="1e300", WindowWidth="1e308", RescaleSlope="1e308",
                                       RescaleIntercept="1e308"), "window"),
    "no window": (lambda: radiograph(WindowCenter=5, WindowWidth=0), "window"),
    "window function": (lambda: radiograph(WindowCenter=5, WindowWidth=9, VOILUTFunction="CUBIC"), "window"),
    "short table": (lambda: radiograph(VOILUTSequence=table(np.arange(9), 10)[:0] or Sequence([Dataset()])), "table"),
    "video": (lambda: compressed(MPEG2MPML, b"\0\0\1\xb3"), "MPEG2 Main Profile / Main Level"),
    "broken rle": (lambda: compressed(RLELossless, b"\1" * 80), "RLE Lossless"),
    "broken jpeg 2000": (lambda: compressed(JPEG2000Lossless, b"\xff\x4f\xff\x51" + b"\1" * 80), "JPEG 2000"),
    "broken jpeg-ls": (lambda: compressed(JPEGLSLossless, b"\xff\xd8\xff\xf7" + b"\1" * 80), "JPEG-LS"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_radiograph_is_refused(name: str, tmp_path: Path) -> None:
    image, expected = REFUSED[name]
    assert expected in reason(saved(image(), tmp_path))


def test_the_size_is_checked_before_a_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covid_cls.data.dicom.pixel_array", lambda _: pytest.fail("decoded"))
    image = radiograph(Rows=60_000, Columns=60_000, PixelData=b"\0\0")
    assert "megapixels" in reason(saved(image, tmp_path))


def broken_files() -> dict[str, bytes]:
    """DICOM files that say the patient's name where another value should stand, are cut short, or have bits flipped."""
    buffer = io.BytesIO()
    tags = {"WindowCenter": "2000.1234567", "WindowWidth": "1000.1234567", "RescaleSlope": "1.0000000001"}
    radiograph(RescaleIntercept="0.0000000001", NumberOfFrames=1, **tags).save_as(buffer, enforce_file_format=True)
    whole = buffer.getvalue()
    files = {}
    for value in (ExplicitVRLittleEndian, "MONOCHROME2 ", "0.0000000001", *tags.values()):
        assert value.encode() in whole
        files[f"name for {value}"] = whole.replace(value.encode(), SECRET.ljust(len(value), "X").encode())
    header = len(whole) - RAMP.nbytes
    for end in range(132, header + 40, 37):
        files[f"cut at {end}"] = whole[:end]
    for seed in range(150):
        place = random.Random(seed).randrange(132 * 8, header * 8)
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        files[f"flipped {place}"] = bytes(flipped)
    for name in ("broken jpeg 2000", "broken jpeg-ls", "truncated", "no window"):
        buffer = io.BytesIO()
        REFUSED[name][0]().save_as(buffer, enforce_file_format=True)
        files[name] = buffer.getvalue()
    return files


def test_no_name_leaves_a_broken_file(tmp_path: Path) -> None:
    for name, data in broken_files().items():
        (tmp_path / f"{name}.dcm").write_bytes(data)
    script = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
from covid_cls.data.limits import BadImage
from covid_cls.data.readers import read_image
bad = 0
for path in Path(sys.argv[1]).iterdir():
    try:
        read_image(path)
    except BadImage as error:
        bad += 1
        print(error, "|", error.__cause__, "|", error.args)
print(bad)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "SECRET" not in done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("DEBUG:")] == []
    assert int(done.stdout.splitlines()[-1]) > 40
