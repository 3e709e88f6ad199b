"""python -m covid_cls.train: trains one cell of the grid, or with -m all of them."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from covid_cls.command import check_name, check_section, plain, recipe, run_command
from covid_cls.errors import InputError
from covid_cls.sweep import name_cell

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> None:
    """Train the cell that `cfg` describes into its run folder; go on where an earlier start was stopped."""
    settings = plain(cfg)
    # Imported late: --help, a misspelt key and the processes that decode images need no torch.
    from pytorch_lightning import seed_everything
    from pytorch_lightning.utilities import rank_zero_only

    from covid_cls.evaluation.operating import fit_operating
    from covid_cls.models.losses import check_weighting
    from covid_cls.models.transforms import Augment
    from covid_cls.training.features import fixed_views
    from covid_cls.training.sections import SECTIONS, read_data

    for name, constructor in {**SECTIONS, "operating": fit_operating}.items():
        check_section(name, constructor, settings[name])
    check_name(settings["name"] or recipe())
    check_weighting(settings["loss"], settings["data"]["sampler"])
    if (settings["trainer"]["max_epochs"] or 0) < 1:
        raise InputError("trainer.max_epochs must be a number of at least 1")
    seed_everything(settings["seed"], workers=True, verbose=False)
    fixed_views(settings["feature_cache"], Augment(**settings["augment"]), settings["strategy"])
    data = read_data(settings)

    # Imported when the data have been read, and any fault of them has been reported.
    from covid_cls.audits.findings import gate
    from covid_cls.cell import train_cell
    from covid_cls.reporting.results import report_lines
    from covid_cls.training.run import open_run

    root = Path(settings["output_root"]) / str(settings["name"] or recipe() or data.name)
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning hangs the rank on the function
    if not first:
        logging.disable(logging.INFO)
    with open_run(root, settings, data.digest, rerun=settings["rerun"], writes=first) as run:
        name_cell(run.folder)
        if run.finished:
            log.info("this cell is finished; rerun=true trains it anew")
        else:
            train_cell(settings, data, run, gate(data, settings["audit"]))
        if first:
            log.info("\n".join(report_lines(run.folder)))


def finished(cfg: DictConfig) -> Path | None:
    """The run folder of a cell of which nothing is left to do, if there is one: a sweep starts no process for it."""
    from covid_cls.training.identity import finished_folder

    settings = plain(cfg)
    return None if settings["rerun"] else finished_folder(settings, str(settings["name"] or recipe() or "*"))


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line; return the exit code."""
    stopped = "the same command goes on from the last finished epoch"
    return run_command(train, "train", words, stopped=stopped, finished=finished)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
