"""Losses have the values of the papers that define them, and gradients that stay finite however sure the network is."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from covid_cls.errors import InputError
from covid_cls.labels import TASKS
from covid_cls.models.losses import (
    Criterion,
    check_weighting,
    class_balanced,
    inverse_frequency,
    prior_bias,
    probabilities,
    sigmoid_focal_loss,
    softmax_focal_loss,
)

# Far beyond the range of exp() in float32 and float64: a probability is exactly 0 or 1, its logarithm is not.
HUGE = 1e4
SOFTMAX = TASKS["three_class"].targets
SIGMOID = TASKS["three_class_multilabel"].targets
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
def test_sigmoid_focal_loss_is_torchvisions(gamma: float, alpha: float | None) -> None:
    logits, y = random_logits()
    targets = torch.tensor(SIGMOID, dtype=torch.float32)[y]
    expected = torchvision_focal(logits, targets, -1 if alpha is None else alpha, gamma, reduction="mean")
    weights = None if alpha is None else torch.full((3,), alpha)
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, gamma, weights), expected, rtol=1e-5, atol=1e-7)


def test_sigmoid_alpha_is_one_per_label_and_its_complement_for_negatives() -> None:
    alpha = torch.tensor([0.9, 0.2, 0.5])
    logits, targets = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]])
    loss = sigmoid_focal_loss(logits, targets, 0.0, alpha)
    assert loss.item() == pytest.approx((0.9 + 0.8 + 0.5) / 3 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(("gamma", "expected"), [(2.0, 0.1236304), (0.0, 0.4987031)])
def test_softmax_focal_loss_has_the_known_value(gamma: float, expected: float) -> None:
    assert softmax_focal_loss(SHARES.log(), Y, gamma).item() == pytest.approx(expected, abs=1e-7)


def test_focal_alpha_is_averaged_plainly_while_weighted_cross_entropy_divides_by_the_weights() -> None:
    plain = softmax_focal_loss(SHARES.log(), Y, 0.0, torch.tensor([2.0, 1.0, 1.0]))
    divided = Criterion("ce", SOFTMAX, COUNTS, sum(COUNTS), class_weights=[2, 1, 1])(SHARES.log(), Y)
    assert plain.item() == pytest.approx(0.6175948, abs=1e-6)
    assert divided.item() == pytest.approx(0.4631960, abs=1e-6)


@pytest.mark.parametrize("spread", [3.0, 30.0])
def test_gamma_zero_is_cross_entropy(spread: float) -> None:
    logits, y = random_logits(spread=spread)
    targets = torch.tensor(SIGMOID, dtype=torch.float32)[y]
    binary = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(softmax_focal_loss(logits, y, 0.0), F.cross_entropy(logits, y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, 0.0), binary, rtol=1e-6, atol=1e-6)


def naive_gradient(logits: Tensor, y: Tensor, gamma: float, *, multilabel: bool) -> Tensor:
    """The textbook power form in float64, which is exact as long as no probability is close to 0 or 1."""
    wide = logits.double().requires_grad_()
    if multilabel:
        targets = torch.tensor(SIGMOID, dtype=torch.float64)[y]
        p = torch.where(targets > 0, wide.sigmoid(), 1 - wide.sigmoid())
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
    criterion = Criterion("focal", SIGMOID if multilabel else SOFTMAX, COUNTS, sum(COUNTS), multilabel, gamma=gamma)
    criterion(logits, y).backward()
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-3, atol=1e-7)  # type: ignore[union-attr]


# A right answer has 1 - p = 0, whose power has an infinite derivative for gamma below 1 (and no other gamma); a wrong
# answer has p = 0, whose logarithm is infinite: once without the factor (1 - p)^gamma, and once with it.
@pytest.mark.parametrize(("gamma", "right"), [(0.5, True), (0.0, False), (2.0, False)])
def test_a_sure_network_has_a_finite_softmax_loss_and_gradient(gamma: float, right: bool) -> None:
    logits = torch.tensor([[HUGE, -HUGE, -HUGE]], requires_grad=True)
    loss = softmax_focal_loss(logits, torch.tensor([0 if right else 1]), gamma)
    loss.backward()
    expected, gradient = (0.0, [[0.0, 0.0, 0.0]]) if right else (2 * HUGE, [[1.0, -1.0, 0.0]])
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("gamma", "right"), [(0.5, True), (0.0, False), (2.0, False)])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_sure_network_has_a_finite_sigmoid_loss_and_gradient(gamma: float, target: float, right: bool) -> None:
    towards = 1.0 if target else -1.0
    logits = torch.tensor([[HUGE * towards * (1 if right else -1)]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([[target]]), gamma)
    loss.backward()
    assert loss.item() == pytest.approx(0.0 if right else HUGE, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0 if right else -towards]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("name", ["ce", "focal"])
def test_half_precision_logits_give_a_float32_loss(name: str, multilabel: bool) -> None:
    logits, y = random_logits()
    criterion = Criterion(name, SIGMOID if multilabel else SOFTMAX, COUNTS, sum(COUNTS), multilabel, gamma=2.0)
    half = logits.bfloat16()
    loss = criterion(half, y)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, criterion(half.float(), y))  # the logits were rounded, nothing after them
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss, criterion(half, y))


@pytest.mark.parametrize("multilabel", [False, True])
def test_probabilities_of_half_precision_logits_are_float32(multilabel: bool) -> None:
    found = probabilities(torch.tensor([[2.0, 0.0, -2.0]]).bfloat16(), multilabel)
    assert found.dtype == torch.float32
    expected = [1 / (1 + math.exp(-z)) for z in (2, 0, -2)] if multilabel else [0.866814, 0.117310, 0.015876]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_prior_bias_of_a_sigmoid() -> None:
    assert prior_bias([1], 100, multilabel=True) == pytest.approx([-4.595120], abs=1e-6)


def test_prior_bias_of_a_softmax_predicts_the_class_frequencies() -> None:
    bias = prior_bias(COUNTS, sum(COUNTS), multilabel=False)
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
def test_beta_must_lie_below_one(beta: float) -> None:
    with pytest.raises(InputError, match=r"loss\.beta"):
        class_balanced(COUNTS, beta)


def test_inverse_frequency_weights_have_the_known_values() -> None:
    assert inverse_frequency(COUNTS, 3) == pytest.approx([2.262211, 0.369444, 0.368345], abs=1e-6)


def test_sigmoid_alpha_by_inverse_frequency_is_the_seeds() -> None:
    criterion = Criterion("focal", SIGMOID, [200, 4000, 2200], 6200, True, gamma=2.0, alpha="inverse_frequency")
    assert criterion.weights is not None
    assert criterion.weights.tolist() == pytest.approx([0.8764, 0.0438, 0.0797], abs=1e-4)
    assert criterion.weights.sum().item() == pytest.approx(1.0)
    logits, y = random_logits()
    targets = torch.tensor(SIGMOID, dtype=torch.float32)[y]
    torch.testing.assert_close(criterion(logits, y), sigmoid_focal_loss(logits, targets, 2.0, criterion.weights))


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"name": "ce"}, None),
        ({"name": "ce", "class_weights": [1, 2, 3]}, [1, 2, 3]),
        ({"name": "ce", "class_weights": "inverse_frequency"}, [2.262211, 0.369444, 0.368345]),
        ({"name": "ce", "class_weights": "class_balanced", "beta": 0.9999}, [2.230917, 0.385077, 0.384006]),
    ],
)
def test_softmax_cross_entropy_is_torchs_with_these_weights(
    settings: dict[str, object], weights: list[float] | None
) -> None:
    logits, y = random_logits()
    expected = F.cross_entropy(logits, y, weight=None if weights is None else torch.tensor(weights).float())
    loss = Criterion(targets=SOFTMAX, counts=COUNTS, images=sum(COUNTS), **settings)(logits, y)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_softmax_focal_alpha_by_inverse_frequency_sums_to_the_number_of_classes() -> None:
    logits, y = random_logits()
    alpha = torch.tensor([2.262211, 0.369444, 0.368345])
    loss = Criterion("focal", SOFTMAX, COUNTS, sum(COUNTS), gamma=2.0, alpha="inverse_frequency")(logits, y)
    torch.testing.assert_close(loss, softmax_focal_loss(logits, y, 2.0, alpha), rtol=1e-5, atol=1e-6)


def test_multilabel_inverse_frequency_is_negatives_over_positives() -> None:
    criterion = Criterion("ce", SIGMOID, [200, 4000, 2200], 6200, True, class_weights="inverse_frequency")
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
def test_multilabel_covid_is_a_pneumonia_too(name: str, y: int, target: list[float]) -> None:
    logits = torch.tensor([[1.5, -0.5, 0.25]])
    loss = Criterion(name, SIGMOID, [5, 5, 10], 15, True)(logits, torch.tensor([y]))
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, torch.tensor([target])))


def test_multilabel_weights_weigh_positives_only() -> None:
    logits, weights = torch.zeros(1, 3), [4.0, 1.0, 2.0]
    loss = Criterion("ce", SIGMOID, [5, 5, 10], 15, True, class_weights=weights)(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx((4 + 1 + 2) / 3 * math.log(2))
    loss = Criterion("ce", SIGMOID, [5, 5, 10], 15, True, class_weights=weights)(logits, torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("settings", "multilabel"),
    [
        ({"name": "ce", "class_weights": "inverse_frequency"}, False),
        ({"name": "focal", "alpha": [0.5, 0.3, 0.2]}, True),
    ],
)
def test_weights_are_buffers_and_never_trained(settings: dict[str, object], multilabel: bool) -> None:
    criterion = Criterion(targets=SOFTMAX, counts=[5, 5, 10], images=20, multilabel=multilabel, **settings)  # type: ignore[arg-type]
    assert not list(criterion.parameters())
    assert {name for name, _ in criterion.named_buffers()} == {"weights", "targets"}
    assert criterion.weights is not None
    assert not criterion.weights.requires_grad


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "hinge"}, "loss.name=hinge"),
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
def test_a_faulty_setting_is_refused_by_its_name(settings: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Criterion(targets=SOFTMAX, counts=COUNTS, images=sum(COUNTS), **settings)  # type: ignore[arg-type]


def test_alpha_above_one_is_refused_in_the_sigmoid_form_alone() -> None:
    Criterion("focal", SOFTMAX, COUNTS, sum(COUNTS), alpha=[2, 1, 1])
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        Criterion("focal", SIGMOID, COUNTS, sum(COUNTS), True, alpha=[2, 1, 1])


@pytest.mark.parametrize(
    ("loss", "sampler"),
    [
        ({"name": "focal", "alpha": "inverse_frequency", "class_weights": [1, 1]}, "shuffle"),
        ({"name": "focal", "alpha": [0.5, 0.5]}, "balanced"),
        ({"name": "ce", "class_weights": "class_balanced"}, "balanced"),
        ({"name": "focal", "alpha": [1, 1], "class_weights": [1, 1]}, "balanced"),
    ],
)
def test_two_ways_of_evening_out_the_classes_are_refused(loss: dict[str, object], sampler: str) -> None:
    with pytest.raises(InputError, match="Keep one"):
        check_weighting(loss, sampler)


@pytest.mark.parametrize(
    ("loss", "sampler"),
    [
        ({"name": "ce"}, "shuffle"),
        ({"name": "ce"}, "balanced"),
        ({"name": "ce", "class_weights": "class_balanced", "beta": 0.99}, "shuffle"),
        ({"name": "focal", "gamma": 2.0, "alpha": None, "class_weights": None}, "balanced"),
        ({"name": "focal", "gamma": 2.0, "alpha": "inverse_frequency"}, "shuffle"),
    ],
)
def test_one_way_of_evening_out_the_classes_is_accepted(loss: dict[str, object], sampler: str) -> None:
    check_weighting(loss, sampler)


@pytest.mark.parametrize(("name", "idle"), [("focal", {"class_weights": [1.0, 1.0]}), ("ce", {"alpha": [1.0, 1.0]})])
def test_weights_that_would_do_nothing_are_refused(name: str, idle: dict[str, list[float]]) -> None:
    with pytest.raises(InputError, match="does nothing"):
        Criterion(name, ((1, 0), (0, 1)), [10, 20], 30, **idle)
