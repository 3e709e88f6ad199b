"""The predictions table of a split: the only source of every number that is reported."""

import pandas as pd
import torch

from covid_cls.data.datamodule import Radiographs
from covid_cls.records import ID_COLUMNS, prediction_columns
from covid_cls.training.classifier import Classifier


@torch.inference_mode()
def predict_split(classifier: Classifier, data: Radiographs, split: str, device: torch.device) -> pd.DataFrame:
    """The predictions table of `split`, a row per image in path order; see `records.prediction_columns`.

    Float32 throughout, whatever precision trained: half precision ties scores and moves an AUROC.
    """
    classifier = classifier.to(device).eval()
    logits = torch.cat([classifier(batch.x.to(device)) for batch in data.ordered_loader(split)]).cpu()
    columns = prediction_columns(classifier.task.classes)[len(ID_COLUMNS) :]
    scores = torch.cat([logits, classifier.probabilities(logits)], dim=1)
    rows = data.table[data.table["split"] == split].rename(columns={"path": "image_id"})
    ids = rows[list(ID_COLUMNS)].reset_index(drop=True)
    return pd.concat([ids, pd.DataFrame(scores.numpy(), columns=columns)], axis=1)
