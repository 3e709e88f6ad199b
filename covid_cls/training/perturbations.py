"""Perturbation test: predictions for the same images with black corners, or with a marker added to each."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.drawing import with_marker
from covid_cls.io import write_predictions
from covid_cls.models.inference import Scorer
from covid_cls.training.split_predictions import predict_split

# Share of the view's side. Markers and labels are often in the corners, which contain hardly any lung.
CORNER = 1 / 5


def write_perturbations(scorer: Scorer, data: Radiographs, folder: Path, split: str) -> None:
    """Write the tables of `predict_perturbed` to `folder`/<perturbation>-<split>.csv."""
    for name, table in predict_perturbed(scorer, data, split).items():
        write_predictions(table, folder / f"{name}-{split}.csv")


def predict_perturbed(scorer: Scorer, data: Radiographs, split: str) -> dict[str, pd.DataFrame]:
    """Return the predictions tables of `split` for perturbed images, by the name of the perturbation.

    A network that uses the lungs decides as without perturbation. "corners": the four corners of the network's view are
    black. "marker": the same bright framed L is in the upper right corner of each view.
    """
    perturbations = {"corners": blacken_corners, "marker": paste_marker}
    changes = {name: partial(_on_view, scorer.preprocess.crop, perturb) for name, perturb in perturbations.items()}
    return {name: predict_split(scorer, data, split, change=change) for name, change in changes.items()}


def blacken_corners(view: Tensor) -> None:
    """Set a square in each corner of uint8 views (N, 1, S, S) to 0, in place."""
    side = round(view.shape[-1] * CORNER)
    for rows in (slice(side), slice(-side, None)):
        for columns in (slice(side), slice(-side, None)):
            view[..., rows, columns] = 0


def paste_marker(view: Tensor) -> None:
    """Draw the marker of `drawing.with_marker` on uint8 views (N, 1, S, S), in place."""
    drawn = with_marker(np.zeros(view.shape[-2:], np.uint8), np.random.default_rng(0))
    marker = torch.tensor(drawn, device=view.device)
    view[..., marker > 0] = marker[marker > 0]


def _on_view(crop: int, perturb: Callable[[Tensor], None], canvases: Tensor) -> Tensor:
    """Return copies of canvases whose centre crop is perturbed."""
    # Canvases can be views of the store, which must not change.
    copy = canvases.clone()
    start = (copy.shape[-1] - crop) // 2
    perturb(copy[..., start : start + crop, start : start + crop])
    return copy
