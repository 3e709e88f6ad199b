"""FLOP of a training step, against counts by hand and published ones."""

import pytest
import torch
from torch import nn

from covid_cls.speed.peak import count_flops, step_flops
from tests.speed.small import settings

FULL_SIZE = ("data.size=256", "preprocess.crop=224")


def test_a_linear_layer_costs_two_per_weight_each_way() -> None:
    layer = nn.Linear(10, 5)
    assert step_flops(layer, torch.empty(4, 10)) == 2 * 50 + 2 * 50  # to the output, to the weights
    assert step_flops(nn.Sequential(layer, nn.Linear(5, 3)), torch.empty(4, 10)) == 2 * 65 + 2 * 65 + 2 * 15


@pytest.mark.parametrize(
    ("backbone", "strategy", "gflop"),
    [  # 224 x 224, three channels
        ("resnet18", "fc", 3.63),
        ("resnet18", "partial", 5.14),
        ("resnet18", "full", 10.65),
        ("vgg16", "partial", 35.34),
        ("vgg16", "full", 91.93),
    ],
)
def test_steps_of_the_plain_network(backbone: str, strategy: str, gflop: float) -> None:
    flops = count_flops(settings(*FULL_SIZE, f"backbone={backbone}", f"strategy={strategy}"))
    assert flops["plain"] / 1e9 == pytest.approx(gflop, rel=0.002)


def test_one_channel_saves_two_thirds_of_the_first_convolution() -> None:
    flops = count_flops(settings(*FULL_SIZE, "strategy=partial"))
    assert flops["plain"] - flops["ours"] == 2 * (2 * 64 * 7 * 7 * 112 * 112)


def test_behind_a_feature_cache_only_the_head_is_left() -> None:
    flops = count_flops(settings(*FULL_SIZE, "strategy=fc", "feature_cache=views:2"))
    hidden, out = 2 * 512 * 150, 2 * 150 * 2
    assert flops["ours"] == 2 * (hidden + out) + out
