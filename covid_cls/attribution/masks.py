"""Lung masks: the images that the column `mask` of a manifest names."""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from covid_cls.data.limits import BadImage
from covid_cls.data.manifest import file_fault
from covid_cls.data.readers import read_image
from covid_cls.data.store import draw_on_canvas
from covid_cls.errors import InputError, listed


def mask_files(table: pd.DataFrame) -> list[Path | None]:
    """Return the mask file of each row of a manifest's table, or None; nothing is decoded.

    Like those of images, the paths are relative to the manifest and must stay in its folder.

    Raises:
        InputError: Mask files are missing or may not be opened; the message names the lines.
    """
    files: list[Path | None] = [None] * len(table)
    if "mask" not in table.columns:
        return files
    faults = []
    for row, (name, path, file, line) in enumerate(table[["mask", "path", "file", "line"]].itertuples(index=False)):
        if name:
            # The manifest's folder: what remains of the image's file without its path in the manifest.
            root = Path(*Path(file).parts[: -len(Path(path).parts)])
            files[row] = root / name
            if fault := file_fault(root, name):
                faults.append(f"line {line}: {fault}")
    if faults:
        raise InputError(
            f"data: {len(faults)} faults in column mask. {listed(faults, 5)}. Fix these paths or leave them empty"
        )
    return files


def read_mask(mask: Path, image: Path, size: int, crop: int) -> NDArray[np.bool_]:
    """Return where the network's view of `image` shows lungs, (crop, crop): pixels that are not black in `mask`.

    Args:
        mask: An image of the size of `image`.
        image: The radiograph.
        size: Short side in pixels to which images are scaled.
        crop: Side of the network's view in pixels.

    Raises:
        InputError: The mask cannot be read, or differs from the image in size.
    """
    try:
        lungs, shape = read_image(mask), read_image(image).shape
    except BadImage as error:
        raise InputError(
            f"{mask}, the mask of {image}: {error}; give an image that is white inside the lungs"
        ) from None
    if lungs.shape != shape:
        sides = [f"{width} x {height}" for height, width in (lungs.shape, shape)]
        raise InputError(
            f"{mask}: is {sides[0]} pixels and its image, {image}, {sides[1]}; draw the mask on the image itself"
        )
    # Masks may hold labels such as 1 and 2. With 0 and 255, a scaled pixel at an outline is lung from one half on.
    white = np.where(lungs > 0, 255, 0).astype(np.uint8)
    return draw_on_canvas(white, size, crop) > 127
