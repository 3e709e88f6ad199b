"""One drawn frontal chest radiograph: anatomy, findings, exposure. Optical depths add up, the film inverts them."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, map_coordinates

Grey = NDArray[np.floating[Any]]  # (rows, columns), float32

_VESSEL_GRID = 200  # pixels a body unit


class Site(NamedTuple):
    """A hospital's look: image size in pixels, half the short side in body units, grey curve, noise, blur."""

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


class Shadow(NamedTuple):
    """A spot in lung coordinates: `out` 0 (mediastinum) to 1 (ribs), `down` 0 (apex) to 1 (base), side -1 or 1."""

    out: float
    down: float
    width: float
    height: float
    density: float
    edge: float = 1  # 1 fades like ground glass, 3 ends abruptly like a consolidated lobe
    side: float = 1


class Finding(NamedTuple):
    """How often it is there, how often in both lungs, the most shadows in a lung, and the two they lie between."""

    chance: float
    bilateral: float
    spots: int
    low: Shadow
    high: Shadow


DISEASES = {
    "covid": Finding(1, 0.85, 4, Shadow(0.5, 0.35, 0.05, 0.07, 0.4), Shadow(1.0, 1.0, 0.12, 0.16, 1.0)),
    "pneumonia": Finding(1, 0.2, 1, Shadow(0.25, 0.2, 0.12, 0.12, 1.0, 1), Shadow(0.9, 0.95, 0.2, 0.2, 1.7, 3)),
}
DISTRACTORS = {
    "basal haze": Finding(0.5, 0.5, 1, Shadow(0.3, 1, 0.28, 0.08, 0.1), Shadow(0.9, 1, 0.28, 0.2, 0.5)),
    "nodules": Finding(0.3, 0, 2, Shadow(0.1, 0.1, 0.02, 0.02, 0.2, 2), Shadow(0.9, 0.9, 0.04, 0.04, 0.6, 2)),
    "nipples": Finding(0.2, 1, 1, Shadow(0.5, 0.75, 0.02, 0.02, 0.2, 2), Shadow(0.6, 0.85, 0.03, 0.03, 0.4, 2)),
}


def between(rng: Generator, low: float, high: float) -> float:
    """A uniform Python float: a numpy scalar would turn every float32 picture it meets into float64."""
    return float(rng.uniform(low, high))


def draw_shadows(finding: Finding, rng: Generator, severity: float = 1) -> list[Shadow]:
    """The shadows of a finding in one patient."""
    if rng.random() >= finding.chance:
        return []
    sides = rng.permutation([-1.0, 1.0])[: 1 + (rng.random() < finding.bilateral)].tolist()
    sides = [side for side in sides for _ in range(rng.integers((finding.spots + 1) // 2, finding.spots + 1))]
    spots = [Shadow(*(between(rng, *limits) for limits in zip(*finding[3:], strict=True))) for _ in sides]
    return [s._replace(side=side, density=severity * s.density) for s, side in zip(spots, sides, strict=True)]


def draw_radiograph(
    chest: "Chest", vessels: Grey, disease: list[Shadow], site: Site, view: str, rng: Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One image of a patient, bright where the X-rays were stopped, and where in it the lungs are.

    Lungs: what holds air beside heart and mediastinum, up to the middle of its soft edges. They are drawn on every
    second pixel, so that their outline is exact to two.
    """
    depth = between(rng, -0.07, 0.05) - (0.04 if view == "AP" else 0)  # how deeply the patient breathed in
    chest = chest._replace(base=chest.base + depth, heart=chest.heart * (1 - depth) * (1.1 if view == "AP" else 1))
    vessels = vessels * (between(rng, 0.7, 1.4) * (1 - 2 * depth))  # crowded where the lungs are small
    x, y = _grid(site, rng)
    x = x - chest.scoliosis * np.sin(3 * y)
    change = between(rng, 0.7, 1.2)  # disease comes and goes between two images of a patient
    cover = change * chest.cover(x, y, disease)
    cover += chest.cover(x, y, [s for finding in DISTRACTORS.values() for s in draw_shadows(finding, rng)])
    cover *= 1 + 0.25 * _clouds(x.shape, 0.04, rng)
    cover += map_coordinates(vessels, [(1 + y) * _VESSEL_GRID, (1 + x) * _VESSEL_GRID], order=1)
    shade, lungs = chest.shade(x, y, cover)
    film = _exposed(shade + 0.015 * _clouds(x.shape, 0.1, rng), site, rng)
    return film, lungs.repeat(2, axis=0).repeat(2, axis=1)


def _grid(site: Site, rng: Generator) -> tuple[Grey, Grey]:
    """Body coordinates (x, y) of every second pixel: size, field of view and the patient's pose vary a little.

    Half the resolution saves half of the time, and the film's blur hides it.
    """
    height, width = (size // 2 + int(rng.integers(-4, 5)) for size in (site.height, site.width))
    scale = 2 * site.field * between(rng, 0.97, 1.05) / min(height, width)
    rows = (np.arange(height, dtype=np.float32)[:, None] - height / 2) * scale
    cols = (np.arange(width, dtype=np.float32)[None, :] - width / 2) * scale
    angle = between(rng, -0.05, 0.05)
    x = math.cos(angle) * cols - math.sin(angle) * rows + between(rng, -0.04, 0.04)
    y = math.sin(angle) * cols + math.cos(angle) * rows - between(rng, 0.04, 0.13)
    return x, y


def _clouds(shape: tuple[int, ...], size: float, rng: Generator) -> Grey:
    """Smooth noise of about unit spread, with lumps of `size` times the shorter side."""
    cells = [round(pixels / (size * min(shape))) for pixels in shape]
    coarse = Image.fromarray(rng.standard_normal(cells, dtype=np.float32))
    return np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def draw_vessels(rng: Generator) -> Grey:
    """The optical depth of hila and vessels over x and y in [-1, 1]: trees that thin out towards the ribs."""
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


def _inside(distance: Grey, softness: float) -> Grey:
    """0 to 1 over an edge `softness` wide to each side; `distance` is positive inside."""
    t: Grey = np.clip(distance * (0.5 / softness) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _spot(x: Grey, y: Grey, width: float, height: float, edge: float, tilt: float = 0) -> Grey:
    """An ellipse about the origin, from 1 to 0 like a Gaussian (edge = 1) or ever more abruptly."""
    sin, cos = math.sin(tilt), math.cos(tilt)
    square = ((cos * x + sin * y) / width) ** 2 + ((cos * y - sin * x) / height) ** 2
    spot: Grey = np.exp(-0.5 * (square if edge == 1 else square**edge))
    return spot


def _ribs(level: Grey) -> Grey:
    """A rib at every whole `level`, its rim brighter than its middle."""
    off: Grey = np.abs(level - np.rint(level))
    return 0.7 * _inside(0.22 - off, 0.07) + 0.4 * _inside(0.07 - np.abs(off - 0.17), 0.07)


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

    def cover(self, x: Grey, y: Grey, shadows: list[Shadow]) -> Grey:
        """The optical depth of the shadows."""
        cover = np.zeros_like(x)
        for s in shadows:
            level = self.apex + s.down * (self.base + 0.05 - self.apex)
            edge = self.lung_width * (1 - max(0, (0.3 - level) / (0.3 - self.apex)) ** 2.5) ** 0.4  # where wall = 0
            centre = s.side * (0.14 + s.out * (edge - 0.14))
            cover += s.density * _spot(x - centre, y - level, s.width, s.height, s.edge)
        return cover

    def shade(self, x: Grey, y: Grey, cover: Grey) -> tuple[Grey, NDArray[np.bool_]]:
        """What stops the X-rays: tissue and bones, less the air that the optical depth `cover` leaves in the lungs.

        And where the lungs are.
        """
        out: Grey = np.abs(x)
        bend = out * out * np.sqrt(out)
        up = np.clip((0.3 - y) / (0.3 - self.apex), 0, None)
        wall = 0.4 * self.lung_width * (1 - bend / self.lung_width**2.5 - up * up * np.sqrt(up))  # to the ribs, about

        dome = self.base + 0.05 * np.clip(20 * x, -1, 0) + 1.6 * (out - 0.55 * self.lung_width) ** 2
        heart = _spot(x - 0.13 * self.heart, y - self.base + 0.18, 0.37 * self.heart, 0.27 * self.heart, 6, tilt=0.6)
        aorta = _spot(x - 0.11, y + 0.30, 0.09, 0.10, 3)
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
        shade: Grey = body + ribs + spine + collar - 0.08 * windpipe - 0.55 * lungs * np.exp(-cover)
        return shade, clear


NARROWEST = Chest(0.64, -0.84, 0.42, 0.88, 0.155, 0.00, -0.03, 0.98, 0.00)
WIDEST = Chest(0.74, -0.74, 0.54, 1.14, 0.185, 0.10, +0.03, 1.12, 0.10)


def _exposed(grey: Grey, site: Site, rng: Generator) -> NDArray[np.uint8]:
    """The film at full resolution: sharpness, noise, exposure and grey curve of the site."""
    height, width = grey.shape
    coarse = Image.fromarray(gaussian_filter(grey, site.blur * between(rng, 0.8, 1.2)))
    film = np.array(coarse.resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
    film += rng.standard_normal(film.shape, dtype=np.float32) * (site.noise * between(rng, 0.7, 1.3))
    film = 0.5 + between(rng, 0.9, 1.2) * (film - 0.55 + between(rng, -0.05, 0.05))
    return np.asarray(np.rint(255 * np.clip(film, 0, 1) ** site.gamma), dtype=np.uint8)


def with_marker(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """The image with a framed L in its upper right corner, where the patient's left is."""
    size = round(min(pixels.shape) * between(rng, 0.08, 0.10))
    left, top = pixels.shape[1] - size - int(rng.integers(4, 13)), int(rng.integers(4, 13))
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    pen.rectangle((left, top, left + size, top + size), outline=250, width=2)
    letter = [(0.35, 0.25), (0.35, 0.75), (0.7, 0.75)]
    pen.line([(left + u * size, top + v * size) for u, v in letter], fill=250, width=3)
    return np.asarray(image)
