"""The record of an evaluation: its scores and intervals, its notes, and None for what the data do not define."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.assessment import assess, patient_units, summarise
from covid_cls.evaluation.calibration import calibrated, logits
from covid_cls.evaluation.metrics import class_scores, decide, overall_scores
from covid_cls.evaluation.predictions import load_predictions, truth_and_prob
from covid_cls.evaluation.thresholds import decide_at, fit_operating, predictive_values
from covid_cls.io import prediction_columns, read_predictions, write_predictions
from covid_cls.tasks import TASKS, Task

BINARY, SOFTMAX, MULTILABEL = TASKS["binary"], TASKS["three_class"], TASKS["three_class_multilabel"]
ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
FEW = {"resamples": 200}


def predictions(task, n=30, seed=0):
    """Return a table of n images, two per patient, with every class."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % len(task.classes)
    logit = rng.normal(size=(n, len(task.classes))) + 2 * np.array(task.targets)[truth]
    prob = 1 / (1 + np.exp(-logit)) if task.multilabel else np.exp(logit)
    if not task.multilabel:
        prob /= prob.sum(axis=1, keepdims=True)
    columns = {
        "image_id": [f"image{i}" for i in range(n)],
        "patient_id": [f"patient{i // 2}" for i in range(n)],
        "source": "here",
        "split": "test",
        "fold": "",
        "label": [task.classes[k] for k in truth],
    }
    columns |= {f"logit_{name}": logit[:, k] for k, name in enumerate(task.classes)}
    columns |= {f"prob_{name}": prob[:, k] for k, name in enumerate(task.classes)}
    return pd.DataFrame(columns)[prediction_columns(task.classes)]


def cohort(task: Task, n: int = 60, seed: int = 0) -> pd.DataFrame:
    """Return a table of patients with two images of one label each, from two sources."""
    table = predictions(task, n, seed)
    classes = len(task.classes)
    patients = [f"patient{i // (2 * classes)}-{i % classes}" for i in range(n)]
    return table.assign(patient_id=patients, source=[f"site{i // classes % 2}" for i in range(n)])


def values(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores of images or patients without their intervals, as `summarise` has them."""
    return {
        "overall": {name: score["value"] for name, score in record["overall"].items()},
        "per_class": {
            label: {name: score if name == "n" else score["value"] for name, score in scores.items()}
            for label, scores in record["per_class"].items()
        },
    }


@ALL_TASKS
def test_the_scores_equal_those_of_the_summary(task: Task) -> None:
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
def test_the_same_file_gives_the_same_json_record_twice(task: Task, tmp_path: Path) -> None:
    write_predictions(cohort(task), tmp_path / "predictions-test.csv")
    operating = fit_operating(cohort(task, seed=1), task)
    first, second = (
        assess(load_predictions(tmp_path / "predictions-test.csv").table, task, operating, **FEW) for _ in "12"
    )
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
    assert json.loads(json.dumps(first)) == first


@ALL_TASKS
def test_a_patient_unit_has_the_mean_logits_of_the_images_with_one_label(task: Task) -> None:
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


def test_a_patient_with_several_labels_is_several_units_and_noted() -> None:
    table = cohort(SOFTMAX)
    table.loc[[0, 1], "patient_id"] = "both"
    record = assess(table, SOFTMAX, None, **FEW)
    assert any(note.startswith("1 patients have images of several labels") for note in record["notes"])
    assert record["patient"]["n"] == len(table.groupby(["patient_id", "label"]))


def test_there_are_no_patient_scores_if_each_image_is_a_separate_patient() -> None:
    record = assess(cohort(SOFTMAX).assign(patient_id=""), SOFTMAX, None, **FEW)
    assert record["patient"] is None
    assert any("60 of 60 images have no patient_id" in note for note in record["notes"])


@ALL_TASKS
def test_an_operating_point_has_the_rates_of_its_threshold(task: Task) -> None:
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


def test_without_validation_there_are_no_thresholds_and_no_temperature() -> None:
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
def test_a_table_with_one_class_is_assessed(task: Task, label: str) -> None:
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


def test_an_absent_class_does_not_affect_the_scores_of_others() -> None:
    table = cohort(SOFTMAX)
    record = assess(table[table["label"] != "pneumonia"], SOFTMAX, None, **FEW)
    assert record["image"]["per_class"]["covid"]["auroc"]["value"] > 0.5
    assert record["image"]["overall"]["macro_auroc"]["value"] is None
    assert any(note.startswith("no image of pneumonia") for note in record["notes"])


def test_a_source_that_predicts_the_label_is_the_first_note() -> None:
    table = cohort(SOFTMAX)
    pure = table.assign(source=np.where(table["label"] == "covid", "clinic", "archive"))
    record = assess(pure, SOFTMAX, None, **FEW)
    assert record["source_association"] == pytest.approx(1)
    assert record["notes"][0].startswith("SOURCE-CONFOUNDED")
    assert {block["source"]: block["label_pure"] for block in record["sources"]} == {"clinic": True, "archive": False}
    mixed = assess(table, SOFTMAX, None, **FEW)
    assert not any("SOURCE" in note for note in mixed["notes"])
    assert sum(block["n_images"] for block in mixed["sources"]) == len(table)


def test_a_source_has_the_scores_of_its_images() -> None:
    table = cohort(SOFTMAX)
    block = assess(table, SOFTMAX, None, **FEW)["sources"][1]
    alone = summarise(table[table["source"] == block["source"]], SOFTMAX)
    assert block["scores"]["covid.auroc"]["value"] == pytest.approx(alone["per_class"]["covid"]["auroc"])
    assert block["scores"]["accuracy"]["value"] == pytest.approx(alone["overall"]["accuracy"])
    assert block["n_per_class"] == alone["n_per_class"]


def test_baselines_use_the_class_shares_of_validation() -> None:
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


def test_the_temperature_improves_calibration_and_the_ece_has_a_null_value() -> None:
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
        ({"operating": fit_operating(predictions(TASKS["binary"]), TASKS["binary"])}, "fitted to the classes"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assess(cohort(SOFTMAX), SOFTMAX, **{"operating": None, **FEW, **change})


# --- the summary without intervals


@ALL_TASKS
def test_the_summary_has_the_scores_of_metrics(task):
    table = predictions(task)
    record = summarise(table, task)
    truth, prob = truth_and_prob(table, task)
    decided = decide(prob, task)
    assert record["overall"] == overall_scores(truth, prob, decided, task)
    assert record["per_class"] == class_scores(truth, prob, decided, task)
    assert (record["n_images"], record["n_patients"]) == (30, 15)
    assert record["n_per_class"] == dict.fromkeys(task.classes, 30 // len(task.classes))
    assert record["confusion"]["rows"] == record["confusion"]["columns"] == list(task.classes)
    assert np.sum(record["confusion"]["counts"], axis=1).tolist() == list(record["n_per_class"].values())


@ALL_TASKS
def test_a_table_from_a_file_gives_the_same_summary(task, tmp_path):
    table = predictions(task)
    write_predictions(table, tmp_path / "predictions-test.csv")
    again = summarise(read_predictions(tmp_path / "predictions-test.csv", task.classes), task)
    expected = summarise(table, task)
    assert again["overall"] == pytest.approx(expected["overall"], abs=1e-7)
    assert again["confusion"] == expected["confusion"]


@pytest.mark.filterwarnings("ignore:no image of class")
@pytest.mark.parametrize("kept", [["covid"], ["covid", "normal"], ["covid", "normal", "pneumonia"]], ids=len)
@pytest.mark.parametrize("task", [SOFTMAX, MULTILABEL], ids=lambda task: task.name)
def test_the_summary_is_json_without_nan(task, kept):
    table = predictions(task)
    record = summarise(table[table["label"].isin(kept)], task)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["overall"]["macro_f1"] is None) == (len(kept) < 3)


def test_the_summary_does_not_depend_on_the_order_or_index_of_rows():
    table = predictions(SOFTMAX)
    record, shuffled = (summarise(t, SOFTMAX) for t in (table, table.sample(frac=1, random_state=3)))
    for key in ("overall", "per_class"):
        one, other = (pd.json_normalize(r.pop(key)).iloc[0].to_dict() for r in (record, shuffled))
        assert one == pytest.approx(other)
    assert record == shuffled


@pytest.mark.parametrize("unknown", ["", None, pd.NA])
def test_an_image_without_a_patient_counts_as_a_separate_patient(unknown):
    table = predictions(SOFTMAX)
    table["patient_id"] = table["patient_id"].astype(object)
    # Rows 0 to 3 are two patients with two images each.
    table.loc[:3, "patient_id"] = unknown
    assert summarise(table, SOFTMAX)["n_patients"] == 15 - 2 + 4


def spoil(column, value, row=4):
    """Return a function that replaces a value of a table."""

    def change(table):
        table[column] = table[column].astype(object)
        table.loc[row, column] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.iloc[:0], "no rows"),
        (lambda table: table.drop(columns=["prob_normal"]), "['prob_normal'] are missing"),
        (spoil("image_id", "image0"), "image_id: 'image0' on line 6. This image is on an earlier line too."),
        (spoil("label", "COVID-19"), "label: 'COVID-19' on line 6. Use one of task three_class: covid, normal,"),
        (spoil("label", None), "label: None on line 6"),
        (spoil("prob_covid", 1.5), "prob_covid: 1.5 on line 6. A probability is in [0, 1]."),
        (spoil("prob_covid", -0.1), "prob_covid: -0.1 on line 6"),
        (spoil("prob_normal", np.nan), "prob_normal: nan on line 6. Every score must be a finite number."),
        (spoil("prob_normal", "high"), "prob_normal: 'high' on line 6. Every score must be a finite number."),
        (spoil("logit_covid", np.inf), "logit_covid: inf on line 6"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_table_is_refused_with_column_and_line(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        summarise(change(predictions(SOFTMAX)), SOFTMAX)


def test_softmax_probabilities_must_sum_to_one_but_sigmoids_need_not():
    table = predictions(MULTILABEL)
    summarise(table, MULTILABEL)
    with pytest.raises(InputError, match=r"sum of probabilities: .* on line 2, .*and 25 more. It must be 1 in task th"):
        summarise(table, SOFTMAX)


def test_a_sum_within_a_thousandth_of_one_is_accepted():
    table = predictions(BINARY)
    table["prob_covid"] = (table["prob_covid"] - 0.0009).clip(lower=0)
    summarise(table, BINARY)


def test_line_numbers_are_counted_by_position_and_not_by_index():
    table = predictions(SOFTMAX).iloc[10:]
    table = spoil("label", "flu", row=12)(table)
    with pytest.raises(InputError, match="'flu' on line 4"):
        summarise(table, SOFTMAX)
