"""A model that is loaded from its folder, and its predictions for image files."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from covid_cls.bundle import ood
from covid_cls.bundle.files import read_model_folder
from covid_cls.bundle.ood import OodDetector
from covid_cls.data.limits import BadImage
from covid_cls.data.readers import HEADER_REASONS, grey_of, read_header, read_image
from covid_cls.data.store import draw_on_canvas
from covid_cls.errors import InputError, listed
from covid_cls.evaluation.calibration import calibrated
from covid_cls.evaluation.metrics import decide
from covid_cls.evaluation.thresholds import decide_at
from covid_cls.io import MODEL
from covid_cls.models.inference import Scorer
from covid_cls.system import cores

UNDECIDED = "undecided"
UNREADABLE = "unreadable"
REASONS = {UNREADABLE: "file cannot be read as a radiograph", **ood.REASONS, **HEADER_REASONS}
# Batches that are decoded in advance. The limit keeps the memory independent of the number of images.
_BATCHES_AHEAD = 3
_MAX_LISTED = 10  # unreadable images on the console
Picture = str | Path | Image.Image | NDArray[np.uint8]


class _Decoded(NamedTuple):
    """An image before it is scored.

    Attributes:
        canvas: The square that the network gets; None if the image is unreadable.
        fault: Why it is unreadable.
        codes: Codes of `HEADER_REASONS` from the DICOM header.
        tags: Values of the requested DICOM tags.
    """

    canvas: NDArray[np.uint8] | None
    fault: str
    codes: list[str]
    tags: dict[str, str]


def load(path: str | Path, device: str = "auto") -> "Model":
    """Load a model. Its digests and shapes are checked; nothing is executed or downloaded.

    Args:
        path: A model folder, or the run folder that contains it.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" and so on.

    Raises:
        InputError: The folder has no valid model, or the device is not available.
    """
    folder = Path(path).expanduser()
    # A run folder contains its model folder.
    folder = folder / MODEL if (folder / MODEL).is_dir() else folder
    record, scorer, tensors = read_model_folder(folder)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        scorer = scorer.to(place)
    # A torch without CUDA raises an AssertionError.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device={device}: not available ({reason}). Use device=auto.") from error
    return Model(folder, record, scorer, OodDetector(tensors))


class Model:
    """A trained network with its preprocessing, temperature, thresholds and out-of-distribution check.

    The positive class is covid. For research, not for diagnosis.

    Attributes:
        folder: The model folder.
        record: The content of model.json.
        scorer: The network with its preprocessing.
        ood: The out-of-distribution check.
        task: The classes.
        temperature: Divisor of the logits for calibrated probabilities.
        thresholds: Named thresholds of the calibrated p(covid); None where the validation split determines none.
    """

    def __init__(self, folder: Path, record: dict[str, Any], scorer: Scorer, detector: OodDetector) -> None:
        self.folder, self.record, self.scorer, self.ood = folder, record, scorer, detector
        self.task = scorer.task
        self.temperature = float(record["operating"]["temperature"])
        self.thresholds: dict[str, float | None] = record["operating"]["thresholds"]

    @property
    def columns(self) -> list[str]:
        """Return the columns that `score` returns, in order."""
        scores = [f"{kind}_{name}" for kind in ("logit", "prob", "calibrated") for name in self.task.classes]
        return [*scores, "decision", "reasons", "detail"]

    def predict(self, images: Iterable[Picture], threshold: str = "youden", batch_size: int = 32) -> pd.DataFrame:
        """Return a table with a row per image, in their order, also for unreadable images.

        Args:
            images: Paths, PIL images or uint8 arrays (H, W), 0 = black, of any size.
            threshold: Name of a threshold, see `resolve_threshold`.
            batch_size: Images per batch.

        Returns:
            Columns: image_id (the path, or the number of the image), logit_<class>, prob_<class> (as in the run's
            predictions tables), calibrated_<class> (at the temperature of the validation split), decision (a class, or
            "undecided" if there are reasons), reasons (codes of `REASONS`, joined by ";") and detail (why a file is
            unreadable).
        """
        # PIL images and arrays have no path.
        named = (
            (str(k if isinstance(image, Image.Image | np.ndarray) else image), image) for k, image in enumerate(images)
        )
        parts = list(predict_images(self, named, threshold=threshold, batch_size=batch_size))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["image_id", *self.columns])

    def resolve_threshold(self, name: str) -> float | None:
        """Return the value of a threshold; None for "argmax", which decides for the likeliest class.

        Raises:
            InputError: The model has no threshold of this name.
        """
        value = self.thresholds.get(name)
        if value is None and name != "argmax":
            names = [known for known, found in self.thresholds.items() if found is not None]
            raise InputError(f"threshold={name}: unknown. This model has {listed([*names, 'argmax'])}.")
        return value

    def canvas(self, image: Picture) -> NDArray[np.uint8]:
        """Return the square (crop, crop) of an image that the network gets. Raises BadImage if it is unusable."""
        if isinstance(image, Image.Image):
            grey = grey_of(image)
        else:
            grey = image if isinstance(image, np.ndarray) else read_image(Path(image))
        if grey.ndim != 2 or grey.dtype != np.uint8:
            raise BadImage(f"an array of {grey.dtype} {grey.shape}: give uint8 (H, W), 0 = black")
        return draw_on_canvas(grey, self.scorer.preprocess.size, self.scorer.preprocess.crop)

    def score(self, canvases: NDArray[np.uint8], threshold: str = "youden") -> pd.DataFrame:
        """Return a table of `columns` with a row per square, uint8 (n, crop, crop), from `canvas`; see `predict`."""
        with torch.inference_mode():
            batch = torch.from_numpy(canvases).unsqueeze(1).to(self.scorer.device)
            logits, embedding = self.scorer.embed(batch)
            prob = self.scorer.probabilities(logits).cpu().numpy()
        logit = logits.float().cpu().numpy()
        # In float64, as by `evaluate`, so that both make the same decisions.
        scaled = calibrated(logit.astype(np.float64), self.temperature, self.task)
        cut = self.resolve_threshold(threshold)
        chosen = decide(scaled, self.task) if cut is None else decide_at(scaled, cut, self.task)
        reasons = self.ood.reasons(canvases, embedding.float().cpu().numpy())
        decisions = [UNDECIDED if codes else self.task.classes[k] for codes, k in zip(reasons, chosen, strict=True)]
        table = pd.DataFrame(np.concatenate([logit, prob, scaled], axis=1), columns=self.columns[:-3])
        return table.assign(decision=decisions, reasons=[";".join(codes) for codes in reasons], detail="")


def predict_images(
    model: Model,
    named: Iterable[tuple[str, Picture]],
    *,
    threshold: str = "youden",
    batch_size: int = 32,
    dicom_tags: Sequence[str] = (),
) -> Iterator[pd.DataFrame]:
    """Yield tables with a row per image, of at most `batch_size` rows each. Memory does not grow with their number.

    Args:
        model: The model.
        named: Pairs of an image_id and an image.
        threshold: Name of a threshold, see `Model.resolve_threshold`.
        batch_size: Images per batch.
        dicom_tags: Keywords of DICOM tags; their values become columns, "" for other files.

    Yields:
        Tables with the columns image_id, those of `Model.columns`, and `dicom_tags`.

    Raises:
        InputError: An option is out of range. This is checked before the first image is read.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: must be at least 1")
    model.resolve_threshold(threshold)
    if dicom_tags:
        # Imported here, because a folder of PNG files does not need pydicom.
        from covid_cls.data.dicom import check_tags

        check_tags(dicom_tags)
    return _tables(model, iter(named), threshold, batch_size, dicom_tags)


def _tables(
    model: Model, named: Iterator[tuple[str, Picture]], threshold: str, batch_size: int, tags: Sequence[str]
) -> Iterator[pd.DataFrame]:
    # Threads decode the next batches while the network scores the current one.
    waiting: deque[tuple[list[str], list[Future[_Decoded]]]] = deque()
    pool = ThreadPoolExecutor(cores())
    try:
        while True:
            while len(waiting) < _BATCHES_AHEAD and (batch := list(islice(named, batch_size))):
                jobs = [pool.submit(_decode, model, picture, tags) for _, picture in batch]
                waiting.append(([name for name, _ in batch], jobs))
            if not waiting:
                return
            names, jobs = waiting.popleft()
            decoded = [job.result() for job in jobs]
            table = _score_batch(model, decoded, threshold)
            table.insert(0, "image_id", names)
            yield table.assign(**{tag: [one.tags.get(tag, "") for one in decoded] for tag in tags})
    # Without this, Ctrl-C would wait until all submitted images are decoded.
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(model: Model, picture: Picture, tags: Sequence[str]) -> _Decoded:
    try:
        canvas = model.canvas(picture)
    except BadImage as error:
        return _Decoded(None, str(error), [], {})
    codes, texts = read_header(Path(picture), tags) if isinstance(picture, str | Path) else ([], {})
    return _Decoded(canvas, "", codes, texts)


def _score_batch(model: Model, decoded: Sequence[_Decoded], threshold: str) -> pd.DataFrame:
    canvases = {row: one.canvas for row, one in enumerate(decoded) if one.canvas is not None}
    bad = [row for row in range(len(decoded)) if row not in canvases]
    table = pd.DataFrame(np.nan, index=bad, columns=model.columns[:-3]).assign(
        decision=UNDECIDED, reasons=UNREADABLE, detail=[decoded[row].fault for row in bad]
    )
    if not canvases:
        return table
    scored = model.score(np.stack(list(canvases.values())), threshold).set_index(pd.Index(list(canvases)))
    # A reason from the DICOM header makes an image undecided as well.
    codes = [[code, *decoded[row].codes] for row, code in zip(canvases, scored["reasons"], strict=True)]
    scored["reasons"] = [";".join(filter(None, found)) for found in codes]
    scored.loc[scored["reasons"] != "", "decision"] = UNDECIDED
    return pd.concat([table, scored]).sort_index() if bad else scored


class PredictionSummary:
    """Counts over the tables of `predict_images`, for the console.

    Attributes:
        images: Number of images.
        decisions: Number of images per decision.
        reasons: Number of images per reason code.
        faults: The first unreadable images, each with the reason.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.images = 0
        self.decisions = Counter(dict.fromkeys([*classes, UNDECIDED], 0))
        self.reasons: Counter[str] = Counter()
        self.faults: list[str] = []

    def add(self, table: pd.DataFrame) -> None:
        """Count the images of one more table."""
        self.images += len(table)
        self.decisions.update(table["decision"])
        self.reasons.update(code for codes in table["reasons"] if codes for code in codes.split(";"))
        bad = table[table["reasons"] == UNREADABLE]
        # Control characters in a file name must not reach the terminal.
        names = [name if name.isprintable() else ascii(name) for name in bad["image_id"]]
        self.faults += [f"{name}: {why}" for name, why in zip(names, bad["detail"], strict=True)]
        del self.faults[_MAX_LISTED:]

    @property
    def readable(self) -> int:
        """Return the number of readable images."""
        return self.images - self.reasons[UNREADABLE]

    def lines(self, meanings: Mapping[str, str]) -> list[str]:
        """Return the counts and the first unreadable images as lines of text.

        Args:
            meanings: The meaning of each reason code.
        """
        lines = [f"{self.images} images: {listed([f'{n} {name}' for name, n in self.decisions.items()])}"]
        if self.reasons:
            width = max(map(len, self.reasons))
            lines.append("undecided, by reason (an image may have several)")
            lines += [f"  {n:>6} {code:<{width}}  {meanings.get(code, '')}" for code, n in self.reasons.most_common()]
        if self.faults:
            lines += ["unreadable", *(f"  {fault}" for fault in self.faults)]
        if self.reasons[UNREADABLE] > len(self.faults):
            lines.append(f"  … and {self.reasons[UNREADABLE] - len(self.faults)} more; see the column detail")
        return lines
