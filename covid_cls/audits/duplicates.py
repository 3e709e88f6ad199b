"""Pairs of images that are one image: the same bytes, the same pixels, or a changed copy.

64-bit perceptual hashes do not separate chest radiographs, which all look alike. Here each image is compared with all
others by a small thumbnail of grey ranks from which what all images share has been taken out, mirrored and in parts as
well; the few nearest are then compared in detail (see `alignment`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata

from covid_cls.audits import alignment
from covid_cls.audits.alignment import SIDE, WHOLE, Picture, Window, same_picture
from covid_cls.data.store import read_rows
from covid_cls.machine import cores
from covid_cls.records import digest, files_digest, whole_file

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

KINDS = ("bytes", "pixels", "near", "mirrored")
COLUMNS = ("first", "second", "kind", "likeness")
_THUMBNAIL = 16
_COMPONENTS = 64
_SHRINKAGE = 0.3  # of the mean variance, added to each; 0 to 3 found between 50 and 60 of 60 copies among the first 4
_CHUNK = 512
_NEAREST_WHOLE, _NEAREST_PART = 2, 4  # candidates per image
_LEAST_WHOLE, _LEAST_PART = 0.5, 0.65  # correlation of a candidate; copies with labels had 0.5, cropped ones 0.73


class _Candidate(NamedTuple):
    """Positions of two images; `part` is expected in `window` of `whole`, mirrored or not (see `same_picture`)."""

    whole: int
    part: int
    mirrored: bool
    window: Window | None
    likeness: float


def find_pairs(images: NDArray[np.uint8], hashes: "pd.Series[str]", cache: Path, key: str) -> pd.DataFrame:
    """Pairs of images that are one image: columns first < second (of the index of `hashes`), kind, likeness.

    images: uint8 (M, S, S), canvases of a store. hashes: sha256 of the files, indexed by row of the store; other rows
    are not looked at. kind: "bytes"; "pixels" (equal in the store); "near" (resized, recompressed, cropped to four
    fifths of the side or more, other contrast, labels burnt in); "mirrored" (left and right exchanged, and perhaps any
    of these). likeness: agreement of details, 0.8 to 1. Of a group of equal images each is paired with the first.
    Pictures below `SIDE` pixels are too small for near and mirrored ones (see `searches_near`).

    Kept in `cache`/audits under `key`, which stands for the content of the store.
    """
    rows = hashes.index.to_numpy(dtype=np.int64)
    code = files_digest([Path(__file__), Path(alignment.__file__)])
    kept = cache / "audits" / f"{digest(code + key + ' '.join(map(str, rows)))}.csv"
    if not kept.is_file():
        side = filled_side(images, rows)
        found = _exact_pairs(images, rows, hashes)
        left = np.setdiff1d(rows, found["second"])
        if side >= SIDE:
            found = pd.concat([found, _near_pairs(images, left, side)], ignore_index=True)
        with whole_file(kept) as file:
            found.sort_values(["first", "second"], kind="stable").to_csv(file, index=False)
    return pd.read_csv(kept)


def searches_near(images: NDArray[np.uint8], rows: Indices) -> bool:
    """Whether the images are stored large enough for changed copies to be found."""
    return filled_side(images, rows) >= SIDE


def groups(pairs: pd.DataFrame, rows: Indices) -> list[Indices]:
    """Sorted rows of each set of two or more images that `pairs` connect, the largest set first."""
    place = {row: k for k, row in enumerate(rows.tolist())}
    ends = [[place[row] for row in pairs[name]] for name in ("first", "second")]
    links = coo_array((np.ones(len(pairs)), ends), shape=(len(rows), len(rows)))
    names = connected_components(links, directed=False)[1]
    sets = [rows[np.flatnonzero(names == name)] for name in np.flatnonzero(np.bincount(names) > 1)]
    return sorted(sets, key=len, reverse=True)


def filled_side(images: NDArray[np.uint8], rows: Indices) -> int:
    """Side of the central square that images fill: a store centres them on a canvas that may be larger.

    Judged by at most 256 of them. A smaller square than possible does no harm, for it is the same in all.
    """
    some = read_rows(images, rows[:: max(1, len(rows) // 256)])
    lit = [min(int(image.any(axis=0).sum()), int(image.any(axis=1).sum())) for image in some]
    return max(lit, default=0)


def _exact_pairs(images: NDArray[np.uint8], rows: Indices, hashes: "pd.Series[str]") -> pd.DataFrame:
    pixels = [hashlib.sha256(image.data).hexdigest() for chunk in _chunks(rows) for image in read_rows(images, chunk)]
    found: list[tuple[Any, ...]] = []
    files: dict[str, int] = {}
    pictures: dict[str, int] = {}
    for row, file, picture in zip(rows.tolist(), hashes, pixels, strict=True):
        if file in files:
            found.append((files[file], row, "bytes", 1.0))
        elif picture in pictures:
            found.append((pictures[picture], row, "pixels", 1.0))
        files.setdefault(file, row)
        pictures.setdefault(picture, row)
    return pd.DataFrame(found, columns=COLUMNS)


def _near_pairs(images: NDArray[np.uint8], rows: Indices, side: int) -> pd.DataFrame:
    candidates = sorted(_candidates(images, rows, side), key=lambda pair: (pair.whole, pair.part))
    with ThreadPoolExecutor(cores()) as pool:  # OpenCV works without the interpreter lock
        compare = partial(_compare, images, rows, side)
        likeness = [value for values in pool.map(compare, _chunks(candidates)) for value in values]
    best: dict[tuple[int, int], tuple[float, str]] = {}
    for pair, value in zip(candidates, likeness, strict=True):
        first, second = sorted((int(rows[pair.whole]), int(rows[pair.part])))
        if value is not None:
            best[first, second] = max(best.get((first, second), (0.0, "")), (value, KINDS[2 + pair.mirrored]))
    return pd.DataFrame([(*ends, kind, round(v, 4)) for ends, (v, kind) in best.items()], columns=COLUMNS)


def _compare(
    images: NDArray[np.uint8], rows: Indices, side: int, candidates: Sequence[_Candidate]
) -> list[float | None]:
    @lru_cache(maxsize=128)
    def picture(position: int, mirrored: bool) -> Picture:
        (image,) = squares(read_rows(images, rows[[position]]), side)
        return Picture(np.ascontiguousarray(image[:, ::-1] if mirrored else image))

    return [
        same_picture(picture(pair.whole, False), picture(pair.part, pair.mirrored), pair.window) for pair in candidates
    ]


def _candidates(images: NDArray[np.uint8], rows: Indices, side: int) -> list[_Candidate]:
    """For each image the few that are nearest as wholes, and those of which it shows a part; no pair twice."""
    small = np.concatenate([_shrink(squares(read_rows(images, chunk), side)) for chunk in _chunks(rows)])
    ranks = _ranks(small, WHOLE)
    centre, axes = _axes(ranks)
    wholes = _project(ranks, centre, axes)
    targets = np.concatenate([wholes, _project(_mirror(ranks), centre, axes)])
    best: dict[tuple[int, int, bool, bool], _Candidate] = {}
    for start in range(0, len(rows), _CHUNK):
        block = slice(start, min(start + _CHUNK, len(rows)))
        parts = [_project(_ranks(small[block], window), centre, axes) for window in _windows()]
        for whole, other, is_whole in _nearest(wholes[block], parts, targets, start):
            part, mirrored = other % len(rows), other >= len(rows)
            views = [wholes[whole]] if is_whole else [view[whole - start] for view in parts]
            likeness = [float(view @ targets[other]) for view in views]
            k = int(np.argmax(likeness))
            pair = _Candidate(whole, part, mirrored, None if is_whole else _windows()[k], likeness[k])
            least = _LEAST_WHOLE if is_whole else _LEAST_PART
            # A picture that lies whole in another need not be compared in both directions, a part must.
            name = (min(whole, part), max(whole, part), mirrored, is_whole)
            if pair.likeness >= least and (name not in best or best[name].likeness < pair.likeness):
                best[name] = pair
    return list(best.values())


def _nearest(wholes: Floats, parts: list[Floats], targets: Floats, start: int) -> Iterator[tuple[int, int, bool]]:
    """(image, target, whether compared as a whole) of the nearest targets of each image of a block."""
    own = np.arange(len(wholes))
    n = len(targets) // 2
    scores = wholes @ targets.T
    for is_whole, most in ((True, _NEAREST_WHOLE), (False, _NEAREST_PART)):
        if not is_whole:
            for part in parts:
                np.maximum(scores, part @ targets.T, out=scores)
        scores[own, own + start] = scores[own, own + start + n] = -2  # itself and its mirror image
        most = min(most, scores.shape[1])
        near = np.argpartition(-scores, most - 1, axis=1)[:, :most]
        yield from (
            (start + k, int(other), is_whole) for k in own.tolist() for other in near[k] if other % n != start + k
        )


def _windows() -> list[Window]:
    """Parts of a picture that a copy may be: nine of each of three sizes, and bands, for a copy of another aspect."""
    parts = [WHOLE]
    for size in (0.93, 0.87, 0.8):
        shifts = (0.0, (1 - size) / 2, 1 - size)
        parts += [(top, left, size, size) for top in shifts for left in shifts]
    for size in (0.9, 0.8, 0.7):
        parts += [((1 - size) / 2, 0.0, size, 1.0), (0.0, (1 - size) / 2, 1.0, size)]
    return parts


def _ranks(small: NDArray[np.uint8], window: Window) -> Floats:
    """Ranks of the grey values of a part of each picture, (n, 256), centred: no window or gamma changes them."""
    top, left, height, width = (round(share * small.shape[1]) for share in window)
    parts = small[:, top : top + height, left : left + width]
    flat = [cv2.resize(part, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA).ravel() for part in parts]
    return _unit(rankdata(np.stack(flat), axis=1).astype(np.float32))


def _axes(ranks: Floats) -> tuple[Floats, Floats]:
    """The mean of all thumbnails and their mirror images, (256,), and scaled principal axes, (256, _COMPONENTS)."""
    centre = (ranks + _mirror(ranks)).mean(axis=0) / 2
    spread = _unit(ranks - centre)
    variances, vectors = np.linalg.eigh(spread.T @ spread / len(ranks))
    variances, vectors = variances[::-1][:_COMPONENTS], vectors[:, ::-1][:, :_COMPONENTS]
    return centre, vectors / np.sqrt(variances.clip(0) + _SHRINKAGE * variances.mean())


def _project(ranks: Floats, centre: Floats, axes: Floats) -> Floats:
    return _scaled_rows(_unit(ranks - centre) @ axes)


def _mirror(ranks: Floats) -> Floats:
    return ranks.reshape(-1, _THUMBNAIL, _THUMBNAIL)[:, :, ::-1].reshape(ranks.shape)


def _unit(rows: Floats) -> Floats:
    return _scaled_rows(rows - rows.mean(axis=1, keepdims=True))


def _scaled_rows(rows: Floats) -> Floats:
    scaled: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-6))
    return scaled


def squares(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The central squares, (n, side, side), of stored canvases (n, S, S)."""
    edge = (images.shape[1] - side) // 2
    return images[:, edge : edge + side, edge : edge + side]


def _shrink(squares: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([cv2.resize(square, (64, 64), interpolation=cv2.INTER_AREA) for square in squares])


def _chunks(items: Any) -> Iterator[Any]:
    return (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))
