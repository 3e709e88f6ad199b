"""python -m covid_cls.predict: what a model predicts for images, as a table that marks images it cannot judge."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covid_cls.errors import InputError, listed
from covid_cls.io import DISCLAIMER
from covid_cls.runtime.cli import Job, call_command, run_command
from covid_cls.runtime.schema import check_paths, check_section, existing_folder

if TYPE_CHECKING:
    import pandas as pd

    from covid_cls.bundle.model import Model, PredictionSummary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictions:
    """A written table of predictions.

    Attributes:
        path: The CSV file.
    """

    path: Path

    @property
    def table(self) -> "pd.DataFrame":
        """Return the table, one row per image; the README describes its columns."""
        import pandas as pd

        return pd.read_csv(self.path)


def predict(*overrides: str, **settings: Any) -> Predictions:
    """Predict images with a model, e.g. `predict(model=folder, input="scans")`.

    `covid_cls.load(folder).predict(images)` does the same for images in memory, without writing a file.

    Args:
        *overrides: Words as on the command line.
        **settings: More settings by their names.

    Raises:
        InputError: The model or the images cannot be read, or a setting is wrong.
    """
    return call_command(_predict, "predict", overrides, settings)


def _predict(job: Job) -> Predictions:
    settings = job.settings
    check_paths(settings, "model", "input")
    folder = existing_folder(settings, "model")
    # Imported late: --help, a misspelt key and a missing folder need no torch.
    from covid_cls.bundle.model import load, predict_images
    from covid_cls.data.manifest import find_inputs

    options = {name: settings[name] for name in ("threshold", "batch_size", "dicom_tags")}
    check_section("", predict_images, options)
    files = find_inputs(settings["input"])
    output = _output(settings, files)
    model = load(folder, settings["device"])
    summary = _write(output, model, files, options)
    log.info("\n".join([*_lines(summary, model, settings["threshold"]), f"table in {output}", DISCLAIMER]))
    return Predictions(output)


def _write(output: Path, model: "Model", files: list[tuple[str, Path]], options: dict[str, Any]) -> "PredictionSummary":
    """Write the predictions to `output` atomically and return their summary."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from covid_cls.bundle.model import PredictionSummary, predict_images
    from covid_cls.io import atomic_file

    summary = PredictionSummary(model.task.classes)
    tables = predict_images(model, files, **options)
    columns = ("scoring", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with atomic_file(output) as file, Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=len(files))
        for table in tables:
            table.to_csv(file, header=not summary.images, index=False, float_format="%.9g", lineterminator="\n")
            summary.add(table)
            bar.advance(task, len(table))
        if not summary.readable:
            raise InputError(f"none of {summary.images} files can be read: {listed(summary.faults, 3)}")
    return summary


def _lines(summary: "PredictionSummary", model: "Model", threshold: str) -> list[str]:
    from covid_cls.bundle.model import REASONS

    cut = model.resolve_threshold(threshold)
    rule = "the most probable class" if cut is None else f"covid if the calibrated p(covid) is at least {cut:.3g}"
    return [*summary.lines(REASONS), f"decided by threshold={threshold}: {rule}"]


def _output(settings: dict[str, Any], files: list[tuple[str, Path]]) -> Path:
    """Return the path of the table. Raises InputError if it is a folder or one of the input files."""
    from covid_cls.data.manifest import input_name

    default = Path(settings["output_root"]) / "predictions" / f"{input_name(settings['input'])}.csv"
    output = Path(str(settings["output"] or default)).expanduser()
    if output.is_dir():
        raise InputError(f"output={output}: is a folder; give the name of a CSV file")
    sources = [Path(settings["input"]).expanduser(), *(file for _, file in files)]
    if output.resolve() in {path.resolve() for path in sources if path.name == output.name}:
        raise InputError(f"output={output}: is one of the input files; give another name")
    return output


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line and return the exit code."""
    return run_command(_predict, "predict", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
