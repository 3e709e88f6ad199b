"""Reasons not to trust a score: an image that is turned, inverted, no chest, or far from what the network learned from.

Four numbers of an image, each higher the stranger it is, are compared with cut-offs from the validation images:

- margin: a multinomial logistic regression on thumbnails tells training images from their own copies turned by 90, 180
  and 270 degrees and inverted, eight kinds; margin is by how much its logit of the likeliest other kind exceeds that of
  an upright one. Below 0 an image is never called turned.
- template and thumbnail: one minus the correlation of the thumbnail with the mean training thumbnail, and the distance
  of `_Gaussian` from the training thumbnails, both after the image was set upright as the regression says.
- embedding: that distance for the square root of the network's last feature maps' means (Mahalanobis distances in
  feature space: Lee et al. 2018; the root: no channel's large values drown the others').

Only weights, means and principal axes are kept, no image and no embedding.
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from covid_cls.data.datamodule import Radiographs, batch_loader
from covid_cls.data.dataset import OrderedBatches, RadiographDataset
from covid_cls.errors import InputError
from covid_cls.models.scorer import Scorer

REASONS = {
    "inverted": "its grey values look inverted: bone darker than lung",
    "rotated": "it looks turned by 90, 180 or 270 degrees",
    "unlike_a_chest_radiograph": "its coarse picture is unlike that of the training radiographs",
    "far_from_training": "the network's features of it are far from those of the training images",
}

Floats = NDArray[np.float64]

ALPHA = 0.005  # share of images like the training images that one check may flag: 2 % for the four together, at most
MOST = 1000  # images of a split that are looked at: with 500 it finds nearly as much
SIDE = 16  # of thumbnails: finds as much as 24 and 32, on images that are not sharp by the same measure
THUMBNAIL_AXES, EMBEDDING_AXES = 16, 64
PENALTY = 1e-3  # scikit-learn's C: 0.99 and more of turned radiographs are found from 1e-3 to 1e-2
_FLAT = 4  # grey levels: a thumbnail that varies less is not stretched to full contrast
_KINDS = tuple((inverted, turns) for inverted in (False, True) for turns in range(4))
_NEVER = float(np.finfo(np.float32).max)
_SMALLEST = 1e-9


class _Gaussian(NamedTuple):
    """Probabilistic PCA (Tipping and Bishop 1999): free variances along k axes, the same one in all other directions.

    mean: (D,). axes: (k, D), orthonormal. variances: (k + 1,), the last one that of all other directions.
    """

    mean: Floats
    axes: Floats
    variances: Floats

    @property
    def sound(self) -> bool:
        """Whether shapes fit and variances are variances."""
        fits = self.axes.ndim == 2 and self.mean.shape == self.axes.shape[1:]
        return fits and self.variances.shape == (len(self.axes) + 1,) and bool((self.variances > 0).all())

    def distance(self, x: Floats) -> Floats:
        """The logarithm of the squared Mahalanobis distance, (n,), of rows (n, D)."""
        centred = x - self.mean
        along = centred @ self.axes.T
        rest = np.maximum((centred**2).sum(axis=1) - (along**2).sum(axis=1), 0)
        return _log((along**2 / self.variances[:-1]).sum(axis=1) + rest / self.variances[-1])


class Screen:
    """The four checks, from the tensors of `fit_screen`. InputError where these are missing or do not fit together."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        try:
            self.crop = int(tensors["crop"])
            self.weight, self.bias, self.cuts = (
                _floats(tensors[name]) for name in ("kind.weight", "kind.bias", "cuts")
            )
            self.thumbnail, self.embedding = (
                _Gaussian(*(_floats(tensors[f"{name}.{part}"]) for part in _Gaussian._fields))
                for name in ("thumbnail", "embedding")
            )
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the model's screen lacks a tensor or has a damaged one ({error}); train it anew"
            ) from error
        kinds, pixels = len(_KINDS), SIDE * SIDE
        found = (self.weight.shape, self.bias.shape, self.cuts.shape, self.thumbnail.mean.shape)
        sound = found == ((kinds, pixels), (kinds,), (4,), (pixels,)) and self.crop >= SIDE
        if not (sound and self.thumbnail.sound and self.embedding.sound):
            raise InputError("the model's screen has tensors that do not fit together; train it anew")

    def reasons(self, canvases: NDArray[np.uint8], embeddings: NDArray[np.floating]) -> list[list[str]]:
        """Codes of `REASONS` for each image, none for an image that raises no doubt.

        canvases: uint8 (n, S, S), of which the middle square is looked at, as by the network; embeddings: (n, C), those
        of `Scorer.embed`. An image that is turned or inverted and no chest either way is only said to be no chest.
        """
        kinds, scores = self._scores(canvases, embeddings)
        over = ~(scores <= self.cuts)  # a score that is no number is flagged, too
        return [self._codes(_KINDS[kind], flags) for kind, flags in zip(kinds, over, strict=True)]

    def _codes(self, kind: tuple[bool, int], over: NDArray[np.bool_]) -> list[str]:
        turned, template, thumbnail, far = over.tolist()
        named = {
            "inverted": turned and kind[0],
            "rotated": turned and kind[1] > 0,
            "unlike_a_chest_radiograph": template or thumbnail,
            "far_from_training": far,
        }
        if named["unlike_a_chest_radiograph"]:  # which way up it is has no meaning then
            named |= {"inverted": False, "rotated": False}
        return [code for code, holds in named.items() if holds]

    def _scores(
        self, canvases: NDArray[np.uint8], embeddings: NDArray[np.floating]
    ) -> tuple[NDArray[np.int64], Floats]:
        """The likeliest of `_KINDS`, (n,), and margin, template, thumbnail and embedding as columns (n, 4)."""
        thumbnails = _thumbnails(canvases, self.crop)
        logits = thumbnails.reshape(len(thumbnails), -1) @ self.weight.T + self.bias
        margin = logits[:, 1:].max(axis=1) - logits[:, 0]
        kinds = np.where(margin > self.cuts[0], logits.argmax(axis=1), 0)
        found = zip(thumbnails, (_KINDS[kind] for kind in kinds), strict=True)
        upright = np.stack([_turned(one, inverted, -turns) for one, (inverted, turns) in found])
        rows = upright.reshape(len(upright), -1)
        template = self.thumbnail.mean / max(float(np.linalg.norm(self.thumbnail.mean)), _SMALLEST)
        unlike = _log(1 - rows @ template / SIDE)  # a standardised thumbnail has the norm SIDE
        far = self.embedding.distance(_root(embeddings))
        return kinds, np.stack([margin, unlike, self.thumbnail.distance(rows), far], axis=1)


def fit_screen(scorer: Scorer, data: Radiographs) -> dict[str, Tensor]:
    """The tensors that `Screen` is made of: a function of the network and of the split, and nothing else.

    Fitted to training images, cut-offs from validation images (see `cut_off`), at most `MOST` each; never from test.
    Embeddings are computed on the scorer's device.
    """
    train, embedded = _looked_at(scorer, data, "train")
    crop = scorer.preprocess.crop
    thumbnails = _thumbnails(train, crop)
    copies = np.concatenate([[_turned(one, *kind) for one in thumbnails] for kind in _KINDS])
    truth = np.repeat(np.arange(len(_KINDS)), len(thumbnails))
    kind = LogisticRegression(C=PENALTY, max_iter=1000).fit(copies.reshape(len(copies), -1), truth)
    tensors = {
        "crop": torch.tensor(crop),
        "kind.weight": _tensor(kind.coef_),
        "kind.bias": _tensor(kind.intercept_),
        "cuts": torch.full((4,), _NEVER, dtype=torch.float64),
        **_fit_gaussian("thumbnail", thumbnails.reshape(len(thumbnails), -1), THUMBNAIL_AXES),
        **_fit_gaussian("embedding", _root(embedded), EMBEDDING_AXES),
    }
    # With the cut-off of margins at its highest, validation images are taken as they lie, and so they are upright.
    _, scores = Screen(tensors)._scores(*_looked_at(scorer, data, "val"))
    cuts = np.array([cut_off(column) for column in scores.T])
    cuts[0] = max(cuts[0], 0)
    return tensors | {"cuts": torch.from_numpy(cuts)}  # not rounded: one of them may be an image's own score


def cut_off(scores: Floats, alpha: float = ALPHA) -> float:
    """What a new score of the kind of `scores` (n,) exceeds with probability `alpha`, or less often.

    The ceil((n + 1) (1 - alpha))-th smallest, which holds for any distribution (conformal prediction). Where there are
    too few scores for that, the upper prediction limit of a normal distribution (mean + t sd sqrt(1 + 1/n)), and at
    least the largest of them. From a single score nothing can be told, and no number exceeds the answer.
    """
    n = len(scores)
    rank = int(np.ceil((n + 1) * (1 - alpha)))
    if rank <= n:
        return float(np.sort(scores)[rank - 1])
    if n < 2:
        return _NEVER
    limit = scores.mean() + stats.t.ppf(1 - alpha, n - 1) * scores.std(ddof=1) * np.sqrt(1 + 1 / n)
    return float(max(limit, scores.max()))


@torch.inference_mode()
def _looked_at(scorer: Scorer, data: Radiographs, split: str) -> tuple[NDArray[np.uint8], Floats]:
    """Canvases (n, S, S) and embeddings (n, C) of a split, or of `MOST` of its images, always the same ones."""
    dataset = data.dataset(split)
    if len(dataset) > MOST:
        drawn = np.sort(np.random.default_rng(0).choice(len(dataset), MOST, replace=False))
        dataset = RadiographDataset(dataset.views, dataset.rows[drawn], dataset.labels[drawn])
    canvases, embeddings = [], []
    for batch in batch_loader(dataset, OrderedBatches(len(dataset), data.batch_size), data.workers):
        canvases.append(batch.x[:, 0].cpu().numpy())
        embeddings.append(scorer.embed(batch.x.to(scorer.device))[1].double().cpu().numpy())
    return np.concatenate(canvases), np.concatenate(embeddings)


def _thumbnails(canvases: NDArray[np.uint8], crop: int) -> Floats:
    """The middle squares as (n, SIDE, SIDE) of mean 0 and standard deviation 1, those without contrast near 0."""
    start = (canvases.shape[-1] - crop) // 2
    middle = np.ascontiguousarray(canvases[:, start : start + crop, start : start + crop])
    small = [cv2.resize(one, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for one in middle.astype(np.float32)]
    grey = np.stack(small).astype(np.float64)
    grey -= grey.mean(axis=(1, 2), keepdims=True)
    return np.asarray(grey / np.maximum(grey.std(axis=(1, 2), keepdims=True), _FLAT))


def _turned(thumbnail: Floats, inverted: bool, turns: int) -> Floats:
    """A standardised thumbnail, inverted if need be and turned by 90 degrees `turns` times."""
    return np.asarray(np.rot90(-thumbnail if inverted else thumbnail, turns))


def _fit_gaussian(name: str, rows: Floats, axes: int) -> dict[str, Tensor]:
    pca = PCA(min(axes, max(1, min(rows.shape) // 2)), svd_solver="full").fit(rows)
    variances = np.maximum([*pca.explained_variance_, pca.noise_variance_], _SMALLEST)
    return {
        f"{name}.mean": _tensor(pca.mean_),
        f"{name}.axes": _tensor(pca.components_),
        f"{name}.variances": _tensor(variances),
    }


def _root(embeddings: NDArray[np.floating]) -> Floats:
    values = embeddings.astype(np.float64)
    return np.asarray(np.sign(values) * np.sqrt(np.abs(values)))


def _log(x: Floats) -> Floats:
    return np.log(np.maximum(x, _SMALLEST))


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _floats(tensor: Tensor) -> Floats:
    return np.asarray(tensor.double().numpy())
