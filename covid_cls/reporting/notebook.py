"""What the notebooks show and no page does: images side by side."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from covid_cls.reporting.figures import INK

_SIDE = 1.5  # inches of an image
_CAPTION = 0.25  # and of the line above it


def image_sheet(images: Sequence[NDArray[np.uint8]], captions: Sequence[str], columns: int = 6) -> Figure:
    """The images row by row, each below its caption; 0 is black, 255 white, whatever an image holds.

    images: n of uint8 (H, W); captions: n.
    """
    rows = max(1, -(-len(images) // columns))
    figure = Figure((_SIDE * columns, (_SIDE + _CAPTION) * rows), layout="constrained", facecolor="white")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in places:
        axes.set_axis_off()
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        places[k].imshow(image, cmap="gray", vmin=0, vmax=255)
        places[k].set_title(caption, fontsize=8, color=INK)
    return figure
