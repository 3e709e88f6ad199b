"""python -m covid_cls.export: a model as one file that gives the same scores without covid_cls."""

import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covid_cls.errors import ExportError, InputError, listed
from covid_cls.io import DISCLAIMER, atomic_file
from covid_cls.runtime.cli import Job, call_command, run_command
from covid_cls.runtime.schema import check_paths, existing_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from covid_cls.bundle.onnx_export import ScoreFunction

log = logging.getLogger(__name__)
# Images of the user that the file is compared on.
_MAX_IMAGES = 32


@dataclass(frozen=True)
class Export:
    """An exported file.

    Attributes:
        path: The file.
        differences: For each set of compared images the largest difference from the model, of a logit and of a
            probability.
    """

    path: Path
    differences: dict[str, tuple[float, float]]


def export(*overrides: str, **settings: Any) -> Export:
    """Write a model as one ONNX file or torch program, e.g. `export(model=folder, output="model.onnx")`.

    Args:
        *overrides: Words as on the command line.
        **settings: More settings by their names.

    Raises:
        InputError: The model or the images cannot be read, or a setting is wrong.
        ExportError: The file would not give the scores of the model; it was not written.
    """
    return call_command(_export, "export", overrides, settings)


def _export(job: Job) -> Export:
    settings = job.settings
    check_paths(settings, *(name for name in ("model", "input", "output") if settings[name] is not None))
    folder = existing_folder(settings, "model")
    # Imported late: --help, a misspelt key and a missing folder need no torch.
    from covid_cls.bundle import onnx_export
    from covid_cls.bundle.model import load

    kind = settings["format"]
    if kind not in onnx_export.FORMATS:
        raise InputError(f"format={kind}: unknown; choose one of {listed(list(onnx_export.FORMATS))}")
    model = load(folder, "cpu")
    name = Path(model.record["name"]).name + onnx_export.FORMATS[kind]
    output = Path(settings["output"] or Path(settings["output_root"]) / "exports" / name).expanduser()
    if output.is_dir() or output.resolve().parent == model.folder.resolve():
        raise InputError(f"output={output}: give the name of a file outside the model folder")
    pictures, description = _pictures(settings["input"])
    data = onnx_export.export_model(model, kind)
    ours, theirs = onnx_export.model_function(model), onnx_export.exported_function(data, kind)
    drawn = onnx_export.random_batches(model.scorer.preprocess.size)
    batches = {"random images of several sizes": drawn, description: onnx_export.batch_by_size(pictures)}
    gaps = {where: onnx_export.largest_difference(ours, theirs, some) for where, some in batches.items()}
    log.info("largest difference from the model (allowed: %g)", onnx_export.TOLERANCE)
    for where, (logit, probability) in gaps.items():
        log.info("  %s: %.1e of a logit, %.1e of a probability", where, logit, probability)
    # Written as "not all <=", so that nan fails as well.
    if not all(gap <= onnx_export.TOLERANCE for pair in gaps.values() for gap in pair):
        raise ExportError(f"the {kind} file does not give the scores of the model, so it was not written")
    with atomic_file(output) as file:
        file.write(data)
    _log_speed(ours, theirs, kind)
    log.info("%s: %.1f MB\n%s", output, len(data) / 1e6, DISCLAIMER)
    return Export(output, gaps)


def _pictures(path: str | None) -> tuple[list["NDArray[np.uint8]"], str]:
    """Return images for the comparison, those of the user or else phantoms, and a description of them."""
    from covid_cls.data.limits import BadImage
    from covid_cls.data.manifest import find_inputs
    from covid_cls.data.phantoms import build_phantoms
    from covid_cls.data.readers import read_image

    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            files = find_inputs(str(build_phantoms(Path(folder), images=6)))
            return [read_image(file) for _, file in files], f"{len(files)} phantoms, since input= is not given"
    files = find_inputs(path)
    pictures, bad = [], []
    for name, file in files[:: math.ceil(len(files) / _MAX_IMAGES)]:
        try:
            pictures.append(read_image(file))
        except BadImage as error:
            bad.append(f"{name}: {error}")
    if not pictures:
        raise InputError(f"input={path}: none of {len(bad)} files can be read: {listed(bad, 3)}")
    if bad:
        log.warning("%d files cannot be read and are not compared: %s", len(bad), listed(bad, 3))
    return pictures, f"{len(pictures)} of {len(files)} files of {path}"


def _log_speed(ours: "ScoreFunction", theirs: "ScoreFunction", kind: str) -> None:
    from covid_cls.bundle import onnx_export

    side = onnx_export.TIMED_SIDE
    log.info("images per second, from %d × %d pixels to probabilities, measured in turn", side, side)
    for batch in (1, 8):
        speed = onnx_export.measure_speed(ours, theirs, batch)
        log.info("  batch of %d: covid_cls %.1f, %s file %.1f", batch, speed.model, kind, speed.exported)


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line and return the exit code."""
    return run_command(_export, "export", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
