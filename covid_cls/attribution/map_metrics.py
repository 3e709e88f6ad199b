"""Metrics of attribution maps: per image, and summarised over a set of images."""

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from covid_cls.attribution.maps import Maps, Method, evaluating
from covid_cls.evaluation.intervals import (
    UNDEFINED,
    Interval,
    bootstrap_interval,
    difference_interval,
    patient_codes,
    patient_weights,
)
from covid_cls.evaluation.predictions import without_nan
from covid_cls.models.inference import Scorer
from covid_cls.models.transforms import Preprocess
from covid_cls.tasks import Task

Mask = NDArray[np.bool_]  # (crop, crop)
Map = NDArray[np.float32]  # (crop, crop)

# A map that is at least as similar to the maps of random weights is not published.
MAX_SIMILARITY = 0.5
# The smallest share of maps that must change with the weights; below it, no map is published.
_MIN_CHANGED = 0.9
# Places per side of the random maps that deletion is compared with: the size of ResNet's last maps for 224 pixels.
_COARSE = 7
# Standard deviation of the Gaussian as a share of the side: no opacity can be recognised behind it.
_BLUR = 1 / 16
# At 224 pixels an SSIM window of 11 sees almost no slope in maps that were enlarged from 7 x 7, so its constants
# dominate: unrelated maps have a similarity of 0.48 there (50 pairs of uniform noise), and of 0.06 at 32 pixels.
_SIMILARITY_SIDE = 32
_RESAMPLES = 2000


class MappedImage(NamedTuple):
    """An image whose map may be shown.

    Attributes:
        number: Its row in the table of results.
        row: That row.
        canvas: What the network sees, uint8 (crop, crop).
        heat: Its map.
        lungs: Its lung mask, if there is one.
    """

    number: int
    row: dict[str, Any]
    canvas: NDArray[np.uint8]
    heat: Map
    lungs: Mask | None


class MapMetrics(NamedTuple):
    """The metrics of one map; nan if the image has no mask, the map is 0 everywhere, or the metric was left out.

    Attributes:
        border: Share of the map in a frame of 3/32 of the side.
        lungs: Share of the map inside the lungs.
        lungs_area: Share of the image inside the lungs.
        similarity: Mean SSIM with the maps of random weights.
        deletion: Area under the deletion curve of Petsiuk et al. 2018, in [0, 1]. A low value means that the network
            needs the marked places.
        insertion: Area under the insertion curve, in [0, 1]; here a high value means that.
        random_deletion: `deletion` in the order of a random smooth map.
        random_insertion: `insertion` in that order.
    """

    border: float
    lungs: float
    lungs_area: float
    similarity: float
    deletion: float
    insertion: float
    random_deletion: float
    random_insertion: float

    @property
    def published(self) -> bool:
        """Return whether the map may be shown: it is not 0 everywhere, and it changes with the weights."""
        return self.similarity < MAX_SIMILARITY


def measure_maps(
    scorer: Scorer,
    randomised: Sequence[Scorer],
    method: Method,
    canvases: Tensor,
    targets: Tensor,
    masks: Sequence[Mask | None],
    steps: int = 10,
) -> tuple[Maps, list[MapMetrics]]:
    """Return maps (N, crop, crop) and their metrics. Those of an image do not depend on the others of its batch.

    Args:
        scorer: The trained network.
        randomised: Copies of it with random weights, see `randomise`.
        method: One of `maps.METHODS`.
        canvases: uint8 (N, 1, S, S).
        targets: Indices of the explained classes, int64 (N,).
        masks: The lungs in the network's view, (crop, crop) each.
        steps: Of the deletion and insertion curves; 0 leaves them out.
    """
    maps = method(scorer, canvases, targets)
    similar = similarity(maps, [method(other, canvases, targets) for other in randomised])
    frame = border(scorer.preprocess.crop)
    measured = []
    with evaluating(scorer), torch.no_grad():
        views = scorer.preprocess.centre(canvases.to(scorer.device))[:, 0]
        for k, (heat, mask) in enumerate(zip(maps, masks, strict=True)):
            # A seed from the pixels makes the curves of an image independent of its batch.
            seed = zlib.crc32(views[k].cpu().numpy().tobytes())
            curves = _curves(scorer, views[k], heat, int(targets[k]), steps, seed) if steps else [math.nan] * 4
            area = math.nan if mask is None else float(mask.mean())
            measured.append(MapMetrics(share(heat, frame), share(heat, mask), area, float(similar[k]), *curves))
    return maps, measured


def summarise_maps(table: pd.DataFrame, task: Task, crop: int, seed: int = 0) -> dict[str, Any]:
    """Return the means of the metrics over a set of images, ready for JSON (None instead of nan).

    Each mean is over the images that have the metric. Intervals are 95 %, from resampled patients.

    Args:
        table: A row per readable image: image_id, patient_id, target and the fields of `MapMetrics`.
        task: Of the network.
        crop: Side of the network's view in pixels.
        seed: Random seed of the resamples.

    Returns:
        - n_images, n_patients, n_maps: images, their patients, and images whose map is not 0 everywhere.
        - where: per explained class and for "all": `border` and `lungs`, each with share (of the map), area (share of
          the image, which a uniform map would have), times (share / area) and n.
        - curves: `deletion` and `insertion`, each with map, random (order) and their paired difference.
        - weights: similarity, changed (share of the maps below `MAX_SIMILARITY`), needed (of changed), and passed,
          which is None if there is no map.
    """
    mapped = table[table["similarity"].notna()]

    def mean(numbers: "pd.Series[float]", interval: Callable[..., Interval] = bootstrap_interval) -> dict[str, Any]:
        known = numbers.dropna()
        if known.empty:
            return UNDEFINED._asdict()
        values, patients = known.to_numpy(dtype=np.float64), patient_codes(table.loc[known.index])
        others = int(patients.max())
        replicates = np.empty(0)
        # A single patient cannot be resampled, and `patient_weights` would warn.
        if others:
            weights = patient_weights(np.zeros_like(patients), patients, _RESAMPLES, seed)
            replicates = weights @ values / weights.sum(axis=1)
        counts = {"n_patients": others + 1, "df": max(1, others)}
        return interval("share", task, float(values.mean()), replicates, **counts)._asdict()

    def compare(rows: pd.DataFrame, name: str, area: float) -> dict[str, Any]:
        found = mean(rows[name])
        times = found["value"] / area if area > 0 else math.nan
        return {"share": found, "area": area, "times": times, "n": int(rows[name].notna().sum())}

    groups = {"all": mapped, **{name: mapped[mapped["target"] == name] for name in task.classes}}
    frame = float(border(crop).mean())
    changed = (mapped["similarity"] < MAX_SIMILARITY).astype(float)
    record = {
        "n_images": len(table),
        "n_patients": len(np.unique(patient_codes(table))),
        "n_maps": len(mapped),
        "where": {
            name: {
                "border": compare(rows, "border", frame),
                "lungs": compare(rows, "lungs", float(rows["lungs_area"].mean())),
            }
            for name, rows in groups.items()
            if len(rows)
        },
        "curves": {
            name: {
                "map": mean(mapped[name]),
                "random": mean(mapped[f"random_{name}"]),
                "difference": mean(mapped[name] - mapped[f"random_{name}"], difference_interval),
            }
            for name in ("deletion", "insertion")
        },
        "weights": {
            "similarity": mean(mapped["similarity"], difference_interval),
            "changed": mean(changed),
            "needed": _MIN_CHANGED,
            "passed": bool(changed.mean() >= _MIN_CHANGED) if len(mapped) else None,
        },
    }
    return without_nan(record)


def share(heat: Map, mask: Mask | None) -> float:
    """Return the share of a map where `mask` is true; nan if there is no mask or the map is 0 everywhere."""
    total = float(heat.sum(dtype=np.float64))
    return math.nan if mask is None or total == 0 else float(heat[mask].sum(dtype=np.float64)) / total


def border(crop: int) -> Mask:
    """Return the frame that a network with preprocess.seen=border sees, (crop, crop)."""
    view = Preprocess(size=crop, crop=crop, mean=0, sd=1, seen="border")
    return np.asarray(view.normalise(torch.ones(1, 1, crop, crop))[0, 0].numpy() > 0)


def randomise(scorer: Scorer, seed: int) -> Scorer:
    """Return an independent copy of `scorer` with re-initialised weights, for the check of Adebayo et al. 2018.

    Convolutions are initialised as in He et al. 2015, which preserves the scale of activations, other layers by torch's
    defaults. Equal seeds give equal weights, and torch's global random state does not change.
    """
    # On the CPU, where a seed gives the same weights whatever the scorer's device.
    random = copy.deepcopy(scorer).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in random.net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
    return random.to(scorer.device)


def similarity(maps: Maps, others: Sequence[Maps]) -> NDArray[np.float64]:
    """Return the mean SSIM (Wang et al. 2004) of each map with its counterparts in `others`, shape (N,).

    Counterparts that are 0 everywhere are left out. If all are, the map depends on the weights, and its similarity is
    0. It is nan for a map that is 0 itself.
    """
    scores = np.array([_ssim(maps, other) for other in others])
    scores[[other.max(axis=(1, 2)) == 0 for other in others]] = np.nan
    compared = np.isfinite(scores).sum(axis=0)
    mean = np.divide(np.nansum(scores, axis=0), compared, out=np.zeros(len(maps)), where=compared > 0)
    return np.where(maps.max(axis=(1, 2)) > 0, mean, np.nan)


def _ssim(maps: Maps, others: Maps) -> NDArray[np.float64]:
    one, other = (F.adaptive_avg_pool2d(torch.from_numpy(m)[:, None], _SIMILARITY_SIDE) for m in (maps, others))
    similar = structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
    assert isinstance(similar, Tensor)
    return np.asarray(similar.reshape(-1).double().numpy())


def _curves(scorer: Scorer, view: Tensor, heat: Map, target: int, steps: int, seed: int) -> list[float]:
    """Return the areas under deletion and insertion in the order of the map, then in a random smooth order."""
    if heat.max() == 0:
        return [math.nan] * 4
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 1, _COARSE, _COARSE), dtype=np.float32))
    random = F.interpolate(coarse, view.shape, mode="bilinear")[0, 0].numpy()
    # Deletion replaces pixels by the mean grey; insertion restores them in a blurred image.
    grey = torch.full_like(view, scorer.preprocess.mean)
    blurred = torch.from_numpy(gaussian_filter(view.cpu().numpy(), _BLUR * len(view))).to(view.device)
    areas = []
    for order in (heat, random):
        ranks = _ranks(order, rng).to(view.device)
        areas += [_area(scorer, *pair, ranks, target, steps) for pair in ((view, grey), (blurred, view))]
    return areas


def _ranks(order: Map, rng: np.random.Generator) -> Tensor:
    """Return the share of pixels that come before each one, (crop, crop) in [0, 1): highest first, ties at random."""
    # A coarse map has many equal values; without the random key they would be ranked from top to bottom.
    ranks = np.empty(order.size, dtype=np.float32)
    ranks[np.lexsort((rng.random(order.size), -order.ravel()))] = np.arange(order.size) / order.size
    return torch.from_numpy(ranks.reshape(order.shape))


def _area(scorer: Scorer, before: Tensor, after: Tensor, ranks: Tensor, target: int, steps: int) -> float:
    """Return the area under the target's probability while the pixels of `before` are replaced in order of `ranks`."""
    shares = torch.arange(steps + 1, device=ranks.device) / steps
    views = torch.where(ranks < shares[:, None, None], after, before).unsqueeze(1)
    prob = scorer.probabilities(scorer.net(scorer.preprocess.normalise(views)))[:, target]
    return float(torch.trapezoid(prob, dx=1 / steps))
