"""python -m covid_cls.evaluate: how reliable the scores of a finished run, or of any predictions CSV, are."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covid_cls.errors import InputError, listed
from covid_cls.runtime.cli import Job, call_command, run_command
from covid_cls.runtime.schema import check_section, existing_file, existing_folder
from covid_cls.tasks import TASKS

if TYPE_CHECKING:
    from covid_cls.reporting.evaluation_page import Subject

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """A written evaluation.

    Attributes:
        folder: Where metrics.json, figures/ and evaluation.html are.
        metrics: The content of metrics.json: scores with intervals, calibration, thresholds, sources.
    """

    folder: Path
    metrics: dict[str, Any]


def evaluate(*overrides: str, **settings: Any) -> Evaluation:
    """Score the test predictions of a run, other images with its model, or a predictions CSV.

    Each call on a run counts as a test-set access. Examples: `evaluate(run=folder)`,
    `evaluate("data=manifest", "data.path=other.csv", model=folder)`, `evaluate(predictions="theirs.csv")`.

    Args:
        *overrides: Words as on the command line.
        **settings: More settings by their names.

    Raises:
        InputError: A file is missing or wrong, or settings contradict each other.
    """
    return call_command(_evaluate, "evaluate", overrides, settings)


def _evaluate(job: Job) -> Evaluation:
    settings = job.settings
    kind, path = _chosen(settings)
    # Imported late: --help, a misspelt key and a missing file need no scipy.
    from covid_cls.evaluation.assessment import assess, check_bootstrap
    from covid_cls.evaluation.thresholds import fit_operating
    from covid_cls.reporting.evaluation_page import text_lines, write_evaluation

    bootstrap = {name: settings[name] for name in ("resamples", "seed", "level")}
    targets = {name: settings[name] for name in ("sensitivity", "specificity") if settings[name] is not None}
    check_section("", assess, bootstrap)
    check_section("", fit_operating, targets)
    # Before the test predictions are read, which is counted.
    check_bootstrap(settings["resamples"], settings["level"])
    scored, operating, output, facts, model = _subject(job, kind, path, targets)
    output = Path(settings["output"] or output).expanduser()
    record = {**facts, **assess(scored.table, scored.task, operating, **bootstrap)}
    record["notes"] += scored.notes
    write_evaluation(output, record, scored)
    if model:
        # Imported late: it needs torch, which a predictions CSV does not.
        from covid_cls.bundle.files import add_test_scores

        add_test_scores(model, record)
    log.info("\n".join([*text_lines(record), f"results in {output}"]))
    return Evaluation(output, record)


def _chosen(settings: dict[str, Any]) -> tuple[str, Path]:
    """Return which of run, model and predictions is given, and its path. Raises InputError if it does not exist."""
    given = [name for name in ("run", "model", "predictions") if settings[name] is not None]
    if len(given) != 1:
        raise InputError("give one of run=FOLDER, model=FOLDER with data=, and predictions=FILE.csv")
    (kind,) = given
    if kind == "predictions":
        _refuse(settings, kind, "data")
        if settings["validation"]:
            existing_file(settings, "validation")
        return kind, existing_file(settings, kind)
    _refuse(settings, kind, "validation", "task")
    folder = existing_folder(settings, kind)
    if kind == "model" and not settings.get("data"):
        raise InputError(
            "model= needs the images to score: data=manifest data.path=FILE.csv, or data=folder data.root="
        )
    return kind, folder


def _subject(job: Job, kind: str, path: Path, targets: dict[str, float]) -> "Subject":
    settings = job.settings
    from covid_cls.reporting.evaluation_page import csv_subject, external_subject, run_subject

    if kind == "predictions":
        validation = Path(settings["validation"]).expanduser() if settings["validation"] else None
        task = TASKS[settings["task"]["name"]] if settings.get("task") else None
        return csv_subject(path, targets, validation, task)
    if settings.get("data"):
        output = Path(settings["output"]).expanduser() if settings["output"] else None
        return external_subject(path, targets, _image_settings(job), output)
    return run_subject(path, targets, job.command)


def _image_settings(job: Job) -> dict[str, Any]:
    """Return the settings of the section data that name images.

    Raises:
        InputError: The command line sets another setting of data, such as a split, which would have no effect.
    """
    from covid_cls.data.image_source import EXTERNAL_SETTINGS, DataSettings

    section = job.settings["data"]
    check_section("data", DataSettings, section)
    words = [word for word in job.overrides if word.startswith("data.")]
    idle = [word for word in words if word.partition("=")[0].removeprefix("data.") not in EXTERNAL_SETTINGS]
    if idle:
        raise InputError(f"{listed(idle)}: has no effect, since the run's own preprocessing is used; leave it out")
    return {key: value for key, value in section.items() if key in EXTERNAL_SETTINGS}


def _refuse(settings: dict[str, Any], chosen: str, *others: str) -> None:
    given = [f"{key}=" for key in others if settings.get(key)]
    if given:
        raise InputError(f"{listed(given)} does not go with {chosen}=; leave it out")


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line and return the exit code."""
    return run_command(_evaluate, "evaluate", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
