"""Search for identical and nearly identical images.

Thumbnails first give a few candidate pairs per image. Each candidate pair is then aligned and its details are compared.
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

from covid_cls.data.store import read_rows
from covid_cls.io import atomic_file, digest
from covid_cls.system import cores

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Window = tuple[float, float, float, float]  # top, left, height, width of a part, as fractions of the image

# Raise it when other pairs are found among the same images.
DUPLICATES_VERSION = 1
KINDS = ("bytes", "pixels", "near", "mirrored")
COLUMNS = ("first", "second", "kind", "likeness")
SIDE = 192  # pixels; smaller images have too little detail to tell copies from other patients
_FULL_IMAGE: Window = (0.0, 0.0, 1.0, 1.0)

# Agreement of details, -1 to 1, that makes two images a pair, without and with alignment. Measured on two public data
# sets and on phantoms, which are alike by construction: the most similar images of different patients reached 0.88
# after alignment. Copies in JPEG quality 50, resized or with another contrast had 0.84 to 1 without alignment. Copies
# cropped to nine tenths (four fifths) of the side had at least 0.91 (0.88) after alignment.
_MIN_UNALIGNED, _MIN_ALIGNED = 0.80, 0.89
# Copies had an agreement of at least 0.62 at the coarse level and 0.87 at the middle level.
_MIN_COARSE, _MIN_MIDDLE = 0.60, 0.80
# Copies had a shear of at most 0.004. Half of the pairs of different patients need more than 0.03.
_MAX_SHEAR = 0.03
# Detail images: side in pixels, blur and neighbourhood (standard deviations in pixels). "outline" still agrees when
# one image is a tenth larger than the other.
_LEVELS = {"outline": (64, 1.5, 8.0), "coarse": (64, 0.5, 3.0), "middle": (96, 0.8, 4.0), "fine": (SIDE, 0.7, 2.5)}
# The median over blocks tolerates labels and markers on up to half of the image.
_BLOCKS_PER_SIDE, _MIN_BLOCKS = 8, 24

_CHUNK = 512  # images
_THUMBNAIL = 16  # pixels
_COMPONENTS = 64
_SHRINKAGE = 0.3  # share of the mean variance; with 0 to 3, 50 to 60 of 60 copies were among the 4 nearest images
_NEAREST_FULL, _NEAREST_PART = 2, 4  # candidates per image
# Correlation of thumbnails; copies with labels had 0.5, cropped copies 0.73.
_MIN_FULL, _MIN_PART = 0.5, 0.65


class _Stage(NamedTuple):
    """One step of the alignment, from coarse to fine.

    Attributes:
        aligned: Level of detail that is aligned.
        compared: Level of detail that is compared afterwards.
        steps: Maximum number of optimisation steps.
        max_shear: Largest shear or rotation of a copy.
        min_agreement: Smallest agreement of a copy.
    """

    aligned: str
    compared: str
    steps: int
    max_shear: float
    min_agreement: float


_STAGES = (
    _Stage("outline", "coarse", 15, 2 * _MAX_SHEAR, _MIN_COARSE),
    _Stage("middle", "middle", 15, _MAX_SHEAR, _MIN_MIDDLE),
    _Stage("fine", "fine", 25, _MAX_SHEAR, _MIN_ALIGNED),
)


class _Candidate(NamedTuple):
    """Two images that may be copies.

    Attributes:
        image: Position of the image that contains the other one.
        part: Position of the other image.
        mirrored: Whether `part` has to be mirrored first.
        window: Where in `image` all of `part` is expected, to about a tenth of the side; None to compare both images
            without alignment, which finds copies whose labels are too large for an alignment.
        likeness: Correlation of the thumbnails.
    """

    image: int
    part: int
    mirrored: bool
    window: Window | None
    likeness: float


class _Details:
    """The detail images of a grey image, uint8 (S, S) with S >= `SIDE`, each computed on first use."""

    def __init__(self, grey: NDArray[np.uint8]) -> None:
        self._grey, self._levels = grey, dict[str, Floats]()

    def __getitem__(self, level: str) -> Floats:
        if level not in self._levels:
            self._levels[level] = _local_contrast(self._grey, *_LEVELS[level])
        return self._levels[level]


def find_pairs(images: NDArray[np.uint8], hashes: "pd.Series[str]", cache: Path, key: str) -> pd.DataFrame:
    """Return the pairs of images that are copies of each other.

    Args:
        images: Canvases of an image store, uint8 (M, S, S).
        hashes: sha256 of the files, indexed by the rows of `images` that are searched.
        cache: Folder of the cache; the result is stored in its subfolder audits.
        key: Digest of the content of `images`.

    Returns:
        Columns first < second (rows of `images`), kind and likeness (agreement of details, 0.8 to 1). Kinds: "bytes"
        (equal files), "pixels" (equal in the store), "near" (resized, recompressed, cropped to at least four fifths of
        the side, other contrast, labels added) and "mirrored" (left and right exchanged, possibly with such changes).
        In a group of equal images each one is paired with the first. Near and mirrored copies are only found in images
        with a side of at least `SIDE` pixels.
    """
    rows = hashes.index.to_numpy(dtype=np.int64)
    stored = cache / "audits" / f"{digest(f'{DUPLICATES_VERSION} {key} ' + ' '.join(map(str, rows)))}.csv"
    if not stored.is_file():
        side = content_side(images, rows)
        found = _exact_pairs(images, rows, hashes)
        if side >= SIDE:
            # Exact copies have the same near copies as the first of them.
            distinct = np.setdiff1d(rows, found["second"])
            found = pd.concat([found, _near_pairs(images, distinct, side)], ignore_index=True)
        with atomic_file(stored) as file:
            found.sort_values(["first", "second"], kind="stable").to_csv(file, index=False)
    return pd.read_csv(stored)


def duplicate_groups(pairs: pd.DataFrame, rows: Indices) -> list[Indices]:
    """Return the sorted rows of each set of images that `pairs` connect, the largest set first."""
    ends = [pd.Index(rows).get_indexer(pd.Index(pairs[name])) for name in ("first", "second")]
    links = coo_array((np.ones(len(pairs)), ends), shape=(len(rows), len(rows)))
    group = connected_components(links, directed=False)[1]
    sets = [rows[np.flatnonzero(group == number)] for number in np.flatnonzero(np.bincount(group) > 1)]
    return sorted(sets, key=len, reverse=True)


def content_side(images: NDArray[np.uint8], rows: Indices) -> int:
    """Return the side in pixels of the central square that images fill on the store's canvas, which may be larger."""
    # 256 images are enough: a square that is too small does no harm, because it is the same in all images.
    some = read_rows(images, rows[:: max(1, len(rows) // 256)])
    return max((min(int(image.any(axis=0).sum()), int(image.any(axis=1).sum())) for image in some), default=0)


def central_squares(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the central squares, (n, side, side), of canvases (n, S, S)."""
    edge = (images.shape[1] - side) // 2
    return images[:, edge : edge + side, edge : edge + side]


def _exact_pairs(images: NDArray[np.uint8], rows: Indices, hashes: "pd.Series[str]") -> pd.DataFrame:
    pixels = [hashlib.sha256(image.data).hexdigest() for chunk in _chunks(rows) for image in read_rows(images, chunk)]
    first_row = pd.Series(rows)
    same_bytes, same_pixels = (first_row.groupby(keys).transform("first") for keys in (hashes.to_numpy(), pixels))
    earlier = same_bytes != rows
    kind = np.where(earlier, "bytes", "pixels")
    pairs = zip(np.where(earlier, same_bytes, same_pixels), rows, kind, strict=True)
    return pd.DataFrame([(*pair, 1.0) for pair in pairs if pair[0] != pair[1]], columns=COLUMNS)


def _near_pairs(images: NDArray[np.uint8], rows: Indices, side: int) -> pd.DataFrame:
    # Sorted, so that consecutive pairs have images in common, whose details `_compare` keeps.
    candidates = sorted(_candidates(images, rows, side), key=lambda pair: (pair.image, pair.part))
    # OpenCV releases the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(cores()) as pool:
        compare = partial(_compare, images, rows, side)
        likeness = [value for values in pool.map(compare, _chunks(candidates)) for value in values]
    best: dict[tuple[int, int], tuple[float, str]] = {}
    for pair, value in zip(candidates, likeness, strict=True):
        first, second = sorted((int(rows[pair.image]), int(rows[pair.part])))
        if value is not None:
            best[first, second] = max(best.get((first, second), (0.0, "")), (value, KINDS[2 + pair.mirrored]))
    return pd.DataFrame([(*ends, kind, round(v, 4)) for ends, (v, kind) in best.items()], columns=COLUMNS)


def _candidates(images: NDArray[np.uint8], rows: Indices, side: int) -> list[_Candidate]:
    """Return the nearest images of each complete image and of its parts; no pair twice."""
    blocks = (central_squares(read_rows(images, chunk), side) for chunk in _chunks(rows))
    small = np.stack([cv2.resize(one, (64, 64), interpolation=cv2.INTER_AREA) for block in blocks for one in block])
    windows = _windows()
    ranks = _ranks(small, _FULL_IMAGE)
    centre, axes = _principal_axes(ranks)
    full = _project(ranks, centre, axes)
    targets = np.concatenate([full, _project(_mirror(ranks), centre, axes)])
    best: dict[tuple[int, int, bool, bool], _Candidate] = {}
    for start in range(0, len(rows), _CHUNK):
        block = slice(start, start + _CHUNK)
        parts = [_project(_ranks(small[block], window), centre, axes) for window in windows]
        for image, target, is_full in _nearest(full[block], parts, targets, start):
            views = [full[image]] if is_full else [part[image - start] for part in parts]
            likeness = [float(view @ targets[target]) for view in views]
            k = int(np.argmax(likeness))
            other, mirrored = target % len(rows), target >= len(rows)
            pair = _Candidate(image, other, mirrored, None if is_full else windows[k], likeness[k])
            # Each pair is aligned in one direction only: the one whose thumbnails are more alike.
            name = (min(image, other), max(image, other), mirrored, is_full)
            likely = pair.likeness >= (_MIN_FULL if is_full else _MIN_PART)
            if likely and (name not in best or best[name].likeness < pair.likeness):
                best[name] = pair
    return list(best.values())


def _nearest(full: Floats, parts: list[Floats], targets: Floats, start: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (image, target, whether the complete image is compared) for the nearest targets of a block of images."""
    block, n = np.arange(len(full)), len(targets) // 2
    scores = full @ targets.T
    for is_full, most in ((True, _NEAREST_FULL), (False, _NEAREST_PART)):
        for part in [] if is_full else parts:
            np.maximum(scores, part @ targets.T, out=scores)
        # An image is no candidate for itself or its mirror image. -2 is less than any correlation.
        scores[block, block + start] = scores[block, block + start + n] = -2
        most = min(most, scores.shape[1])
        near = np.argpartition(-scores, most - 1, axis=1)[:, :most]
        yield from ((start + k, int(j), is_full) for k in block.tolist() for j in near[k] if j % n != start + k)


def _windows() -> list[Window]:
    """Return the parts of an image that a copy may show: crops of three sizes, and bands for another aspect ratio."""
    parts = [_FULL_IMAGE]
    for size in (0.93, 0.87, 0.8):
        shifts = (0.0, (1 - size) / 2, 1 - size)
        parts += [(top, left, size, size) for top in shifts for left in shifts]
    for size in (0.9, 0.8, 0.7):
        parts += [((1 - size) / 2, 0.0, size, 1.0), (0.0, (1 - size) / 2, 1.0, size)]
    return parts


def _ranks(small: NDArray[np.uint8], window: Window) -> Floats:
    """Return the centred ranks of the grey values of a part of each image, (n, 256)."""
    # Ranks do not change with the window or gamma of an image.
    top, left, height, width = (round(share * small.shape[1]) for share in window)
    parts = small[:, top : top + height, left : left + width]
    flat = [cv2.resize(part, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA).ravel() for part in parts]
    return _standardise(rankdata(np.stack(flat), axis=1).astype(np.float32))


def _principal_axes(ranks: Floats) -> tuple[Floats, Floats]:
    """Return the mean of all thumbnails and their mirror images, (256,), and scaled axes, (256, _COMPONENTS)."""
    centre = (ranks + _mirror(ranks)).mean(axis=0) / 2
    spread = _standardise(ranks - centre)
    variances, vectors = np.linalg.eigh(spread.T @ spread / len(ranks))
    variances, vectors = variances[::-1][:_COMPONENTS], vectors[:, ::-1][:, :_COMPONENTS]
    return centre, vectors / np.sqrt(variances.clip(0) + _SHRINKAGE * variances.mean())


def _project(ranks: Floats, centre: Floats, axes: Floats) -> Floats:
    return _unit_length(_standardise(ranks - centre) @ axes)


def _mirror(ranks: Floats) -> Floats:
    return ranks.reshape(-1, _THUMBNAIL, _THUMBNAIL)[:, :, ::-1].reshape(ranks.shape)


def _standardise(rows: Floats) -> Floats:
    return _unit_length(rows - rows.mean(axis=1, keepdims=True))


def _unit_length(rows: Floats) -> Floats:
    scaled: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-6))
    return scaled


def _compare(
    images: NDArray[np.uint8], rows: Indices, side: int, candidates: Sequence[_Candidate]
) -> list[float | None]:
    @lru_cache(maxsize=128)
    def details(position: int, mirrored: bool) -> _Details:
        (image,) = central_squares(read_rows(images, rows[[position]]), side)
        return _Details(np.ascontiguousarray(image[:, ::-1] if mirrored else image))

    return [
        _copy_likeness(details(pair.image, False), details(pair.part, pair.mirrored), pair.window)
        for pair in candidates
    ]


def _copy_likeness(image: _Details, part: _Details, window: Window | None) -> float | None:
    """Return the agreement of details of `part` with `window` of `image`, 0.8 to 1; None if they are no copies."""
    if window is None:
        coarse, fine = (_window_map(_FULL_IMAGE, _LEVELS[level][0]) for level in ("coarse", "fine"))
        if _agreement(image, part, coarse, "coarse") < _MIN_COARSE:
            return None
        agreement = _agreement(image, part, fine, "fine")
        return agreement if agreement >= _MIN_UNALIGNED else None
    side, agreement = _LEVELS["outline"][0], -1.0
    start = _window_map(window, side)
    for stage in _STAGES:
        factor, side = _LEVELS[stage.aligned][0] / side, _LEVELS[stage.aligned][0]
        fit = _align(image[stage.aligned], part[stage.aligned], _scale_map(start, factor), stage.steps)
        if fit is None or float(max(abs(fit[0, 1]), abs(fit[1, 0]))) > stage.max_shear:
            return None
        start, agreement = fit, _agreement(image, part, fit, stage.compared)
        if agreement < stage.min_agreement:
            return None
    return agreement


def _local_contrast(grey: NDArray[np.uint8], side: int, blur: float, spread: float) -> Floats:
    """Return each pixel relative to the mean and standard deviation of its neighbourhood."""
    # This removes the effects of brightness and of a viewer's window.
    small = cv2.equalizeHist(cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA))
    soft = cv2.GaussianBlur(small.astype(np.float32), (0, 0), blur)
    mean = cv2.GaussianBlur(soft, (0, 0), spread)
    variance = cv2.GaussianBlur(soft * soft, (0, 0), spread) - mean * mean
    # Without the 9, the noise of flat areas would become detail.
    contrast: Floats = (soft - mean) / np.sqrt(np.maximum(variance, 0) + 9)
    return contrast


def _window_map(window: Window, side: int) -> Floats:
    """Return the affine map, (2, 3), from pixels of the part to pixels of the image."""
    top, left, height, width = window
    return np.array(
        [[width, 0, left * side + (width - 1) / 2], [0, height, top * side + (height - 1) / 2]], dtype=np.float32
    )


def _scale_map(fit: Floats, factor: float) -> Floats:
    """Return the same map between images of `factor` times the side."""
    # Coordinates refer to the centres of pixels, hence the second term.
    larger = fit.copy()
    larger[:, 2] = factor * fit[:, 2] + (factor - 1) / 2 * (fit[:, :2].sum(axis=1) - 1)
    return larger


def _align(image: Floats, part: Floats, start: Floats, steps: int) -> Floats | None:
    """Return the affine map of highest correlation near `start`, or None if the search diverges.

    Enhanced correlation coefficient of Evangelidis and Psarakis 2008.
    """
    everywhere = np.ones(image.shape, dtype=np.uint8)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, steps, 1e-3)
    try:
        _, found = cv2.findTransformECC(part, image, start.copy(), cv2.MOTION_AFFINE, criteria, everywhere, 1)
    except cv2.error:
        return None
    return np.asarray(found, dtype=np.float32)


def _agreement(image: _Details, part: _Details, fit: Floats, level: str) -> float:
    """Return the median over blocks of the correlation of details; -1 where the images hardly overlap."""
    side, flags = len(part[level]), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(image[level], fit, (side, side), flags=flags)
    # Pixels at the edge are interpolated with black, and are not compared.
    inside = cv2.warpAffine(np.ones_like(image[level]), fit, (side, side), flags=flags) > 0.999
    shared = _blocks(inside).all(axis=1)
    if shared.sum() < _MIN_BLOCKS:
        return -1.0
    x, y = (
        blocks[shared] - blocks[shared].mean(axis=1, keepdims=True) for blocks in map(_blocks, (warped, part[level]))
    )
    size = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    # Black areas have no detail. They count as disagreement, otherwise black margins would make any pair agree.
    return float(np.median((x * y).sum(axis=1) / np.maximum(size, 1e-3 * x.shape[1])))


def _blocks(image: NDArray[np.generic]) -> NDArray[np.generic]:
    n, size = _BLOCKS_PER_SIDE, len(image) // _BLOCKS_PER_SIDE
    return image.reshape(n, size, n, size).swapaxes(1, 2).reshape(n * n, size * size)


def _chunks(items: Any) -> Iterator[Any]:
    return (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))
