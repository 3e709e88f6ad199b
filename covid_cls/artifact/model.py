"""A model that a colleague can use without knowing how it was trained."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from covid_cls.artifact.files import read_artifact
from covid_cls.artifact.screen import Screen
from covid_cls.data.limits import BadImage
from covid_cls.data.readers import grey_of, read_image
from covid_cls.data.store import draw_on_canvas
from covid_cls.errors import InputError, listed
from covid_cls.evaluation.calibration import calibrated
from covid_cls.evaluation.metrics import decide
from covid_cls.evaluation.operating import decide_at
from covid_cls.models.scorer import Scorer
from covid_cls.records import MODEL

UNDECIDED = "undecided"
UNREADABLE = "unreadable"
Picture = str | Path | Image.Image | NDArray[np.uint8]


def load(path: str | Path, device: str = "auto") -> "Model":
    """The model in the folder `path`: outputs/<experiment>/<cell>/model, a copy of it, or the run's folder itself.

    device: auto (a GPU if there is one), cpu, cuda, cuda:1 … Digests and shapes are checked; nothing is executed and
    nothing downloaded. InputError, in one line, where the folder holds no sound model or its schema is not known.
    """
    folder = Path(path).expanduser()
    folder = folder / MODEL if (folder / MODEL).is_dir() else folder
    record, scorer, screen = read_artifact(folder)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        scorer = scorer.to(place)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise InputError(f"device={device}: not to be had ({str(error).partition(chr(10))[0]}); use auto") from error
    return Model(folder, record, scorer, Screen(screen))


class Model:
    """A network with its preprocessing, temperature, thresholds and doubts, from its files.

    record: what model.json holds. thresholds: of the calibrated p(covid), by name; None where validation gave none.
    The positive class is covid. Research use, not for diagnosis.
    """

    def __init__(self, folder: Path, record: dict[str, Any], scorer: Scorer, screen: Screen) -> None:
        self.folder, self.record, self.scorer, self.screen = folder, record, scorer, screen
        self.task = scorer.task
        self.temperature = float(record["operating"]["temperature"])
        self.thresholds: dict[str, float | None] = record["operating"]["thresholds"]

    @property
    def columns(self) -> list[str]:
        """What `score` says of an image, in order."""
        scores = [f"{kind}_{name}" for kind in ("logit", "prob", "calibrated") for name in self.task.classes]
        return [*scores, "decision", "reasons", "detail"]

    def predict(self, images: Iterable[Picture], threshold: str = "youden", batch_size: int = 32) -> pd.DataFrame:
        """A table with a row per image, in their order; an image that cannot be read has a row, too.

        images: paths, PIL images or uint8 arrays (H, W), 0 = black, of any size. Columns: image_id (the path as given,
        else the number), logit_<class>, prob_<class> (as in the run's predictions tables), calibrated_<class> (at the
        temperature fitted to validation), decision (a class, or "undecided" where there are reasons), reasons (codes of
        `artifact.stream.REASONS`, joined by ";") and detail (why a file cannot be read). threshold: see `cut`.
        """
        from covid_cls.artifact.stream import predict_pictures  # it needs this module

        named = (
            (str(k if isinstance(image, Image.Image | np.ndarray) else image), image) for k, image in enumerate(images)
        )
        parts = list(predict_pictures(self, named, threshold=threshold, batch_size=batch_size))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["image_id", *self.columns])

    def cut(self, threshold: str) -> float | None:
        """The threshold of that name; None for "argmax", which decides for the likeliest class. InputError else."""
        value = self.thresholds.get(threshold)
        if value is None and threshold != "argmax":
            names = [name for name, found in self.thresholds.items() if found is not None]
            raise InputError(f"threshold={threshold}: this model has {listed([*names, 'argmax'])}")
        return value

    def canvas(self, image: Picture) -> NDArray[np.uint8]:
        """The square (crop, crop) that the network sees of an image. Raises BadImage where it cannot be used."""
        if isinstance(image, Image.Image):
            grey = grey_of(image)
        elif isinstance(image, np.ndarray):
            grey = image
        else:
            grey = read_image(Path(image))
        if grey.ndim != 2 or grey.dtype != np.uint8:
            raise BadImage(f"an array of {grey.dtype} {grey.shape}: give uint8 (H, W), 0 = black")
        return draw_on_canvas(grey, self.scorer.preprocess.size, self.scorer.preprocess.crop)

    def score(self, canvases: NDArray[np.uint8], threshold: str = "youden") -> pd.DataFrame:
        """`columns` for squares uint8 (n, crop, crop) as `canvas` makes them, a row each; see `predict`."""
        with torch.inference_mode():
            batch = torch.from_numpy(canvases).unsqueeze(1).to(self.scorer.device)
            logits, embedding = self.scorer.embed(batch)
            prob = self.scorer.probabilities(logits).cpu().numpy()
        logit = logits.float().cpu().numpy()
        steady = calibrated(logit.astype(np.float64), self.temperature, self.task)
        cut = self.cut(threshold)
        chosen = decide(steady, self.task) if cut is None else decide_at(steady, cut, self.task)
        reasons = self.screen.reasons(canvases, embedding.float().cpu().numpy())
        decisions = [UNDECIDED if why else self.task.classes[k] for why, k in zip(reasons, chosen, strict=True)]
        table = pd.DataFrame(np.concatenate([logit, prob, steady], axis=1), columns=self.columns[:-3])
        return table.assign(decision=decisions, reasons=[";".join(why) for why in reasons], detail="")

    def unreadable(self, details: Sequence[str]) -> pd.DataFrame:
        """`columns` for images that cannot be read, a row each; detail: the reason in words."""
        table = pd.DataFrame(np.nan, index=range(len(details)), columns=self.columns[:-3])
        return table.assign(decision=UNDECIDED, reasons=UNREADABLE, detail=list(details))
