"""What the maps of a set add up to: means, intervals by patient, and the verdict on the method."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest

from covid_cls.attribution.audit import Measures
from covid_cls.attribution.summary import summarise_maps
from covid_cls.labels import TASKS

TASK = TASKS["binary"]
AREA = 0.33984375  # of the border at 224 pixels


def table(n: int, patients: int | None = None, **columns: object) -> pd.DataFrame:
    rows = pd.DataFrame([Measures(0.3, 0.5, 0.25, 0.1, 0.4, 0.8, 0.6, 0.7)] * n)
    codes = np.arange(n) % (patients or n)
    ids = pd.DataFrame({"image_id": [f"i{k}" for k in range(n)], "patient_id": [f"p{k}" for k in codes]})
    return pd.concat([ids, rows], axis=1).assign(**{"target": "covid", **columns})


def test_means_stand_beside_what_a_uniform_map_would_have() -> None:
    border = np.linspace(0.2, 0.4, 20)
    found = summarise_maps(table(20, border=border), TASK, 224)
    part = found["where"]["all"]["border"]
    assert part["share"]["value"] == pytest.approx(0.3)
    assert part["share"]["low"] < 0.3 < part["share"]["high"]
    assert part["area"] == pytest.approx(AREA)
    assert part["times"] == pytest.approx(0.3 / AREA)
    assert part["n"] == 20
    assert found["where"]["all"]["lungs"]["times"] == pytest.approx(2)
    difference = found["curves"]["deletion"]["difference"]
    assert difference["value"] == pytest.approx(-0.2)
    assert difference["low"] < -0.2 < difference["high"]
    assert found["curves"]["insertion"]["map"]["value"] == pytest.approx(0.8)
    assert json.dumps(found, allow_nan=False)


def test_intervals_are_by_patient_and_hold_the_standard_error() -> None:
    border = np.random.default_rng(0).uniform(0.1, 0.5, 200)
    shared = np.repeat(border[:20], 10)
    alone, clustered = (
        summarise_maps(t, TASK, 224)["where"]["all"]["border"]["share"]
        for t in (table(200, border=border), table(200, border=shared, patient_id=[f"p{k // 10}" for k in range(200)]))
    )
    error = border.std(ddof=1) / np.sqrt(200)
    assert alone["high"] - alone["low"] == pytest.approx(2 * 1.97 * error, rel=0.1)
    assert clustered["high"] - clustered["low"] > 2.5 * (alone["high"] - alone["low"])


def test_classes_are_told_apart_and_absent_ones_are_absent() -> None:
    both = table(10, target=["covid"] * 4 + ["normal"] * 6, border=[0.5] * 4 + [0.2] * 6)
    where = summarise_maps(both, TASK, 224)["where"]
    assert list(where) == ["all", "covid", "normal"]
    assert where["covid"]["border"]["share"]["value"] == pytest.approx(0.5)
    assert where["normal"]["border"]["n"] == 6
    assert list(summarise_maps(table(3), TASK, 224)["where"]) == ["all", "covid"]


@pytest.mark.parametrize(("similar", "passed"), [(0, True), (1, True), (2, False), (10, False)])
def test_nine_of_ten_maps_must_change(similar: int, passed: bool) -> None:
    found = summarise_maps(table(10, similarity=[0.5] * similar + [0.1] * (10 - similar)), TASK, 224)["weights"]
    assert found["changed"]["value"] == pytest.approx(1 - similar / 10)
    assert found["passed"] is passed


def test_negative_similarities_have_an_interval() -> None:
    found = summarise_maps(table(10, similarity=np.linspace(-0.2, 0.1, 10)), TASK, 224)["weights"]["similarity"]
    assert found["value"] == pytest.approx(-0.05)
    assert -1 < found["low"] < -0.05 < found["high"] < 1


def test_missing_numbers_are_left_out_and_never_zero() -> None:
    nan = float("nan")
    part = table(6, lungs=[nan, nan, 0.4, 0.6, nan, nan], lungs_area=[nan, nan, 0.2, 0.3, nan, nan])
    lungs = summarise_maps(part, TASK, 224)["where"]["all"]["lungs"]
    assert lungs["n"] == 2
    assert lungs["share"]["value"] == pytest.approx(0.5)
    assert lungs["area"] == pytest.approx(0.25)
    none = summarise_maps(table(3, lungs=nan, lungs_area=nan, deletion=nan, random_deletion=nan), TASK, 224)
    assert none["where"]["all"]["lungs"] == {
        "share": {"value": None, "low": None, "high": None, "method": "undefined"},
        "area": None,
        "times": None,
        "n": 0,
    }
    assert none["curves"]["deletion"]["difference"]["value"] is None


def test_a_set_without_a_map_has_no_verdict() -> None:
    empty = table(4, **dict.fromkeys(Measures._fields, float("nan")))
    found = summarise_maps(empty, TASK, 224)
    assert (found["n_images"], found["n_maps"]) == (4, 0)
    assert found["weights"]["passed"] is None
    assert found["where"] == {}


def test_a_single_patient_has_a_wide_interval_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summarise_maps(table(3, patients=1), TASK, 224)["where"]["all"]["border"]["share"]
    assert found["value"] == pytest.approx(0.3)
    assert found["low"] < 0.05
    assert found["high"] > 0.9
