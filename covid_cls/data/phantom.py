"""Phantoms: drawn frontal chest radiographs, the data set for a machine that has none.

Only the opacities know the class. Anatomy, pose, exposure, view and distractors come from the same distributions in
every class, and each class has the same mix of sources and of patient sizes. So a clean phantom has no shortcut: what
a model scores above chance it has read from the lungs.
"""

import csv
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from covid_cls.data import radiograph
from covid_cls.data.radiograph import (
    DISEASES,
    NARROWEST,
    SITES,
    WIDEST,
    Chest,
    between,
    draw_radiograph,
    draw_shadows,
    draw_vessels,
    with_marker,
)
from covid_cls.errors import InputError
from covid_cls.labels import CLASSES, POSITIVE
from covid_cls.machine import cores
from covid_cls.records import files_digest, whole_file

Row = tuple[str, str, str, str, str, str]  # in the order of COLUMNS

COLUMNS = ("path", "label", "patient_id", "source", "view", "mask")
SHORTCUTS = ("none", "marker")
_STREAMS = ("plan", "anatomy", "disease", "image", "marker")


def build_phantoms(
    folder: Path, *, images: int = 600, seed: int = 0, shortcut: str = "none", shortcut_strength: float = 1.0
) -> Path:
    """The manifest.csv of a set of drawn radiographs in `folder`, made if it is not there yet.

    The manifest is written last: where there is one the set is complete, and it is returned whatever it was made with.
    Each class gets a third of `images`, the first classes the remainder. Same arguments, same bytes. mask: a 1-bit
    picture of the size of its image, white where the lungs are; see `draw_radiograph`.

    shortcut="marker" burns an L into the upper right corner: of covid images with probability
    (1 + shortcut_strength) / 2, of others with (1 - shortcut_strength) / 2. At 0 it says nothing, at 1 it gives covid
    away. Outside the marker the pictures are those of shortcut="none".
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
    with ThreadPoolExecutor(cores()) as pool:  # a process each would first import the caller, torch and all
        list(pool.map(lambda k: _draw_patient(manifest.parent, seed, k, patients[k], strength), range(len(patients))))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([COLUMNS, *(row for rows in patients for row in rows)])
    with whole_file(manifest) as file:
        file.write(table.getvalue().encode())
    return manifest


def drawing_version() -> str:
    """Stands for the code that draws: when it changes, so do the pictures."""
    return files_digest(map(Path, (__file__, radiograph.__file__)))


def _check(images: int, seed: int, shortcut: str, strength: float) -> None:
    fewest = 2 * len(CLASSES)
    if images < fewest:
        raise InputError(f"images={images}: phantoms need two or more of each class; ask for {fewest} or more")
    if seed < 0:
        raise InputError(f"seed={seed}: choose a seed of 0 or more")
    if shortcut not in SHORTCUTS:
        raise InputError(f"shortcut={shortcut!r}: no such shortcut; choose one of {', '.join(SHORTCUTS)}")
    if not 0 <= strength <= 1:
        raise InputError(f"shortcut_strength={strength}: choose from 0 (says nothing) to 1 (gives covid away)")


def _rng(stream: str, seed: int, patient: int = 0, image: int = 0) -> Generator:
    """A generator for this stream, patient and image alone, so that no drawing shifts another."""
    return np.random.default_rng([seed, patient, image, 1 + _STREAMS.index(stream)])


def _plan(images: int, seed: int) -> list[list[Row]]:
    """The manifest's rows of each patient, by a number that says nothing of the class.

    All classes have the same list of patient sizes and sources, but for the remainder of images / 3.
    """
    rng = _rng("plan", seed)
    largest = min(6, max(1, images // 12))  # a small set still needs enough patients to be split by patient
    ends = np.cumsum(rng.choice(6, size=images, p=(0.2, 0.2, 0.2, 0.2, 0.1, 0.1)).clip(max=largest - 1) + 1)
    drawn: list[tuple[str, str, int]] = []
    for k, label in enumerate(CLASSES):
        sizes = np.diff(np.minimum(ends, len(range(k, images, len(CLASSES)))), prepend=0)
        drawn += [(label, list(SITES)[i % len(SITES)], int(size)) for i, size in enumerate(sizes[sizes > 0])]
    patients = []
    for number, k in enumerate(rng.permutation(len(drawn))):
        (label, site, size), name = drawn[k], f"p{number:04d}"
        views = ["AP" if u < 0.3 else "PA" for u in rng.random(size)]
        pairs = zip([f"{label}/{name}_{i}.png" for i in range(size)], views, strict=True)
        patients.append([(f"images/{file}", label, name, site, view, f"masks/{file}") for file, view in pairs])
    return patients


def _draw_patient(folder: Path, seed: int, number: int, rows: list[Row], marker_strength: float | None) -> None:
    rng = _rng("anatomy", seed, number)
    chest = Chest(*(between(rng, *limits) for limits in zip(NARROWEST, WIDEST, strict=True)))
    vessels = draw_vessels(rng)
    rng, label = _rng("disease", seed, number), rows[0][1]
    severity = between(rng, 0.35, 1.0)  # the least is hard to see: no model should get every patient right
    disease = draw_shadows(DISEASES[label], rng, severity) if label in DISEASES else []
    for k, (path, _, _, site, view, mask) in enumerate(rows):
        pixels, lungs = draw_radiograph(chest, vessels, disease, SITES[site], view, _rng("image", seed, number, k))
        if marker_strength is not None:
            rng = _rng("marker", seed, number, k)
            if rng.random() < (1 + (marker_strength if label == POSITIVE else -marker_strength)) / 2:
                pixels = with_marker(pixels, rng)
        for name, picture in ((path, Image.fromarray(pixels)), (mask, Image.fromarray(lungs))):
            with whole_file(folder / name) as file:
                picture.save(file, "PNG", compress_level=1)
