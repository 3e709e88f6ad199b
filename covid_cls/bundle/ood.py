"""The out-of-distribution (OOD) check: is an image rotated, inverted, or unlike the training images?

Four scores of an image are compared with cut-offs from the validation images. A high score means an unusual image.

- margin: a multinomial logistic regression on thumbnails tells training images from their own copies that were rotated
  by 90, 180 and 270 degrees and inverted (eight orientations). The margin is the difference between the highest logit
  of the other orientations and the logit of the original one.
- template and thumbnail: one minus the correlation of the thumbnail with the mean training thumbnail, and the distance
  (see `_Gaussian`) of the thumbnail from the training thumbnails. The thumbnail is first rotated back by the predicted
  orientation.
- embedding: the same distance for the square root of the spatial mean of the network's last feature maps (Mahalanobis
  distance in feature space, Lee et al. 2018).

Only weights, means and principal axes are stored, no images and no embeddings.
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
from covid_cls.models.inference import Scorer

Floats = NDArray[np.float64]

# Raise it when `fit_ood` returns other tensors for the same network and images.
OOD_VERSION = 1
REASONS = {
    "inverted": "grey values look inverted: bones darker than lungs",
    "rotated": "looks rotated by 90, 180 or 270 degrees",
    "unlike_a_chest_radiograph": "coarse structure is unlike that of the training radiographs",
    "far_from_training": "network features are far from those of the training images",
}

# Share of normal images that one check may flag. Together, the four checks flag at most 2 %.
ALPHA = 0.005
# Images per split. With 500 images, almost as many unusual images are found.
MAX_IMAGES = 1000
# Thumbnails of 16 pixels find as many unusual images as those of 24 and 32 pixels, also among blurred images.
SIDE = 16
THUMBNAIL_AXES, EMBEDDING_AXES = 16, 64
# Inverse regularisation strength of scikit-learn. From 1e-3 to 1e-2, at least 99 % of rotated radiographs are found.
PENALTY = 1e-3
_MIN_CONTRAST = 4  # grey levels; a thumbnail with a lower standard deviation is not stretched to full contrast
_ORIENTATIONS = tuple((inverted, turns) for inverted in (False, True) for turns in range(4))
_NEVER = float(np.finfo(np.float32).max)
_TINY = 1e-9
_REMEDY = "copy the model folder again, or train the run again"


class _Gaussian(NamedTuple):
    """A normal distribution with k free variances and one common variance for all other directions.

    Probabilistic PCA (Tipping and Bishop 1999).

    Attributes:
        mean: Shape (D,).
        axes: Orthonormal directions with a free variance, (k, D).
        variances: Their variances and the common one, (k + 1,).
    """

    mean: Floats
    axes: Floats
    variances: Floats

    @property
    def valid(self) -> bool:
        """Return whether the shapes match and the variances are positive."""
        fits = self.axes.ndim == 2 and self.mean.shape == self.axes.shape[1:]
        return fits and self.variances.shape == (len(self.axes) + 1,) and bool((self.variances > 0).all())

    def distance(self, x: Floats) -> Floats:
        """Return the logarithm of the squared Mahalanobis distance, (n,), of rows (n, D)."""
        centred = x - self.mean
        along = centred @ self.axes.T
        rest = np.maximum((centred**2).sum(axis=1) - (along**2).sum(axis=1), 0)
        return _log((along**2 / self.variances[:-1]).sum(axis=1) + rest / self.variances[-1])


class OodDetector:
    """The four checks of an image."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Read the tensors of `fit_ood`.

        Raises:
            InputError: Tensors are missing or have inconsistent shapes.
        """
        try:
            self.crop = int(tensors["crop"])
            values = {name: np.asarray(tensor.double().numpy()) for name, tensor in tensors.items() if name != "crop"}
            self.weight, self.bias, self.cuts = (values[name] for name in ("kind.weight", "kind.bias", "cuts"))
            self.thumbnail, self.embedding = (
                _Gaussian(*(values[f"{name}.{part}"] for part in _Gaussian._fields))
                for name in ("thumbnail", "embedding")
            )
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"out-of-distribution check: tensor missing or damaged ({error}); {_REMEDY}") from error
        kinds, pixels = len(_ORIENTATIONS), SIDE * SIDE
        shapes = (self.weight.shape, self.bias.shape, self.cuts.shape, self.thumbnail.mean.shape)
        valid = shapes == ((kinds, pixels), (kinds,), (4,), (pixels,)) and self.crop >= SIDE
        if not (valid and self.thumbnail.valid and self.embedding.valid):
            raise InputError(f"out-of-distribution check: the shapes of its tensors do not match; {_REMEDY}")

    def reasons(self, canvases: NDArray[np.uint8], embeddings: NDArray[np.floating]) -> list[list[str]]:
        """Return the codes of `REASONS` for each image; none for a normal image.

        An image that is unlike a chest radiograph in every orientation is not called inverted or rotated.

        Args:
            canvases: uint8 (n, S, S). Only the central square is used, as by the network.
            embeddings: Embeddings from `Scorer.embed`, (n, channels).
        """
        kinds, scores = self._scores(canvases, embeddings)
        # Written so that nan is flagged.
        high = ~(scores <= self.cuts)
        found = []
        for (inverted, turns), (margin, template, thumbnail, far) in zip(
            (_ORIENTATIONS[kind] for kind in kinds), high.tolist(), strict=True
        ):
            unlike = template or thumbnail
            flags = (margin and inverted and not unlike, margin and turns > 0 and not unlike, unlike, far)
            found.append([code for code, flag in zip(REASONS, flags, strict=True) if flag])
        return found

    def _scores(
        self, canvases: NDArray[np.uint8], embeddings: NDArray[np.floating]
    ) -> tuple[NDArray[np.int64], Floats]:
        """Return the likeliest of `_ORIENTATIONS`, (n,), and margin, template, thumbnail and embedding, (n, 4)."""
        thumbnails = _thumbnails(canvases, self.crop)
        logits = thumbnails.reshape(len(thumbnails), -1) @ self.weight.T + self.bias
        margin = logits[:, 1:].max(axis=1) - logits[:, 0]
        kinds = np.where(margin > self.cuts[0], logits.argmax(axis=1), 0)
        pairs = zip(thumbnails, (_ORIENTATIONS[kind] for kind in kinds), strict=True)
        upright = np.stack([_rotate(one, inverted, -turns) for one, (inverted, turns) in pairs])
        rows = upright.reshape(len(upright), -1)
        # The mean of the distribution is the mean training thumbnail.
        template = self.thumbnail.mean / max(float(np.linalg.norm(self.thumbnail.mean)), _TINY)
        # A standardised thumbnail has the norm SIDE.
        unlike = _log(1 - rows @ template / SIDE)
        far = self.embedding.distance(_signed_root(embeddings))
        return kinds, np.stack([margin, unlike, self.thumbnail.distance(rows), far], axis=1)


def fit_ood(scorer: Scorer, data: Radiographs) -> dict[str, Tensor]:
    """Fit the out-of-distribution check of a network, and return its tensors for `OodDetector`.

    Distributions are fitted to at most `MAX_IMAGES` training images, cut-offs to as many validation images. The test
    split is not used. The result depends on the network and the split only.
    """
    train, embeddings = _sample(scorer, data, "train")
    crop = scorer.preprocess.crop
    thumbnails = _thumbnails(train, crop)
    copies = np.concatenate([[_rotate(one, *orientation) for one in thumbnails] for orientation in _ORIENTATIONS])
    truth = np.repeat(np.arange(len(_ORIENTATIONS)), len(thumbnails))
    model = LogisticRegression(C=PENALTY, max_iter=1000).fit(copies.reshape(len(copies), -1), truth)
    tensors = {
        "crop": torch.tensor(crop),
        "kind.weight": _tensor(model.coef_),
        "kind.bias": _tensor(model.intercept_),
        "cuts": torch.full((4,), _NEVER, dtype=torch.float64),
        **_fit_gaussian("thumbnail", thumbnails.reshape(len(thumbnails), -1), THUMBNAIL_AXES),
        **_fit_gaussian("embedding", _signed_root(embeddings), EMBEDDING_AXES),
    }
    # With this highest cut-off of the margin, no validation image is rotated back, which is right for them.
    _, scores = OodDetector(tensors)._scores(*_sample(scorer, data, "val"))
    cuts = np.array([fit_cut_off(column) for column in scores.T])
    # Below a margin of 0 the original orientation is the likeliest, so the image must not be called rotated.
    cuts[0] = max(cuts[0], 0)
    # Not rounded to float32, because a cut-off can be equal to the score of an image.
    return tensors | {"cuts": torch.from_numpy(cuts)}


def fit_cut_off(scores: Floats, alpha: float = ALPHA) -> float:
    """Return a value that a new score exceeds with a probability of at most `alpha`.

    The ceil((n + 1) (1 - alpha))-th smallest score, which is valid for any distribution (split conformal prediction).
    If n is too small for that, the upper prediction limit of a normal distribution, mean + t sd sqrt(1 + 1/n), but at
    least the largest score. For a single score, a value that no score exceeds.

    Args:
        scores: Scores of exchangeable images, (n,).
        alpha: Accepted share of false alarms.
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
def _sample(scorer: Scorer, data: Radiographs, split: str) -> tuple[NDArray[np.uint8], Floats]:
    """Return canvases (n, S, S) and embeddings (n, channels) of a split, or of the same `MAX_IMAGES` of its images."""
    dataset = data.dataset(split)
    if len(dataset) > MAX_IMAGES:
        # A fixed seed, so that the fit is reproducible. Sorted, so that rows are read in the order of the file.
        chosen = np.sort(np.random.default_rng(0).choice(len(dataset), MAX_IMAGES, replace=False))
        dataset = RadiographDataset(dataset.views, dataset.rows[chosen], dataset.labels[chosen])
    canvases, embeddings = [], []
    for batch in batch_loader(dataset, OrderedBatches(len(dataset), data.batch_size), data.workers):
        canvases.append(batch.x[:, 0].cpu().numpy())
        embeddings.append(scorer.embed(batch.x.to(scorer.device))[1].double().cpu().numpy())
    return np.concatenate(canvases), np.concatenate(embeddings)


def _thumbnails(canvases: NDArray[np.uint8], crop: int) -> Floats:
    """Return the central squares as thumbnails of mean 0 and standard deviation 1, (n, SIDE, SIDE)."""
    start = (canvases.shape[-1] - crop) // 2
    middle = np.ascontiguousarray(canvases[:, start : start + crop, start : start + crop])
    small = [cv2.resize(one, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for one in middle.astype(np.float32)]
    grey = np.stack(small).astype(np.float64)
    # Standardised, so that brightness and contrast of an image do not matter.
    grey -= grey.mean(axis=(1, 2), keepdims=True)
    return np.asarray(grey / np.maximum(grey.std(axis=(1, 2), keepdims=True), _MIN_CONTRAST))


def _rotate(thumbnail: Floats, inverted: bool, turns: int) -> Floats:
    return np.asarray(np.rot90(-thumbnail if inverted else thumbnail, turns))


def _fit_gaussian(name: str, rows: Floats, axes: int) -> dict[str, Tensor]:
    # Few images leave at least half of the dimensions to the common variance. The full solver is deterministic.
    pca = PCA(min(axes, max(1, min(rows.shape) // 2)), svd_solver="full").fit(rows)
    variances = np.maximum([*pca.explained_variance_, pca.noise_variance_], _TINY)
    values = _Gaussian(pca.mean_, pca.components_, variances)
    return {f"{name}.{part}": _tensor(value) for part, value in values._asdict().items()}


def _signed_root(embeddings: NDArray[np.floating]) -> Floats:
    # Without the root, a few channels with large values would dominate the distance.
    values = embeddings.astype(np.float64)
    return np.asarray(np.sign(values) * np.sqrt(np.abs(values)))


def _log(x: Floats) -> Floats:
    return np.log(np.maximum(x, _TINY))


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
