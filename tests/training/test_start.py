"""What makes a fit fast changes none of its numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from covid_cls.data.readers import read_image
from covid_cls.data.store import draw_on_canvas
from covid_cls.training.checkpoints import read_checkpoint
from covid_cls.training.start import prepare_fit
from tests.training.small import changed, compose_small, make_classifier, make_data, make_trainer, snapshot

WORDS = ("augment=cxr", "callbacks=no_early_stopping")


def fit(folder: Path, cache: Path, *overrides: str, from_files: bool = False) -> dict[str, torch.Tensor]:
    """The weights after a fit; from_files: images decoded here, one by one, instead of the store's."""
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
    words = ("trainer.max_epochs=1", "task=three_class", f"strategy={strategy}", f"trainer.precision={precision}")
    wanted = fit(folder / "store", cache, *words)
    assert changed(wanted, fit(folder / "files", cache, *words, from_files=True)) == set()
    assert changed(wanted, fit(folder / "workers", cache, *words, "data.workers=2")) == set()
    assert changed(wanted, fit(folder / "seed", cache, *words, "seed=1")), "another seed must give other weights"


def test_checkpoints_that_wait_are_written_in_the_end(cache: Path, folder: Path) -> None:
    """Complete networks, of the same epochs, whether each epoch was written or most of them waited in memory."""
    for seconds in (0, 3600):
        fit(folder / str(seconds), cache, "strategy=fc", "trainer.max_epochs=3", f"checkpoint_seconds={seconds}")
    for name in ("best.ckpt", "last.ckpt"):
        at_once, later = (read_checkpoint(folder / str(s) / "checkpoints" / name) for s in (0, 3600))
        assert at_once["epoch"] == later["epoch"]
        assert at_once["global_step"] == later["global_step"]
        assert changed(at_once["state_dict"], later["state_dict"]) == set()
    momenta = [contents["optimizer_states"][0]["state"] for contents in (at_once, later)]
    assert all(torch.equal(momenta[0][k]["momentum_buffer"], momenta[1][k]["momentum_buffer"]) for k in momenta[0])
