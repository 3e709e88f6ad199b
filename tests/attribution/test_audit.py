"""Every number of a map has a known answer, and a map that does not need the weights is not published."""

import math

import numpy as np
import pytest
import torch

from covid_cls.attribution.audit import SURVIVES, Measures, border, measure, randomise, share, similarity
from covid_cls.attribution.maps import METHODS, grad_cam
from covid_cls.labels import TASKS
from covid_cls.models.backbones import build_network
from covid_cls.models.scorer import Scorer
from covid_cls.models.transforms import Preprocess
from tests.attribution.toys import SIDE, bright_corner, corner_scorer, edge_scorer


def smooth(seed: int, n: int = 4) -> np.ndarray:
    """Maps (n, 64, 64) in [0, 1], drawn up from 4 x 4 random places."""
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


def test_deletion_and_insertion_of_a_network_that_looks_at_one_corner() -> None:
    scorer, canvases = corner_scorer(), bright_corner(1)
    steps = 16  # the corner is 1/16 of the picture: it is gone after one step
    left = np.zeros((SIDE, SIDE), bool)
    left[:, : SIDE // 2] = True
    maps, (found,) = measure(scorer, [randomise(scorer, 0)], grad_cam, canvases, torch.tensor([0]), [left], steps)
    assert found.deletion == pytest.approx(0.75 / steps + 0.5 * (steps - 1) / steps, abs=1e-4)
    assert found.insertion == pytest.approx(1, abs=1e-3)  # the blurred corner is as bright
    assert found.deletion < found.random_deletion - 0.1
    assert found.lungs == pytest.approx(1)
    assert found.lungs_area == pytest.approx(0.5)
    assert found.border == pytest.approx(maps[0][border(SIDE)].sum() / maps[0].sum())


def test_insertion_needs_the_corner_when_blurring_hides_it() -> None:
    canvases = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.uint8)
    canvases[..., 2:8:3, 2:8:3] = 255  # specks on black, which a blur leaves darker than the mean grey
    steps = 16
    _, (found,) = measure(corner_scorer(40_000), [], grad_cam, canvases, torch.tensor([0]), [None], steps)
    assert found.insertion == pytest.approx(1 - 0.25 / steps, abs=1e-3)
    assert found.insertion > found.random_insertion + 0.02
    assert math.isnan(found.lungs)
    assert math.isnan(found.lungs_area)


def test_curves_can_be_left_out_and_a_map_of_zeros_has_no_numbers() -> None:
    scorer = corner_scorer()
    draws = [randomise(scorer, k) for k in range(2)]
    _, (left_out, _) = measure(scorer, draws, grad_cam, bright_corner(), torch.tensor([0, 1]), [None] * 2, 0)
    assert math.isnan(left_out.deletion)
    assert left_out.border > 0
    _, (_, empty) = measure(scorer, draws, grad_cam, bright_corner(), torch.tensor([0, 1]), [None] * 2, 4)
    assert all(math.isnan(number) for number in empty)
    assert not empty.published


@pytest.mark.parametrize("method", METHODS)
def test_a_map_of_edges_survives_random_weights_and_is_not_published(method: str) -> None:
    scorer = edge_scorer()
    draws = [randomise(scorer, k) for k in range(3)]
    canvases = bright_corner(3)
    canvases[..., 20:40] //= 2
    _, measured = measure(scorer, draws, METHODS[method], canvases, torch.tensor([0, 0, 0]), [None] * 3, 0)
    for found in measured:
        assert found.similarity == pytest.approx(1, abs=1e-4)
        assert not found.published


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11_bn"])
def test_maps_of_a_network_change_with_its_weights(backbone: str) -> None:
    torch.manual_seed(0)
    scorer = Scorer(TASKS["binary"], build_network(backbone, 2, 8), Preprocess(size=128, crop=128)).eval()
    canvases = torch.randint(0, 256, (4, 1, 128, 128), dtype=torch.uint8)
    draws = [randomise(scorer, k) for k in range(3)]
    with torch.no_grad():
        targets = torch.zeros(4, dtype=torch.int64)
    maps, measured = measure(scorer, draws, grad_cam, canvases, targets, [None] * 4, 0)
    if maps.max() == 0:  # no place speaks for one class: then all do for the other
        maps, measured = measure(scorer, draws, grad_cam, canvases, targets + 1, [None] * 4, 0)
    assert all(found.published for found in measured if not math.isnan(found.similarity))
    assert any(found.published for found in measured)


def test_numbers_of_an_image_do_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    scorer = Scorer(TASKS["binary"], build_network("resnet18", 2, 8), Preprocess(size=64, crop=64)).eval()
    canvases, draws = bright_corner(3), [randomise(scorer, 0)]
    targets = torch.zeros(3, dtype=torch.int64)
    together = measure(scorer, draws, grad_cam, canvases, targets, [None] * 3, 4)[1]
    alone = [measure(scorer, draws, grad_cam, canvases[k : k + 1], targets[:1], [None], 4)[1][0] for k in range(3)]
    np.testing.assert_allclose(np.array(together), np.array(alone), atol=2e-3)  # rounding reorders near ties


def test_randomised_networks_are_independent_copies() -> None:
    torch.manual_seed(0)
    scorer = Scorer(TASKS["binary"], build_network("resnet18", 2, 8), Preprocess(size=64, crop=64)).eval()
    before = {name: tensor.clone() for name, tensor in scorer.state_dict().items()}
    random = torch.get_rng_state()
    first, again, other = (randomise(scorer, seed) for seed in (0, 0, 1))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in scorer.state_dict().items())
    weights = [name for name, tensor in scorer.named_parameters() if tensor.ndim > 1]
    assert len(weights) == 22  # 20 convolutions and the two layers of the head
    for name in weights:
        drawn = [network.state_dict()[name] for network in (first, again, other)]
        assert torch.equal(drawn[0], drawn[1])
        for two in ((drawn[0], drawn[2]), (drawn[0], before[name])):
            likeness = torch.corrcoef(torch.stack([tensor.flatten() for tensor in two]))[0, 1]
            assert abs(float(likeness)) < 4.5 / math.sqrt(drawn[0].numel())
    assert not first.training


def test_similarity_of_known_pairs() -> None:
    maps, unrelated, nothing = smooth(0), smooth(1), np.zeros((4, 64, 64), np.float32)
    np.testing.assert_allclose(similarity(maps, [maps]), 1, atol=1e-5)
    assert (similarity(maps, [unrelated]) < SURVIVES).all()
    np.testing.assert_allclose(similarity(maps, [maps, unrelated]), (1 + similarity(maps, [unrelated])) / 2, atol=1e-5)
    np.testing.assert_allclose(similarity(maps, [maps, nothing]), 1, atol=1e-5)  # nothing to compare with: left out
    assert (similarity(maps, [nothing]) == 0).all()  # the map has vanished with the weights
    assert np.isnan(similarity(nothing, [maps])).all()


def test_what_may_be_published() -> None:
    numbers = Measures(*[0.1] * 8)
    assert numbers._replace(similarity=SURVIVES - 0.01).published
    assert not numbers._replace(similarity=SURVIVES).published
    assert not numbers._replace(similarity=math.nan).published
