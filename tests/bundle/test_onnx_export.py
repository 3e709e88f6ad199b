"""An exported file gives the scores of its model for every image size, and contains no private data."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import covid_cls
from covid_cls.bundle import onnx_export
from covid_cls.bundle.model import Model
from covid_cls.bundle.onnx_export import (
    FORMATS,
    METADATA,
    TOLERANCE,
    Canvas,
    ScoreFunction,
    batch_by_size,
    export_model,
    exported_function,
    largest_difference,
    measure_speed,
    model_function,
    random_batches,
)
from covid_cls.data.readers import read_image
from covid_cls.data.store import draw_on_canvas
from covid_cls.evaluation.calibration import calibrated
from covid_cls.io import DISCLAIMER
from covid_cls.models.backbones import build_network
from covid_cls.models.inference import Scorer
from covid_cls.models.transforms import Preprocess
from covid_cls.tasks import TASKS

CXR = Path(__file__).resolve().parents[3] / "shared" / "cxr"
# A thousand times the tolerance. Without it, some untrained networks give all images the same logits up to 1e-5.
SPREAD = 0.1
RECORD = {
    "name": "small",
    "operating": {"temperature": 1.7, "thresholds": {"youden": 0.4, "specificity_95": None}},
    "digests": {"weights": "abc"},
}


def make_model(
    backbone: str = "resnet18", task: str = "three_class", seen: str = "whole", size: int = 38, crop: int = 32
) -> Model:
    """Return a model with a random network, with batch norm statistics and logits of standard deviation SPREAD."""
    torch.manual_seed(0)
    network = build_network(backbone, len(TASKS[task].classes), hidden=8).to(memory_format=torch.channels_last)
    scorer = Scorer(TASKS[task], network, Preprocess(size, crop, seen=seen))
    images = [image for batch in random_batches(size) for image in batch[:, 0]]
    views = scorer.prepare(torch.from_numpy(np.stack([draw_on_canvas(image, size, crop) for image in images]))[:, None])
    head = network.get_submodule("head.out")
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # only the statistics of these images
        network.train()(views)
        logits = network.eval()(views)
        scale = SPREAD / logits.std(dim=0)
        head.weight *= scale[:, None]
        head.bias.copy_((head.bias - logits.mean(dim=0)) * scale)
    scorer.eval().requires_grad_(False)
    return Model(Path("nowhere"), RECORD, scorer, None)  # the out-of-distribution check is not exported


def canvas(image: np.ndarray, size: int, crop: int) -> np.ndarray:
    return Canvas(size, crop)(torch.from_numpy(image)[None, None])[0, 0].numpy()


def test_the_canvas_is_exactly_that_of_the_store() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        crop = int(rng.integers(32, 130))
        size = crop + int(rng.integers(0, 40))
        short = int(rng.integers(32, 4 * size))
        sides = [short, int(short * rng.uniform(1, 5))]
        height, width = rng.permutation(sides)
        image = rng.integers(0, 256, (height, width), dtype=np.uint8)
        if rng.random() < 0.3:
            image = np.where(image < 128, 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(
            canvas(image, size, crop), draw_on_canvas(image, size, crop), f"{image.shape} {size} {crop}"
        )


@pytest.mark.parametrize(
    "shape",
    [(64, 64), (64, 200), (200, 64), (128, 128), (128, 129), (65, 64), (63, 64), (32, 160), (160, 32), (193, 96)]
    + [(100 + k, 50) for k in range(4)],  # where the order of the passes changes
)
@pytest.mark.parametrize("crop", [64, 57])
def test_the_canvas_of_special_sizes(shape: tuple[int, int], crop: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(canvas(image, 64, crop), draw_on_canvas(image, 64, crop))


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest) -> tuple[Model, bytes, str]:
    """A VGG and its file in each format. Tests share it, because an export takes 10 s or more."""
    model = make_model("vgg11", seen="lungs_blurred")
    return model, export_model(model, request.param), request.param


def test_a_file_gives_the_scores_of_the_model(exported: tuple[Model, bytes, str]) -> None:
    model, data, kind = exported
    if kind == "onnx":
        onnx.checker.check_model(data)
    assert (
        max(largest_difference(model_function(model), exported_function(data, kind), random_batches(38))) <= TOLERANCE
    )


def test_a_resnet_with_sigmoids_gives_the_scores_of_the_model() -> None:
    """Residual blocks, this task and this view are not in the shared file; deeper networks repeat the operations."""
    model = make_model("resnet18", "three_class_multilabel", "border")
    run = exported_function(export_model(model, "onnx"), "onnx")
    assert max(largest_difference(model_function(model), run, random_batches(38))) <= TOLERANCE


def test_probabilities_use_the_temperature_of_the_model(exported: tuple[Model, bytes, str]) -> None:
    model, data, kind = exported
    logits, probabilities = exported_function(data, kind)(random_batches(38)[1])
    assert logits.shape == probabilities.shape == (8, 3)
    np.testing.assert_allclose(probabilities, calibrated(logits.astype(np.float64), 1.7, model.task), atol=1e-6)
    assert np.abs(probabilities - calibrated(logits.astype(np.float64), 1.0, model.task)).max() > 1e-3


def test_a_file_says_what_it_is_and_not_where_it_was_made(exported: tuple[Model, bytes, str]) -> None:
    _, data, kind = exported
    if kind == "onnx":
        graph = onnx.load_from_string(data)
        facts = {entry.key: entry.value for entry in graph.metadata_props}
        (images,) = graph.graph.input
        dims = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
        assert (images.name, dims) == ("images", ["batch", 1, "height", "width"])
        assert [output.name for output in graph.graph.output] == ["logits", "probabilities"]
    else:
        files = {METADATA: ""}
        torch.export.load(io.BytesIO(data), extra_files=files)
        facts = json.loads(files[METADATA])
    assert json.loads(facts["classes"]) == ["covid", "normal", "pneumonia"]
    assert json.loads(facts["thresholds"]) == RECORD["operating"]["thresholds"]
    assert (facts["task"], facts["temperature"], facts["weights_sha256"]) == ("three_class", "1.7", "abc")
    assert (facts["size"], facts["crop"], facts["disclaimer"]) == ("38", "32", DISCLAIMER)
    assert str(Path(covid_cls.__file__).parent).encode() not in data
    assert str(Path(torch.__file__).parent).encode() not in data


def test_a_file_with_other_weights_is_detected(exported: tuple[Model, bytes, str]) -> None:
    _, data, kind = exported
    other = make_model("vgg11", seen="lungs_blurred")
    with torch.no_grad():
        other.scorer.net.get_submodule("head.out").bias += 2e-4
    logits, _ = largest_difference(model_function(other), exported_function(data, kind), random_batches(38))
    assert logits == pytest.approx(2e-4, abs=1e-5)


def test_a_nan_score_makes_the_difference_nan() -> None:
    model = make_model()
    ours = model_function(model)
    with torch.no_grad():
        model.scorer.net.get_submodule("head.out").bias[0] = torch.nan
    fine = model_function(make_model())
    assert all(np.isnan(gap) for gap in largest_difference(ours, fine, random_batches(38)))


def test_images_of_one_size_form_a_batch() -> None:
    a, b, c = (np.full(shape, k, np.uint8) for k, shape in enumerate([(40, 50), (60, 50), (40, 50)]))
    batches = batch_by_size([a, b, c])
    assert [batch.shape for batch in batches] == [(2, 1, 40, 50), (1, 1, 60, 50)]
    np.testing.assert_array_equal(batches[0][:, 0], [a, c])


def test_speed_uses_the_median_time_without_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, []

    def taking(name: str, *seconds: float) -> ScoreFunction:
        """Return a function that takes these seconds, one per call; the last one is repeated."""
        left = list(seconds)

        def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            nonlocal now
            now += left.pop(0) if len(left) > 1 else left[0]
            calls.append((name, len(images)))
            return np.zeros(1), np.zeros(1)

        return run

    monkeypatch.setattr(onnx_export, "time", SimpleNamespace(perf_counter=lambda: now))
    speed = measure_speed(taking("model", 100, 50, 0.5), taking("exported", 100, 0.25), 3)
    assert speed == (6.0, 12.0)
    assert set(calls) == {("model", 3), ("exported", 3)}
    assert [name for name, _ in calls] == ["model", "exported"] * (len(calls) // 2)


@pytest.mark.real
@pytest.mark.skipif(not CXR.is_dir(), reason="../shared/cxr is not available")
def test_the_canvas_of_real_radiographs_is_that_of_the_store() -> None:
    files = [file for file in sorted((CXR / "raw").rglob("*")) if file.suffix in (".jpg", ".jpeg", ".png")][::4]
    pictures = [read_image(file) for file in files]
    assert len({picture.shape for picture in pictures}) > 3
    for picture in pictures:
        np.testing.assert_array_equal(canvas(picture, 256, 224), draw_on_canvas(picture, 256, 224))
