"""Which files a path on the command line stands for, and by what name each goes in a table."""

import glob
import itertools
import os
from pathlib import Path

from covid_cls.data.manifest import NO_IMAGES, files_below, read_files
from covid_cls.errors import InputError


def find_inputs(path: str) -> list[tuple[str, Path]]:
    """(image_id, file) of all that `path` names, in order: a file, a folder, a glob or a manifest.

    | path                                 | image_id                                   | order      |
    |--------------------------------------|--------------------------------------------|------------|
    | a CSV with a column path             | the path that stands there                 | of the CSV |
    | a folder, looked through as a whole  | relative to the folder                     | sorted     |
    | a glob; ** stands for any folders    | relative to the glob's fixed part          | sorted     |
    | any other file                       | its name                                   |            |

    With forward slashes throughout, and unique. Whether a file is an image is for its reader to say; hidden files and
    the litter of file managers are passed over in folders and globs. Bytes that are no UTF-8 are escaped in an
    image_id. InputError, naming where was looked, if there is nothing.
    """
    place = Path(path).expanduser()
    if place.suffix.lower() == ".csv" and place.is_file():
        return read_files(place)
    if place.is_dir():
        found = [(file.relative_to(place), file) for file in files_below(place)]
        where = f"no files in this folder (looked in {place.resolve()})"
    elif os.path.lexists(place):
        return [(_name(Path(place.name)), place)]
    elif glob.has_magic(str(place)):
        found = _matches(place)
        where = f"no file matches (looked in {Path.cwd()}); ** stands for any number of folders"
    else:
        raise InputError(f"input={path}: no such file or folder (looked in {Path.cwd()})")
    if not found:
        raise InputError(f"input={path}: {where}")
    return [(_name(relative), file) for relative, file in found]


def input_name(path: str) -> str:
    """What results call these inputs: the name of the file or folder, without suffix; of a glob its fixed part's.

    A manifest.csv goes by its folder's name.
    """
    place = Path(path).expanduser()
    if not os.path.lexists(place):
        place = _fixed(place)
    elif place.name.lower() == "manifest.csv":
        place = place.parent
    place = place.absolute() if place.name not in ("", ".", "..") else place.resolve()
    return (place.name if place.is_dir() else place.stem) or "images"


def _matches(pattern: Path) -> list[tuple[Path, Path]]:
    """The files that match a glob, relative to its fixed part and as they are, sorted."""
    fixed = _fixed(pattern)
    names = sorted(set(glob.glob(str(pattern), recursive=True)))  # noqa: PTH207 - Path.glob finds hidden files
    files = [Path(name) for name in names if not os.path.isdir(name)]  # noqa: PTH112
    return [(file.relative_to(fixed), file) for file in files if file.name.lower() not in NO_IMAGES]


def _fixed(pattern: Path) -> Path:
    """The folder that a glob starts from: the parts before its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _name(relative: Path) -> str:
    return os.fsencode(relative.as_posix()).decode("utf-8", "backslashreplace")
