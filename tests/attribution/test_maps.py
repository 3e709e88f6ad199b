"""Maps mark what the network uses, follow the formulas of the papers, and do not change the network."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from covid_cls.attribution.maps import METHODS, grad_cam, last_convolution, occlusion
from covid_cls.models.backbones import build_network
from covid_cls.models.inference import Scorer
from covid_cls.models.transforms import Preprocess
from covid_cls.tasks import TASKS
from tests.attribution.toys import CORNER, SIDE, bright_corner, corner_scorer


def scorer(backbone: str, crop: int = 64) -> Scorer:
    torch.manual_seed(0)
    net = build_network(backbone, 3, hidden=8)
    return Scorer(TASKS["three_class"], net, Preprocess(size=crop, crop=crop)).eval()


def noise(n: int = 2, side: int = 72) -> Tensor:
    return torch.randint(0, 256, (n, 1, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def by_hand(scorer: Scorer, canvases: Tensor, targets: Tensor, layer: torch.nn.Module) -> np.ndarray:
    """Compute Grad-CAM with a hook and a backward pass (Selvaraju et al. 2017, equations 1 and 2)."""
    net = copy.deepcopy(scorer.net)
    names = {module: name for name, module in scorer.net.named_modules()}
    kept: list[Tensor] = []
    net.get_submodule(names[layer]).register_forward_hook(lambda *args: kept.append(args[2].clone()) or kept[-1])
    logits = net(scorer.prepare(canvases))
    gradient = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), kept[0])[0]
    coarse = (gradient.mean(dim=(2, 3), keepdim=True) * kept[0]).sum(dim=1, keepdim=True).relu()
    fine = F.interpolate(coarse, (64, 64), mode="bilinear")[:, 0].detach().numpy()
    return np.asarray(fine / np.maximum(fine.max(axis=(1, 2), keepdims=True), 1e-30))


@pytest.mark.parametrize("method", METHODS)
def test_maps_mark_the_place_that_the_network_uses(method: str) -> None:
    maps = METHODS[method](corner_scorer(), bright_corner(), torch.tensor([0, 0]))
    assert maps.shape == (2, SIDE, SIDE)
    assert maps.dtype == np.float32
    # Occlusion also marks squares that touch the corner.
    reach = CORNER if method == "grad_cam" else CORNER + SIDE // 7
    for heat in maps:
        assert heat.max() == 1
        assert heat.min() == 0
        assert heat[reach:].max() == 0
        assert heat[:, reach:].max() == 0
        assert heat[:CORNER, :CORNER].mean() > 0.4


@pytest.mark.parametrize("method", METHODS)
def test_a_map_without_evidence_for_the_class_stays_zero(method: str) -> None:
    assert METHODS[method](corner_scorer(), bright_corner(), torch.tensor([1, 1])).max() == 0


@pytest.mark.parametrize(
    ("backbone", "layer"), [("resnet18", "layer4"), ("vgg11", "block5.19"), ("vgg11_bn", "block5.27")]
)
def test_grad_cam_follows_the_formula_of_the_paper_at_the_last_convolution(backbone: str, layer: str) -> None:
    network = scorer(backbone)
    module = network.net.get_submodule(layer)
    assert last_convolution(network.net) is module
    canvases, targets = noise(3), torch.tensor([0, 1, 2])
    maps = grad_cam(network, canvases, targets)
    assert maps.max() == 1
    np.testing.assert_allclose(maps, by_hand(network, canvases, targets, module), atol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11"])
def test_occlusion_is_the_decrease_of_the_logit_under_a_grey_square(backbone: str) -> None:
    network, canvases, side = scorer(backbone), noise(1), 32
    view = network.preprocess.centre(canvases)
    with torch.no_grad():
        complete = network.net(network.preprocess.normalise(view.clone()))[0]
        total, times = torch.zeros(3, 64, 64), torch.zeros(64, 64)
        for top in (0, 16, 32):
            for left in (0, 16, 32):
                hidden = view.clone()
                hidden[..., top : top + side, left : left + side] = network.preprocess.mean
                fall = complete - network.net(network.preprocess.normalise(hidden))[0]
                total[:, top : top + side, left : left + side] += fall[:, None, None]
                times[top : top + side, left : left + side] += 1
    # A class whose logit decreases somewhere.
    target = int(total.amax(dim=(1, 2)).argmax())
    maps = occlusion(network, canvases, torch.tensor([target]), patch=side)
    expected = (total[target] / times).clamp(min=0)
    np.testing.assert_allclose(maps[0], (expected / expected.max()).numpy(), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["resnet18", "vgg11_bn"])
def test_the_network_is_not_changed(method: str, backbone: str) -> None:
    network = scorer(backbone, crop=32)
    network.net.train()
    network.net.freeze("layer3" if backbone == "resnet18" else "block4")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    needs = [parameter.requires_grad for parameter in network.parameters()]
    canvases, random = noise(1, 32), torch.get_rng_state()
    given = canvases.clone()
    METHODS[method](network, canvases, torch.tensor([2]))
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(given, canvases)
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == needs
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("method", METHODS)
def test_frozen_networks_and_callers_without_gradients_get_the_same_maps(method: str) -> None:
    network, canvases, targets = scorer("resnet18", crop=32), noise(1, 36), torch.tensor([1])
    free = METHODS[method](network, canvases, targets)
    network.requires_grad_(False)
    np.testing.assert_array_equal(METHODS[method](network, canvases, targets), free)
    with torch.no_grad():
        np.testing.assert_array_equal(METHODS[method](network, canvases, targets), free)
    # As in Lightning's validation.
    with torch.inference_mode():
        np.testing.assert_array_equal(METHODS[method](network, canvases.clone(), targets), free)


def test_dropout_does_not_affect_a_map() -> None:
    network, canvases, targets = scorer("resnet18"), noise(), torch.tensor([0, 1])
    expected = grad_cam(network, canvases, targets)
    network.train()
    np.testing.assert_array_equal(grad_cam(network, canvases, targets), expected)
