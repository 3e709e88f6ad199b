"""Images on their way to a table: decoded by threads ahead of the network, scored a batch at a time, in order."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from covid_cls.artifact import screen
from covid_cls.artifact.model import UNDECIDED, UNREADABLE, Model, Picture
from covid_cls.data import header
from covid_cls.data.limits import BadImage
from covid_cls.errors import InputError, listed
from covid_cls.machine import cores

REASONS = {UNREADABLE: "the file cannot be read as a radiograph", **screen.REASONS, **header.REASONS}
_NAMED = 10  # unreadable images on the console
_AHEAD = 3  # batches that wait for the network: the memory that is in use does not grow with the number of images


class _Look(NamedTuple):
    """What a thread found out about an image: its canvas, or the fault; codes of `header.REASONS`; DICOM tags."""

    canvas: NDArray[np.uint8] | None
    fault: str
    codes: list[str]
    tags: dict[str, str]


def predict_pictures(
    model: Model,
    named: Iterable[tuple[str, Picture]],
    *,
    threshold: str = "youden",
    batch_size: int = 32,
    dicom_tags: Sequence[str] = (),
) -> Iterator[pd.DataFrame]:
    """Tables with a row per (image_id, image) of `named`, in its order, of at most `batch_size` rows each.

    Columns: image_id, those of `Model.columns`, then `dicom_tags`, which hold the text of these tags of a DICOM file
    and are "" for others. Memory does not grow with the number of images. InputError where an option is out of range.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: must be at least 1")
    model.cut(threshold)
    if dicom_tags:
        header.check_tags(dicom_tags)
    return _tables(model, iter(named), threshold, batch_size, dicom_tags)


def _tables(
    model: Model, named: Iterator[tuple[str, Picture]], threshold: str, batch_size: int, tags: Sequence[str]
) -> Iterator[pd.DataFrame]:
    waiting: deque[tuple[list[str], list[Future[_Look]]]] = deque()
    pool = ThreadPoolExecutor(cores())
    try:
        while True:
            while len(waiting) < _AHEAD and (batch := list(islice(named, batch_size))):
                jobs = [pool.submit(_look, model, picture, tags) for _, picture in batch]
                waiting.append(([name for name, _ in batch], jobs))
            if not waiting:
                return
            names, jobs = waiting.popleft()
            looks = [job.result() for job in jobs]
            table = _scored(model, looks, threshold)
            table.insert(0, "image_id", names)
            yield table.assign(**{tag: [look.tags.get(tag, "") for look in looks] for tag in tags})
    finally:
        pool.shutdown(cancel_futures=True)


def _look(model: Model, picture: Picture, tags: Sequence[str]) -> _Look:
    try:
        canvas = model.canvas(picture)
    except BadImage as error:
        return _Look(None, str(error), [], {})
    codes, texts = header.read_header(Path(picture), tags) if isinstance(picture, str | Path) else ([], {})
    return _Look(canvas, "", codes, texts)


def _scored(model: Model, looks: Sequence[_Look], threshold: str) -> pd.DataFrame:
    """`Model.columns` for one batch, a row per look."""
    bad = [row for row, look in enumerate(looks) if look.canvas is None]
    good = [row for row, look in enumerate(looks) if look.canvas is not None]
    parts = []
    if bad:
        parts.append(model.unreadable([looks[row].fault for row in bad]).set_index(pd.Index(bad)))
    if good:
        canvases = np.stack([look.canvas for look in looks if look.canvas is not None])
        scored = model.score(canvases, threshold).set_index(pd.Index(good))
        said = [[code, *looks[row].codes] for row, code in zip(good, scored["reasons"], strict=True)]
        scored["reasons"] = [";".join(filter(None, codes)) for codes in said]
        scored.loc[scored["reasons"] != "", "decision"] = UNDECIDED
        parts.append(scored)
    return pd.concat(parts).sort_index()


class Tally:
    """What the tables of a stream add up to, for the console."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.images = 0
        self.decisions = Counter(dict.fromkeys([*classes, UNDECIDED], 0))
        self.reasons: Counter[str] = Counter()
        self.faults: list[str] = []  # of the first few unreadable images, each with its name

    def add(self, table: pd.DataFrame) -> None:
        """Count one more table."""
        self.images += len(table)
        self.decisions.update(table["decision"])
        self.reasons.update(code for codes in table["reasons"] if codes for code in codes.split(";"))
        bad = table[table["reasons"] == UNREADABLE]
        self.faults += [f"{_shown(name)}: {why}" for name, why in zip(bad["image_id"], bad["detail"], strict=True)]
        del self.faults[_NAMED:]

    @property
    def readable(self) -> int:
        """How many images could be read."""
        return self.images - self.reasons[UNREADABLE]

    def lines(self, meanings: Mapping[str, str]) -> list[str]:
        """The counts of decisions and of reasons, and the first unreadable images, as text."""
        lines = [f"{self.images} images: {listed([f'{n} {name}' for name, n in self.decisions.items()])}"]
        if self.reasons:
            width = max(map(len, self.reasons))
            lines.append("undecided, by reason (an image may have several)")
            lines += [f"  {n:>6} {code:<{width}}  {meanings.get(code, '')}" for code, n in self.reasons.most_common()]
        if self.faults:
            lines.append("unreadable")
            lines += [f"  {fault}" for fault in self.faults]
        if self.reasons[UNREADABLE] > len(self.faults):
            lines.append(f"  … and {self.reasons[UNREADABLE] - len(self.faults)} more; see the column detail")
        return lines


def _shown(name: str) -> str:
    """A file's name for the console, whose control characters cannot act on a terminal."""
    return name if name.isprintable() else ascii(name)
