"""Thresholds from validation, frozen records, and the value of decisions at a threshold."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from covid_cls.errors import InputError
from covid_cls.evaluation.calibration import calibrated, logits
from covid_cls.evaluation.metrics import decide
from covid_cls.evaluation.thresholds import (
    choose_thresholds,
    decide_at,
    decision_curve,
    fit_operating,
    frozen_operating,
    predictive_values,
)
from covid_cls.io import write_predictions
from covid_cls.tasks import TASKS, Task
from tests.evaluation.test_assessment import predictions

ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
POSITIVE = np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=bool)
SCORE = np.array([0.1, 0.2, 0.3, 0.6, 0.4, 0.7, 0.8, 0.9])


def test_thresholds_of_a_known_case() -> None:
    found = choose_thresholds(POSITIVE, SCORE, sensitivity=0.95, specificity=0.95)
    assert found == {"youden": 0.7, "sensitivity_95": 0.4, "specificity_95": 0.7}


def test_thresholds_are_the_best_ones_that_reach_their_targets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        positive = rng.random(60) < 0.3
        # Rounded, so that there are ties.
        score = np.round(rng.normal(positive, 1), 1)
        cuts = choose_thresholds(positive, score, sensitivity=0.9, specificity=0.8)
        sensitivity = {cut: float((score[positive] >= cut).mean()) for cut in np.unique(score)}
        specificity = {cut: float((score[~positive] < cut).mean()) for cut in np.unique(score)}
        assert cuts["sensitivity_90"] == max(cut for cut, share in sensitivity.items() if share >= 0.9)
        reached = [cut for cut, share in specificity.items() if share >= 0.8]
        assert cuts["specificity_80"] == min(reached) if reached else math.isnan(cuts["specificity_80"])
        sums = {cut: sensitivity[cut] + specificity[cut] for cut in sensitivity}
        assert sums[cuts["youden"]] == pytest.approx(max(sums.values()))


def test_a_threshold_is_nan_if_no_score_reaches_the_target() -> None:
    found = choose_thresholds(POSITIVE, -SCORE, sensitivity=0.95, specificity=0.95)
    assert math.isnan(found["specificity_95"])
    assert math.isnan(found["youden"])
    assert found["sensitivity_95"] == -0.9


@ALL_TASKS
def test_the_fitted_record_is_json_and_depends_on_validation_only(task: Task) -> None:
    val = predictions(task, 200)
    record = fit_operating(val, task)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    shuffled = fit_operating(val.sample(frac=1, random_state=1), task)
    assert shuffled["thresholds"] == pytest.approx(record["thresholds"], abs=1e-9)
    prob = calibrated(logits(val, task), record["temperature"], task)[:, 0]
    covid = (val["label"] == "covid").to_numpy()
    cut = record["thresholds"]["sensitivity_95"]
    assert (prob[covid] >= cut).mean() == record["validation"]["sensitivity_95"]["sensitivity"] >= 0.95
    assert (prob[~covid] < cut).mean() == record["validation"]["sensitivity_95"]["specificity"]
    assert (record["n_images"], record["n_patients"], record["positive"]) == (200, 100, "covid")


@ALL_TASKS
@pytest.mark.parametrize("label", ["covid", "normal"])
def test_one_class_gives_no_thresholds_and_notes_it(task: Task, label: str) -> None:
    val = predictions(task, 60)
    record = fit_operating(val[val["label"] == label], task)
    assert set(record["thresholds"].values()) == {None}
    assert record["temperature"] == 1.0
    assert any("no temperature" in note for note in record["notes"])
    assert any("no threshold for youden" in note for note in record["notes"])


@pytest.mark.parametrize("target", [0, 1, 1.5])
def test_a_target_outside_0_to_1_is_refused(target: float) -> None:
    with pytest.raises(InputError, match=f"sensitivity={target}: must lie between 0 and 1"):
        fit_operating(predictions(TASKS["binary"]), TASKS["binary"], sensitivity=target)


def test_a_frozen_record_is_not_fitted_again(tmp_path: Path) -> None:
    task = TASKS["three_class"]
    write_predictions(predictions(task, 60), tmp_path / "predictions-val.csv")
    first = frozen_operating(tmp_path, task, sensitivity=0.9, specificity=0.95)
    before = (tmp_path / "operating.json").read_bytes()
    write_predictions(predictions(task, 60, seed=1), tmp_path / "predictions-val.csv")
    assert frozen_operating(tmp_path, task, sensitivity=0.9, specificity=0.95) == first
    with pytest.raises(InputError, match=r"operating.json: was fitted with sensitivity=0.9 specificity=0.95"):
        frozen_operating(tmp_path, task, sensitivity=0.95, specificity=0.95)
    assert (tmp_path / "operating.json").read_bytes() == before
    (tmp_path / "operating.json").write_text('{"temperature": 1.0}')
    with pytest.raises(InputError, match=r"operating.json: lacks \['thresholds'"):
        frozen_operating(tmp_path, task, sensitivity=0.9, specificity=0.95)


@ALL_TASKS
def test_a_threshold_affects_only_the_decision_for_covid(task: Task) -> None:
    prob = calibrated(np.random.default_rng(0).normal(size=(200, len(task.classes))), 1, task)
    for cut in (0.2, 0.5, 0.8):
        decided = decide_at(prob, cut, task)
        assert ((decided == 0) == (prob[:, 0] >= cut)).all()
    if task.multilabel or len(task.classes) == 2:
        assert (decide_at(prob, 0.5, task) == decide(prob, task)).all()


@pytest.mark.parametrize(
    ("prevalence", "ppv"), [(0.05, 0.9 * 0.05 / (0.9 * 0.05 + 0.1 * 0.95)), (0.5, 0.9), (0.01, 0.009 / 0.108)]
)
def test_predictive_values_by_bayes(prevalence: float, ppv: float) -> None:
    assert predictive_values(0.9, 0.9, prevalence)[0] == pytest.approx(ppv, abs=1e-12)
    npv = 0.9 * (1 - prevalence) / (0.9 * (1 - prevalence) + 0.1 * prevalence)
    assert predictive_values(0.9, 0.9, prevalence)[1] == pytest.approx(npv, abs=1e-12)


def test_predictive_values_are_nan_if_no_image_is_called_so() -> None:
    assert math.isnan(predictive_values(0.0, 1.0, 0.1)[0])
    assert math.isnan(predictive_values(1.0, 0.0, 0.1)[1])


def test_net_benefit_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(300) < 0.3
    # Rounded, so that some probabilities equal a threshold.
    prob = np.round(np.clip(rng.normal(0.3 + 0.3 * positive, 0.2), 0, 1), 2)
    curve = decision_curve(positive, prob)
    assert curve["threshold"] == pytest.approx(np.arange(0.01, 1, 0.01))
    for k, cut in enumerate(curve["threshold"]):
        (_, false_positive), (_, true_positive) = confusion_matrix(positive, prob >= cut)
        odds = cut / (1 - cut)
        assert curve["model"][k] == pytest.approx((true_positive - false_positive * odds) / 300, abs=1e-12)
        assert curve["treat_all"][k] == pytest.approx(positive.mean() - (1 - positive.mean()) * odds, abs=1e-12)
    assert set(curve["treat_none"]) == {0.0}


def test_net_benefit_is_nan_without_images_of_both_kinds() -> None:
    curve = decision_curve(np.ones(5, dtype=bool), np.full(5, 0.5))
    assert np.isnan(curve["model"]).all()
    assert np.isnan(curve["treat_all"]).all()
