"""Two processes train the same network as one: the same batches, mean losses and metrics, each image once."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from covid_cls.data.dataset import share
from covid_cls.io import Batch, read_json, write_json
from covid_cls.training.checkpoints import read_checkpoint
from covid_cls.training.module import Classifier
from tests.conftest import Command
from tests.training.small import compose_small, make_classifier

# 28 training images in batches of 5: the last batch has 3, none of which the second process gets. 9 validation images.
WORDS = (
    "task=three_class",
    "data.images=43",
    "data.val_share=0.2",
    "data.batch_size=5",
    "data.size=32",
    "preprocess.crop=32",
    "backbone.weights=none",
    "trainer.precision=32-true",
    "trainer.max_epochs=3",
    "callbacks=no_early_stopping",
    "logger=none",
    "baselines=false",
)
ENTRY = 6  # the stage after which a ResNet's features are pooled
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
BATCHES = [list(range(9)), [11, 17, 12, 19, 14], [20, 21, 25]]  # shares of 5 and 4, 3 and 2, 3 and 0
LOSSES = [
    ("loss=ce", "task=three_class"),
    ("loss=weighted_ce", "task=three_class"),
    ("loss=focal", "loss.alpha=inverse_frequency", "task=three_class"),
    ("loss=weighted_ce", "task=three_class_multilabel"),
    ("loss=focal", "task=three_class_multilabel"),
]


def trained(train_process: Command, folder: Path, *words: str) -> Path:
    folder.mkdir(exist_ok=True)
    # In a real process, because Lightning starts the second one with the command line of the first.
    done = train_process(folder, *WORDS, *words)
    assert done.returncode == 0, done.stderr
    (record,) = folder.rglob("run.json")
    return record.parent


def agree(one: Tensor, two: Tensor) -> None:
    """Assert equality up to 1e-6 of the largest value, since float32 sums are added in another order."""
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6 * max(1e-3, float(one.abs().max())))


@pytest.mark.slow(reason="several ranks")
def test_the_network_of_two_processes_is_that_of_one(train_process: Command, tmp_path: Path) -> None:
    # Neither batch norm nor dropout.
    words = ("backbone=vgg11", "strategy=partial", "loss=weighted_ce", "head.dropout=0")
    one = trained(train_process, tmp_path / "one", *words, "trainer=cpu")
    two = trained(train_process, tmp_path / "two", *words, *TWO)
    for name in ("best", "last"):
        alone, shared = (read_checkpoint(folder / "checkpoints" / f"{name}.ckpt") for folder in (one, two))
        assert (alone["epoch"], alone["global_step"]) == (shared["epoch"], shared["global_step"])
        for tensor, value in alone["state_dict"].items():
            agree(value, shared["state_dict"][tensor])
    assert alone["global_step"] == 3 * 6
    histories = [
        pd.read_csv(folder / "history.csv").drop(columns=["seconds", "speed/images_per_second"])
        for folder in (one, two)
    ]
    assert {"loss/train", "loss/val", "auroc/val/covid", "lr/head"} <= set(histories[0])
    pd.testing.assert_frame_equal(*histories, rtol=0, atol=1e-6)
    for split in ("val", "test"):
        tables = [pd.read_csv(folder / f"predictions-{split}.csv") for folder in (one, two)]
        counts = read_json(two / "run.json")["data"]["images_per_split_and_class"][split]
        assert len(tables[1]) == tables[1]["image_id"].nunique() == sum(counts.values())
        pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-6)


@pytest.mark.slow(reason="several ranks")
def test_two_processes_train_batch_norm_and_dropout_validate_the_saved_network_and_continue(
    train_process: Command, tmp_path: Path
) -> None:
    folder = trained(train_process, tmp_path, "backbone=resnet18", "strategy=partial", *TWO)
    history, table = pd.read_csv(folder / "history.csv"), pd.read_csv(folder / "predictions-val.csv")
    assert len(table) == table["image_id"].nunique() == 9
    right = np.array([row[f"prob_{row['label']}"] for _, row in table.iterrows()])
    assert history["loss/val"].min() == pytest.approx(-np.log(right).mean(), abs=1e-6)
    # The state after a kill during prediction: both processes continue from the record of the first.
    write_json(folder / "run.json", read_json(folder / "run.json") | {"status": "running"})
    predictions = [folder / f"predictions-{split}.csv" for split in ("val", "test")]
    contents = [path.read_bytes() for path in predictions]
    for path in predictions:
        path.unlink()
    assert trained(train_process, tmp_path, "backbone=resnet18", "strategy=partial", *TWO) == folder
    assert [path.read_bytes() for path in predictions] == contents


def batch_of(positions: list[int]) -> Batch:
    """Return a batch of features and classes that depend on the positions only."""
    features = [torch.randn(512, generator=torch.Generator().manual_seed(position)) for position in positions]
    index = torch.tensor(positions, dtype=torch.int64)
    x = torch.stack(features) if features else torch.empty((0, 512))
    return Batch(x, (index * index + index // 3) % 3, index, ENTRY)


def head_gradients(classifier: Classifier, positions: list[int]) -> list[Tensor]:
    """Return the gradients of the head after one training step."""
    classifier.zero_grad()
    classifier.training_step(batch_of(positions), 0).backward()
    return [p.grad for p in classifier.net.get_submodule("head").parameters() if p.grad is not None]


def small_classifier(words: tuple[str, ...]) -> Classifier:
    settings = compose_small("strategy=fc", "head.dropout=0", *words)
    return make_classifier(settings, counts=[20, 50, 30]).train()


def steps_of(rank: int, world: int, folder: Path) -> list[Any]:
    """Return, for each loss, the gradients per batch and the epoch's metrics of process `rank` from its shares."""
    meet = f"file://{folder}/meet"
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    try:
        found = []
        for words in LOSSES:
            classifier = small_classifier(words)
            gradients = [head_gradients(classifier, share(batch, rank, world)) for batch in BATCHES]
            found.append((gradients, classifier.epoch_scalars()))
    finally:
        distributed.destroy_process_group()
    return found


def second_process(_: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(steps_of(1, 2, folder), folder / "second.pt")


@pytest.mark.slow(reason="several ranks")
def test_shares_of_any_size_average_to_the_gradient_and_the_metrics_of_the_full_batch(tmp_path: Path) -> None:
    other = multiprocessing.spawn(second_process, (tmp_path,), join=False)
    first = steps_of(0, 2, tmp_path)
    # join() returns False until all processes have ended.
    while not other.join():
        pass
    second = torch.load(tmp_path / "second.pt", weights_only=True)
    for words, *ranks in zip(LOSSES, first, second, strict=True):
        classifier = small_classifier(words)
        for number, batch in enumerate(BATCHES):
            expected = head_gradients(classifier, batch)
            assert len(expected) == 4
            for parameter, gradient in enumerate(expected):
                agree(gradient, sum(gradients[number][parameter] for gradients, _ in ranks) / 2)
        scalars = classifier.epoch_scalars()
        for _, seen in ranks:
            assert seen.keys() == scalars.keys()
            assert all(float(seen[name]) == pytest.approx(float(scalars[name]), abs=1e-6) for name in scalars), words


@pytest.mark.parametrize("words", LOSSES, ids=" ".join)
def test_an_epochs_loss_does_not_depend_on_how_its_images_were_batched(words: tuple[str, ...]) -> None:
    classifier, images = small_classifier(words), [position for batch in BATCHES for position in batch]
    losses = []
    for batches in (BATCHES, [images], [images[:1], [], images[1:]]):
        for batch in batches:
            classifier.training_step(batch_of(batch), 0)
        losses.append(float(classifier.epoch_scalars()["loss/train"]))
    full = batch_of(images)
    expected = float(classifier.criterion(classifier.net.run(full.x, start=full.stage), full.y).detach())
    assert losses == pytest.approx([expected] * 3, abs=1e-6)


def test_processes_draw_different_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, drawn = small_classifier(("task=three_class",)), []
    for rank in (0, 1, 0):
        monkeypatch.setattr(Classifier, "global_rank", rank)
        classifier.on_train_epoch_start()
        drawn.append(torch.rand(8))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
