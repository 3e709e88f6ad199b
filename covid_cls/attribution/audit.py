"""What a map is worth, in numbers: where it lies, what hiding its places does, whether it needs the trained weights."""

import copy
import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from covid_cls.attribution.maps import Maps, Method, evaluating
from covid_cls.models.scorer import Scorer
from covid_cls.models.transforms import Preprocess

Mask = NDArray[np.bool_]  # (crop, crop)
Map = NDArray[np.float32]  # (crop, crop)

SURVIVES = 0.5  # a map as similar as this to the maps of random weights is not published
_COARSE = 7  # places a side of the random maps that deletion is compared with: what ResNet leaves of 224 pixels
_BLUR = 1 / 16  # of the side: the Gaussian's standard deviation, at which no opacity can be told
_SIMILARITY_SIDE = 32


class Measures(NamedTuple):
    """The numbers of one map; nan where the image has no mask, or the map no positive place, or where left out.

    border: share of the map in a frame of 3/32 of the side. lungs, lungs_area: shares of the map and of the picture
    inside the lungs. similarity: mean SSIM with the maps of random weights. deletion, insertion: areas under the curves
    of Petsiuk et al. 2018, in [0, 1]; low deletion and high insertion mean that the network needs the places marked.
    random_…: the same where a random smooth map gives the order.
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
        """Whether the map may be shown: there is one, and it changes with the weights."""
        return self.similarity < SURVIVES


def measure(
    scorer: Scorer,
    randomised: Sequence[Scorer],
    method: Method,
    canvases: Tensor,
    targets: Tensor,
    masks: Sequence[Mask | None],
    steps: int = 10,
) -> tuple[Maps, list[Measures]]:
    """Maps (N, crop, crop) and `Measures` of canvases, uint8 (N, 1, S, S), for classes `targets`, int64 (N,).

    randomised: see `randomise`. masks: the lungs as the network's crop shows them. steps: of the deletion and insertion
    curves; 0 leaves them out. An image's numbers depend on the image alone, not on its batch.
    """
    maps = method(scorer, canvases, targets)
    similar = similarity(maps, [method(other, canvases, targets) for other in randomised])
    frame = border(scorer.preprocess.crop)
    measured = []
    with evaluating(scorer), torch.no_grad():
        views = scorer.preprocess.centre(canvases.to(scorer.device))[:, 0]
        for k, (heat, mask) in enumerate(zip(maps, masks, strict=True)):
            seed = zlib.crc32(views[k].cpu().numpy().tobytes())
            curves = _curves(scorer, views[k], heat, int(targets[k]), steps, seed) if steps else [math.nan] * 4
            area = math.nan if mask is None else float(mask.mean())
            measured.append(Measures(share(heat, frame), share(heat, mask), area, float(similar[k]), *curves))
    return maps, measured


def share(heat: Map, mask: Mask | None) -> float:
    """The share of a map that lies where `mask` is true; nan without a mask or for a map that is 0."""
    total = float(heat.sum(dtype=np.float64))
    return math.nan if mask is None or total == 0 else float(heat[mask].sum(dtype=np.float64)) / total


def border(crop: int) -> Mask:
    """The frame that a network trained with preprocess.seen=border sees, of a square of `crop` pixels."""
    view = Preprocess(size=crop, crop=crop, mean=0, sd=1, seen="border")
    return np.asarray(view.normalise(torch.ones(1, 1, crop, crop))[0, 0].numpy() > 0)


def randomise(scorer: Scorer, seed: int) -> Scorer:
    """An independent copy of `scorer` with all weights drawn anew, for the check of Adebayo et al. 2018.

    Convolutions as He et al. 2015, so that activations keep their scale through the layers; others by torch's defaults.
    Batch norms start from zero mean and unit variance. Same seed, same weights; torch's random state is left as it is.
    """
    drawn = copy.deepcopy(scorer).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in drawn.net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
    return drawn.to(scorer.device)


def similarity(maps: Maps, others: Sequence[Maps]) -> NDArray[np.float64]:
    """The mean SSIM (Wang et al. 2004) of each map with its counterparts in `others`, (N,).

    Counterparts that are 0 everywhere are left out; where all are, the map has vanished with the weights, and the
    similarity is 0. nan for a map that is 0 itself.
    """
    scores = np.array([_ssim(maps, other) for other in others])
    scores[[other.max(axis=(1, 2)) == 0 for other in others]] = np.nan
    drawn = np.isfinite(scores).sum(axis=0)
    mean = np.divide(np.nansum(scores, axis=0), drawn, out=np.zeros(len(maps)), where=drawn > 0)
    return np.where(maps.max(axis=(1, 2)) > 0, mean, np.nan)


def _ssim(maps: Maps, others: Maps) -> NDArray[np.float64]:
    # At 224 pixels a window of 11 sees next to nothing of maps that were drawn up from 7 x 7: unrelated ones are 0.48
    # alike there (50 pairs of uniform noise), for SSIM's constants outweigh their slopes; at 32 pixels 0.06.
    one, other = (F.adaptive_avg_pool2d(torch.from_numpy(m)[:, None], _SIMILARITY_SIDE) for m in (maps, others))
    alike = structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
    assert isinstance(alike, Tensor)
    return np.asarray(alike.reshape(-1).double().numpy())


def _curves(scorer: Scorer, view: Tensor, heat: Map, target: int, steps: int, seed: int) -> list[float]:
    """Areas under deletion and insertion in the map's order, then in that of a random smooth map; nan for no map."""
    if heat.max() == 0:
        return [math.nan] * 4
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 1, _COARSE, _COARSE), dtype=np.float32))
    random = F.interpolate(coarse, view.shape, mode="bilinear")[0, 0].numpy()
    grey = torch.full_like(view, scorer.preprocess.mean)
    blurred = torch.from_numpy(gaussian_filter(view.cpu().numpy(), _BLUR * len(view))).to(view.device)
    areas = []
    for order in (heat, random):
        ranks = _ranks(order, rng).to(view.device)
        areas += [_area(scorer, *pair, ranks, target, steps) for pair in ((view, grey), (blurred, view))]
    return areas


def _ranks(order: Map, rng: np.random.Generator) -> Tensor:
    """The share of the pixels that come before each one, (crop, crop) in [0, 1), the highest first, ties by lot."""
    ranks = np.empty(order.size, dtype=np.float32)
    ranks[np.lexsort((rng.random(order.size), -order.ravel()))] = np.arange(order.size) / order.size
    return torch.from_numpy(ranks.reshape(order.shape))


def _area(scorer: Scorer, before: Tensor, after: Tensor, ranks: Tensor, target: int, steps: int) -> float:
    """The area under the target's probability while `before` turns into `after`, the first ranks first."""
    shares = torch.arange(steps + 1, device=ranks.device) / steps
    views = torch.where(ranks < shares[:, None, None], after, before).unsqueeze(1)
    prob = scorer.probabilities(scorer.net(scorer.preprocess.normalise(views)))[:, target]
    return float(torch.trapezoid(prob, dx=1 / steps))
