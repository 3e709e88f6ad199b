"""What a table of images says of itself: who stands where, which files belong together, what goes with the label."""

import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd
from scipy.stats.contingency import association

from covid_cls.audits.probe_features import header, metadata
from covid_cls.evaluation.verdict import source_association

_RARE = 0.02  # of the images: rarer values of an attribute count as one
_DAY = re.compile(r"[-_ ]*\(?day[-_ ]?\d+\)?.*$")
_VIEW = re.compile(r"[-_ ](pa|ap|l|lat|lateral|frontal|supine|erect)$")
_LETTER = re.compile(r"(?<=[a-z_]{2}\d)[a-h]$|(?<=[a-z_]{2}\d\d)[a-h]$|[-_ ][a-h]$")  # fig1a, not f73f3c
_NUMBERED = re.compile(r"^((?:patient|pat|person|subject|sub|case|pid|p)[-_ ]?\d+)[-_ ].+$|^(\d{5,})[-_]\d{1,3}$")


class Attribute(NamedTuple):
    """How strongly one property of the images goes with their label.

    v: Cramér's V, without bias correction; 0: independent, 1: one gives the other away, nan: no two
    values that are frequent enough.
    commonest: per class its most frequent value with its share, in words.
    """

    name: str
    v: float
    commonest: dict[str, str]


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """Rows source, label with their numbers of images and patients; a source that is not named is "unknown"."""
    named = table.assign(source=table["source"].replace("", "unknown"))
    grouped = named.groupby(["source", "label"])
    return grouped.agg(images=("path", "size"), patients=("patient_id", "nunique")).reset_index()


def label_pure_sources(table: pd.DataFrame) -> list[str]:
    """The named sources whose images all have one label, in a table of two labels or more."""
    labels = table[table["source"] != ""].groupby("source")["label"].nunique()
    return sorted(labels.index[labels == 1]) if table["label"].nunique() > 1 else []


def crossing_patients(table: pd.DataFrame, column: str) -> dict[str, str]:
    """Each patient whose images stand in two or more values of `column`, with these: "train+test"."""
    given = table[table[column] != ""]
    places = given.groupby("patient_id")[column].agg(lambda values: "+".join(sorted(set(values))))
    return {str(patient): where for patient, where in places.items() if "+" in where}


def without_patient(table: pd.DataFrame) -> "pd.Series[bool]":
    """Which images have no patient_id, and count as patients of their own."""
    return table["patient_id"].str.startswith("image:")


def file_series(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Images that by their file names are of one patient and by their patient_id of two or more; one table per series.

    See `patient_stem`. The label is part of the name: fig1a of one class and fig1b of another need not belong together.
    """
    stems = table["path"].map(patient_stem)
    named = table[stems != ""].assign(stem=stems)
    series = [part for _, part in named.groupby(["stem", "label"]) if part["patient_id"].nunique() > 1]
    return [part.drop(columns="stem") for part in series]


def patient_stem(path: str) -> str:
    """What a file name says of the patient: "case-7" of case-7-day0.png, case-7-a.png and case-7-PA.png; "" if nothing.

    A bare number (img_001, Normal-1390) counts images, not patients. In 00002658_001 (ChestX-ray14) and p12_3 the
    first number is the patient.
    """
    name = PurePosixPath(path).stem.lower()
    numbered = _NUMBERED.match(name)
    if numbered:
        return next(group for group in numbered.groups() if group)
    for rule in (_DAY, _VIEW, _LETTER):
        stem = rule.sub("", name)
        if stem and stem != name:
            return _VIEW.sub("", stem)
    return ""


def attributes(table: pd.DataFrame, cache: Path) -> list[Attribute]:
    """How the source, and what files and manifest tell of each image, go with its label; the strongest first.

    Size, mode and format are of the files as published where the manifest has `orig_` columns, else of those at hand.
    Numbers are cut into fifths; values of under 2 % of the images are pooled.
    """
    found = [Attribute("source", source_association(table), _commonest(table["source"], table["label"]))]
    header_columns, acquisition = header(table, cache).columns, metadata(table, cache).columns
    columns = {} if acquisition is None else {name: acquisition[name] for name in acquisition}
    if header_columns is not None:
        columns["size"] = header_columns["width"].astype(str) + " × " + header_columns["height"].astype(str)
        columns |= {name: header_columns[name] for name in ("mode", "format")}
    for name, column in columns.items():
        values = _levels(column)
        two = values.nunique() > 1 and table["label"].nunique() > 1
        v = float(association(pd.crosstab(values, table["label"]).to_numpy(), method="cramer")) if two else float("nan")
        found.append(
            Attribute(str(name), v, _commonest(column if isinstance(column.iloc[0], str) else values, table["label"]))
        )
    return sorted(found, key=lambda one: -one.v if one.v == one.v else 1)


def _levels(column: "pd.Series[Any]") -> "pd.Series[str]":
    if pd.api.types.is_numeric_dtype(column):
        column = pd.qcut(column, 5, duplicates="drop") if column.nunique() > 5 else column
        return column.astype(str).replace("nan", "unknown")
    text = column.astype(str).replace("", "unknown")
    shares = text.map(text.value_counts(normalize=True))
    return text.where(shares >= _RARE, "other")


def _commonest(values: "pd.Series[Any]", labels: "pd.Series[str]") -> dict[str, str]:
    found = {}
    for label, part in values.astype(str).replace("", "unknown").groupby(labels):
        shares = part.value_counts(normalize=True)
        more = f", {len(shares) - 1} more" if len(shares) > 1 else ""
        found[str(label)] = f"{shares.index[0]} ({shares.iloc[0]:.0%}){more}"
    return found
