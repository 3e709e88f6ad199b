"""Baselines detect planted shortcuts, detect nothing in clean data, and never see the labels they predict."""

from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.image_source import DataSettings
from covid_cls.data.manifest import read_manifest
from covid_cls.data.phantoms import build_phantoms
from covid_cls.errors import InputError
from covid_cls.evaluation.intervals import score_intervals
from covid_cls.evaluation.metrics import decide
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.io import read_json, read_predictions
from covid_cls.shortcuts.baselines import (
    BASELINES,
    baseline_notes,
    cross_validated_baselines,
    read_headers,
    source_within_class,
    thumbnails,
    write_baselines,
)
from covid_cls.tasks import TASKS, Task
from covid_cls.training.split_predictions import predict_split
from tests.training.small import compose_small, make_classifier

THREE = TASKS["three_class"]
LIMIT = 0.60  # for the lower end of the interval of the macro AUROC
SEEDS = range(2)


def manifest_of(folder: Path, rows: list[dict[str, str]], pixels: str = "PNG") -> pd.DataFrame:
    """Write a manifest with these rows, each with an image of random noise in its `_format` or `pixels`."""
    rng = np.random.default_rng(0)
    for k, row in enumerate(rows):
        kind = row.pop("_format", pixels)
        row["path"] = f"{k:03d}.{kind.lower()}"
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / row["path"], kind)
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
    return read_manifest(folder / "manifest.csv")


def patients(**columns: list[str]) -> list[dict[str, str]]:
    """Return sixty rows, twenty per class.

    A column with three values has one value per class, any other number of values is assigned at random.
    """
    rng = np.random.default_rng(1)
    return [
        {"label": label} | {name: (v[k] if len(v) == 3 else str(rng.choice(v))) for name, v in columns.items()}
        for _ in range(20)
        for k, label in enumerate(THREE.classes)
    ]


def accuracy(table: pd.DataFrame, task: Task = THREE) -> float:
    truth, prob = truth_and_prob(table, task)
    return float((decide(prob, task) == truth).mean())


def macro_auroc_low(table: pd.DataFrame) -> float:
    return score_intervals(table, THREE, resamples=500)["macro_auroc"].low


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return read_manifest(build_phantoms(tmp_path_factory.mktemp("phantoms"), images=240, seed=1))


@pytest.mark.parametrize(("shortcut", "least", "most"), [("marker", 2, 2), ("none", 0, 0)])
def test_the_frame_baseline_detects_planted_markers_and_nothing_in_clean_data(
    tmp_path: Path, shortcut: str, least: int, most: int
) -> None:
    flagged = 0
    for seed in SEEDS:
        table = read_manifest(build_phantoms(tmp_path / str(seed), images=96, seed=seed, shortcut=shortcut))
        predicted = cross_validated_baselines(table, THREE, tmp_path, seed=seed, names=["frame"], trees=40)
        flagged += macro_auroc_low(predicted["frame"]) > LIMIT
    assert least <= flagged <= most


def test_a_header_that_differs_by_class_predicts_the_class(tmp_path: Path) -> None:
    rows = patients(_format=["PNG", "JPEG", "BMP"])
    predicted = cross_validated_baselines(manifest_of(tmp_path, rows), THREE, tmp_path, names=["header"], trees=20)
    assert accuracy(predicted["header"]) == 1


def test_headers_of_the_published_files_are_preferred(tmp_path: Path) -> None:
    published = {f"orig_{name}": ["7", "8"] for name in ("height", "mode", "format")}
    table = manifest_of(tmp_path, patients(orig_width=["100", "200", "1024"], **published))
    predicted = cross_validated_baselines(table, THREE, tmp_path, names=["header"], trees=20)
    assert accuracy(predicted["header"]) == 1
    assert "orig_width" in baseline_notes(table, tmp_path)["header"]


def test_equal_headers_predict_nothing(tmp_path: Path) -> None:
    predicted = cross_validated_baselines(
        manifest_of(tmp_path, patients()), THREE, tmp_path, names=["header"], trees=20
    )
    assert macro_auroc_low(predicted["header"]) < 0.5


def test_a_view_that_differs_by_class_predicts_the_class(tmp_path: Path) -> None:
    rows = patients(view=["AP", "PA", ""], age=["40", "50", "nan", ""], sex=["F", "F"])
    gaps = sum(row["age"] in ("nan", "") for row in rows)
    table = manifest_of(tmp_path, rows)
    predicted = cross_validated_baselines(table, THREE, tmp_path, names=["metadata"], trees=20)
    assert accuracy(predicted["metadata"]) > 0.95
    seen = f"columns view (empty in 20 of 60 images), age (empty in {gaps} of 60 images) of the manifest"
    assert baseline_notes(table, tmp_path)["metadata"] == seen


def test_metadata_exclude_patient_source_and_finding(tmp_path: Path) -> None:
    hidden = ["finding", "url", "license", "source", "remark"]
    table = manifest_of(tmp_path, patients(view=["PA", "PA"], **{name: ["a", "b", "c"] for name in hidden}))
    assert cross_validated_baselines(table, THREE, tmp_path, names=["metadata"]) == {}
    assert baseline_notes(table, tmp_path)["metadata"].startswith("left out: the manifest has view: the same")


def test_headers_of_all_formats_and_of_damaged_files(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40)).save(tmp_path / "a.jpg")
    Image.new("I;16", (30, 60)).save(tmp_path / "b.png")
    dicom = pydicom.Dataset()
    dicom.Rows, dicom.Columns, dicom.PhotometricInterpretation = 12, 34, "MONOCHROME1"
    dicom.file_meta = pydicom.dataset.FileMetaDataset()
    dicom.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dicom.save_as(tmp_path / "c.dcm", enforce_file_format=False)
    (tmp_path / "d.png").write_bytes((tmp_path / "b.png").read_bytes()[:20])
    (tmp_path / "e.png").write_text("<html>")
    (tmp_path / "f.png").touch()
    files = pd.Series([str(tmp_path / name) for name in ("a.jpg", "b.png", "c.dcm", "d.png", "e.png", "f.png", "no")])
    found = [tuple(row) for row in read_headers(files).itertuples(index=False)]
    bad = (0, 0, "", "")
    assert found == [(50, 40, "RGB", "JPEG"), (30, 60, "I;16", "PNG"), (34, 12, "MONOCHROME1", "DICOM"), *[bad] * 4]


def test_a_thumbnail_shows_the_image_up_to_its_edge(tmp_path: Path) -> None:
    wide = np.full((100, 300), 100, dtype=np.uint8)
    wide[:, :30], wide[:, -30:], wide[:10] = 0, 255, 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    pd.DataFrame({"path": ["a.png", "b.png"], "label": "covid"}).to_csv(tmp_path / "manifest.csv", index=False)
    table = read_manifest(tmp_path / "manifest.csv")
    for _ in range(2):  # decoded first, then read from the cache
        found = thumbnails(table, 10, tmp_path)
        assert (found.shape, found.dtype) == ((2, 10, 10), np.uint8)
        assert (found[0, 3:, 0] < 50).all()
        assert (found[0, 3:, -1] > 205).all()
        assert (found[0, 3:, 3:-3] == 100).all()
        assert found[0, 0, 5] > 150
        assert not found[1].any()


def test_a_damaged_thumbnail_cache_is_an_error(tmp_path: Path) -> None:
    table = manifest_of(tmp_path, patients()[:2])
    thumbnails(table, 8, tmp_path)
    (kept,) = (tmp_path / "thumbnails").glob("8-*.sqlite")
    kept.write_bytes(b"no database" * 200)
    with pytest.raises(InputError, match=r"sqlite.*Delete the file"):
        thumbnails(table, 8, tmp_path)


def test_baselines_see_an_unreadable_image_as_black(tmp_path: Path) -> None:
    rows = patients()
    table = manifest_of(tmp_path, rows)
    Path(table["file"][0]).write_text("no image")
    predicted = cross_validated_baselines(table, THREE, tmp_path, names=["header", "frame", "histogram"], trees=5)
    assert all(len(found) == 60 for found in predicted.values())


def test_every_image_is_predicted_once_and_no_patient_is_in_two_folds(phantoms: pd.DataFrame, tmp_path: Path) -> None:
    first, again = (cross_validated_baselines(phantoms, TASKS["binary"], tmp_path, trees=10) for _ in range(2))
    assert list(first) == list(BASELINES)
    wanted = phantoms[phantoms["label"] != "pneumonia"]
    for name, table in first.items():
        assert table["image_id"].tolist() == wanted["path"].tolist()
        assert set(table["fold"]) == set("01234")
        assert (table.groupby("patient_id")["fold"].nunique() == 1).all()
        truth_and_prob(table, TASKS["binary"])
        pd.testing.assert_frame_equal(table, again[name])


@pytest.fixture(params=["three_class", "three_class_multilabel"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Radiographs:
    settings = DataSettings("phantom", images=48, size=32, cache=str(tmp_path / "cache"))
    return Radiographs(TASKS[request.param], 32, 0, settings)


def write_and_read(data: Radiographs, folder: Path) -> dict[str, pd.DataFrame]:
    write_baselines(data, folder, trees=10)
    return {path.stem: read_predictions(path, data.task.classes) for path in sorted(folder.glob("*.csv"))}


def test_baseline_tables_have_the_rows_and_columns_of_the_run(data: Radiographs, tmp_path: Path) -> None:
    found = write_and_read(data, tmp_path / "run" / "baselines")
    assert set(found) == {f"{name}-{split}" for name in BASELINES for split in ("val", "test")}
    classifier = make_classifier(compose_small(f"task={data.task.name}", "backbone=resnet18"))
    for split in ("val", "test"):
        ids = predict_split(classifier.scorer(), data, split).iloc[:, :6]
        for name in BASELINES:
            table = found[f"{name}-{split}"]
            assert table["image_id"].tolist() == ids["image_id"].tolist()
            assert table["patient_id"].tolist() == ids["patient_id"].tolist()
            truth_and_prob(table, data.task)
    train = data.table[data.table["split"] == "train"]["label"]
    share = {name: (train == name).mean() for name in data.task.classes}
    if data.task.multilabel:
        share["pneumonia"] += share["covid"]  # a covid image is also positive for pneumonia
    for name, wanted in share.items():
        np.testing.assert_allclose(found["majority-test"][f"prob_{name}"], wanted, rtol=1e-8)
    assert set(read_json(tmp_path / "run" / "baselines" / "about.json")) == set(BASELINES)


def test_labels_of_validation_and_test_images_are_not_used(data: Radiographs, tmp_path: Path) -> None:
    before = write_and_read(data, tmp_path / "before")
    held_out = data.table["split"] != "train"
    data.table.loc[held_out, "label"] = data.table.loc[held_out, "label"].to_numpy()[::-1]
    after = write_and_read(data, tmp_path / "after")
    for name, table in before.items():
        assert after[name]["label"].tolist() != table["label"].tolist()
        pd.testing.assert_frame_equal(after[name].iloc[:, 6:], table.iloc[:, 6:])


def test_a_second_run_on_the_same_data_uses_the_cache(data: Radiographs, tmp_path: Path) -> None:
    first = write_and_read(data, tmp_path / "first")
    for file in data.table["file"]:
        Path(file).unlink()
    for name, table in write_and_read(data, tmp_path / "second").items():
        pd.testing.assert_frame_equal(table, first[name])


def test_an_interrupted_computation_is_repeated(data: Radiographs, tmp_path: Path) -> None:
    first = write_and_read(data, tmp_path / "first")
    (cached,) = (path for path in (data.cache / "baselines").iterdir() if path.is_dir())
    (cached / "about.json").unlink()
    (cached / "frame-val.csv").unlink()
    (cached / ".header-val.csv.x.part").touch()
    for name, table in write_and_read(data, tmp_path / "second").items():
        pd.testing.assert_frame_equal(table, first[name])
    assert len(list((tmp_path / "second").iterdir())) == len(list((tmp_path / "first").iterdir()))


def test_only_images_of_the_given_splits_are_read(data: Radiographs, tmp_path: Path) -> None:
    for file in data.table.loc[data.table["split"] == "test", "file"]:
        Path(file).unlink()
    write_baselines(data, tmp_path / "baselines", splits=["val"], trees=10)
    assert {path.stem for path in (tmp_path / "baselines").glob("*.csv")} == {f"{name}-val" for name in BASELINES}


def test_a_visible_source_is_predicted_and_a_random_one_is_not(phantoms: pd.DataFrame, tmp_path: Path) -> None:
    found = source_within_class(phantoms, tmp_path, trees=60)
    assert list(found) == list(THREE.classes)
    for scores in found.values():
        assert [score.source for score in scores] == ["site_a", "site_b"]
        assert all(score.auroc.value > 0.98 and score.patients == 12 for score in scores)
    shuffled = np.random.default_rng(0).permutation(phantoms["patient_id"].unique())
    half = set(shuffled[: len(shuffled) // 2])
    named = phantoms.assign(source=np.where(phantoms["patient_id"].isin(half), "heads", "tails"))
    for scores in source_within_class(named, tmp_path, trees=60).values():
        assert all(score.auroc.low < 0.6 for score in scores)


def test_a_class_with_one_source_has_no_source_score(phantoms: pd.DataFrame, tmp_path: Path) -> None:
    alone = phantoms.assign(source=phantoms["source"].where(phantoms["label"] != "covid", "site_a"))
    assert list(source_within_class(alone, tmp_path, trees=5)) == ["normal", "pneumonia"]
    assert source_within_class(phantoms.assign(source=""), tmp_path) == {}
