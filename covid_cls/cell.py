"""One cell of the grid, from its data and an open run folder to its results."""

from typing import Any

import torch

from covid_cls.assemble import build_trainer
from covid_cls.audits.probes import write_probes
from covid_cls.data.datamodule import Radiographs
from covid_cls.interrupts import deferred
from covid_cls.reporting.results import write_results
from covid_cls.sweep import inside_sweep
from covid_cls.training.callbacks import EpochHistory
from covid_cls.training.checkpoints import load_classifier
from covid_cls.training.features import prediction_features
from covid_cls.training.predict import predict_split
from covid_cls.training.run import Run
from covid_cls.training.start import prepare_fit, start_classifier
from covid_cls.training.stopping import SafePoints
from covid_cls.training.stress import write_stress


def train_cell(settings: dict[str, Any], data: Radiographs, run: Run, notes: list[str]) -> None:
    """Fit, predict and report one cell; whatever happens, run.json says how it ended. notes: for run.json, too."""
    resume, checkpoint = run.last_checkpoint()
    classifier = start_classifier(settings, data, run, not inside_sweep(), checkpoint)
    del checkpoint  # as large as the network and the optimizer's state, and Lightning reads it itself
    run.note(notes=[*run.record["notes"], *notes, *run.record.get("damage", [])])
    if resume:
        torch.set_num_threads(run.record["device"]["threads"])  # another number of them rounds differently
    with run.training():
        history = EpochHistory()
        trainer = build_trainer(settings, run.folder, [history, SafePoints()])
        run.note(precision=trainer.precision)
        prepare_fit(classifier, data, trainer, settings)
        with deferred():
            trainer.fit(classifier, data, ckpt_path=str(resume) if resume else None, weights_only=True)
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
