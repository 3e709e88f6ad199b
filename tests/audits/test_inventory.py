"""What a table of images says of itself: planted leaks are all found, and numbers are not taken for patients."""

import math
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from covid_cls.audits.checks import copy_findings, pair_order, patient_findings, series_findings, source_findings
from covid_cls.audits.inventory import attributes, counts, crossing_patients, file_series, patient_stem


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
def test_a_file_name_tells_the_patient_or_nothing(name: str, stem: str) -> None:
    assert patient_stem(f"train/covid/{name}") == stem


def test_all_planted_patients_in_two_splits_are_named() -> None:
    rows = [{"path": f"{k}-{i}.png", "patient_id": f"p{k}", "split": "train"} for k in range(60) for i in range(2)]
    for k in range(20):
        rows[2 * k + 1]["split"] = "test"
    found = crossing_patients(table(rows), "split")
    assert found == {f"p{k}": "test+train" for k in range(20)}
    (finding,) = (one for one in patient_findings(table(rows)) if one.level == "fail")
    assert len(finding.examples) == 20
    assert "20 of 60 patients" in finding.detail


def test_all_planted_series_without_patient_ids_are_found_and_nothing_else() -> None:
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
    assert len(file_series(table(rows))) == 20
    (finding,) = series_findings(table(rows))
    assert finding.level == "fail"
    assert len(finding.examples) == 20


def test_series_whose_ids_are_given_only_warn_or_say_nothing() -> None:
    two = [
        {"path": f"fig1{k}.png", "patient_id": f"p{k}", "split": split} for k, split in (("a", "train"), ("b", "test"))
    ]
    (finding,) = series_findings(table(two))
    assert finding.level == "warn"  # panels of a figure can be of two patients
    assert series_findings(table([{**row, "patient_id": "p"} for row in two])) == []
    assert (
        series_findings(table([{**row, "label": label} for row, label in zip(two, ("covid", "normal"), strict=True)]))
        == []
    )


def test_an_image_without_patient_id_is_counted_as_such() -> None:
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
        ({("", "covid"): 20, ("", "normal"): 20}, "warn"),  # not named
        ({("a", "covid"): 20, ("a", "normal"): 20}, None),
    ],
)
def test_a_source_that_gives_the_label_away_fails(sizes: dict[tuple[str, str], int], level: str | None) -> None:
    assert [finding.level for finding in source_findings(sourced(sizes))] == ([level] if level else [])


def test_counts_name_sources_classes_images_and_patients() -> None:
    rows = [{"path": "a", "patient_id": "p"}, {"path": "b", "patient_id": "p"}, {"path": "c", "source": "x"}]
    assert counts(table(rows)).to_dict("records") == [
        {"source": "unknown", "label": "covid", "images": 2, "patients": 1},
        {"source": "x", "label": "covid", "images": 1, "patients": 1},
    ]


def test_attributes_that_go_with_the_label_come_first(tmp_path: Path) -> None:
    rows = []
    for k in range(40):
        label, size = ("covid", 40) if k % 2 else ("normal", 50)
        Image.new("L", (size, 60)).save(tmp_path / f"{k}.png")
        view = "AP" if k % 4 < 2 else "PA"
        rows.append(
            {"path": f"{k}.png", "label": label, "view": view, "age": str(20 + k), "file": str(tmp_path / f"{k}.png")}
        )
    found = {one.name: one for one in attributes(table(rows), tmp_path)}
    assert next(iter(found)) == "size"
    assert found["size"].v == pytest.approx(1)
    assert found["size"].commonest == {"covid": "40 × 60 (100%)", "normal": "50 × 60 (100%)"}
    assert found["view"].v == pytest.approx(0)
    assert found["age"].v < 0.2
    assert math.isnan(found["mode"].v)  # the same in all


def test_copies_are_told_by_the_gravest_difference() -> None:
    places = [("covid", "train", "p"), ("normal", "train", "p"), ("covid", "train", "q"), ("covid", "test", "r")]
    places += [("covid", "train", "s"), ("covid", "train", "t"), ("covid", "train", "u"), ("covid", "train", "u")]
    images = table(
        [{"path": f"{k}.png", "label": c, "split": s, "patient_id": p} for k, (c, s, p) in enumerate(places)]
    )
    pairs = pd.DataFrame({"first": [6, 4, 2, 0], "second": [7, 5, 3, 1], "kind": "near", "likeness": 0.9})
    found = copy_findings(images, pairs)
    assert [finding.level for finding in found] == ["fail", "fail", "warn", "note"]
    assert found[0].examples == ["0.png (covid, train) = 1.png (normal, train): near 0.90"]
    assert list(pair_order(images, pairs)["between"]) == ["label", "split", "patient_id", ""]
    assert copy_findings(images, pairs.head(0)) == []
