"""The zoo of tools/soak: unusual, damaged and malicious files are read or rejected quickly and with little memory."""

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from covid_cls.data.datamodule import decode_images
from covid_cls.data.limits import BadImage
from covid_cls.data.manifest import read_manifest
from covid_cls.data.readers import read_image
from covid_cls.errors import InputError
from tests.data.unreliable import unreliable
from tools.soak import images, zoo
from tools.soak.images import MOST_MEMORY, fault_of, read_all, write_manifests
from tools.soak.pictures import GOOD
from tools.soak.radiographs import RAMP8, radiograph
from tools.soak.zoo import Specimen, plant

# pytest sets its own warning filters, see test_readers.py.
pytestmark = [pytest.mark.filterwarnings(f"ignore:::PIL.{name}") for name in ("Image", "TiffImagePlugin")]


def refusal(data: bytes, folder: Path) -> str:
    path = folder / "image"
    path.write_bytes(data)
    with pytest.raises(BadImage) as error:
        read_image(path)
    return str(error.value)


def test_sixty_files_are_read_correctly_or_rejected(tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    specimens = plant(tmp_path / "zoo", 60, seed=1)
    readings = read_all([tmp_path / "zoo" / specimen.name for specimen in specimens], read_image)
    faults = [fault_of(*pair) for pair in zip(specimens, readings, strict=True)]
    assert [f"{s.name!r}: {fault}" for s, fault in zip(specimens, faults, strict=True) if fault] == []
    assert {reading.end for reading in readings} == {"read", "refused"}
    assert max(reading.megabytes for reading in readings) < MOST_MEMORY

    lines = write_manifests(tmp_path, specimens)
    table = read_manifest(tmp_path / "manifest.csv")
    _, usable, quarantined = decode_images(
        table, size=32, canvas=32, cache=tmp_path / "cache", on_bad_image="quarantine"
    )
    ends = {f"zoo/{specimen.name}": reading for specimen, reading in zip(specimens, readings, strict=True)}
    assert {row.path: row.reason for row in quarantined.itertuples()} == {
        path: ends[path].message for path in lines if ends[path].end == "refused"
    }
    assert all(lines[row.path] == row.line for row in quarantined.itertuples())
    assert len(usable) + len(quarantined) == len(table)
    with pytest.raises(InputError, match=f"{len(quarantined)} images cannot be used"):
        decode_images(table, size=32, canvas=32, cache=tmp_path / "cache", on_bad_image="stop")
    with pytest.raises(InputError, match=f"{len(specimens) - len(lines)} faults"):
        read_manifest(tmp_path / "odd.csv")


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        names = [specimen.name for specimen in plant(tmp_path / name, 60, seed=0) if specimen.listable]
        contents.append([(one, (tmp_path / name / one).read_bytes()) for one in names])
    assert contents[0] == contents[1]
    assert len(contents[0]) > 30


# what the checks of tools/soak notice


@pytest.mark.slow(reason="processes that read images die and hang")
def test_crashes_hangs_exceptions_and_memory_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine takes seconds to start a process.
    monkeypatch.setattr(images, "PATIENCE", 8.0)
    names = ("reads", "killed", "reads", "hangs", "raises", "refuses", "large", "reads")
    readings = read_all([Path(name) for name in names], unreliable)
    assert [reading.end for reading in readings] == [
        *("read", "died", "read", "hung", "raised", "refused", "read", "read")
    ]
    assert readings[1].message == "exit code -11"
    assert readings[6].megabytes > 280
    assert readings[7].megabytes < 20
    good = Specimen("a", np.ones(4, np.uint8))
    assert [bool(fault_of(good, reading)) for reading in readings] == [
        False,
        True,
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    assert fault_of(Specimen("a", np.zeros(4, np.uint8)), readings[0]) == "read with other pixels"
    assert fault_of(Specimen("a", refusal=""), readings[0]) == "read"
    assert fault_of(Specimen("a", refusal="empty"), readings[5]) == "refused: blank"
    assert fault_of(Specimen("a"), readings[5]) == fault_of(Specimen("a"), readings[0]) == ""


# files that once took gigabytes or minutes


@pytest.mark.parametrize(("count", "passes"), [(50, True), (5000, False)])
def test_a_jpeg_of_too_many_scans_is_rejected(count: int, passes: bool, tmp_path: Path) -> None:
    data = zoo.scans(640, count)
    if passes:
        (tmp_path / "image").write_bytes(data)
        assert read_image(tmp_path / "image").shape == (640, 640)
    else:
        assert "more than 64 scans" in refusal(data, tmp_path)


def test_a_jpeg_of_many_exif_blocks_is_rejected(tmp_path: Path) -> None:
    assert "EXIF" in refusal(zoo.many_exif(200), tmp_path)


def test_a_tiff_of_huge_tiles_or_tags_is_rejected(tmp_path: Path) -> None:
    assert "tiles" in refusal(zoo.tile_bomb(), tmp_path)
    tags = {**zoo.GREY_64, 259: (1, 1), 273: (2_000_000, 200), 278: (1, 64), 279: (1, 4096)}
    assert "million numbers" in refusal(zoo.tiff_of(tags, bytes(4096)), tmp_path)
    nested = {**zoo.GREY_64, 259: (1, 1), 273: (1, 8), 278: (1, 64), 279: (1, 4096), 0x8769: (1, 8)}
    inner = struct.pack("<HHHII", 1, 40962, 4, 2_000_000, 0) + bytes(4096)
    assert "million numbers" in refusal(zoo.tiff_of(nested, inner), tmp_path)


def test_a_sparse_file_is_rejected_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(GOOD["png"][0])
    os.truncate(path, 600 * 2**20)
    with pytest.raises(BadImage, match="more than 512 MiB"):
        read_image(path)


def test_a_deflated_dicom_file_is_rejected_before_it_is_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covid_cls.data.dicom.dcmread", lambda *_, **__: pytest.fail("pydicom inflates the file"))
    assert "deflated" in refusal(zoo.deflate_bomb(2), tmp_path)


@pytest.mark.parametrize(
    ("syntax", "frame"),
    [
        (JPEGBaseline8Bit, zoo.grown(zoo.JPEG, 65_500)),
        (JPEGBaseline8Bit, zoo.JPEG[:2] + b"\xff\xfe\0\4ab" + zoo.grown(zoo.JPEG, 200)[2:]),
        (JPEG2000Lossless, zoo.grown(zoo.JPEG_2000, 40_000)),
        (JPEG2000Lossless, b"\0\0\0\x0cjP  \r\n\x87\n" + zoo.grown(zoo.JPEG_2000, 200)),
        (JPEG2000Lossless, zoo.JPEG_2000 + zoo.grown(zoo.JPEG_2000, 200)),
        (JPEG2000Lossless, zoo.JPEG),
        (JPEGBaseline8Bit, zoo.JPEG_2000),
        (RLELossless, bytes(64) + b"\x81\x05" * 1_000_000),
    ],
)
def test_compressed_pixels_of_another_size_than_the_header_are_not_decoded(
    syntax: str, frame: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covid_cls.data.dicom.pixel_array", lambda image: pytest.fail("decoded"))
    reason = refusal(zoo.dicom(radiograph(RAMP8, 8), syntax, frame), tmp_path)
    assert "pixel data" in reason or "longer than" in reason


def test_a_jpeg_of_many_scans_in_a_dicom_file_is_rejected(tmp_path: Path) -> None:
    image = radiograph(np.zeros((640, 640), np.uint8), 8)
    assert "64 scans" in refusal(zoo.dicom(image, JPEGBaseline8Bit, zoo.scans(640, 5000)), tmp_path)


@pytest.mark.parametrize("name", zoo.DICOMS)
def test_a_damaged_dicom_file_never_crashes_the_process(name: str, tmp_path: Path) -> None:
    data = zoo.DICOMS[name][0]
    paths = [tmp_path / str(number) for number in range(40)]
    for number, path in enumerate(paths):
        path.write_bytes(zoo.flipped(data, random.Random(number)))
    assert {reading.end for reading in read_all(paths, read_image)} <= {"read", "refused"}
