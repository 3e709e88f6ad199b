"""Shortcut baselines: classifiers that see only a part of the image or of its metadata.

A baseline without lung pixels that predicts the label shows that the data set leaks the label.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import PIL
import sklearn
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from covid_cls.data.datamodule import Radiographs
from covid_cls.data.limits import BadImage
from covid_cls.data.readers import READERS_VERSION, read_image
from covid_cls.data.splits import SplitSettings, assign_splits
from covid_cls.data.store import hash_files
from covid_cls.errors import InputError
from covid_cls.evaluation.delong import delong_interval
from covid_cls.evaluation.intervals import Interval
from covid_cls.io import (
    ID_COLUMNS,
    atomic_file,
    digest,
    prediction_columns,
    remove_temporary_files,
    write_json,
    write_predictions,
)
from covid_cls.tasks import Task

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Raise them when the baselines' predictions for the same images change, or the thumbnails of the same files.
BASELINES_VERSION = 1
THUMBNAILS_VERSION = 1
SIDE = 64  # pixels, of the thumbnails for the frame and the histogram
# A tenth of the image's side shows skin, shoulders and labels, but hardly any lung.
FRAME = 6  # pixels
BINS = 32
COARSE = 16  # pixels
TREES = 300
MAX_ROWS_PER_TREE = 10_000
# With 1 image per leaf, most probabilities would be 0 or 1.
MIN_LEAF = 2
# With fewer patients, the AUROC of a source within a class is too uncertain to be reported.
MIN_PATIENTS = 10
_MIN_PROBABILITY = 1e-6  # instead of 0, which has no logarithm

_HEADER = ("width", "height", "mode", "format")
# Columns that describe how an image was acquired. Patients, sources, findings and files are excluded on purpose.
_ACQUISITION = (
    *("view", "view_position", "viewposition", "projection", "position", "age", "patient_age", "sex", "gender"),
    *("patient_sex", "modality", "manufacturer", "model", "detector", "kvp", "exposure", "body_part", "photometric"),
    *("bits_stored", "pixel_spacing", "pixel_spacing_x", "pixel_spacing_y"),
)
_EMPTY = ("", "nan", "na", "n/a", "none", "unknown")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
# Images between two commits. An interrupted process continues after the last commit.
_ROWS_PER_COMMIT = 256


class Features(NamedTuple):
    """What a baseline sees of a table of images.

    Attributes:
        columns: A row per image, with text or numbers; None where the data set has nothing of this kind.
        note: Which columns or pixels these are, or why the baseline is left out.
    """

    columns: pd.DataFrame | None
    note: str


class Baseline(NamedTuple):
    """A classifier that sees only a part of the image or of its metadata.

    Attributes:
        name: Name of the baseline in tables and files.
        sees: What it sees, as text.
        sees_lungs: Whether that includes lung pixels.
        features: Returns what it sees of a table of images, given the folder of the cache.
    """

    name: str
    sees: str
    sees_lungs: bool
    features: Callable[[pd.DataFrame, Path], Features]


class SourceScore(NamedTuple):
    """How well a baseline tells one source from the other sources of the same class.

    Attributes:
        source: Name of the source.
        images: Number of its images.
        patients: Number of its patients.
        auroc: AUROC of this source against the others, over patients.
    """

    source: str
    images: int
    patients: int
    auroc: Interval


def header(table: pd.DataFrame, cache: Path) -> Features:
    """Return width, height, mode and format of each file; of the published file if the manifest has `orig_` columns."""
    # Converted files no longer show in which formats and sizes the sources were published.
    originals = [f"orig_{name}" for name in _HEADER]
    if set(originals) <= set(table.columns):
        columns = table[originals].set_axis(list(_HEADER), axis=1)
        return Features(_typed(columns), f"columns {', '.join(originals)} of the manifest: the published files")
    return Features(_typed(read_headers(table["file"])), "width, height, mode and format of the available files")


def read_headers(files: "pd.Series[str]") -> pd.DataFrame:
    """Return width and height (pixels), mode and format from the headers of image files; no pixel is decoded.

    The mode is Pillow's, or the photometric interpretation of a DICOM file. A file without a readable header has 0, 0,
    "" and "".
    """
    return pd.DataFrame([_read_header(Path(file)) for file in files], columns=_HEADER, index=files.index)


def metadata(table: pd.DataFrame, cache: Path) -> Features:
    """Return the manifest's acquisition columns that have more than one value."""
    named = [name for name in table.columns if name.lower() in _ACQUISITION]
    used = [name for name in named if table[name].nunique() > 1]
    if not used:
        why = f"{', '.join(named)}: the same in every image" if named else "no column for view, age, sex or similar"
        return Features(None, f"left out: the manifest has {why}")
    # The note counts empty values, because values that are missing in one source only reveal the source.
    empty = {name: int(_is_empty(table[name]).sum()) for name in used}
    seen = [f"{name} (empty in {n} of {len(table)} images)" if n else name for name, n in empty.items()]
    return Features(_typed(table[used]), f"columns {', '.join(seen)} of the manifest")


def frame(table: pd.DataFrame, cache: Path) -> Features:
    """Return the outermost pixels of each thumbnail."""
    rim = np.ones((SIDE, SIDE), dtype=bool)
    rim[FRAME:-FRAME, FRAME:-FRAME] = False
    pixels = thumbnails(table, SIDE, cache)[:, rim]
    return Features(pd.DataFrame(pixels, index=table.index), f"{FRAME}-pixel frame of {SIDE} × {SIDE}")


def histogram(table: pd.DataFrame, cache: Path) -> Features:
    """Return the histogram of the grey values of each thumbnail."""
    bins = thumbnails(table, SIDE, cache).reshape(len(table), -1) // (256 // BINS)
    counts = np.stack([np.bincount(row, minlength=BINS) for row in bins])
    return Features(pd.DataFrame(counts, index=table.index), f"{BINS} bins of the grey values of {SIDE} × {SIDE}")


def thumbnail(table: pd.DataFrame, cache: Path) -> Features:
    """Return all pixels of a very small thumbnail of each image."""
    pixels = thumbnails(table, COARSE, cache).reshape(len(table), -1)
    return Features(pd.DataFrame(pixels, index=table.index), f"all pixels of {COARSE} × {COARSE}")


def nothing(table: pd.DataFrame, cache: Path) -> Features:
    """Return a table without columns."""
    return Features(pd.DataFrame(index=table.index), "class frequencies of the training images")


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("majority", "nothing: it predicts the class frequencies", False, nothing),
        Baseline("header", "the file's width, height, colour mode and format; no pixel", False, header),
        Baseline(
            "metadata", "the manifest's acquisition columns: view, age, sex and similar; no pixel", False, metadata
        ),
        Baseline("frame", f"the outer {FRAME} of {SIDE} pixels on each side of the reduced image", False, frame),
        Baseline("histogram", f"how often each of {BINS} grey values occurs, without positions", True, histogram),
        Baseline("thumbnail", f"the image reduced to {COARSE} × {COARSE} pixels", True, thumbnail),
    )
}


def write_baselines(
    data: Radiographs, folder: Path, splits: Sequence[str] = ("val", "test"), *, trees: int = TREES
) -> None:
    """Fit each baseline to the training images of a run and write its predictions for other splits.

    The results are cached per data set, split and task. Images outside the training split and `splits` are not read.

    Args:
        data: The images of the run, with their splits and cache.
        folder: Where to write predictions tables, named <baseline>-<split>.csv, with the rows of the run's own tables,
            and about.json: what each baseline saw, or why it was left out.
        splits: Splits to predict.
        trees: Number of trees per forest.
    """
    table = data.table[data.table["split"].isin(["train", *splits])]
    # The result does not depend on where the files are on this machine.
    content = table.drop(columns=["file", "line"]).to_csv(index=False)
    versions = [BASELINES_VERSION, READERS_VERSION, THUMBNAILS_VERSION, sklearn.__version__]
    cached = data.cache / "baselines" / digest(json.dumps([*versions, data.task.name, *splits, trees, content]))
    cached.mkdir(parents=True, exist_ok=True)
    with FileLock(cached.with_suffix(".lock")):
        # about.json is written last: without it, an earlier process was interrupted.
        if not (cached / "about.json").is_file():
            remove_temporary_files(cached)
            _fit_all(table, data.task, splits, data.cache, trees, cached)
    for file in sorted(cached.iterdir()):
        with atomic_file(folder / file.name) as copy:
            copy.write(file.read_bytes())


def cross_validated_baselines(
    table: pd.DataFrame,
    task: Task,
    cache: Path,
    *,
    folds: int = 5,
    seed: int = 0,
    group: str = "patient",
    names: Sequence[str] = tuple(BASELINES),
    trees: int = TREES,
) -> dict[str, pd.DataFrame]:
    """Return out-of-fold predictions of each baseline for all images of the task.

    The class frequencies differ slightly between folds. The decisions of "majority" can be compared with those of
    other baselines, but its AUROC has no meaning.

    Args:
        table: Table of images as returned by `read_manifest`.
        task: Its classes are predicted; other images are ignored.
        cache: Folder of the cache.
        folds: Number of folds. They are those that a network gets with the same `data.folds`, `data.seed` and
            `data.group`.
        seed: Seed of the folds and the forests.
        group: "patient" or "image".
        names: Which baselines.
        trees: Number of trees per forest.

    Returns:
        A predictions table per baseline. A baseline for which the manifest has no data is absent; `baseline_notes`
        gives the reason.

    Raises:
        InputError: There are fewer patients than folds.
    """
    # Folds are assigned before images are selected by class, as for a network, so they are the same for all tasks.
    cut = assign_splits(table.assign(split="", fold=""), SplitSettings(seed, group, folds=folds))
    rows = cut[cut["label"].isin(task.classes)].assign(split="test").reset_index(drop=True)
    tables = {}
    for name in names:
        columns = BASELINES[name].features(rows, cache).columns
        if columns is not None:
            prob = _out_of_fold(columns, _targets(rows, task), rows["fold"], task.multilabel, trees, seed)
            tables[name] = _predictions(rows, prob, task)
    return tables


def baseline_notes(table: pd.DataFrame, cache: Path) -> dict[str, str]:
    """Return which columns or pixels each baseline sees of these images, or why it is left out, as text."""
    return {name: baseline.features(table, cache).note for name, baseline in BASELINES.items()}


def source_within_class(
    table: pd.DataFrame, cache: Path, *, folds: int = 5, seed: int = 0, trees: int = TREES
) -> dict[str, list[SourceScore]]:
    """Return how well the source can be predicted from the image within each class.

    An AUROC near 1 means that images carry a signature of their source. Forests on 16 × 16 thumbnails predict each
    patient out of fold.

    Returns:
        Scores per class. Sources with fewer than `MIN_PATIENTS` patients in the class are ignored. A class that has
        fewer than two sources left is absent.
    """
    scores = {}
    for label, images in table[table["source"] != ""].groupby("label"):
        patients = images.groupby("source")["patient_id"].nunique()
        sources = sorted(patients.index[patients >= MIN_PATIENTS])
        if len(sources) < 2:
            continue
        part = images[images["source"].isin(sources)]
        cut = assign_splits(part.assign(label=part["source"], split="", fold=""), SplitSettings(seed, folds=folds))
        targets = np.stack([(cut["source"] == source).to_numpy(np.int64) for source in sources], axis=1)
        pixels = pd.DataFrame(thumbnails(cut, COARSE, cache).reshape(len(cut), -1))
        prob = _out_of_fold(pixels, targets, cut["fold"], False, trees, seed)
        scores[str(label)] = [_source_score(cut, source, prob[:, k]) for k, source in enumerate(sources)]
    return scores


def thumbnails(table: pd.DataFrame, side: int, cache: Path) -> NDArray[np.uint8]:
    """Return each image resized to `side` × `side` grey pixels, ignoring its aspect ratio; uint8 (N, side, side).

    They are cached by content, so that all tables, folds and tasks decode a file once. An unreadable image is black.

    Args:
        table: Table of images as returned by `read_manifest`.
        side: Side in pixels.
        cache: Folder of the cache; thumbnails are stored in its subfolder thumbnails.

    Raises:
        InputError: A file does not have the sha256 of its row, or the cache is damaged.
    """
    # The readers use the suffix of a file whose content does not determine its format.
    keys = [Path(path).suffix.lower() + sha for path, sha in zip(table["path"], hash_files(table, cache), strict=True)]
    version = digest(json.dumps([READERS_VERSION, THUMBNAILS_VERSION, PIL.__version__]))[:16]
    path = cache / "thumbnails" / f"{side}-{version}.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    query = "SELECT key, pixels FROM thumbnails WHERE key = ?"
    try:
        # The timeout is in seconds: another process may be writing. `closing`, because sqlite3's own context manager
        # does not close the connection.
        with closing(sqlite3.connect(path, timeout=60)) as database:
            database.execute("CREATE TABLE IF NOT EXISTS thumbnails (key TEXT PRIMARY KEY, pixels BLOB) WITHOUT ROWID")
            known = dict(row for key in set(keys) if (row := database.execute(query, (key,)).fetchone()))
            files = {key: Path(file) for key, file in zip(keys, table["file"], strict=True) if key not in known}
            known.update(_create_thumbnails(database, files, side))
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"{path}: thumbnails cannot be stored in this file ({error}). Delete the file, or set data.cache."
        ) from error
    black = bytes(side * side)
    pixels = np.frombuffer(b"".join(known.get(key, black) for key in keys), np.uint8)
    return pixels.reshape(len(keys), side, side)


def _create_thumbnails(database: sqlite3.Connection, files: dict[str, Path], side: int) -> Iterator[tuple[str, bytes]]:
    """Yield the thumbnails of `files` and store them. An unreadable file is not stored, and tried again next time."""
    keys = list(files)
    # Pillow decodes and resizes without the interpreter lock, so threads are enough.
    with ThreadPoolExecutor() as pool:
        for start in track(range(0, len(keys), _ROWS_PER_COMMIT), "thumbnails", transient=True, disable=not keys):
            chunk = keys[start : start + _ROWS_PER_COMMIT]
            created = zip(chunk, pool.map(lambda key: _thumbnail(files[key], side), chunk), strict=True)
            readable = [(key, pixels) for key, pixels in created if pixels is not None]
            with database:
                database.executemany("INSERT OR REPLACE INTO thumbnails VALUES (?, ?)", readable)
            yield from readable


def _thumbnail(file: Path, side: int) -> bytes | None:
    try:
        return Image.fromarray(read_image(file)).resize((side, side), Image.Resampling.BILINEAR).tobytes()
    except BadImage:
        return None


def _read_header(file: Path) -> tuple[int, int, str, str]:
    try:
        with Image.open(file, formats=_FORMATS) as image:
            return *image.size, image.mode, str(image.format)
    # Pillow raises a dozen types of exceptions for damaged files.
    except Exception:
        return _read_dicom_header(file)


def _read_dicom_header(file: Path) -> tuple[int, int, str, str]:
    # Imported here, because a data set of PNG files does not need it.
    import pydicom

    names = ["Columns", "Rows", "PhotometricInterpretation"]
    # A file with this suffix may lack the DICOM preamble, which the image readers accept too.
    force = file.suffix.lower() in (".dcm", ".dicom")
    try:
        head: Any = pydicom.dcmread(file, force=force, stop_before_pixels=True, specific_tags=names)
        return int(head.Columns), int(head.Rows), str(head.PhotometricInterpretation), "DICOM"
    # pydicom also raises many types, and every file that is not an image ends here.
    except Exception:
        return 0, 0, "", ""


def _typed(columns: pd.DataFrame) -> pd.DataFrame:
    """Return columns of numbers or empty values as numbers, nan where empty, and the others as text."""
    typed = {}
    for name in columns.columns:
        text, given = columns[name].astype(str).str.strip(), ~_is_empty(columns[name])
        numbers = pd.to_numeric(text.where(given), errors="coerce")
        typed[name] = numbers if np.isfinite(numbers).equals(given) else text
    return pd.DataFrame(typed, index=columns.index)


def _is_empty(column: "pd.Series[str]") -> "pd.Series[bool]":
    return column.astype(str).str.strip().str.lower().isin(_EMPTY)


def _fit_all(table: pd.DataFrame, task: Task, splits: Sequence[str], cache: Path, trees: int, folder: Path) -> None:
    train = (table["split"] == "train").to_numpy()
    notes = {}
    for name, baseline in BASELINES.items():
        columns, notes[name] = baseline.features(table, cache)
        if columns is None:
            continue
        prob = _fit_predict(columns, _targets(table, task), train, task.multilabel, trees, seed=0)
        predicted = _predictions(table[~train], prob, task)
        for split in splits:
            write_predictions(predicted[predicted["split"] == split], folder / f"{name}-{split}.csv")
    write_json(folder / "about.json", notes)


def _out_of_fold(
    columns: pd.DataFrame, targets: Indices, fold: "pd.Series[str]", multilabel: bool, trees: int, seed: int
) -> Floats:
    prob = np.empty(targets.shape)
    for name in fold.unique():
        test = (fold == name).to_numpy()
        prob[test] = _fit_predict(columns, targets, ~test, multilabel, trees, seed)
    return prob


def _fit_predict(
    columns: pd.DataFrame, targets: Indices, train: Mask, multilabel: bool, trees: int, seed: int
) -> Floats:
    """Return the probabilities, (rows not in `train`, K), of a forest that was fitted to the rows in `train`.

    One forest per label if `multilabel`. Without columns, the probabilities are the frequencies of the training rows.
    """
    rest = ~train
    if columns.empty:
        return np.tile(targets[train].mean(axis=0), (int(rest.sum()), 1))
    if multilabel:
        pairs = [np.stack([1 - label, label], axis=1) for label in targets.T]
        return np.stack([_fit_predict(columns, pair, train, False, trees, seed)[:, 1] for pair in pairs], axis=1)
    text = make_column_selector(dtype_exclude="number")
    one_hot = OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=32, sparse_output=False)
    forest = RandomForestClassifier(
        trees,
        min_samples_leaf=MIN_LEAF,
        class_weight="balanced",
        max_samples=min(MAX_ROWS_PER_TREE, int(train.sum())),
        n_jobs=-1,
        random_state=seed,
    )
    model = make_pipeline(make_column_transformer((one_hot, text), remainder="passthrough"), forest)
    model.fit(columns[train], targets[train].argmax(axis=1))
    # Several threads sum the trees in random order, which changes the last digit of the probabilities.
    forest.set_params(n_jobs=1)
    prob = np.zeros((int(rest.sum()), targets.shape[1]))
    # A class can be absent from these folds.
    prob[:, forest.classes_] = model.predict_proba(columns[rest])
    # One more tree that predicts all classes equally: no class gets probability 0 just because there are few trees.
    return np.asarray((trees * prob + 1 / targets.shape[1]) / (trees + 1))


def _targets(rows: pd.DataFrame, task: Task) -> Indices:
    return np.array([task.targets[task.classes.index(label)] for label in rows["label"]], dtype=np.int64)


def _predictions(rows: pd.DataFrame, prob: Floats, task: Task) -> pd.DataFrame:
    """Return the predictions table of `rows`; logits are log probabilities, or log odds if the task is multilabel."""
    bounded = np.clip(prob, _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    logits = np.log(bounded) - (np.log(1 - bounded) if task.multilabel else 0)
    ids = rows.rename(columns={"path": "image_id"})[list(ID_COLUMNS)].reset_index(drop=True)
    columns = prediction_columns(task.classes)[len(ID_COLUMNS) :]
    return pd.concat([ids, pd.DataFrame(np.hstack([logits, prob]), columns=columns)], axis=1)


def _source_score(images: pd.DataFrame, source: str, score: Floats) -> SourceScore:
    # One score per patient, the mean over its images, because DeLong's interval assumes independent scores.
    positive = images["source"] == source
    by_image = pd.DataFrame({"patient": images["patient_id"], "positive": positive, "score": score})
    patients = by_image.groupby(["patient", "positive"], as_index=False)["score"].mean()
    auroc = delong_interval(patients["positive"].to_numpy(bool), patients["score"].to_numpy(float))
    return SourceScore(source, int(positive.sum()), int(patients["positive"].sum()), auroc)
