"""A diverged run stops and keeps its last finite checkpoint; a resumed run equals an uninterrupted one."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor

from covid_cls.errors import NonFiniteError
from covid_cls.training.callbacks import EpochHistory
from covid_cls.training.checkpoints import load_classifier, read_checkpoint
from tests.training.small import compose_small, make_classifier, make_data, make_trainer, snapshot


class PoisonTrainingBatch(Callback):
    """Sets a pixel of the second batch of an epoch to nan."""

    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            batch.x[0, 0, 3, 3] = math.nan


class PoisonValidationBatch(PoisonTrainingBatch):
    """Sets a pixel of a validation batch to inf."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.current_epoch == self.epoch:
            batch.x[0, 0, 3, 3] = math.inf


class PoisonTensor(Callback):
    """Sets a value of one tensor of the network to nan after validation."""

    def __init__(self, name: str, epoch: int = 1) -> None:
        self.name, self.epoch = name, epoch

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            tensor = pl_module.net.state_dict()[self.name]
            tensor[(0,) * tensor.ndim] = math.nan


class PoisonGradient(Callback):
    """Sets a gradient to inf: the loss of this step is finite, but not the weights after it."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.net.get_submodule("head.out").weight.grad[0, 0] = math.inf


def finite(contents: dict[str, Any]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in contents["state_dict"].values())


CASES = {
    "training loss": (PoisonTrainingBatch(), "training loss", "strategy=fc"),
    "training loss, all stages": (PoisonTrainingBatch(), "training loss", "strategy=full"),
    "validation": (PoisonValidationBatch(), "validation loss", "strategy=fc"),
    "gradient": (PoisonGradient(), "loss", "strategy=fc"),
    "head weight": (PoisonTensor("head.out.weight"), "weights", "strategy=fc"),
    "frozen weight": (PoisonTensor("layer1.0.conv1.weight"), "weights", "strategy=fc"),
    "batch statistics": (PoisonTensor("layer4.0.bn1.running_var"), "weights", "strategy=full"),
}


@pytest.mark.parametrize(("poison", "what", "strategy"), CASES.values(), ids=CASES)
def test_a_run_that_becomes_nan_stops_and_keeps_finite_checkpoints(
    poison: Callback, what: str, strategy: str, cache: Path, folder: Path
) -> None:
    # Otherwise a slow epoch would write its last checkpoint twice and keep the first one as the previous checkpoint.
    settings = compose_small(strategy, "trainer.max_epochs=3", "checkpoint_seconds=1e9")
    trainer, history = make_trainer(settings, folder, poison)
    with pytest.raises(NonFiniteError, match=f"the .*{what} became nan or inf in epoch 2") as error:
        trainer.fit(make_classifier(settings), make_data(settings, cache))
    assert "Reduce optimizer.lr" in str(error.value)
    assert [row["epoch"] for row in history.rows] == [0]
    files = sorted((folder / "checkpoints").glob("*.ckpt"))
    assert [file.name for file in files] == ["best.ckpt", "last.ckpt"]
    for file in files:
        contents = read_checkpoint(file)
        assert contents["epoch"] == 0
        assert finite(contents)
        load_classifier(file)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_is_nan_from_the_start_leaves_no_checkpoint(precision: str, cache: Path, folder: Path) -> None:
    settings = compose_small("strategy=fc", f"trainer.precision={precision}")
    trainer, history = make_trainer(settings, folder, PoisonTrainingBatch(epoch=0))
    with pytest.raises(NonFiniteError):
        trainer.fit(make_classifier(settings), make_data(settings, cache))
    assert not list(folder.rglob("*.ckpt"))
    assert not history.rows


def test_a_far_too_high_learning_rate_stops_the_run(cache: Path, folder: Path) -> None:
    settings = compose_small("strategy=full", "optimizer.lr=1e12", "scheduler=none", "trainer.max_epochs=4")
    trainer, _ = make_trainer(settings, folder)
    with pytest.raises(NonFiniteError, match=r"learning rates \[1000000000000.0\]"):
        trainer.fit(make_classifier(settings), make_data(settings, cache))
    assert all(finite(read_checkpoint(file)) for file in folder.rglob("*.ckpt"))


class Kill(Exception):  # noqa: N818  # it stands for a kill, not for an error
    pass


class KillIn(Callback):
    """Ends the run after the first batch of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch:
            raise Kill


EXACT = ("strategy=full", "augment=cxr", "head.dropout=0.5", "trainer.max_epochs=4", "callbacks=no_early_stopping")


def fit(
    folder: Path, cache: Path, *overrides: str, kill_in: int | None = None
) -> tuple[dict[str, Tensor], EpochHistory]:
    """Train, from last.ckpt if it exists, and return the weights and the history."""
    settings = compose_small(*EXACT, *overrides)
    data, classifier = make_data(settings, cache), make_classifier(settings)
    trainer, history = make_trainer(settings, folder, *([] if kill_in is None else [KillIn(kill_in)]))
    last = folder / "checkpoints" / "last.ckpt"
    # The state of the global generator at the start must not matter.
    torch.manual_seed(1234 if last.is_file() else 99)
    trainer.fit(classifier, data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    return snapshot(classifier), history


@pytest.fixture(scope="module")
def uninterrupted(
    cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Tensor], EpochHistory]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    yield fit(folder, cache)
    for file in folder.rglob("*.ckpt"):
        file.unlink()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(
    workers: int, uninterrupted: tuple[dict[str, Tensor], EpochHistory], cache: Path, folder: Path
) -> None:
    # Trained without workers, whose number must not matter either.
    expected, expected_history = uninterrupted
    with pytest.raises(Kill):
        fit(folder, cache, f"data.workers={workers}", kill_in=2)
    half = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert half["epoch"] == 1
    found, history = fit(folder, cache, f"data.workers={workers}")
    assert any(not torch.equal(half["state_dict"][name], tensor) for name, tensor in expected.items())
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert [row["epoch"] for row in history.rows] == [0, 1, 2, 3]
    for row, wanted in zip(history.rows, expected_history.rows, strict=True):
        timings = {"seconds", "speed/images_per_second"}
        assert row.keys() == wanted.keys()
        assert {k: v for k, v in row.items() if k not in timings} == {
            k: v for k, v in wanted.items() if k not in timings
        }


def test_another_seed_gives_other_weights(
    uninterrupted: tuple[dict[str, Tensor], EpochHistory], cache: Path, folder: Path
) -> None:
    other, _ = fit(folder, cache, "seed=1", "trainer.max_epochs=1")
    expected, _ = uninterrupted
    assert any(not torch.equal(other[name], expected[name]) for name in expected)


def test_a_history_row_has_the_metrics_of_the_epoch(uninterrupted: tuple[dict[str, Tensor], EpochHistory]) -> None:
    _, history = uninterrupted
    wanted = {f"{kind}/{split}" for kind in ("loss", "auroc", "accuracy") for split in ("train", "val")}
    wanted |= {"epoch", "seconds", "speed/images_per_second", "lr/head", "auroc/val/covid", "sensitivity/val/covid"}
    for row in history.rows:
        assert wanted <= row.keys()
        assert all(type(value) in (int, float) for value in row.values())
        assert row["seconds"] > 0
        assert row["speed/images_per_second"] > 0
