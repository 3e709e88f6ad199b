"""A model's verdict against shortcut baselines, and Cramér's V of source and label."""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.comparison import score_configurations
from covid_cls.evaluation.verdict import source_association, verdict
from covid_cls.tasks import TASKS

BINARY = TASKS["binary"]


def predictions(right: float, seed: int, images: int = 300) -> pd.DataFrame:
    """Return predictions that are correct with this probability, for images of separate patients; half are covid."""
    rng = np.random.default_rng(seed)
    covid = np.arange(images) % 2 == 0
    called = covid == (rng.random(images) < right)
    prob = np.where(called, 0.9, 0.1) + rng.uniform(-0.05, 0.05, images)
    return pd.DataFrame(
        {
            "image_id": [f"{k}.png" for k in range(images)],
            "patient_id": [f"p{k}" for k in range(images)],
            "source": "a",
            "split": "test",
            "fold": "",
            "label": np.where(covid, "covid", "normal"),
            "logit_covid": np.log(prob),
            "logit_normal": np.log(1 - prob),
            "prob_covid": prob,
            "prob_normal": 1 - prob,
        }
    )


def judge(
    name: str,
    seeds: list[pd.DataFrame],
    baselines: dict[str, pd.DataFrame],
    source_v: float | None = 0.0,
    metric: str = "balanced_accuracy",
) -> dict[str, Any]:
    """Return the verdict on a model, given the tables of its seeds and one table per baseline."""
    tables = {name: seeds} | {baseline: [table] for baseline, table in baselines.items()}
    scores = score_configurations(tables, BINARY, resamples=400)
    return verdict(name, scores.pop(name), scores, source_v=source_v, metric=metric)


def test_a_model_that_beats_every_baseline_is_reported_to_beat_the_strongest() -> None:
    baselines = {"frame": predictions(0.8, 2), "majority": predictions(0.5, 3)}
    found = judge("resnet18 full", [predictions(0.95, 1)], baselines, source_v=0.2)
    assert found["beats_baselines"] is True
    assert found["baseline"] == "frame"
    gap = found["baselines"]["frame"]["difference"]
    assert gap["value"] == pytest.approx(found["score"] - found["baselines"]["frame"]["score"])
    low, high = 100 * gap["low"], 100 * gap["high"]
    value = 100 * gap["value"]
    assert found["lines"] == [f"resnet18 full beats the frame baseline by {value:.1f} points ({low:.1f} to {high:.1f})"]
    assert 0 < low < value < high


def test_a_model_below_one_baseline_is_not_shown_to_beat_it() -> None:
    baselines = {"frame": predictions(0.6, 2), "header": predictions(1.0, 3)}
    found = judge("vgg16", [predictions(0.9, 1)], baselines)
    assert found["beats_baselines"] is False
    assert found["baseline"] == "header"
    assert found["lines"][0].startswith("vgg16 is not shown to beat the header baseline: difference -")
    assert found["baselines"]["frame"]["difference"]["low"] > 0
    assert found["baselines"]["header"]["difference"]["high"] < 0


def test_a_model_equal_to_a_baseline_is_not_shown_to_beat_it() -> None:
    baselines = {"histogram": predictions(0.85, 7)}
    found = judge("vgg16", [predictions(0.85, 1)], baselines)
    low, high = (found["baselines"]["histogram"]["difference"][end] for end in ("low", "high"))
    assert low < 0 < high
    assert found["beats_baselines"] is False


def test_identical_predictions_do_not_beat_themselves() -> None:
    table = predictions(0.9, 1)
    found = judge("vgg16", [table], {"frame": table})
    assert found["beats_baselines"] is False
    assert "difference +0.0 points (+0.0 to +0.0)" in found["lines"][0]


@pytest.mark.parametrize(
    ("source_v", "first"),
    [
        (1.0, "not evidence of disease detection: source predicts label (Cramér's V 1.00)"),
        (0.9, "not evidence of disease detection: source predicts label (Cramér's V 0.90)"),
        (None, "not evidence of disease detection: sources are not named, and may predict the label"),
        (math.nan, "not evidence of disease detection: sources are not named, and may predict the label"),
    ],
)
def test_a_source_that_predicts_the_label_or_is_unknown_is_no_evidence(source_v: float | None, first: str) -> None:
    found = judge("a", [predictions(0.99, 1)], {"frame": predictions(0.6, 2)}, source_v=source_v)
    assert found["lines"][0] == first
    assert len(found["lines"]) == 2
    json.dumps(found, allow_nan=False)


def test_without_baselines_there_is_no_comparison() -> None:
    found = judge("a", [predictions(0.99, 1)], {}, source_v=0.1)
    assert found["beats_baselines"] is None
    assert found["lines"] == ["a was not compared with any shortcut baseline"]


def test_a_model_of_several_seeds_has_their_mean_score() -> None:
    seeds = [predictions(0.95, 1), predictions(0.85, 2)]
    alone = [judge("a", [table], {})["score"] for table in seeds]
    found = judge("a", seeds, {"frame": predictions(0.6, 3)})
    assert found["score"] == pytest.approx(np.mean(alone))


def test_retained_is_the_share_of_the_model_s_auroc_above_chance() -> None:
    half = {"frame": predictions(0.75, 2)}
    found = judge("a", [predictions(0.95, 1)], half, metric="macro_auroc")
    figures = found["baselines"]["frame"]
    assert figures["retained"] == pytest.approx((figures["score"] - 0.5) / (found["score"] - 0.5))
    assert 0.3 < figures["retained"] < 0.8
    below_chance = judge("a", [predictions(0.2, 1)], half)
    assert below_chance["baselines"]["frame"]["retained"] is None


def test_a_metric_of_which_lower_values_are_better_is_refused() -> None:
    with pytest.raises(InputError, match="metric brier: lower values are better"):
        judge("a", [predictions(0.9, 1)], {}, metric="brier")


def images(*counts: tuple[str, str, int]) -> pd.DataFrame:
    return pd.DataFrame([(s, label) for s, label, n in counts for _ in range(n)], columns=["source", "label"])


@pytest.mark.parametrize(
    ("table", "v"),
    [
        (images(("a", "covid", 5), ("b", "normal", 9)), 1.0),
        (images(("a", "covid", 5), ("b", "normal", 9), ("b", "pneumonia", 3)), 1.0),
        (images(("a", "covid", 4), ("a", "normal", 4), ("b", "covid", 6), ("b", "normal", 6)), 0.0),
        # The table [[30, 10], [10, 30]] has chi-squared 20 for 80 images, without Yates' correction.
        (images(("a", "covid", 30), ("a", "normal", 10), ("b", "covid", 10), ("b", "normal", 30)), 0.5),
        (images(("a", "covid", 5), ("a", "normal", 9)), 0.0),
        (images(("", "covid", 5), ("b", "normal", 9)), 1.0),
    ],
)
def test_cramers_v_of_source_and_label(table: pd.DataFrame, v: float) -> None:
    assert source_association(table) == pytest.approx(v)


def test_cramers_v_is_nan_without_named_sources_or_with_one_label() -> None:
    assert math.isnan(source_association(images(("", "covid", 5), ("", "normal", 9))))
    assert math.isnan(source_association(images(("a", "covid", 5), ("b", "covid", 9))))
