"""Measure how often the OOD checks of a finished run flag radiographs, altered copies of them and other images.

OMP_NUM_THREADS=1 python -m tools.simulations.ood run=FOLDER [manifest=CSV]... [folder=FOLDER]... >> docs/ood.md

The checks are fitted again to the run's training and validation images.

run: The run folder, as for `evaluate`.
manifest: Radiographs of another data set. Images whose file name or patient is also in the run's data set are left out.
folder: Images of any kind.
"""

import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import pandas as pd
import pydicom
import sklearn
import torch
from matplotlib.figure import Figure
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from covid_cls.bundle.ood import ALPHA, REASONS, OodDetector, fit_ood
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.image_source import DataSettings
from covid_cls.data.limits import BadImage
from covid_cls.data.manifest import files_below, read_manifest
from covid_cls.data.phantoms import build_phantoms
from covid_cls.data.readers import grey_of, read_image
from covid_cls.data.store import default_cache, draw_on_canvas
from covid_cls.evaluation.intervals import proportion_interval
from covid_cls.evaluation.predictions import finished_run
from covid_cls.models.inference import Scorer
from covid_cls.models.transforms import Augment
from covid_cls.tasks import TASKS
from covid_cls.training.checkpoints import load_classifier

# Grey images of any size.
Pictures = list[NDArray[np.uint8]]

# Images per set at most, sampled with seed 0.
MAX_IMAGES = 200
# Test files of pydicom with other modalities and encodings.
DICOM = ("CT_small", "MR_small", "693_J2KI", "liver_1frame", "JPGExtended", "examples_rgb_color", "examples_palette")
WORDS = "fever and cough for six days with bilateral opacities on the plain film the laboratory results follow"


def radiographs(manifest: Path, own: pd.DataFrame) -> dict[str, Pictures]:
    """Return at most `MAX_IMAGES` readable images of each source of a manifest, without those in `own`."""
    table = read_manifest(manifest)
    names = set(own["path"].map(lambda path: Path(path).name))
    known = table["path"].map(lambda path: Path(path).name in names) | table["patient_id"].isin(own["patient_id"])
    found = {}
    for source, part in table[~known].groupby("source"):
        sample = part.sample(min(MAX_IMAGES, len(part)), random_state=0)
        found[f"{manifest.parent.name}: {source}"] = list(_readable(map(Path, sample["file"])))
    return found


def phantoms() -> Pictures:
    """Return phantoms with a seed that no run uses by default."""
    folder = default_cache() / "phantoms" / "ood"
    return list(_readable(map(Path, read_manifest(build_phantoms(folder, images=MAX_IMAGES // 2, seed=99))["file"])))


def copies(squares: NDArray[np.uint8], rng: Generator) -> dict[str, NDArray[np.uint8]]:
    """Return altered copies of radiographs, shape (n, S, S).

    The checks should flag those that are inverted or rotated by multiples of 90°. They are not made for the last three
    changes.
    """
    side = squares.shape[1]
    tilt = cv2.getRotationMatrix2D((side / 2, side / 2), 30, 1)
    # Corners of random squares with half the side.
    places = rng.integers(side // 2, size=(len(squares), 2))
    corners = [one[y : y + side // 2, x : x + side // 2] for one, (y, x) in zip(squares, places, strict=True)]
    return {
        "inverted": 255 - squares,
        **{f"turned by {90 * turns}°": np.rot90(squares, turns, (1, 2)) for turns in (1, 2, 3)},
        "inverted and turned by 180°": 255 - np.rot90(squares, 2, (1, 2)),
        "mirrored": squares[:, :, ::-1],
        "turned by 30°": np.stack([cv2.warpAffine(one, tilt, (side, side)) for one in squares]),
        "a quarter of it": np.stack([cv2.resize(corner, (side, side)) for corner in corners]),
    }


def others(rng: Generator) -> dict[str, Pictures]:
    """Return images that are not chest radiographs, generated or from installed packages."""
    # Only what is installed anyway, so that the measurement can be repeated without downloads.
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    photos = [_grey(image) for image in load_sample_images().images]
    photos.append(grey_of(Image.open(samples / "grace_hopper.jpg")))
    files = [Path(pydicom.__file__).parent / "data" / "test_files" / f"{name}.dcm" for name in DICOM]
    across = np.linspace(0, 255, 224)
    x, y = np.meshgrid(across, across)
    ramps = [x, y, 255 - x, 255 - y, (x + y) / 2, np.hypot(x - 128, y - 128) / 0.72, 255 - np.hypot(x - 128, y - 128)]
    noise = [cv2.GaussianBlur(rng.random((224, 224)), (0, 0), sd) for sd in (0.1, 2, 8, 20, 40) for _ in range(6)]
    return {
        "photographs": photos,
        "parts of photographs": [_part(photo, rng) for photo in photos for _ in range(20)],
        "CT, MR, ultrasound (pydicom's files)": list(_readable(files)),
        "pages of text": [_page(rng, dark=k % 4 == 3) for k in range(20)],
        "plots": [_plot(rng, k) for k in range(12)],
        "noise, sharp to smooth": [_full_contrast(image) for image in noise],
        "grey ramps": [image.clip(0, 255).astype(np.uint8) for image in ramps],
        "one grey level": [np.full((224, 224), level, np.uint8) for level in (0, 1, 64, 128, 254, 255)],
    }


def _readable(files: Iterator[Path] | list[Path]) -> Iterator[NDArray[np.uint8]]:
    for file in files:
        try:
            yield read_image(file)
        except BadImage as error:
            # To stderr, because stdout is appended to the document.
            print(f"left out: {file.name}: {error}", file=sys.stderr)


def _grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return grey_of(Image.fromarray(image))


def _full_contrast(image: NDArray[Any]) -> NDArray[np.uint8]:
    return np.asarray(255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)


def _part(image: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    side = int(min(image.shape) * rng.uniform(0.3, 0.9))
    top, left = rng.integers(image.shape[0] - side), rng.integers(image.shape[1] - side)
    return image[top : top + side, left : left + side]


def _page(rng: Generator, dark: bool) -> NDArray[np.uint8]:
    paper, ink = (20, 230) if dark else (250, 10)
    page, size = Image.new("L", (800, 1000), paper), int(rng.integers(14, 40))
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font, draw = ImageFont.truetype(str(file), size), ImageDraw.Draw(page)
    for top in range(40, 960, size * 3 // 2):
        draw.text((40, top), " ".join(rng.choice(WORDS.split(), rng.integers(2, 14))), ink, font)
    return np.asarray(page)


def _plot(rng: Generator, kind: int) -> NDArray[np.uint8]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = Figure(figsize=(6, 5))
    for axes in figure.subplots(1 + kind % 2, 1 + kind % 3, squeeze=False).flat:
        (axes.plot, axes.hist, axes.imshow)[kind % 3](rng.normal(size=(40, 3) if kind % 3 < 2 else (20, 20)).cumsum(0))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return _grey(np.asarray(canvas.buffer_rgba())[..., :3])  # type: ignore[no-untyped-call]


class OodMeasurement:
    """A run's network with OOD checks that are fitted to its data.

    Attributes:
        scorer: The network.
        detector: The checks.
        fitted_in: CPU time that the fit took, in seconds.
    """

    def __init__(self, scorer: Scorer, data: Radiographs) -> None:
        self.scorer = scorer
        started = time.process_time()
        self.detector = OodDetector(fit_ood(scorer, data))
        self.fitted_in = time.process_time() - started

    def network_inputs(self, pictures: Pictures) -> NDArray[np.uint8]:
        """Return the square images, shape (n, S, S), that the network receives for pictures of any size."""
        view = self.scorer.preprocess
        return np.stack([draw_on_canvas(one, view.size, view.crop) for one in pictures])

    @torch.inference_mode()
    def row(self, name: str, squares: NDArray[np.uint8]) -> str:
        """Return a Markdown row: number of images, flagged share with its 95 % interval, share of each code, in %."""
        flags: list[list[str]] = []
        for start in range(0, len(squares), 32):
            batch = np.ascontiguousarray(squares[start : start + 32])
            embedding = self.scorer.embed(torch.from_numpy(batch).unsqueeze(1).to(self.scorer.device))[1]
            flags += self.detector.reasons(batch, embedding.cpu().numpy())
        n, codes = len(flags), Counter(code for found in flags for code in found)
        share = proportion_interval(sum(map(bool, flags)), n)
        counts = " | ".join(f"{100 * codes[code] / n:.1f}" for code in REASONS)
        return f"| {name} | {n} | {100 * share.value:.1f} ({100 * share.low:.1f}–{100 * share.high:.1f}) | {counts} |"


def main(words: list[str]) -> None:
    """Print the tables for docs/ood.md."""
    given = [word.partition("=")[::2] for word in words]
    (folder,) = (Path(value) for key, value in given if key == "run")
    run, task = finished_run(folder)
    config: dict[str, Any] = run["config"]
    scorer = load_classifier(folder / "checkpoints" / "best.ckpt").scorer()
    canvas = Augment(**config["augment"]).canvas(scorer.preprocess.crop)
    data = Radiographs(TASKS[task.name], canvas, config["seed"], DataSettings(**config["data"]))
    measured, rng = OodMeasurement(scorer, data), np.random.default_rng(0)
    test = data.dataset("test")[range(len(data.dataset("test")))].x
    # The test split as grey levels, which the network's transforms have converted to floats.
    squares = (255 * scorer.preprocess.centre(test)).round().byte()[:, 0].cpu().numpy()
    print(f"\n### {folder.name}\n")
    print(
        f"Cut-offs for {100 * ALPHA} % a check from {len(data.dataset('val'))} validation images, fitted in "
        f"{measured.fitted_in:.0f} s of CPU to {len(data.dataset('train'))} training images. Python "
        f"{platform.python_version()}, torch {torch.__version__}, sklearn {sklearn.__version__}.\n"
    )
    print("| images | n | flagged, % (95 %) | " + " | ".join(REASONS) + " |\n|---|---:|---:|" + "---:|" * len(REASONS))
    print(measured.row("own test split", squares), flush=True)
    for path in (Path(value) for key, value in given if key == "manifest"):
        for name, pictures in radiographs(path, data.table).items():
            print(measured.row(name, measured.network_inputs(pictures)), flush=True)
    for name, changed in copies(squares, rng).items():
        print(measured.row(f"own test split, {name}", changed), flush=True)
    sets = others(rng)
    for path in (Path(value) for key, value in given if key == "folder"):
        sets[path.name] = list(_readable(files_below(path)))
    if config["data"]["kind"] != "phantom":
        sets["phantoms"] = phantoms()
    for name, pictures in sets.items():
        print(measured.row(name, measured.network_inputs(pictures)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
