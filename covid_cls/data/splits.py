"""Who trains, who selects and who tests: splits by patient, stratified by class, independent of file order."""

import warnings

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from covid_cls.data.manifest import SPLITS
from covid_cls.errors import InputError, listed


def assign_splits(
    table: pd.DataFrame,
    *,
    seed: int = 0,
    group: str = "patient",
    val_share: float = 0.15,
    test_share: float = 0.15,
    folds: int | None = None,
    fold: int = 0,
) -> pd.DataFrame:
    """`table` with `split` in train, val, test and `fold` filled in ("" without folds).

    Splits that the table brings are kept; what it lacks is cut from train. With `folds`, fold number `fold` is the
    test split (the table's own `fold` column where it has one) and validation is cut from the others. group="patient"
    keeps a patient's images together; "image" is the leaky split that others publish. The shares are of all images.
    InputError where a patient stands in two splits, or a setting is out of range.
    """
    if group not in ("patient", "image"):
        raise InputError(f"data.group={group}: must be patient or image")
    for key, share in (("val_share", val_share), ("test_share", test_share)):
        if not 0 < share < 0.5:
            raise InputError(f"data.{key}={share}: must lie between 0 and 0.5")
    table = table.sort_values("path", kind="stable", ignore_index=True)
    units = table["patient_id"] if group == "patient" else table["path"]
    if folds is not None:
        table["fold"] = _folds(table, units, folds, fold, seed)
        table["split"] = np.where(table["fold"] == str(fold), "test", "train")
    else:
        table["fold"] = ""
        _check_given(table)
    if group == "patient":
        _check_patients(table, "split" if folds is None else "fold")
    for split, share in (("test", test_share), ("val", val_share)):
        if not (table["split"] == split).any():
            inside = (table["split"] == "train").to_numpy()
            part = table[inside]
            chosen = _cut(part, units[inside], share * len(table) / len(part), seed)
            table.loc[part.index[chosen], "split"] = split
    return table


def check_classes(table: pd.DataFrame, classes: tuple[str, ...]) -> None:
    """InputError where a split lacks one of `classes`; the message counts every class in every split."""
    counts = pd.crosstab(table["label"], table["split"]).reindex(index=classes, columns=SPLITS, fill_value=0)
    empty = [f"{split} has no {label}" for split in SPLITS for label in classes if counts.loc[label, split] == 0]
    if empty:
        found = "; ".join(f"{label} {listed(list(counts.loc[label]))}" for label in classes)
        raise InputError(
            f"data: {listed(empty)}. Images per class in train, val, test: {found}. Every class needs patients in "
            "every split: add some, change data.val_share or data.test_share, or give a split column"
        )


def _check_given(table: pd.DataFrame) -> None:
    given = table["split"] != ""
    if given.any() and not given.all():
        lines = table.loc[~given, "line"].tolist()
        raise InputError(f"data: {len(lines)} rows have no split while others do: lines {listed(lines)}; fill them in")
    if not given.any():
        table["split"] = "train"
    elif not (table["split"] == "train").any():
        raise InputError("data: no image belongs to the split train; nothing could be learned")


def _check_patients(table: pd.DataFrame, column: str) -> None:
    splits = table.groupby("patient_id")[column].agg(lambda s: "+".join(sorted(set(s))))
    crossing = [f"{patient} ({where})" for patient, where in splits.items() if "+" in where]
    if crossing:
        raise InputError(
            f"data: {len(crossing)} patients stand in more than one split or fold: {listed(crossing, 5)}. Give each "
            "patient one, or set data.group=image to train on the leak, which every output will then say"
        )


def _folds(table: pd.DataFrame, units: "pd.Series[str]", folds: int, fold: int, seed: int) -> NDArray[np.str_]:
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(f"data.folds={folds} data.fold={fold}: need at least 2 folds and 0 <= fold < folds")
    blank = table["fold"] == ""
    if blank.any() and not blank.all():
        lines = table.loc[blank, "line"].tolist()
        raise InputError(f"data: {len(lines)} rows have no fold while others do: lines {listed(lines)}; fill them in")
    if not blank.any():
        given = sorted(set(table["fold"]))
        if given != sorted(str(k) for k in range(folds)):
            raise InputError(f"data.folds={folds}: the fold column holds {listed(given)}, not 0 to {folds - 1}")
        return table["fold"].to_numpy(dtype=np.str_)
    numbers = np.empty(len(table), dtype=object)
    for k, test in enumerate(_group_folds(table, units, folds, seed)):
        numbers[test] = str(k)
    return numbers.astype(np.str_)


def _cut(part: pd.DataFrame, units: "pd.Series[str]", share: float, seed: int) -> NDArray[np.int64]:
    """Positions in `part` of about `share` of it: of all folds of that size, the one nearest in class proportions."""
    wanted = part["label"].value_counts() * share

    def distance(rows: NDArray[np.int64]) -> float:
        found = part["label"].iloc[rows].value_counts().reindex(wanted.index, fill_value=0)
        return float(((found - wanted).abs() / wanted).max())

    return min(_group_folds(part, units, max(2, round(1 / share)), seed), key=distance)


def _group_folds(table: pd.DataFrame, units: "pd.Series[str]", folds: int, seed: int) -> list[NDArray[np.int64]]:
    if units.nunique() < folds:
        raise InputError(f"data: {units.nunique()} patients cannot be cut into {folds} parts; add patients")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer patients than parts leaves some part without it: `check_classes` judges what matters.
        warnings.filterwarnings("ignore", category=UserWarning)
        try:
            return [test for _, test in splitter.split(table, table["label"], units)]
        except ValueError as error:
            raise InputError(
                f"data: {len(table)} images cannot be cut into {folds} parts by class ({error})"
            ) from error
