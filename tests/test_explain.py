"""`explain` on a finished run; its page for maps that pass the randomisation test, and for maps that fail it."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from covid_cls.attribution import maps
from covid_cls.attribution.map_metrics import MapMetrics, summarise_maps
from covid_cls.bundle.model import load
from covid_cls.errors import InputError
from covid_cls.io import DISCLAIMER, TEST_ACCESSES
from covid_cls.reporting.explain_page import (
    Explained,
    MappedImage,
    Options,
    check_options,
    explain_images,
    input_images,
    text_lines,
    write_explained,
)
from covid_cls.tasks import TASKS
from tests.conftest import Command, FinishedRuns, command

FACTS = {"model": "a model", "images": "some images", "command": "python -m covid_cls.explain"}
# After one epoch, validation may give no threshold.
QUICK = ("steps=2", "draws=1", "threshold=argmax")


@pytest.fixture(scope="module")
def explain(environment: dict[str, str]) -> Command:
    """Return a function that runs `explain` in this process."""
    return command("explain", environment)


@pytest.fixture(scope="module")
def of_split(explain: Command, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output for the validation split of a run."""
    folder = tmp_path_factory.mktemp("split")
    done = explain(folder, f"run={run}", *QUICK, "output=out")
    assert done.returncode == 0, done.stderr
    assert f"results in {Path('out')}" in done.stdout
    return folder / "out"


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path / "explain.csv", keep_default_na=False, na_values=[""], dtype={"reasons": str})


def explained(similarity: list[float], n: int = 1) -> Explained:
    """Return maps with known similarities to those of re-initialised networks; the first `n` are to be drawn."""
    rng = np.random.default_rng(0)
    numbers = pd.DataFrame([MapMetrics(0.3, 0.5, 0.25, s, 0.4, 0.8, 0.6, 0.7) for s in similarity])
    ids = [f"scan $x_{k}$ 日本.png" for k in range(len(similarity))]
    table = numbers.assign(
        image_id=ids, patient_id="", label="covid", target="covid", decision="covid", calibrated_covid=0.75, detail=""
    )
    summary = summarise_maps(table, TASKS["binary"], 64)
    images = [
        MappedImage(k, table.loc[k].to_dict(), *(rng.integers(0, 256, (64, 64), dtype=np.uint8), heat, heat > 0.5))
        for k, heat in enumerate(rng.random((n, 64, 64), dtype=np.float32))
    ]
    return Explained(table, summary, images if summary["weights"]["passed"] else [], ["a note"])


def test_every_image_of_a_split_gets_its_metrics(of_split: Path, run: Path) -> None:
    table, record = read(of_split), json.loads((of_split / "explain.json").read_text())
    val = pd.read_csv(run / "predictions-val.csv")
    assert table["image_id"].tolist() == val["image_id"].tolist()
    assert table["label"].tolist() == val["label"].tolist()
    np.testing.assert_allclose(table["prob_covid"], val["prob_covid"], atol=1e-5)
    decided = table["decision"] != "undecided"
    assert (table["target"] == table["decision"])[decided].all()
    assert set(table["target"]) <= {"covid", "normal"}
    mapped = table[table["similarity"].notna()]
    assert mapped["border"].between(0, 1).all()
    assert mapped["lungs"].between(0, 1).all()  # phantoms have masks
    assert table["lungs_area"].between(0.15, 0.6).all()
    assert record["n_images"] == len(val)
    assert record["n_maps"] == len(mapped)
    assert record["disclaimer"] == DISCLAIMER
    if len(mapped):
        share = record["where"]["all"]["lungs"]["share"]
        assert share["value"] == pytest.approx(mapped["lungs"].mean())
        assert share["low"] < share["value"] < share["high"]


def test_figures_exist_only_if_the_maps_pass_the_randomisation_test(of_split: Path) -> None:
    record, table = json.loads((of_split / "explain.json").read_text()), read(of_split)
    drawn = sorted((of_split / "overlays").glob("*.png"))
    assert (of_split / "contact_sheet.png").is_file() == bool(record["weights"]["passed"]) == bool(drawn)
    if drawn:
        assert len(drawn) == table["published"].sum()
    page = (of_split / "explain.html").read_text()
    assert DISCLAIMER in page
    assert ("data:image/jpeg" in page) == bool(drawn)


def test_labels_and_masks_are_read_from_a_manifest(explain: Command, run: Path, phantoms: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(phantoms, dtype=str)
    rows = rows[rows["path"].isin(pd.read_csv(run / "predictions-val.csv")["image_id"])].head(3)
    rows["mask"] = [rows["mask"].iloc[0], "", rows["mask"].iloc[2]]
    for name in [*rows["path"], *filter(None, rows["mask"])]:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(phantoms.parent / name, tmp_path / "set" / name)
    rows.to_csv(tmp_path / "set" / "part.csv", index=False)
    words = (f"model={run / 'model'}", "input=set/part.csv", "target=label", "output=out", *QUICK, "steps=0")
    done = explain(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    table = read(tmp_path / "out")
    assert table["image_id"].tolist() == rows["path"].tolist()
    assert table["target"].tolist() == rows["label"].tolist()
    assert table["lungs_area"].isna().tolist() == [False, True, False]
    assert table["deletion"].isna().all()


def test_a_file_that_cannot_be_read_has_a_row_too(
    explain: Command, run: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 9 squares are hidden instead of 169, because each needs a prediction.
    monkeypatch.setitem(maps.METHODS, "occlusion", partial(maps.occlusion, patch=24))
    name = pd.read_csv(run / "predictions-val.csv")["image_id"][0]
    source = phantoms.parent / name
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.png").write_bytes(source.read_bytes())
    (tmp_path / "scans" / "b.png").write_bytes(source.read_bytes()[:500])
    done = explain(tmp_path, f"model={run}", "input=scans", "method=occlusion", *QUICK, "output=out")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 images cannot be read" in done.stdout
    table = read(tmp_path / "out")
    assert table["image_id"].tolist() == ["a.png", "b.png"]
    assert table["reasons"][1] == "unreadable"
    assert table.loc[1, ["target", "border", "similarity"]].isna().all()
    assert not table["published"][1]


def test_an_access_to_the_test_split_is_logged(explain: Command, finished_runs: FinishedRuns, tmp_path: Path) -> None:
    run = finished_runs.copy(tmp_path, "baselines=false")
    done = explain(tmp_path, f"run={run}", "split=test", *QUICK, "figures=0", "output=out")
    assert done.returncode == 0, done.stderr
    _, line = (run / TEST_ACCESSES).read_text().splitlines()
    assert "covid_cls.explain" in line
    assert "split=test" in line
    assert not (tmp_path / "out" / "contact_sheet.png").exists()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("input=scan.png",), "give model=FOLDER with input=IMAGES, or run=FOLDER"),
        (("model=nowhere", "input=words.png"), "model=nowhere: no such folder (searched in "),
        (("run=RUN", "split=all"), "split=all: must be one of train, val, test"),
        (("model=RUN", "input=words.png"), "none of the 1 files can be read: words.png"),
    ],
)
def test_faults_are_one_line_and_exit_with_2(
    explain: Command, run: Path, tmp_path: Path, words: tuple[str, ...], fault: str
) -> None:
    (tmp_path / "words.png").write_text("no picture")
    done = explain(tmp_path, "threshold=argmax", *(word.replace("RUN", str(run)) for word in words))
    assert done.returncode == 2
    assert fault in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ({"target": "pneumonia"}, "target=pneumonia: must be one of decided, label, covid, normal"),
        ({"method": "lime"}, "method=lime: must be one of grad_cam, occlusion"),
        ({"draws": 0}, "draws=0: must be at least 1"),
        ({"figures": -1}, "figures=-1: must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(option: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=re.escape(fault)):
        check_options(Options(**option), TASKS["binary"])


def test_explaining_the_label_requires_labels(run: Path, tmp_path: Path) -> None:
    (tmp_path / "scan.png").write_text("never opened")
    with pytest.raises(InputError, match="target=label: 1 images have no label of task binary: scan"):
        explain_images(load(run), input_images(str(tmp_path / "scan.png")), Options(target="label"))


def test_help_needs_no_model(explain: Command, tmp_path: Path) -> None:
    done = explain(tmp_path, "--help")
    assert done.returncode == 0
    assert "python -m covid_cls.explain model=" in done.stdout
    assert DISCLAIMER in done.stdout


def test_maps_that_pass_are_drawn_and_described(tmp_path: Path) -> None:
    write_explained(tmp_path, explained([0.1] * 8, n=2), Options(), FACTS)
    drawn = sorted(path.name for path in (tmp_path / "overlays").iterdir())
    assert drawn == [f"000{k}_scan_x_{k - 1}_.png" for k in range(1, 3)]
    for path in (tmp_path / "contact_sheet.png", tmp_path / "overlays" / drawn[0]):
        with Image.open(path) as image:
            assert min(image.size) > 400
    page = (tmp_path / "explain.html").read_text()
    assert "passes the randomisation test: 100% of 8 maps change" in page
    assert "data:image/jpeg;base64," in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)  # it needs no other file
    assert "2.00" in page  # lungs: 0.5 of the map on 0.25 of the area


def test_maps_that_fail_the_randomisation_test_are_not_drawn_and_old_figures_are_removed(tmp_path: Path) -> None:
    write_explained(tmp_path, explained([0.1] * 8, n=1), Options(), FACTS)
    (tmp_path / "overlays" / "mine.png").write_bytes(b"kept")
    failed = explained([0.1] * 6 + [0.9] * 2)
    write_explained(tmp_path, failed, Options(), FACTS)
    assert [path.name for path in (tmp_path / "overlays").iterdir()] == ["mine.png"]
    assert not (tmp_path / "contact_sheet.png").exists()
    page = (tmp_path / "explain.html").read_text()
    assert "No figure: Grad-CAM fails the randomisation test. Only 75% of 8 maps change" in page
    assert "data:image" not in page
    assert "No figure" in text_lines(failed, "grad_cam")[0]
    assert json.loads((tmp_path / "explain.json").read_text())["weights"]["passed"] is False
