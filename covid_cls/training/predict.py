"""The predictions table of a split: the only source of every number that is reported."""

import pandas as pd
import torch

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.dataset import Features
from covid_cls.records import ID_COLUMNS, prediction_columns
from covid_cls.training.classifier import Classifier


@torch.inference_mode()
def predict_split(
    classifier: Classifier, data: Radiographs, split: str, features: Features | None = None
) -> pd.DataFrame:
    """The predictions table of `split`, a row per image in path order; see `records.prediction_columns`.

    Float32 throughout, whatever precision trained: half precision ties scores and moves an AUROC. features: of the
    same network, from which its later stages go on; they spare its frozen ones.
    """
    classifier = classifier.eval()
    loader = data.ordered_loader(split, features=features)
    logits = torch.cat([classifier(batch.x.to(classifier.device), batch.stage) for batch in loader]).cpu()
    columns = prediction_columns(classifier.task.classes)[len(ID_COLUMNS) :]
    scores = torch.cat([logits, classifier.probabilities(logits)], dim=1)
    rows = data.table[data.table["split"] == split].rename(columns={"path": "image_id"})
    ids = rows[list(ID_COLUMNS)].reset_index(drop=True)
    return pd.concat([ids, pd.DataFrame(scores.numpy(), columns=columns)], axis=1)
