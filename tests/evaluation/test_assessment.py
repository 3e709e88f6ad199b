"""One record of all figures: the same each time, plain, and silent about nothing that the data cannot answer."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.assessment import assess, patient_units
from covid_cls.evaluation.calibration import calibrated, logits
from covid_cls.evaluation.operating import decide_at, fit_operating, predictive_values
from covid_cls.evaluation.predictions import read_scores
from covid_cls.evaluation.summary import summarise
from covid_cls.labels import TASKS, Task
from covid_cls.records import write_predictions
from tests.evaluation.test_summary import predictions

SOFTMAX = TASKS["three_class"]
ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
FEW = {"resamples": 200}


def cohort(task: Task, n: int = 60, seed: int = 0) -> pd.DataFrame:
    """Patients with two images of one label each, from two sources."""
    table = predictions(task, n, seed)
    classes = len(task.classes)
    patients = [f"patient{i // (2 * classes)}-{i % classes}" for i in range(n)]
    return table.assign(patient_id=patients, source=[f"site{i // classes % 2}" for i in range(n)])


def values(level: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of a level without their intervals, as `summarise` has them."""
    return {
        "overall": {name: score["value"] for name, score in level["overall"].items()},
        "per_class": {
            label: {name: score if name == "n" else score["value"] for name, score in scores.items()}
            for label, scores in level["per_class"].items()
        },
    }


@ALL_TASKS
def test_the_figures_are_those_of_the_summary_with_intervals(task: Task) -> None:
    table = cohort(task)
    record = assess(table, task, fit_operating(cohort(task, seed=1), task), **FEW)
    expected = summarise(table, task)
    assert record["image"]["confusion"] == expected["confusion"]
    found = values(record["image"])
    assert found["overall"] == pytest.approx({name: expected["overall"][name] for name in found["overall"]})
    for label, scores in expected["per_class"].items():
        assert found["per_class"][label] == pytest.approx(scores)
    for score in [*record["image"]["overall"].values(), *record["patient"]["overall"].values()]:
        assert score["low"] <= score["value"] <= score["high"]
        assert score["low"] < score["high"]


@ALL_TASKS
def test_the_record_is_the_same_from_the_file_twice_and_plain(task: Task, tmp_path: Path) -> None:
    write_predictions(cohort(task), tmp_path / "predictions-test.csv")
    operating = fit_operating(cohort(task, seed=1), task)
    first, second = (assess(read_scores(tmp_path / "predictions-test.csv").table, task, operating, **FEW) for _ in "12")
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
    assert json.loads(json.dumps(first)) == first


@ALL_TASKS
def test_a_unit_is_the_mean_logit_of_a_patient_s_images_of_a_label(task: Task) -> None:
    table = cohort(task, 12 * len(task.classes))
    table.loc[0, "patient_id"] = ""
    table.loc[1, "patient_id"] = table.loc[2, "patient_id"] if len(task.classes) == 3 else "else"
    units = patient_units(table, task)
    named = units[units["patient_id"] == table.loc[len(task.classes) * 3, "patient_id"]]
    own = table[table["patient_id"] == named["patient_id"].iloc[0]]
    assert len(own) == 2
    assert logits(named, task)[0] == pytest.approx(logits(own, task).mean(axis=0))
    prob = named[[f"prob_{name}" for name in task.classes]].to_numpy(dtype=float)
    assert prob == pytest.approx(calibrated(logits(named, task), 1, task))
    assert (units["patient_id"] == "").sum() == 1
    assert not units.duplicated(["patient_id", "label"])[units["patient_id"] != ""].any()


def test_a_patient_with_several_labels_is_several_units_and_said() -> None:
    table = cohort(SOFTMAX)
    table.loc[[0, 1], "patient_id"] = "both"
    record = assess(table, SOFTMAX, None, **FEW)
    assert any(note.startswith("1 patients have images of several labels") for note in record["notes"])
    assert record["patient"]["n"] == len(table.groupby(["patient_id", "label"]))


def test_no_patient_level_where_each_image_is_a_patient() -> None:
    record = assess(cohort(SOFTMAX).assign(patient_id=""), SOFTMAX, None, **FEW)
    assert record["patient"] is None
    assert any("60 of 60 images have no patient_id" in note for note in record["notes"])


@ALL_TASKS
def test_an_operating_point_is_worth_what_its_threshold_decides(task: Task) -> None:
    table, operating = cohort(task), fit_operating(cohort(task, seed=1), task)
    points = assess(table, task, operating, **FEW)["image"]["operating_points"]
    assert list(points) == ["decision", "youden", "sensitivity_95", "specificity_95"]
    covid = (table["label"] == "covid").to_numpy()
    for name, threshold in operating["thresholds"].items():
        called = decide_at(calibrated(logits(table, task), operating["temperature"], task), threshold, task) == 0
        point = points[name]
        rates = called[covid].mean(), (~called)[~covid].mean()
        assert (point["sensitivity"]["value"], point["specificity"]["value"]) == pytest.approx(rates)
        assert point["ppv"]["value"] == pytest.approx(covid[called].mean())
        assert point["npv"]["value"] == pytest.approx((~covid)[~called].mean())
        for at in point["at_prevalence"]:
            ppv, npv = predictive_values(*rates, at["prevalence"])
            assert at["ppv"] == (None if math.isnan(ppv) else pytest.approx(ppv, abs=1e-12))
            assert at["npv"] == (None if math.isnan(npv) else pytest.approx(npv, abs=1e-12))


def test_without_validation_there_is_neither_threshold_nor_temperature() -> None:
    record = assess(cohort(SOFTMAX), SOFTMAX, None, **FEW)
    assert list(record["image"]["operating_points"]) == ["decision"]
    assert [at["prevalence"] for at in record["image"]["operating_points"]["decision"]["at_prevalence"]] == [
        *(0.01, 0.05, 0.1, 0.5)
    ]
    assert record["calibration"]["temperature"] is None
    assert record["calibration"]["after"] is None
    assert "without validation predictions there are no thresholds and no temperature" in record["notes"]
    assert record["baselines"]["shares_from"] == "these images"


@ALL_TASKS
@pytest.mark.parametrize("label", ["covid", "normal"])
def test_one_class_is_no_exception(task: Task, label: str) -> None:
    table = cohort(task)
    record = assess(table[table["label"] == label], task, fit_operating(cohort(task, seed=1), task), **FEW)
    json.dumps(record, allow_nan=False)
    covid = record["image"]["per_class"]["covid"]
    assert covid["auroc"] == {"value": None, "low": None, "high": None, "method": "undefined"}
    assert (covid["sensitivity"]["value"] is None) == (label != "covid")
    assert set(record["decision_curve"]["model"]) == {None}
    assert record["calibration"]["before"]["slope"]["value"] is None
    absent = [name for name in task.classes if name != label]
    assert f"no image of {', '.join(absent)}: the scores that need one are undefined" in record["notes"]
    assert record["sources"][0]["label_pure"]
    assert "covid.auroc" not in record["sources"][0]["scores"]


def test_an_absent_class_leaves_the_others_their_scores() -> None:
    table = cohort(SOFTMAX)
    record = assess(table[table["label"] != "pneumonia"], SOFTMAX, None, **FEW)
    assert record["image"]["per_class"]["covid"]["auroc"]["value"] > 0.5
    assert record["image"]["overall"]["macro_auroc"]["value"] is None
    assert any(note.startswith("no image of pneumonia") for note in record["notes"])


def test_a_source_that_gives_the_label_away_is_the_first_note() -> None:
    table = cohort(SOFTMAX)
    pure = table.assign(source=np.where(table["label"] == "covid", "clinic", "archive"))
    record = assess(pure, SOFTMAX, None, **FEW)
    assert record["source_association"] == pytest.approx(1)
    assert record["notes"][0].startswith("SOURCE-CONFOUNDED")
    assert {block["source"]: block["label_pure"] for block in record["sources"]} == {"clinic": True, "archive": False}
    mixed = assess(table, SOFTMAX, None, **FEW)
    assert not any("SOURCE" in note for note in mixed["notes"])
    assert sum(block["n_images"] for block in mixed["sources"]) == len(table)


def test_a_source_has_the_scores_of_its_own_images() -> None:
    table = cohort(SOFTMAX)
    block = assess(table, SOFTMAX, None, **FEW)["sources"][1]
    alone = summarise(table[table["source"] == block["source"]], SOFTMAX)
    assert block["scores"]["covid.auroc"]["value"] == pytest.approx(alone["per_class"]["covid"]["auroc"])
    assert block["scores"]["accuracy"]["value"] == pytest.approx(alone["overall"]["accuracy"])
    assert block["n_per_class"] == alone["n_per_class"]


def test_baselines_need_no_image() -> None:
    table = cohort(SOFTMAX)
    val = cohort(SOFTMAX, seed=1)
    operating = fit_operating(val[val["label"] != "covid"], SOFTMAX)
    baselines = assess(table, SOFTMAX, operating, **FEW)["baselines"]
    assert baselines["shares_from"] == "validation"
    assert baselines["constant"]["class"] == "normal"
    assert baselines["constant"]["accuracy"] == pytest.approx(1 / 3)
    assert baselines["random"]["accuracy"] == pytest.approx(1 / 3)
    own = assess(table, SOFTMAX, None, **FEW)["baselines"]["constant"]
    assert own["nll"] == pytest.approx(math.log(3))
    assert own["brier"] == pytest.approx(2 / 3)


def test_the_temperature_is_applied_and_the_ece_stands_beside_its_null_value() -> None:
    task = TASKS["binary"]
    sharp, val = cohort(task, 400), cohort(task, 400, seed=1)
    for table in (sharp, val):
        logit = 5 * logits(table, task)
        prob = calibrated(logit, 1, task)
        for k, name in enumerate(task.classes):
            table[f"logit_{name}"], table[f"prob_{name}"] = logit[:, k], prob[:, k]
    calibration = assess(sharp, task, fit_operating(val, task), **FEW)["calibration"]
    before, after = calibration["before"], calibration["after"]
    assert calibration["temperature"] > 2
    assert after["nll"] < before["nll"]
    assert before["slope"]["high"] < 1
    assert before["ece"]["value"] > before["ece"]["null_p95"]
    assert after["ece"]["value"] < before["ece"]["value"]
    assert before["slope"]["value"] * calibration["temperature"] == pytest.approx(after["slope"]["value"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resamples": 50}, "resamples=50"),
        ({"level": 95.0}, "level=95.0"),
        ({"operating": fit_operating(predictions(TASKS["binary"]), TASKS["binary"])}, "fitted to classes"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assess(cohort(SOFTMAX), SOFTMAX, **{"operating": None, **FEW, **change})
