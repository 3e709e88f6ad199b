"""Frozen tensors stay bit-identical and all others are trained; inputs, optimizer and schedule follow the settings."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from covid_cls.errors import InputError
from covid_cls.io import Batch
from covid_cls.models.backbones import BACKBONES, STRATEGIES, Staged, apply_strategy, build_network
from covid_cls.models.losses import CrossEntropy
from covid_cls.tasks import TASKS
from covid_cls.training.optimizers import RaiseOnPlateau, build_optimizer, build_scheduler
from tests.strategies import trainable_stages
from tests.training.small import changed, compose_small, make_classifier, make_data, make_trainer, snapshot


def held_by(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(tensor) for group in optimizer.param_groups for tensor in group["params"]]


def assert_trained(network: Staged, before: dict[str, Tensor], stages: set[str]) -> None:
    """Assert that exactly the parameters and batch statistics of `stages` have changed."""
    found = changed(before, snapshot(network))
    assert {name.partition(".")[0] for name in found} <= stages
    expected = {name for name in before if name.partition(".")[0] in stages}
    assert found == expected, f"unchanged: {sorted(expected - found)}"


def assert_optimizer_holds_exactly(optimizer: torch.optim.Optimizer, network: Staged, stages: set[str]) -> None:
    expected = {id(p) for name, p in network.named_parameters() if name.partition(".")[0] in stages}
    held = held_by(optimizer)
    assert len(held) == len(set(held))
    assert set(held) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backbone", ["resnet18", "vgg11", "vgg11_bn"])
def test_a_fit_changes_all_tensors_that_are_not_frozen_and_no_others(
    backbone: str, strategy: str, cache: Path, folder: Path
) -> None:
    settings = compose_small(f"backbone={backbone}", f"strategy={strategy}", "scheduler=none")
    data, classifier = make_data(settings, cache), make_classifier(settings)
    trainer, history = make_trainer(settings, folder, checkpoints=False)
    before = snapshot(classifier.net)
    trainer.fit(classifier, data)
    assert len(history.rows) == 2
    # Validation was run between the epochs.
    assert all(math.isfinite(row["loss/val"]) for row in history.rows)
    stages = trainable_stages(backbone, strategy)
    assert_trained(classifier.net, before, stages)
    assert_optimizer_holds_exactly(trainer.optimizers[0], classifier.net, stages)


@pytest.fixture(scope="module", params=[b for b in BACKBONES if b not in ("resnet18", "vgg11", "vgg11_bn")])
def built(request: pytest.FixtureRequest) -> tuple[str, Staged]:
    torch.manual_seed(0)
    return request.param, build_network(request.param, classes=2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_changes_all_tensors_that_are_not_frozen_and_no_others(built: tuple[str, Staged], strategy: str) -> None:
    backbone, network = built[0], copy.deepcopy(built[1])
    apply_strategy(network, strategy)
    optimizer = build_optimizer(network, (), name="sgd", lr=0.01, weight_decay=0.1)
    criterion = CrossEntropy(TASKS["binary"], [8, 8])
    before = snapshot(network)
    # Some parameters have a gradient only in the second step, because the biases start at zero.
    for step in range(2):
        network.train()
        x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(step))
        criterion(network(x), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
        network.eval()
        with torch.inference_mode():
            network(x)
    stages = trainable_stages(backbone, strategy)
    assert_trained(network, before, stages)
    assert_optimizer_holds_exactly(optimizer, network, stages)


def test_frozen_stages_use_no_batch_statistics_in_training() -> None:
    torch.manual_seed(0)
    network = build_network("resnet18", 2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
    x = torch.randn(4, 1, 32, 32)
    stop = network.stage_names.index("layer3") + 1
    with torch.no_grad():
        network.train()
        mixed = network.run(x, stop=stop)[:2] - network.run(x[:2], stop=stop)
        # With batch statistics the output for an image depends on the other images.
        assert mixed.abs().max() > 0.01
        apply_strategy(network, "partial")
        network.train()
        torch.testing.assert_close(network.run(x, stop=stop)[:2], network.run(x[:2], stop=stop), rtol=1e-4, atol=1e-4)


def batch_of(side: int, n: int = 6, classes: int = 2, stage: int = 0) -> Batch:
    x = torch.randint(256, (n, 1, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Batch(x, torch.arange(n) % classes, torch.arange(n), stage)


@pytest.mark.parametrize(("strategy", "stages"), [("fc", (1, 3, 5, 6)), ("partial", (2, 4))])
def test_cached_features_enter_at_their_stage_and_give_the_same_loss(strategy: str, stages: tuple[int, ...]) -> None:
    settings = compose_small("augment=none", f"strategy={strategy}", "head.dropout=0")
    classifier = make_classifier(settings).train()
    batch = classifier.on_after_batch_transfer(batch_of(32), 0)
    with torch.no_grad():
        loss = classifier.training_step(batch, 0)
        for stage in stages:
            features = batch._replace(x=classifier.net.run(batch.x, stop=stage), stage=stage)
            given = features.x.clone()
            passed = classifier.on_after_batch_transfer(features, 0)
            assert passed is features
            assert torch.equal(passed.x, given)
            assert torch.equal(classifier.training_step(passed, 0), loss)


def test_training_uses_augmented_views_and_evaluation_the_centre_crop() -> None:
    classifier = make_classifier(compose_small("augment=cxr"))
    batch = batch_of(48)
    fixed = classifier.preprocess.normalise(classifier.preprocess.centre(batch.x))
    first, second = (classifier.train().on_after_batch_transfer(batch, 0).x for _ in range(2))
    # Both views are of the same epoch.
    assert torch.equal(first, second)
    assert not torch.allclose(first, fixed, atol=0.1)
    assert torch.equal(classifier.eval().on_after_batch_transfer(batch, 0).x, fixed)
    with torch.inference_mode():
        assert torch.equal(classifier.scorer()(batch.x), classifier.net(fixed))


def test_without_augmentation_training_uses_the_centre_crop() -> None:
    classifier = make_classifier(compose_small("augment=none")).train()
    batch = batch_of(32)
    expected = (batch.x.float() / 255 - 0.449) / 0.226
    torch.testing.assert_close(classifier.on_after_batch_transfer(batch, 0).x, expected)


@pytest.mark.parametrize("loss", ["ce", "weighted_ce", "focal"])
def test_a_multilabel_task_trains(loss: str, cache: Path, folder: Path) -> None:
    settings = compose_small("task=three_class_multilabel", f"loss={loss}", "strategy=fc", "trainer.max_epochs=1")
    data, classifier = make_data(settings, cache), make_classifier(settings)
    before = snapshot(classifier.net)
    trainer, history = make_trainer(settings, folder, checkpoints=False)
    trainer.fit(classifier, data)
    assert_trained(classifier.net, before, {"head"})
    row = history.rows[0]
    assert all(math.isfinite(row[f"{kind}/{split}"]) for kind in ("loss", "auroc") for split in ("train", "val"))
    assert {f"sensitivity/val/{c}" for c in ("covid", "normal", "pneumonia")} <= row.keys()


def test_the_sigmoid_loss_of_a_classifier_counts_covid_as_pneumonia() -> None:
    settings = compose_small("task=three_class_multilabel", "loss=weighted_ce")
    criterion = make_classifier(settings, [100, 200, 300]).criterion
    assert criterion.weights is not None
    assert criterion.weights.tolist() == pytest.approx([500 / 100, 400 / 200, 200 / 400])


@pytest.mark.parametrize(
    ("task", "counts", "expected"),
    [
        ("three_class", [219, 1341, 1345], [-2.58512, -0.77302, -0.77004]),
        ("binary", [100, 300], [math.log(0.25), math.log(0.75)]),
        ("three_class_multilabel", [100, 500, 400], [math.log(0.1 / 0.9), 0.0, 0.0]),
    ],
)
def test_with_prior_bias_an_untrained_network_predicts_the_class_frequencies(
    task: str, counts: list[int], expected: list[float]
) -> None:
    classifier = make_classifier(compose_small(f"task={task}", "head.prior_bias=true", "strategy=fc"), counts)
    bias = classifier.net.get_submodule("head.out").bias
    assert bias.tolist() == pytest.approx(expected, abs=1e-5)
    assert bias.requires_grad
    assert id(bias) in held_by(build_optimizer(classifier.net, (), name="adamw", lr=0.1))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("strategy", "pretrained", "backbone"),
    [
        ("full", ("stem", "layer1", "layer2", "layer3", "layer4"), {"stem", "layer1", "layer2", "layer3", "layer4"}),
        ("full", ("stem", "layer1", "layer2", "layer3"), {"stem", "layer1", "layer2", "layer3"}),
        ("partial", ("stem", "layer1", "layer2", "layer3", "layer4"), {"layer4"}),
        ("partial", ("stem", "layer1", "layer2", "layer3"), set()),
        ("fc", ("stem", "layer1", "layer2", "layer3", "layer4"), set()),
        ("full", (), set()),
    ],
)
def test_only_pretrained_stages_have_a_lower_rate(
    name: str, strategy: str, pretrained: tuple[str, ...], backbone: set[str]
) -> None:
    network = build_network("resnet18", 2)
    apply_strategy(network, strategy)
    optimizer = build_optimizer(network, pretrained, name=name, lr=0.02, backbone_lr_scale=0.1, weight_decay=0.3)
    groups = {group["name"]: group for group in optimizer.param_groups}
    slow = [id(p) for n, p in network.named_parameters() if n.partition(".")[0] in backbone]
    fast = [id(p) for n, p in network.named_parameters() if p.requires_grad and n.partition(".")[0] not in backbone]
    assert [id(p) for p in groups["head"]["params"]] == fast
    assert groups["head"]["lr"] == 0.02
    assert all(group["weight_decay"] == 0.3 for group in groups.values())
    if backbone:
        assert [id(p) for p in groups["backbone"]["params"]] == slow
        assert groups["backbone"]["lr"] == pytest.approx(0.002)
    else:
        assert set(groups) == {"head"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lion", "lr": 0.1}, "optimizer.name=lion"),
        ({"name": "sgd", "lr": 0.0}, "optimizer.lr=0.0"),
        ({"name": "sgd", "lr": -1.0}, "optimizer.lr=-1.0"),
        ({"name": "sgd", "lr": 0.1, "backbone_lr_scale": 0.0}, "backbone_lr_scale=0.0"),
    ],
)
def test_invalid_optimizer_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_optimizer(build_network("resnet18", 2), (), **settings)


def one_weight(lr: float = 1.0) -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    return torch.optim.SGD([weight], lr=lr)


def rates_per_step(optimizer: torch.optim.Optimizer, schedule: dict[str, Any], steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    return [*rates, optimizer.param_groups[0]["lr"]]


def test_cosine_rises_during_the_warm_up_and_falls_to_zero() -> None:
    optimizer = one_weight(0.5)
    schedule = build_scheduler(optimizer, 100, 10, name="cosine", warmup_epochs=2)
    assert schedule is not None
    assert schedule["interval"] == "step"
    rates = rates_per_step(optimizer, schedule, 100)
    assert rates[:20] == pytest.approx([0.5 * (k + 1) / 21 for k in range(20)])
    assert rates[20] == 0.5
    assert rates[60] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert rates[20:] == sorted(rates[20:], reverse=True)


@pytest.mark.parametrize(("steps", "epochs", "warmup"), [(3, 1, 1.0), (3, 1, 5.0), (1, 1, 0.0), (7, 2, 0.3)])
def test_cosine_stays_between_zero_and_the_rate_on_short_runs(steps: int, epochs: int, warmup: float) -> None:
    optimizer = one_weight()
    schedule = build_scheduler(optimizer, steps, epochs, name="cosine", warmup_epochs=warmup)
    assert schedule is not None
    assert all(0 < rate <= 1 for rate in rates_per_step(optimizer, schedule, steps)[:-1])


def test_step_multiplies_the_rate_by_its_factor_every_step_epochs() -> None:
    optimizer = one_weight()
    schedule = build_scheduler(optimizer, 100, 10, name="step", step_epochs=3, factor=0.1)
    assert schedule is not None
    assert schedule["interval"] == "epoch"
    rates = rates_per_step(optimizer, schedule, 7)
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_plateau_reduces_the_rate_after_its_patience() -> None:
    optimizer = one_weight()
    schedule = build_scheduler(optimizer, 100, 10, name="plateau", factor=0.1, patience=2, monitor="loss/val")
    assert schedule is not None
    assert (schedule["interval"], schedule["monitor"]) == ("epoch", "loss/val")
    rates = []
    for loss in (1.0, 0.9, 0.95, 0.91, 0.92, 0.5):
        schedule["scheduler"].step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1])


def test_raise_on_plateau_raises_the_rate_to_its_limit_while_accuracy_hardly_changes() -> None:
    optimizer = one_weight(1e-5)
    scheduler = RaiseOnPlateau(optimizer, factor=10.0, threshold=0.004, max_lr=0.1)
    rates = []
    for accuracy in (0.50, 0.503, 0.60, 0.597, 0.6009, 0.59, 0.592, 0.592, 0.5921, 0.592):
        scheduler.step(accuracy)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-5, 1e-4, 1e-4, 1e-3, 1e-2, 1e-2, 1e-1, 1e-1, 1e-1, 1e-1], rel=1e-9)


def test_raise_on_plateau_continues_from_its_state() -> None:
    first, second = one_weight(1e-5), one_weight(1e-5)
    before = RaiseOnPlateau(first, 10.0, 0.004, 0.1)
    before.step(0.5)
    after = RaiseOnPlateau(second, 10.0, 0.004, 0.1)
    after.load_state_dict(before.state_dict())
    after.step(0.501)
    assert second.param_groups[0]["lr"] == pytest.approx(1e-4)
    # The first epoch has no epoch before it to be compared with.
    without_state = RaiseOnPlateau(one_weight(1e-5), 10.0, 0.004, 0.1)
    without_state.step(0.501)
    assert without_state.optimizer.param_groups[0]["lr"] == 1e-5


def test_no_schedule_is_none_and_an_unknown_one_is_refused() -> None:
    assert build_scheduler(one_weight(), 10, 1, name="none") is None
    with pytest.raises(InputError, match=r"scheduler\.name=linear"):
        build_scheduler(one_weight(), 10, 1, name="linear")


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        (("scheduler=original", "scheduler.threshold=1.1", "optimizer.lr=1e-5"), [1e-5, 1e-5, 1e-4, 1e-3]),
        (("scheduler=step", "scheduler.step_epochs=1", "optimizer.lr=0.01"), [1e-2, 1e-3, 1e-4, 1e-5]),
        (("scheduler=plateau", "optimizer.lr=0.01"), [1e-2, 1e-2, 1e-2, 1e-2]),
    ],
    ids=["raise_on_plateau", "step", "plateau"],
)
def test_a_fit_steps_its_schedule_once_per_epoch(
    overrides: tuple[str, ...], rates: list[float], cache: Path, folder: Path
) -> None:
    settings = compose_small("strategy=fc", "augment=none", "trainer.max_epochs=3", *overrides)
    trainer, history = make_trainer(settings, folder, checkpoints=False)
    trainer.fit(make_classifier(settings), make_data(settings, cache))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rates[-1])
    # The history has the rate with which each epoch was trained.
    assert [row["lr/head"] for row in history.rows] == pytest.approx(rates[:-1])
