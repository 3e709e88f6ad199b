"""A feature cache changes how often the frozen stages are computed, and no results unless it reports that."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.dataset import Features
from covid_cls.errors import InputError
from covid_cls.experiment import computes_bfloat16, prepare_fit
from covid_cls.models.inference import Prefix
from covid_cls.models.transforms import Augment
from covid_cls.training.callbacks import EpochHistory
from covid_cls.training.feature_cache import FeatureCache, feature_note, fixed_views, prediction_features
from covid_cls.training.module import Classifier
from covid_cls.training.split_predictions import predict_split
from tests.training.small import compose_small, make_classifier, make_data, make_trainer, snapshot

FP32 = ("trainer.precision=32-true", "augment=none", "trainer.max_epochs=3", "callbacks=no_early_stopping")
STRATEGIES = ("fc", "partial")


def fit(folder: Path, cache: Path, *overrides: str) -> tuple[Classifier, EpochHistory, Radiographs]:
    """Fit a classifier as `train` does."""
    settings = compose_small(*overrides)
    data, classifier = make_data(settings, cache), make_classifier(settings)
    trainer, history = make_trainer(settings, folder, checkpoints=False)
    prepare_fit(classifier, data, trainer, settings)
    trainer.fit(classifier, data)
    return classifier, history, data


def losses(history: EpochHistory) -> np.ndarray:
    return np.array([[row["loss/train"], row["loss/val"]] for row in history.rows])


def feature_files(cache: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (cache / "features").rglob("features.npy")}


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exact_cache_gives_the_same_training(backbone: str, strategy: str, cache: Path, folder: Path) -> None:
    words = (*FP32, f"backbone={backbone}", f"strategy={strategy}")
    plain, plain_history, _ = fit(folder / "off", cache, *words, "feature_cache=off")
    cached, cached_history, data = fit(folder / "exact", cache, *words, "feature_cache=exact")
    assert data.features is not None
    assert len(losses(plain_history)) == 3
    np.testing.assert_allclose(losses(cached_history), losses(plain_history), rtol=0, atol=1e-5)
    # The cached run has a complete network, too.
    assert snapshot(plain).keys() == snapshot(cached).keys()


def test_training_with_the_prefix_is_training_with_the_network(cache: Path, folder: Path) -> None:
    # Without `prepare_fit` a classifier runs the stages themselves.
    settings = compose_small(*FP32, "strategy=partial")
    classifier = make_classifier(settings)
    trainer, history = make_trainer(settings, folder, checkpoints=False)
    trainer.fit(classifier, make_data(settings, cache))
    _, with_prefix, _ = fit(folder, cache, *FP32, "strategy=partial")
    # The rounding differences of the folded batch norms grow while layer4 is trained: 1.2e-5 after three epochs.
    np.testing.assert_allclose(losses(with_prefix), losses(history), rtol=0, atol=1e-4)


def test_the_runs_of_a_sweep_share_one_pass(tmp_path: Path, folder: Path) -> None:
    # Both tasks, both losses and all seeds that start from the same weights.
    words = ("strategy=fc", "augment=cxr", "feature_cache=views:2", "trainer.max_epochs=1")
    source = make_classifier(compose_small(*words))

    def run(*overrides: str) -> None:
        settings = compose_small(*words, *overrides)
        data, classifier = make_data(settings, tmp_path), make_classifier(settings)
        frozen = {n: t for n, t in source.net.state_dict().items() if not n.startswith("head")}
        classifier.net.load_state_dict(frozen, strict=False)
        trainer, _ = make_trainer(settings, folder, checkpoints=False)
        prepare_fit(classifier, data, trainer, settings)

    run("task=three_class")
    built = feature_files(tmp_path)
    # Two augmented views and the centre view.
    assert len(built) == 3
    for overrides in (("task=binary",), ("task=three_class", "loss=focal"), ("task=binary", "seed=3")):
        run(*overrides)
        assert feature_files(tmp_path) == built
    run("task=binary", "augment.contrast=0.1")
    # The views of another augmentation are new, and the centre view is the same.
    assert len(feature_files(tmp_path)) == 5


def test_a_later_run_computes_only_the_missing_features(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = compose_small("strategy=fc", "augment=none")
    classifier = make_classifier(settings)
    prefix = Prefix(classifier.net)

    def computed(task: str) -> int:
        data = make_data({**settings, "task": {"name": task}}, tmp_path)
        caplog.clear()
        with caplog.at_level("INFO", "covid_cls"):
            FeatureCache(classifier, data, prefix, 1.0).load([None], ["train", "val", "test"])
        return sum(int(record.args[1]) for record in caplog.records if "images computed" in record.message)  # type: ignore[index,arg-type]

    assert computed("binary") == 24
    assert computed("three_class") == 12
    assert computed("three_class") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_served_batch_is_the_output_of_the_prefix_for_its_images(
    dtype: torch.dtype, strategy: str, cache: Path
) -> None:
    settings = compose_small(f"strategy={strategy}", "augment=original", "task=three_class")
    classifier, data = make_classifier(settings), make_data(settings, cache)
    prefix = Prefix(classifier.net, dtype=dtype)
    features = FeatureCache(classifier, data, prefix, 1.0)
    views, (centre,) = features.load(range(3), ["train"]), features.load([None], ["val"])
    served = Features(prefix.stop, views, centre)
    crop, preprocess = classifier.preprocess.crop, classifier.preprocess

    def wanted(batch: Any, image: Tensor) -> Tensor:
        padded = torch.cat([preprocess.normalise(image)] * 32)[:32]
        return prefix(padded)[: len(batch.index)]

    images, cached = data.dataset("train"), data.dataset("train", served)
    n = len(images)
    assert len(cached) == 3 * n
    for view in range(3):
        batch = images[[4, 1, 7]]
        found = cached[[4 + view * n, 1 + view * n, 7 + view * n]]
        image = classifier.augment(batch.x, batch.index, crop, 0, view)
        assert found.stage == prefix.stop
        assert torch.equal(found.index, batch.index)
        assert torch.equal(found.y, batch.y)
        assert torch.equal(found.x, wanted(batch, image))
    # Several views in one batch keep their positions.
    mixed = cached[[7 + 2 * n, 4, 1 + n]]
    assert torch.equal(mixed.x, torch.cat([cached[[p]].x for p in (7 + 2 * n, 4, 1 + n)]))
    batch, found = data.dataset("val")[[0, 2]], data.dataset("val", served)[[0, 2]]
    assert torch.equal(found.x, wanted(batch, preprocess.centre(batch.x)))


def test_bits_do_not_depend_on_which_run_came_first(tmp_path: Path) -> None:
    # Rows that one task computed and rows that the next one added are equal to those of a single pass.
    settings = compose_small("strategy=partial")
    classifier = make_classifier(settings)
    prefix = Prefix(classifier.net, dtype=torch.bfloat16)

    def centre(cache: Path, *tasks: str) -> np.ndarray:
        for task in tasks:
            data = make_data({**settings, "task": {"name": task}}, cache)
            (array,) = FeatureCache(classifier, data, prefix, 1.0).load([None], ["train", "val", "test"])
        return np.array(array)

    assert np.array_equal(
        centre(tmp_path / "a", "binary", "three_class"), centre(tmp_path / "b", "three_class", "binary")
    )


class InterruptedCache(FeatureCache):
    """Counts the batches and stops before batch number `at`, as Ctrl-C would."""

    at, batches = 99, 0

    def _compute_batch(self, rows: np.ndarray, view: int | None) -> np.ndarray:
        if self.batches == self.at:
            raise KeyboardInterrupt
        self.batches += 1
        return super()._compute_batch(rows, view)


def test_an_interrupted_build_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covid_cls.training.feature_cache._SAVE", 1)
    monkeypatch.setattr("covid_cls.training.feature_cache._BATCH", 6)
    settings = compose_small("strategy=fc", "task=three_class")
    classifier, data = make_classifier(settings), make_data(settings, tmp_path)
    cache = InterruptedCache(classifier, data, Prefix(classifier.net), 1.0)
    cache.at = 2
    with pytest.raises(KeyboardInterrupt):
        cache.load([None], ["train"])
    cache.at, cache.batches = 99, 0
    (found,) = cache.load([None], ["train"])
    rows = data.table.index[data.table["split"] == "train"].to_numpy()
    assert cache.batches == -(-len(rows) // 6) - 2
    another = make_data(settings, tmp_path / "another")
    (wanted,) = FeatureCache(classifier, another, Prefix(classifier.net), 1.0).load([None], ["train"])
    assert np.array_equal(found[rows], wanted[rows])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted features": lambda folder: (folder / "features.npy").unlink(),
    "short features": lambda folder: os.truncate(folder / "features.npy", 2000),
    "empty features": lambda folder: os.truncate(folder / "features.npy", 0),
    "empty record": lambda folder: os.truncate(folder / "known.npy", 0),
    "short record": lambda folder: os.truncate(folder / "known.npy", 140),
    "record of another set": lambda folder: np.save(folder / "known.npy", np.ones(7, dtype=bool)),
    "record of something else": lambda folder: np.save(folder / "known.npy", np.ones(36)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_features_are_computed_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = compose_small("strategy=fc")
    classifier, data = make_classifier(settings), make_data(settings, tmp_path)
    cache = FeatureCache(classifier, data, Prefix(classifier.net), 1.0)
    wanted = np.array(cache.load([None], ["train"])[0])
    (file,) = feature_files(tmp_path)
    # A killed build leaves such a file.
    (file.parent / ".known.npy.abcdefgh.part").touch()
    DAMAGES[damage](file.parent)
    caplog.clear()
    assert np.array_equal(cache.load([None], ["train"])[0], wanted)
    assert ("damaged" in caplog.text) == ("record" in damage)
    assert wanted.any()
    assert {path.name for path in file.parent.iterdir()} == {"about.json", "features.npy", "known.npy", ".lock"}


def test_a_cache_that_would_exceed_its_limit_is_refused_with_the_size_it_needs(tmp_path: Path) -> None:
    settings = compose_small("strategy=partial", "task=three_class")
    classifier, data = make_classifier(settings), make_data(settings, tmp_path)
    train = int((data.table["split"] == "train").sum())
    need = 4 * train * 256 * 2 * 2 * 4  # float32 outputs of layer3 at 32 pixels
    with pytest.raises(InputError, match=rf"feature_cache_gb=0.0001.* need {need / 1e9:.2f} GB") as error:
        FeatureCache(classifier, data, Prefix(classifier.net), 1e-4).load(range(4), ["train"])
    assert str(tmp_path / "features") in str(error.value)
    assert not feature_files(tmp_path)
    FeatureCache(classifier, data, Prefix(classifier.net), 1.01 * need / 1e9).load(range(4), ["train"])
    # Nothing is left to compute, so that the limit does not matter.
    FeatureCache(classifier, data, Prefix(classifier.net), 1e-4).load(range(4), ["train"])


def test_predictions_from_features_are_those_of_the_checkpoint(cache: Path, folder: Path) -> None:
    classifier, _, data = fit(folder, cache, *FP32, "strategy=fc", "feature_cache=exact")
    classifier.prefix = None
    plain = predict_split(classifier.scorer(), data, "test")
    cached = predict_split(classifier.scorer(), data, "test", prediction_features(classifier, data, ["test"], 1.0))
    assert list(plain["image_id"]) == list(cached["image_id"])
    scores = [name for name in plain.columns if name.startswith(("logit_", "prob_"))]
    np.testing.assert_allclose(cached[scores].to_numpy(), plain[scores].to_numpy(), rtol=0, atol=1e-5)


# A CPU that does not compute bfloat16 trains in float32, and emulating bfloat16 takes six minutes here.
@pytest.mark.skipif(not computes_bfloat16(), reason="this CPU does not compute bfloat16")
@pytest.mark.parametrize("strategy", ["fc", "full"])
def test_bfloat16_decides_as_float32_does(strategy: str, cache: Path, folder: Path) -> None:
    # A network trained in bfloat16 makes at least 98 of 100 decisions as in float32.
    words = ("data.images=240", "data.size=48", "preprocess.crop=48", "trainer.max_epochs=12", "data.batch_size=16")
    classifier, history, data = fit(
        folder,
        cache,
        *words,
        "task=three_class",
        f"strategy={strategy}",
        "trainer.precision=bf16-mixed",
        "optimizer=adamw",
        "callbacks=no_early_stopping",
    )
    assert history.rows[-1]["loss/train"] < history.rows[0]["loss/train"]
    classifier.eval()
    half, exact = [], []
    with torch.inference_mode():
        for split in ("train", "val", "test"):
            for batch in data.ordered_loader(split):
                exact.append(classifier.scorer()(batch.x))
                with torch.autocast("cpu", torch.bfloat16):
                    half.append(classifier._logits(classifier.on_after_batch_transfer(batch, 0)).float())
    wanted, found = torch.cat(exact), torch.cat(half)
    assert len(wanted) == 240
    assert float((wanted.argmax(1) == found.argmax(1)).float().mean()) >= 0.98
    assert float((wanted.softmax(1) - found.softmax(1)).abs().max()) < 0.05


CXR, NONE = Augment(rotation=10.0), Augment()
FC: dict[str, Any] = {"name": "fc", "freeze_until": None}


@pytest.mark.parametrize(
    ("asked", "augment", "views"),
    [("off", CXR, None), ("off", NONE, None), ("exact", NONE, 0), ("views:1", CXR, 1), ("views:12", CXR, 12)],
)
def test_the_values_of_feature_cache(asked: str, augment: Augment, views: int | None) -> None:
    assert fixed_views(asked, augment, FC) == views


@pytest.mark.parametrize(
    ("asked", "augment", "strategy", "says"),
    [
        ("exact", CXR, FC, "set augment=none, or feature_cache=views:K"),
        ("views:2", NONE, FC, "use exact"),
        ("views:0", CXR, FC, "must be off, exact or views:K"),
        ("views:x", CXR, FC, "must be off, exact or views:K"),
        ("on", CXR, FC, "must be off, exact or views:K"),
        ("views:2", CXR, {"name": "full", "freeze_until": None}, "strategy=full freezes no stages"),
    ],
)
def test_a_contradictory_feature_cache_is_refused(
    asked: str, augment: Augment, strategy: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says) as error:
        fixed_views(asked, augment, strategy)
    assert str(error.value).startswith(f"feature_cache={asked}")


def test_fixed_views_are_noted() -> None:
    assert feature_note("off") == feature_note("exact") == []
    (note,) = feature_note("views:3")
    assert "3 fixed augmented views" in note
