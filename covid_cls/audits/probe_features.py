"""What each shortcut probe may see of an image: its file's header, its acquisition, its rim, its grey values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from covid_cls.audits.thumbnails import thumbnails

SIDE = 64  # of the thumbnails that frame and histogram are taken from, in pixels
FRAME = 6  # pixels of SIDE on each edge: a tenth of an image's side shows skin, shoulders and labels, hardly lung
BINS = 32
COARSE = 16

_HEADER = ("width", "height", "mode", "format")
# Columns, by their names in lower case, that say how an image was made: never who, where, what was found, or the file.
_ACQUISITION = (
    *("view", "view_position", "viewposition", "projection", "position", "age", "patient_age", "sex", "gender"),
    *("patient_sex", "modality", "manufacturer", "model", "detector", "kvp", "exposure", "body_part", "photometric"),
    *("bits_stored", "pixel_spacing", "pixel_spacing_x", "pixel_spacing_y"),
)
_EMPTY = ("", "nan", "na", "n/a", "none", "unknown")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")  # those that the readers know; DICOM is told by its content


class Features(NamedTuple):
    """What a probe sees: one row per image, text or number per column; None where there is nothing of the kind.

    note: which columns these are, or why there are none, in words for a reader.
    """

    columns: pd.DataFrame | None
    note: str


class Probe(NamedTuple):
    """A classifier that sees a part of an image. sees: in plain words. sees_lungs: whether the lungs are in it."""

    name: str
    sees: str
    sees_lungs: bool
    features: Callable[[pd.DataFrame, Path], Features]


def header(table: pd.DataFrame, cache: Path) -> Features:
    """Width, height, mode and format of each file, as published where the manifest knows (`orig_` columns)."""
    originals = [f"orig_{name}" for name in _HEADER]
    if set(originals) <= set(table.columns):
        found = table[originals].set_axis(list(_HEADER), axis=1)
        return Features(_typed(found), f"columns {', '.join(originals)} of the manifest: the files as published")
    return Features(_typed(read_headers(table["file"])), "width, height, mode and format of the files at hand")


def read_headers(files: "pd.Series[str]") -> pd.DataFrame:
    """Columns width, height (pixels), mode and format of image files, from their headers; no pixel is decoded.

    mode: Pillow's, or the photometric interpretation of a DICOM file. A file that has no readable header: 0, 0, "", "".
    """
    return pd.DataFrame([_read_header(Path(file)) for file in files], columns=_HEADER, index=files.index)


def metadata(table: pd.DataFrame, cache: Path) -> Features:
    """The acquisition columns of the manifest that hold more than one value."""
    named = [name for name in table.columns if name.lower() in _ACQUISITION]
    used = [name for name in named if table[name].nunique() > 1]
    if not used:
        why = f"{', '.join(named)}: the same in every image" if named else "no column for view, age, sex or the like"
        return Features(None, f"left out: the manifest has {why}")
    gaps = {name: int(_empty(table[name]).sum()) for name in used}  # a gap in one source alone gives it away
    seen = [f"{name} (empty in {n} of {len(table)} images)" if n else name for name, n in gaps.items()]
    return Features(_typed(table[used]), f"columns {', '.join(seen)} of the manifest")


def frame(table: pd.DataFrame, cache: Path) -> Features:
    """The outermost pixels of each thumbnail."""
    rim = np.ones((SIDE, SIDE), dtype=bool)
    rim[FRAME:-FRAME, FRAME:-FRAME] = False
    pixels = thumbnails(table, SIDE, cache)[:, rim]
    return Features(pd.DataFrame(pixels, index=table.index), f"{FRAME}-pixel frame of {SIDE} × {SIDE}")


def histogram(table: pd.DataFrame, cache: Path) -> Features:
    """How many pixels of each thumbnail have which grey value."""
    bins = thumbnails(table, SIDE, cache).reshape(len(table), -1) // (256 // BINS)
    counts = np.stack([np.bincount(row, minlength=BINS) for row in bins])
    return Features(pd.DataFrame(counts, index=table.index), f"{BINS} bins of the grey values of {SIDE} × {SIDE}")


def thumbnail(table: pd.DataFrame, cache: Path) -> Features:
    """The whole image on a few pixels."""
    pixels = thumbnails(table, COARSE, cache).reshape(len(table), -1)
    return Features(pd.DataFrame(pixels, index=table.index), f"all pixels of {COARSE} × {COARSE}")


def nothing(table: pd.DataFrame, cache: Path) -> Features:
    """No column at all."""
    return Features(pd.DataFrame(index=table.index), "class frequencies of the training images")


PROBES = {
    probe.name: probe
    for probe in (
        Probe("majority", "nothing: it answers with the class frequencies", False, nothing),
        Probe("header", "the file's width, height, colour mode and format; no pixel", False, header),
        Probe(
            "metadata", "the manifest's columns on acquisition: view, age, sex and the like; no pixel", False, metadata
        ),
        Probe("frame", f"the outer {FRAME} of {SIDE} pixels on each side of the shrunk image", False, frame),
        Probe("histogram", f"how often each of {BINS} grey values occurs, not where", True, histogram),
        Probe("thumbnail", f"the whole image shrunk to {COARSE} × {COARSE} pixels", True, thumbnail),
    )
}


def _read_header(file: Path) -> tuple[int, int, str, str]:
    try:
        with Image.open(file, formats=_FORMATS) as image:
            return *image.size, image.mode, str(image.format)
    except Exception:  # damaged files draw a dozen types of exception from Pillow
        return _dicom_header(file)


def _dicom_header(file: Path) -> tuple[int, int, str, str]:
    import pydicom  # late: not needed for a set of PNG files

    names = ["Columns", "Rows", "PhotometricInterpretation"]
    named = file.suffix.lower() in (".dcm", ".dicom")  # such a file may lack the preamble, as for the readers
    try:
        head: Any = pydicom.dcmread(file, force=named, stop_before_pixels=True, specific_tags=names)
        return int(head.Columns), int(head.Rows), str(head.PhotometricInterpretation), "DICOM"
    except Exception:  # as many from pydicom, and whatever is no image ends here
        return 0, 0, "", ""


def _typed(columns: pd.DataFrame) -> pd.DataFrame:
    """Numbers, nan where empty, for columns whose values are all numbers or empty; text for the others."""
    typed = {}
    for name in columns.columns:
        text, given = columns[name].astype(str).str.strip(), ~_empty(columns[name])
        numbers = pd.to_numeric(text.where(given), errors="coerce")
        typed[name] = numbers if np.isfinite(numbers).equals(given) else text
    return pd.DataFrame(typed, index=columns.index)


def _empty(column: "pd.Series[str]") -> "pd.Series[bool]":
    return column.astype(str).str.strip().str.lower().isin(_EMPTY)
