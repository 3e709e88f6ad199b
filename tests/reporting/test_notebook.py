"""The figures that only notebooks show."""

import numpy as np
import pytest

from covid_cls.reporting.notebook import image_sheet


def test_each_image_has_its_place_and_its_caption() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None] * np.full((1, 8, 8), 50, dtype=np.uint8)
    names = [f"image {k}" for k in range(5)]
    drawn = image_sheet(list(images), names, columns=3)
    places = [axes for axes in drawn.axes if axes.images]
    assert [axes.get_title() for axes in places] == names
    assert len(drawn.axes) == 2 * 3
    for axes, image in zip(places, images, strict=True):
        (shown,) = axes.images
        np.testing.assert_array_equal(shown.get_array(), image)
        assert shown.get_clim() == (0, 255)  # a dark image stays dark


def test_a_sheet_of_no_images_is_empty() -> None:
    assert not any(axes.images for axes in image_sheet([], []).axes)


def test_an_image_without_a_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        image_sheet([np.zeros((8, 8), dtype=np.uint8)] * 2, ["one"])
