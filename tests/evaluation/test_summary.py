import json
import re

import numpy as np
import pandas as pd
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.metrics import class_scores, decide, overall_scores
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.evaluation.summary import summarise
from covid_cls.labels import TASKS
from covid_cls.records import prediction_columns, read_predictions, write_predictions

BINARY, SOFTMAX, MULTILABEL = TASKS["binary"], TASKS["three_class"], TASKS["three_class_multilabel"]
ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def predictions(task, n=30, seed=0):
    """A table of n images, two to a patient, with every class."""
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


@ALL_TASKS
def test_the_record_holds_what_the_metrics_say(task):
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
def test_a_table_from_disk_gives_the_same_record(task, tmp_path):
    table = predictions(task)
    write_predictions(table, tmp_path / "predictions-test.csv")
    again = summarise(read_predictions(tmp_path / "predictions-test.csv", task.classes), task)
    expected = summarise(table, task)
    assert again["overall"] == pytest.approx(expected["overall"], abs=1e-7)
    assert again["confusion"] == expected["confusion"]


@pytest.mark.filterwarnings("ignore:no image of class")
@pytest.mark.parametrize("kept", [["covid"], ["covid", "normal"], ["covid", "normal", "pneumonia"]], ids=len)
@pytest.mark.parametrize("task", [SOFTMAX, MULTILABEL], ids=lambda task: task.name)
def test_the_record_is_json_without_nan(task, kept):
    table = predictions(task)
    record = summarise(table[table["label"].isin(kept)], task)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["overall"]["macro_f1"] is None) == (len(kept) < 3)


def test_order_of_rows_and_their_index_do_not_matter():
    table = predictions(SOFTMAX)
    record, shuffled = (summarise(t, SOFTMAX) for t in (table, table.sample(frac=1, random_state=3)))
    for key in ("overall", "per_class"):
        one, other = (pd.json_normalize(r.pop(key)).iloc[0].to_dict() for r in (record, shuffled))
        assert one == pytest.approx(other)
    assert record == shuffled


@pytest.mark.parametrize("nobody", ["", None, pd.NA])
def test_an_image_without_a_patient_is_a_patient_of_its_own(nobody):
    table = predictions(SOFTMAX)
    table["patient_id"] = table["patient_id"].astype(object)
    table.loc[:3, "patient_id"] = nobody  # two patients of two images each
    assert summarise(table, SOFTMAX)["n_patients"] == 15 - 2 + 4


def spoil(column, value, row=4):
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
        (spoil("image_id", "image0"), "image_id: 'image0' on line 6; an earlier line"),
        (spoil("label", "COVID-19"), "label: 'COVID-19' on line 6; task three_class knows covid, normal, pneumonia"),
        (spoil("label", None), "label: None on line 6"),
        (spoil("prob_covid", 1.5), "prob_covid: 1.5 on line 6; a probability lies in [0, 1]"),
        (spoil("prob_covid", -0.1), "prob_covid: -0.1 on line 6"),
        (spoil("prob_normal", np.nan), "prob_normal: nan on line 6; every score is a finite number"),
        (spoil("prob_normal", "high"), "prob_normal: 'high' on line 6; every score is a finite number"),
        (spoil("logit_covid", np.inf), "logit_covid: inf on line 6"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_faulty_table_is_refused_by_name_and_line(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        summarise(change(predictions(SOFTMAX)), SOFTMAX)


def test_a_softmax_sums_to_one_and_sigmoids_need_not():
    table = predictions(MULTILABEL)
    summarise(table, MULTILABEL)
    with pytest.raises(
        InputError, match=r"sum of probabilities: .* on line 2, .*and 25 more; it is 1 in task three_cl"
    ):
        summarise(table, SOFTMAX)


def test_a_sum_within_a_thousandth_passes():
    table = predictions(BINARY)
    table["prob_covid"] = (table["prob_covid"] - 0.0009).clip(lower=0)
    summarise(table, BINARY)


def test_a_line_is_counted_by_position_not_by_index():
    table = predictions(SOFTMAX).iloc[10:]
    table = spoil("label", "flu", row=12)(table)
    with pytest.raises(InputError, match="'flu' on line 4"):
        summarise(table, SOFTMAX)
