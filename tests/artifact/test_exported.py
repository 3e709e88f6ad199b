"""An exported file scores as its model does, whatever the image's size, and gives nothing away but what it says."""

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
from covid_cls.artifact import exported as exported_module
from covid_cls.artifact.exported import (
    FORMATS,
    METADATA,
    TOLERANCE,
    Canvas,
    Run,
    batches_of,
    export_model,
    largest_difference,
    measure_speed,
    open_exported,
    random_batches,
    run_model,
)
from covid_cls.artifact.model import Model
from covid_cls.data.readers import read_image
from covid_cls.data.store import draw_on_canvas
from covid_cls.evaluation.calibration import calibrated
from covid_cls.labels import TASKS
from covid_cls.models.backbones import build_network
from covid_cls.models.scorer import Scorer
from covid_cls.models.transforms import Preprocess
from covid_cls.records import DISCLAIMER

CXR = Path(__file__).resolve().parents[3] / "shared" / "cxr"
SPREAD = 0.1  # a thousand times the tolerance: untrained, some networks give all images the same logits to 1e-5
RECORD = {
    "name": "small",
    "operating": {"temperature": 1.7, "thresholds": {"youden": 0.4, "specificity_95": None}},
    "digests": {"weights": "abc"},
}
# Each kind of block, task and view once: deeper networks repeat the same operations, and an export takes 10 s or more.
PAIRS = [
    ("resnet18", "binary", "whole"),
    ("vgg11", "three_class_multilabel", "lungs_blurred"),
    ("vgg11_bn", "three_class", "border"),
]


def make_model(
    backbone: str = "resnet18", task: str = "three_class", seen: str = "whole", size: int = 38, crop: int = 32
) -> Model:
    """A random network as a model; batch norms hold statistics, logits of random images spread by SPREAD."""
    torch.manual_seed(0)
    network = build_network(backbone, len(TASKS[task].classes), hidden=8).to(memory_format=torch.channels_last)
    scorer = Scorer(TASKS[task], network, Preprocess(size, crop, seen=seen))
    images = [image for batch in random_batches(size) for image in batch[:, 0]]
    views = scorer.prepare(torch.from_numpy(np.stack([draw_on_canvas(image, size, crop) for image in images]))[:, None])
    head = network.get_submodule("head.out")
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # the statistics of these images alone
        network.train()(views)
        logits = network.eval()(views)
        scale = SPREAD / logits.std(dim=0)
        head.weight *= scale[:, None]
        head.bias.copy_((head.bias - logits.mean(dim=0)) * scale)
    scorer.eval().requires_grad_(False)
    return Model(Path("nowhere"), RECORD, scorer, None)  # the screen is not exported


def canvas(image: np.ndarray, size: int, crop: int) -> np.ndarray:
    return Canvas(size, crop)(torch.from_numpy(image)[None, None])[0, 0].numpy()


def test_the_canvas_is_that_of_the_store_to_the_bit() -> None:
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
    + [(100 + k, 50) for k in range(4)],  # about where the passes change places
)
@pytest.mark.parametrize("crop", [64, 57])
def test_the_canvas_of_special_sizes(shape: tuple[int, int], crop: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(canvas(image, 64, crop), draw_on_canvas(image, 64, crop))


@pytest.mark.parametrize(("backbone", "task", "seen"), PAIRS)
def test_onnx_scores_as_the_model_does(backbone: str, task: str, seen: str) -> None:
    model = make_model(backbone, task, seen)
    data = export_model(model, "onnx")
    onnx.checker.check_model(data)
    gaps = largest_difference(run_model(model), open_exported(data, "onnx"), random_batches(38))
    assert max(gaps) <= TOLERANCE


def test_a_torch_program_scores_as_the_model_does() -> None:
    model = make_model("resnet18")
    run = open_exported(export_model(model, "torch"), "torch")
    assert max(largest_difference(run_model(model), run, random_batches(38))) <= TOLERANCE


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest) -> tuple[Model, bytes, str]:
    model = make_model("vgg11")
    return model, export_model(model, request.param), request.param


def test_probabilities_are_those_of_the_models_temperature(exported: tuple[Model, bytes, str]) -> None:
    model, data, kind = exported
    logits, probabilities = open_exported(data, kind)(random_batches(38)[1])
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


def test_a_file_of_other_weights_is_found_out(exported: tuple[Model, bytes, str]) -> None:
    _, data, kind = exported
    other = make_model("vgg11")
    with torch.no_grad():
        other.scorer.net.get_submodule("head.out").bias += 2e-4
    logits, _ = largest_difference(run_model(other), open_exported(data, kind), random_batches(38))
    assert logits == pytest.approx(2e-4, abs=1e-5)


def test_a_nan_is_no_small_difference() -> None:
    model = make_model()
    ours = run_model(model)
    with torch.no_grad():
        model.scorer.net.get_submodule("head.out").bias[0] = torch.nan
    fine = run_model(make_model())
    assert all(np.isnan(gap) for gap in largest_difference(ours, fine, random_batches(38)))


def test_images_of_one_size_are_a_batch() -> None:
    a, b, c = (np.full(shape, k, np.uint8) for k, shape in enumerate([(40, 50), (60, 50), (40, 50)]))
    batches = batches_of([a, b, c])
    assert [batch.shape for batch in batches] == [(2, 1, 40, 50), (1, 1, 60, 50)]
    np.testing.assert_array_equal(batches[0][:, 0], [a, c])


def test_speed_is_images_by_the_median_second_without_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, []

    def taking(name: str, *seconds: float) -> Run:
        """A run that takes these seconds, one after the other and the last for ever after."""
        left = list(seconds)

        def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            nonlocal now
            now += left.pop(0) if len(left) > 1 else left[0]
            calls.append((name, len(images)))
            return np.zeros(1), np.zeros(1)

        return run

    monkeypatch.setattr(exported_module, "time", SimpleNamespace(perf_counter=lambda: now))
    speed = measure_speed(taking("model", 100, 50, 0.5), taking("exported", 100, 0.25), 3)
    assert speed == (3, 6.0, 12.0)
    assert set(calls) == {("model", 3), ("exported", 3)}
    assert [name for name, _ in calls] == ["model", "exported"] * (len(calls) // 2)


@pytest.mark.real
@pytest.mark.skipif(not CXR.is_dir(), reason="the real radiographs are not there")
def test_real_radiographs_have_the_canvas_of_the_store() -> None:
    files = [file for file in sorted((CXR / "raw").rglob("*")) if file.suffix in (".jpg", ".jpeg", ".png")][::4]
    pictures = [read_image(file) for file in files]
    assert len({picture.shape for picture in pictures}) > 3
    for picture in pictures:
        np.testing.assert_array_equal(canvas(picture, 256, 224), draw_on_canvas(picture, 256, 224))
