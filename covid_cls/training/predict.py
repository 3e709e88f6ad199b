"""The predictions table of a split: the only source of every number that is reported."""

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.dataset import Features
from covid_cls.data.external import ExternalRadiographs
from covid_cls.models.scorer import Scorer
from covid_cls.records import ID_COLUMNS, prediction_columns


@torch.inference_mode()
def predict_split(
    scorer: Scorer,
    data: Radiographs | ExternalRadiographs,
    split: str,
    features: Features | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> pd.DataFrame:
    """The predictions table of `split`, a row per image in path order; see `records.prediction_columns`.

    Float32 throughout, whatever precision trained: half precision ties scores and moves an AUROC. features: of the
    same network, from which its later stages go on; they spare its frozen ones. change: uint8 canvases (n, 1, S, S) to
    the ones to be scored in their place; not together with features, which are those of the images as they are.
    """
    loader = data.ordered_loader(split, features=features)
    assert change is None or features is None
    canvases = (batch._replace(x=change(batch.x)) if change else batch for batch in loader)
    logits = torch.cat([scorer(batch.x.to(scorer.device), batch.stage) for batch in canvases]).cpu()
    columns = prediction_columns(scorer.task.classes)[len(ID_COLUMNS) :]
    scores = torch.cat([logits, scorer.probabilities(logits)], dim=1)
    rows = data.table[data.table["split"] == split].rename(columns={"path": "image_id"})
    ids = rows[list(ID_COLUMNS)].reset_index(drop=True)
    return pd.concat([ids, pd.DataFrame(scores.numpy(), columns=columns)], axis=1)
