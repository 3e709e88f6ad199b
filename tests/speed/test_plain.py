"""The loop that covid_cls is measured against is the one it is said to be."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from covid_cls.labels import TASKS
from covid_cls.speed import clock
from covid_cls.speed.child import Child
from covid_cls.speed.clock import PARTS, Stopwatch
from covid_cls.speed.plain import plain_epoch, plain_loader, plain_network
from covid_cls.speed.plain_lightning import run_plain_lightning
from covid_cls.speed.staging import stage_images, usable_images
from tests.speed.small import settings, table_settings


def trained(*overrides: str) -> set[str]:
    network = plain_network(settings(*overrides))
    return {name.rpartition(".")[0] for name, tensor in network.named_parameters() if tensor.requires_grad}


def test_strategies_train_what_they_say() -> None:
    assert trained("backbone=resnet18", "strategy=fc") == {"fc.hidden", "fc.out"}
    partial = trained("backbone=resnet18", "strategy=partial")
    assert {name.partition(".")[0] for name in partial} == {"layer4", "fc"}
    assert {"layer4.0.conv1", "layer4.0.downsample.0", "layer4.1.bn2"} < partial
    assert {"conv1", "bn1", "layer1.0.conv1"} < trained("backbone=resnet18", "strategy=full")
    block5 = {"features.16", "features.18"}
    assert trained("backbone=vgg11", "strategy=partial") == block5 | {"classifier.hidden", "classifier.out"}


def test_an_epoch_moves_what_is_trained_and_the_statistics_of_what_is_not(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = table_settings(cache, "strategy=partial", "optimizer.lr=0.01")
    task = TASKS["binary"]
    stage_images(usable_images(chosen["data"], task), task, 16, 2, tmp_path)
    torch.manual_seed(0)
    network, loader = plain_network(chosen), plain_loader(chosen, tmp_path)
    images, labels = next(iter(loader))
    assert images.shape == (8, 3, 48, 48)
    assert set(labels.tolist()) <= {0, 1}
    assert torch.equal(images[:, 0], images[:, 2])  # grey, three times
    free = {name for name, tensor in network.named_parameters() if tensor.requires_grad}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    seconds = itertools.count(100.0)
    # Each look at this clock takes a second: two batches of three parts, then the end.
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    spent = plain_epoch(network, loader, optimizer, Stopwatch(torch.device("cpu")))
    assert spent == {"seconds": 7.0, **dict.fromkeys(PARTS, 2.0)}
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in network.named_parameters()}
    assert moved & parameters == free
    # As in that loop: batch norms of frozen layers gather statistics.
    assert {"bn1.running_mean", "layer1.0.bn1.running_var"} < moved


@pytest.mark.slow(reason="the fit is a process of its own")
def test_a_lightning_fit_trains_an_epoch_when_it_is_told_to(cache: Path, tmp_path: Path) -> None:
    chosen = table_settings(cache, "strategy=fc")
    task = TASKS["binary"]
    stage_images(usable_images(chosen["data"], task), task, 16, 2, tmp_path)
    with Child(run_plain_lightning, chosen, tmp_path, "cpu") as child:
        assert child.hello == {"precision": "32-true"}
        for word in ("epoch", "profile"):
            spent = child.ask(word)
            assert all(spent[part] > 0 for part in PARTS)
            assert sum(spent[part] for part in PARTS) <= spent["seconds"]
        assert child.ask("loader") > 0
        assert child.ask("memory")["host"] > 100
