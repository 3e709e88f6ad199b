"""Where the lungs are: the pictures that a manifest's column `mask` names."""

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
    """The mask of each row of a table as `read_manifest` gives it; None where it has none. Nothing is decoded.

    Paths are relative to the manifest and stay below its folder, as those of images do. InputError naming the lines.
    """
    if "mask" not in table.columns:
        return [None] * len(table)
    files: list[Path | None] = []
    faults = []
    for name, path, file, line in table[["mask", "path", "file", "line"]].itertuples(index=False):
        root = Path(*Path(file).parts[: -len(Path(path).parts)])
        fault = file_fault(root, name) if name else None
        if fault:
            faults.append(f"line {line}: {fault}")
        files.append(root / name if name else None)
    if faults:
        raise InputError(
            f"data: {len(faults)} faults in column mask. {listed(faults, 5)}. Mend them or empty the cells"
        )
    return files


def read_mask(mask: Path, image: Path, size: int, crop: int) -> NDArray[np.bool_]:
    """What the network's view of `image` shows of the lungs, (crop, crop): whatever is not black in `mask`.

    size: the short side to which images are scaled. InputError where the mask cannot be read or is of another size than
    the image.
    """
    try:
        lungs, shape = read_image(mask), read_image(image).shape
    except BadImage as error:
        raise InputError(
            f"{mask}, the mask of {image}: {error}; give a picture that is white inside the lungs"
        ) from None
    if lungs.shape != shape:
        sides = [f"{width} x {height}" for height, width in (lungs.shape, shape)]
        raise InputError(
            f"{mask}: is {sides[0]} pixels and its image, {image}, {sides[1]}; draw it on the image itself"
        )
    white = np.where(lungs > 0, 255, 0).astype(np.uint8)
    return draw_on_canvas(white, size, crop) > 127
