"""Which images there are, what they show and whose they are: manifests and folders, checked before time is spent."""

import csv
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from covid_cls.data.limits import MOST_BYTES, TOO_MANY_BYTES
from covid_cls.errors import InputError, listed
from covid_cls.labels import CLASSES, canonical

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_OURS = ("patient_id", "source", "split", "fold", "sha256")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # the last: bytes that are no UTF-8
# Left behind by file managers, and the index of a DICOM medium; hidden files are passed over as well.
NO_IMAGES = {"thumbs.db", "desktop.ini", "dicomdir"}


def read_manifest(path: Path) -> pd.DataFrame:
    """One row per image, sorted by path: path, label, patient_id, source, split, fold, sha256, file, line and the rest.

    `path` names a CSV with `path,label` and optional `patient_id,source,view,split,fold,sha256` and more (kept as
    text). Image paths are relative to the CSV. label: the class's canonical name. file: absolute. line: in the CSV.
    split, fold, sha256: "" where the CSV has none. An empty patient_id becomes a patient of its own, "image:<path>".
    InputError naming the lines of missing, escaping or repeated files, unknown labels and unknown splits.
    """
    rows = _csv_rows(path, ("path", "label"), "data.path")
    faults: list[str] = []
    root = path.parent.resolve()
    unknown: Counter[str] = Counter()
    seen: dict[str, int] = {}
    for row in rows:
        line = row["line"]
        faults += _row_faults(row, root, seen)
        label = canonical(row["label"])
        if label is None:
            unknown[row["label"]] += 1
            faults.append(f"line {line}: label {row['label']!r} is no class")
        row["label"] = label
        split = _SPLIT_NAMES.get(row["split"].strip().lower(), "")
        if row["split"].strip() and not split:
            faults.append(f"line {line}: split {row['split']!r} is none of {listed(SPLITS)}")
        row["split"] = split
        row["file"] = str(root / row["path"])
    if faults:
        remedy = f" Labels found that name no class: {dict(unknown)}; known are {listed(CLASSES)}." if unknown else ""
        raise InputError(f"{path}: {len(faults)} faults. {listed(faults, 5)}.{remedy} Mend or remove these lines")
    return _table(rows)


def read_files(path: Path) -> list[tuple[str, Path]]:
    """The paths that a CSV lists in its column `path` and their files, in its order; no label is asked for.

    InputError as in `read_manifest`, calling the CSV input=.
    """
    rows = _csv_rows(path, ("path",), "input")
    root, seen = path.parent.resolve(), dict[str, int]()
    faults = [fault for row in rows for fault in _row_faults(row, root, seen)]
    if faults:
        raise InputError(f"{path}: {len(faults)} faults. {listed(faults, 5)}. Mend or remove these lines")
    return [(row["path"], root / row["path"]) for row in rows]


def read_folder(root: Path) -> pd.DataFrame:
    """The same table as `read_manifest`, from `root/<split>/<class>/…` or `root/<class>/…`; line is 0.

    Splits are named train, val or validation, and test; classes go by their aliases; any case. InputError listing
    what was found where a folder's name means neither.
    """
    if not root.is_dir():
        raise InputError(f"data.root={root}: no such folder (looked in {Path.cwd()})")
    base = root.resolve()
    names = _folders(base)
    splits = {name: _SPLIT_NAMES[name.lower()] for name in names if name.lower() in _SPLIT_NAMES}
    branches = [(base / name, split) for name, split in splits.items()] or [(base, "")]
    unmatched = [] if not splits else [name for name in names if name not in splits]
    rows = []
    for branch, split in branches:
        for name in _folders(branch):
            label = canonical(name)
            if label is None:
                unmatched.append((branch / name).relative_to(base).as_posix())
                continue
            for file in files_below(branch / name):
                relative = file.relative_to(base).as_posix()
                rows.append({"path": relative, "label": label, "split": split, "file": str(file), "line": 0})
    strange = [fault for row in rows if (fault := _folder_fault(base, str(row["path"])))]
    if strange:
        raise InputError(f"{root}: {listed(strange)}; mend or remove it")
    if unmatched:
        raise InputError(
            f"{root}: folders {listed(unmatched)} are neither a split (train, val or validation, test) nor a class "
            f"({listed(CLASSES)} or an alias such as COVID-19, No_findings, Viral Pneumonia); rename or move them"
        )
    if not rows:
        raise InputError(
            f"{root}: no images under {listed(names) or 'an empty folder'}; expected <split>/<class>/<image>"
        )
    return _table(rows)


def files_below(folder: Path) -> list[Path]:
    """All files below `folder`, sorted, but for hidden ones, those in hidden folders and the litter of file managers.

    No file is opened or looked at. A link to a folder is not followed, and listed: it is for the reader to refuse.
    InputError naming a folder that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; make this folder readable or give another") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, n) for n in names if not n.startswith(".") and n.lower() not in NO_IMAGES]
    return sorted(found, key=Path.as_posix)


def _csv_rows(path: Path, needed: Sequence[str], setting: str) -> list[dict[str, Any]]:
    """The rows of the CSV that `setting` names, each with its line. InputError where it is none or lacks a column."""
    if not path.is_file():
        raise InputError(f"{setting}={path}: no such file (looked in {Path.cwd()}); give a CSV with {','.join(needed)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            twice = sorted(name for name, times in Counter(columns).items() if name and times > 1)
            if twice:
                raise InputError(f"{path}:1: column {listed(twice)} stands there twice; keep one")
            missing = [name for name in needed if name not in columns]
            if missing:
                raise InputError(f"{path}:1: column {listed(missing)} is missing; found {listed(columns) or 'nothing'}")
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(f"{path}:{reader.line_num}: expected {len(columns)} fields, as in the header")
                row |= {name: row[name].strip() for name in _OURS if name in row}  # "p1 " is patient p1
                rows.append({"split": "", **row, "line": reader.line_num})
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a UTF-8 CSV file ({error}); save it as comma-separated text") from error
    if not rows:
        raise InputError(f"{path}: has a header and no images; list at least one per class and split")
    return rows


def _row_faults(row: dict[str, Any], root: Path, seen: dict[str, int]) -> list[str]:
    """What is wrong with the path of a row; seen: paths to the lines they first stand in, kept up to date."""
    line, name = row["line"], row["path"]
    faults = []
    fault = file_fault(root, name)
    if fault:
        faults.append(f"line {line}: {fault}")
    plain = os.path.normpath(name)  # ./a.png is a.png
    if plain in seen:
        faults.append(f"line {line}: {name} stands in line {seen[plain]} already")
    seen.setdefault(plain, line)
    return faults


def file_fault(root: Path, name: str) -> str | None:
    """Why `name` may not be opened, or None; `root` is resolved."""
    if not name or "\0" in name:
        return "path is empty or holds a NUL"
    if _CONTROL.search(name):
        return f"{name!r} holds a line break or another control character; rename the file"
    try:
        real = os.path.realpath(root / name)
        if os.path.commonpath([real, root]) != str(root) or Path(name).is_absolute():
            return f"{name} leaves the manifest's folder; give a path below {root}"
        status = Path(real).stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is no regular file"
        if status.st_size > MOST_BYTES:  # it would be hashed before a reader refuses it
            return f"{name} is {TOO_MANY_BYTES}"
    except (OSError, ValueError):
        return f"{name} is missing"
    return None


def _folder_fault(base: Path, name: str) -> str | None:
    """Why the file `name` of a folder may not be opened, or None; links out of the folder are followed."""
    if _CONTROL.search(name):
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        return f"{shown!r} is not UTF-8 or holds a line break or another control character"
    path = base / name
    if not path.is_file():
        return f"{name}: no regular file, or a link to nowhere"
    return f"{name} is {TOO_MANY_BYTES}" if path.stat().st_size > MOST_BYTES else None


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows).sort_values("path", kind="stable", ignore_index=True)
    for column in _OURS:
        if column not in table.columns:
            table[column] = ""
    alone = table["patient_id"] == ""
    table.loc[alone, "patient_id"] = "image:" + table.loc[alone, "path"]
    return table
