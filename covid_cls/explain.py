"""python -m covid_cls.explain: which places of an image a model uses, and how reliable such pictures are."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covid_cls.errors import InputError
from covid_cls.io import read_json
from covid_cls.runtime.cli import Job, call_command, run_command
from covid_cls.runtime.schema import check_paths, check_section, existing_folder

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explanation:
    """Written attributions.

    Attributes:
        folder: Where explain.html, overlays/, explain.csv and explain.json are.
    """

    folder: Path

    @property
    def table(self) -> "pd.DataFrame":
        """Return explain.csv: the map metrics of each image."""
        import pandas as pd

        return pd.read_csv(self.folder / "explain.csv")

    @property
    def summary(self) -> dict[str, Any]:
        """Return explain.json: the map metrics of all images."""
        return read_json(self.folder / "explain.json")


def explain(*overrides: str, **settings: Any) -> Explanation:
    """Explain the predictions for images, e.g. `explain(model=folder, input="scans")` or `explain(run=folder)`.

    Args:
        *overrides: Words as on the command line.
        **settings: More settings by their names.

    Raises:
        InputError: The model or the images cannot be read, or a setting is wrong.
    """
    return call_command(_explain, "explain", overrides, settings)


def _explain(job: Job) -> Explanation:
    settings = job.settings
    _check_subject(settings)
    folder = existing_folder(settings, "model" if settings["run"] is None else "run")
    # Imported late: --help and a misspelt key need no torch.
    from covid_cls.bundle.model import load
    from covid_cls.reporting.explain_page import Options, check_options, explain_images, text_lines, write_explained

    chosen = {name: settings[name] for name in Options._fields}
    check_section("", Options, chosen)
    options = Options(**chosen)
    model = load(folder, settings["device"])
    # Raises InputError for an unknown threshold, before images are read.
    model.resolve_threshold(options.threshold)
    check_options(options, model.task)
    images, description = _images(job, folder)
    output = Path(settings["output"] or Path(settings["output_root"]) / "explain" / model.record["name"]).expanduser()
    explained = explain_images(model, images, options)
    facts = {"model": model.record["name"], "images": description, "command": job.command}
    write_explained(output, explained, options, facts)
    log.info("\n".join([*text_lines(explained, options.method), f"results in {output}"]))
    return Explanation(output)


def _check_subject(settings: dict[str, Any]) -> None:
    """Raise InputError unless either model= with input=, or run= is given, all as text."""
    given = [name for name in ("model", "input", "run") if settings[name] is not None]
    if given not in (["model", "input"], ["run"]):
        raise InputError("give model=FOLDER with input=IMAGES, or run=FOLDER with split=val")
    check_paths(settings, *given, "split")


def _images(job: Job, folder: Path) -> tuple["pd.DataFrame", str]:
    """Return the table of the images and a description of them."""
    from covid_cls.data.manifest import input_name
    from covid_cls.reporting.explain_page import input_images, split_images

    settings = job.settings
    if settings["run"] is None:
        return input_images(settings["input"]), input_name(settings["input"])
    return split_images(folder, settings["split"], job.command), f"the {settings['split']} split of the run"


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line and return the exit code."""
    return run_command(_explain, "explain", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
