"""python -m covid_cls.predict: what a model says of images, as a table that also says where it cannot tell."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from covid_cls.command import check_paths, check_section, existing_folder, plain, run_command
from covid_cls.errors import InputError, listed
from covid_cls.records import DISCLAIMER

if TYPE_CHECKING:
    from covid_cls.artifact.model import Model
    from covid_cls.artifact.stream import Tally

log = logging.getLogger(__name__)


def predict(cfg: DictConfig) -> None:
    """Write a row per image of `input` to `output`, and a summary to the console."""
    settings = plain(cfg)
    check_paths(settings, "model", "input")
    folder = existing_folder(settings, "model")
    # Imported late: --help, a misspelt key and a missing folder need no torch.
    from covid_cls.artifact.model import load
    from covid_cls.artifact.stream import predict_pictures
    from covid_cls.data.inputs import find_inputs

    options = {name: settings[name] for name in ("threshold", "batch_size", "dicom_tags")}
    check_section("predict", predict_pictures, options)
    files = find_inputs(settings["input"])
    output = _output(settings, files)
    model = load(folder, settings["device"])
    tally = _write(output, model, files, options)
    log.info("\n".join([*_summary(tally, model, settings["threshold"]), f"table in {output}", DISCLAIMER]))


def _write(output: Path, model: "Model", files: list[tuple[str, Path]], options: dict[str, Any]) -> "Tally":
    """The counts of what is now in `output`, which is written whole or not at all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from covid_cls.artifact.stream import Tally, predict_pictures
    from covid_cls.records import whole_file

    tally = Tally(model.task.classes)
    tables = predict_pictures(model, files, **options)
    columns = ("scoring", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with whole_file(output) as file, Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=len(files))
        for table in tables:
            table.to_csv(file, header=not tally.images, index=False, float_format="%.9g", lineterminator="\n")
            tally.add(table)
            bar.advance(task, len(table))
        if not tally.readable:
            raise InputError(f"none of {tally.images} files can be read: {listed(tally.faults, 3)}")
    return tally


def _summary(tally: "Tally", model: "Model", threshold: str) -> list[str]:
    from covid_cls.artifact.stream import REASONS

    cut = model.cut(threshold)
    rule = "the likeliest class" if cut is None else f"covid from a calibrated p(covid) of {cut:.3g} on"
    return [*tally.lines(REASONS), f"decided at threshold={threshold}: {rule}"]


def _output(settings: dict[str, Any], files: list[tuple[str, Path]]) -> Path:
    """The table's path. InputError where it is a folder or one of the inputs."""
    from covid_cls.data.inputs import input_name

    default = Path(settings["output_root"]) / "predictions" / f"{input_name(settings['input'])}.csv"
    output = Path(str(settings["output"] or default)).expanduser()
    if output.is_dir():
        raise InputError(f"output={output}: a folder; give the name of a CSV file")
    sources = [Path(settings["input"]).expanduser(), *(file for _, file in files)]
    if output.resolve() in {path.resolve() for path in sources if path.name == output.name}:
        raise InputError(f"output={output}: one of the inputs; give another name")
    return output


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line; return the exit code."""
    return run_command(predict, "predict", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
