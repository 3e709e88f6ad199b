"""What a finished run writes for its readers."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning.loggers import TensorBoardLogger

from covid_cls.bundle.card import markdown_table
from covid_cls.bundle.files import CARD, write_model
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.image_source import ImageSource
from covid_cls.evaluation.assessment import summarise
from covid_cls.io import DISCLAIMER, MODEL, atomic_file, read_json, read_predictions, write_json, write_predictions
from covid_cls.models.inference import Scorer
from covid_cls.reporting.figures import confusion_matrix, learning_curves, roc_curves, save_figure
from covid_cls.reporting.tensorboard import write_hparams
from covid_cls.tasks import TASKS
from covid_cls.training.run_folder import Run

_MAX_QUARANTINED = 20  # images that the data card lists


def write_results(
    run: Run,
    tables: dict[str, pd.DataFrame],
    scorer: Scorer,
    data: Radiographs,
    history: list[dict[str, float]],
    logger: Any,
) -> None:
    """Write predictions, metrics.json, history.csv, figures/, model/ and the last TensorBoard entries of a run.

    Args:
        run: The run, still open for writing.
        tables: A predictions table per split.
        scorer: The network with the selected weights.
        data: The images that it was trained on.
        history: Metrics per epoch, see `EpochHistory`.
        logger: Lightning's logger, or None.
    """
    folder, record, task = run.folder, run.record, scorer.task
    # Test predictions are only saved. They are scored when the user runs `evaluate` or `report`, which log the access.
    for split, table in tables.items():
        write_predictions(table, folder / f"predictions-{split}.csv")
    # Metrics are computed from the file with its rounded digits, so that anyone can reproduce them from it.
    val = read_predictions(folder / "predictions-val.csv", task.classes)
    selected = record["selected"]
    metrics: dict[str, Any] = {
        "val": summarise(val, task),
        "best_epoch": selected["epoch"],
        "selected": selected,
        "notes": record["notes"],
        "disclaimer": DISCLAIMER,
    }
    write_json(folder / "metrics.json", metrics)
    epochs = pd.DataFrame(history)
    epochs["epoch"] += 1
    with atomic_file(folder / "history.csv") as file:
        epochs.to_csv(file, index=False)
    for name in ("loss", "accuracy"):
        figure = learning_curves(epochs, name, best_epoch=metrics["best_epoch"])
        save_figure(figure, folder / "figures" / f"{name}.png")
    figure = confusion_matrix(metrics["val"]["confusion"]["counts"], task.classes, f"validation, {len(val)} images")
    save_figure(figure, folder / "figures" / "confusion-val.png")
    save_figure(roc_curves(val, task), folder / "figures" / "roc-val.png")
    write_model(folder, record, scorer, data, len(history))
    if isinstance(logger, TensorBoardLogger):
        write_hparams(logger, record, next(row for row in history if row["epoch"] + 1 == selected["epoch"]))
        logger.experiment.add_text("data_card", data_card(record))
        logger.experiment.add_text("model_card", (folder / MODEL / CARD).read_text(encoding="utf-8"))


def data_card(record: dict[str, Any]) -> str:
    """Describe the data of a run in Markdown: images per split and class, sources, quarantined images, notes.

    It answers those questions of Gebru et al. 2021, "Datasheets for Datasets", that a manifest can answer. Test images
    are counted as well.

    Args:
        record: Content of run.json.
    """
    data, settings = record["data"], record["config"]["data"]
    classes = TASKS[record["config"]["task"]["name"]].classes
    splits, patients = data["images_per_split_and_class"], data["patients_per_split"]
    rows = [
        [split, *(f"{n[name]:,}" for name in classes), f"{sum(n.values()):,}", f"{patients.get(split, 0):,}"]
        for split, n in splits.items()
    ]
    totals = [sum(n[name] for n in splits.values()) for name in classes]
    rows.append(["all", *(f"{n:,}" for n in totals), f"{data['images']:,}", f"{data['patients']:,}"])
    group = "patient" if settings["group"] == "patient" else "image, so that a patient can be in two of them"
    folds = "" if settings["folds"] is None else f"; fold {settings['fold']} of {settings['folds']} is the test part"
    parts = [
        f"# {ImageSource.from_settings(settings).name}",
        f"**{DISCLAIMER}** Splits by {group}, seed {settings['seed']}{folds}.",
        markdown_table(["split", *classes, "images", "patients"], rows),
        "## Sources",
        markdown_table(["source", "images"], [[name, f"{n:,}"] for name, n in data["sources"].items()]),
    ]
    found = data["quarantined"]
    if found:
        shown = [[row["path"], str(row["line"] or ""), row["reason"]] for row in found[:_MAX_QUARANTINED]]
        more = f" These are the first {_MAX_QUARANTINED}; run.json lists all." if len(found) > len(shown) else ""
        parts += [
            "## Quarantined",
            f"{len(found):,} images could not be decoded and were left out.{more}",
            markdown_table(["file", "line", "reason"], shown),
        ]
    notes = "\n".join(f"- {note}" for note in record["notes"])
    return "\n\n".join([*parts, "## Notes", notes or "There are no notes."]) + "\n"


def summary_lines(folder: Path) -> list[str]:
    """Summarise a finished run in a few lines of text; an unfinished run gives an empty list."""
    if not (folder / "metrics.json").is_file():
        return []
    metrics = read_json(folder / "metrics.json")
    overall = metrics["val"]["overall"]
    scores = ", ".join(
        f"{name.replace('_', ' ')} {overall[name]:.3f}" if overall[name] is not None else f"{name} undefined"
        for name in ("macro_auroc", "balanced_accuracy", "macro_f1", "accuracy")
    )
    # Version 0.1.0 recorded no monitor and selected by the validation loss.
    monitor = metrics.get("selected", {"monitor": "loss/val"})["monitor"]
    lines = [
        f"results in {folder} (epoch {metrics['best_epoch']} was selected by {monitor})",
        f"validation ({metrics['val']['n_images']} images): {scores}",
    ]
    if (folder / "predictions-test.csv").is_file():
        command = shlex.join(["python", "-m", "covid_cls.evaluate", f"run={folder}"])
        lines.append(f"Test predictions were saved but not scored. To score them: {command}")
    return [*lines, *(f"note: {note}" for note in metrics["notes"]), DISCLAIMER]
