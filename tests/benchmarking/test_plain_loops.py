"""The loops that covid_cls is measured against are those that the documentation describes."""

from pathlib import Path

import pytest
import torch

from covid_cls.benchmarking.measure import stage_images, usable_images
from covid_cls.benchmarking.plain_loops import (
    PlainModule,
    measure_plain_lightning,
    plain_epoch,
    plain_loader,
    plain_network,
)
from covid_cls.benchmarking.timing import PARTS, separate_process
from covid_cls.tasks import TASKS
from tests.benchmarking.small import settings, table_settings


def trained(*overrides: str) -> set[str]:
    network = plain_network(settings(*overrides))
    return {name.rpartition(".")[0] for name, tensor in network.named_parameters() if tensor.requires_grad}


def test_a_strategy_trains_the_same_layers_as_in_covid_cls() -> None:
    assert trained("backbone=resnet18", "strategy=fc") == {"fc.hidden", "fc.out"}
    partial = trained("backbone=resnet18", "strategy=partial")
    assert {name.partition(".")[0] for name in partial} == {"layer4", "fc"}
    assert {"layer4.0.conv1", "layer4.0.downsample.0", "layer4.1.bn2"} < partial
    assert {"conv1", "bn1", "layer1.0.conv1"} < trained("backbone=resnet18", "strategy=full")
    block5 = {"features.16", "features.18"}
    assert trained("backbone=vgg11", "strategy=partial") == block5 | {"classifier.hidden", "classifier.out"}


def test_an_epoch_changes_trained_weights_and_the_statistics_of_frozen_batch_norms(cache: Path, tmp_path: Path) -> None:
    chosen = table_settings(cache, "strategy=partial", "optimizer.lr=0.01")
    task = TASKS["binary"]
    stage_images(usable_images(chosen["data"], task), task, 16, 2, tmp_path)
    torch.manual_seed(0)
    module, loader = PlainModule(chosen), plain_loader(chosen, tmp_path)
    network = module.network
    images, labels = next(iter(loader))
    assert images.shape == (8, 3, 48, 48)
    assert set(labels.tolist()) <= {0, 1}
    # A grey image, three times.
    assert torch.equal(images[:, 0], images[:, 2])
    free = {name for name, tensor in network.named_parameters() if tensor.requires_grad}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    spent = plain_epoch(network, loader, module.configure_optimizers(), torch.device("cpu"))
    assert 0 < sum(spent[part] for part in PARTS) <= spent["seconds"]
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in network.named_parameters()}
    assert changed & parameters == free
    assert {"bn1.running_mean", "layer1.0.bn1.running_var"} < changed


@pytest.mark.slow(reason="the fit is a separate process")
def test_a_lightning_fit_trains_an_epoch_per_request(cache: Path, tmp_path: Path) -> None:
    chosen = table_settings(cache, "strategy=fc")
    task = TASKS["binary"]
    stage_images(usable_images(chosen["data"], task), task, 16, 2, tmp_path)
    with separate_process(measure_plain_lightning, chosen, tmp_path, "cpu") as ask:
        assert ask("about") == {"precision": "32-true"}
        for request in ("epoch", "profile"):
            spent = ask(request)
            assert all(spent[part] > 0 for part in PARTS)
            assert sum(spent[part] for part in PARTS) <= spent["seconds"]
        assert ask("loader") > 0
        assert ask("memory")["host"] > 100
        assert ask("flops") > 1e6
