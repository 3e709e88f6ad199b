"""python -m covid_cls.evaluate: what a finished run, or any predictions CSV, is worth, with intervals."""

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from covid_cls.command import check_section, existing_folder, plain, run_command
from covid_cls.errors import InputError, listed
from covid_cls.labels import TASKS

if TYPE_CHECKING:
    from covid_cls.reporting.subjects import Subject

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> None:
    """Assess what `cfg` names; metrics.json, figures and evaluation.html in its output, a table on the console."""
    # Imported late: --help and a misspelt key need no scipy.
    from covid_cls.artifact.record import add_scores
    from covid_cls.evaluation.assessment import assess, check_draws
    from covid_cls.evaluation.operating import fit_operating
    from covid_cls.reporting.evaluation_page import text_lines, write_evaluation

    settings = plain(cfg)
    draws = {name: settings[name] for name in ("resamples", "seed", "level")}
    targets = {name: settings[name] for name in ("sensitivity", "specificity") if settings[name] is not None}
    check_section("evaluate", assess, draws)
    check_section("evaluate", fit_operating, targets)
    check_draws(settings["resamples"], settings["level"])  # before the test predictions are opened
    scored, operating, output, facts, model = _subject(settings, targets)
    output = Path(settings["output"] or output).expanduser()
    record = {**facts, **assess(scored.table, scored.task, operating, **draws)}
    record["notes"] += scored.notes
    write_evaluation(output, record, scored)
    if model:
        add_scores(model, record)
    log.info("\n".join([*text_lines(record), f"results in {output}"]))


def _subject(settings: dict[str, Any], targets: dict[str, float]) -> "Subject":
    from covid_cls.reporting.subjects import csv_subject, external_subject, run_subject

    if [settings[name] is None for name in ("run", "model", "predictions")].count(False) != 1:
        raise InputError("give one of run=FOLDER, model=FOLDER with data=, and predictions=FILE.csv")
    if settings["predictions"] is not None:
        _refuse(settings, "predictions", "data")
        validation = Path(settings["validation"]).expanduser() if settings["validation"] else None
        task = TASKS[settings["task"]["name"]] if settings.get("task") else None
        return csv_subject(Path(settings["predictions"]).expanduser(), targets, validation, task)
    kind = "run" if settings["run"] is not None else "model"
    _refuse(settings, kind, "validation", "task")
    folder = existing_folder(settings[kind], settings["output_root"])
    if settings.get("data"):
        output = Path(settings["output"]).expanduser() if settings["output"] else None
        return external_subject(folder, targets, _images(settings["data"]), output)
    if kind == "model":
        raise InputError(
            "model= needs the images to score: data=manifest data.path=FILE.csv, or data=folder data.root="
        )
    command = shlex.join(["python", "-m", "covid_cls.evaluate", *HydraConfig.get().overrides.task])
    return run_subject(folder, targets, command)


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


if __name__ == "__main__":
    run_command(evaluate, "evaluate")
