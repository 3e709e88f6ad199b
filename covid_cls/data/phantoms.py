"""Phantoms: drawn frontal chest radiographs, the data set of a machine that has no other.

Only the opacities depend on the class. Anatomy, pose, exposure, view and distractors come from the same distributions
in every class, and each class has the same mix of sources and of images per patient. So phantoms without an added
shortcut have none: a score above chance comes from the lungs.
"""

import csv
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from covid_cls.data import drawing
from covid_cls.errors import InputError
from covid_cls.io import atomic_file
from covid_cls.system import cores
from covid_cls.tasks import CLASSES, POSITIVE

COLUMNS = ("path", "label", "patient_id", "source", "view", "mask")
# Increase it when the same arguments give other images, because of this module or drawing.py.
PHANTOMS_VERSION = 1
SHORTCUTS = ("none", "marker")
_STREAMS = ("plan", "anatomy", "disease", "image", "marker")

_Row = tuple[str, str, str, str, str, str]  # in the order of COLUMNS


def build_phantoms(
    folder: Path, images: int = 600, seed: int = 0, shortcut: str = "none", shortcut_strength: float = 1.0
) -> Path:
    """Return the manifest.csv of a set of phantoms in `folder`; draw them if there is no manifest yet.

    The column mask of the manifest names a 1-bit image that is white where the lungs are, see `draw_radiograph`. The
    same arguments give the same bytes.

    Args:
        folder: An existing manifest in it is returned, whatever its arguments were.
        images: Number of images. Each class gets a third, the first classes the remainder.
        seed: Random seed, 0 or more.
        shortcut: "marker" adds an L in the upper right corner, to covid images with probability
            (1 + shortcut_strength) / 2 and to others with (1 - shortcut_strength) / 2. "none" draws the same images
            without it.
        shortcut_strength: From 0, where the marker is independent of the class, to 1, where only covid images have it.

    Raises:
        InputError: An argument is out of range.
    """
    _check(images, seed, shortcut, shortcut_strength)
    manifest = Path(folder) / "manifest.csv"
    if manifest.exists():
        return manifest
    for label in CLASSES:
        for kind in ("images", "masks"):
            (manifest.parent / kind / label).mkdir(parents=True, exist_ok=True)
    patients = _plan(images, seed)
    strength = shortcut_strength if shortcut == "marker" else None
    # Threads, because each process would first import the modules of its parent, torch included.
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(lambda k: _draw_patient(manifest.parent, seed, k, patients[k], strength), range(len(patients))))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([COLUMNS, *(row for rows in patients for row in rows)])
    # Written last, so that a set with a manifest is complete.
    with atomic_file(manifest) as file:
        file.write(table.getvalue().encode())
    return manifest


def _check(images: int, seed: int, shortcut: str, strength: float) -> None:
    fewest = 2 * len(CLASSES)
    if images < fewest:
        raise InputError(f"images={images}: phantoms need at least two images per class; ask for {fewest} or more")
    if seed < 0:
        raise InputError(f"seed={seed}: choose a seed of 0 or more")
    if shortcut not in SHORTCUTS:
        raise InputError(f"shortcut={shortcut!r}: no such shortcut; choose one of {', '.join(SHORTCUTS)}")
    if not 0 <= strength <= 1:
        raise InputError(f"shortcut_strength={strength}: choose from 0 (no shortcut) to 1 (it determines the class)")


def _rng(stream: str, seed: int, patient: int = 0, image: int = 0) -> Generator:
    """Return a generator that depends on these arguments only, so that no drawing affects another."""
    return np.random.default_rng([seed, patient, image, 1 + _STREAMS.index(stream)])


def _plan(images: int, seed: int) -> list[list[_Row]]:
    """Return the manifest's rows of each patient. The number of a patient is independent of the class.

    All classes have the same list of sources and of images per patient, except for the remainder of images / 3.
    """
    rng = _rng("plan", seed)
    # A small set still needs enough patients to be split by patient.
    largest = min(6, max(1, images // 12))
    ends = np.cumsum(rng.choice(6, size=images, p=(0.2, 0.2, 0.2, 0.2, 0.1, 0.1)).clip(max=largest - 1) + 1)
    drawn: list[tuple[str, str, int]] = []
    for k, label in enumerate(CLASSES):
        sizes = np.diff(np.minimum(ends, len(range(k, images, len(CLASSES)))), prepend=0)
        sites = list(drawing.SITES)
        drawn += [(label, sites[i % len(sites)], int(size)) for i, size in enumerate(sizes[sizes > 0])]
    patients = []
    for number, k in enumerate(rng.permutation(len(drawn))):
        (label, site, size), name = drawn[k], f"p{number:04d}"
        views = ["AP" if u < 0.3 else "PA" for u in rng.random(size)]
        files = [f"{label}/{name}_{i}.png" for i in range(size)]
        pairs = zip(files, views, strict=True)
        patients.append([(f"images/{file}", label, name, site, view, f"masks/{file}") for file, view in pairs])
    return patients


def _draw_patient(folder: Path, seed: int, number: int, rows: list[_Row], marker_strength: float | None) -> None:
    rng = _rng("anatomy", seed, number)
    limits = zip(drawing.MIN_CHEST, drawing.MAX_CHEST, strict=True)
    chest = drawing.Chest(*(drawing.between(rng, low, high) for low, high in limits))
    vessels = drawing.draw_vessels(rng)
    rng, label = _rng("disease", seed, number), rows[0][1]
    # The lowest severity is hard to see, so that no model is right for every patient.
    severity = drawing.between(rng, 0.35, 1.0)
    disease = drawing.draw_opacities(drawing.DISEASES[label], rng, severity) if label in drawing.DISEASES else []
    for k, (path, _, _, site, view, mask) in enumerate(rows):
        rng = _rng("image", seed, number, k)
        pixels, lungs = drawing.draw_radiograph(chest, vessels, disease, drawing.SITES[site], view, rng)
        if marker_strength is not None:
            rng = _rng("marker", seed, number, k)
            if rng.random() < (1 + (marker_strength if label == POSITIVE else -marker_strength)) / 2:
                pixels = drawing.with_marker(pixels, rng)
        for name, picture in ((path, Image.fromarray(pixels)), (mask, Image.fromarray(lungs))):
            with atomic_file(folder / name) as file:
                picture.save(file, "PNG", compress_level=1)
