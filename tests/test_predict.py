"""`predict` on a finished run: its table, errors of the input, and what it must not print about patients."""

import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from covid_cls.bundle.model import PredictionSummary
from covid_cls.errors import InputError
from covid_cls.io import DISCLAIMER, read_predictions
from covid_cls.predict import _predict as predict_job
from covid_cls.tasks import TASKS
from tests.conftest import Command, command, quick_job, starter
from tests.data.test_dicom import radiograph

TASK = TASKS["binary"]
ARGMAX = "threshold=argmax"  # so short a training gives no threshold that is worth one


@pytest.fixture(scope="module")
def predict(environment: dict[str, str]) -> Command:
    """`predict` in this process."""
    return command("predict", environment)


def ids(run: Path, split: str) -> list[str]:
    return read_predictions(run / f"predictions-{split}.csv", TASK.classes)["image_id"].tolist()


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"reasons": str, "detail": str}, keep_default_na=False, na_values=[""])


def test_the_table_has_the_numbers_of_the_run(run: Path, phantoms: Path, predict: Command, tmp_path: Path) -> None:
    done = predict(tmp_path, ARGMAX, f"model={run}", f"input={phantoms}", "batch_size=7", "output=sub/table.csv")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [p.name for p in tmp_path.rglob("*")] == ["sub", "table.csv"]
    ours = read(tmp_path / "sub" / "table.csv")
    assert ours["image_id"].tolist() == pd.read_csv(phantoms)["path"].tolist()
    for split in ("val", "test"):
        theirs = read_predictions(run / f"predictions-{split}.csv", TASK.classes).set_index("image_id")
        scores = [column for column in theirs.columns if column.startswith(("logit_", "prob_"))]
        assert len(scores) == 2 * len(TASK.classes)
        same = ours.set_index("image_id").loc[theirs.index, scores]
        np.testing.assert_allclose(same, theirs[scores], atol=1e-5, rtol=0)
    calibrated = ours[[f"calibrated_{name}" for name in TASK.classes]]
    np.testing.assert_allclose(calibrated.sum(axis=1), 1, atol=1e-9)
    assert set(ours["decision"]) <= {*TASK.classes, "undecided"}
    assert ((ours["decision"] == "undecided") == ours["reasons"].notna()).all()
    assert DISCLAIMER in done.stdout
    assert f"{len(ours)} images" in done.stdout


@pytest.fixture
def mixed(phantoms: Path, tmp_path: Path) -> Path:
    """A folder of PNG, JPEG and DICOM files, and of files that are none of these."""
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    png = next(phantoms.parent.rglob("*.png"))
    grey = Image.open(png).convert("L")
    shutil.copy(png, folder / "d.png")
    grey.save(folder / "c.jpg", quality=95)
    radiograph(np.asarray(grey), 8).save_as(folder / "deep" / "IM1", enforce_file_format=True)
    radiograph(np.asarray(grey), 8, ViewPosition="LL").save_as(folder / "deep" / "IM2.dcm", enforce_file_format=True)
    (folder / "a.png").write_bytes(png.read_bytes()[:500])
    (folder / "b.txt").write_text("a note")
    os.mkfifo(folder / "pipe")
    return folder


def test_a_folder_of_all_sorts_is_a_table_with_a_row_for_each(
    run: Path, mixed: Path, predict: Command, tmp_path: Path
) -> None:
    done = predict(tmp_path, ARGMAX, f"model={run / 'model'}", "input=mixed")
    assert done.returncode == 0, done.stderr
    table = read(tmp_path / "outputs" / "predictions" / "mixed.csv").set_index("image_id")
    assert table.index.tolist() == ["a.png", "b.txt", "c.jpg", "d.png", "deep/IM1", "deep/IM2.dcm", "pipe"]
    bad = ["a.png", "b.txt", "pipe"]
    assert (table.loc[bad, "reasons"] == "unreadable").all()
    assert table["detail"].notna().tolist() == [name in bad for name in table.index]
    assert table.loc[bad, "prob_covid"].isna().all()
    assert "lateral_view" in table.loc["deep/IM2.dcm", "reasons"].split(";")
    np.testing.assert_allclose(table.loc["deep/IM1", "prob_covid"], table.loc["deep/IM2.dcm", "prob_covid"], atol=1e-6)
    assert "lateral_view" in done.stdout
    assert "b.txt: a text file, not an image" in done.stdout
    assert "3 unreadable" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["input=mixed"], "model is not set: give model="),
        (["model={run}"], "input is not set: give input="),
        (["model={run}", "input=nowhere"], "input=nowhere: no such file or folder (looked in "),
        (["model=nowhere", "input=mixed"], "model=nowhere: no such folder"),
        (["model={run}", "input=5"], "input=5: Hydra does not read this as a path"),
        (["model={run}", "input=mixed", "threshold=0.5"], "threshold=0.5: expected str"),
        (["model={run}", "input=mixed", "threshold=best"], "threshold=best: unknown. This model has "),
        (["model={run}", "input=mixed", "batch_size=0"], "batch_size=0: must be at least 1"),
        (["model={run}", "input=mixed", "dicom_tags=[PatientsName]"], "did you mean PatientName"),
        (["model={run}", "input=mixed", "device=moon"], "device=moon"),
        (["model={run}", "input=mixed", "output=mixed"], "output=mixed: is a folder"),
        (["model={run}", "input=mixed", "output=mixed/d.png"], "output=mixed/d.png: is one of the input files"),
        (["model={run}", "input=mixed/b.txt"], "b.txt: a text file, not an image"),
        (["model={run}", "input=mixed/pipe"], "pipe: not a regular file"),
    ],
)
def test_a_fault_of_the_input_is_named_and_leaves_nothing(
    words: list[str], message: str, run: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mixed.parent)
    before = sorted(mixed.rglob("*"))
    with pytest.raises(InputError, match=re.escape(message)):
        predict_job(quick_job("predict", ARGMAX, "device=cpu", *(word.format(run=run) for word in words)))
    assert sorted(mixed.rglob("*")) == before
    assert not list(mixed.parent.rglob("*.csv*"))


def test_a_fault_is_one_line_and_exit_code_2(run: Path, mixed: Path, predict: Command) -> None:
    done = predict(mixed.parent, ARGMAX, f"model={run}", "input=mixed/b.txt")
    assert done.returncode == 2
    assert done.stderr == "error: none of 1 files can be read: b.txt: a text file, not an image\n"


def test_an_earlier_table_is_kept_until_there_is_another(
    run: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("earlier")
    words = [ARGMAX, "device=cpu", f"model={run}", "output=table.csv"]
    with pytest.raises(InputError):
        predict_job(quick_job("predict", *words, "input=mixed/b.txt"))
    assert (tmp_path / "table.csv").read_text() == "earlier"
    predict_job(quick_job("predict", *words, "input=mixed/*.jpg"))
    assert read(tmp_path / "table.csv")["image_id"].tolist() == ["c.jpg"]


def test_ctrl_c_leaves_no_half_table(
    run: Path, mixed: Path, predict: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def stop(self: PredictionSummary, table: pd.DataFrame) -> None:  # called after the rows of a batch are written
        written.extend((tmp_path / "out").iterdir())
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(PredictionSummary, "add", stop)
    done = predict(tmp_path, ARGMAX, f"model={run}", "input=mixed", "batch_size=1", "output=out/table.csv")
    assert done.returncode == 130
    assert done.stderr == "stopped by SIGINT: the results are incomplete\n"
    assert len(written) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_help_says_what_a_user_must_know(predict: Command, tmp_path: Path) -> None:
    done = predict(tmp_path, "--help")
    assert done.returncode == 0
    for word in ("model=", "input=", "threshold", "dicom_tags", "undecided", DISCLAIMER):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


# patients


def planted(number: int) -> str:
    return f"Qz{number:03}Xv"


SECRETS = {
    "PatientName": planted(1), "PatientID": planted(2), "OtherPatientNames": planted(3), "PatientAddress": planted(4),
    "PatientBirthDate": "19371109", "PatientBirthTime": "031417", "PatientComments": planted(5),
    "AccessionNumber": planted(6), "ReferringPhysicianName": planted(7), "InstitutionName": planted(8),
    "StudyDate": "19981203", "StudyDescription": planted(9), "SeriesDescription": planted(10), "StudyID": planted(11),
    "OperatorsName": planted(12), "StationName": planted(13), "EthnicGroup": planted(14), "Occupation": planted(15),
    "ImageComments": planted(16), "DeviceSerialNumber": planted(17), "ProtocolName": planted(18),
    "StudyInstanceUID": "1.2.826.0.1.777555.19", "PatientAge": "083Y", "MilitaryRank": planted(20),
    "ResponsiblePerson": planted(21), "PatientTelephoneNumbers": planted(22), "MedicalRecordLocator": planted(23),
}  # fmt: skip
PRIVATE, NESTED = planted(40), planted(41)
WORDS = [value for tag, value in SECRETS.items() if tag != "PatientAge"] + [PRIVATE, NESTED]  # 083Y is no one's alone


def patient(pixels: np.ndarray) -> Dataset:
    """A radiograph with a planted value in every tag that may name a patient."""
    image = radiograph(pixels, 8, **SECRETS)
    image.add_new(0x00091010, "LO", PRIVATE)
    image.add_new(0x00091011, "UN", PRIVATE.encode())
    item = Dataset()
    item.PatientID = NESTED
    image.ReferencedPatientSequence = Sequence([item])
    return image


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: int(len(whole) * share)]


def _noise(seed: int) -> Callable[[bytes], bytes]:
    def noisy(whole: bytes) -> bytes:
        random.seed(seed)
        data = bytearray(whole)
        for _ in range(60):
            data[random.randrange(132, 1500)] = random.randrange(256)
        return bytes(data)

    return noisy


def _swapped(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def swapped(whole: bytes) -> bytes:
        assert old in whole
        return whole.replace(old, new, 1)

    return swapped


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "good": lambda whole: whole,
    "half": _cut(0.5),
    "stub.dcm": _cut(0.01),
    "no_preamble.dcm": lambda whole: whole[132:],
    "noise1": _noise(1),
    "noise2": _noise(2),
    "noise3": _noise(3),
    "syntax": _swapped(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"),
    "implicit": _swapped(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0"),
    "deflated": _swapped(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"[:20]),
    "photometric": _swapped(b"MONOCHROME2 ", planted(1).encode() + b"1234567"[:5]),
    "length": _swapped(b"PN\x08\0", b"PN\xff\xff"),
    "vr": _swapped(b"PN\x08\0", b"US\x08\0"),
    "charset": lambda whole: whole.replace(b"\x08\0\x20\0DA", b"\x08\0\x05\0CS", 1),  # a date as the character set
}


@pytest.fixture
def ward(phantoms: Path, tmp_path: Path) -> Path:
    """DICOM files full of planted values, good and damaged."""
    folder = tmp_path / "ward"
    folder.mkdir()
    grey = np.asarray(Image.open(next(phantoms.parent.rglob("*.png"))).convert("L"))
    patient(grey).save_as(folder / "good", enforce_file_format=True)
    whole = (folder / "good").read_bytes()
    assert all(word.encode() in whole for word in WORDS)
    for name, damage in DAMAGES.items():
        (folder / name).write_bytes(damage(whole))
    return folder


def leaks(text: str, words: list[str]) -> list[str]:
    return [word for word in words if word in text]


@pytest.mark.parametrize(
    "kind",
    [
        command,
        pytest.param(
            starter, marks=pytest.mark.slow(reason="pytest keeps warnings from the stderr of its own process")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_no_patient_tag_reaches_console_log_or_table(
    kind: Callable[..., Command], run: Path, ward: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    predict = kind("predict", environment)
    done = predict(tmp_path, ARGMAX, f"model={run}", "input=ward", "hydra.verbose=true")  # every logger says all it can
    assert done.returncode == 0, done.stderr
    written = "".join(path.read_text() for path in (tmp_path / "outputs").rglob("*") if path.is_file())
    assert leaks(done.stdout + done.stderr + written, WORDS) == []
    table = read(tmp_path / "outputs" / "predictions" / "ward.csv").set_index("image_id")
    assert table.index.tolist() == sorted(DAMAGES)
    assert table["detail"].isna()["good"]
    assert table["detail"].notna().sum() >= 6  # the damages are damages


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("name", ["half", "length", "photometric", "stub.dcm"])
def test_a_file_that_alone_is_damaged_names_no_patient(
    name: str, run: Path, ward: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [ARGMAX, "device=cpu", f"model={run}", f"input={ward / name}", f"output={tmp_path / 'table.csv'}"]
    with pytest.raises(InputError, match=f"none of 1 files can be read: {name}: ") as error:
        predict_job(quick_job("predict", *words))
    assert leaks("".join([str(error.value), *capfd.readouterr()]), WORDS) == []


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_tag_asked_for_reaches_the_table_and_nothing_else(
    run: Path, ward: Path, predict: Command, tmp_path: Path
) -> None:
    done = predict(tmp_path, ARGMAX, f"model={run}", "input=ward", "dicom_tags=[PatientID,StudyDate]")
    assert done.returncode == 0, done.stderr
    asked = [SECRETS["PatientID"], SECRETS["StudyDate"]]
    table = (tmp_path / "outputs" / "predictions" / "ward.csv").read_text()
    assert leaks(table, WORDS) == asked
    assert leaks(done.stdout + done.stderr, WORDS) == []
    good = pd.read_csv(tmp_path / "outputs" / "predictions" / "ward.csv", dtype=str).set_index("image_id").loc["good"]
    assert [good["PatientID"], good["StudyDate"]] == asked
