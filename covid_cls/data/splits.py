"""Splits into training, validation and test images: by patient, stratified by class, independent of file order."""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from covid_cls.data.manifest import SPLITS
from covid_cls.errors import InputError, listed


@dataclass(frozen=True)
class SplitSettings:
    """How images are split.

    Attributes:
        seed: Random seed of the splits.
        group: "patient" keeps all images of a patient in one split. "image" is the leaky split that others publish.
        val_share: Share of all images for validation.
        test_share: Share of all images for the test.
        folds: Number of folds of a cross-validation; None makes one split.
        fold: Number of the fold that is the test split, from 0.
    """

    seed: int = 0
    group: str = "patient"
    val_share: float = 0.15
    test_share: float = 0.15
    folds: int | None = None
    fold: int = 0


def assign_splits(table: pd.DataFrame, settings: SplitSettings) -> pd.DataFrame:
    """Fill in the columns split (train, val, test) and fold ("" without folds).

    Without folds, splits in the table are kept; if val or test is missing, it is taken from train. With folds, numbers
    in the column fold are kept, and validation images are taken from the folds that are not tested.

    Args:
        table: As `read_manifest` returns it.
        settings: How to split it.

    Raises:
        InputError: A patient is in two splits, or a setting is out of range.
    """
    group, seed = settings.group, settings.seed
    if group not in ("patient", "image"):
        raise InputError(f"data.group={group}: must be patient or image")
    shares = {"test": settings.test_share, "val": settings.val_share}
    for split, share in shares.items():
        if not 0 < share < 0.5:
            raise InputError(f"data.{split}_share={share}: must be between 0 and 0.5")
    # Sorted, so that the splits do not depend on the order of the files.
    table = table.sort_values("path", kind="stable", ignore_index=True)
    units = table["patient_id"] if group == "patient" else table["path"]
    if settings.folds is not None:
        table["fold"] = _folds(table, units, settings.folds, settings.fold, seed)
        table["split"] = np.where(table["fold"] == str(settings.fold), "test", "train")
    else:
        table["fold"] = ""
        if not _is_given(table, "split"):
            table["split"] = "train"
        elif not (table["split"] == "train").any():
            raise InputError("data: no image has the split train. Assign some to it, or leave the column split empty")
    if group == "patient":
        _check_patients(table, "split" if settings.folds is None else "fold")
    for split, share in shares.items():
        if not (table["split"] == split).any():
            train = table[table["split"] == "train"]
            # `share` is of all images, and only those in train can be chosen.
            chosen = _choose(train, units[train.index], share * len(table) / len(train), seed)
            table.loc[train.index[chosen], "split"] = split
    return table


def check_classes(table: pd.DataFrame, classes: tuple[str, ...]) -> None:
    """Check that every split has images of every class.

    Raises:
        InputError: A class is missing from a split; the message counts every class in every split.
    """
    counts = pd.crosstab(table["label"], table["split"]).reindex(index=classes, columns=SPLITS, fill_value=0)
    empty = [f"{split} has no {label}" for split in SPLITS for label in classes if counts.loc[label, split] == 0]
    if empty:
        found = "; ".join(f"{label} {listed(list(counts.loc[label]))}" for label in classes)
        raise InputError(
            f"data: {listed(empty)}. Images per class in train, val, test: {found}. Every class needs patients in "
            "every split: add some, change data.val_share or data.test_share, or give a split column"
        )


def _is_given(table: pd.DataFrame, column: str) -> bool:
    """Return whether a column is filled in. Raises InputError if it is in some rows only."""
    empty = table[column] == ""
    if empty.any() and not empty.all():
        lines = table.loc[empty, "line"].tolist()
        raise InputError(
            f"data: {len(lines)} rows have no {column} while others do: lines {listed(lines)}. Fill them in"
        )
    return not empty.any()


def _check_patients(table: pd.DataFrame, column: str) -> None:
    splits = table.groupby("patient_id")[column].agg(lambda s: "+".join(sorted(set(s))))
    crossing = [f"{patient} ({where})" for patient, where in splits.items() if "+" in where]
    if crossing:
        raise InputError(
            f"data: {len(crossing)} patients are in more than one split or fold: {listed(crossing, 5)}. Give each "
            "patient one, or set data.group=image to train with this leak; every result will then report it"
        )


def _folds(table: pd.DataFrame, units: "pd.Series[str]", folds: int, fold: int, seed: int) -> NDArray[np.str_]:
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(f"data.folds={folds} data.fold={fold}: need at least 2 folds and 0 <= fold < folds")
    if _is_given(table, "fold"):
        given = sorted(set(table["fold"]))
        if given != sorted(str(k) for k in range(folds)):
            raise InputError(f"data.folds={folds}: the column fold contains {listed(given)}, not 0 to {folds - 1}")
        return table["fold"].to_numpy(dtype=np.str_)
    numbers = np.empty(len(table), dtype=object)
    for k, test in enumerate(_group_folds(table, units, folds, seed)):
        numbers[test] = str(k)
    return numbers.astype(np.str_)


def _choose(part: pd.DataFrame, units: "pd.Series[str]", share: float, seed: int) -> NDArray[np.int64]:
    """Return positions of about `share` of the rows: of all folds of that size the one with the best class counts."""
    # StratifiedGroupKFold keeps patients together, but only makes folds of equal size, so a share is taken as one fold.
    labels = part["label"]
    wanted = labels.value_counts() * share

    def distance(rows: NDArray[np.int64]) -> float:
        return float(labels.iloc[rows].value_counts().sub(wanted, fill_value=0).abs().div(wanted).max())

    return min(_group_folds(part, units, max(2, round(1 / share)), seed), key=distance)


def _group_folds(table: pd.DataFrame, units: "pd.Series[str]", folds: int, seed: int) -> list[NDArray[np.int64]]:
    if units.nunique() < folds:
        raise InputError(f"data: {units.nunique()} patients cannot be divided into {folds} parts. Add patients")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer patients than parts is missing from some part; `check_classes` reports it if it matters.
        warnings.filterwarnings("ignore", category=UserWarning)
        try:
            return [test for _, test in splitter.split(table, table["label"], units)]
        except ValueError as error:
            raise InputError(
                f"data: {len(table)} images cannot be divided into {folds} parts by class ({error}). Add images"
            ) from error
