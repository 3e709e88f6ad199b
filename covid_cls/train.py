"""python -m covid_cls.train: train one run of the grid, or with -m several runs."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covid_cls.errors import InputError
from covid_cls.io import read_json, read_predictions
from covid_cls.runtime.cli import Job, call_command, run_command
from covid_cls.runtime.schema import check_name, check_section, check_sections
from covid_cls.runtime.sweep import report_run_folder
from covid_cls.tasks import TASKS

if TYPE_CHECKING:
    import pandas as pd

    from covid_cls.bundle.model import Model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: The run folder.
    """

    folder: Path

    @property
    def metrics(self) -> dict[str, Any]:
        """Return the validation scores and the selected epoch, the content of metrics.json."""
        return read_json(self.folder / "metrics.json")

    @property
    def history(self) -> "pd.DataFrame":
        """Return losses, scores and learning rates, one row per epoch."""
        import pandas as pd

        return pd.read_csv(self.folder / "history.csv")

    def predictions(self, split: str = "val") -> "pd.DataFrame":
        """Return the predictions for the images of a split, "val" or "test".

        Reading the test predictions here is not counted as a test-set access; `covid_cls.evaluate` counts it.
        """
        task = TASKS[read_json(self.folder / "run.json")["config"]["task"]["name"]]
        return read_predictions(self.folder / f"predictions-{split}.csv", task.classes)

    def model(self, device: str = "auto") -> "Model":
        """Load the trained model, see `covid_cls.load`."""
        import covid_cls

        return covid_cls.load(self.folder, device)


def train(*overrides: str, **settings: Any) -> Run:
    """Train a run, or continue an interrupted one; a run that is finished is returned at once.

    Args:
        *overrides: Words as on the command line, such as "backbone=resnet18" or "trainer.max_epochs=5".
        **settings: More settings by their names, such as output_root="outputs".

    Raises:
        InputError: A setting or an image of the data set is wrong.
        NonFiniteError: The training diverged.
    """
    return call_command(_train, "train", overrides, settings)


def _train(job: Job) -> Run:
    settings = job.settings
    # Imported late: --help, a misspelt key and the processes that decode images need no torch.
    from pytorch_lightning import seed_everything
    from pytorch_lightning.utilities import rank_zero_only

    from covid_cls.models.losses import check_weighting
    from covid_cls.models.transforms import Augment
    from covid_cls.training.feature_cache import fixed_views
    from covid_cls.training.settings import CHECKED_ELSEWHERE, SECTIONS, RunSettings, read_data

    check_sections(settings, SECTIONS)
    own = {key: value for key, value in settings.items() if key not in {*SECTIONS, *CHECKED_ELSEWHERE}}
    check_section("", RunSettings, own)
    check_name(settings["name"] or job.recipe)
    check_weighting(settings["loss"], settings["data"]["sampler"])
    if (settings["trainer"]["max_epochs"] or 0) < 1:
        raise InputError("trainer.max_epochs: give a number of at least 1")
    seed_everything(settings["seed"], workers=True, verbose=False)
    augment = Augment(**settings["augment"])
    fixed_views(settings["feature_cache"], augment, settings["strategy"])
    data = read_data(settings, augment)

    # Imported after the data have been read, and any fault of them has been reported.
    from covid_cls.experiment import run_experiment
    from covid_cls.reporting.run_outputs import summary_lines
    from covid_cls.shortcuts.data_audit import audit_before_training
    from covid_cls.training.run_folder import open_run

    root = Path(settings["output_root"]) / str(settings["name"] or job.recipe or data.name)
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets the attribute on the function
    if not first:
        logging.disable(logging.INFO)
    with open_run(root, settings, data.digest, rerun=settings["rerun"], writes=first) as run:
        report_run_folder(run.folder)
        if run.finished:
            log.info("this run is finished; rerun=true trains it again")
        else:
            run_experiment(settings, data, run, audit_before_training(data, settings["audit"]))
        if first:
            log.info("\n".join(summary_lines(run.folder)))
    return Run(run.folder)


def _finished(job: Job) -> Path | None:
    """Return the folder of a run that is already finished, so that a sweep starts no process for it."""
    from covid_cls.training.run_folder import finished_folder

    settings = job.settings
    return None if settings["rerun"] else finished_folder(settings, str(settings["name"] or job.recipe or "*"))


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line and return the exit code."""
    stopped = "the same command continues from the last finished epoch"
    return run_command(_train, "train", words, stopped=stopped, finished=_finished)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
