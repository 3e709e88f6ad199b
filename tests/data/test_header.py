"""Which kind of picture a DICOM file says it holds, and the tags asked for by name: these, and no others."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from pydicom.dataset import Dataset

from covid_cls.data.header import REASONS, check_tags, read_header
from covid_cls.errors import InputError
from tests.data.test_dicom import RAMP8, SECRET, radiograph, saved

# pytest gives each test warning filters of its own; what pydicom says of these headers is not the matter here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def codes(folder: Path, **tags: object) -> list[str]:
    found, _ = read_header(saved(radiograph(**tags), folder))
    assert set(found) <= set(REASONS)
    return found


@pytest.mark.parametrize("view", ["LL", "RL", "LATERAL", "lateral ", "XTABLE LATERAL", "LLO", "RAO", "LAT"])
def test_lateral_and_oblique_views_are_named(view: str, tmp_path: Path) -> None:
    assert codes(tmp_path, Modality="DX", BodyPartExamined="CHEST", ViewPosition=view) == ["lateral_view"]


@pytest.mark.parametrize("view", ["PA", "AP", "", None, "AP AXIAL", "LLD", "AP LLD", "LATERAL DECUBITUS"])
def test_frontal_and_unknown_views_are_not(view: str | None, tmp_path: Path) -> None:
    assert codes(tmp_path, Modality="CR", BodyPartExamined="Thorax", ViewPosition=view) == []


@pytest.mark.parametrize(
    ("modality", "part"),
    [("CT", "CHEST"), ("MR", ""), ("MG", "BREAST"), ("DX", "KNEE"), ("CR", "SKULL"), ("PX", None), ("US", "HEART")],
)
def test_other_modalities_and_body_parts_are_named(modality: str, part: str | None, tmp_path: Path) -> None:
    assert codes(tmp_path, Modality=modality, BodyPartExamined=part) == ["not_a_chest_radiograph"]


@pytest.mark.parametrize("part", ["PORT CHEST", "Tórax", "Klatka piersiówa", "CHEST/ABD", "LUNG", "", None])
def test_a_chest_by_another_name_is_let_through(part: str | None, tmp_path: Path) -> None:
    assert codes(tmp_path, Modality="DX", BodyPartExamined=part) == []


def test_both_can_be_said_of_one_picture(tmp_path: Path) -> None:
    assert codes(tmp_path, Modality="DX", BodyPartExamined="ANKLE", ViewPosition="LL") == list(REASONS)


def test_a_header_that_says_nothing_gives_no_reason(tmp_path: Path) -> None:
    assert codes(tmp_path) == []


def test_tags_asked_for_are_text_and_absent_ones_are_empty(tmp_path: Path) -> None:
    image = radiograph(StudyDate="20200310", ImageType=["ORIGINAL", "PRIMARY"], SeriesNumber=7, PatientAge=None)
    names = ("PatientName", "StudyDate", "ImageType", "SeriesNumber", "PatientAge", "StudyTime")
    expected = (SECRET, "20200310", "ORIGINAL\\PRIMARY", "7", "", "")
    assert read_header(saved(image, tmp_path), names)[1] == dict(zip(names, expected, strict=True))


def test_no_tag_is_parsed_unasked(tmp_path: Path) -> None:
    path = saved(radiograph(Modality="CT"), tmp_path)
    assert read_header(path) == (["not_a_chest_radiograph"], {})


def test_a_file_without_preamble_goes_by_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "bare.dcm"
    image = radiograph(Modality="CT")
    bare = Dataset()
    bare.update(image)
    bare.save_as(path, implicit_vr=True, little_endian=True)
    assert path.read_bytes()[128:132] != b"DICM"
    assert read_header(path)[0] == ["not_a_chest_radiograph"]


def test_a_picture_that_is_no_dicom_file_has_neither(tmp_path: Path) -> None:
    Image.fromarray(RAMP8).save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png", ("PatientID",)) == ([], {})


def test_a_damaged_tag_is_left_empty_and_spoils_no_other(tmp_path: Path) -> None:
    path = saved(radiograph(Modality="DX", SeriesNumber=123456, StudyDate="20200310"), tmp_path)
    whole = path.read_bytes()
    assert whole.count(b"IS\x06\x00123456") == 1
    path.write_bytes(whole.replace(b"IS\x06\x00123456", b"FD\x06\x00123456"))  # no whole number of doubles
    assert read_header(path, ("SeriesNumber", "StudyDate"))[1] == {"SeriesNumber": "", "StudyDate": "20200310"}


@pytest.mark.parametrize(
    ("name", "words"), [("PatientsID", "PatientID"), ("PixelData", "no text"), ("VOILUTSequence", "no text")]
)
def test_a_tag_that_cannot_be_a_column_is_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_tags(["StudyDate", name])


def test_pydicom_is_not_imported_for_other_files(tmp_path: Path) -> None:
    Image.fromarray(RAMP8).save(tmp_path / "a.png")
    code = (
        "import sys; from pathlib import Path; from covid_cls.data.header import read_header; "
        f"read_header(Path({str(tmp_path / 'a.png')!r})); assert 'pydicom' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
