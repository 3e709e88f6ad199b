"""The checks behind the audit: patients, series, copies, sources and files, each turned into findings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from covid_cls.audits.duplicates import groups
from covid_cls.audits.inventory import crossing_patients, file_series, label_pure_sources, without_patient
from covid_cls.errors import listed
from covid_cls.evaluation.verdict import CONFOUNDED, source_association

NO_EVIDENCE = "not evidence of disease detection"
NOTABLE = 0.5  # Cramér's V of an attribute and the label that a reader should know of
FEW_PATIENTS = 20  # of a class: a test part of 15 % then has 3 of them
_COPIES = (  # where images differ that are copies of one; the gravest first
    ("label", "fail", "copies of one image in two classes", "One of the labels is wrong: mend or remove them"),
    (
        "split",
        "fail",
        "copies of one image in two splits",
        "Keep one of each, or give them the same patient_id and split",
    ),
    ("patient_id", "warn", "copies of one image under two patients", "Keep one of each, or give them one patient_id"),
    ("", "note", "copies of one image within a patient", "Keep one of each, unless they are two exposures"),
)


@dataclass(frozen=True)
class Finding:
    """One thing found. level: "fail" (scores mislead), "warn" (they may) or "note".

    detail: how much of it, in a sentence; examples: all cases, one line each; remedy: what to do.
    consequence: what scores on this set then are, for findings that fail.
    """

    level: str
    title: str
    detail: str
    examples: Sequence[str] = ()
    remedy: str = ""
    consequence: str = "not to be trusted"


def patient_findings(table: pd.DataFrame) -> list[Finding]:
    """Patients in two splits or classes, images without one, classes with few."""
    found = []
    leaks, both = crossing_patients(table, "split"), crossing_patients(table, "label")
    if leaks:
        found.append(
            Finding(
                "fail",
                "patients in two splits",
                f"{len(leaks)} of {table['patient_id'].nunique()} patients.",
                [f"{patient} ({where})" for patient, where in leaks.items()],
                "Give each patient one split, or leave the split column out and let it be drawn by patient",
            )
        )
    if both:
        found.append(
            Finding(
                "warn",
                "patients in two classes",
                f"{len(both)} of {table['patient_id'].nunique()} patients.",
                [f"{patient} ({where})" for patient, where in both.items()],
                "Check their labels; an illness that came or went is no fault",
            )
        )
    alone = without_patient(table)
    if alone.any():
        found.append(
            Finding(
                "warn",
                "images without patient_id",
                f"{int(alone.sum())} of {len(table)}: each counts as a patient of its own, so that a patient may stand "
                "in two splits unseen, and intervals are too narrow.",
                sorted(table.loc[alone, "path"]),
                "Fill in patient_id",
            )
        )
    patients = table.groupby("label")["patient_id"].nunique()
    few = patients[patients < FEW_PATIENTS]
    if len(few):
        found.append(
            Finding(
                "warn",
                "classes with few patients",
                f"{listed([f'{label}: {n}' for label, n in few.items()])}. Intervals will be wide.",
                [f"{label}: {n} patients" for label, n in few.items()],
                "Add patients, or use cross-validation (data.folds=5)",
            )
        )
    return found


def series_findings(table: pd.DataFrame) -> list[Finding]:
    """File names that speak of one patient where patient_id does not."""
    cases: dict[str, list[str]] = {"fail": [], "warn": []}
    for series in file_series(table):
        # Ids that were given may know better: panels a and b of a figure can be of two patients.
        leaks = series["split"].nunique() > 1 and without_patient(series).any()
        ends = zip(series["path"], series["split"], strict=True)
        cases["fail" if leaks else "warn"].append(
            listed([f"{path} ({split})" if split else path for path, split in ends])
        )
    remedy = "Give the images of one patient the same patient_id"
    return [
        Finding(level, f"file names of one patient {where}", f"{len(cases[level])} series.", cases[level], remedy)
        for level, where in (("fail", "in two splits, without patient_id"), ("warn", "under two patient_ids"))
        if cases[level]
    ]


def copy_findings(table: pd.DataFrame, pairs: pd.DataFrame) -> list[Finding]:
    """Groups of copies, from `duplicates.find_pairs`, by the gravest thing in which their images differ."""
    cases: dict[str, list[str]] = {column: [] for column, *_ in _COPIES}
    images = dict.fromkeys(cases, 0)
    for rows in groups(pairs, table.index.to_numpy()):
        same = table.loc[rows]
        differ = next((column for column in cases if column and same[column].nunique() > 1), "")
        images[differ] += len(rows)
        cases[differ] += [_pair_line(table, pair) for pair in pairs[pairs["first"].isin(rows)].to_dict("records")]
    return [
        Finding(level, title, f"{images[column]} images in {_pairs(len(cases[column]))}.", cases[column], remedy)
        for column, level, title, remedy in _COPIES
        if cases[column]
    ]


def pair_order(table: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """`pairs` with `between`, what their images differ in ("label", "split", "patient_id" or ""), the gravest first."""
    columns = [column for column, *_ in _COPIES]
    first, second = table.loc[pairs["first"]], table.loc[pairs["second"]]
    differ = {column: (first[column].to_numpy() != second[column].to_numpy()) for column in columns if column}
    rank = pd.DataFrame(differ).assign(none=True).to_numpy().argmax(axis=1)
    ordered = pairs.assign(rank=rank, between=[columns[k] for k in rank])
    return ordered.sort_values(["rank", "likeness"], ascending=[True, False], kind="stable").drop(columns="rank")


def _pairs(number: int) -> str:
    return "1 pair" if number == 1 else f"{number} pairs"


def _pair_line(table: pd.DataFrame, pair: dict[Any, Any]) -> str:
    ends = [table.loc[pair[name]] for name in ("first", "second")]
    words = [f"{end['path']} ({', '.join(filter(None, (end['label'], end['split'])))})" for end in ends]
    how = {"bytes": "same bytes", "pixels": "same pixels"}.get(pair["kind"], f"{pair['kind']} {pair['likeness']:.2f}")
    return f"{' = '.join(words)}: {how}"


def source_findings(table: pd.DataFrame) -> list[Finding]:
    """Whether the source gives the label away."""
    named = table["source"] != ""
    if not named.any():
        return [
            Finding(
                "warn",
                "sources are not named",
                "Whether the classes come from different hospitals, which a network can see, cannot be judged.",
                remedy="Fill in the manifest's source column",
            )
        ]
    v, pure = source_association(table), label_pure_sources(table)
    detail = f"{table['source'].nunique()} sources, {len(pure)} of them of one class alone"
    cases = [f"{source}: {table.loc[table['source'] == source, 'label'].iloc[0]} alone" for source in pure]
    if v >= CONFOUNDED:
        remedy = "Add sources that hold every class, and test on a source that was not trained on"
        title = f"source predicts label, Cramér's V {v:.2f}"
        return [Finding("fail", title, f"{detail}.", cases, remedy, NO_EVIDENCE)]
    if v >= NOTABLE or pure:
        title = f"source goes with the label, Cramér's V {v:.2f}"
        return [Finding("warn", title, f"{detail}.", cases, "Read scores per source")]
    return []


def file_findings(bad: pd.DataFrame, readable: int) -> list[Finding]:
    """The files that no reader takes: path, line, reason."""
    if bad.empty:
        return []
    lines = [
        f"{path} (line {line}): {reason}" if line else f"{path}: {reason}"
        for path, line, reason in zip(bad["path"], bad["line"], bad["reason"], strict=True)
    ]
    detail = f"{len(bad)} of {len(bad) + readable}; everything else here is about the others."
    remedy = "Mend or remove them; data.on_bad_image=quarantine trains without them"
    return [Finding("warn", "unreadable files", detail, lines, remedy)]
