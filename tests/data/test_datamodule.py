"""Radiographs and ExternalRadiographs: from the settings of a data set to batches, notes and error messages."""

import csv
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from covid_cls.data.datamodule import EXTERNAL_SPLIT, ExternalRadiographs, Radiographs, seen_in_training
from covid_cls.data.image_source import DataSettings
from covid_cls.data.manifest import SPLITS
from covid_cls.data.phantoms import build_phantoms
from covid_cls.data.readers import read_image
from covid_cls.data.store import draw_on_canvas
from covid_cls.errors import InputError
from covid_cls.io import Batch
from covid_cls.tasks import CLASSES, TASKS

REAL = Path(__file__).parents[2].parent / "shared" / "cxr"


def radiographs(cache: Path, task: str = "three_class", **settings: Any) -> Radiographs:
    settings = {"size": 32, "batch_size": 4, "cache": str(cache), "val_share": 0.25, "test_share": 0.25, **settings}
    return Radiographs(TASKS[task], 32, 0, DataSettings(**settings))


def phantoms(cache: Path, task: str = "three_class", **settings: Any) -> Radiographs:
    return radiographs(cache, task, kind="phantom", images=36, **settings)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 36 phantoms with their manifest; tests must not change it."""
    return build_phantoms(tmp_path_factory.mktemp("drawn"), images=36).parent


@pytest.fixture
def own_copy(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms that a test may change."""
    # The modification times are copied as well, so that no file is hashed twice.
    shutil.copytree(drawn, tmp_path / "own_copy")
    return tmp_path / "own_copy"


def edit(folder: Path, change: Callable[[list[dict[str, str]]], object]) -> Path:
    """Apply `change` to the rows of the manifest of `folder` and return its path."""
    path = folder / "manifest.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_folders(table: pd.DataFrame, root: Path, names: dict[str, str]) -> None:
    """Copy the images of `table` to root/<split>/<class>/<name>."""
    for file, split, label in zip(table["file"], table["split"], table["label"], strict=True):
        folder = root / names.get(split, split) / names.get(label, label)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, folder / Path(file).name)


def batches(data: Radiographs, split: str) -> list[Batch]:
    return list(data.ordered_loader(split))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.index, b.index) and a.stage == b.stage
        for a, b in zip(first, second, strict=True)
    )


def places(data: Radiographs) -> dict[str, str]:
    return dict(zip(data.table["path"], data.table["split"], strict=True))


# from settings to batches


def check_batches(data: Radiographs) -> None:
    """Check that each image is served once, in the order of the table, with its pixels and its class."""
    for split in SPLITS:
        part = data.table[data.table["split"] == split]
        served = batches(data, split)
        assert torch.cat([batch.index for batch in served]).tolist() == part.index.tolist()
        assert [data.task.classes[y] for batch in served for y in batch.y] == part["label"].tolist()
        pixels = torch.cat([batch.x for batch in served])
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (len(part), 1, 32, 32))
        for file, x in zip(part["file"], pixels, strict=True):
            assert np.array_equal(x[0].numpy(), draw_on_canvas(read_image(Path(file)), 32, 32))


def test_batches_of_phantoms(cache: Path) -> None:
    data = phantoms(cache)
    assert data.name == "phantom"
    assert data.table["label"].value_counts().to_dict() == dict.fromkeys(CLASSES, 12)
    assert data.table["path"].is_monotonic_increasing
    assert data.table.groupby("patient_id")["split"].nunique().max() == 1
    assert data.table["sha256"].str.fullmatch(r"[0-9a-f]{64}").all()
    check_batches(data)


def test_batches_of_a_manifest(cache: Path, own_copy: Path) -> None:
    data = radiographs(cache, kind="manifest", path=str(own_copy / "manifest.csv"))
    assert data.name == "own_copy"
    assert places(data) == places(phantoms(cache))
    assert data.digest == phantoms(cache).digest
    check_batches(data)


def test_batches_of_a_folder(cache: Path, drawn: Path, tmp_path: Path) -> None:
    source = phantoms(cache)
    names = {"val": "Validation", "covid": "COVID-19", "normal": "No_findings", "pneumonia": "Viral Pneumonia"}
    as_folders(source.table, tmp_path / "x-rays", names)
    data = radiographs(cache, kind="folder", root=str(tmp_path / "x-rays"))
    assert data.name == "x-rays"
    wanted = {Path(path).name: split for path, split in places(source).items()}
    assert {Path(path).name: split for path, split in places(data).items()} == wanted
    assert data.class_counts == source.class_counts
    check_batches(data)


def test_training_batches_contain_each_training_image_once(cache: Path) -> None:
    data = phantoms(cache)
    loader = data.train_dataloader()
    train = data.table[data.table["split"] == "train"]
    served = list(loader)
    assert len(loader) == len(served)
    assert sorted(torch.cat([batch.index for batch in served]).tolist()) == train.index.tolist()
    for batch in served:
        assert [data.task.classes[y] for y in batch.y] == data.table.loc[batch.index.tolist(), "label"].tolist()


def test_the_order_and_the_splits_have_separate_seeds(cache: Path) -> None:
    settings: dict[str, Any] = {"kind": "phantom", "images": 36, "size": 32, "cache": str(cache)}
    settings |= {"val_share": 0.25, "test_share": 0.25, "batch_size": 4}
    images = DataSettings(**settings)
    first, second = (Radiographs(TASKS["three_class"], 32, seed, images) for seed in (1, 2))
    assert places(first) == places(second)
    assert first.digest == second.digest
    assert not same(list(first.train_dataloader()), list(second.train_dataloader()))
    third = Radiographs(TASKS["three_class"], 32, 1, images)
    assert same(list(first.train_dataloader()), list(third.train_dataloader()))


def test_worker_processes_do_not_change_batches(cache: Path) -> None:
    alone, helped = (phantoms(cache, workers=workers, sampler="balanced") for workers in (0, 2))
    for split in ("val", "test"):
        assert same(batches(alone, split), batches(helped, split))
    assert same(list(alone.train_dataloader()), list(helped.train_dataloader()))


def test_loaders_do_not_use_the_global_generator(cache: Path) -> None:
    data = phantoms(cache)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_resumed_run_starts_with_the_saved_epoch(cache: Path) -> None:
    data, resumed = phantoms(cache), phantoms(cache)
    sampler = data.train_dataloader().sampler
    sampler.set_epoch(3)  # type: ignore[attr-defined]
    resumed.load_state_dict({"next_epoch": 3})
    assert list(resumed.train_dataloader().sampler) == list(sampler)


def test_images_are_read_only(cache: Path) -> None:
    data = phantoms(cache)
    with pytest.raises(ValueError, match="read-only"):
        data.images[0] = 0


# tasks and counts


def test_the_binary_task_leaves_pneumonia_out_and_notes_it(cache: Path) -> None:
    data = phantoms(cache, "binary")
    assert set(data.table["label"]) == {"covid", "normal"}
    assert data.left_out == 12
    assert "12 images of classes outside the task binary were left out" in data.facts()["notes"]
    check_batches(data)


def test_patients_stay_in_their_split_in_every_task(cache: Path) -> None:
    everyone = places(phantoms(cache))
    for task in ("binary", "three_class_multilabel"):
        kept = places(phantoms(cache, task))
        assert kept.items() <= everyone.items()
        assert len(kept) == (24 if task == "binary" else 36)


@pytest.mark.parametrize("task", list(TASKS))
def test_class_counts_are_those_of_the_training_split(cache: Path, task: str) -> None:
    data = phantoms(cache, task)
    train = data.table[data.table["split"] == "train"]
    assert data.class_counts == [int((train["label"] == name).sum()) for name in TASKS[task].classes]
    assert sum(data.class_counts) == len(data.dataset("train")) < len(data.table)


def test_facts_are_consistent(cache: Path) -> None:
    data = phantoms(cache)
    facts = data.facts()
    assert facts["images"] == 36
    assert facts["patients"] == data.table["patient_id"].nunique()
    counts = facts["images_per_split_and_class"]
    assert sum(sum(row.values()) for row in counts.values()) == 36
    assert [counts["train"][name] for name in CLASSES] == data.class_counts
    assert sum(facts["patients_per_split"].values()) == facts["patients"]
    assert sum(facts["sources"].values()) == 36
    assert (facts["notes"], facts["quarantined"]) == ([], [])


def test_each_image_is_tested_in_one_fold(cache: Path) -> None:
    tested = []
    for fold in range(3):
        data = phantoms(cache, folds=3, fold=fold)
        tested += [path for path, split in places(data).items() if split == "test"]
    assert sorted(tested) == sorted(places(phantoms(cache)))


# notes


def test_missing_patient_ids_are_noted(cache: Path, own_copy: Path) -> None:
    path = edit(own_copy, lambda rows: [row.update(patient_id="") for row in rows])
    data = radiographs(cache, kind="manifest", path=str(path))
    notes = data.facts()["notes"]
    assert notes == ["36 of 36 images have no patient_id: each counts as a separate patient"]
    assert data.facts()["patients"] == 36


def test_the_leaky_split_is_noted(cache: Path) -> None:
    data = phantoms(cache, group="image")
    assert data.table.groupby("patient_id")["split"].nunique().max() > 1
    assert any(note.startswith("LEAKY SPLIT") for note in data.facts()["notes"])
    assert data.digest != phantoms(cache).digest


# bad images


@pytest.fixture
def damaged(own_copy: Path, cache: Path) -> Path:
    """Phantoms; two training images of different classes are replaced by other files."""
    table = phantoms(cache).table
    train = table[table["split"] == "train"]
    for label, content in (("covid", b"<html>gone</html>"), ("normal", b"")):
        (own_copy / train.loc[train["label"] == label, "path"].iloc[0]).write_bytes(content)
    return own_copy


def test_bad_images_are_reported_with_their_lines(cache: Path, damaged: Path) -> None:
    with pytest.raises(InputError) as error:
        radiographs(cache, kind="manifest", path=str(damaged / "manifest.csv"))
    message = str(error.value)
    assert "2 images cannot be used" in message
    assert "a web page, not an image" in message
    assert "empty file" in message
    assert "data.on_bad_image=quarantine" in message
    lines = (damaged / "manifest.csv").read_text().splitlines()
    for path in (p for p in damaged.rglob("*.png") if p.stat().st_size < 100):
        name = path.relative_to(damaged).as_posix()
        line = next(number for number, text in enumerate(lines, 1) if text.startswith(name))
        assert f"{name} (line {line}): " in message


def test_quarantine_leaves_bad_images_out(cache: Path, damaged: Path) -> None:
    data = radiographs(cache, kind="manifest", path=str(damaged / "manifest.csv"), on_bad_image="quarantine")
    everyone = places(phantoms(cache))
    assert len(data.table) == 34
    assert places(data).items() <= everyone.items()
    lost = sorted(set(everyone) - set(places(data)))
    assert data.quarantined["path"].tolist() == lost
    facts = data.facts()
    assert "2 undecodable images were quarantined" in facts["notes"]
    assert [row["path"] for row in facts["quarantined"]] == lost
    assert all(row["reason"] and row["line"] > 1 for row in facts["quarantined"])
    check_batches(data)


def test_a_bad_image_of_a_folder_is_reported_without_a_line(cache: Path, tmp_path: Path) -> None:
    as_folders(phantoms(cache).table, tmp_path / "set", {})
    (tmp_path / "set" / "train" / "covid" / "notes.txt").write_text("not a radiograph")
    with pytest.raises(InputError, match=r"1 images cannot be used: train/covid/notes\.txt: a text file"):
        radiographs(cache, kind="folder", root=str(tmp_path / "set"))


# digest


def with_digest(cache: Path, path: Path, **settings: Any) -> str:
    return radiographs(cache, kind="manifest", path=str(path), **settings).digest


def test_the_digest_depends_on_content_labels_and_splits(cache: Path, own_copy: Path) -> None:
    table = phantoms(cache).table
    train = table.loc[table["split"] == "train", "path"]
    before = with_digest(cache, own_copy / "manifest.csv")
    assert with_digest(cache, own_copy / "manifest.csv") == before
    assert with_digest(cache, own_copy / "manifest.csv", batch_size=7, sampler="balanced", workers=1) == before
    assert with_digest(cache, own_copy / "manifest.csv", seed=1) != before

    splits = dict(zip(table["path"], table["split"], strict=True))
    given = with_digest(cache, edit(own_copy, lambda rows: [row.update(split=splits[row["path"]]) for row in rows]))
    assert given == before

    patient = table.loc[table["path"] == train.iloc[0], "patient_id"].iloc[0]
    mine = [path for path, who in zip(table["path"], table["patient_id"], strict=True) if who == patient]
    moved = edit(own_copy, lambda rows: [row.update(split="test") for row in rows if row["path"] in mine])
    assert with_digest(cache, moved) not in (before, given)
    edit(own_copy, lambda rows: [row.update(split="train") for row in rows if row["path"] in mine])
    assert with_digest(cache, own_copy / "manifest.csv") == before

    labels = dict(zip(table["path"], table["label"], strict=True))
    other = next(name for name in CLASSES if name != labels[train.iloc[0]])
    relabel = edit(own_copy, lambda rows: [row.update(label=other) for row in rows if row["path"] == train.iloc[0]])
    assert with_digest(cache, relabel) != before


def test_one_pixel_changes_the_digest(cache: Path, own_copy: Path) -> None:
    before = with_digest(cache, own_copy / "manifest.csv")
    path = sorted(own_copy.rglob("*.png"))[0]
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[50, 50] ^= 1
    Image.fromarray(pixels).save(path)
    assert with_digest(cache, own_copy / "manifest.csv") != before


def test_the_digest_does_not_depend_on_the_place_of_the_data_set(cache: Path, own_copy: Path) -> None:
    before = with_digest(cache, own_copy / "manifest.csv")
    elsewhere = own_copy.parent / "another" / "place"
    # Modification times and the order of the lines differ, too.
    shutil.copytree(own_copy, elsewhere, copy_function=shutil.copy)
    rows = (elsewhere / "manifest.csv").read_text().splitlines()
    (elsewhere / "manifest.csv").write_text("\n".join([rows[0], *rows[:0:-1], ""]))
    assert with_digest(cache, elsewhere / "manifest.csv") == before
    assert with_digest(cache.parent / "another cache", elsewhere / "manifest.csv") == before


def test_a_relative_path_starts_at_the_working_directory(
    cache: Path, own_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_copy)
    data = radiographs(cache, kind="manifest", path="manifest.csv")
    assert data.name == "own_copy"
    monkeypatch.chdir(os.sep)
    check_batches(data)


# errors


@pytest.mark.parametrize("batch_size", [1, 0, -4])
def test_batch_sizes_too_small_for_batch_norm_are_rejected(cache: Path, batch_size: int) -> None:
    with pytest.raises(InputError, match=rf"data\.batch_size={batch_size}: batch norm needs at least 2"):
        phantoms(cache, batch_size=batch_size)


@pytest.mark.parametrize("action", ["ignore", "", "Stop"])
def test_an_unknown_action_for_bad_images_is_rejected(cache: Path, action: str) -> None:
    with pytest.raises(InputError, match=rf"data\.on_bad_image={action}: must be stop or quarantine"):
        phantoms(cache, on_bad_image=action)


def test_settings_of_the_splits_are_checked(cache: Path) -> None:
    for settings in ({"group": "source"}, {"val_share": 0.7}, {"folds": 3, "fold": 3}):
        with pytest.raises(InputError, match=next(iter(settings))):
            phantoms(cache, **settings)


def test_a_missing_data_set_is_reported(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.path=.*nowhere\.csv: no such file"):
        radiographs(cache, kind="manifest", path=str(tmp_path / "nowhere.csv"))
    with pytest.raises(InputError, match=r"data\.root=.*nowhere: no such folder"):
        radiographs(cache, kind="folder", root=str(tmp_path / "nowhere"))


def test_a_wrong_sha256_stops_the_run(cache: Path, own_copy: Path) -> None:
    path = edit(own_copy, lambda rows: [row.update(sha256="0" * 64 if k == 4 else "") for k, row in enumerate(rows)])
    with pytest.raises(InputError, match="1 files do not have the sha256 that the manifest gives: line 6:"):
        radiographs(cache, kind="manifest", path=str(path))


def test_a_class_missing_from_a_split_is_reported(cache: Path, own_copy: Path) -> None:
    def fewer(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["split"] = "test" if row["label"] == "normal" else SPLITS[int(row["patient_id"][1:]) % 3]

    with pytest.raises(InputError, match=r"train has no normal, val has no normal.*normal 0, 0, 12"):
        radiographs(cache, kind="manifest", path=str(edit(own_copy, fewer)))


def test_the_folder_of_phantoms_is_logged(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "covid_cls.data.image_source")
    phantoms(cache)
    assert f"phantoms: {cache}" in caplog.text


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real radiographs at {REAL}")
def test_batches_of_darkcovidnet(cache: Path) -> None:
    data = radiographs(cache, kind="manifest", path=str(REAL / "darkcovidnet" / "manifest.csv"), val_share=0.15)
    assert data.table["label"].value_counts().to_dict() == {"covid": 124, "normal": 500, "pneumonia": 500}
    assert data.table.groupby("patient_id")["split"].nunique().max() == 1
    assert not len(data.quarantined)
    assert sum(len(batch.y) for split in SPLITS for batch in batches(data, split)) == 1124


# memory of a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_images_that_fit_are_served_from_the_gpu(cache: Path) -> None:
    data, there = phantoms(cache), phantoms(cache)
    there.keep_on(torch.device("cuda"))
    for batch, moved in zip(data.ordered_loader("train"), there.ordered_loader("train"), strict=True):
        assert moved.x.device.type == "cuda"
        assert torch.equal(moved.x.cpu(), batch.x)
        assert torch.equal(moved.index, batch.index)


def test_images_stay_on_disk_on_a_cpu(cache: Path) -> None:
    data = phantoms(cache)
    images = data.images
    data.keep_on(torch.device("cpu"))
    assert data.images is images


@pytest.fixture(scope="module")
def external_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 phantoms with their manifest; tests must not change it."""
    return build_phantoms(tmp_path_factory.mktemp("external_set"), images=24).parent


@pytest.fixture
def external_copy(external_set: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms that a test may change."""
    shutil.copytree(external_set, tmp_path / "external_copy")
    return tmp_path / "external_copy"


def external(folder: Path, cache: Path, task: str = "three_class", **settings: Any) -> ExternalRadiographs:
    settings = {"kind": "manifest", "path": str(folder / "manifest.csv"), "cache": str(cache), **settings}
    return ExternalRadiographs(TASKS[task], 40, 32, DataSettings(**settings, batch_size=5))


def keep_labels(folder: Path, labels: list[str]) -> Path:
    """Remove all other labels from the manifest of `folder`."""
    table = pd.read_csv(folder / "manifest.csv", dtype=str, keep_default_na=False)
    table[table["label"].isin(labels)].to_csv(folder / "manifest.csv", index=False)
    return folder


def test_external_images_are_served_once_in_the_order_of_the_table(external_set: Path, cache: Path) -> None:
    data = external(external_set, cache)
    batches = list(data.ordered_loader(EXTERNAL_SPLIT))
    assert [len(batch.y) for batch in batches] == [5, 5, 5, 5, 4]
    named = [TASKS["three_class"].classes[k] for batch in batches for k in batch.y]
    assert named == data.table["label"].tolist()
    assert data.table["path"].is_monotonic_increasing
    assert set(data.table["split"]) == {EXTERNAL_SPLIT}
    assert data.notes == []


def test_external_images_have_the_pixels_of_training_images(external_set: Path, cache: Path) -> None:
    data = external(external_set, cache)
    settings = {"kind": "manifest", "path": str(external_set / "manifest.csv"), "size": 40, "cache": str(cache)}
    # The canvas is larger than the crop, as for augmentation.
    trained = Radiographs(data.task, 44, 0, DataSettings(val_share=0.25, test_share=0.25, **settings))
    wide = {
        path: x
        for split in ("train", "val", "test")
        for path, x in zip(
            trained.table.loc[trained.table["split"] == split, "path"],
            torch.cat([batch.x for batch in trained.ordered_loader(split)]),
            strict=True,
        )
    }
    for path, x in zip(data.table["path"], torch.cat([b.x for b in data.ordered_loader(EXTERNAL_SPLIT)]), strict=True):
        assert torch.equal(x, wide[path][:, 6:38, 6:38])


def test_classes_outside_the_task_are_left_out_and_counted(external_set: Path, cache: Path) -> None:
    data = external(external_set, cache, "binary")
    n = len(external(external_set, cache).table) - len(data.table)
    assert n > 0
    assert data.notes == [f"{n} images of pneumonia were left out: the task binary has no such class"]
    assert set(data.table["label"]) == {"covid", "normal"}


def test_an_absent_class_is_noted(external_copy: Path, cache: Path) -> None:
    data = external(keep_labels(external_copy, ["covid"]), cache)
    assert [note for note in data.notes if "has no image of" in note] == [
        "external_copy has no image of normal: scores that need this class are undefined",
        "external_copy has no image of pneumonia: scores that need this class are undefined",
    ]


def test_a_data_set_without_usable_image_is_rejected(external_copy: Path, cache: Path) -> None:
    with pytest.raises(InputError, match="external_copy has no usable image of covid, normal"):
        external(keep_labels(external_copy, ["pneumonia"]), cache, "binary")


def test_an_undecodable_external_image_is_reported_or_quarantined(external_copy: Path, cache: Path) -> None:
    broken = external(external_copy, cache).table["path"].iloc[3]
    (external_copy / broken).write_bytes(b"no image")
    table = pd.read_csv(external_copy / "manifest.csv", dtype=str, keep_default_na=False)
    table.drop(columns="sha256", errors="ignore").to_csv(external_copy / "manifest.csv", index=False)
    with pytest.raises(InputError, match=rf"1 images cannot be used: {broken} \(line"):
        external(external_copy, cache)
    data = external(external_copy, cache, on_bad_image="quarantine")
    assert broken not in set(data.table["path"])
    assert data.notes == [f"1 undecodable images were quarantined: {broken}"]
    assert sum(len(batch.y) for batch in data.ordered_loader(EXTERNAL_SPLIT)) == 23


def test_external_images_can_be_a_folder_of_classes(external_set: Path, tmp_path: Path, cache: Path) -> None:
    table = external(external_set, cache).table
    for path, label in zip(table["path"], table["label"], strict=True):
        (tmp_path / "set" / label.upper()).mkdir(parents=True, exist_ok=True)
        shutil.copy(external_set / path, tmp_path / "set" / label.upper())
    data = external(external_set, cache, kind="folder", path=None, root=str(tmp_path / "set"))
    assert len(data.table) == len(table)
    assert data.name == "set"


def test_external_images_that_the_run_was_trained_on_are_noted(
    external_copy: Path, external_set: Path, cache: Path
) -> None:
    data = external(keep_labels(external_copy, ["covid"]), cache)
    trained = {"kind": "manifest", "path": str(external_set / "manifest.csv"), "cache": str(cache), "folds": None}
    (note,) = seen_in_training(data.table, trained)
    assert note.startswith(f"{len(data.table)} of these images are in the data set of the run, byte for byte: ")
    assert data.table["path"].iloc[0] in note
    other = {"kind": "phantom", "images": 12, "phantom_seed": 5, "cache": str(cache)}
    assert seen_in_training(data.table, other) == []
    (note,) = seen_in_training(data.table, {**trained, "path": str(external_copy / "gone.csv")})
    assert note.startswith("the data set of the run was not found")
