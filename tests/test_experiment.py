"""What makes a fit fast does not change its results, and the reported epoch is the selected one."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from covid_cls.data.readers import read_image
from covid_cls.data.store import draw_on_canvas
from covid_cls.experiment import prepare_fit, run_experiment
from covid_cls.io import read_json
from covid_cls.reporting.run_outputs import summary_lines
from covid_cls.training.checkpoints import read_checkpoint
from covid_cls.training.module import EpochMetrics
from covid_cls.training.run_folder import open_run
from tests.training.small import changed, compose_small, make_classifier, make_data, make_trainer, snapshot

WORDS = ("augment=cxr", "callbacks=no_early_stopping")


def fit(folder: Path, cache: Path, *overrides: str, from_files: bool = False) -> dict[str, torch.Tensor]:
    """Return the weights after a fit; with `from_files`, images are decoded here and not taken from the store."""
    settings = compose_small(*WORDS, *overrides)
    data, classifier = make_data(settings, cache), make_classifier(settings)
    if from_files:
        size, canvas = settings["data"]["size"], data.images.shape[-1]
        data.images = np.stack([draw_on_canvas(read_image(Path(file)), size, canvas) for file in data.table["file"]])
        data.table = data.table.set_axis(range(len(data.table)))
    trainer, _ = make_trainer(settings, folder)
    prepare_fit(classifier, data, trainer, settings)
    trainer.fit(classifier, data)
    return snapshot(classifier)


@pytest.mark.parametrize(("strategy", "precision"), [("fc", "bf16-mixed"), ("full", "32-true")])
def test_the_store_and_the_number_of_workers_change_no_bit(
    strategy: str, precision: str, cache: Path, folder: Path
) -> None:
    words = (
        "trainer.max_epochs=1",
        "task=three_class",
        f"strategy={strategy}",
        f"trainer.precision={precision}",
    )
    wanted = fit(folder / "store", cache, *words)
    assert changed(wanted, fit(folder / "files", cache, *words, from_files=True)) == set()
    assert changed(wanted, fit(folder / "workers", cache, *words, "data.workers=2")) == set()
    assert changed(wanted, fit(folder / "seed", cache, *words, "seed=1")), "another seed must give other weights"


def test_waiting_checkpoints_are_written_at_the_end(cache: Path, folder: Path) -> None:
    # Each epoch is written at once, or most of them wait in memory.
    for seconds in (0, 3600):
        fit(
            folder / str(seconds),
            cache,
            "strategy=fc",
            "trainer.max_epochs=3",
            f"checkpoint_seconds={seconds}",
        )
    for name in ("best.ckpt", "last.ckpt"):
        at_once, later = (read_checkpoint(folder / str(s) / "checkpoints" / name) for s in (0, 3600))
        assert at_once["epoch"] == later["epoch"]
        assert at_once["global_step"] == later["global_step"]
        assert changed(at_once["state_dict"], later["state_dict"]) == set()
    momenta = [contents["optimizer_states"][0]["state"] for contents in (at_once, later)]
    assert all(torch.equal(momenta[0][k]["momentum_buffer"], momenta[1][k]["momentum_buffer"]) for k in momenta[0])


# Per epoch. The lowest loss is in the second epoch, and the highest AUROC in the third.
SCRIPTED = {"loss/val": [0.7, 0.5, 0.6], "auroc/val": [0.7, 0.8, 0.9]}


@pytest.mark.parametrize(("monitor", "mode", "best"), [("auroc/val", "max", 3), ("loss/val", "min", 2)])
def test_the_reported_epoch_is_the_one_that_the_checkpoint_callback_kept(
    monitor: str, mode: str, best: int, cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = itertools.count()
    measured = EpochMetrics.scalars

    def scripted(metrics: EpochMetrics, split: str) -> dict[str, torch.Tensor]:
        found = measured(metrics, split)
        if split == "val":
            epoch = next(epochs)
            found |= {name: torch.tensor(values[epoch]) for name, values in SCRIPTED.items()}
        return found

    monkeypatch.setattr(EpochMetrics, "scalars", scripted)
    callback = (f"callbacks.best_checkpoint.monitor={monitor}", f"callbacks.best_checkpoint.mode={mode}")
    settings = compose_small("strategy=fc", "trainer.max_epochs=3", "baselines=false", "test=false", *WORDS, *callback)
    settings["logger"] = {"_target_": "pytorch_lightning.loggers.TensorBoardLogger", "name": "", "version": "board"}
    data = make_data(settings, cache)
    with open_run(folder, settings, data.digest) as run:
        run_experiment(settings, data, run, [])
    value = pytest.approx(SCRIPTED[monitor][best - 1])
    assert torch.load(run.folder / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] + 1 == best
    metrics = read_json(run.folder / "metrics.json")
    assert metrics["best_epoch"] == best
    assert metrics["selected"] == {"epoch": best, "monitor": monitor, "mode": mode, "value": value}
    training = read_json(run.folder / "model" / "model.json")["training"]
    assert [training[key] for key in ("epochs", "best_epoch", "monitor", "monitor_value")] == [3, best, monitor, value]
    card = (run.folder / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"epoch {best} was selected by {monitor} = {SCRIPTED[monitor][best - 1]}" in card
    assert f"(epoch {best} was selected by {monitor})" in summary_lines(run.folder)[0]
    (point,) = EventAccumulator(str(run.folder / "board")).Reload().Scalars("best/loss_val")
    assert (point.step, point.value) == (best, pytest.approx(SCRIPTED["loss/val"][best - 1]))
