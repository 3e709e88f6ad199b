"""Pixel operations on the device: random views for training, and one fixed view for evaluation."""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from covid_cls.errors import InputError

VIEWS = ("whole", "border", "centre", "lungs_blurred")
# The largest value of each setting of `Augment`; the smallest is 0.
_LIMITS = {"rotation": 45, "shift": 0.5, "scale": 0.5, "mirror": 1, "contrast": 1}
# Width of the frame of seen=border: the six pixels of a 64-pixel thumbnail that the audit's frame baseline reads.
_FRAME = 3 / 32


class Augment(nn.Module):
    """Random views of canvases: one affine resampling per image, then a change of contrast.

    The view of an image depends on (seed, epoch, index) alone, so that results do not depend on workers, on the other
    images of the batch, on the device or on a resumed training.

    Args:
        name: Of the option in conf/augment.
        rotation: Largest angle in degrees, in both directions.
        shift: Largest displacement along each axis, as a share of the crop's side.
        scale: Images are enlarged by a factor in [1 - scale, 1 + scale].
        mirror: Probability of exchanging left and right, which puts the heart on the side where it hardly ever is.
        contrast: Grey levels are stretched about mid-grey by a factor in [1 - contrast, 1 + contrast].

    Raises:
        InputError: A value is out of range.
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
        self.name, self.rotation, self.shift = name, rotation, shift
        self.scale, self.mirror, self.contrast = scale, mirror, contrast
        for key, limit in _LIMITS.items():
            if not 0 <= getattr(self, key) <= limit:
                raise InputError(f"augment.{key}={getattr(self, key)}: must lie between 0 and {limit}")
        self._drawn: tuple[int, int, NDArray[np.float64]] | None = None

    @property
    def random(self) -> bool:
        """Return whether two views of one image can differ."""
        return any(getattr(self, key) for key in _LIMITS)

    def canvas(self, crop: int) -> int:
        """Return the side in pixels of a canvas that holds everything that a view of side `crop` can show."""
        angle = math.radians(self.rotation)
        reach = crop * ((math.cos(angle) + math.sin(angle)) / (1 - self.scale) + 2 * self.shift)
        margin = math.ceil(reach - crop - 1e-9)
        # With a margin that is a multiple of four, the centre crops of canvas and image have the same pixels.
        return crop + 4 * math.ceil(margin / 4)

    def forward(self, canvas: Tensor, index: Tensor, crop: int, seed: int, epoch: int) -> Tensor:
        """Return views float32 (N, 1, crop, crop) in [0, 1] of uint8 canvases (N, 1, S, S).

        Everything outside a canvas is black. On a CPU the result is rounded to 256 grey levels.
        """
        numbers = torch.from_numpy(self._uniforms(seed, epoch, index)).float()
        matrices = self._matrices(numbers, crop, canvas.shape[-1])
        # Image by image in OpenCV takes a fifth of the time of a batched grid_sample on a CPU.
        if canvas.device.type == "cpu":
            view = _warp_each(canvas, matrices, crop)
        else:
            grid = F.affine_grid(matrices.to(canvas.device), [len(canvas), 1, crop, crop], align_corners=False)
            view = F.grid_sample(canvas / 255, grid, padding_mode="zeros", align_corners=False)
        if self.contrast:
            factor = 1 + self.contrast * (2 * numbers[:, 5, None, None, None].to(canvas.device) - 1)
            view = view.sub_(0.5).mul_(factor).add_(0.5).clamp_(0, 1)
        return view

    def _uniforms(self, seed: int, epoch: int, index: Tensor) -> NDArray[np.float64]:
        """Return six numbers in [0, 1) per image: rotation, shift x, shift y, scale, mirror and contrast."""
        rows = index.cpu().numpy()
        need = int(rows.max()) + 1
        # One table per epoch, kept for its other batches. A longer table begins with the same rows as a shorter one.
        if self._drawn is None or self._drawn[:2] != (seed, epoch) or len(self._drawn[2]) < need:
            self._drawn = (seed, epoch, np.random.default_rng([seed, epoch]).random((2 * need, 6)))
        return np.asarray(self._drawn[2][rows])

    def _matrices(self, numbers: Tensor, crop: int, canvas: int) -> Tensor:
        """Return (N, 2, 3) matrices from coordinates of the view to those of the canvas, both in [-1, 1]."""
        signed = 2 * numbers - 1
        angle = signed[:, 0] * math.radians(self.rotation)
        side = torch.where(numbers[:, 4] < self.mirror, -1.0, 1.0)
        zoom = (crop / canvas) / (1 + self.scale * signed[:, 3])
        shift = 2 * self.shift * (crop / canvas) * signed[:, 1:3]
        cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        top = torch.stack((cosine * side, -sine, shift[:, 0]), dim=1)
        bottom = torch.stack((sine * side, cosine, shift[:, 1]), dim=1)
        return torch.stack((top, bottom), dim=1)


def _warp_each(canvas: Tensor, matrices: Tensor, crop: int) -> Tensor:
    side = canvas.shape[-1]
    # From pixel numbers of a view to those of its canvas: pixel i of n has its centre at (2 i + 1) / n - 1.
    turn = matrices[:, :, :2].double().numpy() * (side / crop)
    middle = side / 2 * (1 + matrices[:, :, 2].double().numpy()) - 0.5
    shift = middle - turn.sum(axis=2) * (crop - 1) / 2
    to_pixels = np.concatenate((turn, shift[:, :, None]), axis=2)
    view = np.empty((len(canvas), 1, crop, crop), np.uint8)
    for source, matrix, target in zip(canvas[:, 0].numpy(), to_pixels, view[:, 0], strict=True):
        cv2.warpAffine(source, matrix, (crop, crop), dst=target, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return torch.from_numpy(view) / 255


class Preprocess(nn.Module):
    """Normalised network input from canvases; a checkpoint stores its settings.

    Args:
        size: Short side in pixels to which images are scaled.
        crop: Side of the square that the network sees.
        mean: Of grey levels in [0, 1]; one value for all channels of the pretrained network.
        sd: Standard deviation, as `mean`.
        seen: What the network sees of a view: "whole" is all of it. The others show how much of a score can come from
            outside the lungs: "border" is a frame of 3/32 of the side with black inside it, "centre" is the rest, and
            "lungs_blurred" blurs two ellipses where a frontal radiograph has its lungs, so that no opacity is visible.

    Raises:
        InputError: A value is out of range.
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
        self._visible = _visible(seen, crop)

    def centre(self, canvas: Tensor) -> Tensor:
        """Return the centre crop, float32 (N, 1, crop, crop) in [0, 1], of uint8 canvases (N, 1, S, S)."""
        start = (canvas.shape[-1] - self.crop) // 2
        return canvas[..., start : start + self.crop, start : start + self.crop] / 255

    def normalise(self, view: Tensor) -> Tensor:
        """Hide what is not `seen` of views in [0, 1], and return (view - mean) / sd; changes `view` in place."""
        if self._visible is not None:
            visible = self._visible.to(view.device)
            hidden = _blurred(view) if self.seen == "lungs_blurred" else torch.zeros_like(view)
            view.copy_(torch.lerp(hidden, view, visible))
        return view.sub_(self.mean).div_(self.sd)


def _visible(seen: str, crop: int) -> Tensor | None:
    """Return the share of each pixel that stays visible, (crop, crop) in [0, 1]; None if all of them do."""
    if seen == "whole":
        return None
    # Pixel centres, from -1 to 1.
    across = (2 * torch.arange(crop) + 1) / crop - 1
    x, y = across[None, :], across[:, None]
    if seen == "lungs_blurred":
        inside = [((x - side * 0.42) / 0.36) ** 2 + ((y + 0.05) / 0.72) ** 2 for side in (-1, 1)]
        return (4 * (torch.minimum(*inside) - 0.9)).clamp(0, 1)
    border = (torch.maximum(x.abs(), y.abs()) > 1 - 2 * _FRAME).float()
    return border if seen == "border" else 1 - border


def _blurred(view: Tensor) -> Tensor:
    """Return views (N, 1, S, S) after three moving averages of an eighth of the side: nearly a Gaussian of 0.06 S."""
    width = view.shape[-1] // 16 * 2 + 1
    for _ in range(3):
        view = F.avg_pool2d(F.pad(view, [width // 2] * 4, mode="replicate"), width, stride=1)
    return view
