"""What can be evaluated: a run's test split, other images in a run's network, a predictions CSV from any hand."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from covid_cls.errors import InputError
from covid_cls.evaluation.operating import fit_operating, frozen_operating
from covid_cls.evaluation.predictions import Predictions, finished_run, read_scores, refuse_shared
from covid_cls.labels import Task
from covid_cls.records import write_predictions
from covid_cls.reporting.ledger import record_opening

if TYPE_CHECKING:
    from covid_cls.training.classifier import Classifier


class Subject(NamedTuple):
    """Predictions, what was fitted on validation (None without one), where results go, and facts for metrics.json."""

    scored: Predictions
    operating: dict[str, Any] | None
    output: Path
    facts: dict[str, Any]


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
    return Subject(_noted(read_scores(path, task), run.get("notes", [])), operating, folder / "evaluation", facts)


def external_subject(folder: Path, targets: dict[str, float], data: dict[str, Any], output: Path | None) -> Subject:
    """What a finished run's network makes of the images that `data` names (see `ExternalRadiographs`).

    With the run's own preprocessing, temperature and thresholds. predictions-external.csv goes to `output`.
    """
    # Imported late: a predictions table needs no torch.
    import torch

    from covid_cls.data.external import SPLIT, ExternalRadiographs, seen_in_training
    from covid_cls.training.checkpoints import load_classifier
    from covid_cls.training.predict import predict_split

    run, task = finished_run(folder)
    operating = frozen_operating(folder, task, **targets)
    classifier: Classifier = load_classifier(folder / "checkpoints" / "best.ckpt")
    classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    size, crop = classifier.preprocess.size, classifier.preprocess.crop
    images = ExternalRadiographs(task, size, crop, **data)
    output = output or folder / f"evaluation-{images.name}"
    path = output / "predictions-external.csv"
    write_predictions(predict_split(classifier, images, SPLIT), path)
    notes = [*images.notes, *seen_in_training(images.table, run["config"]["data"]), *run.get("notes", [])]
    facts = {"subject": f"{folder.name} on {images.name}", "split": SPLIT}
    return Subject(_noted(read_scores(path, task), notes), operating, output, facts)


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
