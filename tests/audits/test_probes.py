"""Probes find what is planted, find nothing where nothing is, and never see what they are scored on."""

from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from covid_cls.audits.probe_features import PROBES, read_headers
from covid_cls.audits.probes import audit_probes, probe_notes, source_within_class, write_probes
from covid_cls.audits.thumbnails import thumbnails
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.manifest import read_manifest
from covid_cls.data.phantom import build_phantoms
from covid_cls.errors import InputError
from covid_cls.evaluation.intervals import score_intervals
from covid_cls.evaluation.metrics import decide
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.labels import TASKS, Task
from covid_cls.records import read_json, read_predictions
from covid_cls.training.predict import predict_split
from tests.training.small import compose_small, make_classifier

THREE = TASKS["three_class"]
FLAG = 0.60  # of the lower end of a macro AUROC's interval
SEEDS = range(3)


def manifest_of(folder: Path, rows: list[dict[str, str]], pixels: str = "PNG") -> pd.DataFrame:
    """The table of a manifest with these rows, each with an image of its own noise, in its `_format` or `pixels`."""
    rng = np.random.default_rng(0)
    for k, row in enumerate(rows):
        kind = row.pop("_format", pixels)
        row["path"] = f"{k:03d}.{kind.lower()}"
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / row["path"], kind)
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
    return read_manifest(folder / "manifest.csv")


def patients(**columns: list[str]) -> list[dict[str, str]]:
    """Sixty rows, twenty of each class; a column's values go by class, or are drawn where there is one more."""
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


@pytest.mark.parametrize(("shortcut", "least", "most"), [("marker", 3, 3), ("none", 0, 1)])
def test_the_frame_probe_flags_planted_markers_and_not_clean_sets(
    tmp_path: Path, shortcut: str, least: int, most: int
) -> None:
    flagged = 0
    for seed in SEEDS:
        table = read_manifest(build_phantoms(tmp_path / str(seed), images=96, seed=seed, shortcut=shortcut))
        predicted = audit_probes(table, THREE, tmp_path, seed=seed, names=["frame"], trees=40)
        flagged += macro_auroc_low(predicted["frame"]) > FLAG
    assert least <= flagged <= most


def test_a_header_that_differs_by_class_gives_the_class_away(tmp_path: Path) -> None:
    rows = patients(_format=["PNG", "JPEG", "BMP"])
    predicted = audit_probes(manifest_of(tmp_path, rows), THREE, tmp_path, names=["header"], trees=20)
    assert accuracy(predicted["header"]) == 1


def test_headers_of_the_published_files_stand_in_for_those_at_hand(tmp_path: Path) -> None:
    published = {f"orig_{name}": ["7", "8"] for name in ("height", "mode", "format")}
    table = manifest_of(tmp_path, patients(orig_width=["100", "200", "1024"], **published))
    predicted = audit_probes(table, THREE, tmp_path, names=["header"], trees=20)
    assert accuracy(predicted["header"]) == 1
    assert "orig_width" in probe_notes(table, tmp_path)["header"]


def test_equal_headers_say_nothing(tmp_path: Path) -> None:
    predicted = audit_probes(manifest_of(tmp_path, patients()), THREE, tmp_path, names=["header"], trees=20)
    assert macro_auroc_low(predicted["header"]) < 0.5


def test_the_view_gives_the_class_away_where_it_does(tmp_path: Path) -> None:
    rows = patients(view=["AP", "PA", ""], age=["40", "50", "nan", ""], sex=["F", "F"])
    gaps = sum(row["age"] in ("nan", "") for row in rows)
    table = manifest_of(tmp_path, rows)
    predicted = audit_probes(table, THREE, tmp_path, names=["metadata"], trees=20)
    assert accuracy(predicted["metadata"]) > 0.95
    seen = f"columns view (empty in 20 of 60 images), age (empty in {gaps} of 60 images) of the manifest"
    assert probe_notes(table, tmp_path)["metadata"] == seen


def test_metadata_never_see_who_where_or_what(tmp_path: Path) -> None:
    hidden = ["finding", "url", "license", "source", "remark"]
    table = manifest_of(tmp_path, patients(view=["PA", "PA"], **{name: ["a", "b", "c"] for name in hidden}))
    assert audit_probes(table, THREE, tmp_path, names=["metadata"]) == {}
    assert probe_notes(table, tmp_path)["metadata"].startswith("left out: the manifest has view: the same")


def test_headers_of_every_kind_and_of_no_image(tmp_path: Path) -> None:
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


def test_a_thumbnail_shows_the_whole_image_and_its_edge_is_the_image_s(tmp_path: Path) -> None:
    wide = np.full((100, 300), 100, dtype=np.uint8)
    wide[:, :30], wide[:, -30:], wide[:10] = 0, 255, 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    pd.DataFrame({"path": ["a.png", "b.png"], "label": "covid"}).to_csv(tmp_path / "manifest.csv", index=False)
    table = read_manifest(tmp_path / "manifest.csv")
    for _ in range(2):  # decoded, then from the cache
        found = thumbnails(table, 10, tmp_path)
        assert (found.shape, found.dtype) == ((2, 10, 10), np.uint8)
        assert (found[0, 3:, 0] < 50).all()
        assert (found[0, 3:, -1] > 205).all()
        assert (found[0, 3:, 3:-3] == 100).all()
        assert found[0, 0, 5] > 150
        assert not found[1].any()


def test_a_damaged_cache_of_thumbnails_is_named(tmp_path: Path) -> None:
    table = manifest_of(tmp_path, patients()[:2])
    thumbnails(table, 8, tmp_path)
    (kept,) = (tmp_path / "thumbnails").glob("8-*.sqlite")
    kept.write_bytes(b"no database" * 200)
    with pytest.raises(InputError, match=r"sqlite.*delete the file"):
        thumbnails(table, 8, tmp_path)


def test_an_unreadable_image_is_probed_as_black(tmp_path: Path) -> None:
    rows = patients()
    table = manifest_of(tmp_path, rows)
    Path(table["file"][0]).write_text("no image")
    predicted = audit_probes(table, THREE, tmp_path, names=["header", "frame", "histogram"], trees=5)
    assert all(len(found) == 60 for found in predicted.values())


def test_out_of_fold_tables_hold_every_image_once_and_no_patient_in_two_folds(
    phantoms: pd.DataFrame, tmp_path: Path
) -> None:
    first, again = (audit_probes(phantoms, TASKS["binary"], tmp_path, trees=10) for _ in range(2))
    assert list(first) == list(PROBES)
    wanted = phantoms[phantoms["label"] != "pneumonia"]
    for name, table in first.items():
        assert table["image_id"].tolist() == wanted["path"].tolist()
        assert set(table["fold"]) == set("01234")
        assert (table.groupby("patient_id")["fold"].nunique() == 1).all()
        truth_and_prob(table, TASKS["binary"])
        pd.testing.assert_frame_equal(table, again[name])


@pytest.fixture(params=["three_class", "three_class_multilabel"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Radiographs:
    return Radiographs(TASKS[request.param], 32, 0, kind="phantom", images=48, size=32, cache=str(tmp_path / "cache"))


def written(data: Radiographs, folder: Path) -> dict[str, pd.DataFrame]:
    write_probes(data, folder, trees=10)
    return {path.stem: read_predictions(path, data.task.classes) for path in sorted(folder.glob("*.csv"))}


def test_probes_of_a_run_have_its_rows_and_the_meaning_of_its_columns(data: Radiographs, tmp_path: Path) -> None:
    found = written(data, tmp_path / "run" / "probes")
    assert set(found) == {f"{name}-{split}" for name in PROBES for split in ("val", "test")}
    classifier = make_classifier(compose_small(f"task={data.task.name}", "backbone=resnet18"))
    for split in ("val", "test"):
        ids = predict_split(classifier.scorer(), data, split).iloc[:, :6]
        for name in PROBES:
            table = found[f"{name}-{split}"]
            assert table["image_id"].tolist() == ids["image_id"].tolist()
            assert table["patient_id"].tolist() == ids["patient_id"].tolist()
            truth_and_prob(table, data.task)
    train = data.table[data.table["split"] == "train"]["label"]
    share = {name: (train == name).mean() for name in data.task.classes}
    if data.task.multilabel:
        share["pneumonia"] += share["covid"]  # a covid image is positive for pneumonia too
    for name, wanted in share.items():
        np.testing.assert_allclose(found["majority-test"][f"prob_{name}"], wanted, rtol=1e-8)
    assert set(read_json(tmp_path / "run" / "probes" / "about.json")) == set(PROBES)


def test_labels_of_validation_and_test_never_reach_the_fit(data: Radiographs, tmp_path: Path) -> None:
    before = written(data, tmp_path / "before")
    held_out = data.table["split"] != "train"
    data.table.loc[held_out, "label"] = data.table.loc[held_out, "label"].to_numpy()[::-1]
    after = written(data, tmp_path / "after")
    for name, table in before.items():
        assert after[name]["label"].tolist() != table["label"].tolist()
        pd.testing.assert_frame_equal(after[name].iloc[:, 6:], table.iloc[:, 6:])


def test_a_second_cell_of_the_same_data_computes_nothing(data: Radiographs, tmp_path: Path) -> None:
    first = written(data, tmp_path / "first")
    for file in data.table["file"]:
        Path(file).unlink()
    for name, table in written(data, tmp_path / "second").items():
        pd.testing.assert_frame_equal(table, first[name])


def test_a_sweep_that_selects_leaves_the_test_images_alone(data: Radiographs, tmp_path: Path) -> None:
    for file in data.table.loc[data.table["split"] == "test", "file"]:
        Path(file).unlink()
    write_probes(data, tmp_path / "probes", splits=["val"], trees=10)
    assert {path.stem for path in (tmp_path / "probes").glob("*.csv")} == {f"{name}-val" for name in PROBES}


def test_the_source_is_told_from_the_image_where_it_shows(phantoms: pd.DataFrame, tmp_path: Path) -> None:
    found = source_within_class(phantoms, tmp_path, trees=60)
    assert list(found) == list(THREE.classes)
    for scores in found.values():
        assert [score.source for score in scores] == ["site_a", "site_b"]
        assert all(score.auroc.value > 0.98 and score.patients == 12 for score in scores)
    drawn = np.random.default_rng(0).permutation(phantoms["patient_id"].unique())
    half = set(drawn[: len(drawn) // 2])
    named = phantoms.assign(source=np.where(phantoms["patient_id"].isin(half), "heads", "tails"))
    for scores in source_within_class(named, tmp_path, trees=60).values():
        assert all(score.auroc.low < 0.6 for score in scores)


def test_a_class_of_one_source_has_nothing_to_tell_apart(phantoms: pd.DataFrame, tmp_path: Path) -> None:
    alone = phantoms.assign(source=phantoms["source"].where(phantoms["label"] != "covid", "site_a"))
    assert list(source_within_class(alone, tmp_path, trees=5)) == ["normal", "pneumonia"]
    assert source_within_class(phantoms.assign(source=""), tmp_path) == {}
