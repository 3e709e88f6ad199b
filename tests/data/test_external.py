"""Another data set for a trained network: one split, its own preprocessing, and what is said about what it lacks."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.external import SPLIT, ExternalRadiographs, seen_in_training
from covid_cls.data.phantom import build_phantoms
from covid_cls.errors import InputError
from covid_cls.labels import TASKS


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 phantoms with their manifest; not to be changed."""
    return build_phantoms(tmp_path_factory.mktemp("drawn"), images=24).parent


@pytest.fixture
def own(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms that a test may change."""
    shutil.copytree(drawn, tmp_path / "own")
    return tmp_path / "own"


def external(folder: Path, cache: Path, task: str = "three_class", **settings: Any) -> ExternalRadiographs:
    settings = {"kind": "manifest", "path": str(folder / "manifest.csv"), "cache": str(cache), **settings}
    return ExternalRadiographs(TASKS[task], 40, 32, batch_size=5, **settings)


def kept(folder: Path, labels: list[str]) -> Path:
    """The manifest of `folder`, cut to these labels."""
    table = pd.read_csv(folder / "manifest.csv", dtype=str, keep_default_na=False)
    table[table["label"].isin(labels)].to_csv(folder / "manifest.csv", index=False)
    return folder


def test_every_image_comes_once_in_the_order_of_the_table(drawn: Path, cache: Path) -> None:
    data = external(drawn, cache)
    batches = list(data.ordered_loader(SPLIT))
    assert [len(batch.y) for batch in batches] == [5, 5, 5, 5, 4]
    named = [TASKS["three_class"].classes[k] for batch in batches for k in batch.y]
    assert named == data.table["label"].tolist()
    assert data.table["path"].is_monotonic_increasing
    assert set(data.table["split"]) == {SPLIT}
    assert data.notes == []


def test_the_network_sees_the_pixels_that_training_crops(drawn: Path, cache: Path) -> None:
    data = external(drawn, cache)
    settings = {"kind": "manifest", "path": str(drawn / "manifest.csv"), "size": 40, "cache": str(cache)}
    trained = Radiographs(data.task, 44, 0, val_share=0.25, test_share=0.25, **settings)  # a canvas for augmentation
    wide = {
        path: x
        for split in ("train", "val", "test")
        for path, x in zip(
            trained.table.loc[trained.table["split"] == split, "path"],
            torch.cat([batch.x for batch in trained.ordered_loader(split)]),
            strict=True,
        )
    }
    for path, x in zip(data.table["path"], torch.cat([b.x for b in data.ordered_loader(SPLIT)]), strict=True):
        assert torch.equal(x, wide[path][:, 6:38, 6:38])


def test_classes_outside_the_task_are_left_out_and_counted(drawn: Path, cache: Path) -> None:
    data = external(drawn, cache, "binary")
    n = len(external(drawn, cache).table) - len(data.table)
    assert n > 0
    assert data.notes == [f"{n} images of pneumonia were left out: task binary has no such class"]
    assert set(data.table["label"]) == {"covid", "normal"}


def test_an_absent_class_is_said(own: Path, cache: Path) -> None:
    data = external(kept(own, ["covid"]), cache)
    assert [note for note in data.notes if "has no image of" in note] == [
        "own has no image of normal: what needs one is undefined",
        "own has no image of pneumonia: what needs one is undefined",
    ]


def test_nothing_usable_is_refused(own: Path, cache: Path) -> None:
    with pytest.raises(InputError, match="own has no usable image of covid, normal"):
        external(kept(own, ["pneumonia"]), cache, "binary")


def test_an_undecodable_image_stops_or_is_set_aside(own: Path, cache: Path) -> None:
    broken = external(own, cache).table["path"].iloc[3]
    (own / broken).write_bytes(b"no image")
    table = pd.read_csv(own / "manifest.csv", dtype=str, keep_default_na=False)
    table.drop(columns="sha256", errors="ignore").to_csv(own / "manifest.csv", index=False)
    with pytest.raises(InputError, match=rf"1 images cannot be used: {broken} \(line"):
        external(own, cache)
    data = external(own, cache, on_bad_image="quarantine")
    assert broken not in set(data.table["path"])
    assert data.notes == [f"1 undecodable images were quarantined: {broken}"]
    assert sum(len(batch.y) for batch in data.ordered_loader(SPLIT)) == 23


def test_a_folder_of_classes_will_do(drawn: Path, tmp_path: Path, cache: Path) -> None:
    table = external(drawn, cache).table
    for path, label in zip(table["path"], table["label"], strict=True):
        (tmp_path / "set" / label.upper()).mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn / path, tmp_path / "set" / label.upper())
    data = external(drawn, cache, kind="folder", path=None, root=str(tmp_path / "set"))
    assert len(data.table) == len(table)
    assert data.name == "set"


def test_images_of_the_run_s_own_data_set_are_named(own: Path, drawn: Path, cache: Path) -> None:
    data = external(kept(own, ["covid"]), cache)
    trained = {"kind": "manifest", "path": str(drawn / "manifest.csv"), "cache": str(cache), "folds": None}
    (note,) = seen_in_training(data.table, trained)
    assert note.startswith(f"{len(data.table)} of these images are in the run's own data set, byte for byte: ")
    assert data.table["path"].iloc[0] in note
    other = {"kind": "phantom", "images": 12, "phantom_seed": 5, "cache": str(cache)}
    assert seen_in_training(data.table, other) == []
    (note,) = seen_in_training(data.table, {**trained, "path": str(own / "gone.csv")})
    assert "not at hand" in note
