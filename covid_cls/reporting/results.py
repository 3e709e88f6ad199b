"""What a finished run leaves for its readers: predictions, metrics, history, pictures, and a few lines of text."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning.loggers import TensorBoardLogger

from covid_cls.artifact.files import CARD
from covid_cls.artifact.record import best_epoch, write_model
from covid_cls.data.datamodule import Radiographs
from covid_cls.evaluation.summary import summarise
from covid_cls.models.scorer import Scorer
from covid_cls.records import (
    DISCLAIMER,
    MODEL,
    read_json,
    read_predictions,
    whole_file,
    write_json,
    write_predictions,
)
from covid_cls.reporting.data_card import data_card
from covid_cls.reporting.figures import confusion_matrix, learning_curves, roc_curves, save_figure
from covid_cls.reporting.tensorboard import write_hparams, write_text
from covid_cls.training.run import Run


def write_results(
    run: Run,
    tables: dict[str, pd.DataFrame],
    scorer: Scorer,
    data: Radiographs,
    history: list[dict[str, float]],
    logger: Any,
) -> None:
    """Write predictions-<split>.csv, metrics.json, history.csv, figures/, model/ and TensorBoard's last entries.

    tables: a predictions table per split. history: an epoch's numbers per row. Every number but the test predictions
    is a function of training and validation: those are written and not read, until `evaluate` or `report` is asked.
    """
    folder, record, task = run.folder, run.record, scorer.task
    for split, table in tables.items():
        write_predictions(table, folder / f"predictions-{split}.csv")
    # What is reported comes from the file, to the last digit: anyone can compute it again.
    val = read_predictions(folder / "predictions-val.csv", task.classes)
    metrics: dict[str, Any] = {"val": summarise(val, task), "best_epoch": int(best_epoch(history)["epoch"]) + 1}
    metrics |= {"notes": record["notes"], "disclaimer": DISCLAIMER}
    write_json(folder / "metrics.json", metrics)
    epochs = pd.DataFrame(history)
    epochs["epoch"] += 1
    with whole_file(folder / "history.csv") as file:
        epochs.to_csv(file, index=False)
    for name in ("loss", "accuracy"):
        figure = learning_curves(epochs, name, best_epoch=metrics["best_epoch"])
        save_figure(figure, folder / "figures" / f"{name}.png")
    figure = confusion_matrix(metrics["val"]["confusion"]["counts"], task.classes, f"validation, {len(val)} images")
    save_figure(figure, folder / "figures" / "confusion-val.png")
    save_figure(roc_curves(val, task), folder / "figures" / "roc-val.png")
    write_model(folder, record, scorer, data, history)
    if isinstance(logger, TensorBoardLogger):
        _finish_board(folder, record, history, logger)


def _finish_board(
    folder: Path, record: dict[str, Any], history: list[dict[str, float]], logger: TensorBoardLogger
) -> None:
    """The run's HParams row and its cards."""
    write_hparams(logger, record, best_epoch(history))
    write_text(logger, "data_card", data_card(record))
    write_text(logger, "model_card", (folder / MODEL / CARD).read_text(encoding="utf-8"))


def report_lines(folder: Path) -> list[str]:
    """A finished run in a few lines of text; an empty list where nothing was finished."""
    if not (folder / "metrics.json").is_file():
        return []
    metrics = read_json(folder / "metrics.json")
    overall, images = metrics["val"]["overall"], metrics["val"]["n_images"]
    scores = ", ".join(
        f"{name.replace('_', ' ')} {overall[name]:.3f}" if overall[name] is not None else f"{name} undefined"
        for name in ("macro_auroc", "balanced_accuracy", "macro_f1", "accuracy")
    )
    lines = [f"results in {folder} (epoch {metrics['best_epoch']} was selected on validation)"]
    lines.append(f"validation ({images} images): {scores}")
    if (folder / "predictions-test.csv").is_file():
        command = shlex.join(["python", "-m", "covid_cls.evaluate", f"run={folder}"])
        lines.append(f"the test predictions are unread; this opens them: {command}")
    return [*lines, *(f"note: {note}" for note in metrics["notes"]), DISCLAIMER]
