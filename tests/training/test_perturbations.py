"""A network that uses a corner decides otherwise after a perturbation of the corners; other networks do not."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from covid_cls.data.datamodule import Radiographs
from covid_cls.io import prediction_columns
from covid_cls.training.module import Classifier
from covid_cls.training.perturbations import blacken_corners, paste_marker, predict_perturbed
from covid_cls.training.split_predictions import predict_split
from tests.training.small import compose_small, make_classifier, make_data

CROP = 48


class RegionReader(nn.Module):
    """Decides by the brightest pixel in one part of a normalised view: covid above grey level 240."""

    def __init__(self, rows: slice, columns: slice) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.cut = nn.Parameter(torch.tensor(240 / 255))

    def run(self, x: Tensor, start: int = 0) -> Tensor:
        grey = x[:, 0, self.rows, self.columns].amax(dim=(1, 2)) * 0.226 + 0.449
        return torch.stack([50 * (grey - self.cut), torch.zeros_like(grey)], dim=1)


@pytest.fixture(scope="module")
def data(cache: Path) -> Radiographs:
    return make_data(compose_small("task=binary", f"data.size={CROP}", f"preprocess.crop={CROP}"), cache)


def classifier_of(net: nn.Module) -> Classifier:
    """Return a classifier with the network `net`."""
    classifier = make_classifier(compose_small("task=binary", f"data.size={CROP}", f"preprocess.crop={CROP}"))
    classifier.net = net  # type: ignore[assignment]
    return classifier


def covid(table: pd.DataFrame) -> np.ndarray:
    return np.asarray(table["prob_covid"] > 0.5)


def test_a_network_that_uses_the_marker_follows_it(data: Radiographs) -> None:
    side = CROP // 5
    classifier = classifier_of(RegionReader(slice(side), slice(-side, None)))
    before = predict_split(classifier.scorer(), data, "val")
    changed = predict_perturbed(classifier.scorer(), data, "val")
    assert covid(changed["marker"]).all()
    assert not covid(changed["corners"]).any()
    assert not covid(before).all()


def test_a_network_that_uses_the_centre_decides_as_before(data: Radiographs) -> None:
    middle = slice(CROP // 3, -CROP // 3)
    classifier = classifier_of(RegionReader(middle, middle))
    before = predict_split(classifier.scorer(), data, "val")
    for table in predict_perturbed(classifier.scorer(), data, "val").values():
        pd.testing.assert_frame_equal(table, before)


def test_the_tables_of_a_real_network_have_the_rows_of_its_predictions(data: Radiographs) -> None:
    settings = compose_small("task=binary", f"data.size={CROP}", f"preprocess.crop={CROP}", "backbone=resnet18")
    classifier = make_classifier(settings)
    before = predict_split(classifier.scorer(), data, "test")
    tables = predict_perturbed(classifier.scorer(), data, "test")
    assert list(tables) == ["corners", "marker"]
    for table in tables.values():
        assert list(table) == prediction_columns(("covid", "normal"))
        pd.testing.assert_frame_equal(table.iloc[:, :6], before.iloc[:, :6])
        assert not np.allclose(table["logit_covid"], before["logit_covid"])


def test_the_images_of_the_store_do_not_change(data: Radiographs) -> None:
    classifier = classifier_of(RegionReader(slice(9), slice(-9, None)))
    before = np.array(data.images)
    predict_perturbed(classifier.scorer(), data, "val")
    np.testing.assert_array_equal(np.array(data.images), before)


def test_corners_are_four_squares_of_a_fifth_of_the_side() -> None:
    view = torch.full((2, 1, 50, 50), 7, dtype=torch.uint8)
    blacken_corners(view)
    assert (view[:, :, :10, :10] == 0).all()
    assert (view[:, :, -10:, -10:] == 0).all()
    assert (view == 0).sum() == 2 * 4 * 10 * 10


def test_the_marker_is_in_the_upper_right_corner_and_the_same_on_every_image() -> None:
    view = torch.randint(0, 200, (3, 1, 100, 100), dtype=torch.uint8)
    before = view.clone()
    paste_marker(view)
    images, _, rows, columns = (view != before).nonzero(as_tuple=True)
    assert rows.max() < 25
    assert columns.min() >= 75
    assert (view[view != before] == 250).all()
    marks = [
        {(r, c) for i, r, c in zip(images.tolist(), rows.tolist(), columns.tolist(), strict=True) if i == k}
        for k in range(3)
    ]
    assert marks[0] == marks[1] == marks[2] != set()
