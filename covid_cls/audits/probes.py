"""Shortcut probes: how far small classifiers come that see no lungs, on the very folds of the networks."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import sklearn
from filelock import FileLock
from numpy.typing import NDArray
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from covid_cls import labels
from covid_cls.audits import probe_features, thumbnails
from covid_cls.audits.probe_features import PROBES, Probe
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.splits import assign_splits
from covid_cls.evaluation.delong import delong_interval
from covid_cls.evaluation.intervals import Interval
from covid_cls.labels import Task
from covid_cls.records import (
    ID_COLUMNS,
    digest,
    files_digest,
    prediction_columns,
    whole_file,
    write_json,
    write_predictions,
)

__all__ = ["PROBES", "Probe", "SourceScore", "audit_probes", "probe_notes", "source_within_class", "write_probes"]

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
TREES = 300  # the one budget of every probe
MOST = 10_000  # training images that a tree sees
LEAF = 2  # fewest images in a leaf: with 1, most probabilities are 0 or 1
FEWEST_PATIENTS = 10  # of a source within a class, for its AUROC to say anything
_LEAST = 1e-6  # probability whose logarithm stands for that of 0


def write_probes(
    data: Radiographs, folder: Path, splits: Sequence[str] = ("val", "test"), *, trees: int = TREES
) -> None:
    """Write `folder`/<probe>-<split>.csv: what each probe, fitted on the training images of `data`, says of the others.

    Predictions tables with the rows, ids and order of the run's own (`training.predict`). `folder`/about.json says
    what each probe saw, or why it was left out. They are computed once per data set, split and task, and kept in the
    cache of `data`; images outside training and `splits` are not looked at.
    """
    table = data.table[data.table["split"].isin(["train", *splits])]
    content = table.drop(columns=["file", "line"]).to_csv(index=False)
    kept = data.cache / "probes" / digest(json.dumps([data.task.name, *splits, trees, _version(), content]))
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        if not kept.is_dir():
            _fit_all(table, data.task, splits, data.cache, trees, kept)
    for file in sorted(kept.iterdir()):
        with whole_file(folder / file.name) as copy:
            copy.write(file.read_bytes())


def audit_probes(
    table: pd.DataFrame,
    task: Task,
    cache: Path,
    *,
    folds: int = 5,
    seed: int = 0,
    group: str = "patient",
    names: Sequence[str] = tuple(PROBES),
    trees: int = TREES,
) -> dict[str, pd.DataFrame]:
    """Per probe a predictions table over all images of the task, each predicted from the folds that it is not in.

    table: as `read_manifest` gives it. The folds are those that `data.folds`, `data.seed` and `data.group` would give a
    network. A probe that the manifest has nothing for is absent; `probe_notes` says why. The classes' frequencies
    differ a little between folds, so that "majority" has decisions to compare with, but no AUROC worth reading.
    InputError where there are fewer patients than folds.
    """
    cut = assign_splits(table.assign(split="", fold=""), seed=seed, group=group, folds=folds)
    rows = cut[cut["label"].isin(task.classes)].assign(split="test").reset_index(drop=True)
    tables = {}
    for name in names:
        columns = PROBES[name].features(rows, cache).columns
        if columns is not None:
            prob = _out_of_fold(columns, _targets(rows, task), rows["fold"], task.multilabel, trees, seed)
            tables[name] = _predictions(rows, prob, task)
    return tables


def probe_notes(table: pd.DataFrame, cache: Path) -> dict[str, str]:
    """Per probe which columns or pixels it sees of these images, or why it is left out, for a reader."""
    return {name: probe.features(table, cache).note for name, probe in PROBES.items()}


class SourceScore(NamedTuple):
    """How well a source is told from the other sources of a class, by a thumbnail; auroc: over its patients."""

    source: str
    images: int
    patients: int
    auroc: Interval


def source_within_class(
    table: pd.DataFrame, cache: Path, *, folds: int = 5, seed: int = 0, trees: int = TREES
) -> dict[str, list[SourceScore]]:
    """Per class that holds two or more sources: can the source be read from the image, the class being the same?

    A forest on 16 × 16 thumbnails, each patient predicted from the folds that it is not in; a patient's score is the
    mean over its images, so that DeLong's interval is over independent ones. Near 1: images carry their source. Sources
    of fewer than `FEWEST_PATIENTS` patients in the class are left aside; a class that keeps fewer than two is absent.
    """
    scores = {}
    for label, images in table[table["source"] != ""].groupby("label"):
        patients = images.groupby("source")["patient_id"].nunique()
        sources = sorted(patients.index[patients >= FEWEST_PATIENTS])
        if len(sources) < 2:
            continue
        part = images[images["source"].isin(sources)]
        cut = assign_splits(part.assign(label=part["source"], split="", fold=""), seed=seed, folds=folds)
        targets = np.stack([(cut["source"] == source).to_numpy(np.int64) for source in sources], axis=1)
        columns = probe_features.thumbnail(cut, cache).columns
        assert columns is not None
        prob = _out_of_fold(columns, targets, cut["fold"], False, trees, seed)
        scores[str(label)] = [_source_score(cut, source, prob[:, k]) for k, source in enumerate(sources)]
    return scores


def _source_score(images: pd.DataFrame, source: str, score: Floats) -> SourceScore:
    mine = images["source"] == source
    by_patient = pd.DataFrame({"patient": images["patient_id"], "mine": mine, "score": score})
    one_each = by_patient.groupby(["patient", "mine"], as_index=False)["score"].mean()
    auroc = delong_interval(one_each["mine"].to_numpy(bool), one_each["score"].to_numpy(float))
    return SourceScore(source, int(mine.sum()), int(one_each["mine"].sum()), auroc)


def _fit_all(table: pd.DataFrame, task: Task, splits: Sequence[str], cache: Path, trees: int, folder: Path) -> None:
    """Fill `folder` with every probe's tables; it appears when it is complete."""
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.tmp"))
    try:
        train = (table["split"] == "train").to_numpy()
        notes = {}
        for name, probe in PROBES.items():
            columns, notes[name] = probe.features(table, cache)
            if columns is None:
                continue
            prob = _fit_predict(columns, _targets(table, task), train, ~train, task.multilabel, trees, seed=0)
            predicted = _predictions(table[~train], prob, task)
            for split in splits:
                mine = predicted[predicted["split"] == split]
                write_predictions(mine, scratch / f"{name}-{split}.csv")
        write_json(scratch / "about.json", notes)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _out_of_fold(
    columns: pd.DataFrame, targets: NDArray[np.int64], fold: "pd.Series[str]", multilabel: bool, trees: int, seed: int
) -> Floats:
    prob = np.empty(targets.shape)
    for name in fold.unique():
        test = (fold == name).to_numpy()
        prob[test] = _fit_predict(columns, targets, ~test, test, multilabel, trees, seed)
    return prob


def _fit_predict(
    columns: pd.DataFrame, targets: NDArray[np.int64], train: Mask, rest: Mask, multilabel: bool, trees: int, seed: int
) -> Floats:
    """Probabilities (rest, K) by a forest fitted on the rows of `train`; one forest per label if `multilabel`.

    Without any column they are the frequencies of the training rows.
    """
    if columns.empty:
        return np.tile(targets[train].mean(axis=0), (int(rest.sum()), 1))
    if multilabel:
        pairs = [np.stack([1 - label, label], axis=1) for label in targets.T]
        single = [_fit_predict(columns, pair, train, rest, False, trees, seed)[:, 1] for pair in pairs]
        return np.stack(single, axis=1)
    text = make_column_selector(dtype_exclude="number")
    one_hot = OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=32, sparse_output=False)
    forest = RandomForestClassifier(
        trees,
        min_samples_leaf=LEAF,
        class_weight="balanced",
        max_samples=min(MOST, int(train.sum())),
        n_jobs=-1,
        random_state=seed,
    )
    model = make_pipeline(make_column_transformer((one_hot, text), remainder="passthrough"), forest)
    model.fit(columns[train], targets[train].argmax(axis=1))
    forest.set_params(n_jobs=1)  # threads add up in the order in which they end, which moves the last digit
    prob = np.zeros((int(rest.sum()), targets.shape[1]))
    prob[:, forest.classes_] = model.predict_proba(columns[rest])  # a class can be absent from these folds
    # As if one tree more knew nothing: no image is ruled out for want of trees.
    return np.asarray((trees * prob + 1 / targets.shape[1]) / (trees + 1))


def _targets(rows: pd.DataFrame, task: Task) -> NDArray[np.int64]:
    index = {name: k for k, name in enumerate(task.classes)}
    return np.array(task.targets, dtype=np.int64)[[index[label] for label in rows["label"]]]


def _predictions(rows: pd.DataFrame, prob: Floats, task: Task) -> pd.DataFrame:
    """The predictions table of `rows`; logits are log-probabilities, or log-odds where each class has its own."""
    bounded = np.clip(prob, _LEAST, 1 - _LEAST)
    logits = np.log(bounded) - (np.log(1 - bounded) if task.multilabel else 0)
    ids = rows.rename(columns={"path": "image_id"})[list(ID_COLUMNS)].reset_index(drop=True)
    columns = prediction_columns(task.classes)[len(ID_COLUMNS) :]
    return pd.concat([ids, pd.DataFrame(np.hstack([logits, prob]), columns=columns)], axis=1)


def _version() -> str:
    """Stands for the code that fits the probes."""
    code = [Path(str(module.__file__)) for module in (labels, probe_features, thumbnails)]
    return digest(files_digest([*code, Path(__file__)]) + sklearn.__version__)
