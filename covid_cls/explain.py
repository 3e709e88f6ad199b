"""python -m covid_cls.explain: what a model looks at, in pictures, and in numbers that say what they are worth."""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from covid_cls.command import check_paths, check_section, existing_folder, plain, run_command
from covid_cls.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def explain(cfg: DictConfig) -> None:
    """Explain the images that `cfg` names; a page, pictures, a table and a record in `output`."""
    settings = plain(cfg)
    _check_subject(settings)
    folder = existing_folder(settings, "model" if settings["run"] is None else "run")
    # Imported late: --help and a misspelt key need no torch.
    from covid_cls.artifact.model import load
    from covid_cls.reporting.explain_page import text_lines, write_explained
    from covid_cls.reporting.explanations import Options, check_options, explain_images

    chosen = {name: settings[name] for name in Options._fields}
    check_section("explain", Options, chosen)
    options = Options(**chosen)
    model = load(folder, settings["device"])
    model.cut(options.threshold)
    check_options(options, model.task)
    command = shlex.join(["python", "-m", "covid_cls.explain", *HydraConfig.get().overrides.task])
    images, words = _images(settings, folder, command)
    output = Path(settings["output"] or Path(settings["output_root"]) / "explain" / model.record["name"]).expanduser()
    explained = explain_images(model, images, options)
    facts = {"model": model.record["name"], "images": words, "command": command}
    write_explained(output, explained, options, facts)
    log.info("\n".join([*text_lines(explained, options.method), f"results in {output}"]))


def _check_subject(settings: dict[str, Any]) -> None:
    """InputError unless one of model= with input=, and run=, is given, all as texts."""
    given = [name for name in ("model", "input", "run") if settings[name] is not None]
    if given not in (["model", "input"], ["run"]):
        raise InputError("give model=FOLDER with input=IMAGES, or run=FOLDER with split=val")
    check_paths(settings, *given, "split")


def _images(settings: dict[str, Any], folder: Path, command: str) -> tuple["pd.DataFrame", str]:
    """The images to be explained, and what to call them."""
    from covid_cls.data.inputs import input_name
    from covid_cls.reporting.explanations import input_images, split_images

    if settings["run"] is None:
        return input_images(settings["input"]), input_name(settings["input"])
    return split_images(folder, settings["split"], command), f"the run's own {settings['split']} split"


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line; return the exit code."""
    return run_command(explain, "explain", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
