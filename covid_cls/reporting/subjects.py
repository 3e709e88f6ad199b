"""What can be evaluated: a run's test split, other images in a run's network, a predictions CSV from any hand."""

from pathlib import Path
from typing import Any, NamedTuple

from covid_cls.errors import InputError
from covid_cls.evaluation.operating import check_targets, fit_operating, frozen_operating
from covid_cls.evaluation.predictions import Predictions, finished_run, read_scores, refuse_shared
from covid_cls.labels import Task
from covid_cls.records import MODEL, write_predictions
from covid_cls.reporting.ledger import record_opening

_UNKNOWN = "whether the model was trained on some of these images is not known; give its run= to have that checked"


class Subject(NamedTuple):
    """Predictions, what was fitted on validation (None without one), where results go, and facts for metrics.json.

    model: the folder of the model whose card these results belong into, if there is one.
    """

    scored: Predictions
    operating: dict[str, Any] | None
    output: Path
    facts: dict[str, Any]
    model: Path | None = None


def run_subject(folder: Path, targets: dict[str, float], command: str) -> Subject:
    """A finished run's test predictions, opened only after its temperature and thresholds are frozen.

    targets: those of `fit_operating`. command: for the run's ledger. InputError where the run has no test predictions.
    """
    run, task = finished_run(folder)
    operating = frozen_operating(folder, task, **targets)
    path = folder / "predictions-test.csv"
    if not path.is_file():
        raise InputError(f"{path}: no such file; train the run with test=true to have its test split scored")
    openings = record_opening(folder, command)
    facts = {"subject": folder.name, "split": "test", "openings": openings._asdict()}
    scored = _noted(read_scores(path, task), run.get("notes", []))
    model = folder / MODEL if (folder / MODEL).is_dir() else None
    return Subject(scored, operating, folder / "evaluation", facts, model)


def external_subject(folder: Path, targets: dict[str, float], data: dict[str, Any], output: Path | None) -> Subject:
    """What the model in `folder`, a run's or its own, makes of the images of `data` (see `ExternalRadiographs`).

    With its own preprocessing, temperature and thresholds, to which `targets` must fit. predictions-external.csv goes
    to `output`. Images that the model has seen are noted, where the run is known.
    """
    # Imported late: a predictions table needs no torch.
    from covid_cls.artifact.model import load
    from covid_cls.data.external import SPLIT, ExternalRadiographs, seen_in_training
    from covid_cls.training.predict import predict_split

    config = finished_run(folder)[0]["config"] if (folder / "run.json").is_file() else None
    model = load(folder)
    operating = check_targets(model.record["operating"], targets, folder)
    view = model.scorer.preprocess
    images = ExternalRadiographs(model.task, view.size, view.crop, **data)
    output = output or folder / f"evaluation-{images.name}"
    path = output / "predictions-external.csv"
    write_predictions(predict_split(model.scorer, images, SPLIT), path)
    seen = seen_in_training(images.table, config["data"]) if config else [_UNKNOWN]
    name = model.record["name"]
    scored = _noted(read_scores(path, model.task), [*images.notes, *seen, *model.record["notes"]])
    return Subject(scored, operating, output, {"subject": f"{name} on {images.name}", "split": SPLIT})


def csv_subject(path: Path, targets: dict[str, float], validation: Path | None, task: Task | None) -> Subject:
    """Predictions from any hand; a temperature and thresholds where `validation` has predictions of other images."""
    scored = read_scores(path, task)
    operating = None
    if validation:
        val = read_scores(validation, scored.task)
        refuse_shared(val.table, scored.table, validation, path)
        operating = fit_operating(val.table, scored.task, **targets)
    return Subject(scored, operating, path.parent / "evaluation", {"subject": path.name, "split": None})


def _noted(scored: Predictions, notes: list[str]) -> Predictions:
    return scored._replace(notes=[*notes, *scored.notes])
