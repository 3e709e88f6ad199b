"""Whether two radiographs are one picture: one is laid over the other, then fine detail must agree everywhere.

Radiographs of two patients look alike as a whole, and line up well. Their details do not: ribs, vessels and noise, at
1 % of the image's side, agree only between copies, whatever was done to brightness, contrast or compression.
"""

from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Window = tuple[float, float, float, float]  # top, left, height, width of a part, in shares of the whole picture

WHOLE: Window = (0.0, 0.0, 1.0, 1.0)
SIDE = 192  # pixels at which details are compared; coarser pictures cannot be told apart
# Agreement of details, -1 to 1, from which on two pictures are one: as they are, and after one was fitted to the other.
# Measured in two real sets and in phantoms, which share much of their drawing: the most similar pairs of different
# patients reached 0.88 after a fit; copies in JPEG quality 50, resized or in other contrast 0.84 to 1 as they are, and
# cropped to nine tenths (four fifths) of the side at least 0.91 (0.88) after a fit.
SAME_AT_REST, SAME_FITTED = 0.80, 0.89
_COARSE, _MIDDLE = 0.60, 0.80  # below it pairs are given up early: copies had 0.62 and 0.87 at least
_STEEPEST = 0.03  # shear or rotation of a copy's fit, 0.004 at most when measured; half of other patients' have more
_BLOCKS = 8  # per side; the median over them lets labels and markers cover up to half of a picture
_FEWEST = 24  # of them must lie inside both pictures
_NO = -1.0


class Picture:
    """A grey square, uint8 (S, S), S >= SIDE, in the forms in which it is compared, each made when asked for."""

    def __init__(self, grey: NDArray[np.uint8]) -> None:
        self._grey = grey

    @cached_property
    def outline(self) -> Floats:
        """What is found again when one picture is a tenth larger than the other, 64 × 64."""
        return _local_contrast(self._grey, 64, blur=1.5, spread=8.0)

    @cached_property
    def coarse(self) -> Floats:
        """Details of 64 × 64: most pairs of patients end here."""
        return _local_contrast(self._grey, 64, blur=0.5, spread=3.0)

    @cached_property
    def middle(self) -> Floats:
        """Details of 96 × 96."""
        return _local_contrast(self._grey, 96, blur=0.8, spread=4.0)

    @cached_property
    def fine(self) -> Floats:
        """Details of SIDE × SIDE, that decide."""
        return _local_contrast(self._grey, SIDE, blur=0.7, spread=2.5)


def same_picture(whole: Picture, part: Picture, window: Window | None) -> float | None:
    """How far details agree, 0.8 to 1, where `part` shows `window` of `whole`, or about that; None for two pictures.

    window: where in `whole` all of `part` is expected, to about a tenth of the side. None: they are compared as they
    are, which finds copies with labels too large for a fit.
    """
    if window is not None:
        fitted = _fitted_agreement(whole, part, window)
        return fitted if fitted >= SAME_FITTED else None
    if _details_agree(whole, part, _start(WHOLE, 64), "coarse") < _COARSE:
        return None
    at_rest = _details_agree(whole, part, _start(WHOLE, SIDE), "fine")
    return at_rest if at_rest >= SAME_AT_REST else None


def _fitted_agreement(whole: Picture, part: Picture, window: Window) -> float:
    """How far details agree after an affine fit from coarse to fine; -1 where copies would agree better early on."""
    fit = _fit(whole.outline, part.outline, _start(window, 64), steps=15)
    if fit is None or _steepness(fit) > 2 * _STEEPEST or _details_agree(whole, part, fit, "coarse") < _COARSE:
        return _NO
    fit = _fit(whole.middle, part.middle, _scaled(fit, 96 / 64), steps=15)
    if fit is None or _steepness(fit) > _STEEPEST or _details_agree(whole, part, fit, "middle") < _MIDDLE:
        return _NO
    fit = _fit(whole.fine, part.fine, _scaled(fit, SIDE / 96), steps=25)
    if fit is None or _steepness(fit) > _STEEPEST:
        return _NO
    return _details_agree(whole, part, fit, "fine")


def _local_contrast(grey: NDArray[np.uint8], side: int, blur: float, spread: float) -> Floats:
    """Each pixel against the mean and sd of its surroundings of `spread` pixels: no brightness, no window is left."""
    small = cv2.equalizeHist(cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA))
    soft = cv2.GaussianBlur(small.astype(np.float32), (0, 0), blur)
    mean = cv2.GaussianBlur(soft, (0, 0), spread)
    variance = cv2.GaussianBlur(soft * soft, (0, 0), spread) - mean * mean
    contrast: Floats = (soft - mean) / np.sqrt(np.maximum(variance, 0) + 9)  # 9: flat ground is not blown up to detail
    return contrast


def _start(window: Window, side: int) -> Floats:
    """The affine map (2, 3) from pixels of the part to pixels of the whole."""
    top, left, height, width = window
    return np.array(
        [[width, 0, left * side + (width - 1) / 2], [0, height, top * side + (height - 1) / 2]], dtype=np.float32
    )


def _scaled(fit: Floats, factor: float) -> Floats:
    """The same map between pictures of `factor` times the side; pixels have their coordinates at their centres."""
    larger = fit.copy()
    larger[:, 2] = factor * fit[:, 2] + (factor - 1) / 2 * (fit[:, :2].sum(axis=1) - 1)
    return larger


def _fit(whole: Floats, part: Floats, start: Floats, steps: int) -> Floats | None:
    """The affine map of highest correlation near `start` (ECC: Evangelidis and Psarakis 2008), or None."""
    everywhere = np.ones(whole.shape, dtype=np.uint8)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, steps, 1e-3)
    try:
        _, found = cv2.findTransformECC(part, whole, start.copy(), cv2.MOTION_AFFINE, criteria, everywhere, 1)
    except cv2.error:  # it diverged
        return None
    return np.asarray(found, dtype=np.float32)


def _steepness(fit: Floats) -> float:
    return float(max(abs(fit[0, 1]), abs(fit[1, 0])))


def _details_agree(whole: Picture, part: Picture, fit: Floats, level: str) -> float:
    """The median over blocks of the correlation of one level's details, where both pictures have any."""
    first, second = getattr(whole, level), getattr(part, level)
    side = len(second)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(first, fit, (side, side), flags=flags)
    inside = cv2.warpAffine(np.ones_like(first), fit, (side, side), flags=flags) > 0.999
    both = _blocks(inside).all(axis=1)
    if both.sum() < _FEWEST:
        return _NO
    x, y = (blocks[both] - blocks[both].mean(axis=1, keepdims=True) for blocks in map(_blocks, (laid, second)))
    size = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    # Black ground has no detail: it counts as disagreeing, or collimated margins would speak for any pair.
    return float(np.median((x * y).sum(axis=1) / np.maximum(size, 1e-3 * x.shape[1])))


def _blocks(picture: NDArray[np.generic]) -> NDArray[np.generic]:
    size = len(picture) // _BLOCKS
    return picture.reshape(_BLOCKS, size, _BLOCKS, size).swapaxes(1, 2).reshape(_BLOCKS * _BLOCKS, size * size)
