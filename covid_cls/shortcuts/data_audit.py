"""Audit of a data set: what in it predicts the label without showing disease."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats.contingency import association

from covid_cls.data.datamodule import Radiographs, decode_images
from covid_cls.data.image_source import DataSettings
from covid_cls.data.splits import SplitSettings, assign_splits
from covid_cls.errors import InputError, listed
from covid_cls.evaluation.intervals import Interval, score_intervals
from covid_cls.evaluation.verdict import CONFOUNDED, source_association
from covid_cls.shortcuts.baselines import (
    BASELINES,
    SourceScore,
    baseline_notes,
    cross_validated_baselines,
    header,
    metadata,
    source_within_class,
)
from covid_cls.shortcuts.duplicates import SIDE, content_side, duplicate_groups, find_pairs
from covid_cls.tasks import TASKS, Task

log = logging.getLogger(__name__)

LEVELS = ("fail", "warn", "note")
MODES = ("off", "warn", "fail")
NO_EVIDENCE = "not evidence of disease detection"
# A baseline without lung pixels fails if the complete interval of its macro AUROC is above this limit.
BASELINE_AUROC_LIMIT = 0.60
NOTABLE_V = 0.5  # Cramér's V of an attribute and the label that is reported
# Patients per class. A test split of 15 % then has 3 of them.
MIN_PATIENTS = 20
_RARE = 0.02  # share of the images; rarer values of an attribute are pooled

# Title, level and remedy, by the column in which the images of one patient differ.
_PATIENTS = {
    "split": ("patients in two splits", "fail", "Give each patient one split, or remove the split column"),
    "label": ("patients in two classes", "warn", "Check the labels; a disease can begin or end between two images"),
}
# The same by the column in which copies of one image differ, most severe first.
_COPIES = {
    "label": ("copies of one image in two classes", "fail", "One of the labels is wrong: fix or remove them"),
    "split": ("copies of one image in two splits", "fail", "Keep one of each, or give them one patient_id and split"),
    "patient_id": ("copies of one image under two patients", "warn", "Keep one of each, or give them one patient_id"),
    "": ("copies of one image within a patient", "note", "Keep one of each, unless they are two exposures"),
}

# How the files of one patient are named: a day, a view or a letter at the end, or a number at the beginning.
_DAY = re.compile(r"[-_ ]*\(?day[-_ ]?\d+\)?.*$")
_VIEW = re.compile(r"[-_ ](pa|ap|l|lat|lateral|frontal|supine|erect)$")
_LETTER = re.compile(r"(?<=[a-z_]{2}\d)[a-h]$|(?<=[a-z_]{2}\d\d)[a-h]$|[-_ ][a-h]$")  # fig1a, but not f73f3c
_NUMBERED = re.compile(r"^((?:patient|pat|person|subject|sub|case|pid|p)[-_ ]?\d+)[-_ ].+$|^(\d{5,})[-_]\d{1,3}$")


class AuditedData(NamedTuple):
    """The images that an audit examines: the readable ones of the classes of a task.

    Attributes:
        name: Name of the data set.
        task: Its classes.
        table: Table of images as returned by `read_manifest`; its index is the row in `images`.
        images: Canvases of the image store, uint8 (M, S, S).
        key: Digest of the content of `images`.
        cache: Folder of the cache.
        unreadable: Path, line and reason of each unreadable file.
        splits: Where the splits in `table` come from, as text.
        notes: What else a reader must know.
    """

    name: str
    task: Task
    table: pd.DataFrame
    images: NDArray[np.uint8]
    key: str
    cache: Path
    unreadable: pd.DataFrame
    splits: str = ""
    notes: Sequence[str] = ()


class Attribute(NamedTuple):
    """How strongly one property of the images is associated with their label.

    Attributes:
        name: Name of the property.
        v: Cramér's V without bias correction: 0 if independent, 1 if one determines the other, nan if fewer than two
            values are frequent enough.
        commonest: The most frequent value of each class with its share, as text.
    """

    name: str
    v: float
    commonest: dict[str, str]


@dataclass(frozen=True)
class Finding:
    """One result of the audit.

    Attributes:
        level: "fail" (scores are misleading), "warn" (they may be) or "note".
        title: What was found.
        detail: How many images or patients are affected, as a sentence.
        examples: All cases, one line each.
        remedy: What to do.
        consequence: What scores on this data set are if the level is "fail", as the end of a sentence.
    """

    level: str
    title: str
    detail: str
    examples: Sequence[str] = ()
    remedy: str = ""
    consequence: str = "not reliable"


class AuditOptions(NamedTuple):
    """Options of an audit.

    Attributes:
        baselines: Whether shortcut baselines are computed, which takes most of the time.
        baseline_folds: Number of folds of their cross-validation by patient, at least 2.
        seed: Random seed of these folds.
    """

    baselines: bool = True
    baseline_folds: int = 5
    seed: int = 0

    def check(self) -> None:
        """Raise InputError if an option is out of range."""
        if self.baseline_folds < 2 or self.seed < 0:
            raise InputError(
                f"baseline_folds={self.baseline_folds} seed={self.seed}: give at least 2 folds and a seed of at least 0"
            )


class Audit(NamedTuple):
    """Everything that an audit found.

    Attributes:
        data: The audited data set.
        findings: Its findings, in any order.
        pairs: Pairs of copies.
        attributes: How strongly each property of the images is associated with the label.
        scores: Scores of each shortcut baseline by flat name; empty if no baseline could be computed.
        baseline_notes: For each baseline what it saw, or why it was left out.
        sources: For each class how well its sources can be told apart.
    """

    data: AuditedData
    findings: list[Finding]
    pairs: pd.DataFrame
    attributes: list[Attribute]
    scores: Mapping[str, Mapping[str, Interval]]
    baseline_notes: Mapping[str, str]
    sources: Mapping[str, Sequence[SourceScore]]


def audit_data(data: AuditedData, options: AuditOptions) -> Audit:
    """Audit a data set; shortcut baselines are left out, with a finding, if there are too few patients for folds."""
    pairs, table = find_copies(data), data.table
    attributes = attribute_associations(table, data.cache)
    findings = data_findings(data, pairs) + attribute_findings(attributes)
    scores, notes, sources = {}, {}, {}
    if options.baselines:
        log.info("computing the shortcut baselines")
        folds, seed = options.baseline_folds, options.seed
        try:
            tables = cross_validated_baselines(table, data.task, data.cache, folds=folds, seed=seed)
            scores = {name: score_intervals(predicted, data.task) for name, predicted in tables.items()}
            notes, sources = baseline_notes(table, data.cache), source_within_class(table, data.cache)
        except InputError as error:
            findings.append(baselines_unavailable(str(error)))
    return Audit(data, findings + baseline_findings(scores), pairs, attributes, scores, notes, sources)


def audit_before_training(data: Radiographs, mode: str | bool) -> list[str]:
    """Search the data of a run for what makes its scores misleading, without shortcut baselines.

    Args:
        data: The images of the run, still on the CPU.
        mode: "off" (or False, because YAML reads off as False), "warn" or "fail".

    Returns:
        A note for run.json per finding that fails.

    Raises:
        InputError: A finding fails and the mode is "fail", or the mode is unknown.
    """
    mode = "off" if mode is False else mode
    if mode not in MODES:
        raise InputError(f"audit={mode}: must be {listed(MODES)}")
    if mode == "off":
        return []
    # asanyarray keeps the memory map of the store.
    images, key, bad = np.asanyarray(data.images), data.store_digest, data.quarantined
    audited = AuditedData(str(data.name), data.task, data.table, images, key, data.cache, bad)
    # The search for copies is cached, so a sweep pays for it once.
    fails = [finding for finding in data_findings(audited, find_copies(audited)) if finding.level == "fail"]
    notes = [f"audit: {finding.title}. {finding.detail}" for finding in fails]
    if fails and mode == "fail":
        remedies = listed([finding.remedy for finding in fails])
        raise InputError(f"{' '.join(notes)} {remedies}. To train anyway, set audit=warn: all reports then show this.")
    for note in notes:
        log.warning(note)
    return notes


def load_audited_data(task: Task, section: dict[str, Any]) -> AuditedData:
    """Read and decode the images of a data set for an audit; unreadable files are listed.

    Splits or folds of the data set are kept. Otherwise images are split as for training, or have the split "" if there
    are too few patients. A task with pneumonia becomes the binary task if no image shows pneumonia.

    Args:
        task: The classes; images of other classes are left out.
        section: The configuration section `data`.

    Raises:
        InputError: The manifest is faulty, or no image is left.
    """
    settings = DataSettings.from_settings(section)
    table, splits = _with_splits(settings.read_table(), settings)
    size, cache = settings.size, settings.cache_folder
    # An audit lists unreadable files, where training would stop.
    store, table, bad = decode_images(table, size=size, canvas=size, cache=cache, on_bad_image="quarantine")
    # The default task has pneumonia, which a data set of covid and normal images lacks.
    notes, present = [], set(table["label"])
    if task.name != "binary" and present and present <= set(TASKS["binary"].classes):
        notes.append(f"There is no image of pneumonia: the task is binary instead of {task.name}.")
        task = TASKS["binary"]
    known = table["label"].isin(task.classes)
    if not known.all():
        notes.append(f"{int((~known).sum())} images of classes outside the task {task.name} were left out.")
    if not known.any():
        raise InputError(f"data: no image of {', '.join(task.classes)} is readable. Add images, or change task=.")
    return AuditedData(settings.name, task, table[known], store.images, store.digest, cache, bad, splits, notes)


def _with_splits(table: pd.DataFrame, settings: SplitSettings) -> tuple[pd.DataFrame, str]:
    # Each fold counts as a split, so that patients and copies in two folds are found.
    if settings.folds is not None and (table["fold"] != "").all():
        return table.assign(split="fold " + table["fold"]), "folds of the data set"
    if settings.folds is None and (table["split"] != "").any():
        return table, "of the data set"
    try:
        return assign_splits(table, settings), f"assigned by {settings.group} with data.seed={settings.seed}"
    except InputError as error:
        log.info("images are not split: %s", error)
        return table.assign(split=""), "none, because there are too few patients"


def find_copies(data: AuditedData) -> pd.DataFrame:
    """Return pairs of images that are copies of each other, as `duplicates.find_pairs` does."""
    return find_pairs(data.images, data.table["sha256"], data.cache, data.key)


def data_findings(data: AuditedData, pairs: pd.DataFrame) -> list[Finding]:
    """Check sources, patients, copies and files, but no shortcut baselines.

    Args:
        data: The images.
        pairs: Copies, from `find_copies`.
    """
    found = [
        *source_findings(data.table),
        *patient_findings(data.table),
        *series_findings(data.table),
        *copy_findings(data.table, pairs),
    ]
    if content_side(data.images, data.table.index.to_numpy()) < SIDE:
        detail = "The stored images are too small to tell changed copies from other patients. Exact copies were found."
        remedy = "Run the audit with data.size=256"
        found.append(Finding("note", "changed copies were not searched for", detail, remedy=remedy))
    if not data.unreadable.empty:
        rows = zip(data.unreadable["path"], data.unreadable["line"], data.unreadable["reason"], strict=True)
        cases = [f"{path} (line {line}): {reason}" if line else f"{path}: {reason}" for path, line, reason in rows]
        detail = f"{len(cases)} of {len(cases) + len(data.table)}. The audit is about the other files."
        remedy = "Fix or remove them, or train without them (data.on_bad_image=quarantine)"
        found.append(Finding("warn", "unreadable files", detail, cases, remedy))
    return found


def source_findings(table: pd.DataFrame) -> list[Finding]:
    """Check whether the source predicts the label."""
    named = table[table["source"] != ""]
    if named.empty:
        detail = "Classes may come from different hospitals, which a network can see. This cannot be checked."
        return [Finding("warn", "sources are not named", detail, remedy="Fill in the manifest's source column")]
    v, labels = source_association(table), named.groupby("source")["label"].unique()
    # If all images have one label, a source with one label means nothing.
    pure = labels[labels.map(len) == 1] if table["label"].nunique() > 1 else labels.head(0)
    detail = f"{len(labels)} sources, {len(pure)} of them with a single class."
    cases = [f"{source}: only {label[0]}" for source, label in pure.items()]
    if v >= CONFOUNDED:
        remedy = "Add sources that have every class, and test on a source that was not used for training"
        return [Finding("fail", f"source predicts label, Cramér's V {v:.2f}", detail, cases, remedy, NO_EVIDENCE)]
    if v >= NOTABLE_V or cases:
        title = f"source is associated with the label, Cramér's V {v:.2f}"
        return [Finding("warn", title, detail, cases, "Compare the scores per source")]
    return []


def patient_findings(table: pd.DataFrame) -> list[Finding]:
    """Check for patients in several splits or classes, images without patient_id and classes with few patients."""
    found = []
    for column, (title, level, remedy) in _PATIENTS.items():
        several = patients_in_several(table, column)
        if several:
            detail = f"{len(several)} of {table['patient_id'].nunique()} patients."
            cases = [f"{patient} ({values})" for patient, values in several.items()]
            found.append(Finding(level, title, detail, cases, remedy))
    unknown = table.loc[_lacks_patient_id(table), "path"]
    if len(unknown):
        detail = (
            f"{len(unknown)} of {len(table)}. Each counts as a separate patient, so a patient can be in two splits "
            "without being noticed, and intervals are too narrow."
        )
        found.append(Finding("warn", "images without patient_id", detail, sorted(unknown), "Fill in patient_id"))
    patients = table.groupby("label")["patient_id"].nunique()
    few = [f"{label}: {n} patients" for label, n in patients.items() if n < MIN_PATIENTS]
    if few:
        detail = f"{listed(few)}. Intervals will be wide."
        remedy = "Add patients, or use cross-validation (data.folds=5)"
        found.append(Finding("warn", "classes with few patients", detail, few, remedy))
    return found


def patients_in_several(table: pd.DataFrame, column: str) -> dict[str, str]:
    """Return the patients whose images have two or more values of `column`, with these values: "test+train"."""
    values = table[table[column] != ""].groupby("patient_id")[column].unique()
    return {str(patient): "+".join(sorted(found)) for patient, found in values.items() if len(found) > 1}


def _lacks_patient_id(table: pd.DataFrame) -> "pd.Series[bool]":
    return table["patient_id"].str.startswith("image:")


def series_findings(table: pd.DataFrame) -> list[Finding]:
    """Check for images that show one patient according to their file names, but not according to patient_id."""
    cases: dict[str, list[str]] = {"fail": [], "warn": []}
    for series in series_by_file_name(table):
        # Given ids may be right: the panels a and b of a figure can show two patients.
        leaks = series["split"].nunique() > 1 and _lacks_patient_id(series).any()
        images = zip(series["path"], series["split"], strict=True)
        names = listed([f"{path} ({split})" if split else path for path, split in images])
        cases["fail" if leaks else "warn"].append(names)
    remedy = "Give the images of one patient the same patient_id"
    return [
        Finding(level, f"file names suggest one patient {where}", f"{len(cases[level])} series.", cases[level], remedy)
        for level, where in (("fail", "in two splits, without patient_id"), ("warn", "under two patient_ids"))
        if cases[level]
    ]


def series_by_file_name(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Return a table per patient according to `patient_from_file_name` who has several patient_ids."""
    # Only within a class: fig1a of one class and fig1b of another one need not belong together.
    names = table["path"].map(patient_from_file_name).rename("patient")
    series = table[names != ""].groupby([names[names != ""], "label"])
    return [part for _, part in series if part["patient_id"].nunique() > 1]


def patient_from_file_name(path: str) -> str:
    """Return the part of a file name that identifies the patient, or "" if no part does.

    "case-7" for case-7-day0.png, case-7-a.png and case-7-PA.png. In 00002658_001 (ChestX-ray14) and p12_3 it is the
    first number. A number alone (img_001, Normal-1390) counts images, not patients.
    """
    name = PurePosixPath(path).stem.lower()
    numbered = _NUMBERED.match(name)
    if numbered:
        return numbered[1] or numbered[2]
    for rule in (_DAY, _VIEW, _LETTER):
        stem = rule.sub("", name)
        if stem and stem != name:
            # A view can come before the day or the letter, as in case-7-PA-day0.
            return _VIEW.sub("", stem)
    return ""


def copy_findings(table: pd.DataFrame, pairs: pd.DataFrame) -> list[Finding]:
    """Check for groups of copies; they are reported by the most severe difference between their images."""
    cases: dict[str, list[str]] = {column: [] for column in _COPIES}
    images = dict.fromkeys(cases, 0)
    for rows in duplicate_groups(pairs, table.index.to_numpy()):
        column = _difference(table.loc[rows])
        images[column] += len(rows)
        cases[column] += [_pair_line(table, pair) for pair in pairs[pairs["first"].isin(rows)].to_dict("records")]
    found = []
    for column, (title, level, remedy) in _COPIES.items():
        if cases[column]:
            detail = f"{images[column]} images in {_plural(len(cases[column]), 'pair')}."
            found.append(Finding(level, title, detail, cases[column], remedy))
    return found


def sort_pairs(table: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Return `pairs`, most severe first, with a column `between`.

    It contains what the two images differ in: "label", "split", "patient_id" or "".
    """
    between = [_difference(table.loc[list(rows)]) for rows in zip(pairs["first"], pairs["second"], strict=True)]
    severity = [list(_COPIES).index(column) for column in between]
    return pairs.assign(between=between).iloc[np.lexsort((-pairs["likeness"].to_numpy(), np.array(severity)))]


def _difference(images: pd.DataFrame) -> str:
    return next((column for column in _COPIES if column and images[column].nunique() > 1), "")


def _pair_line(table: pd.DataFrame, pair: dict[Any, Any]) -> str:
    images = [table.loc[pair[name]] for name in ("first", "second")]
    names = [f"{image['path']} ({', '.join(filter(None, (image['label'], image['split'])))})" for image in images]
    how = {"bytes": "same bytes", "pixels": "same pixels"}.get(pair["kind"], f"{pair['kind']} {pair['likeness']:.2f}")
    return f"{' = '.join(names)}: {how}"


def count_images(table: pd.DataFrame) -> pd.DataFrame:
    """Return the numbers of images and patients per source and label; images without source are "unknown"."""
    grouped = table.assign(source=table["source"].replace("", "unknown")).groupby(["source", "label"])
    return grouped.agg(images=("path", "size"), patients=("patient_id", "nunique")).reset_index()


def attribute_associations(table: pd.DataFrame, cache: Path) -> list[Attribute]:
    """Return how strongly the source, file properties and manifest columns are associated with the label.

    Size, mode and format are those of the published files if the manifest has `orig_` columns. Numbers are divided into
    fifths; values of less than 2 % of the images are pooled. The strongest association comes first.
    """
    found = [Attribute("source", source_association(table), _commonest(table["source"], table["label"]))]
    files, acquisition = header(table, cache).columns, metadata(table, cache).columns
    columns = {} if acquisition is None else {str(name): acquisition[name] for name in acquisition}
    if files is not None:
        columns["size"] = files["width"].astype(str) + " × " + files["height"].astype(str)
        columns |= {"mode": files["mode"], "format": files["format"]}
    for name, column in columns.items():
        numeric = pd.api.types.is_numeric_dtype(column)
        values = _binned(column) if numeric else _pooled(column)
        counts = pd.crosstab(values, table["label"]).to_numpy()
        v = float(association(counts, method="cramer")) if min(counts.shape) > 1 else float("nan")
        found.append(Attribute(name, v, _commonest(values if numeric else column, table["label"])))
    # nan is not equal to itself, and comes last.
    return sorted(found, key=lambda one: -one.v if one.v == one.v else 1)


def _binned(column: "pd.Series[Any]") -> "pd.Series[str]":
    column = pd.qcut(column, 5, duplicates="drop") if column.nunique() > 5 else column
    return column.astype(str).replace("nan", "unknown")


def _pooled(column: "pd.Series[Any]") -> "pd.Series[str]":
    text = column.astype(str).replace("", "unknown")
    return text.where(text.map(text.value_counts(normalize=True)) >= _RARE, "other")


def _commonest(values: "pd.Series[Any]", labels: "pd.Series[str]") -> dict[str, str]:
    found = {}
    for label, part in values.astype(str).replace("", "unknown").groupby(labels):
        shares = part.value_counts(normalize=True)
        more = f", {len(shares) - 1} more" if len(shares) > 1 else ""
        found[str(label)] = f"{shares.index[0]} ({shares.iloc[0]:.0%}){more}"
    return found


def attribute_findings(attributes: Sequence[Attribute]) -> list[Finding]:
    """Check for attributes other than the source that are associated with the label."""
    strong = [one for one in attributes if one.name != "source" and one.v >= NOTABLE_V]
    if not strong:
        return []
    detail = f"Cramér's V: {', '.join(f'{one.name} {one.v:.2f}' for one in strong)}."
    cases = [f"{one.name}: " + "; ".join(f"{label} {most}" for label, most in one.commonest.items()) for one in strong]
    remedy = "Use images that were acquired in the same way, and compare scores with those of the shortcut baselines"
    return [Finding("warn", "image acquisition is associated with the label", detail, cases, remedy)]


def baseline_findings(scores: Mapping[str, Mapping[str, Interval]]) -> list[Finding]:
    """Check for baselines without lung pixels whose macro AUROC is above 0.60 with its complete interval.

    Args:
        scores: Scores of each baseline, by their flat names.
    """
    remedy = "A network can use it too: remove it from the images, or test on a source that was not used for training"
    return [
        Finding(
            "fail",
            f"the {name} baseline predicts the class",
            f"Macro AUROC {auroc.value:.2f} ({auroc.low:.2f} to {auroc.high:.2f}) from {BASELINES[name].sees}.",
            remedy=remedy,
            consequence=NO_EVIDENCE,
        )
        for name, auroc in ((name, score["macro_auroc"]) for name, score in scores.items())
        if not BASELINES[name].sees_lungs and auroc.low > BASELINE_AUROC_LIMIT
    ]


def baselines_unavailable(reason: str) -> Finding:
    """Return the finding that shortcut baselines could not be computed."""
    remedy = "Add patients. Until then, judge shortcuts by the associations with the label"
    return Finding("note", "shortcut baselines could not be computed", f"{reason.rstrip('.')}.", remedy=remedy)


def most_severe_first(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings sorted by level, otherwise in their order."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def verdict_line(findings: Sequence[Finding]) -> str:
    """Return the result of the audit in one line."""
    fails = [finding for finding in findings if finding.level == "fail"]
    if not fails:
        return f"No check failed; {_plural(sum(finding.level == 'warn' for finding in findings), 'warning')}"
    # The first one of the most severe ones.
    worst = max(fails, key=lambda finding: finding.consequence == NO_EVIDENCE)
    return f"{_plural(len(fails), 'check')} failed: scores on this data set are {worst.consequence} ({worst.title})"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
