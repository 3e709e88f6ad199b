"""python -m covid_cls.evaluate: what a finished run, or any predictions CSV, is worth, with intervals."""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from covid_cls.command import check_section, existing_file, existing_folder, plain, run_command
from covid_cls.errors import InputError, listed
from covid_cls.labels import TASKS

if TYPE_CHECKING:
    from covid_cls.reporting.subjects import Subject

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> None:
    """Assess what `cfg` names; metrics.json, figures and evaluation.html in its output, a table on the console."""
    settings = plain(cfg)
    kind, path = _chosen(settings)
    # Imported late: --help, a misspelt key and a missing file need no scipy.
    from covid_cls.evaluation.assessment import assess, check_draws
    from covid_cls.evaluation.operating import fit_operating
    from covid_cls.reporting.evaluation_page import text_lines, write_evaluation

    draws = {name: settings[name] for name in ("resamples", "seed", "level")}
    targets = {name: settings[name] for name in ("sensitivity", "specificity") if settings[name] is not None}
    check_section("evaluate", assess, draws)
    check_section("evaluate", fit_operating, targets)
    check_draws(settings["resamples"], settings["level"])  # before the test predictions are opened
    scored, operating, output, facts, model = _subject(settings, kind, path, targets)
    output = Path(settings["output"] or output).expanduser()
    record = {**facts, **assess(scored.table, scored.task, operating, **draws)}
    record["notes"] += scored.notes
    write_evaluation(output, record, scored)
    if model:
        from covid_cls.artifact.record import add_scores  # with torch, which a CSV does not need

        add_scores(model, record)
    log.info("\n".join([*text_lines(record), f"results in {output}"]))


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


def _subject(settings: dict[str, Any], kind: str, path: Path, targets: dict[str, float]) -> "Subject":
    from covid_cls.reporting.subjects import csv_subject, external_subject, run_subject

    if kind == "predictions":
        validation = Path(settings["validation"]).expanduser() if settings["validation"] else None
        task = TASKS[settings["task"]["name"]] if settings.get("task") else None
        return csv_subject(path, targets, validation, task)
    if settings.get("data"):
        output = Path(settings["output"]).expanduser() if settings["output"] else None
        return external_subject(path, targets, _images(settings["data"]), output)
    command = shlex.join(["python", "-m", "covid_cls.evaluate", *HydraConfig.get().overrides.task])
    return run_subject(path, targets, command)


def _images(section: dict[str, Any]) -> dict[str, Any]:
    """The settings of data= that name images; InputError where the command line sets another, such as a split."""
    from covid_cls.data.datamodule import Radiographs
    from covid_cls.data.external import SETTINGS

    check_section("data", Radiographs, section)
    words = [word for word in HydraConfig.get().overrides.task if word.startswith("data.")]
    idle = [word for word in words if word.partition("=")[0].removeprefix("data.") not in SETTINGS]
    if idle:
        raise InputError(f"{listed(idle)}: the run's own preprocessing is used and no split is drawn; leave it out")
    return {key: value for key, value in section.items() if key in SETTINGS}


def _refuse(settings: dict[str, Any], chosen: str, *others: str) -> None:
    given = [f"{key}=" for key in others if settings.get(key)]
    if given:
        raise InputError(f"{listed(given)} does not go with {chosen}=; leave it out")


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line; return the exit code."""
    return run_command(evaluate, "evaluate", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
