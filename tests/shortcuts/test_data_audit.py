"""Findings of the data audit, their summary, and the audit before training."""

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.image_source import DataSettings
from covid_cls.data.phantoms import build_phantoms
from covid_cls.errors import InputError
from covid_cls.evaluation.intervals import Interval
from covid_cls.shortcuts.data_audit import (
    Finding,
    attribute_associations,
    audit_before_training,
    baseline_findings,
    baselines_unavailable,
    copy_findings,
    count_images,
    most_severe_first,
    patient_findings,
    patient_from_file_name,
    patients_in_several,
    series_by_file_name,
    series_findings,
    sort_pairs,
    source_findings,
    verdict_line,
)
from covid_cls.tasks import TASKS

SOURCE = Finding("fail", "source predicts label, Cramér's V 1.00", "", consequence="not evidence of disease detection")


def test_the_verdict_counts_failed_checks_and_names_the_most_severe() -> None:
    warning, leak = Finding("warn", "few", ""), Finding("fail", "patients in two splits", "")
    assert verdict_line([]) == "No check failed; 0 warnings"
    assert verdict_line([warning, baselines_unavailable("too few")]) == "No check failed; 1 warning"
    assert verdict_line([warning, leak]) == (
        "1 check failed: scores on this data set are not reliable (patients in two splits)"
    )
    assert verdict_line([leak, SOURCE]) == (
        "2 checks failed: scores on this data set are not evidence of disease detection "
        "(source predicts label, Cramér's V 1.00)"
    )
    assert most_severe_first([warning, leak, SOURCE]) == [leak, SOURCE, warning]


@pytest.mark.parametrize(
    ("baseline", "low", "fails"),
    [("frame", 0.61, True), ("frame", 0.60, False), ("thumbnail", 0.9, False), ("header", math.nan, False)],
)
def test_a_baseline_fails_if_it_sees_no_lungs_and_its_interval_is_above_the_limit(
    baseline: str, low: float, fails: bool
) -> None:
    found = baseline_findings({baseline: {"macro_auroc": Interval(0.95, low, 0.99, "")}})
    assert [finding.level for finding in found] == ["fail"] * fails


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 phantoms with a manifest. Tests must not change it."""
    return build_phantoms(tmp_path_factory.mktemp("phantoms"), images=60, seed=4).parent


def radiographs(folder: Path, cache: Path, **settings: Any) -> Radiographs:
    settings = {"kind": "manifest", "path": str(folder / "manifest.csv"), "cache": str(cache), **settings}
    settings = {"val_share": 0.25, "test_share": 0.25, **settings}
    return Radiographs(TASKS["three_class"], 312, 0, DataSettings(**settings))


def edited(phantoms: Path, folder: Path, **columns: Any) -> Path:
    shutil.copytree(phantoms, folder)
    pd.read_csv(folder / "manifest.csv").assign(**columns).to_csv(folder / "manifest.csv", index=False)
    return folder


def test_clean_phantoms_pass_the_audit_and_are_searched_once(phantoms: Path, tmp_path: Path) -> None:
    assert audit_before_training(radiographs(phantoms, tmp_path), "fail") == []
    assert (
        audit_before_training(radiographs(phantoms, tmp_path, seed=1), "fail") == []
    )  # other splits, but the same copies
    assert len(list((tmp_path / "audits").iterdir())) == 1


def test_a_source_with_one_label_is_a_note_or_an_error(phantoms: Path, cache: Path, tmp_path: Path) -> None:
    folder = edited(phantoms, tmp_path / "own", source=lambda table: "from " + table["label"])
    data = radiographs(folder, cache)
    (note,) = audit_before_training(data, "warn")
    assert note.startswith("audit: source predicts label, Cramér's V 1.00")
    with pytest.raises(
        InputError, match=r"source predicts label.*test on a source that was not used for training.*audit=warn"
    ):
        audit_before_training(data, "fail")
    assert audit_before_training(data, "off") == audit_before_training(data, False) == []


def test_a_leaky_split_is_noted(phantoms: Path, cache: Path) -> None:
    (note, *_) = audit_before_training(radiographs(phantoms, cache, group="image"), "warn")
    assert note.startswith("audit: patients in two splits")


def test_a_copy_in_another_split_is_an_error(phantoms: Path, cache: Path, tmp_path: Path) -> None:
    folder = edited(phantoms, tmp_path / "own")
    table = pd.read_csv(folder / "manifest.csv")
    table["split"] = ["train", "val", "test"] * 20
    table["patient_id"] = [f"q{k}" for k in range(60)]
    original = table.iloc[0]
    shutil.copyfile(folder / original["path"], folder / "images" / "again.png")
    again = {**original, "path": "images/again.png", "split": "test", "patient_id": "someone else"}
    pd.concat([table, pd.DataFrame([again])]).to_csv(folder / "manifest.csv", index=False)
    with pytest.raises(InputError, match="copies of one image in two splits"):
        audit_before_training(radiographs(folder, cache), "fail")


def test_an_unknown_mode_is_an_error(phantoms: Path, cache: Path) -> None:
    with pytest.raises(InputError, match="audit=loud: must be off, warn, fail"):
        audit_before_training(radiographs(phantoms, cache), "loud")


def table(rows: list[dict[str, str]]) -> pd.DataFrame:
    found = pd.DataFrame([{"patient_id": "", "source": "", "split": "", "label": "covid", **row} for row in rows])
    alone = found["patient_id"] == ""
    return found.assign(patient_id=found["patient_id"].where(~alone, "image:" + found["path"]))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("covid-19-pneumonia-58-day-3.jpg", "covid-19-pneumonia-58"),
        ("auntminnie-d-2020_01_28_23_51_6665-day0.png", "auntminnie-d-2020_01_28_23_51_6665"),
        ("1-s2.0-S0929664620300449-gr2_lrg-b.jpg", "1-s2.0-s0929664620300449-gr2_lrg"),
        ("fig1a.png", "fig1"),
        ("nejmoa2001191_f1-PA.jpeg", "nejmoa2001191_f1"),
        ("00002658_001.png", "00002658"),
        ("p0012_3.png", "p0012"),
        ("person12_virus_3.jpeg", "person12"),
        ("Normal-1390.png", ""),
        ("img_001.png", ""),
        ("COVID-00035.jpg", ""),
        ("03BF7561-A9BA-4C3C-B8A0-D3E585F73F3C.jpg", ""),
        ("a.png", ""),
    ],
)
def test_file_names_identify_a_patient_or_nothing(name: str, stem: str) -> None:
    assert patient_from_file_name(f"train/covid/{name}") == stem


def test_all_patients_in_two_splits_are_listed() -> None:
    rows = [{"path": f"{k}-{i}.png", "patient_id": f"p{k}", "split": "train"} for k in range(60) for i in range(2)]
    for k in range(20):
        rows[2 * k + 1]["split"] = "test"
    found = patients_in_several(table(rows), "split")
    assert found == {f"p{k}": "test+train" for k in range(20)}
    (finding,) = (one for one in patient_findings(table(rows)) if one.level == "fail")
    assert len(finding.examples) == 20
    assert "20 of 60 patients" in finding.detail


def test_all_series_without_patient_ids_are_found_and_nothing_else() -> None:
    names = [
        ("case{}-day0", "case{}-day7"),
        ("s{}_fig1a", "s{}_fig1b"),
        ("study{}x-PA", "study{}x-L"),
        ("000{}00_001", "000{}00_002"),
    ]
    pairs = [tuple(name.format(k + 10) for name in names[k % 4]) for k in range(20)]
    rows = [
        {"path": f"{split}/{pair[i]}.png", "split": split}
        for pair in pairs
        for i, split in enumerate(("train", "test"))
    ]
    rows += [{"path": f"{split}/Normal-{k}.png", "split": split} for split in ("train", "test") for k in range(50)]
    assert len(series_by_file_name(table(rows))) == 20
    (finding,) = series_findings(table(rows))
    assert finding.level == "fail"
    assert len(finding.examples) == 20


def test_series_with_patient_ids_are_a_warning_or_nothing() -> None:
    two = [
        {"path": f"fig1{k}.png", "patient_id": f"p{k}", "split": split} for k, split in (("a", "train"), ("b", "test"))
    ]
    (finding,) = series_findings(table(two))
    assert finding.level == "warn"  # panels of a figure can show two patients
    assert series_findings(table([{**row, "patient_id": "p"} for row in two])) == []
    assert (
        series_findings(table([{**row, "label": label} for row, label in zip(two, ("covid", "normal"), strict=True)]))
        == []
    )


def test_images_without_patient_id_are_counted() -> None:
    found = patient_findings(table([{"path": "a.png"}, {"path": "b.png", "patient_id": "p"}]))
    (alone,) = (one for one in found if one.title == "images without patient_id")
    assert list(alone.examples) == ["a.png"]
    assert "1 of 2" in alone.detail


def sourced(sizes: dict[tuple[str, str], int]) -> pd.DataFrame:
    return table(
        [
            {"path": f"{source}{label}{k}.png", "source": source, "label": label}
            for (source, label), number in sizes.items()
            for k in range(number)
        ]
    )


@pytest.mark.parametrize(
    ("sizes", "level"),
    [
        ({("a", "covid"): 20, ("b", "normal"): 30}, "fail"),  # V 1
        ({("a", "covid"): 20, ("a", "normal"): 1, ("b", "normal"): 30}, "fail"),  # V 0.96
        ({("a", "covid"): 20, ("a", "normal"): 20, ("b", "normal"): 30}, "warn"),  # V 0.55, b is pure
        ({("a", "covid"): 20, ("a", "normal"): 20, ("b", "covid"): 30, ("b", "normal"): 30}, None),
        ({("", "covid"): 20, ("", "normal"): 20}, "warn"),  # without names
        ({("a", "covid"): 20, ("a", "normal"): 20}, None),
    ],
)
def test_a_source_that_predicts_the_label_fails(sizes: dict[tuple[str, str], int], level: str | None) -> None:
    assert [finding.level for finding in source_findings(sourced(sizes))] == ([level] if level else [])


def test_images_and_patients_are_counted_per_source_and_class() -> None:
    rows = [{"path": "a", "patient_id": "p"}, {"path": "b", "patient_id": "p"}, {"path": "c", "source": "x"}]
    assert count_images(table(rows)).to_dict("records") == [
        {"source": "unknown", "label": "covid", "images": 2, "patients": 1},
        {"source": "x", "label": "covid", "images": 1, "patients": 1},
    ]


def test_attributes_associated_with_the_label_come_first(tmp_path: Path) -> None:
    rows = []
    for k in range(40):
        label, size = ("covid", 40) if k % 2 else ("normal", 50)
        Image.new("L", (size, 60)).save(tmp_path / f"{k}.png")
        view = "AP" if k % 4 < 2 else "PA"
        rows.append(
            {"path": f"{k}.png", "label": label, "view": view, "age": str(20 + k), "file": str(tmp_path / f"{k}.png")}
        )
    found = {one.name: one for one in attribute_associations(table(rows), tmp_path)}
    assert next(iter(found)) == "size"
    assert found["size"].v == pytest.approx(1)
    assert found["size"].commonest == {"covid": "40 × 60 (100%)", "normal": "50 × 60 (100%)"}
    assert found["view"].v == pytest.approx(0)
    assert found["age"].v < 0.2
    assert math.isnan(found["mode"].v)  # the same in all


def test_copies_are_reported_by_their_most_severe_difference() -> None:
    places = [("covid", "train", "p"), ("normal", "train", "p"), ("covid", "train", "q"), ("covid", "test", "r")]
    places += [("covid", "train", "s"), ("covid", "train", "t"), ("covid", "train", "u"), ("covid", "train", "u")]
    images = table(
        [{"path": f"{k}.png", "label": c, "split": s, "patient_id": p} for k, (c, s, p) in enumerate(places)]
    )
    pairs = pd.DataFrame({"first": [6, 4, 2, 0], "second": [7, 5, 3, 1], "kind": "near", "likeness": 0.9})
    found = copy_findings(images, pairs)
    assert [finding.level for finding in found] == ["fail", "fail", "warn", "note"]
    assert found[0].examples == ["0.png (covid, train) = 1.png (normal, train): near 0.90"]
    assert list(sort_pairs(images, pairs)["between"]) == ["label", "split", "patient_id", ""]
    assert copy_findings(images, pairs.head(0)) == []
