"""Splits by patient, stratified by class, and cross-validation folds."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from covid_cls.data.manifest import SPLITS, read_manifest
from covid_cls.data.splits import SplitSettings, assign_splits, check_classes
from covid_cls.errors import InputError
from covid_cls.tasks import CLASSES

REAL = Path(__file__).parents[2].parent / "shared" / "cxr"
SEEDS = range(3)


def patients(count: int = 300, seed: int = 0, most: int = 4) -> pd.DataFrame:
    """Return a table of `count` patients with 1 to `most` images each; a fifth have covid."""
    random = np.random.default_rng(seed)
    rows = []
    for patient in range(count):
        label = CLASSES[0] if patient % 5 == 0 else CLASSES[1 + patient % 2]
        names = [f"{random.integers(10**9):09d}-{patient}-{image}.png" for image in range(random.integers(1, most + 1))]
        rows += [(name, label, f"p{patient}") for name in names]
    table = pd.DataFrame(rows, columns=["path", "label", "patient_id"]).sort_values("path", ignore_index=True)
    return table.assign(split="", fold="", line=np.arange(len(table)) + 2)


def split(table: pd.DataFrame, **settings: Any) -> pd.DataFrame:
    return assign_splits(table, SplitSettings(**settings))


def crossing(table: pd.DataFrame) -> list[str]:
    splits = table.groupby("patient_id")["split"].nunique()
    return splits.index[splits > 1].tolist()


def by_path(table: pd.DataFrame, column: str = "split") -> dict[str, str]:
    return dict(zip(table["path"], table[column], strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_patient_is_in_two_splits(seed: int) -> None:
    table = split(patients(seed=seed), seed=seed)
    assert crossing(table) == []
    assert set(table["split"]) == set(SPLITS)
    check_classes(table, CLASSES)


@pytest.mark.parametrize(("val", "test", "seed"), [(0.15, 0.15, 0), (0.1, 0.2, 1), (0.2, 0.1, 2), (0.3, 0.3, 0)])
def test_shares_are_of_all_images(val: float, test: float, seed: int) -> None:
    table = split(patients(seed=seed), seed=seed, val_share=val, test_share=test)
    shares = table["split"].value_counts(normalize=True)
    assert shares["val"] == pytest.approx(val, abs=0.05)
    assert shares["test"] == pytest.approx(test, abs=0.05)
    for label in CLASSES:
        inside = table.loc[table["label"] == label, "split"].value_counts(normalize=True)
        assert inside["val"] == pytest.approx(val, abs=0.08)
        assert inside["test"] == pytest.approx(test, abs=0.08)


def test_only_split_and_fold_change() -> None:
    before = patients()
    kept = before.copy()
    after = split(before, seed=1)
    assert before.equals(kept)
    assert after.drop(columns=["split", "fold"]).equals(before.drop(columns=["split", "fold"]))
    assert set(after["fold"]) == {""}


@pytest.mark.parametrize("group", ["patient", "image"])
@pytest.mark.parametrize("folds", [None, 4])
def test_splits_do_not_depend_on_the_order_of_rows(group: str, folds: int | None) -> None:
    table = patients(40)
    wanted = split(table, seed=3, group=group, folds=folds)
    shuffled = table.sample(frac=1, random_state=0)
    assert split(shuffled, seed=3, group=group, folds=folds).equals(wanted)


def test_another_seed_gives_other_splits() -> None:
    splits = [tuple(split(patients(80), seed=seed)["split"]) for seed in range(3)]
    assert len(set(splits)) == len(splits)


def test_a_class_can_be_left_out_after_splitting() -> None:
    # The binary task leaves a class out after splitting, so that it tests the same patients.
    table = split(patients(), seed=0)
    binary = table[table["label"] != "pneumonia"]
    check_classes(binary, ("covid", "normal"))


# cross-validation


@pytest.mark.parametrize(("group", "seed"), [("patient", 0), ("image", 1)])
def test_each_image_is_tested_in_one_fold(group: str, seed: int) -> None:
    table, folds = patients(60, seed=seed), 3
    tested: list[str] = []
    numbers = set()
    for fold in range(folds):
        part = split(table, seed=seed, folds=folds, fold=fold, group=group)
        tested += part.loc[part["split"] == "test", "path"].tolist()
        numbers.add(tuple(part["fold"]))
        assert (part.loc[part["split"] == "test", "fold"] == str(fold)).all()
        assert (part.loc[part["split"] != "test", "fold"] != str(fold)).all()
        assert set(part["split"]) == set(SPLITS)
        share = (part["split"] == "val").mean()
        assert share == pytest.approx(0.15, abs=0.06)
        check_classes(part, CLASSES)
        if group == "patient":
            assert crossing(part) == []
    assert sorted(tested) == table["path"].tolist()
    assert len(numbers) == 1


def test_a_given_fold_column_is_used() -> None:
    table = patients(60)
    table["fold"] = table["patient_id"].map(lambda name: str(int(name[1:]) // 5 % 3))
    for fold in range(3):
        part = split(table, seed=0, folds=3, fold=fold)
        assert by_path(part, "fold") == by_path(table, "fold")
        assert ((part["split"] == "test") == (part["fold"] == str(fold))).all()
        assert (part["split"] == "val").any()


@pytest.mark.parametrize("folds", [2, 4])
def test_a_fold_column_with_other_numbers_is_rejected(folds: int) -> None:
    table = patients(60)
    table["fold"] = table["patient_id"].map(lambda name: str(int(name[1:]) % 3))
    with pytest.raises(
        InputError, match=rf"data\.folds={folds}: the column fold contains 0, 1, 2, not 0 to {folds - 1}"
    ):
        split(table, folds=folds)


def test_a_partly_filled_fold_column_is_rejected() -> None:
    # New folds would silently replace the given ones.
    table = patients(60)
    table["fold"] = table["patient_id"].map(lambda name: str(int(name[1:]) % 3))
    table.loc[0, "fold"] = ""
    with pytest.raises(InputError, match=r"lines? .*2"):
        split(table, folds=3)


@pytest.mark.parametrize("fold", range(3))
def test_a_patient_in_two_given_folds_is_rejected_for_every_test_fold(fold: int) -> None:
    table = patients(60, most=1)
    table["fold"] = [str(k % 3) for k in range(len(table))]
    # The patient is in folds 0 and 1.
    table.loc[[0, 1], "patient_id"] = "twice"
    with pytest.raises(InputError, match="twice"):
        split(table, folds=3, fold=fold)


def test_without_folds_a_fold_column_is_not_used() -> None:
    table = patients(60)
    table["fold"] = "7"
    assert set(split(table)["fold"]) == {""}


@pytest.mark.parametrize(("folds", "fold"), [(1, 0), (0, 0), (-2, 0), (5, 5), (5, -1)])
def test_folds_out_of_range_are_rejected(folds: int, fold: int) -> None:
    with pytest.raises(InputError, match=re.escape(f"data.folds={folds} data.fold={fold}")):
        split(patients(60), folds=folds, fold=fold)


def test_more_folds_than_patients_are_rejected() -> None:
    with pytest.raises(InputError, match="6 patients cannot be divided into 7 parts"):
        split(patients(6), folds=7)


# splits in the table


def given(table: pd.DataFrame, test: int, val: int = 0) -> pd.DataFrame:
    """Put the first `test` patients of each hundred into test, the next `val` into val."""
    number = table["patient_id"].str[1:].astype(int) % 100
    return table.assign(split=np.select([number < test, number < test + val], ["test", "val"], "train"))


def test_a_given_split_is_kept() -> None:
    table = given(patients(), test=20, val=20)
    for seed in SEEDS:
        for group in ("patient", "image"):
            assert by_path(split(table, seed=seed, group=group)) == by_path(table)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_val_is_taken_from_train(seed: int) -> None:
    table = given(patients(), test=20)
    after = split(table, seed=seed)
    assert ((after["split"] == "test") == (table["split"] == "test")).all()
    assert (after["split"] == "val").mean() == pytest.approx(0.15, abs=0.04)
    assert crossing(after) == []


def test_a_missing_test_is_taken_from_train() -> None:
    table = given(patients(), test=0, val=20)
    after = split(table, seed=0)
    assert ((after["split"] == "val") == (table["split"] == "val")).all()
    assert (after["split"] == "test").mean() == pytest.approx(0.15, abs=0.04)
    assert crossing(after) == []


def test_a_patient_in_two_given_splits_is_named() -> None:
    table = given(patients(most=1), test=20, val=20)
    # Carol is in train and test, Dave in train and val.
    table.loc[table["patient_id"].isin(["p50", "p0"]), "patient_id"] = "carol"
    table.loc[table["patient_id"].isin(["p60", "p20"]), "patient_id"] = "dave"
    with pytest.raises(InputError, match=r"2 patients .*carol \(test\+train\), dave \(train\+val\).*data\.group=image"):
        split(table)
    assert by_path(split(table, group="image")) == by_path(table)


def test_all_patients_in_two_splits_are_found() -> None:
    table = given(patients(most=1), test=20, val=20)
    train, test = (table.index[table["split"] == name][:20] for name in ("train", "test"))
    table.loc[test, "patient_id"] = table.loc[train, "patient_id"].to_numpy()
    with pytest.raises(InputError, match="20 patients are in more than one"):
        split(table)


def test_a_partly_filled_split_column_is_rejected() -> None:
    table = given(patients(), test=20)
    table.loc[[3, 8], "split"] = ""
    with pytest.raises(InputError, match="2 rows have no split while others do: lines 5, 10"):
        split(table)


def test_given_splits_without_train_are_rejected() -> None:
    table = patients()
    for name in ("test", "val"):
        with pytest.raises(InputError, match="no image has the split train"):
            split(table.assign(split=name))


# settings


def test_group_image_puts_patients_into_several_splits() -> None:
    table = split(patients(60), seed=0, group="image")
    # Of 60 patients: the leak that this setting demonstrates.
    assert len(crossing(table)) > 12
    assert set(table["split"]) == set(SPLITS)


@pytest.mark.parametrize("group", ["", "patients", "Image", "source"])
def test_an_unknown_group_is_rejected(group: str) -> None:
    with pytest.raises(InputError, match=rf"data\.group={group}: must be patient or image"):
        split(patients(), group=group)


@pytest.mark.parametrize(
    ("key", "share"), [("val_share", 0.0), ("val_share", float("nan")), ("test_share", 0.5), ("test_share", -0.1)]
)
def test_shares_out_of_range_are_rejected(key: str, share: float) -> None:
    with pytest.raises(InputError, match=rf"data\.{key}={share}: must be between 0 and 0\.5"):
        split(patients(), **{key: share})


def test_too_few_patients_are_rejected() -> None:
    with pytest.raises(InputError, match="patients cannot be divided into"):
        split(patients(4))


def test_a_class_of_one_patient_is_reported_with_counts() -> None:
    table = patients(100)
    table = table[(table["label"] != "covid") | (table["patient_id"] == "p0")]
    assigned = split(table, seed=0)
    with pytest.raises(InputError) as error:
        check_classes(assigned, CLASSES)
    message = str(error.value)
    images = int((table["label"] == "covid").sum())
    home = assigned.loc[assigned["label"] == "covid", "split"].iloc[0]
    for name in SPLITS:
        assert (f"{name} has no covid" in message) == (name != home)
    assert f"covid {', '.join(str(images if name == home else 0) for name in SPLITS)};" in message


def test_an_absent_class_is_reported_with_counts() -> None:
    table = given(patients(), test=20, val=20)
    table = table[table["label"] != "pneumonia"]
    check_classes(table, ("covid", "normal"))
    with pytest.raises(InputError, match=r"train has no pneumonia.*test has no pneumonia.*pneumonia 0, 0, 0"):
        check_classes(table, CLASSES)


# real sets


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real radiographs at {REAL}")
@pytest.mark.parametrize(
    ("name", "present"),
    # The external set has only two patients with pneumonia.
    [("darkcovidnet", CLASSES), ("imbalanced", CLASSES), ("external", ("covid", "normal"))],
)
def test_splits_of_real_sets_share_no_patient(name: str, present: tuple[str, ...]) -> None:
    table = read_manifest(REAL / name / "manifest.csv")
    for seed in range(1 if name == "imbalanced" else 3):
        assigned = split(table, seed=seed)
        assert crossing(assigned) == []
        check_classes(assigned, present)
