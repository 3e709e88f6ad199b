import warnings

import numpy as np
import pandas as pd
import pytest

from covid_cls.evaluation.metrics import decide
from covid_cls.evaluation.resampling import patient_codes, patient_weights, weighted_scores
from covid_cls.labels import TASKS

SOFTMAX = TASKS["three_class"]


def table(image_id, patient_id):
    return pd.DataFrame({"image_id": image_id, "patient_id": patient_id})


# --- patients


@pytest.mark.parametrize("nobody", ["", None, pd.NA, np.nan])
def test_an_image_without_a_patient_is_a_patient_of_its_own(nobody):
    codes = patient_codes(table(["a", "b", "c", "d"], ["p", nobody, nobody, "p"]))
    assert codes[0] == codes[3]
    assert sorted(np.unique(codes)) == [0, 1, 2]


def test_an_image_is_no_patient_of_the_same_name():
    assert len(set(patient_codes(table(["a", "b"], ["", "a"])))) == 2


def test_codes_follow_the_ids_not_the_rows():
    rows = table(list("abcdef"), ["p2", "", "p1", "p2", "p1", ""])
    order = np.random.default_rng(0).permutation(6)
    assert patient_codes(rows.iloc[order]).tolist() == patient_codes(rows)[order].tolist()


# --- resamples


def test_whole_patients_are_drawn_as_many_as_there_are_in_each_class():
    patients = np.repeat(np.arange(40), 3)
    truth = np.repeat(np.r_[np.zeros(10, int), np.ones(30, int)], 3)
    weights = patient_weights(truth, patients, 200, seed=1)
    assert weights.shape == (200, 120)
    by_patient = weights.reshape(200, 40, 3)
    assert (by_patient == by_patient[:, :, :1]).all()
    assert (by_patient[:, :10, 0].sum(axis=1) == 10).all()
    assert (by_patient[:, 10:, 0].sum(axis=1) == 30).all()
    # of a multinomial: mean 1, variance 1 - 1/n
    drawn = by_patient[:, 10:, 0].astype(float)
    assert drawn.mean() == 1
    assert drawn.var() == pytest.approx(1 - 1 / 30, abs=0.08)


def test_the_seed_decides():
    truth, patients = np.arange(20) % 2, np.arange(20)
    first, again, other = (patient_weights(truth, patients, 5, seed) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_a_patient_of_two_classes_stands_in_the_rarer_and_no_class_is_lost():
    patients = np.array([0, 0, 1, 1, 2, 3, 4, 5, 6, 7])
    truth = np.array([0, 1, 0, 1, 1, 1, 1, 1, 1, 1])  # patients 0 and 1 have covid and normal images
    weights = patient_weights(truth, patients, 500, seed=0)
    assert (weights[:, 0] + weights[:, 2] == 2).all()
    assert (weights[:, 4:].sum(axis=1) == 6).all()
    assert len(np.unique(weights[:, 0])) == 3


def test_a_lone_patient_is_drawn_with_those_who_share_a_class():
    patients = np.array([0, 0, 1, 1, 2])
    truth = np.array([0, 1, 0, 1, 1])  # patient 2 is the only one without a covid image
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = patient_weights(truth, patients, 300, seed=0)
    assert set(np.unique(weights[:, 4])) == {0, 1, 2, 3}


def test_a_class_of_one_patient_is_named():
    patients, truth = np.array([0, 0, 1, 2, 3]), np.array([0, 0, 1, 1, 1])
    with pytest.warns(UserWarning, match="class index 0 has a single patient") as caught:
        weights = patient_weights(truth, patients, 50, seed=0)
    assert len(caught) == 1
    assert (weights[:, :2] == 1).all()


# --- scores of resamples (their values: test_against_sklearn)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_only_gives_the_same_scores_and_no_others(task):
    rng = np.random.default_rng(0)
    truth, size = rng.integers(0, len(task.classes), 40), len(task.classes)
    prob = rng.dirichlet(np.ones(size), 40)
    arguments = truth, prob, decide(prob, task), task, patient_weights(truth, np.arange(40), 20, 0)
    everything = weighted_scores(*arguments)
    for name, values in everything.items():
        chosen = weighted_scores(*arguments, only=[name])
        assert list(chosen) == [name]
        np.testing.assert_array_equal(chosen[name], values)


def test_the_size_of_chunks_does_not_matter(monkeypatch):
    rng = np.random.default_rng(1)
    truth, prob = rng.integers(0, 3, 50), rng.dirichlet(np.ones(3), 50)
    arguments = truth, prob, decide(prob, SOFTMAX), SOFTMAX, patient_weights(truth, np.arange(50), 30, 0)
    whole = weighted_scores(*arguments)
    monkeypatch.setattr("covid_cls.evaluation.resampling._CHUNK", 350)
    for name, values in weighted_scores(*arguments).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-13, err_msg=name)


def test_ece_of_the_top_label_is_the_known_one():
    task = TASKS["binary"]
    prob = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    truth = np.array([0, 1, 0, 1])
    once = np.ones((1, 4), dtype=int)
    # four bins of one image each, as with the ten bins of the known answer: (.1 + .8 + .4 + .3) / 4
    assert weighted_scores(truth, prob, decide(prob, task), task, once)["ece"][0] == pytest.approx(0.4)


def test_a_bin_holds_its_upper_edge():
    task = TASKS["binary"]
    prob = np.array([[0.6, 0.4], [0.61, 0.39]])  # 0.6 = 9/15 is the last of its bin
    scores = weighted_scores(np.array([0, 1]), prob, np.array([0, 0]), task, np.ones((1, 2), dtype=int))
    assert scores["ece"][0] == pytest.approx((0.4 + 0.61) / 2)  # in one bin it would be |0.5 - 0.605|
