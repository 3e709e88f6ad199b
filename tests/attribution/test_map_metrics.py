"""Metrics of maps have known values, and a map that does not depend on the weights is not published."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from covid_cls.attribution.map_metrics import (
    MAX_SIMILARITY,
    MapMetrics,
    border,
    measure_maps,
    randomise,
    share,
    similarity,
    summarise_maps,
)
from covid_cls.attribution.maps import METHODS, grad_cam
from covid_cls.models.backbones import build_network
from covid_cls.models.inference import Scorer
from covid_cls.models.transforms import Preprocess
from covid_cls.tasks import TASKS
from tests.attribution.toys import SIDE, bright_corner, corner_scorer, edge_scorer


def smooth(seed: int, n: int = 4) -> np.ndarray:
    """Return maps (n, 64, 64) in [0, 1], enlarged from 4 x 4 random places."""
    coarse = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear")[:, 0].numpy()
    return np.asarray(fine / fine.max(axis=(1, 2), keepdims=True))


@pytest.mark.parametrize("crop", [48, 64, 112, 224])
def test_the_border_share_of_a_uniform_map_is_its_area(crop: int) -> None:
    frame = border(crop)
    width = round(3 / 32 * crop)
    assert frame[:width].all()
    assert frame[:, -width:].all()
    assert not frame[width + 1 : -width - 1, width + 1 : -width - 1].any()
    assert share(np.ones((crop, crop), np.float32), frame) == pytest.approx(frame.mean())


def test_shares_of_known_maps() -> None:
    heat = np.zeros((64, 64), np.float32)
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    assert math.isnan(share(heat, mask))
    heat[10, 10], heat[50, 50] = 1, 0.25
    assert share(heat, mask) == pytest.approx(0.8)
    assert share(heat, ~mask) == pytest.approx(0.2)
    assert math.isnan(share(heat, None))


def test_deletion_and_insertion_of_a_network_that_uses_one_corner() -> None:
    scorer, canvases = corner_scorer(), bright_corner(1)
    # The corner is 1/16 of the image, so the first step deletes it.
    steps = 16
    left = np.zeros((SIDE, SIDE), bool)
    left[:, : SIDE // 2] = True
    maps, (found,) = measure_maps(scorer, [randomise(scorer, 0)], grad_cam, canvases, torch.tensor([0]), [left], steps)
    assert found.deletion == pytest.approx(0.75 / steps + 0.5 * (steps - 1) / steps, abs=1e-4)
    # The blurred corner is as bright.
    assert found.insertion == pytest.approx(1, abs=1e-3)
    assert found.deletion < found.random_deletion - 0.1
    assert found.lungs == pytest.approx(1)
    assert found.lungs_area == pytest.approx(0.5)
    assert found.border == pytest.approx(maps[0][border(SIDE)].sum() / maps[0].sum())


def test_insertion_needs_the_corner_if_blurring_hides_it() -> None:
    canvases = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.uint8)
    # White specks on black, which are darker than the mean grey after blurring.
    canvases[..., 2:8:3, 2:8:3] = 255
    steps = 16
    _, (found,) = measure_maps(corner_scorer(40_000), [], grad_cam, canvases, torch.tensor([0]), [None], steps)
    assert found.insertion == pytest.approx(1 - 0.25 / steps, abs=1e-3)
    assert found.insertion > found.random_insertion + 0.02
    assert math.isnan(found.lungs)
    assert math.isnan(found.lungs_area)


def test_curves_can_be_left_out_and_a_map_of_zeros_has_no_metrics() -> None:
    scorer = corner_scorer()
    randomised = [randomise(scorer, k) for k in range(2)]
    _, (left_out, _) = measure_maps(scorer, randomised, grad_cam, bright_corner(), torch.tensor([0, 1]), [None] * 2, 0)
    assert math.isnan(left_out.deletion)
    assert left_out.border > 0
    _, (_, empty) = measure_maps(scorer, randomised, grad_cam, bright_corner(), torch.tensor([0, 1]), [None] * 2, 4)
    assert all(math.isnan(number) for number in empty)
    assert not empty.published


@pytest.mark.parametrize("method", METHODS)
def test_a_map_of_edges_does_not_depend_on_the_weights_and_is_not_published(method: str) -> None:
    scorer = edge_scorer()
    randomised = [randomise(scorer, k) for k in range(3)]
    canvases = bright_corner(3)
    canvases[..., 20:40] //= 2
    _, measured = measure_maps(scorer, randomised, METHODS[method], canvases, torch.tensor([0, 0, 0]), [None] * 3, 0)
    for found in measured:
        assert found.similarity == pytest.approx(1, abs=1e-4)
        assert not found.published


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11_bn"])
def test_maps_of_a_network_change_with_its_weights(backbone: str) -> None:
    torch.manual_seed(0)
    scorer = Scorer(TASKS["binary"], build_network(backbone, 2, 8), Preprocess(size=128, crop=128)).eval()
    canvases = torch.randint(0, 256, (4, 1, 128, 128), dtype=torch.uint8)
    randomised = [randomise(scorer, k) for k in range(3)]
    with torch.no_grad():
        targets = torch.zeros(4, dtype=torch.int64)
    maps, measured = measure_maps(scorer, randomised, grad_cam, canvases, targets, [None] * 4, 0)
    # If no place is evidence for one class, there is evidence for the other.
    if maps.max() == 0:
        maps, measured = measure_maps(scorer, randomised, grad_cam, canvases, targets + 1, [None] * 4, 0)
    assert all(found.published for found in measured if not math.isnan(found.similarity))
    assert any(found.published for found in measured)


def test_metrics_of_an_image_do_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    scorer = Scorer(TASKS["binary"], build_network("resnet18", 2, 8), Preprocess(size=64, crop=64)).eval()
    canvases, randomised = bright_corner(3), [randomise(scorer, 0)]
    targets = torch.zeros(3, dtype=torch.int64)
    together = measure_maps(scorer, randomised, grad_cam, canvases, targets, [None] * 3, 4)[1]
    alone = [
        measure_maps(scorer, randomised, grad_cam, canvases[k : k + 1], targets[:1], [None], 4)[1][0] for k in range(3)
    ]
    # Rounding changes the order of nearly equal places.
    np.testing.assert_allclose(np.array(together), np.array(alone), atol=2e-3)


def test_randomised_networks_are_independent_copies() -> None:
    torch.manual_seed(0)
    scorer = Scorer(TASKS["binary"], build_network("resnet18", 2, 8), Preprocess(size=64, crop=64)).eval()
    before = {name: tensor.clone() for name, tensor in scorer.state_dict().items()}
    random = torch.get_rng_state()
    first, again, other = (randomise(scorer, seed) for seed in (0, 0, 1))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in scorer.state_dict().items())
    weights = [name for name, tensor in scorer.named_parameters() if tensor.ndim > 1]
    # 20 convolutions and the two layers of the head.
    assert len(weights) == 22
    for name in weights:
        copies = [network.state_dict()[name] for network in (first, again, other)]
        assert torch.equal(copies[0], copies[1])
        for two in ((copies[0], copies[2]), (copies[0], before[name])):
            likeness = torch.corrcoef(torch.stack([tensor.flatten() for tensor in two]))[0, 1]
            assert abs(float(likeness)) < 4.5 / math.sqrt(copies[0].numel())
    assert not first.training


def test_similarity_of_known_pairs() -> None:
    maps, unrelated, nothing = smooth(0), smooth(1), np.zeros((4, 64, 64), np.float32)
    np.testing.assert_allclose(similarity(maps, [maps]), 1, atol=1e-5)
    assert (similarity(maps, [unrelated]) < MAX_SIMILARITY).all()
    np.testing.assert_allclose(similarity(maps, [maps, unrelated]), (1 + similarity(maps, [unrelated])) / 2, atol=1e-5)
    # A counterpart of zeros is left out, and without any other the map depends on the weights.
    np.testing.assert_allclose(similarity(maps, [maps, nothing]), 1, atol=1e-5)
    assert (similarity(maps, [nothing]) == 0).all()
    assert np.isnan(similarity(nothing, [maps])).all()


def test_a_map_is_published_below_the_largest_similarity() -> None:
    numbers = MapMetrics(*[0.1] * 8)
    assert numbers._replace(similarity=MAX_SIMILARITY - 0.01).published
    assert not numbers._replace(similarity=MAX_SIMILARITY).published
    assert not numbers._replace(similarity=math.nan).published


TASK = TASKS["binary"]
# Share of the border at 224 pixels.
AREA = 0.33984375


def table(n: int, patients: int | None = None, **columns: object) -> pd.DataFrame:
    rows = pd.DataFrame([MapMetrics(0.3, 0.5, 0.25, 0.1, 0.4, 0.8, 0.6, 0.7)] * n)
    codes = np.arange(n) % (patients or n)
    ids = pd.DataFrame({"image_id": [f"i{k}" for k in range(n)], "patient_id": [f"p{k}" for k in codes]})
    return pd.concat([ids, rows], axis=1).assign(**{"target": "covid", **columns})


def test_means_are_compared_with_those_of_a_uniform_map() -> None:
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


def test_intervals_are_by_patient_and_agree_with_the_standard_error() -> None:
    border = np.random.default_rng(0).uniform(0.1, 0.5, 200)
    shared = np.repeat(border[:20], 10)
    alone, clustered = (
        summarise_maps(t, TASK, 224)["where"]["all"]["border"]["share"]
        for t in (table(200, border=border), table(200, border=shared, patient_id=[f"p{k // 10}" for k in range(200)]))
    )
    error = border.std(ddof=1) / np.sqrt(200)
    assert alone["high"] - alone["low"] == pytest.approx(2 * 1.97 * error, rel=0.1)
    assert clustered["high"] - clustered["low"] > 2.5 * (alone["high"] - alone["low"])


def test_classes_have_separate_means_and_absent_classes_have_no_entry() -> None:
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


def test_missing_metrics_are_left_out_and_do_not_count_as_zero() -> None:
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


def test_without_a_map_the_check_of_the_weights_has_no_result() -> None:
    empty = table(4, **dict.fromkeys(MapMetrics._fields, float("nan")))
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
