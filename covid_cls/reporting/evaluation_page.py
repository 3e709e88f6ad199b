"""The subject of an evaluation, and its result as files, as text for the console and as a page."""

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from covid_cls.errors import InputError
from covid_cls.evaluation.predictions import Predictions, finished_run, load_predictions, refuse_shared_images
from covid_cls.evaluation.thresholds import check_frozen_targets, fit_operating, frozen_operating
from covid_cls.io import DISCLAIMER, MODEL, atomic_file, write_json, write_predictions
from covid_cls.reporting.access_log import record_test_access
from covid_cls.reporting.figures import (
    confusion_matrix,
    decision_curves,
    precision_recall_panel,
    reliability_curves,
    roc_panel,
    save_figure,
)
from covid_cls.reporting.html import (
    Table,
    confusion,
    number,
    render,
    score_label,
    svg_figure,
    text_table,
    with_interval,
)
from covid_cls.tasks import Task

_OVERALL = (
    *("accuracy", "balanced_accuracy", "macro_auroc", "macro_f1", "mcc", "brier", "nll"),
    # Of the multilabel task only.
    *("label_accuracy", "covid_f1_at_half"),
)
_RATES = ("sensitivity", "specificity", "ppv", "npv")
_POINT_HEADERS = ("threshold", *map(score_label, _RATES))
_PER_CLASS = ("auroc", "average_precision", *_RATES, "f1")
_PER_SOURCE = ("accuracy", "covid.auroc", "covid.sensitivity", "covid.specificity")
_WITHOUT_IMAGES = ("accuracy", "balanced_accuracy", "nll", "brier")
# Notes that forbid to read the scores as evidence are repeated at the top of the page.
_SEVERE = ("SOURCE-CONFOUNDED", "LEAKY SPLIT")
Rows = list[list[str]]


class Subject(NamedTuple):
    """The predictions that are evaluated.

    Attributes:
        scored: The predictions.
        operating: Temperature and thresholds that were fitted on validation; None without validation predictions.
        output: Default folder of the results.
        facts: What metrics.json says about the subject: subject, split and, for a test split, its accesses.
        model: Folder of the model whose card takes the results; None if there is none.
    """

    scored: Predictions
    operating: dict[str, Any] | None
    output: Path
    facts: dict[str, Any]
    model: Path | None = None


def run_subject(folder: Path, targets: dict[str, float], command: str) -> Subject:
    """Return the test predictions of a finished run.

    Args:
        folder: Folder of the run.
        targets: Sensitivity and specificity to reach on validation, as for `fit_operating`.
        command: The command as typed, for the log of test-set accesses.

    Raises:
        InputError: If the run is not finished or has no test predictions.
    """
    record, task = finished_run(folder)
    # Temperature and thresholds are frozen before the test predictions are read, so that they cannot depend on them.
    operating = frozen_operating(folder, task, **targets)
    path = folder / "predictions-test.csv"
    if not path.is_file():
        raise InputError(f"{path}: no such file. Train the run with test=true to save its test predictions.")
    accesses = record_test_access(folder, command)
    # Records of earlier versions have this key.
    facts = {"subject": folder.name, "split": "test", "openings": accesses._asdict()}
    scored = _with_notes(load_predictions(path, task), record.get("notes", []))
    model = folder / MODEL if (folder / MODEL).is_dir() else None
    return Subject(scored, operating, folder / "evaluation", facts, model)


def external_subject(folder: Path, targets: dict[str, float], data: dict[str, Any], output: Path | None) -> Subject:
    """Predict other images with a model and write predictions-external.csv to `output`.

    The model uses its own preprocessing, temperature and thresholds. If it is the model of a run, images that it may
    have been trained on are noted.

    Args:
        folder: Folder of a model, or of a run.
        targets: As for `fit_operating`; they must match the thresholds of the model.
        data: Settings of `ExternalRadiographs`.
        output: Folder of the results; None: next to the model.
    """
    # Imported here because predictions from a CSV need no torch.
    from covid_cls.bundle.model import load
    from covid_cls.data.datamodule import EXTERNAL_SPLIT, ExternalRadiographs, seen_in_training
    from covid_cls.data.image_source import DataSettings
    from covid_cls.training.split_predictions import predict_split

    config = finished_run(folder)[0]["config"] if (folder / "run.json").is_file() else None
    model = load(folder)
    operating = check_frozen_targets(model.record["operating"], targets, folder)
    view = model.scorer.preprocess
    images = ExternalRadiographs(model.task, view.size, view.crop, DataSettings(**data))
    output = output or folder / f"evaluation-{images.name}"
    path = output / "predictions-external.csv"
    write_predictions(predict_split(model.scorer, images, EXTERNAL_SPLIT), path)
    unknown = "it is unknown whether the model was trained on some of these images; run= instead of model= checks that"
    seen = seen_in_training(images.table, config["data"]) if config else [unknown]
    scored = _with_notes(load_predictions(path, model.task), [*images.notes, *seen, *model.record["notes"]])
    facts = {"subject": f"{model.record['name']} on {images.name}", "split": EXTERNAL_SPLIT}
    return Subject(scored, operating, output, facts)


def csv_subject(path: Path, targets: dict[str, float], validation: Path | None, task: Task | None) -> Subject:
    """Return predictions from a CSV file of any origin.

    Args:
        path: The predictions.
        targets: As for `fit_operating`.
        validation: Predictions of other images, to which temperature and thresholds are fitted.
        task: None to infer it from the columns.
    """
    scored = load_predictions(path, task)
    operating = None
    if validation:
        val = load_predictions(validation, scored.task)
        refuse_shared_images(val.table, scored.table, validation, path)
        operating = fit_operating(val.table, scored.task, **targets)
    # A file of unknown origin does not tell to which split its images belong.
    return Subject(scored, operating, path.parent / "evaluation", {"subject": path.name, "split": None})


def write_evaluation(output: Path, record: dict[str, Any], scored: Predictions) -> None:
    """Write metrics.json, figures/*.png and evaluation.html into `output`.

    Args:
        output: Folder of the results.
        record: The record of `assess` and the facts of the `Subject`.
        scored: The predictions that the record is about.
    """
    task, tables = scored.task, [scored.table]
    write_json(output / "metrics.json", {"disclaimer": DISCLAIMER, **record})
    figures = {
        "roc": roc_panel(tables, task),
        "precision_recall": precision_recall_panel(tables, task),
        "reliability": reliability_curves(record["calibration"]),
        "decision_curve": decision_curves(record["decision_curve"]),
    }
    counts = record["image"]["confusion"]["counts"]
    pictures = {**figures, "confusion": confusion_matrix(counts, task.classes, _title(record))}
    # The PNG files come first, because the page makes the background of its figures transparent.
    for name, figure in pictures.items():
        save_figure(figure, output / "figures" / f"{name}.png")
    with atomic_file(output / "evaluation.html") as file:
        file.write(_page(record, figures).encode())


def text_lines(record: dict[str, Any]) -> list[str]:
    """Return the most important scores and all notes of a record, as text for the console."""
    levels = _levels(record)
    rows = [["", *levels], *_overall_rows(record)]
    for name in record["classes"]:
        for score in ("auroc", "sensitivity", "specificity"):
            values = (level["per_class"][name][score] for level in levels.values())
            rows.append([f"{name} {score_label(score)}", *map(with_interval, values)])
    lines = [_title(record), text_table(rows)]
    # The most probable class has no threshold; its rates are in the table above.
    points = [row for row in _point_rows(record["image"]) if row[1] != "–"]
    if points:
        lines += [
            "covid by thresholds chosen on validation:",
            text_table([["", *_POINT_HEADERS], *points]),
        ]
    for name in ("before", "after"):
        if part := record["calibration"][name]:
            # A multilabel task has no most probable class and therefore no ECE of it.
            error = part.get("ece") or part["covid_ece"]
            lines.append(
                f"calibration {name} temperature: ECE {number(error['value'])} "
                f"(a perfect model: {number(error['null'])}), slope {with_interval(part['slope'], 2)}"
            )
    return [*lines, *(f"note: {note}" for note in record["notes"]), *_accesses(record), DISCLAIMER]


def _with_notes(scored: Predictions, notes: list[str]) -> Predictions:
    return scored._replace(notes=[*notes, *scored.notes])


def _title(record: dict[str, Any]) -> str:
    split = f", {record['split']}" if record["split"] else ""
    return f"{record['subject']}{split}: {record['n_images']} images of {record['n_patients']} patients"


def _accesses(record: dict[str, Any]) -> list[str]:
    accesses = record.get("openings")
    if not accesses:
        return []
    if accesses["times"] == 1:
        return ["This is the first access to the test predictions of this run."]
    return [f"The test predictions of this run were accessed {accesses['times']} times since {accesses['first']}."]


def _levels(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores per image and, if patients have several images, per patient."""
    return {title: record[name] for title, name in (("Images", "image"), ("Patients", "patient")) if record[name]}


def _overall_rows(record: dict[str, Any]) -> Rows:
    levels = [level["overall"] for level in _levels(record).values()]
    return [
        [score_label(name), *(with_interval(level[name]) for level in levels)] for name in _OVERALL if name in levels[0]
    ]


def _point_rows(level: dict[str, Any]) -> Rows:
    return [
        [_point_title(name), number(point["threshold"]), *(with_interval(point[rate]) for rate in _RATES)]
        for name, point in level["operating_points"].items()
    ]


def _point_title(point: str) -> str:
    """Return a readable name of an operating point, e.g. "sensitivity 95 %"."""
    name, _, percent = point.partition("_")
    return f"{name} {percent} %" if percent else {"decision": "most probable class", "youden": "Youden"}[name]


def _page(record: dict[str, Any], figures: dict[str, Figure]) -> str:
    levels = _levels(record)
    captions = {
        "roc": "Each class against the rest.",
        "precision_recall": "Precision depends on how frequent a class is in these images.",
        "reliability": "Perfect calibration follows the dashed line. Bars: 95 % intervals over the images of a bin.",
        "decision_curve": "Net benefit per image: true positives − false positives × threshold / (1 − threshold).",
    }
    return render(
        "evaluation.html.j2",
        record=record,
        title=_title(record),
        accesses=_accesses(record),
        severe=[note for note in record["notes"] if note.startswith(_SEVERE)],
        level=f"{100 * record['settings']['level']:g} %",
        overall=Table(["", *levels], _overall_rows(record)),
        classes=[_class_table(title, level["per_class"]) for title, level in levels.items()],
        confusion=[
            confusion(record["classes"], level["confusion"]["counts"], title) for title, level in levels.items()
        ],
        figures={name: svg_figure(figure, captions[name]) for name, figure in figures.items()},
        points=[table for title, level in levels.items() for table in _point_tables(title, level)],
        temperature=number(record["calibration"]["temperature"]) if record["calibration"]["after"] else None,
        calibration=_calibration_table(record["calibration"]),
        association=number(record["source_association"], 2),
        sources=_source_table(record),
        without_images=_without_images_table(record["baselines"]),
    )


def _class_table(title: str, classes: dict[str, Any]) -> Table:
    headers = [title, *(f"{name}, n = {scores['n']}" for name, scores in classes.items())]
    rows = [[score_label(name), *(with_interval(scores[name]) for scores in classes.values())] for name in _PER_CLASS]
    return Table(headers, rows)


def _point_tables(title: str, level: dict[str, Any]) -> list[Table]:
    points = level["operating_points"]
    shares = [f"{at['prevalence']:.0%} covid" for at in points["decision"]["at_prevalence"]]
    rows = [
        [_point_title(name), *(f"{number(at['ppv'])} / {number(at['npv'])}" for at in point["at_prevalence"])]
        for name, point in points.items()
    ]
    return [
        Table([title, *_POINT_HEADERS], _point_rows(level)),
        Table([f"{title}: PPV / NPV at", *shares], rows),
    ]


def _calibration_table(calibration: dict[str, Any]) -> Table:
    parts = {name: calibration[name] for name in ("before", "after") if calibration[name]}
    rows = [[score_label(name), *(number(part[name]) for part in parts.values())] for name in ("nll", "brier")]
    for name, title in (("ece", "ECE, most probable class"), ("covid_ece", "ECE, p(covid)")):
        errors = [part[name] for part in parts.values() if name in part]
        if errors:
            rows.append([title, *(number(error["value"]) for error in errors)])
            null = (f"{number(error['null'])}, up to {number(error['null_p95'])}" for error in errors)
            rows.append(["… of a perfectly calibrated model", *null])
    rows += [
        [f"covid, {name}", *(with_interval(part[name], 2) for part in parts.values())]
        for name in ("slope", "intercept")
    ]
    return Table(["", *parts], rows)


def _source_table(record: dict[str, Any]) -> Table:
    rows = [
        [
            source["source"] + (", one label" if source["label_pure"] else ""),
            *(str(source[key]) for key in ("n_images", "n_patients")),
            " / ".join(str(source["n_per_class"][name]) for name in record["classes"]),
            # On two lines, so that all columns are visible without scrolling.
            *(with_interval(source["scores"].get(name)).replace(" (", "\n(") for name in _PER_SOURCE),
        ]
        for source in record["sources"]
    ]
    return Table(["source", "images", "patients", " / ".join(record["classes"]), *map(score_label, _PER_SOURCE)], rows)


def _without_images_table(baselines: dict[str, Any]) -> Table:
    constant, random = baselines["constant"], baselines["random"]
    rows = [
        [title, *(number(scores.get(name)) for name in _WITHOUT_IMAGES)]
        for title, scores in (
            (f"always {constant['class']}, class shares as probabilities", constant),
            ("classes drawn at random by their shares", random),
        )
    ]
    return Table(["", "accuracy", "balanced accuracy", "NLL", "Brier score"], rows)
