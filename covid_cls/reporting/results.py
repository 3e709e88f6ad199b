"""What a finished run leaves for its readers: predictions, metrics, history, pictures, and a few lines of text."""

import math
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning.loggers import TensorBoardLogger

from covid_cls.evaluation.summary import summarise
from covid_cls.labels import Task
from covid_cls.records import read_json, read_predictions, whole_file, write_json, write_predictions
from covid_cls.reporting.figures import confusion_matrix, learning_curves, roc_curves, save_figure
from covid_cls.reporting.html import DISCLAIMER
from covid_cls.reporting.tensorboard import write_hparams, write_text


def write_results(
    folder: Path,
    tables: dict[str, pd.DataFrame],
    task: Task,
    history: list[dict[str, float]],
    logger: Any,
    record: dict[str, Any],
) -> None:
    """Write predictions-<split>.csv, metrics.json, history.csv, figures/ and TensorBoard's last entries of a run.

    tables: a predictions table per split. history: an epoch's numbers per row. record: run.json. Every number of
    metrics.json is a function of the validation table alone: the test predictions are written and not read, until
    `evaluate` or `report` is asked for them.
    """
    for split, table in tables.items():
        write_predictions(table, folder / f"predictions-{split}.csv")
    # What is reported comes from the file, to the last digit: anyone can compute it again.
    val = read_predictions(folder / "predictions-val.csv", task.classes)
    best = min(history, key=lambda row: row.get("loss/val", math.inf))
    metrics: dict[str, Any] = {"val": summarise(val, task), "best_epoch": int(best["epoch"]) + 1}
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
    if isinstance(logger, TensorBoardLogger):
        config = record["config"]
        hparams = {
            "task": task.name,
            "backbone": config["backbone"]["name"],
            "strategy": config["strategy"]["freeze_until"] or config["strategy"]["name"],
            "loss": config["loss"]["name"],
            "weights": record["weights"]["used"],
            "seed": int(config["seed"]),
        }
        keys = ("loss/val", "auroc/val", "f1/val", "accuracy/val")
        write_hparams(logger, hparams, {f"best/{key.replace('/', '_')}": best[key] for key in keys})
        write_text(logger, "run", "\n".join([f"- {note}" for note in record["notes"]] + [f"- {DISCLAIMER}"]))


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
