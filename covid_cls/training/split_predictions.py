"""The predictions table of a split, from which every reported score is computed."""

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from covid_cls.data.datamodule import ExternalRadiographs, Radiographs
from covid_cls.data.dataset import Features
from covid_cls.io import ID_COLUMNS, prediction_columns
from covid_cls.models.inference import Scorer


@torch.inference_mode()
def predict_split(
    scorer: Scorer,
    data: Radiographs | ExternalRadiographs,
    split: str,
    features: Features | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> pd.DataFrame:
    """Return the predictions table of a split, with one row per image in path order.

    Args:
        scorer: The network, which computes in float32.
        data: The data set.
        split: Name of the split.
        features: Outputs of the same network's frozen stages, which are then not computed again.
        change: Maps uint8 canvases (n, 1, S, S) to those that are scored in their place. Not with `features`, which
            belong to the unchanged images.
    """
    # Half precision would give different images equal scores, which changes an AUROC.
    loader = data.ordered_loader(split, features=features)
    assert change is None or features is None
    batches = (batch._replace(x=change(batch.x)) if change else batch for batch in loader)
    logits = torch.cat([scorer(batch.x.to(scorer.device), batch.stage) for batch in batches]).cpu()
    columns = prediction_columns(scorer.task.classes)[len(ID_COLUMNS) :]
    scores = torch.cat([logits, scorer.probabilities(logits)], dim=1)
    rows = data.table[data.table["split"] == split].rename(columns={"path": "image_id"})
    ids = rows[list(ID_COLUMNS)].reset_index(drop=True)
    return pd.concat([ids, pd.DataFrame(scores.numpy(), columns=columns)], axis=1)
