"""DICOM files: grey values follow the standard, unusable files are rejected, and headers give reasons and tags."""

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

from covid_cls.data.dicom import check_tags
from covid_cls.data.limits import BadImage
from covid_cls.data.readers import HEADER_REASONS, read_header, read_image
from covid_cls.errors import InputError
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
def test_an_image_without_window_is_scaled_by_its_range(bits: int, dtype: type, tmp_path: Path) -> None:
    pixels = (np.linspace(0.1, 0.9, RAMP.size).reshape(RAMP.shape) * (2**bits - 1)).astype(dtype)
    grey = read(radiograph(pixels, bits), tmp_path)
    assert grey.dtype == np.uint8
    assert np.array_equal(grey, spread(pixels.astype(float), pixels.min(), pixels.max()))


@pytest.mark.parametrize(
    "window", [{}, {"WindowCenter": 2047.5, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"}]
)
def test_monochrome_1_and_2_give_the_same_image(window: dict[str, object], tmp_path: Path) -> None:
    two = read(radiograph(**window), tmp_path)
    one = read(radiograph(4095 - RAMP, PhotometricInterpretation="MONOCHROME1", **window), tmp_path)
    assert np.array_equal(one, two)
    assert two[0, 0] == 0
    assert two[-1, -1] == 255


def test_windows_follow_the_standard(tmp_path: Path) -> None:
    x = RAMP.astype(float)
    # Only the first window is used.
    window = {"WindowCenter": [2000, 10], "WindowWidth": [1000, 10]}
    expected = {
        "LINEAR": np.clip((x - 1999.5) / 999 + 0.5, 0, 1),
        "LINEAR_EXACT": np.clip((x - 2000) / 1000 + 0.5, 0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (x - 2000) / 1000)),
    }
    for function, shown in expected.items():
        grey = read(radiograph(VOILUTFunction=function, **window), tmp_path)
        assert np.array_equal(grey, np.rint(shown * 255)), function
    assert np.array_equal(read(radiograph(**window), tmp_path), np.rint(expected["LINEAR"] * 255))


def test_an_empty_window_is_ignored(tmp_path: Path) -> None:
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


def test_a_negative_slope_inverts_the_image(tmp_path: Path) -> None:
    tags = {"RescaleSlope": -1, "RescaleIntercept": 4095}
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    for voi in ({}, window):
        grey = read(radiograph(**tags, **voi), tmp_path)
        assert grey[0, 0] == 255
        assert grey[-1, -1] == 0


def test_a_fractional_slope_keeps_the_full_range(tmp_path: Path) -> None:
    grey = read(radiograph(RescaleSlope="0.0001", RescaleIntercept=0), tmp_path)
    assert np.array_equal(grey, spread(RAMP, 0, 4095))


@pytest.mark.parametrize("implicit", [False, True])
def test_a_voi_table_is_scaled_by_its_bits_and_replaces_a_window(implicit: bool, tmp_path: Path) -> None:
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


def test_a_modality_table_is_applied_before_the_window(tmp_path: Path) -> None:
    entries = np.arange(4096)[::-1] * 10
    tags = {"WindowCenter": "20000.5", "WindowWidth": 9999, "VOILUTFunction": "LINEAR_EXACT"}
    grey = read(radiograph(ModalityLUTSequence=table(entries, 16), **tags), tmp_path)
    assert np.array_equal(grey, spread(entries[RAMP], 15001, 25000))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count_for_the_range(photometric: str, tmp_path: Path) -> None:
    pixels = RAMP // 2 + 1000
    pixels[:, :8] = 5
    pixels[:, 8:10] = 7
    tags = {"PixelPaddingValue": 7, "PixelPaddingRangeLimit": 3, "PhotometricInterpretation": photometric}
    grey = read(radiograph(pixels, **tags), tmp_path)
    inside = pixels[:, 10:].astype(float)
    expected = spread(inside, inside.min(), inside.max())
    assert (grey[:, :10] == 0).all()
    assert np.array_equal(grey[:, 10:], expected if photometric == "MONOCHROME2" else 255 - expected)


def test_signed_padding_is_recognised(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.int16)
    pixels[:5] = -2000
    image = radiograph(pixels, 16)
    image.add_new("PixelPaddingValue", "SS", -2000)
    grey = read(image, tmp_path)
    assert (grey[:5] == 0).all()
    assert np.array_equal(grey[5:], spread(pixels[5:], pixels[5:].min(), 4095))


def test_colour_is_converted_to_luma(tmp_path: Path) -> None:
    colours = np.stack([RAMP8, RAMP8[::-1], 255 - RAMP8], axis=-1)
    luma = colours @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(radiograph(colours, 8), tmp_path) - luma).max() < 0.51
    deep = colours.astype(np.uint16) * 257
    assert np.abs(read(radiograph(deep, 16), tmp_path) - luma).max() < 0.51


def test_ybr_is_converted_to_luma(tmp_path: Path) -> None:
    ybr = np.dstack([RAMP8, np.full((*RAMP.shape, 2), 128, np.uint8)])
    assert (
        np.abs(read(radiograph(ybr, 8, PhotometricInterpretation="YBR_FULL"), tmp_path) - RAMP8.astype(int)).max() <= 1
    )


def test_a_palette_is_converted_to_luma(tmp_path: Path) -> None:
    levels = np.arange(256) * 257
    image = radiograph(RAMP8, 8, PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        image.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        image.add_new(f"{colour}PaletteColorLookupTableData", "OW", levels.astype("<u2").tobytes())
    assert np.array_equal(read(image, tmp_path), RAMP8)


@pytest.mark.parametrize("bits", [8, 12])
def test_rle_needs_no_optional_decoder(bits: int, tmp_path: Path) -> None:
    pixels = RAMP8 if bits == 8 else RAMP
    image = radiograph(pixels, bits)
    image.compress(RLELossless, encoding_plugin="pydicom")
    assert np.array_equal(read(image, tmp_path), spread(pixels, 0, pixels.max()))


@pytest.mark.parametrize(
    ("syntax", "needs", "tolerance"),
    [(JPEG2000Lossless, "openjpeg", 0), (JPEGLSLossless, "jpeg_ls", 0), (JPEG2000, "openjpeg", 2)],
)
@pytest.mark.parametrize("signed", [False, True])
def test_compressed_pixels_equal_uncompressed_ones(
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
    """Encode `pixels` as lossless JPEG, process 14: each as its difference from the left or upper neighbour."""
    values = pixels.astype(int)
    left = np.empty_like(values)
    left[:, 1:] = values[:, :-1]
    left[1:, 0] = values[:-1, 0]
    left[0, 0] = 1 << (bits - 1)
    stream = []
    for difference in ((values - left + 32767) % 65536 - 32767).ravel().tolist():
        # The size is also the Huffman code, in 5 bits.
        size = abs(difference).bit_length()
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
def test_lossless_jpeg_equals_uncompressed_pixels(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("libjpeg")
    pixels = RAMP << (bits - 12)
    image = compressed(JPEGLosslessSV1, lossless_jpeg(pixels, bits), pixels, bits)
    assert np.array_equal(read(image, tmp_path), spread(pixels, 0, pixels.max()))


def test_baseline_jpeg_needs_no_optional_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = get_decoder(JPEGBaseline8Bit)
    monkeypatch.setattr(decoder, "_available", {"pillow": decoder._available["pillow"]})
    buffer = io.BytesIO()
    Image.fromarray(RAMP8).save(buffer, "JPEG", quality=95)
    grey = read(compressed(JPEGBaseline8Bit, buffer.getvalue(), RAMP8, 8), tmp_path)
    assert np.abs(grey - spread(RAMP8, 0, 255)).max() <= 4


def test_a_missing_decoder_is_reported_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_decoder(JPEGLosslessSV1), "_available", {})
    message = reason(saved(compressed(JPEGLosslessSV1, b"\xff\xd8"), tmp_path))
    assert "JPEG Lossless, Non-Hierarchical, First-Order Prediction" in message
    assert 'pip install "covid_cls[dicom]"' in message


def test_the_message_of_a_failing_decoder_names_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = get_decoder(JPEGExtended12Bit)
    monkeypatch.setattr(decoder, "_available", {"pillow": decoder._available["pillow"]})
    message = reason(saved(compressed(JPEGExtended12Bit, b"\xff\xd8\xff\xd9"), tmp_path))
    assert 'pip install "covid_cls[dicom]"' in message


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("suffix", [".dcm", ".DICOM", ".png"])
def test_a_file_without_preamble_is_recognised_by_its_suffix(syntax: UID, suffix: str, tmp_path: Path) -> None:
    image = radiograph()
    del image.file_meta
    path = tmp_path / f"image{suffix}"
    image.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=True, enforce_file_format=False)
    if suffix == ".png":
        assert "no known image format" in reason(path)
    else:
        assert np.array_equal(read_image(path), spread(RAMP, 0, 4095))


def test_a_png_file_named_dcm_is_read_as_png(tmp_path: Path) -> None:
    path = tmp_path / "image.dcm"
    Image.fromarray(RAMP8).save(path, "PNG")
    assert np.array_equal(read_image(path), RAMP8)


def without(image: Dataset, tag: str) -> Dataset:
    delattr(image, tag)
    return image


REJECTED: dict[str, tuple[Callable[[], Dataset], str]] = {
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


@pytest.mark.parametrize("name", REJECTED)
def test_unusable_dicom_files_are_rejected(name: str, tmp_path: Path) -> None:
    image, expected = REJECTED[name]
    assert expected in reason(saved(image(), tmp_path))


def test_the_size_is_checked_before_a_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covid_cls.data.dicom.pixel_array", lambda _: pytest.fail("decoded"))
    image = radiograph(Rows=60_000, Columns=60_000, PixelData=b"\0\0")
    assert "megapixels" in reason(saved(image, tmp_path))


def broken_files() -> dict[str, bytes]:
    """Return DICOM files with the patient's name in place of another value, truncated files and flipped bits."""
    buffer = io.BytesIO()
    tags = {"WindowCenter": "2000.1234567", "WindowWidth": "1000.1234567", "RescaleSlope": "1.0000000001"}
    radiograph(RescaleIntercept="0.0000000001", NumberOfFrames=1, **tags).save_as(buffer, enforce_file_format=True)
    complete = buffer.getvalue()
    files = {}
    for value in (ExplicitVRLittleEndian, "MONOCHROME2 ", "0.0000000001", *tags.values()):
        assert value.encode() in complete
        files[f"name for {value}"] = complete.replace(value.encode(), SECRET.ljust(len(value), "X").encode())
    header = len(complete) - RAMP.nbytes
    for end in range(132, header + 40, 37):
        files[f"cut at {end}"] = complete[:end]
    for seed in range(150):
        place = random.Random(seed).randrange(132 * 8, header * 8)
        flipped = bytearray(complete)
        flipped[place // 8] ^= 1 << place % 8
        files[f"flipped {place}"] = bytes(flipped)
    for name in ("broken jpeg 2000", "broken jpeg-ls", "truncated", "no window"):
        buffer = io.BytesIO()
        REJECTED[name][0]().save_as(buffer, enforce_file_format=True)
        files[name] = buffer.getvalue()
    return files


def test_messages_about_damaged_files_contain_no_patient_name(tmp_path: Path) -> None:
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


# pytest sets its own warning filters for each test; pydicom's warnings about these headers do not matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def codes(folder: Path, **tags: object) -> list[str]:
    found, _ = read_header(saved(radiograph(**tags), folder))
    assert set(found) <= set(HEADER_REASONS)
    return found


@pytest.mark.parametrize("view", ["LL", "RL", "LATERAL", "lateral ", "XTABLE LATERAL", "LLO", "RAO", "LAT"])
def test_lateral_and_oblique_views_are_recognised(view: str, tmp_path: Path) -> None:
    assert codes(tmp_path, Modality="DX", BodyPartExamined="CHEST", ViewPosition=view) == ["lateral_view"]


@pytest.mark.parametrize("view", ["PA", "AP", "", None, "AP AXIAL", "LLD", "AP LLD", "LATERAL DECUBITUS"])
def test_frontal_and_unknown_views_are_accepted(view: str | None, tmp_path: Path) -> None:
    assert codes(tmp_path, Modality="CR", BodyPartExamined="Thorax", ViewPosition=view) == []


@pytest.mark.parametrize(
    ("modality", "part"),
    [("CT", "CHEST"), ("MR", ""), ("MG", "BREAST"), ("DX", "KNEE"), ("CR", "SKULL"), ("PX", None), ("US", "HEART")],
)
def test_other_modalities_and_body_parts_are_recognised(modality: str, part: str | None, tmp_path: Path) -> None:
    assert codes(tmp_path, Modality=modality, BodyPartExamined=part) == ["not_a_chest_radiograph"]


@pytest.mark.parametrize("part", ["PORT CHEST", "Tórax", "Klatka piersiówa", "CHEST/ABD", "LUNG", "", None])
def test_other_names_of_the_chest_are_accepted(part: str | None, tmp_path: Path) -> None:
    assert codes(tmp_path, Modality="DX", BodyPartExamined=part) == []


def test_an_image_can_have_both_reasons(tmp_path: Path) -> None:
    assert codes(tmp_path, Modality="DX", BodyPartExamined="ANKLE", ViewPosition="LL") == list(HEADER_REASONS)


def test_a_header_without_these_tags_gives_no_reason(tmp_path: Path) -> None:
    assert codes(tmp_path) == []


def test_requested_tags_are_text_and_absent_ones_are_empty(tmp_path: Path) -> None:
    image = radiograph(StudyDate="20200310", ImageType=["ORIGINAL", "PRIMARY"], SeriesNumber=7, PatientAge=None)
    names = ("PatientName", "StudyDate", "ImageType", "SeriesNumber", "PatientAge", "StudyTime")
    expected = (SECRET, "20200310", "ORIGINAL\\PRIMARY", "7", "", "")
    assert read_header(saved(image, tmp_path), names)[1] == dict(zip(names, expected, strict=True))


def test_tags_are_returned_only_on_request(tmp_path: Path) -> None:
    path = saved(radiograph(Modality="CT"), tmp_path)
    assert read_header(path) == (["not_a_chest_radiograph"], {})


def test_the_header_of_a_file_without_preamble_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bare.dcm"
    image = radiograph(Modality="CT")
    bare = Dataset()
    bare.update(image)
    bare.save_as(path, implicit_vr=True, little_endian=True)
    assert path.read_bytes()[128:132] != b"DICM"
    assert read_header(path)[0] == ["not_a_chest_radiograph"]


def test_a_file_of_another_format_has_neither_reasons_nor_tags(tmp_path: Path) -> None:
    Image.fromarray(RAMP8).save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png", ("PatientID",)) == ([], {})


def test_a_damaged_tag_is_empty_and_does_not_affect_others(tmp_path: Path) -> None:
    path = saved(radiograph(Modality="DX", SeriesNumber=123456, StudyDate="20200310"), tmp_path)
    complete = path.read_bytes()
    assert complete.count(b"IS\x06\x00123456") == 1
    # Six bytes are not a number of doubles.
    path.write_bytes(complete.replace(b"IS\x06\x00123456", b"FD\x06\x00123456"))
    assert read_header(path, ("SeriesNumber", "StudyDate"))[1] == {"SeriesNumber": "", "StudyDate": "20200310"}


@pytest.mark.parametrize(
    ("name", "words"), [("PatientsID", "PatientID"), ("PixelData", "not text"), ("VOILUTSequence", "not text")]
)
def test_a_tag_that_cannot_be_a_column_is_rejected(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_tags(["StudyDate", name])


def test_pydicom_is_not_imported_for_other_files(tmp_path: Path) -> None:
    Image.fromarray(RAMP8).save(tmp_path / "a.png")
    code = (
        "import sys; from pathlib import Path; from covid_cls.data.readers import read_header; "
        f"read_header(Path({str(tmp_path / 'a.png')!r})); assert 'pydicom' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
