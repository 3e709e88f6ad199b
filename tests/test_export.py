"""`export` of a small model: what it prints, and the scores of its files in onnxruntime and in torch."""

import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from covid_cls.bundle import onnx_export
from covid_cls.bundle.files import CARD, RECORD, WEIGHTS
from covid_cls.bundle.model import load
from covid_cls.data.phantoms import build_phantoms
from covid_cls.data.readers import read_image
from covid_cls.errors import ExportError, InputError
from covid_cls.export import _export as export_job
from covid_cls.io import DISCLAIMER
from tests.bundle.small import small_model
from tests.conftest import Command, command, quick_job


@pytest.fixture(scope="module")
def export(environment: dict[str, str]) -> Command:
    """`export` in this process."""
    return command("export", environment)


@pytest.fixture(autouse=True)
def small_images_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the speed on images of 64 x 64 pixels instead of 1024 x 1024: the numbers are not looked at."""
    monkeypatch.setattr(onnx_export, "TIMED_SIDE", 64)


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with its model; not to be changed."""
    folder = tmp_path_factory.mktemp("outputs") / "set" / "cell"
    small_model(folder / "model", cache, "task=three_class")
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six radiographs and a note."""
    folder = tmp_path_factory.mktemp("scans")
    for picture in (build_phantoms(tmp_path_factory.mktemp("set"), images=6).parent / "images").rglob("*.png"):
        shutil.copy(picture, folder)
    (folder / "note.txt").write_text("a note")
    return folder


def same_scores(run: Path, picture: Path, logits: np.ndarray, probabilities: np.ndarray) -> None:
    """The exported scores of a picture beside the row that the model's table has of it."""
    model = load(run, "cpu")
    table = model.predict([picture], threshold="argmax")
    for scores, kind in ((logits, "logit"), (probabilities, "calibrated")):
        theirs = table[[f"{kind}_{name}" for name in model.task.classes]].to_numpy(dtype=np.float64)
        np.testing.assert_allclose(scores, theirs, atol=1e-4, rtol=0)


@pytest.mark.slow(reason="the ONNX export of a ResNet18 takes 20 s; the quick tier exports a torch program")
def test_an_onnx_file_gives_the_numbers_of_predict(run: Path, scans: Path, export: Command, tmp_path: Path) -> None:
    done = export(tmp_path, f"output_root={run.parents[1]}", "model=set/cell", f"input={scans}", "output=a/model.onnx")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "model.onnx"]
    lines = done.stdout.splitlines()
    assert len(lines) == 9, done.stdout
    assert "1 files cannot be read and are not compared: note.txt: a text file, not an image" in done.stdout
    found = re.findall(r"\d {3}(.*): (\S+) of a logit, (\S+) of a probability", done.stdout)
    assert [where for where, _, _ in found] == ["random images of several sizes", f"6 of 7 files of {scans}"]
    assert max(float(gap) for _, *gaps in found for gap in gaps) <= 1e-4
    assert re.search(r"batch of 8: covid_cls \d+\.\d, onnx file \d+\.\d", done.stdout)
    size = (tmp_path / "a" / "model.onnx").stat().st_size
    assert f"a/model.onnx: {size / 1e6:.1f} MB" in done.stdout
    assert DISCLAIMER in done.stdout
    session = onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx")
    picture = sorted(scans.glob("*.png"))[0]
    same_scores(run, picture, *session.run(None, {"images": read_image(picture)[None, None]}))


def test_a_torch_program_gives_the_numbers_of_predict(run: Path, scans: Path, export: Command, tmp_path: Path) -> None:
    done = export(tmp_path, f"model={run / 'model'}", "format=torch")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "6 phantoms, since input= is not given" in done.stdout
    program = torch.export.load(tmp_path / "outputs" / "exports" / "small.pt2").module()
    picture = sorted(scans.glob("*.png"))[0]
    with torch.inference_mode():
        scores = program(torch.from_numpy(read_image(picture)[None, None]))
    same_scores(run, picture, *(score.numpy() for score in scores))


def test_a_file_that_scores_otherwise_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx_export.model_function(load(run, "cpu"))
    monkeypatch.setattr(onnx_export, "export_model", lambda model, kind: b"a program")
    monkeypatch.setattr(
        onnx_export, "exported_function", lambda data, kind: lambda x: tuple(s + 2e-4 for s in model(x))
    )
    (tmp_path / "model.pt2").write_text("earlier")
    with pytest.raises(ExportError, match="the torch file does not give the scores of the model"):
        export_job(quick_job("export", f"model={run}", "format=torch", f"output={tmp_path / 'model.pt2'}"))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["earlier"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=nowhere"], "model=nowhere: no such folder"),
        (["model={run}", "format=tflite"], "format=tflite: unknown; choose one of onnx, torch"),
        (["model={run}", "input=nowhere"], "input=nowhere: no such file or folder"),
        (["model={run}", "input={scans}/note.txt"], "none of 1 files can be read: note.txt: a text file"),
        (["model={run}", "output={scans}"], "give the name of a file outside the model folder"),
        (["model={run}", "output={run}/model/model.json"], "give the name of a file outside the model folder"),
        (["model={run}", "output=7"], "output=7: Hydra does not read this as a path"),
    ],
)
def test_a_fault_of_the_input_leaves_nothing(
    words: list[str], message: str, run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        export_job(quick_job("export", *(word.format(run=run, scans=scans) for word in words)))
    assert list(tmp_path.iterdir()) == []
    assert sorted(p.name for p in (run / "model").iterdir()) == sorted([CARD, RECORD, WEIGHTS])


def test_a_missing_model_is_one_line_and_exit_code_2(export: Command, tmp_path: Path) -> None:
    done = export(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: model is not set: give model=… on the command line\n"


def test_help_says_what_a_user_must_know(export: Command, tmp_path: Path) -> None:
    done = export(tmp_path, "--help")
    assert done.returncode == 0
    for word in ("model=", "format=torch", "output=", "input", "uint8", "InferenceSession", "torch.export.load"):
        assert word in done.stdout
    assert DISCLAIMER in done.stdout
    assert list(tmp_path.iterdir()) == []
