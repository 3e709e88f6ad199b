"""Drawing of one frontal chest radiograph: anatomy, findings and exposure.

Optical depths add up, and the film inverts them.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, map_coordinates

# A picture as float32, shape (rows, columns).
Grey = NDArray[np.floating[Any]]

_VESSEL_GRID = 200  # pixels per body unit


class Site(NamedTuple):
    """The image properties of a hospital.

    Attributes:
        height: Height of its images in pixels.
        width: Width of its images in pixels.
        field: Half of the shorter side in body units.
        gamma: Exponent of the grey curve.
        noise: Standard deviation of the noise.
        blur: Standard deviation of the blur in pixels.
    """

    height: int
    width: int
    field: float
    gamma: float
    noise: float
    blur: float


SITES = {
    "site_a": Site(height=320, width=288, field=0.88, gamma=1.05, noise=0.012, blur=0.5),
    "site_b": Site(height=288, width=352, field=0.92, gamma=0.8, noise=0.024, blur=0.2),
}


class Opacity(NamedTuple):
    """An elliptical opacity in lung coordinates.

    Attributes:
        out: Position from 0 (mediastinum) to 1 (ribs).
        down: Position from 0 (apex) to 1 (base).
        width: Width in body units.
        height: Height in body units.
        density: Optical depth of its centre.
        edge: 1 fades like ground glass, 3 ends abruptly like a consolidated lobe.
        side: -1 or 1.
    """

    out: float
    down: float
    width: float
    height: float
    density: float
    edge: float = 1
    side: float = 1


class Finding(NamedTuple):
    """The distribution of a finding over patients.

    Attributes:
        chance: Probability of the finding.
        bilateral: Probability that it is in both lungs.
        spots: Largest number of opacities per lung.
        low: Lower limits of the properties of an opacity.
        high: Upper limits of the properties of an opacity.
    """

    chance: float
    bilateral: float
    spots: int
    low: Opacity
    high: Opacity


DISEASES = {
    "covid": Finding(1, 0.85, 4, Opacity(0.5, 0.35, 0.05, 0.07, 0.4), Opacity(1.0, 1.0, 0.12, 0.16, 1.0)),
    "pneumonia": Finding(1, 0.2, 1, Opacity(0.25, 0.2, 0.12, 0.12, 1.0, 1), Opacity(0.9, 0.95, 0.2, 0.2, 1.7, 3)),
}
DISTRACTORS = {
    "basal haze": Finding(0.5, 0.5, 1, Opacity(0.3, 1, 0.28, 0.08, 0.1), Opacity(0.9, 1, 0.28, 0.2, 0.5)),
    "nodules": Finding(0.3, 0, 2, Opacity(0.1, 0.1, 0.02, 0.02, 0.2, 2), Opacity(0.9, 0.9, 0.04, 0.04, 0.6, 2)),
    "nipples": Finding(0.2, 1, 1, Opacity(0.5, 0.75, 0.02, 0.02, 0.2, 2), Opacity(0.6, 0.85, 0.03, 0.03, 0.4, 2)),
}


class Chest(NamedTuple):
    """A patient's anatomy in body units: x = 0 at the spine and grows to the patient's left, y grows downwards."""

    lung_width: float
    apex: float
    base: float
    heart: float
    rib_spacing: float
    rib_start: float
    scoliosis: float
    trunk: float
    fat: float

    def depth_of(self, x: Grey, y: Grey, opacities: list[Opacity]) -> Grey:
        """Return the optical depth of the opacities at the body coordinates (x, y)."""
        depth = np.zeros_like(x)
        for o in opacities:
            level = self.apex + o.down * (self.base + 0.05 - self.apex)
            # Where `wall` in `attenuation` is 0.
            edge = self.lung_width * (1 - max(0, (0.3 - level) / (0.3 - self.apex)) ** 2.5) ** 0.4
            centre = o.side * (0.14 + o.out * (edge - 0.14))
            depth += o.density * _ellipse(x - centre, y - level, o.width, o.height, o.edge)
        return depth

    def attenuation(self, x: Grey, y: Grey, depth: Grey) -> tuple[Grey, NDArray[np.bool_]]:
        """Return how much X-rays are attenuated, and where the lungs are.

        Args:
            x: Body coordinate of each pixel.
            y: Body coordinate of each pixel.
            depth: Optical depth of what is in the lungs; it replaces air.
        """
        out: Grey = np.abs(x)
        bend = out * out * np.sqrt(out)
        up = np.clip((0.3 - y) / (0.3 - self.apex), 0, None)
        # Approximate distance to the ribs.
        wall = 0.4 * self.lung_width * (1 - bend / self.lung_width**2.5 - up * up * np.sqrt(up))

        dome = self.base + 0.05 * np.clip(20 * x, -1, 0) + 1.6 * (out - 0.55 * self.lung_width) ** 2
        heart = _ellipse(x - 0.13 * self.heart, y - self.base + 0.18, 0.37 * self.heart, 0.27 * self.heart, 6, tilt=0.6)
        aorta = _ellipse(x - 0.11, y + 0.30, 0.09, 0.10, 3)
        lungs = _inside(wall, 0.04) * _inside(dome - y, 0.03) * _inside(out - 0.13, 0.06)
        clear = (lungs > 0.5) & (heart < 0.5) & (aorta < 0.5)
        lungs *= (0.8 + 0.9 * np.clip(wall, 0, 0.22)) * (1 - 0.9 * heart) * (1 - 0.8 * aorta)
        windpipe = _inside(0.04 - np.abs(x + 0.01), 0.03) * _inside(-0.28 - y, 0.08)

        trunk = _inside(np.minimum(y + 1.06 - 0.3 * out, self.trunk + 0.1 - out), 0.08)
        thick = 0.68 + self.fat - 0.22 * (out / self.trunk) ** 4
        thick += 0.09 * np.exp(-((x / 0.16) ** 2)) + 0.06 * _inside(y - self.base, 0.25)

        behind = _ribs((y - self.apex - self.rib_start + 0.15 * out - 0.85 * bend) / self.rib_spacing)
        front = _ribs((y - self.rib_start + 0.6 * out) / (1.15 * self.rib_spacing))
        ribs = 0.11 * behind * _inside(out - 0.05, 0.05) + 0.05 * front * _inside(out - 0.3, 0.1)
        ribs *= _inside(wall + 0.03, 0.04) * _inside(self.base + 0.1 - y, 0.2)
        spine = 0.09 * _inside(0.075 - out, 0.03) * (0.75 + 0.25 * np.cos(y * (2 * math.pi / 0.13)))
        collar = _inside(0.03 - np.abs(y - self.apex - 0.17 + 0.28 * out - 0.12 * np.sin(5 * out)), 0.02)
        collar *= 0.10 * _inside(out - 0.07, 0.03) * _inside(0.8 - out, 0.08)

        body = thick * np.maximum(trunk, _inside(0.27 - out, 0.08))
        shade: Grey = body + ribs + spine + collar - 0.08 * windpipe - 0.55 * lungs * np.exp(-depth)
        return shade, clear


MIN_CHEST = Chest(0.64, -0.84, 0.42, 0.88, 0.155, 0.00, -0.03, 0.98, 0.00)
MAX_CHEST = Chest(0.74, -0.74, 0.54, 1.14, 0.185, 0.10, +0.03, 1.12, 0.10)


def between(rng: Generator, low: float, high: float) -> float:
    """Draw from a uniform distribution."""
    # A Python float, because a numpy scalar would turn float32 pictures into float64.
    return float(rng.uniform(low, high))


def draw_opacities(finding: Finding, rng: Generator, severity: float = 1) -> list[Opacity]:
    """Draw the opacities of a finding in one patient."""
    if rng.random() >= finding.chance:
        return []
    sides = rng.permutation([-1.0, 1.0])[: 1 + (rng.random() < finding.bilateral)].tolist()
    sides = [side for side in sides for _ in range(rng.integers((finding.spots + 1) // 2, finding.spots + 1))]
    spots = [Opacity(*(between(rng, *limits) for limits in zip(*finding[3:], strict=True))) for _ in sides]
    return [s._replace(side=side, density=severity * s.density) for s, side in zip(spots, sides, strict=True)]


def draw_radiograph(
    chest: Chest, vessels: Grey, disease: list[Opacity], site: Site, view: str, rng: Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one image of a patient.

    Args:
        chest: The patient's anatomy.
        vessels: The patient's vessels from `draw_vessels`.
        disease: The patient's opacities.
        site: The hospital.
        view: "AP" or "PA".
        rng: Generator of everything that differs between images of a patient.

    Returns:
        The radiograph, uint8 (H, W), bright where X-rays are attenuated; and the mask of the lungs without heart and
        mediastinum, bool (H, W), up to the middle of their soft edges. The mask is exact to two pixels.
    """
    # How deeply the patient breathed in.
    breath = between(rng, -0.07, 0.05) - (0.04 if view == "AP" else 0)
    chest = chest._replace(base=chest.base + breath, heart=chest.heart * (1 - breath) * (1.1 if view == "AP" else 1))
    # Vessels are crowded in small lungs.
    vessels = vessels * (between(rng, 0.7, 1.4) * (1 - 2 * breath))
    x, y = _grid(site, rng)
    x = x - chest.scoliosis * np.sin(3 * y)
    # Disease changes between two images of a patient.
    change = between(rng, 0.7, 1.2)
    depth = change * chest.depth_of(x, y, disease)
    depth += chest.depth_of(x, y, [o for finding in DISTRACTORS.values() for o in draw_opacities(finding, rng)])
    depth *= 1 + 0.25 * _smooth_noise(x.shape, 0.04, rng)
    depth += map_coordinates(vessels, [(1 + y) * _VESSEL_GRID, (1 + x) * _VESSEL_GRID], order=1)
    shade, lungs = chest.attenuation(x, y, depth)
    film = _expose(shade + 0.015 * _smooth_noise(x.shape, 0.1, rng), site, rng)
    return film, lungs.repeat(2, axis=0).repeat(2, axis=1)


def draw_vessels(rng: Generator) -> Grey:
    """Draw the optical depth of hila and vessels for x and y in [-1, 1]: trees that thin out towards the ribs."""
    canvas = Image.new("L", (2 * _VESSEL_GRID, 2 * _VESSEL_GRID))
    pen = ImageDraw.Draw(canvas)
    fan = [angle + between(rng, -0.2, 0.2) for angle in (-1.3, -0.7, -0.1, 0.4, 0.9, 1.3)]
    twigs = [(side, 0.15 * side, -0.06, angle, 4) for side in (-1, 1) for angle in fan]
    while twigs:
        side, x, y, angle, order = twigs.pop()
        length = between(rng, 0.08, 0.18)
        end = (x + side * length * math.cos(angle), y + length * math.sin(angle))
        line = [(1 + u) * _VESSEL_GRID for u in (x, y, *end)]
        pen.line(line, fill=60 * order, width=round(0.006 * order * _VESSEL_GRID))
        if order > 1:
            twigs += [(side, *end, angle + turn * between(rng, 0.1, 0.5), order - 1) for turn in (-1, 1)]
    return np.asarray((0.6 / 255) * gaussian_filter(np.asarray(canvas, np.float32), 0.009 * _VESSEL_GRID))


def with_marker(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """Return the image with a framed L in its upper right corner, where the patient's left is."""
    size = round(min(pixels.shape) * between(rng, 0.08, 0.10))
    left, top = pixels.shape[1] - size - int(rng.integers(4, 13)), int(rng.integers(4, 13))
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    pen.rectangle((left, top, left + size, top + size), outline=250, width=2)
    letter = [(0.35, 0.25), (0.35, 0.75), (0.7, 0.75)]
    pen.line([(left + u * size, top + v * size) for u, v in letter], fill=250, width=3)
    return np.asarray(image)


def _grid(site: Site, rng: Generator) -> tuple[Grey, Grey]:
    """Return body coordinates (x, y) of every second pixel; size, field of view and the patient's pose vary."""
    # Half of the resolution takes half of the time, and the blur of the film hides it.
    height, width = (size // 2 + int(rng.integers(-4, 5)) for size in (site.height, site.width))
    scale = 2 * site.field * between(rng, 0.97, 1.05) / min(height, width)
    rows = (np.arange(height, dtype=np.float32)[:, None] - height / 2) * scale
    cols = (np.arange(width, dtype=np.float32)[None, :] - width / 2) * scale
    angle = between(rng, -0.05, 0.05)
    x = math.cos(angle) * cols - math.sin(angle) * rows + between(rng, -0.04, 0.04)
    y = math.sin(angle) * cols + math.cos(angle) * rows - between(rng, 0.04, 0.13)
    return x, y


def _expose(grey: Grey, site: Site, rng: Generator) -> NDArray[np.uint8]:
    """Return the film at full resolution, with the sharpness, noise, exposure and grey curve of the site."""
    height, width = grey.shape
    coarse = Image.fromarray(gaussian_filter(grey, site.blur * between(rng, 0.8, 1.2)))
    film = np.array(coarse.resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
    film += rng.standard_normal(film.shape, dtype=np.float32) * (site.noise * between(rng, 0.7, 1.3))
    film = 0.5 + between(rng, 0.9, 1.2) * (film - 0.55 + between(rng, -0.05, 0.05))
    return np.asarray(np.rint(255 * np.clip(film, 0, 1) ** site.gamma), dtype=np.uint8)


def _smooth_noise(shape: tuple[int, ...], size: float, rng: Generator) -> Grey:
    """Return noise of about unit standard deviation with blobs of `size` times the shorter side."""
    blobs = [round(pixels / (size * min(shape))) for pixels in shape]
    coarse = Image.fromarray(rng.standard_normal(blobs, dtype=np.float32))
    return np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _inside(distance: Grey, softness: float) -> Grey:
    """Rise from 0 to 1 over an edge of `softness` to each side; `distance` is positive inside."""
    # The smoothstep polynomial 3t² - 2t³.
    t: Grey = np.clip(distance * (0.5 / softness) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _ellipse(x: Grey, y: Grey, width: float, height: float, edge: float, tilt: float = 0) -> Grey:
    """Fall from 1 at the origin to 0 outside an ellipse, like a Gaussian (edge = 1) or more abruptly."""
    sin, cos = math.sin(tilt), math.cos(tilt)
    square = ((cos * x + sin * y) / width) ** 2 + ((cos * y - sin * x) / height) ** 2
    ellipse: Grey = np.exp(-0.5 * (square if edge == 1 else square**edge))
    return ellipse


def _ribs(level: Grey) -> Grey:
    """Return a rib at every integer `level`, brighter at its rim than in its middle."""
    off: Grey = np.abs(level - np.rint(level))
    return 0.7 * _inside(0.22 - off, 0.07) + 0.4 * _inside(0.07 - np.abs(off - 0.17), 0.07)
