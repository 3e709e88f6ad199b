"""python -m covid_cls.export: a model as one file that scores images without covid_cls, proven beside the model."""

import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from covid_cls.command import check_paths, existing_folder, plain, run_command
from covid_cls.errors import InputError, listed
from covid_cls.records import DISCLAIMER, whole_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from covid_cls.artifact.exported import Run

log = logging.getLogger(__name__)
_MOST_IMAGES = 32


def export(cfg: DictConfig) -> None:
    """Write the model that `cfg` names to `output`, unless what is to be written scores otherwise than the model."""
    settings = plain(cfg)
    check_paths(settings, *(name for name in ("model", "input", "output") if settings[name] is not None))
    folder = existing_folder(settings, "model")
    # Imported late: --help, a misspelt key and a missing folder need no torch.
    from covid_cls.artifact import exported
    from covid_cls.artifact.model import load

    kind = settings["format"]
    if kind not in exported.FORMATS:
        raise InputError(f"format={kind}: unknown; one of {listed(list(exported.FORMATS))}")
    model = load(folder, "cpu")
    name = Path(model.record["name"]).name + exported.FORMATS[kind]
    output = Path(settings["output"] or Path(settings["output_root"]) / "exports" / name).expanduser()
    if output.is_dir() or output.resolve().parent == model.folder.resolve():
        raise InputError(f"output={output}: give the name of a file, outside the model's folder")
    pictures, words = _pictures(settings["input"])
    data = exported.export_model(model, kind)
    ours, theirs = exported.run_model(model), exported.open_exported(data, kind)
    drawn = exported.random_batches(model.scorer.preprocess.size)
    batches = {"random images of several sizes": drawn, words: exported.batches_of(pictures)}
    gaps = {where: exported.largest_difference(ours, theirs, some) for where, some in batches.items()}
    log.info("largest difference from the model, where %g is allowed", exported.TOLERANCE)
    for where, (logit, probability) in gaps.items():
        log.info("  %s: %.1e of a logit, %.1e of a probability", where, logit, probability)
    if not all(gap <= exported.TOLERANCE for pair in gaps.values() for gap in pair):  # nan is no proof
        print(f"error: the {kind} file does not score as the model does; nothing was written", file=sys.stderr)
        sys.exit(1)
    with whole_file(output) as file:
        file.write(data)
    _log_speed(ours, theirs, kind)
    log.info("%s: %.1f MB\n%s", output, len(data) / 1e6, DISCLAIMER)


def _pictures(path: str | None) -> tuple[list["NDArray[np.uint8]"], str]:
    """Images for the comparison, and what to call them: of the user, or else phantoms."""
    from covid_cls.data.inputs import find_inputs
    from covid_cls.data.limits import BadImage
    from covid_cls.data.phantom import build_phantoms
    from covid_cls.data.readers import read_image

    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            files = find_inputs(str(build_phantoms(Path(folder), images=6)))
            return [read_image(file) for _, file in files], f"{len(files)} phantoms, for want of input="
    files = find_inputs(path)
    pictures, bad = [], []
    for name, file in files[:: math.ceil(len(files) / _MOST_IMAGES)]:
        try:
            pictures.append(read_image(file))
        except BadImage as error:
            bad.append(f"{name}: {error}")
    if not pictures:
        raise InputError(f"input={path}: none of {len(bad)} files can be read: {listed(bad, 3)}")
    if bad:
        log.warning("%d files cannot be read and are not compared: %s", len(bad), listed(bad, 3))
    return pictures, f"{len(pictures)} of {len(files)} files of {path}"


def _log_speed(ours: "Run", theirs: "Run", kind: str) -> None:
    from covid_cls.artifact import exported

    side = exported.TIMED_SIDE
    log.info("images a second, %d × %d pixels to probabilities, taking turns", side, side)
    for batch in (1, 8):
        speed = exported.measure_speed(ours, theirs, batch)
        log.info("  batch of %d: covid_cls %.1f, %s file %.1f", batch, speed.model, kind, speed.exported)


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line; return the exit code."""
    return run_command(export, "export", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
