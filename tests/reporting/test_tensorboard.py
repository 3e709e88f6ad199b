"""TensorBoard shows the numbers of the run, and writing them does not change the training."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor

from covid_cls.data.datamodule import Radiographs
from covid_cls.errors import NonFiniteError
from covid_cls.experiment import build_trainer, prepare_fit
from covid_cls.reporting.tensorboard import fixed_cases, grad_cam_panel, write_hparams, write_layout
from covid_cls.runtime.cli import compose_job
from covid_cls.tasks import TASKS
from covid_cls.training.callbacks import EpochHistory
from covid_cls.training.module import Classifier
from tests.training.small import compose_small, make_classifier, make_data, snapshot
from tests.training.test_callbacks import PoisonTrainingBatch


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for phantoms and image stores."""
    return tmp_path_factory.mktemp("cache")


def with_board(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the default logger of `train`."""
    return {**settings, "logger": compose_job("train", ()).settings["logger"]}


def fit(
    settings: dict[str, Any], cache: Path, folder: Path, *callbacks: pl.Callback
) -> tuple[Classifier, EpochHistory, Radiographs]:
    """Fit a classifier as `train` does, without checkpoints."""
    early = {"early_stopping": settings["callbacks"]["early_stopping"]}
    settings = {**settings, "callbacks": early, "trainer": {**settings["trainer"], "enable_checkpointing": False}}
    classifier, data, history = make_classifier(settings), make_data(settings, cache), EpochHistory()
    trainer = build_trainer(settings, folder, [history])
    trainer.callbacks += callbacks
    prepare_fit(classifier, data, trainer, settings)
    torch.manual_seed(7)
    trainer.fit(classifier, data)
    return classifier, history, data


def events(folder: Path) -> EventAccumulator:
    """Return what was written for TensorBoard."""
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()


def gradients(classifier: Classifier) -> dict[str, Tensor]:
    return {name: tensor.grad for name, tensor in classifier.named_parameters() if tensor.grad is not None}


# Gives at least two patients of each class in validation.
CASES = ("data.images=60", "data.val_share=0.3")
UNAFFECTED = {
    "full": ("strategy=full", "task=three_class_multilabel"),
    "cached features": ("strategy=fc", "feature_cache=views:2"),
}


@pytest.mark.parametrize("overrides", UNAFFECTED.values(), ids=UNAFFECTED)
def test_tensorboard_does_not_change_the_training(overrides: tuple[str, ...], cache: Path, tmp_path: Path) -> None:
    settings = compose_small(*overrides, "image_every=1")
    alone, without, _ = fit(settings, cache, tmp_path / "alone")
    state = torch.get_rng_state()
    shown, history, _ = fit(with_board(settings), cache, tmp_path / "shown")
    assert torch.equal(torch.get_rng_state(), state)
    expected, found = snapshot(alone), snapshot(shown)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    expected, found = gradients(alone), gradients(shown)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert [m.training for m in alone.modules()] == [m.training for m in shown.modules()]
    timings = {"seconds", "speed/images_per_second"}
    for row, wanted in zip(history.rows, without.rows, strict=True):
        assert {k: v for k, v in row.items() if k not in timings} == {
            k: v for k, v in wanted.items() if k not in timings
        }
    # Pictures were written, also where training received features instead of images.
    assert [picture.step for picture in events(tmp_path / "shown").Images("grad_cam/val")] == [1, 2]


@pytest.fixture(scope="module")
def shown(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EventAccumulator, Radiographs]:
    """Return what TensorBoard shows of a run that stops early, after three of nine epochs, and its data."""
    folder = tmp_path_factory.mktemp("shown")
    patience = ("callbacks.early_stopping.patience=2", "+callbacks.early_stopping.min_delta=100")
    settings = with_board(compose_small("task=three_class", "trainer.max_epochs=9", "image_every=7", *patience))
    _, history, data = fit(settings, cache, folder)
    assert len(history.rows) == 3
    return events(folder), data


def test_pictures_show_the_first_and_the_last_epoch(shown: tuple[EventAccumulator, Radiographs]) -> None:
    board, _ = shown
    steps = {tag: [point.step for point in board.Images(tag)] for tag in board.Tags()["images"]}
    assert steps == {"confusion_matrix/val": [1, 3], "grad_cam/val": [1, 3], "images/train_batch": [1]}


def test_pr_curves_count_the_validation_images(shown: tuple[EventAccumulator, Radiographs]) -> None:
    board, data = shown
    val = data.table[data.table["split"] == "val"]
    for name in data.task.classes:
        points = board.Tensors(f"pr/val/{name}")
        assert [point.step for point in points] == [1, 3]
        true_positive, false_positive = make_ndarray(points[-1].tensor_proto)[:2, 0]  # at threshold 0
        assert true_positive == (val["label"] == name).sum()
        assert false_positive == (val["label"] != name).sum()


def test_every_chart_finds_its_tags_and_no_others(shown: tuple[EventAccumulator, Radiographs]) -> None:
    board, _ = shown
    layout = Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    patterns = [tag for part in layout.category for chart in part.chart for tag in chart.multiline.tag]
    scalars = board.Tags()["scalars"]
    found = {pattern: [tag for tag in scalars if re.match(pattern, tag)] for pattern in patterns}
    # With random initialisation, the backbone has no separate learning rate.
    assert found == {p: [] if p == "lr/backbone$" else [p.removesuffix("$")] for p in patterns}


def test_a_run_with_nan_is_stopped_by_the_check_for_it(cache: Path, tmp_path: Path) -> None:
    settings = with_board(compose_small("strategy=full", "image_every=1"))
    with pytest.raises(NonFiniteError):
        fit(settings, cache, tmp_path, PoisonTrainingBatch(epoch=1))
    assert [picture.step for picture in events(tmp_path).Images("confusion_matrix/val")] == [1]


@pytest.mark.parametrize("task", TASKS)
def test_fixed_cases_are_the_first_images_of_each_class_from_different_patients(task: str, cache: Path) -> None:
    settings = compose_small(f"task={task}", *CASES)
    data = make_data(settings, cache)
    cases = fixed_cases(data, 2)
    table = data.table.loc[cases.index.tolist()]
    assert table["label"].tolist() == [name for name in data.task.classes for _ in range(2)]
    assert [data.task.classes[k] for k in cases.y] == table["label"].tolist()
    assert table["patient_id"].is_unique
    assert set(table["split"]) == {"val"}
    val = data.table[data.table["split"] == "val"]
    for name in data.task.classes:
        of_class = val[val["label"] == name]
        first = of_class.iloc[0]
        other = of_class[of_class["patient_id"] != first["patient_id"]].iloc[0]
        assert table.loc[table["label"] == name, "path"].tolist() == [first["path"], other["path"]]
    assert len(fixed_cases(data, 1000).y) == val["patient_id"].nunique()


def test_the_panel_shows_truth_probability_and_error(cache: Path) -> None:
    settings = compose_small("task=three_class", "strategy=full", *CASES)
    classifier, data = make_classifier(settings), make_data(settings, cache)
    # Every image is called normal with p = 1.
    classifier.net.head.out.bias.data.copy_(torch.tensor([0.0, 50.0, 0.0]))
    classifier.train()
    figure = grad_cam_panel(classifier, fixed_cases(data, 2), epoch=4)
    assert all(module.training for module in classifier.net.modules())
    grid = np.array(figure.axes).reshape(3, 2)
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["covid", "normal", "pneumonia"]
    titles = [[axes.get_title() for axes in row] for row in grid]
    assert titles == [["p 0.00, called normal"] * 2, ["p 1.00"] * 2, ["p 0.00, called normal"] * 2]
    assert "epoch 4" in figure.get_suptitle()
    # Now no place in an image has an influence.
    classifier.net.head.out.weight.data.zero_()
    figure = grad_cam_panel(classifier, fixed_cases(data, 1), epoch=4)
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["nothing positive"]] * 3


RECORD: dict[str, Any] = {
    "cell": "three_class-resnet18-partial-ce-s3-0123abcd",
    "config": {
        "task": {"name": "three_class"},
        "backbone": {"name": "resnet18"},
        "strategy": {"name": "partial", "freeze_until": None},
        "loss": {"name": "ce"},
        "augment": {"name": "cxr"},
        "optimizer": {"name": "sgd", "lr": 1},
        "preprocess": {"seen": "whole"},
        "feature_cache": "off",
        "seed": 3,
        "data": {"kind": "manifest", "path": "some/chests/manifest.csv", "group": "patient", "seed": 5, "folds": None},
    },
    "weights": {"used": "/somewhere/on/this/machine/weights.pth"},
    "data": {
        "images": 1234,
        "patients": 900,
        "images_per_split_and_class": {
            "train": {"covid": 100, "normal": 500, "pneumonia": 400},
            "val": {"covid": 20, "normal": 60, "pneumonia": 50},
            "test": {"covid": 14, "normal": 50, "pneumonia": 40},
        },
        "patients_per_split": {"train": 700, "val": 100, "test": 100},
        "sources": {"nih": 1100, "a|b": 134},
        "quarantined": [],
    },
    "notes": ["LEAKY SPLIT: images were split without regard to patients (data.group=image)"],
}
BEST = {"epoch": 6.0, "loss/val": 0.5, "auroc/val": 0.9, "accuracy/val": 0.8, "f1/val": 0.7}
BEST["sensitivity/val/covid"] = 0.6


def with_data(**settings: Any) -> dict[str, Any]:
    config = RECORD["config"]
    return {**RECORD, "config": {**config, "data": {**config["data"], **settings}}}


def hparams_of(record: dict[str, Any], folder: Path) -> tuple[Any, Any, EventAccumulator]:
    logger = TensorBoardLogger(folder, name="", version="tensorboard")
    write_layout(logger)
    write_hparams(logger, record, BEST)
    logger.finalize("success")
    board = events(folder)
    experiment, start = (
        board.SummaryMetadata(tag).plugin_data.content
        for tag in (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG)
    )
    found = metadata.parse_experiment_plugin_data(experiment), metadata.parse_session_start_info_plugin_data(start)
    return *found, board


def test_the_hparams_row_has_typed_values_the_digest_as_its_name_and_scores_of_the_best_epoch(tmp_path: Path) -> None:
    experiment, start, board = hparams_of(RECORD, tmp_path)
    assert start.group_name == "0123abcd"
    values = {
        name: value.string_value if value.HasField("string_value") else value.number_value
        for name, value in start.hparams.items()
    }
    assert values["lr"] == 1.0
    assert {name for name, value in values.items() if not isinstance(value, str)} == {"lr"}
    assert (values["seed"], values["fold"], values["weights"]) == ("3", "-", "weights.pth")
    assert "" not in values.values()
    assert {info.name for info in experiment.hparam_infos} == set(values)
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics == board.Tags()["scalars"]
    assert {tag: [(p.step, p.value) for p in board.Scalars(tag)] for tag in metrics} == {
        f"best/{tag.replace('/', '_')}": [(7, pytest.approx(value))] for tag, value in BEST.items() if tag != "epoch"
    }


@pytest.mark.parametrize(("data", "fifth"), [({"folds": None}, "seed"), ({"folds": 5, "fold": 2}, "fold")])
def test_a_cross_validation_shows_folds_by_default_and_other_runs_seeds(
    data: dict[str, Any], fifth: str, tmp_path: Path
) -> None:
    experiment, start, _ = hparams_of(with_data(**data), tmp_path)
    first = {info.name for info in experiment.hparam_infos if info.differs}
    assert first == {"task", "backbone", "strategy", "loss", fifth}
    assert start.hparams["fold"].string_value == ("2" if fifth == "fold" else "-")
