"""Export of a model with its preprocessing to one ONNX or torch.export file, and its comparison with the model."""

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
from covid_cls.bundle.model import Model
from covid_cls.data.limits import MIN_SIDE
from covid_cls.io import DISCLAIMER
from covid_cls.models.inference import Scorer

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
# Largest accepted difference of a logit or probability between an exported file and its model.
TOLERANCE = 1e-4
METADATA = "metadata.json"  # name within a .pt2 file; an ONNX file has metadata_props
TIMED_SIDE, _TIMED_ROUNDS = 1024, 5
_OPSET = 20
_WEIGHT_BITS = 22  # PRECISION_BITS of Pillow

# These libraries log every node that they remove.
for _name in ("onnxscript", "onnx_ir"):
    logging.getLogger(_name).setLevel(logging.WARNING)

# From images (N, 1, H, W) to logits and calibrated probabilities, (N, classes) each.
ScoreFunction = Callable[[NDArray[np.uint8]], Sequence[NDArray[np.float32]]]


class Speed(NamedTuple):
    """Speed from grey images of 1024 × 1024 pixels to probabilities.

    Attributes:
        model: Images per second of the model.
        exported: Images per second of the exported file.
    """

    model: float
    exported: float


def export_model(model: Model, kind: str) -> bytes:
    """Return the content of an exported file.

    Its input `images` is uint8 (N, 1, H, W), 0 = black, with any N, H and W. Its outputs `logits` and `probabilities`
    are float32 (N, classes); probabilities are calibrated with the model's temperature. `metadata` is included, the
    out-of-distribution check is not.

    Args:
        model: A model on the CPU.
        kind: "onnx" or "torch".
    """
    network = _Exported(model.scorer, model.temperature).eval()
    size = model.scorer.preprocess.size
    # torch.export treats sizes of 0 and 1 and equal sizes as constants, so all sizes of the example differ.
    example = torch.zeros(2, 1, 2 * size + 1, 2 * size + 3, dtype=torch.uint8)
    axes = {0: "batch", 2: "height", 3: "width"}
    dims = {axis: torch.export.Dim(name, min=MIN_SIDE if axis else 1) for axis, name in axes.items()}
    # The exporters warn about their own code.
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(network, (example,), dynamic_shapes={"images": dims})
        for part in (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
            for node in part.graph.nodes:
                # Stack traces contain paths of this machine.
                node.meta.pop("stack_trace", None)
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
    """Return the metadata of an exported file; values other than text are JSON."""
    facts = {
        "name": model.record["name"],
        "task": model.task.name,
        "classes": model.task.classes,
        "multilabel": model.task.multilabel,
        **{name: getattr(model.scorer.preprocess, name) for name in ("size", "crop", "seen")},
        "temperature": model.temperature,
        "thresholds": model.thresholds,
        "weights_sha256": model.record["digests"]["weights"],
        "covid_cls": __version__,
        "disclaimer": DISCLAIMER,
    }
    return {key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in facts.items()}


def exported_function(data: bytes, kind: str) -> ScoreFunction:
    """Return a function that runs an exported file on as many threads as torch uses.

    A .pt2 file can execute code: only load files that you trust.
    """
    if kind == "torch":
        module = torch.export.load(io.BytesIO(data)).module()

        @torch.inference_mode()
        def run(images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
            return [scores.numpy() for scores in module(torch.from_numpy(images))]

        return run
    options = onnxruntime.SessionOptions()
    # By default, onnxruntime uses all cores, which would make the comparison of speeds unfair.
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits", "probabilities"], {"images": images})


def model_function(model: Model) -> ScoreFunction:
    """Return a function that scores images as the package does: one resize with Pillow each, then the network."""

    @torch.inference_mode()
    def run(images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        canvases = np.stack([model.canvas(image) for image in images[:, 0]])[:, None]
        logits = model.scorer(torch.from_numpy(canvases))
        return [logits.numpy(), model.scorer.probabilities(logits / model.temperature).numpy()]

    return run


def largest_difference(
    ours: ScoreFunction, theirs: ScoreFunction, batches: Iterable[NDArray[np.uint8]]
) -> tuple[float, float]:
    """Return the largest absolute differences of a logit and of a probability; nan if any score is nan."""
    gaps = [[np.abs(a - b).max() for a, b in zip(ours(x), theirs(x), strict=True)] for x in batches]
    # Unlike max(), np.max returns nan if any value is nan.
    logits, probabilities = np.max(gaps, axis=0).tolist()
    return logits, probabilities


def random_batches(size: int) -> list[NDArray[np.uint8]]:
    """Return random images that a scaling to `size` enlarges, keeps and reduces, with aspect ratios up to five."""
    shapes = (
        (1, MIN_SIDE, MIN_SIDE + 5),
        (8, size, size),
        (3, 2 * size + 1, 3 * size - 2),
        (2, size + 1, size),
        (1, size + 7, 5 * (size + 7)),
        (1, 4 * size + 3, size + 5),
    )
    rng = np.random.default_rng(0)
    batches = []
    for n, height, width in shapes:
        # Noise alone would become an even grey when it is reduced, so it is added to patches of random grey.
        patches = rng.integers(0, 192, (n, 1, 5, 5), dtype=np.uint8)
        patches = patches[:, :, (np.arange(height) * 5 // height)[:, None], np.arange(width) * 5 // width]
        batches.append(patches + rng.integers(0, 64, patches.shape, dtype=np.uint8))
    return batches


def batch_by_size(images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Return images (H, W) as batches (N, 1, H, W), one for each size."""
    shapes = dict.fromkeys(image.shape for image in images)
    return [np.stack([image for image in images if image.shape == shape])[:, None] for shape in shapes]


def measure_speed(ours: ScoreFunction, theirs: ScoreFunction, batch: int) -> Speed:
    """Return the median speed over rounds in which both functions score one batch; the first round is ignored."""
    images = np.random.default_rng(0).integers(0, 256, (batch, 1, TIMED_SIDE, TIMED_SIDE), dtype=np.uint8)
    seconds: tuple[list[float], list[float]] = ([], [])
    # The functions alternate, so that other load on the machine affects both.
    for _ in range(1 + _TIMED_ROUNDS):
        for run, taken in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            run(images)
            taken.append(time.perf_counter() - start)
    return Speed(*(batch / statistics.median(taken[1:]) for taken in seconds))


class Canvas(nn.Module):
    """`data.store.draw_on_canvas` as tensor operations: uint8 (N, 1, H, W) to uint8 (N, 1, crop, crop), bit-exact.

    Pillow's antialiased bilinear resize (src/libImaging/Resample.c of Pillow 13) is the product with two matrices of
    weights in units of 2^-22, and rounds to 8 bits after each product. The crop selects rows of these matrices.
    """

    # Float64 holds all sums exactly. Everything that depends on H and W is a tensor, so one graph is valid for all
    # sizes.

    def __init__(self, size: int, crop: int) -> None:
        super().__init__()
        self.size, self.crop = size, crop

    def forward(self, images: Tensor) -> Tensor:
        """Return the canvases of images."""
        height, width = (torch.full((), side, dtype=torch.float64) for side in images.shape[-2:])
        short = torch.minimum(height, width)
        tall, wide = (torch.floor(self.size * side / short) for side in (height, width))
        down = self._weights(images.shape[-2], height, tall)
        across = self._weights(images.shape[-1], width, wide)
        # Pillow starts with the cheaper of the two passes. The order matters, because each pass rounds.
        rows_first = (height > tall) & (height - tall > 2 * (width - wide))
        canvas: Tensor = torch.cond(rows_first, _rows_first, _columns_first, (images, down, across))
        return canvas

    def _weights(self, pixels: int, side: Tensor, scaled: Tensor) -> Tensor:
        """Return the weights, (crop, pixels), of a side's pixels in the central `crop` of its `scaled` pixels."""
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
    # As Pillow rounds: half up, after a division by the unit of the weights.
    return torch.floor(sums / 2**_WEIGHT_BITS + 0.5).clamp(0, 255)


class _Exported(nn.Module):
    def __init__(self, scorer: Scorer, temperature: float) -> None:
        super().__init__()
        self.canvas = Canvas(scorer.preprocess.size, scorer.preprocess.crop)
        self.scorer, self.temperature = scorer, temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.scorer(self.canvas(images))
        return logits, self.scorer.probabilities(logits / self.temperature)
