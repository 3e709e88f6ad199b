"""Losses have the values of the papers that define them, and finite gradients for extreme logits."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from covid_cls.errors import InputError
from covid_cls.models.losses import (
    LOSSES,
    CrossEntropy,
    FocalLoss,
    build_loss,
    check_weighting,
    class_balanced,
    inverse_frequency,
    positives_per_label,
    prior_bias,
    probabilities,
    sigmoid_focal_loss,
    softmax_focal_loss,
)
from covid_cls.models.names import loss_label, strategy_label
from covid_cls.runtime.schema import check_section
from covid_cls.tasks import TASKS

# Far beyond the range of exp() in float32 and float64: a probability is exactly 0 or 1, its logarithm is finite.
HUGE = 1e4
SOFTMAX = TASKS["three_class"]
SIGMOID = TASKS["three_class_multilabel"]
# Three images whose true classes get .7, .8 and .4.
SHARES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
Y = torch.tensor([0, 1, 2])
COUNTS = [219, 1341, 1345]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def random_logits(n: int = 64, classes: int = 3, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(n, classes, generator=generator)
    return logits, torch.randint(classes, (n,), generator=generator)


def sigmoid_targets(y: Tensor) -> Tensor:
    return torch.tensor(SIGMOID.targets, dtype=torch.float32)[y]


@pytest.mark.parametrize(
    ("target", "gamma", "alpha", "expected"),
    [
        (1.0, 2.0, 0.25, 2.63401e-4),
        (0.0, 2.0, 0.25, 1.398820),
        (1.0, 0.0, None, 0.1053605),
        (0.0, 0.0, None, 2.3025851),
        (1.0, 2.0, 1.0, 1.053605e-3),
    ],
)
def test_sigmoid_focal_loss_has_the_known_value(
    target: float, gamma: float, alpha: float | None, expected: float
) -> None:
    weights = None if alpha is None else torch.tensor([alpha])
    loss = sigmoid_focal_loss(torch.tensor([[logit(0.9)]]), torch.tensor([[target]]), gamma, weights)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, None), (0.5, 0.75), (2.0, 0.25), (5.0, None)])
def test_sigmoid_focal_loss_equals_torchvisions(gamma: float, alpha: float | None) -> None:
    logits, y = random_logits()
    targets = sigmoid_targets(y)
    expected = torchvision_focal(logits, targets, -1 if alpha is None else alpha, gamma, reduction="mean")
    weights = None if alpha is None else torch.full((3,), alpha)
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, gamma, weights), expected, rtol=1e-5, atol=1e-7)


def test_sigmoid_alpha_weights_positives_of_a_label_and_its_complement_weights_negatives() -> None:
    alpha = torch.tensor([0.9, 0.2, 0.5])
    logits, targets = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]])
    loss = sigmoid_focal_loss(logits, targets, 0.0, alpha)
    assert loss.item() == pytest.approx((0.9 + 0.8 + 0.5) / 3 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(("gamma", "expected"), [(2.0, 0.1236304), (0.0, 0.4987031)])
def test_softmax_focal_loss_has_the_known_value(gamma: float, expected: float) -> None:
    assert softmax_focal_loss(SHARES.log(), Y, gamma).item() == pytest.approx(expected, abs=1e-7)


def test_focal_loss_divides_by_the_images_and_weighted_cross_entropy_by_their_weights() -> None:
    focal = softmax_focal_loss(SHARES.log(), Y, 0.0, torch.tensor([2.0, 1.0, 1.0]))
    weighted = CrossEntropy(SOFTMAX, COUNTS, class_weights=[2, 1, 1])
    assert focal.item() == pytest.approx(0.6175948, abs=1e-6)
    assert weighted(SHARES.log(), Y).item() == pytest.approx(0.4631960, abs=1e-6)
    assert weighted.image_weights.tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(SOFTMAX, COUNTS),
        CrossEntropy(SIGMOID, COUNTS, class_weights=[2, 1, 1]),
        FocalLoss(SOFTMAX, COUNTS, alpha=[2, 1, 1]),
        FocalLoss(SIGMOID, COUNTS),
    ],
    ids=["ce", "multilabel weighted_ce", "focal", "multilabel focal"],
)
def test_other_losses_divide_by_the_images(loss: CrossEntropy | FocalLoss) -> None:
    assert loss.image_weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("spread", [3.0, 30.0])
def test_gamma_zero_is_cross_entropy(spread: float) -> None:
    logits, y = random_logits(spread=spread)
    binary = F.binary_cross_entropy_with_logits(logits, sigmoid_targets(y))
    torch.testing.assert_close(softmax_focal_loss(logits, y, 0.0), F.cross_entropy(logits, y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sigmoid_focal_loss(logits, sigmoid_targets(y), 0.0), binary, rtol=1e-6, atol=1e-6)


def naive_gradient(logits: Tensor, y: Tensor, gamma: float, *, multilabel: bool) -> Tensor:
    """Return the gradient of the textbook power form in float64, exact while no probability is close to 0 or 1."""
    wide = logits.double().requires_grad_()
    if multilabel:
        p = torch.where(sigmoid_targets(y) > 0, wide.sigmoid(), 1 - wide.sigmoid())
    else:
        p = wide.softmax(dim=1).gather(1, y[:, None])
    (-((1 - p) ** gamma) * p.log()).mean().backward()
    assert wide.grad is not None
    return wide.grad


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("multilabel", [False, True])
def test_the_gradient_is_that_of_the_formula(gamma: float, multilabel: bool) -> None:
    logits, y = random_logits(spread=2.0)
    expected = naive_gradient(logits, y, gamma, multilabel=multilabel)
    logits.requires_grad_()
    FocalLoss(SIGMOID if multilabel else SOFTMAX, COUNTS, gamma=gamma)(logits, y).backward()
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-3, atol=1e-7)  # type: ignore[union-attr]


# A right answer has 1 - p = 0, whose power has an infinite derivative for gamma below 1 (and no other gamma); a wrong
# answer has p = 0, whose logarithm is infinite: once without the factor (1 - p)^gamma, and once with it.
@pytest.mark.parametrize(("gamma", "right"), [(0.5, True), (0.0, False), (2.0, False)])
def test_softmax_loss_and_gradient_are_finite_for_extreme_logits(gamma: float, right: bool) -> None:
    logits = torch.tensor([[HUGE, -HUGE, -HUGE]], requires_grad=True)
    loss = softmax_focal_loss(logits, torch.tensor([0 if right else 1]), gamma)
    loss.backward()
    expected, gradient = (0.0, [[0.0, 0.0, 0.0]]) if right else (2 * HUGE, [[1.0, -1.0, 0.0]])
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("gamma", "right"), [(0.5, True), (0.0, False), (2.0, False)])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_sigmoid_loss_and_gradient_are_finite_for_extreme_logits(gamma: float, target: float, right: bool) -> None:
    towards = 1.0 if target else -1.0
    logits = torch.tensor([[HUGE * towards * (1 if right else -1)]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([[target]]), gamma)
    loss.backward()
    assert loss.item() == pytest.approx(0.0 if right else HUGE, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0 if right else -towards]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("settings", [{"name": "ce"}, {"name": "focal", "gamma": 2.0}], ids=["ce", "focal"])
def test_half_precision_logits_give_a_float32_loss(settings: dict[str, Any], multilabel: bool) -> None:
    logits, y = random_logits()
    criterion = build_loss(settings, SIGMOID if multilabel else SOFTMAX, COUNTS)
    half = logits.bfloat16()
    loss = criterion(half, y)
    assert loss.dtype == torch.float32
    # The logits are rounded, and nothing after them.
    assert torch.equal(loss, criterion(half.float(), y))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss, criterion(half, y))


@pytest.mark.parametrize("multilabel", [False, True])
def test_probabilities_of_half_precision_logits_are_float32(multilabel: bool) -> None:
    found = probabilities(torch.tensor([[2.0, 0.0, -2.0]]).bfloat16(), multilabel)
    assert found.dtype == torch.float32
    expected = [1 / (1 + math.exp(-z)) for z in (2, 0, -2)] if multilabel else [0.866814, 0.117310, 0.015876]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_multilabel_covid_images_are_positive_for_pneumonia() -> None:
    assert positives_per_label(SIGMOID, [200, 4000, 2000]) == [200, 4000, 2200]
    assert positives_per_label(SOFTMAX, [200, 4000, 2000]) == [200, 4000, 2000]


def test_prior_bias_of_a_sigmoid() -> None:
    assert prior_bias(SIGMOID, [1, 49, 50])[0] == pytest.approx(-4.595120, abs=1e-6)


def test_prior_bias_of_a_softmax_predicts_the_class_frequencies() -> None:
    bias = prior_bias(SOFTMAX, COUNTS)
    assert bias == pytest.approx([-2.58512, -0.77302, -0.77004], abs=1e-5)
    shares = [n / sum(COUNTS) for n in COUNTS]
    assert torch.tensor(bias).softmax(dim=0).tolist() == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.999, [1.957664, 0.521536, 0.520800]), (0.9999, [2.230917, 0.385077, 0.384006]), (0.0, [1.0, 1.0, 1.0])],
)
def test_class_balanced_weights_have_the_known_values(beta: float, expected: list[float]) -> None:
    assert class_balanced(COUNTS, beta) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("beta", [1.0, -0.1, math.nan])
def test_beta_must_be_below_one(beta: float) -> None:
    with pytest.raises(InputError, match=r"loss\.beta"):
        class_balanced(COUNTS, beta)


def test_inverse_frequency_weights_have_the_known_values() -> None:
    assert inverse_frequency(COUNTS, 3) == pytest.approx([2.262211, 0.369444, 0.368345], abs=1e-6)


def test_sigmoid_alpha_by_inverse_frequency_has_the_values_of_the_original_protocol() -> None:
    criterion = FocalLoss(SIGMOID, [200, 4000, 2000], gamma=2.0, alpha="inverse_frequency")
    assert criterion.weights is not None
    assert criterion.weights.tolist() == pytest.approx([0.8764, 0.0438, 0.0797], abs=1e-4)
    assert criterion.weights.sum().item() == pytest.approx(1.0)
    logits, y = random_logits()
    expected = sigmoid_focal_loss(logits, sigmoid_targets(y), 2.0, criterion.weights)
    torch.testing.assert_close(criterion(logits, y), expected)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, None),
        ({"class_weights": [1, 2, 3]}, [1, 2, 3]),
        ({"class_weights": "inverse_frequency"}, [2.262211, 0.369444, 0.368345]),
        ({"class_weights": "class_balanced", "beta": 0.9999}, [2.230917, 0.385077, 0.384006]),
    ],
)
def test_softmax_cross_entropy_is_torchs_with_these_weights(
    settings: dict[str, Any], weights: list[float] | None
) -> None:
    logits, y = random_logits()
    expected = F.cross_entropy(logits, y, weight=None if weights is None else torch.tensor(weights).float())
    loss = CrossEntropy(SOFTMAX, COUNTS, **settings)(logits, y)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_softmax_focal_alpha_by_inverse_frequency_sums_to_the_number_of_classes() -> None:
    logits, y = random_logits()
    alpha = torch.tensor([2.262211, 0.369444, 0.368345])
    loss = FocalLoss(SOFTMAX, COUNTS, gamma=2.0, alpha="inverse_frequency")(logits, y)
    torch.testing.assert_close(loss, softmax_focal_loss(logits, y, 2.0, alpha), rtol=1e-5, atol=1e-6)


def test_multilabel_inverse_frequency_is_negatives_over_positives() -> None:
    criterion = CrossEntropy(SIGMOID, [200, 4000, 2000], class_weights="inverse_frequency")
    assert criterion.weights is not None
    assert criterion.weights.tolist() == pytest.approx([6000 / 200, 2200 / 4000, 4000 / 2200])


@pytest.mark.parametrize(
    ("name", "y", "target"),
    [
        ("ce", 0, [1.0, 0.0, 1.0]),
        ("ce", 1, [0.0, 1.0, 0.0]),
        ("ce", 2, [0.0, 0.0, 1.0]),
        ("focal", 0, [1.0, 0.0, 1.0]),
    ],
    ids=["ce-covid", "ce-normal", "ce-pneumonia", "focal-covid"],
)
def test_multilabel_losses_count_covid_as_pneumonia(name: str, y: int, target: list[float]) -> None:
    logits = torch.tensor([[1.5, -0.5, 0.25]])
    loss = build_loss({"name": name}, SIGMOID, [5, 5, 5])(logits, torch.tensor([y]))
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, torch.tensor([target])))


def test_multilabel_weights_apply_to_positives_only() -> None:
    loss = CrossEntropy(SIGMOID, [5, 5, 5], class_weights=[4.0, 1.0, 2.0])
    assert loss(torch.zeros(1, 3), torch.tensor([0])).item() == pytest.approx((4 + 1 + 2) / 3 * math.log(2))
    assert loss(torch.zeros(1, 3), torch.tensor([1])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(SOFTMAX, COUNTS, class_weights="inverse_frequency"),
        FocalLoss(SIGMOID, COUNTS, alpha=[0.5, 0.3, 0.2]),
    ],
    ids=["ce", "focal"],
)
def test_weights_are_buffers_that_are_neither_trained_nor_saved(loss: CrossEntropy | FocalLoss) -> None:
    assert not list(loss.parameters())
    assert {name for name, _ in loss.named_buffers()} == {"weights", "targets"}
    # Checkpoints of version 0.1 hold no tensor of the loss.
    assert not loss.state_dict()
    assert loss.weights is not None
    assert not loss.weights.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "hinge"}, "loss.name=hinge: unknown; choose one of ce, focal"),
        ({"name": "focal", "gamma": -0.1}, "loss.gamma=-0.1"),
        ({"name": "focal", "gamma": math.nan}, "loss.gamma=nan"),
        ({"name": "focal", "alpha": [1, 1]}, "list of 3 numbers"),
        ({"name": "focal", "alpha": [1, 1, -1]}, "none below 0"),
        ({"name": "focal", "alpha": [1, 1, math.nan]}, "list of 3 numbers"),
        ({"name": "focal", "alpha": "inverse_frequenzy"}, "inverse_frequency"),
        ({"name": "focal", "alpha": "abc"}, "loss.alpha=abc"),
        ({"name": "focal", "alpha": ["a", "b", "c"]}, "list of 3 numbers"),
        ({"name": "focal", "alpha": "class_balanced"}, "loss.alpha=class_balanced"),
        ({"name": "ce", "class_weights": [1, 1, 1, 1]}, "list of 3 numbers"),
        ({"name": "ce", "class_weights": "balanced"}, "inverse_frequency or class_balanced"),
        ({"name": "ce", "class_weights": [1, None, 1]}, "list of 3 numbers"),
        ({"name": "ce", "class_weights": "class_balanced", "beta": 1.0}, "loss.beta=1.0"),
    ],
    ids=str,
)
def test_an_invalid_setting_is_refused_by_its_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_loss(settings, SOFTMAX, COUNTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "hinge"}, "loss.name=hinge: unknown"),
        (
            {"name": "focal", "class_weights": [1, 1]},
            "loss.class_weights: no such setting; loss.name=focal takes alpha, gamma",
        ),
        ({"name": "ce", "gamma": 2.0}, "loss.gamma: no such setting; loss.name=ce takes beta, class_weights"),
        ({"name": "ce", "task": "binary"}, "loss.task: no such setting"),
        ({"name": "focal", "gamma": "high"}, "loss.gamma=high: expected float"),
    ],
)
def test_a_setting_that_the_chosen_loss_does_not_take_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_section("loss", LOSSES, settings)


def test_alpha_above_one_is_refused_for_sigmoids_only() -> None:
    FocalLoss(SOFTMAX, COUNTS, alpha=[2, 1, 1])
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        FocalLoss(SIGMOID, COUNTS, alpha=[2, 1, 1])


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "focal", "alpha": [0.5, 0.5]},
        {"name": "focal", "alpha": "inverse_frequency"},
        {"name": "ce", "class_weights": "class_balanced"},
    ],
)
def test_a_weighted_loss_with_a_balanced_sampler_is_refused(loss: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"data\.sampler=balanced.* Keep one"):
        check_weighting(loss, "balanced")


@pytest.mark.parametrize(
    ("loss", "sampler"),
    [
        ({"name": "ce"}, "shuffle"),
        ({"name": "ce"}, "balanced"),
        ({"name": "ce", "class_weights": "class_balanced", "beta": 0.99}, "shuffle"),
        ({"name": "focal", "gamma": 2.0, "alpha": None}, "balanced"),
        ({"name": "focal", "gamma": 2.0, "alpha": "inverse_frequency"}, "shuffle"),
    ],
)
def test_a_weighted_loss_or_a_balanced_sampler_alone_is_accepted(loss: dict[str, Any], sampler: str) -> None:
    check_weighting(loss, sampler)


def test_only_cross_entropy_with_weights_is_called_weighted_ce() -> None:
    labels = [
        loss_label({"name": "ce", **weights})
        for weights in ({}, {"class_weights": None}, {"class_weights": "inverse_frequency"}, {"class_weights": [1, 1]})
    ]
    assert labels == ["ce", "ce", "weighted_ce", "weighted_ce"]
    assert loss_label({"name": "focal", "alpha": "inverse_frequency"}) == "focal"


def test_the_stage_that_is_frozen_last_replaces_the_name_of_a_strategy() -> None:
    assert strategy_label({"name": "partial", "freeze_until": None}) == "partial"
    assert strategy_label({"name": "partial", "freeze_until": "layer2"}) == "until_layer2"
