"""What happens to pixels on the device: random views for training, one fixed view for evaluation."""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from covid_cls.errors import InputError

VIEWS = ("whole", "border", "centre", "lungs_blurred")
_FRAME = 3 / 32  # of the side: the six pixels of a 64-pixel thumbnail that the frame probe of audits reads


class Augment(nn.Module):
    """Random views of canvases: one affine resampling per image, then contrast.

    rotation: degrees, drawn from ±rotation. shift: share of the crop's side, each axis. scale: the image is drawn
    1 ± scale times as large. mirror: probability of swapping left and right (a heart has a side: this makes an
    anatomy that hardly exists). contrast: factor 1 ± contrast about mid-grey. All zero: no augmentation.

    An image's draw depends on (seed, epoch, index) alone, so results do not depend on workers, on the rest of the
    batch, on the device or on a resume.
    """

    def __init__(
        self,
        name: str = "none",
        rotation: float = 0.0,
        shift: float = 0.0,
        scale: float = 0.0,
        mirror: float = 0.0,
        contrast: float = 0.0,
    ) -> None:
        super().__init__()
        for key, value, low, high in (
            ("rotation", rotation, 0, 45),
            ("shift", shift, 0, 0.5),
            ("scale", scale, 0, 0.5),
            ("mirror", mirror, 0, 1),
            ("contrast", contrast, 0, 1),
        ):
            if not low <= value <= high:
                raise InputError(f"augment.{key}={value}: must lie in [{low}, {high}]")
        self.name = name
        self.rotation, self.shift, self.scale = rotation, shift, scale
        self.mirror, self.contrast = mirror, contrast
        self._drawn: tuple[int, int, NDArray[np.float64]] | None = None

    @property
    def random(self) -> bool:
        """Whether two views of one image can differ."""
        return any((self.rotation, self.shift, self.scale, self.mirror, self.contrast))

    def canvas(self, crop: int) -> int:
        """The side in pixels of a square that holds all that a view of side `crop` can show.

        A multiple of four above `crop`'s own remainder, so that the centre crop of the canvas is to the pixel the
        centre crop of the image.
        """
        angle = math.radians(self.rotation)
        reach = crop * ((math.cos(angle) + math.sin(angle)) / (1 - self.scale) + 2 * self.shift)
        margin = math.ceil(reach - crop - 1e-9)
        return crop + 4 * math.ceil(margin / 4)

    def forward(self, canvas: Tensor, index: Tensor, crop: int, seed: int, epoch: int) -> Tensor:
        """Views float32 (N, 1, crop, crop) in [0, 1] of uint8 canvases (N, 1, S, S); outside the canvas is black.

        One bilinear resampling: image by image on a CPU, to the nearest of 256 grey levels (a fifth of the time of a
        batched grid_sample there), the whole batch at once on a GPU.
        """
        draws = torch.from_numpy(self._uniforms(seed, epoch, index)).float()
        matrices = self._matrices(draws, crop, canvas.shape[-1])
        if canvas.device.type == "cpu":
            view = _warp_each(canvas, matrices, crop)
        else:
            grid = F.affine_grid(matrices.to(canvas.device), [len(canvas), 1, crop, crop], align_corners=False)
            view = F.grid_sample(canvas / 255, grid, padding_mode="zeros", align_corners=False)
        if self.contrast:
            factor = 1 + self.contrast * (2 * draws[:, 5, None, None, None].to(canvas.device) - 1)
            view = view.sub_(0.5).mul_(factor).add_(0.5).clamp_(0, 1)
        return view

    def _uniforms(self, seed: int, epoch: int, index: Tensor) -> NDArray[np.float64]:
        """Six numbers in [0, 1) per image; row i of an epoch's table is the same however long the table is."""
        rows = index.cpu().numpy()
        need = int(rows.max()) + 1
        if self._drawn is None or self._drawn[:2] != (seed, epoch) or len(self._drawn[2]) < need:
            self._drawn = (seed, epoch, np.random.default_rng([seed, epoch]).random((2 * need, 6)))
        table = self._drawn[2]
        return np.asarray(table[rows])

    def _matrices(self, draws: Tensor, crop: int, canvas: int) -> Tensor:
        """(N, 2, 3): from a view's coordinates in [-1, 1] to the canvas's."""
        signed = 2 * draws - 1
        angle = signed[:, 0] * math.radians(self.rotation)
        side = torch.where(draws[:, 4] < self.mirror, -1.0, 1.0)
        zoom = (crop / canvas) / (1 + self.scale * signed[:, 3])
        shift = 2 * self.shift * (crop / canvas) * signed[:, 1:3]
        cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        top = torch.stack((cosine * side, -sine, shift[:, 0]), dim=1)
        bottom = torch.stack((sine * side, cosine, shift[:, 1]), dim=1)
        return torch.stack((top, bottom), dim=1)


def _warp_each(canvas: Tensor, matrices: Tensor, crop: int) -> Tensor:
    """Float32 views (N, 1, crop, crop) in [0, 1] of uint8 canvases by (N, 2, 3) `matrices` between [-1, 1] squares."""
    side = canvas.shape[-1]
    # From the pixel numbers of a view to those of its canvas: pixel i of n has its centre at (2 i + 1) / n - 1.
    turn = matrices[:, :, :2].double().numpy() * (side / crop)
    middle = side / 2 * (1 + matrices[:, :, 2].double().numpy()) - 0.5
    shift = middle - turn.sum(axis=2) * (crop - 1) / 2
    to_pixels = np.concatenate((turn, shift[:, :, None]), axis=2)
    view = np.empty((len(canvas), 1, crop, crop), np.uint8)
    for source, matrix, target in zip(canvas[:, 0].numpy(), to_pixels, view[:, 0], strict=True):
        cv2.warpAffine(source, matrix, (crop, crop), dst=target, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return torch.from_numpy(view) / 255


class Preprocess(nn.Module):
    """Normalised network input from canvases; part of what a checkpoint promises.

    size: the short side in pixels to which images were scaled; crop: the side of the square the network sees;
    mean, sd: of grey levels in [0, 1], one pair for all channels of the pretrained network.

    seen: "whole", or what is left of the view to a network that is to show where scores can come from without the
    lungs: "border", a frame of 3/32 of the side, inside it black; "centre", all but that frame; "lungs_blurred", two
    upright ellipses where a frontal radiograph has its lungs, blurred until no opacity can be told.
    """

    def __init__(
        self, size: int = 256, crop: int = 224, mean: float = 0.449, sd: float = 0.226, seen: str = "whole"
    ) -> None:
        super().__init__()
        if not 32 <= crop <= size:
            raise InputError(f"preprocess.crop={crop}: must lie between 32 and data.size={size}")
        if not sd > 0:
            raise InputError(f"preprocess.sd={sd}: must be above 0")
        if seen not in VIEWS:
            raise InputError(f"preprocess.seen={seen}: must be one of {', '.join(VIEWS)}")
        self.size, self.crop, self.mean, self.sd, self.seen = size, crop, mean, sd, seen
        self._shown = _shown(seen, crop)

    def centre(self, canvas: Tensor) -> Tensor:
        """The centre crop, float32 (N, 1, crop, crop) in [0, 1], of uint8 canvases (N, 1, S, S)."""
        start = (canvas.shape[-1] - self.crop) // 2
        return canvas[..., start : start + self.crop, start : start + self.crop] / 255

    def normalise(self, view: Tensor) -> Tensor:
        """(view - mean) / sd, in place, of what is `seen` of a view in [0, 1]."""
        if self._shown is not None:
            shown = self._shown.to(view.device)
            instead = _blurred(view) if self.seen == "lungs_blurred" else torch.zeros_like(view)
            view.copy_(torch.lerp(instead, view, shown))
        return view.sub_(self.mean).div_(self.sd)


def _shown(seen: str, crop: int) -> Tensor | None:
    """(crop, crop) in [0, 1]: how much of each pixel is left as it is; None: all of it."""
    if seen == "whole":
        return None
    across = (2 * torch.arange(crop) + 1) / crop - 1  # pixel centres, from -1 to 1
    x, y = across[None, :], across[:, None]
    if seen == "lungs_blurred":
        inside = [((x - side * 0.42) / 0.36) ** 2 + ((y + 0.05) / 0.72) ** 2 for side in (-1, 1)]
        return (4 * (torch.minimum(*inside) - 0.9)).clamp(0, 1)
    border = (torch.maximum(x.abs(), y.abs()) > 1 - 2 * _FRAME).float()
    return border if seen == "border" else 1 - border


def _blurred(view: Tensor) -> Tensor:
    """Views (N, 1, S, S) smoothed by three moving averages of an eighth of their side: a Gaussian of 0.06 S, nearly."""
    width = view.shape[-1] // 16 * 2 + 1
    smooth = view
    for _ in range(3):
        smooth = F.avg_pool2d(F.pad(smooth, [width // 2] * 4, mode="replicate"), width, stride=1)
    return smooth
