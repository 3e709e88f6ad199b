"""A model folder of an untrained network on a few phantoms."""

from pathlib import Path
from typing import Any

from covid_cls.bundle.files import model_record, validation_block, write_model_folder
from covid_cls.bundle.ood import fit_ood
from covid_cls.data.datamodule import Radiographs
from covid_cls.evaluation.thresholds import fit_operating
from covid_cls.training.split_predictions import predict_split
from tests.training.small import compose_small, make_classifier, make_data


def small_model(folder: Path, cache: Path, *overrides: str) -> Radiographs:
    """Write a model folder and return the data of its run.

    Args:
        folder: The model folder.
        cache: Folder of the cache.
        overrides: Settings of `train`.
    """
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
        "selected": {"epoch": 2, "monitor": "auroc/val", "value": 0.75},
        "notes": facts.pop("notes"),
        "data": facts,
        "digests": {"config": "c", "data": data.digest, "code": "k"},
        "versions": {"covid_cls": "0.1.0", "torch": "2"},
    }
    operating, metrics = fit_operating(val, data.task), [validation_block(val, data.task, str(data.name))]
    record = model_record(scorer, data, run, operating, metrics, epochs=3)
    write_model_folder(folder, scorer, fit_ood(scorer, data), record)
    return data
