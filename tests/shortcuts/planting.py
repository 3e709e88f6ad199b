"""Plant copies of radiographs, such as public data sets contain, in a data set."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from covid_cls.data.readers import read_image

EXACT = ("bytes", "lossless")
NEAR = ("jpeg", "resized", "contrast", "crop", "label", "mirror")
NUMBERS = {"bytes": 20, "lossless": 20, "jpeg": 20, "resized": 20, "contrast": 5, "crop": 5, "label": 5, "mirror": 5}


def plant_copies(table: pd.DataFrame, folder: Path, seed: int = 0) -> tuple[Path, list[tuple[str, str, str]]]:
    """Copy the images of `table` to `folder`, with 100 altered copies under new patients.

    Returns:
        The manifest, and the original, the copy and the kind of each copy.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for name, row in enumerate(table.to_dict("records")):
        path = f"images/{name:04d}{Path(row['path']).suffix}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(row["file"], folder / path)
        rows.append({"path": path, "label": row["label"], "patient_id": row["patient_id"]})
    chosen = iter(rng.choice(len(table), sum(NUMBERS.values()), replace=False).tolist())
    planted = []
    for kind, number in NUMBERS.items():
        for k in range(number):
            original = rows[next(chosen)]
            copy = f"images/{kind}_of_{Path(original['path']).stem}.{'jpg' if kind == 'jpeg' else 'png'}"
            if kind == "bytes":
                copy = copy.removesuffix(".png") + Path(original["path"]).suffix
                shutil.copyfile(folder / original["path"], folder / copy)
            else:
                changed = Image.fromarray(_changed(read_image(folder / original["path"]), kind, rng))
                changed.save(folder / copy, **({"quality": 50} if kind == "jpeg" else {}))
            rows.append({"path": copy, "label": original["label"], "patient_id": f"{kind}{k}"})
            planted.append((original["path"], copy, kind))
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv", planted


def one_per_patient(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return the first image of each of `most` random patients."""
    return table.drop_duplicates("patient_id").sample(most, random_state=0)


def _changed(grey: NDArray[np.uint8], kind: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    height, width = grey.shape
    if kind == "resized":
        factor = rng.choice([0.6, 0.8, 1.4])
        return np.asarray(cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    if kind == "contrast":
        changed = 255 * (grey / 255) ** rng.uniform(0.6, 1.6) * rng.uniform(0.8, 1.2) + rng.uniform(-20, 20)
        return changed.clip(0, 255).astype(np.uint8)
    if kind == "crop":
        share = rng.uniform(0.86, 0.95)
        rows, columns = int(share * height), int(share * width)
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        return np.ascontiguousarray(grey[top : top + rows, left : left + columns])
    if kind == "label":
        marked, scale = grey.copy(), min(height, width) / 256
        at = (int(0.05 * width), int(0.12 * height))
        cv2.putText(marked, "PORTABLE AP", at, cv2.FONT_HERSHEY_SIMPLEX, 0.6 * scale, 255, max(1, round(2 * scale)))
        cv2.rectangle(marked, (int(0.8 * width), int(0.85 * height)), (int(0.95 * width), int(0.95 * height)), 255, -1)
        return marked
    return np.ascontiguousarray(grey[:, ::-1]) if kind == "mirror" else grey
