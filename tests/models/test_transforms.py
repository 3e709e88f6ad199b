"""Augmented views depend on (seed, epoch, index) alone and follow the geometry; canvases are large enough for them."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms

from covid_cls.data.store import draw_on_canvas
from covid_cls.errors import InputError
from covid_cls.models.transforms import Augment, Preprocess

CXR = {"rotation": 10.0, "shift": 0.05, "scale": 0.1, "contrast": 0.2}
ORIGINAL = {"rotation": 30.0, "mirror": 0.5}
# The ends and the middle of the range of a random number.
LOW, MIDDLE, HIGH = 0.0, 0.5, 1.0


class Chosen(Augment):
    """An `Augment` with given numbers in [0, 1] for rotation, shift x, shift y, scale, mirror and contrast."""

    numbers: NDArray[np.float64]

    def _uniforms(self, seed: int, epoch: int, index: Tensor) -> NDArray[np.float64]:
        return self.numbers


def view_of(canvas: Tensor, crop: int, numbers: tuple[float, ...], **ranges: Any) -> Tensor:
    augment = Chosen(**ranges)
    augment.numbers = np.array([numbers])
    return augment(canvas, torch.zeros(1, dtype=torch.long), crop, 0, 0)[0, 0]


def noise(n: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (n, 1, side, side), generator=generator, dtype=torch.uint8)


def dot(side: int, right: float, down: float) -> Tensor:
    """Return a canvas with a soft bright dot at this distance from its centre, in pixels."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    spot = 255 * np.exp(-((x - right) ** 2 + (y - down) ** 2) / 8)
    return torch.from_numpy(spot.round().astype(np.uint8))[None, None]


def place(view: Tensor) -> tuple[float, float]:
    """Return the centre of brightness of a view, as (right, down) from its centre in pixels."""
    side = len(view)
    offset = torch.arange(side) - (side - 1) / 2
    mass = view.sum().item()
    return (view.sum(0) * offset).sum().item() / mass, (view.sum(1) * offset).sum().item() / mass


def centre(canvas: Tensor, crop: int) -> Tensor:
    return Preprocess(crop, crop).centre(canvas)


@pytest.mark.parametrize(("ranges", "crop", "canvas"), [(ORIGINAL, 224, 308), ({}, 224, 224), ({}, 32, 32)])
def test_the_canvas_has_the_known_size(ranges: dict[str, float], crop: int, canvas: int) -> None:
    assert Augment(**ranges).canvas(crop) == canvas


@pytest.mark.parametrize(
    ("ranges", "crop"), [(CXR, 224), (ORIGINAL, 299), ({"shift": 0.5}, 63), ({"mirror": 0.5}, 33)], ids=str
)
def test_a_canvas_exceeds_the_crop_by_a_multiple_of_four(ranges: dict[str, float], crop: int) -> None:
    assert (Augment(**ranges).canvas(crop) - crop) % 4 == 0


@pytest.mark.parametrize(
    ("ranges", "crop"),
    [
        ({"rotation": 10.0, "shift": 0.05, "scale": 0.1}, 64),
        (ORIGINAL, 32),
        ({"rotation": 45.0, "shift": 0.5, "scale": 0.5, "mirror": 0.5}, 33),
        ({"shift": 0.25}, 33),
        ({"scale": 0.3}, 33),
    ],
    ids=str,
)
def test_the_most_extreme_views_show_nothing_outside_the_canvas(ranges: dict[str, float], crop: int) -> None:
    augment = Chosen(**ranges)
    augment.numbers = np.array([(*ends, MIDDLE) for ends in itertools.product((LOW, HIGH), repeat=5)])
    side, n = augment.canvas(crop), len(augment.numbers)
    white = torch.full((1, 1, side, side), 255, dtype=torch.uint8).expand(n, -1, -1, -1)
    views = augment(white, torch.zeros(n, dtype=torch.long), crop, 0, 0)
    torch.testing.assert_close(views, torch.ones(n, 1, crop, crop), rtol=0, atol=1e-5)


def test_random_views_of_a_white_canvas_are_white() -> None:
    augment = Augment(rotation=10.0, shift=0.05, scale=0.1)
    side, n = augment.canvas(32), 500
    views = augment(torch.full((n, 1, side, side), 255, dtype=torch.uint8), torch.arange(n), 32, 1, 2)
    torch.testing.assert_close(views, torch.ones(n, 1, 32, 32), rtol=0, atol=1e-5)


def test_outside_the_canvas_is_black() -> None:
    white = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)
    view = view_of(white, 32, (HIGH, MIDDLE, MIDDLE, MIDDLE, MIDDLE, MIDDLE), rotation=45.0)
    assert view[0, 0] == 0
    assert view[16, 16] == 1


def test_a_view_does_not_depend_on_the_rest_of_the_batch() -> None:
    ranges = {**CXR, "mirror": 0.5}
    augment = Augment(**ranges)
    side = augment.canvas(32)
    canvas, index = noise(6, side), torch.tensor([4, 0, 9, 2, 300, 7])
    together = augment(canvas, index, 32, 5, 1)
    for other in (Augment(**ranges), augment):
        alone = torch.cat([other(canvas[i : i + 1], index[i : i + 1], 32, 5, 1) for i in range(6)])
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
    backwards = Augment(**ranges)(canvas.flip(0), index.flip(0), 32, 5, 1).flip(0)
    torch.testing.assert_close(backwards, together, rtol=0, atol=1e-6)


def test_a_view_does_not_depend_on_the_global_generators() -> None:
    canvas, index = noise(2, 48), torch.tensor([0, 1])
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  # numpy's global generator must not matter
    first = Augment(**CXR)(canvas, index, 32, 0, 0)
    state = torch.get_rng_state()
    second = Augment(**CXR)(canvas, index, 32, 0, 0)
    assert torch.equal(first, second)
    # The global generators do not advance, either.
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0), (1, 1)])
def test_another_epoch_or_seed_gives_other_views(seed: int, epoch: int) -> None:
    augment, canvas, index = Augment(**CXR), noise(8, 48), torch.arange(8)
    first, second = augment(canvas, index, 32, 0, 0), augment(canvas, index, 32, seed, epoch)
    assert ((first - second).abs().amax(dim=(1, 2, 3)) > 0.1).all()
    # The first seed and epoch give the first views again.
    assert torch.equal(augment(canvas, index, 32, 0, 0), first)


def test_images_of_a_batch_have_different_views() -> None:
    canvas = noise(1, 48).expand(8, -1, -1, -1)
    views = Augment(**CXR)(canvas, torch.arange(8), 32, 0, 0)
    assert all((views[i] - views[j]).abs().max() > 0.1 for i, j in itertools.combinations(range(8), 2))


@pytest.mark.parametrize(
    ("key", "crop"), [("rotation", 32), ("rotation", 33), ("shift", 33), ("scale", 33), ("contrast", 33)]
)
def test_ranges_near_zero_give_the_centre_crop(key: str, crop: int) -> None:
    augment = Augment(**{key: 1e-9})
    assert augment.random
    canvas = noise(4, augment.canvas(crop))
    found = augment(canvas, torch.arange(4), crop, 0, 0)
    torch.testing.assert_close(found, centre(canvas, crop), rtol=0, atol=1e-4)


@pytest.mark.parametrize("crop", [32, 33])
def test_mirror_one_gives_the_flipped_centre_crop(crop: int) -> None:
    augment = Augment(mirror=1.0)
    canvas = noise(4, augment.canvas(crop))
    found = augment(canvas, torch.arange(4), crop, 0, 0)
    torch.testing.assert_close(found, centre(canvas, crop).flip(-1), rtol=0, atol=1e-4)


def test_mirror_one_half_flips_half_of_the_images() -> None:
    augment = Augment(mirror=0.5)
    canvas = noise(1, augment.canvas(32)).expand(2000, -1, -1, -1)
    views = augment(canvas, torch.arange(2000), 32, 0, 0)
    flipped = (views - centre(canvas, 32).flip(-1)).abs().amax(dim=(1, 2, 3)) < 1e-3
    straight = (views - centre(canvas, 32)).abs().amax(dim=(1, 2, 3)) < 1e-3
    assert (flipped ^ straight).all()
    # 4.5 standard deviations.
    assert 900 < int(flipped.sum()) < 1100


@pytest.mark.parametrize(("degrees", "side"), [(5.0, HIGH), (45.0, LOW)])
def test_a_rotation_turns_a_dot_about_the_centre_by_its_angle(degrees: float, side: float) -> None:
    view = view_of(dot(121, 20, -10), 65, (side, MIDDLE, MIDDLE, MIDDLE, MIDDLE, MIDDLE), rotation=degrees)
    right, down = place(view)
    assert math.hypot(right, down) == pytest.approx(math.hypot(20, 10), abs=0.05)
    turned = math.degrees(math.atan2(down, right) - math.atan2(-10, 20))
    assert abs(turned) == pytest.approx(degrees, abs=0.2)


def test_the_two_ends_of_the_rotation_turn_in_opposite_directions() -> None:
    ends = [view_of(dot(121, 20, 0), 65, (e, *[MIDDLE] * 5), rotation=30.0) for e in (LOW, HIGH)]
    (_, first), (_, second) = map(place, ends)
    assert first == pytest.approx(-second, abs=0.05)
    assert abs(first) == pytest.approx(10, abs=0.05)


def test_a_shift_moves_a_dot_by_its_share_of_the_crop() -> None:
    right, down = place(view_of(dot(121, 0, 0), 65, (MIDDLE, HIGH, LOW, *[MIDDLE] * 3), shift=0.2))
    assert abs(right) == pytest.approx(0.2 * 65, abs=0.05)
    assert down == pytest.approx(-right, abs=0.05)


@pytest.mark.parametrize(("end", "factor"), [(LOW, 0.7), (HIGH, 1.3)])
def test_a_scale_enlarges_or_reduces_the_image(end: float, factor: float) -> None:
    right, down = place(view_of(dot(121, 15, 10), 65, (*[MIDDLE] * 3, end, *[MIDDLE] * 2), scale=0.3))
    assert (right, down) == pytest.approx((15 * factor, 10 * factor), abs=0.1)


@pytest.mark.parametrize(("end", "factor"), [(LOW, 0.5), (HIGH, 1.5)])
def test_contrast_is_a_factor_about_mid_grey(end: float, factor: float) -> None:
    canvas = noise(1, 36)
    found = view_of(canvas, 32, (*[MIDDLE] * 5, end), contrast=0.5)
    expected = ((centre(canvas, 32)[0, 0] - 0.5) * factor + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_views_are_float32_in_the_unit_interval() -> None:
    augment = Augment(rotation=45, shift=0.5, scale=0.5, mirror=0.5, contrast=1.0)
    views = augment(noise(16, augment.canvas(32)), torch.arange(16), 32, 0, 0)
    assert views.dtype == torch.float32
    assert views.shape == (16, 1, 32, 32)
    assert views.min() >= 0
    assert views.max() <= 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotation", -1.0),
        ("rotation", 46.0),
        ("shift", 0.6),
        ("scale", 0.51),
        ("scale", -0.1),
        ("mirror", 1.1),
        ("mirror", -0.1),
        ("contrast", 1.5),
        ("contrast", math.nan),
    ],
)
def test_a_range_outside_its_limits_is_refused(key: str, value: float) -> None:
    with pytest.raises(InputError, match=f"augment.{key}={value}"):
        Augment(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 224, "crop": 256}, "preprocess.crop=256"),
        ({"size": 64, "crop": 16}, "preprocess.crop=16"),
        ({"sd": 0.0}, "preprocess.sd=0.0"),
        ({"sd": -1.0}, "preprocess.sd=-1.0"),
        ({"seen": "lungs"}, "preprocess.seen=lungs: must be one of whole, border"),
    ],
)
def test_preprocessing_outside_its_limits_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocess(**settings)


# Each shape once or twice: square, wide, tall, very wide, very tall, enlarged, and nearly square. Each size and crop
# occurs with a canvas of the crop's size, with a slightly larger one and with a much larger one.
@pytest.mark.parametrize(
    ("shape", "size", "crop", "ranges"),
    [
        ((256, 256), 256, 224, {}),
        ((300, 420), 64, 63, CXR),
        ((300, 420), 256, 224, ORIGINAL),
        ((421, 300), 37, 32, {}),
        ((421, 300), 64, 63, ORIGINAL),
        ((97, 1021), 64, 64, CXR),
        ((97, 1021), 37, 32, ORIGINAL),
        ((555, 64), 64, 63, {}),
        ((555, 64), 37, 32, CXR),
        ((33, 47), 64, 64, ORIGINAL),
        ((33, 47), 256, 224, CXR),
        ((224, 225), 64, 64, {}),
    ],
    ids=str,
)
def test_the_evaluation_view_equals_torchvisions_resize_and_centre_crop(
    shape: tuple[int, int], size: int, crop: int, ranges: dict[str, float]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    canvas = draw_on_canvas(image, size, Augment(**ranges).canvas(crop))
    theirs = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(crop)])(Image.fromarray(image))
    found = Preprocess(size, crop).centre(torch.from_numpy(canvas.copy())[None, None])
    assert torch.equal((found * 255).round().to(torch.uint8)[0, 0], torch.from_numpy(np.array(theirs)))
    assert torch.equal(found[0], transforms.functional.to_tensor(theirs))


def test_normalising_subtracts_the_mean_and_divides_by_the_standard_deviation() -> None:
    found = Preprocess(mean=0.4, sd=0.2).normalise(torch.tensor([0.4, 0.6, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, -2.0]))


SMOOTH = {"rotation": 20.0, "shift": 0.1, "scale": 0.2, "mirror": 0.5}


def smooth(n: int, side: int) -> torch.Tensor:
    """Return canvases without edges, for which two kinds of interpolation agree."""
    coarse = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    return (F.interpolate(coarse, side, mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("crop", [64, 65])
def test_views_on_a_cpu_equal_those_on_a_gpu_to_one_grey_level(crop: int) -> None:
    augment = Augment(**SMOOTH)
    canvas, index = smooth(8, augment.canvas(crop)), torch.arange(8)
    matrices = augment._matrices(torch.from_numpy(augment._uniforms(1, 2, index)).float(), crop, canvas.shape[-1])
    grid = F.affine_grid(matrices, [8, 1, crop, crop], align_corners=False)
    wanted = F.grid_sample(canvas.float() / 255, grid, align_corners=False)
    difference = (augment(canvas, index, crop, 1, 2) - wanted).abs() * 255
    assert float(difference.max()) < 1.0
    # Rounding to integer grey levels alone gives 0.25.
    assert float(difference.mean()) < 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_computes_the_views_of_a_cpu() -> None:
    augment = Augment(**SMOOTH, contrast=0.2)
    canvas, index = smooth(8, augment.canvas(64)), torch.arange(8)
    difference = augment(canvas.cuda(), index, 64, 1, 2).cpu() - augment(canvas, index, 64, 1, 2)
    assert float(difference.abs().max()) * 255 < 1.5


@pytest.mark.parametrize("crop", [32, 64])
def test_border_and_centre_together_are_the_complete_view(crop: int) -> None:
    view = torch.rand(3, 1, crop, crop)
    border, centre = (
        Preprocess(crop=crop, mean=0.0, sd=1.0, seen=s).normalise(view.clone()) for s in ("border", "centre")
    )
    assert torch.equal(border + centre, view)
    frame = round(crop * 3 / 32)
    assert not border[..., frame:-frame, frame:-frame].any()
    assert torch.equal(centre[..., frame:-frame, frame:-frame], view[..., frame:-frame, frame:-frame])


def test_blurred_lungs_hide_an_opacity_and_do_not_change_the_outside() -> None:
    plain = torch.full((1, 1, 224, 224), 0.2)
    spotted = plain.clone()
    # Inside the left ellipse.
    spotted[..., 100:110, 60:70] = 1.0
    seen = [Preprocess(mean=0.0, sd=1.0, seen="lungs_blurred").normalise(view.clone()) for view in (plain, spotted)]
    # A tenth of the original contrast of 0.8.
    assert (seen[1] - seen[0]).abs().max() < 0.08
    corner = torch.rand(1, 1, 224, 224)
    hidden = Preprocess(mean=0.0, sd=1.0, seen="lungs_blurred").normalise(corner.clone())
    assert torch.equal(hidden[..., :10, :], corner[..., :10, :])
