"""A model's folder as a finished run leaves it, of an untrained network on a few phantoms."""

from pathlib import Path
from typing import Any

from covid_cls.artifact.files import write_artifact
from covid_cls.artifact.record import model_record, validation_block
from covid_cls.artifact.screen import fit_screen
from covid_cls.data.datamodule import Radiographs
from covid_cls.evaluation.operating import fit_operating
from covid_cls.training.predict import predict_split
from tests.training.small import compose_small, make_classifier, make_data


def small_model(folder: Path, cache: Path, *overrides: str) -> Radiographs:
    """Write a model to `folder`; the data that it was made of. overrides: of the configuration of `train`."""
    settings = compose_small("augment=none", *overrides)
    data = make_data(settings, cache)
    scorer = make_classifier(settings, data.class_counts).scorer()
    val = predict_split(scorer, data, "val")
    facts = data.facts()
    run: dict[str, Any] = {
        "cell": "small",
        "config": settings,
        "weights": {"used": "/home/someone/weights.pth", "sha256": None, "note": None},
        "precision": "32-true",
        "notes": facts.pop("notes"),
        "data": facts,
        "digests": {"config": "c", "data": data.digest, "code": "k"},
        "versions": {"covid_cls": "0.1.0", "torch": "2"},
    }
    epochs = [{"epoch": 0, "loss/val": 0.7}, {"epoch": 1, "loss/val": 0.5}, {"epoch": 2, "loss/val": 0.6}]
    operating, metrics = fit_operating(val, data.task), [validation_block(val, data.task, str(data.name))]
    record = model_record(scorer, data, run, operating, metrics, epochs)
    write_artifact(folder, scorer, fit_screen(scorer, data), record)
    return data
