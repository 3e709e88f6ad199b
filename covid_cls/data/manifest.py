"""Tables of images: from a manifest (a CSV file) or a folder, and the image paths that a command takes."""

import csv
import glob
import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from covid_cls.data.limits import MAX_BYTES, TOO_MANY_BYTES
from covid_cls.errors import InputError, listed
from covid_cls.tasks import CLASSES, canonical

SPLITS = ("train", "val", "test")

_SPLIT_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {alias: split for split, aliases in _SPLIT_ALIASES.items() for alias in aliases}
_OPTIONAL_COLUMNS = ("patient_id", "source", "split", "fold", "sha256")
# Control characters, and surrogates, which Python uses for bytes of a file name that are not UTF-8.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# Files of file managers, and the index of a DICOM medium. Hidden files are ignored as well.
_IGNORED = {"thumbs.db", "desktop.ini", "dicomdir"}


def read_manifest(path: Path) -> pd.DataFrame:
    """Read a manifest: a CSV file with the columns path and label.

    It may also have patient_id, source, view, split, fold and sha256; further columns are kept as text.

    Args:
        path: The CSV file. Image paths in it are relative to its folder, and must not leave it.

    Returns:
        One row per image, sorted by path, with the columns of the CSV and

        - label: the canonical class name,
        - patient_id: "image:<path>" if it is empty, so that the image counts as a separate patient,
        - source, split, fold, sha256: "" if the CSV has none,
        - file: the absolute path,
        - line: the line in the CSV.

    Raises:
        InputError: The file is not such a CSV, or lines name missing, outside or repeated files, unknown labels or
            unknown splits.
    """
    rows, faults = _read_csv(path, ("path", "label"), "data.path")
    root = path.parent.resolve()
    unknown: Counter[str] = Counter()
    for row in rows:
        label, split = canonical(row["label"]), _SPLIT_OF.get(row["split"].lower(), "")
        if label is None:
            unknown[row["label"]] += 1
            faults.append((row["line"], f"label {row['label']!r} is not a class"))
        if row["split"] and not split:
            faults.append((row["line"], f"split {row['split']!r} is not one of {listed(SPLITS)}"))
        row |= {"label": label, "split": split, "file": str(root / row["path"])}
    hint = f"Unknown labels: {dict(unknown)}; known are {listed(CLASSES)}. " if unknown else ""
    _check_faults(path, faults, hint)
    return _table(rows)


def read_folder(root: Path) -> pd.DataFrame:
    """Read the table of a folder of images, `root/<split>/<class>/...` or `root/<class>/...`.

    Splits are named train, val or validation, and test. Classes may have any of their aliases, in any case.

    Returns:
        The same columns as `read_manifest`; line is 0.

    Raises:
        InputError: The name of a folder is neither a split nor a class, a file cannot be an image, or the folder is
            empty.
    """
    if not root.is_dir():
        raise InputError(f"data.root={root}: no such folder (looked in {Path.cwd()}); correct the path")
    base = root.resolve()
    names = _folders(base)
    splits = {name: _SPLIT_OF[name.lower()] for name in names if name.lower() in _SPLIT_OF}
    unmatched = [name for name in names if name not in splits] if splits else []
    rows = []
    for branch, split in [(base / name, split) for name, split in splits.items()] or [(base, "")]:
        for folder in (branch / name for name in _folders(branch)):
            label = canonical(folder.name)
            if label is None:
                unmatched.append(folder.relative_to(base).as_posix())
                continue
            for file in files_below(folder):
                path = file.relative_to(base).as_posix()
                rows.append({"path": path, "label": label, "split": split, "file": str(file), "line": 0})
    faults = [fault for row in rows if (fault := file_fault(base, str(row["path"]), inside=False))]
    if faults:
        raise InputError(f"{root}: {listed(faults)}. Fix or remove these files")
    if unmatched:
        raise InputError(
            f"{root}: folders {listed(unmatched)} are neither a split (train, val or validation, test) nor a class "
            f"({listed(CLASSES)} or an alias such as COVID-19, No_findings, Viral Pneumonia). Rename or move them"
        )
    if not rows:
        raise InputError(
            f"{root}: no images under {listed(names) or 'an empty folder'}; expected <split>/<class>/<image>"
        )
    return _table(rows)


def find_inputs(path: str) -> list[tuple[str, Path]]:
    """Find the images that the input of a command names.

    | path                                    | image_id                          | order      |
    |-----------------------------------------|-----------------------------------|------------|
    | a CSV with a column path                | the path in the CSV               | of the CSV |
    | a folder, searched with its subfolders  | relative to the folder            | sorted     |
    | a glob; ** matches any folders          | relative to the glob's fixed part | sorted     |
    | any other file                          | its name                          |            |

    Hidden files and those of file managers are ignored in folders and globs. Files are not opened: whether one is an
    image is decided by its reader.

    Returns:
        (image_id, file) of each image. An image_id is unique and has forward slashes; bytes that are not UTF-8 are
        escaped in it.

    Raises:
        InputError: Nothing is found, or the CSV has a fault that `read_manifest` reports.
    """
    place = Path(path).expanduser()
    if place.suffix.lower() == ".csv" and place.is_file():
        rows, faults = _read_csv(place, ("path",), "input")
        _check_faults(place, faults)
        return [(row["path"], place.parent.resolve() / row["path"]) for row in rows]
    if place.is_dir():
        files, base = files_below(place), place
        where = f"no files in this folder (looked in {place.resolve()})"
    elif os.path.lexists(place):
        files, base, where = [place], place.parent, ""
    elif glob.has_magic(str(place)):
        # Path.glob would also find hidden files.
        found = [Path(name) for name in sorted(set(glob.glob(str(place), recursive=True)))]  # noqa: PTH207
        files, base = [file for file in found if not file.is_dir() and file.name.lower() not in _IGNORED], _fixed(place)
        where = f"no file matches (looked in {Path.cwd()}); ** matches any number of folders"
    else:
        raise InputError(f"input={path}: no such file or folder (looked in {Path.cwd()}); correct the path")
    if not files:
        raise InputError(f"input={path}: {where}")
    return [(_as_text(file.relative_to(base).as_posix()), file) for file in files]


def input_name(path: str) -> str:
    """Return the name that results have for the input of a command.

    It is the name of the file or folder without suffix, of the fixed part of a glob, or of the folder of a
    manifest.csv.
    """
    place = Path(path).expanduser()
    if not os.path.lexists(place):
        place = _fixed(place)
    elif place.name.lower() == "manifest.csv":
        place = place.parent
    place = place.absolute() if place.name not in ("", ".", "..") else place.resolve()
    return (place.name if place.is_dir() else place.stem) or "images"


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted, except hidden files and folders and files of file managers.

    No file is opened. A link to a folder is not followed but returned, so that its reader reports it.

    Raises:
        InputError: A folder is not readable.
    """

    def report(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; make this folder readable or give another") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=report):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, n) for n in names if not n.startswith(".") and n.lower() not in _IGNORED]
    return sorted(found, key=Path.as_posix)


def file_fault(root: Path, name: str, *, inside: bool = True) -> str | None:
    """Return why a file must not be opened, or None if it may.

    Args:
        root: A resolved folder.
        name: The path of the file relative to `root`.
        inside: Whether the file, with links followed, must be inside `root`.
    """
    if not name or "\0" in name:
        return "path is empty or contains a NUL"
    if _CONTROL.search(name):
        return f"{_as_text(name)!r} contains a line break, control character or invalid UTF-8; rename the file"
    try:
        # Links are followed before the check, so that none leads out of the folder.
        real = os.path.realpath(root / name)
        if inside and (os.path.commonpath([real, root]) != str(root) or Path(name).is_absolute()):
            return f"{name} leaves the manifest's folder; give a path below {root}"
        status = Path(real).stat()
    except (OSError, ValueError):
        return f"{name} is missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is not a regular file"
    # Checked here because the file is hashed before a reader rejects it.
    return f"{name} is {TOO_MANY_BYTES}" if status.st_size > MAX_BYTES else None


def _read_csv(path: Path, needed: Sequence[str], setting: str) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Read a CSV of image paths.

    Returns:
        Its rows, with their `line` and at least an empty `split`; and what is wrong with their paths, with the lines.

    Raises:
        InputError: The file is not a CSV with the `needed` columns.
    """
    if not path.is_file():
        raise InputError(f"{setting}={path}: no such file (looked in {Path.cwd()}); give a CSV with {','.join(needed)}")
    rows: list[dict[str, Any]] = []
    try:
        # Spreadsheets write a byte order mark, which utf-8-sig removes. Without strict an unclosed quote is accepted.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            twice = sorted(name for name, times in Counter(columns).items() if name and times > 1)
            if twice:
                raise InputError(f"{path}:1: column {listed(twice)} is there twice; keep one")
            missing = [name for name in needed if name not in columns]
            if missing:
                raise InputError(f"{path}:1: column {listed(missing)} is missing; found {listed(columns) or 'nothing'}")
            for row in reader:
                if None in row or None in row.values():
                    place = f"{path}:{reader.line_num}"
                    raise InputError(f"{place}: expected {len(columns)} fields, as in the header; complete the line")
                # Without stripping, "p1 " would be another patient than "p1".
                row |= {name: row[name].strip() for name in _OPTIONAL_COLUMNS if name in row}
                rows.append({"split": "", **row, "line": reader.line_num})
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a UTF-8 CSV file ({error}); save it as comma-separated text") from error
    if not rows:
        raise InputError(f"{path}: has a header and no images; list at least one per class and split")
    root = path.parent.resolve()
    faults = [(row["line"], fault) for row in rows if (fault := file_fault(root, row["path"]))]
    # A file that is listed twice could be in training and test. `normpath` makes ./a.png and a.png equal.
    first: dict[str, int] = {}
    for row in rows:
        line = first.setdefault(os.path.normpath(row["path"]), row["line"])
        if line != row["line"]:
            faults.append((row["line"], f"{row['path']} is already in line {line}"))
    return rows, faults


def _check_faults(path: Path, faults: list[tuple[int, str]], hint: str = "") -> None:
    if faults:
        shown = listed([f"line {line}: {fault}" for line, fault in sorted(faults, key=lambda fault: fault[0])], 5)
        raise InputError(f"{path}: {len(faults)} faults. {shown}. {hint}Fix or remove these lines")


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows).sort_values("path", kind="stable", ignore_index=True)
    table = table.assign(**{column: "" for column in _OPTIONAL_COLUMNS if column not in table.columns})
    table["patient_id"] = table["patient_id"].where(table["patient_id"] != "", "image:" + table["path"])
    return table


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _fixed(pattern: Path) -> Path:
    """Return the folder in which a glob starts: the parts before its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _as_text(name: str) -> str:
    """Escape the bytes of a file name that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
