"""A model as one file for onnxruntime or torch.export, its preprocessing inside, and what it gives beside the model."""

import io
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from covid_cls import __version__
from covid_cls.artifact.model import Model
from covid_cls.data.limits import LEAST_SIDE
from covid_cls.models.scorer import Scorer
from covid_cls.records import DISCLAIMER

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4  # of a logit or a probability, between an exported file and its model
METADATA = "metadata.json"  # in a .pt2 file; an ONNX file has a place for it
_OPSET = 20
_WEIGHT_BITS = 22  # Pillow's PRECISION_BITS
TIMED_SIDE, _TIMED_ROUNDS = 1024, 5

for _name in ("onnxscript", "onnx_ir"):  # they report every node that they leave out
    logging.getLogger(_name).setLevel(logging.WARNING)

Scores = tuple[NDArray[np.float32], NDArray[np.float32]]  # logits and calibrated probabilities, (N, classes) each
Run = Callable[[NDArray[np.uint8]], Scores]  # of images (N, 1, H, W)


class Speed(NamedTuple):
    """Images a second of the model and of the exported file, from grey images of 1024 x 1024 to probabilities."""

    batch: int
    model: float
    exported: float


def export_model(model: Model, kind: str) -> bytes:
    """The file that `kind`, "onnx" or "torch", makes of a model on the CPU.

    Input `images`, uint8 (N, 1, H, W), 0 = black, any N, H and W. Outputs: `logits` and `probabilities`, float32
    (N, classes), the latter at the model's temperature. `metadata` goes with it. Nothing of the model's screen does.
    """
    network = _Exported(model.scorer, model.temperature).eval()
    size = model.scorer.preprocess.size
    example = torch.zeros(2, 1, 2 * size + 1, 2 * size + 3, dtype=torch.uint8)
    axes = {0: "batch", 2: "height", 3: "width"}
    least = {"batch": 1, "height": LEAST_SIDE, "width": LEAST_SIDE}
    dims = {axis: torch.export.Dim(name, min=least[name]) for axis, name in axes.items()}
    with warnings.catch_warnings(action="ignore"):  # of the exporters about their own parts
        program = torch.export.export(network, (example,), dynamic_shapes={"images": dims})
        for part in (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
        if kind == "torch":
            file = io.BytesIO()
            torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata(model))})
            return file.getvalue()
        graph = torch.onnx.export(
            program,
            (),
            dynamo=True,
            dynamic_shapes={"images": axes},
            input_names=["images"],
            output_names=["logits", "probabilities"],
            opset_version=_OPSET,
            verbose=False,
        )
    assert graph is not None
    graph.model.metadata_props.update(metadata(model))
    return bytes(graph.model_proto.SerializeToString())


def metadata(model: Model) -> dict[str, str]:
    """What an exported file says of itself; what is no text is JSON."""
    view = model.scorer.preprocess
    facts = {
        "name": model.record["name"],
        "task": model.task.name,
        "classes": model.task.classes,
        "multilabel": model.task.multilabel,
        "size": view.size,
        "crop": view.crop,
        "seen": view.seen,
        "temperature": model.temperature,
        "thresholds": model.thresholds,
        "weights_sha256": model.record["digests"]["weights"],
        "covid_cls": __version__,
        "disclaimer": DISCLAIMER,
    }
    return {key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in facts.items()}


def open_exported(data: bytes, kind: str) -> Run:
    """What runs an exported file, on as many threads as torch uses. A .pt2 file of others can execute code."""
    if kind == "torch":
        module = torch.export.load(io.BytesIO(data)).module()

        def run_torch(images: NDArray[np.uint8]) -> Scores:
            with torch.inference_mode():
                logits, probabilities = module(torch.from_numpy(images))
            return logits.numpy(), probabilities.numpy()

        return run_torch
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run_onnx(images: NDArray[np.uint8]) -> Scores:
        logits, probabilities = session.run(["logits", "probabilities"], {"images": images})
        return logits, probabilities

    return run_onnx


def run_model(model: Model) -> Run:
    """What the package itself does with images: Pillow's resize, one at a time, then the network."""

    def run(images: NDArray[np.uint8]) -> Scores:
        canvases = np.stack([model.canvas(image) for image in images[:, 0]])[:, None]
        with torch.inference_mode():
            logits = model.scorer(torch.from_numpy(canvases))
            probabilities = model.scorer.probabilities(logits / model.temperature)
        return logits.numpy(), probabilities.numpy()

    return run


def largest_difference(ours: Run, theirs: Run, batches: Iterable[NDArray[np.uint8]]) -> tuple[float, float]:
    """The largest absolute difference of a logit and of a probability over these batches; nan where any score is."""
    gaps = [[np.abs(a - b).max() for a, b in zip(ours(x), theirs(x), strict=True)] for x in batches]
    logits, probabilities = np.max(gaps, axis=0).tolist()
    return logits, probabilities


def random_batches(size: int) -> list[NDArray[np.uint8]]:
    """Random images of several sizes: enlarged, kept, reduced, odd, and up to five times as wide or as tall.

    Each is noise over patches of random grey: noise alone is the same even grey to a network once it is reduced.
    """
    shapes = (
        (1, LEAST_SIDE, LEAST_SIDE + 5),
        (8, size, size),
        (3, 2 * size + 1, 3 * size - 2),
        (2, size + 1, size),
        (1, size + 7, 5 * (size + 7)),
        (1, 4 * size + 3, size + 5),
    )
    rng = np.random.default_rng(0)
    batches = []
    for n, height, width in shapes:
        patches = rng.integers(0, 192, (n, 1, 5, 5), dtype=np.uint8)
        patches = patches[:, :, (np.arange(height) * 5 // height)[:, None], np.arange(width) * 5 // width]
        batches.append(patches + rng.integers(0, 64, patches.shape, dtype=np.uint8))
    return batches


def batches_of(pictures: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Images (H, W) as batches (N, 1, H, W), one for each size among them."""
    shapes = dict.fromkeys(picture.shape for picture in pictures)
    return [np.stack([p for p in pictures if p.shape == shape])[:, None] for shape in shapes]


def measure_speed(ours: Run, theirs: Run, batch: int) -> Speed:
    """Medians over rounds in which each runs one batch in turn; the round before these does not count."""
    images = np.random.default_rng(0).integers(0, 256, (batch, 1, TIMED_SIDE, TIMED_SIDE), dtype=np.uint8)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + _TIMED_ROUNDS):
        for run, taken in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            run(images)
            taken.append(time.perf_counter() - start)
    model, exported = (batch / statistics.median(taken[1:]) for taken in seconds)
    return Speed(batch, model, exported)


class Canvas(nn.Module):
    """`data.store.draw_on_canvas` as tensor operations: uint8 (N, 1, H, W) to uint8 (N, 1, crop, crop), to the bit.

    Pillow's antialiased bilinear resize (src/libImaging/Resample.c of Pillow 13) is two products with matrices of
    weights in units of 2^-22, each rounded to 8 bits; the crop takes the rows of these matrices that it needs. Float64
    holds every sum exactly, and whatever depends on H and W is a tensor, so that a graph of this is of any size.
    """

    def __init__(self, size: int, crop: int) -> None:
        super().__init__()
        self.size, self.crop = size, crop

    def forward(self, images: Tensor) -> Tensor:
        """Canvases of images."""
        height, width = (torch.full((), side, dtype=torch.float64) for side in images.shape[-2:])
        short = torch.minimum(height, width)
        tall, wide = (torch.floor(self.size * side / short) for side in (height, width))
        down = self._weights(images.shape[-2], height, tall)
        across = self._weights(images.shape[-1], width, wide)
        # Pillow takes the cheaper pass first, and each rounds.
        rows_first = (height > tall) & (height - tall > 2 * (width - wide))
        canvas: Tensor = torch.cond(rows_first, _rows_first, _columns_first, (images, down, across))
        return canvas

    def _weights(self, pixels: int, side: Tensor, scaled: Tensor) -> Tensor:
        """(crop, pixels): what each of a side's pixels gives to each of the middle `crop` of `scaled` pixels."""
        start = torch.round((scaled - self.crop) / 2)
        scale = side / scaled
        centre = (torch.arange(self.crop, dtype=torch.float64) + start + 0.5) * scale
        distance = torch.arange(pixels, dtype=torch.float64) - centre[:, None] + 0.5
        triangle = (1 - (distance * (1 / scale.clamp(min=1))).abs()).clamp(min=0)
        return torch.floor(triangle / triangle.sum(dim=1, keepdim=True) * 2**_WEIGHT_BITS + 0.5)


def _columns_first(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return _grey(down @ _grey(images.double() @ across.T)).to(torch.uint8)


def _rows_first(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return _grey(_grey(down @ images.double()) @ across.T).to(torch.uint8)


def _grey(sums: Tensor) -> Tensor:
    return torch.floor(sums / 2**_WEIGHT_BITS + 0.5).clamp(0, 255)


class _Exported(nn.Module):
    def __init__(self, scorer: Scorer, temperature: float) -> None:
        super().__init__()
        self.canvas = Canvas(scorer.preprocess.size, scorer.preprocess.crop)
        self.scorer, self.temperature = scorer, temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.scorer(self.canvas(images))
        return logits, self.scorer.probabilities(logits / self.temperature)
