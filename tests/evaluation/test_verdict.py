"""A score is praised only where every probe is beaten and the source does not give the label."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.verdict import source_association, verdict
from covid_cls.labels import TASKS

BINARY = TASKS["binary"]
DRAW = {"resamples": 400, "seed": 0}


def predictions(right: float, seed: int, images: int = 300) -> pd.DataFrame:
    """Predictions that are right with this probability, over images of one patient each; half are covid."""
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


def test_a_model_that_beats_every_probe_is_said_to_beat_the_strongest() -> None:
    probes = {"frame": [predictions(0.8, 2)], "majority": [predictions(0.5, 3)]}
    found = verdict("resnet18 full", [predictions(0.95, 1)], probes, BINARY, source_v=0.2, **DRAW)
    assert found["beats_probes"] is True
    assert found["probe"] == "frame"
    gap = found["probes"]["frame"]["difference"]
    assert gap["value"] == pytest.approx(found["score"] - found["probes"]["frame"]["score"])
    low, high = 100 * gap["low"], 100 * gap["high"]
    value = 100 * gap["value"]
    assert found["lines"] == [f"resnet18 full beats the frame probe by {value:.1f} points ({low:.1f} to {high:.1f})"]
    assert 0 < low < value < high


def test_a_model_below_one_probe_is_not_shown_to_beat_it() -> None:
    probes = {"frame": [predictions(0.6, 2)], "header": [predictions(1.0, 3)]}
    found = verdict("vgg16", [predictions(0.9, 1)], probes, BINARY, source_v=0.0, **DRAW)
    assert found["beats_probes"] is False
    assert found["probe"] == "header"
    assert found["lines"][0].startswith("vgg16 is not shown to beat the header probe: difference -")
    assert found["probes"]["frame"]["difference"]["low"] > 0
    assert found["probes"]["header"]["difference"]["high"] < 0


def test_a_model_level_with_a_probe_is_not_shown_to_beat_it() -> None:
    probes = {"histogram": [predictions(0.85, 7)]}
    found = verdict("vgg16", [predictions(0.85, 1)], probes, BINARY, source_v=0.0, **DRAW)
    low, high = (found["probes"]["histogram"]["difference"][end] for end in ("low", "high"))
    assert low < 0 < high
    assert found["beats_probes"] is False


def test_the_very_same_predictions_do_not_beat_themselves() -> None:
    table = predictions(0.9, 1)
    found = verdict("vgg16", [table], {"frame": [table]}, BINARY, source_v=0.0, **DRAW)
    assert found["beats_probes"] is False
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
def test_it_fails_closed_where_the_source_gives_the_label_or_is_not_known(source_v: float | None, first: str) -> None:
    found = verdict("a", [predictions(0.99, 1)], {"frame": [predictions(0.6, 2)]}, BINARY, source_v=source_v, **DRAW)
    assert found["lines"][0] == first
    assert len(found["lines"]) == 2
    json.dumps(found, allow_nan=False)


def test_without_a_probe_nothing_is_beaten() -> None:
    found = verdict("a", [predictions(0.99, 1)], {}, BINARY, source_v=0.1)
    assert found["beats_probes"] is None
    assert found["lines"] == ["a was not compared with any shortcut probe"]


def test_a_model_of_several_seeds_has_their_mean_score() -> None:
    seeds = [predictions(0.95, 1), predictions(0.85, 2)]
    alone = [verdict("a", [table], {}, BINARY, source_v=0.0)["score"] for table in seeds]
    found = verdict("a", seeds, {"frame": [predictions(0.6, 3)]}, BINARY, source_v=0.0, **DRAW)
    assert found["score"] == pytest.approx(np.mean(alone))


def test_retained_is_the_probe_s_share_of_what_the_model_has_above_chance() -> None:
    half = {"frame": [predictions(0.75, 2)]}
    found = verdict("a", [predictions(0.95, 1)], half, BINARY, source_v=0.0, metric="macro_auroc", **DRAW)
    figures = found["probes"]["frame"]
    assert figures["retained"] == pytest.approx((figures["score"] - 0.5) / (found["score"] - 0.5))
    assert 0.3 < figures["retained"] < 0.8
    below_chance = verdict("a", [predictions(0.2, 1)], half, BINARY, source_v=0.0, **DRAW)
    assert below_chance["probes"]["frame"]["retained"] is None


def test_other_images_and_scores_of_which_less_is_better_are_refused() -> None:
    with pytest.raises(InputError, match="frame probe"):
        verdict("a", [predictions(0.9, 1)], {"frame": [predictions(0.9, 1, images=298)]}, BINARY, source_v=0.0)
    with pytest.raises(InputError, match="less of it is better"):
        verdict("a", [predictions(0.9, 1)], {}, BINARY, source_v=0.0, metric="brier")


def images(*counts: tuple[str, str, int]) -> pd.DataFrame:
    return pd.DataFrame([(s, label) for s, label, n in counts for _ in range(n)], columns=["source", "label"])


@pytest.mark.parametrize(
    ("table", "v"),
    [
        (images(("a", "covid", 5), ("b", "normal", 9)), 1.0),
        (images(("a", "covid", 5), ("b", "normal", 9), ("b", "pneumonia", 3)), 1.0),
        (images(("a", "covid", 4), ("a", "normal", 4), ("b", "covid", 6), ("b", "normal", 6)), 0.0),
        # [[30, 10], [10, 30]]: chi-squared 20 of 80 images, without Yates' correction
        (images(("a", "covid", 30), ("a", "normal", 10), ("b", "covid", 10), ("b", "normal", 30)), 0.5),
        (images(("a", "covid", 5), ("a", "normal", 9)), 0.0),
        (images(("", "covid", 5), ("b", "normal", 9)), 1.0),
    ],
)
def test_cramers_v_of_source_and_label(table: pd.DataFrame, v: float) -> None:
    assert source_association(table) == pytest.approx(v)


def test_cramers_v_is_nan_where_sources_or_labels_do_not_differ_by_name() -> None:
    assert math.isnan(source_association(images(("", "covid", 5), ("", "normal", 9))))
    assert math.isnan(source_association(images(("a", "covid", 5), ("b", "covid", 9))))
