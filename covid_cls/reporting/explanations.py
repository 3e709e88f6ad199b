"""Images explained one batch after another: what a model says of each, its map, and what the map is worth."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.progress import track

from covid_cls.artifact.model import UNDECIDED, UNREADABLE, Model
from covid_cls.artifact.stream import predict_pictures
from covid_cls.attribution.audit import Mask, Measures, measure, randomise
from covid_cls.attribution.maps import METHODS
from covid_cls.attribution.masks import mask_files, read_mask
from covid_cls.attribution.summary import summarise_maps
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.inputs import find_inputs
from covid_cls.data.manifest import SPLITS
from covid_cls.errors import InputError, listed
from covid_cls.evaluation.metrics import decide
from covid_cls.evaluation.predictions import finished_run
from covid_cls.labels import Task, canonical
from covid_cls.models.scorer import Scorer
from covid_cls.models.transforms import Augment
from covid_cls.reporting.ledger import record_opening

_BATCH = 8
_ENOUGH = 50  # images; the check of the weights was proposed for as many
_NAMES = ("image_id", "patient_id", "label", "path", "file", "line", "mask")


class MappedImage(NamedTuple):
    """An image whose map may be shown. number: of its row; row: that row of `Explained.table`.

    canvas: uint8 (crop, crop), as the network sees it; heat: its map; lungs: its mask, if there is one.
    """

    number: int
    row: dict[str, Any]
    canvas: NDArray[np.uint8]
    heat: NDArray[np.float32]
    lungs: Mask | None


class Options(NamedTuple):
    """What is asked of the maps. target: a class, "decided" or "label"; figures: at most so many maps are drawn."""

    method: str = "grad_cam"
    target: str = "decided"
    threshold: str = "youden"
    figures: int = 24
    draws: int = 3
    steps: int = 10
    seed: int = 0


class Explained(NamedTuple):
    """table: a row per image, see `explain_images`. images: those to be drawn, none where the maps failed the check."""

    table: pd.DataFrame
    summary: dict[str, Any]
    images: list[MappedImage]
    notes: list[str]


def input_images(path: str) -> pd.DataFrame:
    """A row per image that `path` names (see `find_inputs`), with label, patient_id and mask where a manifest has them.

    Columns: image_id, patient_id, label ("" where unknown), path, file, line, mask.
    """
    found = find_inputs(path)
    table = pd.DataFrame({"path": [name for name, _ in found], "file": [str(file) for _, file in found]})
    place = Path(path).expanduser()
    if place.suffix.lower() == ".csv" and place.is_file():
        given = pd.read_csv(place, dtype=str, keep_default_na=False, encoding="utf-8-sig").rename(columns=str.strip)
        table = table.assign(line=range(2, len(table) + 2))
        for name in ("patient_id", "label", "mask"):
            if name in given.columns:
                table[name] = given[name].str.strip().to_numpy()
    if "label" in table.columns:
        table["label"] = [canonical(label) or "" for label in table["label"]]
    return _named(table)


def split_images(run: Path, split: str, command: str) -> pd.DataFrame:
    """A row per image of a split of a finished run's data, as `input_images`; one of test is noted in its ledger."""
    if split not in SPLITS:
        raise InputError(f"split={split}: must be one of {listed(SPLITS)}")
    record, task = finished_run(run)
    config = record["config"]
    canvas = Augment(**config["augment"]).canvas(config["preprocess"]["crop"])  # the store that training left
    data = Radiographs(task, canvas, config["seed"], **config["data"])
    if split == "test":
        record_opening(run, command)
    return _named(data.table[data.table["split"] == split].reset_index(drop=True))


def check_options(options: Options, task: Task) -> None:
    """InputError where an option is out of range or names no class of the model's task."""
    if options.method not in METHODS:
        raise InputError(f"method={options.method}: must be one of {listed(list(METHODS))}")
    targets = ["decided", "label", *task.classes]
    if options.target not in targets:
        raise InputError(f"target={options.target}: must be one of {listed(targets)}; these are of task {task.name}")
    for name, least in (("figures", 0), ("draws", 1), ("steps", 0), ("seed", 0)):
        if getattr(options, name) < least:
            raise InputError(f"{name}={getattr(options, name)}: must be at least {least}")


def explain_images(model: Model, images: pd.DataFrame, options: Options) -> Explained:
    """The maps of `images` (as of `input_images`) and what they are worth, in their order.

    table: image_id, patient_id, label; the columns of `Model.predict`; target, the class explained; the numbers of
    `Measures`, nan for an image that cannot be read; and published, whether the map changes with the weights.
    """
    strange = images.loc[~images["label"].isin(model.task.classes), "image_id"].tolist()
    if options.target == "label" and strange:
        raise InputError(
            f"target=label: {len(strange)} images have no label of task {model.task.name}: {listed(strange, 5)}; give "
            "a manifest with a column label, or target=decided"
        )
    masks = mask_files(images)
    randomised = [randomise(model.scorer, options.seed + k) for k in range(options.draws)]
    shown = set(np.linspace(0, len(images) - 1, min(options.figures, len(images))).round().astype(int).tolist())
    tables, drawn = [], list[MappedImage]()
    starts = range(0, len(images), _BATCH)
    for start in track(starts, "explaining", transient=True, disable=len(starts) < 2):
        part = slice(start, start + _BATCH)
        table, mapped = _explain_batch(model, randomised, images[part], masks[part], options)
        tables.append(table)
        drawn += [image for image in mapped if image.number in shown]
    table = pd.concat(tables, ignore_index=True)
    read = table[table["target"] != ""]
    if read.empty:
        faults = [f"{name}: {why}" for name, why in zip(table["image_id"], table["detail"], strict=True)]
        raise InputError(f"none of {len(table)} files can be read: {listed(faults, 3)}")
    summary = summarise_maps(read, model.task, model.scorer.preprocess.crop, seed=options.seed)
    return Explained(table, summary, drawn if summary["weights"]["passed"] else [], _notes(table, summary, model))


def _explain_batch(
    model: Model,
    randomised: Sequence[Scorer],
    images: pd.DataFrame,
    masks: Sequence[Path | None],
    options: Options,
) -> tuple[pd.DataFrame, list[MappedImage]]:
    """The rows of these images, and each whose map may be shown."""
    named = list(zip(images["image_id"], map(Path, images["file"]), strict=True))
    (scored,) = predict_pictures(model, named, threshold=options.threshold, batch_size=_BATCH)
    table = pd.concat(
        [images[["image_id", "patient_id", "label"]].reset_index(drop=True), scored[model.columns]], axis=1
    )
    readable = [row for row, reasons in enumerate(table["reasons"]) if reasons != UNREADABLE]
    if not readable:
        return table.assign(target="", **dict.fromkeys(Measures._fields, math.nan), published=False), []
    view = model.scorer.preprocess
    targets = _targets(table.loc[readable], model.task, options.target)
    canvases = np.stack([model.canvas(named[row][1]) for row in readable])
    lungs = [read_mask(mask, named[row][1], view.size, view.crop) if (mask := masks[row]) else None for row in readable]
    batch = torch.from_numpy(canvases).unsqueeze(1)
    method = METHODS[options.method]
    maps, measured = measure(model.scorer, randomised, method, batch, torch.from_numpy(targets), lungs, options.steps)
    names = [model.task.classes[k] for k in targets]
    numbers = pd.DataFrame(measured, index=readable).assign(published=[m.published for m in measured])
    numbers.insert(0, "target", names)
    table = table.join(numbers).fillna({"target": "", "published": False}).astype({"published": bool})
    mapped = [
        MappedImage(
            int(images.index[row]), {str(name): value for name, value in table.loc[row].items()}, canvas, heat, mask
        )
        for row, canvas, heat, mask in zip(readable, canvases, maps, lungs, strict=True)
        if table["published"][row]
    ]
    return table, mapped


def _targets(table: pd.DataFrame, task: Task, target: str) -> NDArray[np.int64]:
    """The class index of each row's map; of an undecided image that of the likeliest class."""
    if target in task.classes:
        return np.full(len(table), task.classes.index(target), dtype=np.int64)
    prob = table[[f"calibrated_{name}" for name in task.classes]].to_numpy(dtype=np.float64)
    names = table["label" if target == "label" else "decision"]
    chosen = [
        k if name == UNDECIDED else task.classes.index(name) for name, k in zip(names, decide(prob, task), strict=True)
    ]
    return np.array(chosen, dtype=np.int64)


def _notes(table: pd.DataFrame, summary: dict[str, Any], model: Model) -> list[str]:
    read = table[table["target"] != ""]
    survive = read["similarity"].notna() & ~read["published"]
    counts = {
        "cannot be read and have no map": len(table) - len(read),
        "are undecided; their maps are those of the likeliest class": int((read["decision"] == UNDECIDED).sum()),
        "have a map that is 0 everywhere: nothing speaks for the class": len(read) - summary["n_maps"],
        "have a map that survives random weights; it is not shown": int(survive.sum()),
    }
    notes = [f"{n} of {len(table)} images {what}" for what, n in counts.items() if n]
    if 0 < summary["n_maps"] < _ENOUGH:
        notes.append(f"the check of the weights rests on fewer maps than the {_ENOUGH} it is for: {summary['n_maps']}")
    return [*notes, *model.record["notes"]]


def _named(table: pd.DataFrame) -> pd.DataFrame:
    table = table.assign(image_id=table["path"])
    for name, missing in (("patient_id", ""), ("label", ""), ("mask", ""), ("line", 0)):
        if name not in table.columns:
            table[name] = missing
    return table[list(_NAMES)]
