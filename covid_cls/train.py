"""python -m covid_cls.train: trains one cell of the grid, or with -m all of them."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from covid_cls.command import check_section, plain, recipe, run_command
from covid_cls.errors import InputError
from covid_cls.labels import TASKS
from covid_cls.sweep import inside_sweep, name_cell

if TYPE_CHECKING:
    from covid_cls.data.datamodule import Radiographs
    from covid_cls.training.run import Run

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> None:
    """Train the cell that `cfg` describes into its run folder; go on where an earlier start was stopped."""
    # Imported late: --help, a misspelt key and the processes that decode images need no torch.
    from pytorch_lightning import seed_everything
    from pytorch_lightning.utilities import rank_zero_only

    from covid_cls.audits.findings import gate
    from covid_cls.data.datamodule import Radiographs
    from covid_cls.evaluation.operating import fit_operating
    from covid_cls.models.losses import check_weighting
    from covid_cls.models.transforms import Augment
    from covid_cls.reporting.results import report_lines
    from covid_cls.training.features import fixed_views
    from covid_cls.training.run import open_run
    from covid_cls.training.start import SECTIONS

    settings = plain(cfg)
    for name, constructor in {**SECTIONS, "operating": fit_operating}.items():
        check_section(name, constructor, settings[name])
    check_weighting(settings["loss"], settings["data"]["sampler"])
    if (settings["trainer"]["max_epochs"] or 0) < 1:
        raise InputError("trainer.max_epochs must be a number of at least 1")
    seed_everything(settings["seed"], workers=True, verbose=False)
    augment = Augment(**settings["augment"])
    fixed_views(settings["feature_cache"], augment, settings["strategy"])
    canvas = augment.canvas(settings["preprocess"]["crop"])
    data = Radiographs(TASKS[settings["task"]["name"]], canvas, settings["seed"], **settings["data"])
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


def train_cell(settings: dict[str, Any], data: "Radiographs", run: "Run", notes: list[str]) -> None:
    """Fit, predict and report one cell; whatever happens, run.json says how it ended. notes: for run.json, too."""
    from covid_cls.assemble import build_trainer
    from covid_cls.audits.probes import write_probes
    from covid_cls.reporting.results import write_results
    from covid_cls.training.callbacks import EpochHistory
    from covid_cls.training.checkpoints import load_classifier
    from covid_cls.training.features import prediction_features
    from covid_cls.training.predict import predict_split
    from covid_cls.training.start import prepare_fit, start_classifier
    from covid_cls.training.stress import write_stress

    resume = run.last_checkpoint
    classifier = start_classifier(settings, data, run, download=not inside_sweep())
    run.note(notes=[*run.record["notes"], *notes])
    with run.training():
        history = EpochHistory()
        trainer = build_trainer(settings, run.folder, [history])
        run.note(precision=trainer.precision)
        prepare_fit(classifier, data, trainer, settings)
        try:
            trainer.fit(classifier, data, ckpt_path=str(resume) if resume else None, weights_only=True)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stop
        if not trainer.is_global_zero:
            return
        best = load_classifier(run.folder / "checkpoints" / "best.ckpt").to(trainer.strategy.root_device)
        scorer, splits = best.scorer(), ("val", "test") if settings["test"] else ("val",)
        cached = settings["feature_cache"] != "off"
        features = prediction_features(best, data, splits, settings["feature_cache_gb"]) if cached else None
        tables = {split: predict_split(scorer, data, split, features) for split in splits}
        if settings["probes"]:
            write_probes(data, run.folder / "probes", splits)
            write_stress(scorer, data, run.folder / "probes", splits[-1])
        write_results(run, tables, scorer, data, history.rows, trainer.logger)


if __name__ == "__main__":
    run_command(train, "train", stopped="the same command goes on from the last finished epoch", isolated=True)
