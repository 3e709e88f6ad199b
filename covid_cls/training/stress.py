"""What a trained network says of the same images with their corners blacked out, or with a marker pasted in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.radiograph import with_marker
from covid_cls.models.scorer import Scorer
from covid_cls.records import write_predictions
from covid_cls.training.predict import predict_split

CORNER = 1 / 5  # of the view's side: markers and labels lie there, and hardly any lung


def stress_tables(scorer: Scorer, data: Radiographs, split: str) -> dict[str, pd.DataFrame]:
    """Predictions tables of `split`, as `predict_split` gives them, on changed images: "corners" and "marker".

    corners: the four corners of what the network sees are black. marker: each image has the same bright framed L in the
    upper right corner of what the network sees. A network that reads the lungs decides as before.
    """
    crop = scorer.preprocess.crop
    changes = {"corners": _on_view(blacken_corners, crop), "marker": _on_view(paste_marker, crop)}
    return {name: predict_split(scorer, data, split, change=change) for name, change in changes.items()}


def write_stress(scorer: Scorer, data: Radiographs, folder: Path, split: str) -> None:
    """Write `folder`/<change>-<split>.csv: the predictions tables of `stress_tables`."""
    for name, table in stress_tables(scorer, data, split).items():
        write_predictions(table, folder / f"{name}-{split}.csv")


def blacken_corners(view: Tensor) -> None:
    """Set squares of a fifth of the side to 0 in the four corners of uint8 views (N, 1, S, S), in place."""
    side = round(view.shape[-1] * CORNER)
    for rows in (slice(side), slice(-side, None)):
        for columns in (slice(side), slice(-side, None)):
            view[..., rows, columns] = 0


def paste_marker(view: Tensor) -> None:
    """Draw the marker of `radiograph.with_marker` on uint8 views (N, 1, S, S), in place; the same on each."""
    drawn = with_marker(np.zeros(view.shape[-2:], np.uint8), np.random.default_rng(0))
    marker = torch.tensor(drawn, device=view.device)
    view[..., marker > 0] = marker[marker > 0]


def _on_view(change: Callable[[Tensor], None], crop: int) -> Callable[[Tensor], Tensor]:
    """`change` on a copy of canvases, in the centre crop that the network sees."""

    def changed(canvases: Tensor) -> Tensor:
        copy = canvases.clone()  # a canvas may be a view of the store
        start = (copy.shape[-1] - crop) // 2
        change(copy[..., start : start + crop, start : start + crop])
        return copy

    return changed
