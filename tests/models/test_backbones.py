"""The stages together are torchvision's network for grey images; each can be run from, run to and frozen."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from covid_cls.errors import InputError
from covid_cls.models.backbones import (
    BACKBONES,
    STRATEGIES,
    Staged,
    apply_strategy,
    build_network,
    freeze_report,
    grey_convolution,
)
from covid_cls.models.weights import load_pretrained
from tests.strategies import STAGES, family_name, trainable_stages

# torchvision's numbers of the convolutions in the fifth block of a VGG.
LAST_CONVOLUTIONS = {
    "vgg11": (16, 18),
    "vgg13": (20, 22),
    "vgg16": (24, 26, 28),
    "vgg19": (28, 30, 32, 34),
    "vgg11_bn": (22, 25),
    "vgg13_bn": (28, 31),
    "vgg16_bn": (34, 37, 40),
    "vgg19_bn": (40, 43, 46, 49),
}
HEADS = {"resnet18": 77_403, "resnet34": 77_403, "resnet50": 307_803, **dict.fromkeys(LAST_CONVOLUTIONS, 3_763_803)}


@pytest.fixture(scope="module", params=BACKBONES)
def built(request: pytest.FixtureRequest) -> tuple[str, Staged]:
    torch.manual_seed(0)
    return request.param, build_network(request.param, classes=3)


@pytest.fixture
def network(built: tuple[str, Staged]) -> Staged:
    """Return a copy that a test may freeze and train."""
    return copy.deepcopy(built[1])


def random_statistics(network: nn.Module) -> None:
    """Give batch norms parameters and statistics as after training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)


def trainable_names(network: Staged) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_a_network_gives_the_same_logits_when_it_is_stopped_and_continued_at_any_stage(
    built: tuple[str, Staged],
) -> None:
    network = built[1].eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        logits = network(x)
        assert logits.shape == (2, 3)
        for k in range(len(network.stage_names) + 1):
            assert torch.equal(network.run(network.run(x, stop=k), start=k), logits), k
        assert torch.equal(network.run(x, stop=0), x)


def test_the_stages_have_these_names(built: tuple[str, Staged]) -> None:
    backbone, network = built
    assert network.stage_names == STAGES[family_name(backbone)]


def test_the_head_has_the_known_number_of_parameters(built: tuple[str, Staged]) -> None:
    backbone, network = built
    head = sum(p.numel() for p in network.get_submodule("head").parameters())
    assert head == HEADS[backbone]


def test_the_initialisation_is_torchvisions(built: tuple[str, Staged]) -> None:
    convolutions = [module for module in built[1].modules() if isinstance(module, nn.Conv2d)]
    for number, layer in enumerate(convolutions):
        fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
        # The first convolution's filters are sums of three.
        colours = 3 if number == 0 else 1
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 * colours / fan_out), rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    for module in built[1].modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
            assert not module.running_mean.any()  # type: ignore[union-attr]
            assert (module.running_var == 1).all()  # type: ignore[union-attr]


def test_the_tensor_names_map_to_torchvisions(built: tuple[str, Staged]) -> None:
    backbone, network = built
    with torch.device("meta"):
        theirs = models.get_model(backbone, weights=None).state_dict()
    ours = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("head.")}
    entry = BACKBONES[backbone]
    named = {entry.torchvision_name(name): tensor for name, tensor in ours.items()}
    assert len(named) == len(ours)
    assert set(named) == {name for name in theirs if name.partition(".")[0] != entry.classifier}
    first = entry.torchvision_name(next(iter(ours)))
    for name, tensor in named.items():
        if name != first:
            assert tensor.shape == theirs[name].shape, name


@pytest.mark.parametrize("built", LAST_CONVOLUTIONS, indirect=True)
def test_block5_of_a_vgg_has_its_last_convolutions(built: tuple[str, Staged]) -> None:
    backbone, network = built
    block = network.get_submodule("block5")
    found = tuple(int(name) for name, layer in block.named_children() if isinstance(layer, nn.Conv2d))
    assert found == LAST_CONVOLUTIONS[backbone]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_exactly_these_stages(built: tuple[str, Staged], network: Staged, strategy: str) -> None:
    apply_strategy(network, strategy)
    expected = trainable_stages(built[0], strategy)
    assert trainable_names(network) == {n for n, _ in network.named_parameters() if n.partition(".")[0] in expected}
    assert not set(network.frozen_names) & expected
    assert {n for n in network.stage_names if n not in expected and n != "pool"} <= set(network.frozen_names)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_stages_stay_in_eval_mode_after_train(network: Staged, strategy: str) -> None:
    apply_strategy(network, strategy)
    for mode in (True, False, True):
        assert network.train(mode) is network
        for name, stage in network.named_children():
            expected = mode and name not in network.frozen_names
            assert {module.training for module in stage.modules()} == {expected}, name
    assert not any(module.training for module in network.eval().modules())


@pytest.mark.parametrize("until", range(5))
def test_freeze_until_freezes_up_to_and_including_a_stage(network: Staged, until: int) -> None:
    for strategy in STRATEGIES:
        # It decides instead of the strategy's name.
        apply_strategy(network, strategy, network.stage_names[until])
        assert network.frozen_names == network.stage_names[: until + 1]
    free = set(network.stage_names[until + 1 :])
    assert {name.partition(".")[0] for name in trainable_names(network)} == free - {"pool"}


def test_a_strategy_unfreezes_what_another_one_froze(network: Staged) -> None:
    apply_strategy(network, "fc")
    apply_strategy(network, "full")
    assert trainable_names(network) == {name for name, _ in network.named_parameters()}
    assert all(module.training for module in network.train().modules())


@pytest.mark.parametrize("stage", ["layer5", "block6", "pool", "head", ""])
def test_an_unknown_stage_is_refused_and_the_message_lists_the_stages(stage: str) -> None:
    network = build_network("resnet18", 2)
    with pytest.raises(InputError, match="stem, layer1, layer2, layer3, layer4"):
        apply_strategy(network, "partial", stage)


def test_unknown_names_are_refused_and_the_message_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"backbone.name=resnet19.*resnet18.*vgg19_bn"):
        build_network("resnet19", 2)
    with pytest.raises(InputError, match=r"strategy.name=half.*fc, partial, full"):
        apply_strategy(build_network("resnet18", 2), "half")


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (
            "resnet18",
            {
                "stem": (7 * 7 * 64 + 2 * 64, 0, "frozen"),
                "layer4": (8_393_728, 8_393_728, "batch"),
                "head": (77_403, 77_403, "none"),
            },
        ),
        (
            "vgg16",
            {
                "block4": (5_899_776, 0, "none"),
                "block5": (7_079_424, 7_079_424, "none"),
                "head": (3_763_803, 3_763_803, "none"),
            },
        ),
        (
            "vgg16_bn",
            {
                "block4": (5_899_776 + 6 * 512, 0, "frozen"),
                "block5": (7_079_424 + 6 * 512, 7_079_424 + 6 * 512, "batch"),
                "head": (3_763_803, 3_763_803, "none"),
            },
        ),
    ],
    indirect=["built"],
    ids=["resnet18", "vgg16", "vgg16_bn"],
)
def test_the_freeze_report_of_partial_has_the_known_counts(
    network: Staged, expected: dict[str, tuple[int, int, str]]
) -> None:
    apply_strategy(network, "partial")
    found = {line.stage: (line.parameters, line.trainable, line.norm) for line in freeze_report(network)}
    assert {stage: found[stage] for stage in expected} == expected


def test_the_freeze_report_adds_up(built: tuple[str, Staged], network: Staged) -> None:
    apply_strategy(network, "partial")
    report = freeze_report(network)
    assert [line.stage for line in report] == [name for name in network.stage_names if name != "pool"]
    assert sum(line.parameters for line in report) == sum(p.numel() for p in network.parameters())
    assert sum(line.trainable for line in report) == sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_layer4_of_resnet18_has_fifteen_parameters() -> None:
    layer4 = build_network("resnet18", 3).get_submodule("layer4")
    assert len(list(layer4.parameters())) == 15
    assert sum(isinstance(module, nn.BatchNorm2d) for module in layer4.modules()) == 5


def test_without_a_hidden_layer_the_head_is_one_linear_layer() -> None:
    head = build_network("resnet18", 3, hidden=None).get_submodule("head")
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {"out.weight": (3, 512), "out.bias": (3,)}


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.Conv2d(3, 8, 3, padding=1)],
    ids=["resnet", "vgg"],
)
def test_the_grey_convolution_equals_the_rgb_convolution_of_three_equal_channels(convolution: nn.Conv2d) -> None:
    x = torch.randn(2, 1, 33, 32)
    with torch.inference_mode():
        torch.testing.assert_close(grey_convolution(convolution)(x), convolution(x.expand(-1, 3, -1, -1)))


def torchvision_features(theirs: nn.Module, x: Tensor) -> Tensor:
    """Return the feature vectors of torchvision's forward pass, for a VGG before its classifier."""
    if isinstance(theirs, models.ResNet):
        theirs.fc = nn.Identity()
    else:
        theirs.classifier = nn.Identity()
    features: Tensor = theirs(x)
    return features


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11_bn"])
def test_features_of_loaded_weights_equal_torchvisions_on_three_equal_channels(backbone: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    with torch.device("meta"):
        theirs = models.get_model(backbone, weights=None)
    if isinstance(theirs, models.VGG):
        # 120 million parameters that this test does not need.
        theirs.classifier = nn.Identity()
    theirs.to_empty(device="cpu")
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1)
    random_statistics(theirs)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    network = build_network(backbone, 3).eval()
    report = load_pretrained(network, backbone, str(path))
    path.unlink()
    assert not report.fresh
    assert report.pretrained_stages == tuple(s for s in network.stage_names if s not in ("pool", "head"))
    x = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        expected = torchvision_features(theirs.eval(), x.expand(-1, 3, -1, -1))
        found = network.run(x, stop=network.stage_names.index("pool") + 1)
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
