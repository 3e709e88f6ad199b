"""One evaluation for its readers: metrics.json, figures, evaluation.html, and a table on the console."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covid_cls.evaluation.predictions import Predictions
from covid_cls.labels import Task
from covid_cls.records import DISCLAIMER, whole_file, write_json
from covid_cls.reporting import html
from covid_cls.reporting.evaluation_figures import decision_curves, reliability_curves
from covid_cls.reporting.figures import confusion_matrix, save_figure
from covid_cls.reporting.report_figures import confusion_table, precision_recall_figure, roc_figure
from covid_cls.reporting.text import text_table

_OVERALL = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_auroc": "macro AUROC",
    "macro_f1": "macro F1",
    "mcc": "MCC",
    "brier": "Brier score",
    "nll": "negative log likelihood",
    "label_accuracy": "accuracy per label",
    "covid_f1_at_half": "covid F1, label cut at 0.5",
}
_RATES = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV"}
_CLASS = {"auroc": "AUROC", "average_precision": "average precision", **_RATES, "f1": "F1"}
_SOURCE = {
    "accuracy": "accuracy",
    "covid.auroc": "covid AUROC",
    "covid.sensitivity": "covid sensitivity",
    "covid.specificity": "covid specificity",
}
Rows = list[tuple[str, ...]]


def write_evaluation(output: Path, record: dict[str, Any], scored: Predictions) -> None:
    """Write metrics.json, figures/*.png and evaluation.html of `assess`'s record with its facts into `output`.

    record: with subject, split and, for a run's test split, openings. scored: the predictions that it is about.
    """
    task, tables = scored.task, [scored.table]
    write_json(output / "metrics.json", {"disclaimer": DISCLAIMER, **record})
    drawn = {
        "roc": (roc_figure(tables, task), "Each class against the rest."),
        "precision_recall": (precision_recall_figure(tables, task), "Depends on how frequent a class is here."),
        "reliability": (
            reliability_curves(record["calibration"]),
            "Perfect calibration follows the dashed line. Bars: 95 % over a bin's images.",
        ),
        "decision_curve": (
            decision_curves(record["decision_curve"]),
            "True less false positives per image, a false one weighing threshold / (1 − threshold).",
        ),
    }
    for name, (figure, _) in drawn.items():
        save_figure(figure, output / "figures" / f"{name}.png")
    counts = record["image"]["confusion"]["counts"]
    save_figure(confusion_matrix(counts, task.classes, _title(record)), output / "figures" / "confusion.png")
    pictures = {name: html.figure(figure, caption) for name, (figure, caption) in drawn.items()}
    with whole_file(output / "evaluation.html") as file:
        file.write(_page(record, task, pictures).encode())


def text_lines(record: dict[str, Any]) -> list[str]:
    """The record in a table and its notes, for the console."""
    levels = _levels(record)
    rows: Rows = [("", *levels), *_overall_rows(record)]
    for name in record["classes"]:
        for score in ("auroc", "sensitivity", "specificity"):
            shown = (_shown(level["per_class"][name][score]) for level in levels.values())
            rows.append((f"{name} {_CLASS[score]}", *shown))
    lines = [_title(record), text_table(rows)]
    points = [row for row in _point_rows(record["image"]["operating_points"]) if row[1] != "–"]
    if points:
        lines += ["covid by thresholds chosen on validation:", text_table([_POINT_HEADS, *points])]
    calibration = record["calibration"]
    stages = [(name, calibration[name]) for name in ("before", "after") if calibration[name]]
    for name, part in stages:
        gap = part.get("ece") or part["covid_ece"]
        lines.append(
            f"calibration {name} temperature: ECE {_number(gap['value'])} (a perfect model: {_number(gap['null'])}), "
            f"slope {_shown(part['slope'], 2)}"
        )
    return [*lines, *(f"note: {note}" for note in record["notes"]), *_openings(record), DISCLAIMER]


_POINT_HEADS = ("", "threshold", *_RATES.values())


def _title(record: dict[str, Any]) -> str:
    where = f", {record['split']}" if record["split"] else ""
    return f"{record['subject']}{where}: {record['n_images']} images of {record['n_patients']} patients"


def _page(record: dict[str, Any], task: Task, pictures: dict[str, str]) -> str:
    level = f"{100 * record['settings']['level']:g} %"
    lead = html.paragraph(_title(record)) + "".join(html.paragraph(text) for text in _openings(record))
    grave = [note for note in record["notes"] if note.startswith(("SOURCE-CONFOUNDED", "LEAKY SPLIT"))]
    lead += "".join(html.paragraph(note, "banner bad") for note in grave)
    sections = [
        html.Section(
            "Scores",
            html.table(["", *_levels(record)], _overall_rows(record)) + _class_tables(record),
            f"In brackets: {level} intervals by the patient bootstrap, {record['settings']['resamples']} resamples, "
            "exact where no resample differs. They cover the choice of patients, not of training seed or "
            "hospital. The decision is the most probable class.",
        ),
        html.Section(
            "Confusion and ranking",
            html.panels(
                [
                    confusion_table(np.array(level["confusion"]["counts"]), task, words)
                    for words, level in _levels(record).items()
                ]
            )
            + html.panels([pictures["roc"], pictures["precision_recall"]]),
        ),
        _operating_section(record),
        _calibration_section(record, pictures["reliability"]),
        html.Section(
            "Decision curve",
            html.panels([pictures["decision_curve"]]),
            "A model is of use where its curve lies above both treating everybody and treating nobody.",
        ),
        _source_section(record),
        html.Section(
            "Without looking at images",
            html.table(["", "accuracy", "balanced accuracy", "NLL", "Brier score"], _baseline_rows(record)),
            f"Class shares are those of {record['baselines']['shares_from']}.",
        ),
        html.Section("Notes", html.bullets(record["notes"])),
    ]
    return html.page(f"Evaluation of {record['subject']}", lead, sections)


def _overall_rows(record: dict[str, Any]) -> Rows:
    levels = [level["overall"] for level in _levels(record).values()]
    return [
        (words, *(_shown(level[name]) for level in levels)) for name, words in _OVERALL.items() if name in levels[0]
    ]


def _class_tables(record: dict[str, Any]) -> str:
    parts = []
    for words, level in _levels(record).items():
        classes = level["per_class"]
        heads = [words, *(f"{name}, n = {scores['n']}" for name, scores in classes.items())]
        rows = [(label, *(_shown(classes[name][score]) for name in classes)) for score, label in _CLASS.items()]
        parts.append(html.table(heads, rows))
    return "".join(parts)


def _levels(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {words: record[name] for words, name in (("Images", "image"), ("Patients", "patient")) if record[name]}


def _operating_section(record: dict[str, Any]) -> html.Section:
    parts = []
    for words, level in _levels(record).items():
        points = level["operating_points"]
        shares = [at["prevalence"] for at in points["decision"]["at_prevalence"]]
        parts.append(html.table([words, *_POINT_HEADS[1:]], _point_rows(points)))
        rows = [
            (_words(name), *(f"{_number(at['ppv'])} / {_number(at['npv'])}" for at in point["at_prevalence"]))
            for name, point in points.items()
        ]
        parts.append(html.table([f"{words}: PPV / NPV at", *(f"{share:.0%} covid" for share in shares)], rows))
    return html.Section(
        "Operating points",
        "".join(parts),
        "Covid against the rest. Thresholds of calibrated p(covid) were chosen on validation and frozen before these "
        "images were looked at; the decision is the most probable class. PPV and NPV depend on how frequent covid is: "
        "the lower tables give them elsewhere, by Bayes, for the same sensitivity and specificity.",
    )


def _point_rows(points: dict[str, Any]) -> Rows:
    return [
        (_words(name), _number(point["threshold"]), *(_shown(point[rate]) for rate in _RATES))
        for name, point in points.items()
    ]


def _calibration_section(record: dict[str, Any], picture: str) -> html.Section:
    calibration = record["calibration"]
    stages = [name for name in ("before", "after") if calibration[name]]
    parts = [calibration[name] for name in stages]
    rows: Rows = [
        ("negative log likelihood", *(_number(part["nll"]) for part in parts)),
        ("Brier score", *(_number(part["brier"]) for part in parts)),
    ]
    for name, words in (("ece", "ECE, most probable class"), ("covid_ece", "ECE, p(covid)")):
        if name in parts[0]:
            rows.append((words, *(_number(part[name]["value"]) for part in parts)))
            null = (f"{_number(part[name]['null'])}, up to {_number(part[name]['null_p95'])}" for part in parts)
            rows.append(("… of a perfectly calibrated model", *null))
    rows += [(f"covid, {name}", *(_shown(part[name], 2) for part in parts)) for name in ("slope", "intercept")]
    fitted = (
        f"One temperature, T = {calibration['temperature']:.3f}, was fitted to validation. "
        if calibration["temperature"]
        else "Without validation predictions no temperature was fitted. "
    )
    return html.Section(
        "Calibration",
        html.table(["", *stages], rows) + html.panels([picture]),
        f"{fitted}An ECE means something only beside that of a perfectly calibrated model on as many images (mean, "
        "and 95 % of draws below). A slope below 1 is overconfidence, an intercept below 0 too much covid.",
    )


def _source_section(record: dict[str, Any]) -> html.Section:
    classes: Sequence[str] = record["classes"]
    rows = [
        (
            block["source"] + (", one label" if block["label_pure"] else ""),
            *(str(block[key]) for key in ("n_images", "n_patients")),
            " / ".join(str(block["n_per_class"][name]) for name in classes),
            *(_shown(block["scores"].get(name)) for name in _SOURCE),
        )
        for block in record["sources"]
    ]
    heads = ["source", "images", "patients", " / ".join(classes), *_SOURCE.values()]
    return html.Section(
        "Sources",
        html.table(heads, rows),
        f"Cramér's V of source and label: {_number(record['source_association'], 2)} (1: the source gives the label "
        "away). Within a source of one label nothing can be told apart.",
    )


def _baseline_rows(record: dict[str, Any]) -> Rows:
    constant, random = record["baselines"]["constant"], record["baselines"]["random"]
    kept = ("accuracy", "balanced_accuracy", "nll", "brier")
    return [
        (f"always {constant['class']}, class shares as probabilities", *(_number(constant[name]) for name in kept)),
        ("classes drawn by their shares", *(_number(random.get(name)) for name in kept)),
    ]


def _openings(record: dict[str, Any]) -> list[str]:
    openings = record.get("openings")
    if not openings:
        return []
    times = "once, now" if openings["times"] == 1 else f"{openings['times']} times since {openings['first']}"
    return [f"The test predictions of this run were opened {times}."]


def _words(point: str) -> str:
    """An operating point's name in words, e.g. "sensitivity 95 %"."""
    name, _, percent = point.partition("_")
    return f"{name} {percent} %" if percent else {"decision": "most probable class", "youden": "Youden"}[name]


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _shown(interval: dict[str, Any] | None, digits: int = 3) -> str:
    """A figure with its interval, e.g. "0.871 (0.843 to 0.899)"; a dash where it is undefined."""
    if interval is None or interval["value"] is None:
        return "–"
    return f"{interval['value']:.{digits}f} ({_number(interval['low'], digits)} to {_number(interval['high'], digits)})"
