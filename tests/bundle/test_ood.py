"""Rotated, inverted and unusual images are flagged, others rarely; the cut-offs have the promised error rate."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from sklearn.datasets import load_sample_image
from torch import Tensor

from covid_cls.bundle import ood as module
from covid_cls.bundle.ood import ALPHA, REASONS, OodDetector, fit_cut_off, fit_ood
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.image_source import DataSettings
from covid_cls.data.manifest import read_manifest
from covid_cls.data.readers import read_image
from covid_cls.data.store import draw_on_canvas
from covid_cls.errors import InputError
from covid_cls.models.inference import Scorer
from covid_cls.tasks import TASKS
from tests.training.small import compose_small, make_classifier, make_data

REAL = Path(__file__).parents[2].parent / "shared" / "cxr"
Squares = NDArray[np.uint8]


class Fitted(NamedTuple):
    scorer: Scorer
    data: Radiographs
    tensors: dict[str, Tensor]

    def embedded(self, squares: Squares) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(self.scorer.embed(torch.from_numpy(squares.copy()).unsqueeze(1))[1].numpy())

    def codes(self, squares: Squares) -> list[set[str]]:
        return [set(found) for found in OodDetector(self.tensors).reasons(squares, self.embedded(squares))]


def fitted(cache: Path, *words: str) -> Fitted:
    settings = compose_small("data.size=48", "preprocess.crop=48", "data.batch_size=16", *words)
    data = make_data(settings, cache)
    scorer = make_classifier(settings).scorer()
    return Fitted(scorer, data, fit_ood(scorer, data))


@pytest.fixture(scope="module")
def phantoms(cache: Path) -> Fitted:
    """The OOD check of an untrained network on 150 phantoms."""
    return fitted(cache, "data.images=150", "augment=none")


@pytest.fixture(scope="module")
def unseen(cache: Path) -> Squares:
    """90 other phantoms."""
    settings = compose_small("data.size=48", "preprocess.crop=48", "data.images=90", "data.phantom_seed=5")
    return np.asarray(make_data({**settings, "augment": {"name": "none"}}, cache).images)


def share(codes: list[set[str]], code: str) -> float:
    return float(np.mean([code in found for found in codes]))


def test_other_phantoms_are_rarely_flagged(phantoms: Fitted, unseen: Squares) -> None:
    assert np.mean([bool(found) for found in phantoms.codes(unseen)]) <= 0.1


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotated_and_inverted_images_get_their_codes(
    phantoms: Fitted, unseen: Squares, inverted: bool, turns: int
) -> None:
    squares = np.rot90(255 - unseen if inverted else unseen, turns, (1, 2))
    codes = phantoms.codes(squares)
    for code, holds in (("inverted", inverted), ("rotated", turns > 0)):
        assert share(codes, code) >= 0.9 if holds else share(codes, code) <= 0.05


def test_images_other_than_radiographs_are_flagged(phantoms: Fitted) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (20, 48, 48), dtype=np.uint8)
    levels = np.stack([np.full((48, 48), level, np.uint8) for level in (0, 1, 128, 255)])
    photo = load_sample_image("china.jpg").mean(axis=2).astype(np.uint8)
    parts = np.stack([photo[top : top + 384 : 8, left : left + 384 : 8] for top in (0, 40) for left in (0, 200)])
    for squares in (noise, levels, parts):
        assert share(phantoms.codes(squares), "unlike_a_chest_radiograph") == 1
    assert not any(
        {"rotated", "inverted"} & found for found in phantoms.codes(noise)
    )  # in no orientation it looks like a chest


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/cxr is not available")
def test_radiographs_of_other_hospitals_pass_and_their_altered_copies_do_not(cache: Path) -> None:
    path = str(REAL / "darkcovidnet" / "manifest.csv")
    settings = DataSettings("manifest", path=path, size=54, cache=str(cache))
    data = Radiographs(TASKS["three_class"], 48, 0, settings)
    scorer = make_classifier(compose_small("preprocess.crop=48", "data.size=54", "task=three_class")).scorer()
    radiographs = Fitted(scorer, data, fit_ood(scorer, data))
    files = read_manifest(REAL / "external" / "manifest.csv")["file"]
    squares = np.stack([draw_on_canvas(read_image(Path(file)), 54, 48) for file in files[:40]])
    assert np.mean([bool(found) for found in radiographs.codes(squares)]) <= 0.1
    assert share(radiographs.codes(255 - squares), "inverted") >= 0.9
    assert share(radiographs.codes(np.rot90(squares, 2, (1, 2))), "rotated") >= 0.9


def test_unusual_features_are_far_from_training(phantoms: Fitted, unseen: Squares) -> None:
    detector, near = OodDetector(phantoms.tensors), phantoms.embedded(unseen)
    assert share([set(found) for found in detector.reasons(unseen, near)], "far_from_training") <= 0.1
    for far in (4 * near + 1, np.full_like(near, np.nan)):
        assert share([set(found) for found in detector.reasons(unseen, far)], "far_from_training") == 1


def test_reasons_do_not_depend_on_window_and_level(phantoms: Fitted, unseen: Squares) -> None:
    detector, embedded = OodDetector(phantoms.tensors), phantoms.embedded(unseen)
    for squares in (unseen, np.rot90(unseen, 1, (1, 2))):
        squares = squares // 2 * 2  # so that halving does not round
        assert detector.reasons(squares, embedded) == detector.reasons(squares // 2 + 60, embedded)


def test_only_the_network_s_input_is_checked(phantoms: Fitted, unseen: Squares) -> None:
    framed = np.pad(unseen, ((0, 0), (6, 6), (6, 6)), constant_values=255)
    detector, embedded = OodDetector(phantoms.tensors), phantoms.embedded(unseen)
    np.testing.assert_array_equal(phantoms.embedded(framed), embedded)
    assert detector.reasons(framed, embedded) == detector.reasons(unseen, embedded)


def test_reasons_do_not_depend_on_the_other_images(phantoms: Fitted, unseen: Squares) -> None:
    mixed = np.concatenate([unseen[:4], 255 - unseen[:4], np.zeros((1, 48, 48), np.uint8)])
    detector, embedded = OodDetector(phantoms.tensors), phantoms.embedded(mixed)
    alone = [detector.reasons(mixed[k : k + 1], embedded[k : k + 1])[0] for k in range(len(mixed))]
    assert detector.reasons(mixed, embedded) == alone
    assert {code for found in alone for code in found} <= set(REASONS)


def test_the_fit_is_reproducible(phantoms: Fitted) -> None:
    again = fit_ood(phantoms.scorer, phantoms.data)
    assert set(again) == set(phantoms.tensors)
    assert all(torch.equal(again[name], tensor) for name, tensor in phantoms.tensors.items())


def test_the_test_split_is_not_used(phantoms: Fitted, cache: Path) -> None:
    data = make_data(
        compose_small("data.size=48", "preprocess.crop=48", "data.images=150", "data.batch_size=16", "augment=none"),
        cache,
    )
    rows = data.table.index[data.table["split"] == "test"]
    images = np.array(data.images)
    images[rows] = 0
    data.images = images
    again = fit_ood(phantoms.scorer, data)
    assert all(torch.equal(again[name], tensor) for name, tensor in phantoms.tensors.items())


def test_tensors_can_be_saved_and_loaded(phantoms: Fitted, unseen: Squares) -> None:
    back = load(save(phantoms.tensors))
    embedded = phantoms.embedded(unseen)
    assert OodDetector(back).reasons(unseen, embedded) == OodDetector(phantoms.tensors).reasons(unseen, embedded)
    assert all(torch.isfinite(tensor).all() for tensor in back.values())


def test_tensors_are_small_and_contain_no_image(phantoms: Fitted, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their size does not depend on the number of images, which is limited."""
    assert sum(tensor.nbytes for tensor in phantoms.tensors.values()) < 500_000
    monkeypatch.setattr(module, "MAX_IMAGES", 40)
    fewer = fit_ood(phantoms.scorer, phantoms.data)
    assert fewer["thumbnail.axes"].shape == phantoms.tensors["thumbnail.axes"].shape
    assert fewer["embedding.axes"].shape[0] == 20  # half the number of images
    assert not torch.equal(fewer["thumbnail.mean"], phantoms.tensors["thumbnail.mean"])


@pytest.mark.parametrize("words", [("data.images=36",), ("data.images=48", "task=three_class", "backbone=vgg11_bn")])
def test_the_check_of_a_tiny_data_set_does_not_flag_its_images(cache: Path, words: tuple[str, ...]) -> None:
    small = fitted(cache, *words)
    crop = small.scorer.preprocess.crop
    canvases = np.stack([one[0].numpy() for one in small.data.dataset("train")[range(4)].x])
    start = (canvases.shape[-1] - crop) // 2
    squares = canvases[:, start : start + crop, start : start + crop]
    assert all(torch.isfinite(tensor).all() for tensor in small.tensors.values())
    assert small.codes(squares) == [set()] * 4


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("cuts", None),
        ("thumbnail.axes", None),
        ("cuts", torch.zeros(3)),
        ("kind.weight", torch.zeros(8, 9)),
        ("kind.bias", torch.zeros(5)),
        ("thumbnail.mean", torch.zeros(255)),
        ("embedding.axes", torch.zeros(2, 3)),
        ("embedding.variances", torch.zeros(2)),
        ("crop", torch.tensor(0)),
        ("crop", torch.zeros(2)),
    ],
)
def test_inconsistent_tensors_are_an_error(phantoms: Fitted, name: str, tensor: Tensor | None) -> None:
    rest = {key: value for key, value in phantoms.tensors.items() if key != name}
    with pytest.raises(InputError, match="out-of-distribution check"):
        OodDetector(rest if tensor is None else {**rest, name: tensor})


def test_the_distance_is_the_mahalanobis_distance() -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(6, 2)))[0].T
    mean, variances = rng.normal(size=6), np.array([4.0, 2.0, 0.5])
    covariance = axes.T @ np.diag([4.0, 2.0]) @ axes + 0.5 * (np.eye(6) - axes.T @ axes)
    x = rng.normal(size=(5, 6))
    expected = np.einsum("ij,jk,ik->i", x - mean, np.linalg.inv(covariance), x - mean)
    np.testing.assert_allclose(np.exp(module._Gaussian(mean, axes, variances).distance(x)), expected)


def test_cut_offs_of_known_scores() -> None:
    shuffled = np.random.default_rng(0).permutation(np.arange(1.0, 1000.0))
    assert fit_cut_off(shuffled) == 995  # ceil(1000 * 0.995)
    assert fit_cut_off(np.arange(1.0, 200.0)) == 199
    # Two scores: mean 1, sd sqrt 2; the 0.995 quantile of t with 1 degree of freedom is tan(0.495 pi).
    assert fit_cut_off(np.array([0.0, 2.0])) == pytest.approx(1 + np.tan(0.495 * np.pi) * np.sqrt(2 * 1.5))
    assert fit_cut_off(np.full(7, 3.0)) == 3
    assert fit_cut_off(np.array([3.0])) > 1e30  # but finite, because it is stored in a file
    assert np.isfinite(fit_cut_off(np.array([3.0])))


@pytest.mark.parametrize(("n", "exceeds"), [(199, ALPHA), (399, ALPHA), (300, 1 / 301)])
def test_new_scores_exceed_the_cut_off_at_the_promised_rate(n: int, exceeds: float) -> None:
    rng = np.random.default_rng(0)
    shares = [1 - fit_cut_off(rng.random(n)) for _ in range(2000)]  # exact for uniform scores
    assert np.mean(shares) == pytest.approx(exceeds, abs=4 * np.std(shares) / np.sqrt(2000))


def test_the_rate_is_also_right_for_few_normal_scores() -> None:
    rng = np.random.default_rng(0)
    exceeded = np.mean([rng.normal(size=50) > fit_cut_off(rng.normal(size=7)) for _ in range(2000)])
    assert 0.5 * ALPHA < exceeded < 1.3 * ALPHA


def test_every_code_has_a_meaning() -> None:
    assert set(REASONS) == {"inverted", "rotated", "unlike_a_chest_radiograph", "far_from_training"}
    assert all(REASONS.values())
