"""Attribution maps of a model's predictions: computed, summarised, and written as files and as a page."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.progress import track

from covid_cls.attribution.map_metrics import (
    MAX_SIMILARITY,
    MapMetrics,
    MappedImage,
    measure_maps,
    randomise,
    summarise_maps,
)
from covid_cls.attribution.maps import METHODS
from covid_cls.attribution.masks import mask_files, read_mask
from covid_cls.bundle.model import UNDECIDED, UNREADABLE, Model, predict_images
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.image_source import DataSettings
from covid_cls.data.manifest import SPLITS, find_inputs
from covid_cls.errors import InputError, listed
from covid_cls.evaluation.metrics import decide
from covid_cls.evaluation.predictions import finished_run
from covid_cls.io import DISCLAIMER, atomic_file, write_json
from covid_cls.models.inference import Scorer
from covid_cls.models.transforms import Augment
from covid_cls.reporting.access_log import record_test_access
from covid_cls.reporting.figures import contact_sheet, overlay, save_figure
from covid_cls.reporting.html import Table, data_uri, number, render, with_interval
from covid_cls.tasks import Task, canonical

_BATCH = 8
# Adebayo et al. 2018 propose the randomisation test for this many images.
_ENOUGH_MAPS = 50
_COLUMNS = ("image_id", "patient_id", "label", "path", "file", "line", "mask")
_MISSING: dict[str, Any] = {"patient_id": "", "label": "", "mask": "", "line": 0}
_METHODS = {"grad_cam": "Grad-CAM", "occlusion": "Occlusion"}
_MIN_OPTIONS = {"figures": 0, "draws": 1, "steps": 0, "seed": 0}
_SHEET = "contact_sheet.png"


class Options(NamedTuple):
    """How maps are made and tested.

    Attributes:
        method: A key of `METHODS`.
        target: The class that is explained: "decided", "label", or the name of one class for all images.
        threshold: Name of the threshold that decides, as in `Model.predict`.
        figures: Maximal number of images that are drawn.
        draws: Number of re-initialised networks with which each map is compared.
        steps: Steps of the deletion and insertion curves; 0 omits them.
        seed: Seed of the re-initialised weights and of the bootstrap.
    """

    method: str = "grad_cam"
    target: str = "decided"
    threshold: str = "youden"
    figures: int = 24
    draws: int = 3
    steps: int = 10
    seed: int = 0


class Explained(NamedTuple):
    """Maps and what was measured of them.

    Attributes:
        table: One row per image, see `explain_images`.
        summary: The summary of `summarise_maps`.
        images: The images to draw; empty if the maps failed the randomisation test.
        notes: What limits the result.
    """

    table: pd.DataFrame
    summary: dict[str, Any]
    images: list[MappedImage]
    notes: list[str]


def input_images(path: str) -> pd.DataFrame:
    """Return one row per image that `path` names (see `find_inputs`).

    Returns:
        Columns image_id, patient_id, label, path, file, line and mask. A CSV may provide patient_id, label and mask;
        unknown ones are "".
    """
    found = find_inputs(path)
    table = pd.DataFrame({"path": [name for name, _ in found], "file": [str(file) for _, file in found]})
    place = Path(path).expanduser()
    if place.suffix.lower() == ".csv" and place.is_file():
        given = pd.read_csv(place, dtype=str, keep_default_na=False, encoding="utf-8-sig").rename(columns=str.strip)
        for name in ("patient_id", "label", "mask"):
            if name in given.columns:
                table[name] = given[name].str.strip().to_numpy()
        table["line"] = range(2, len(table) + 2)
    if "label" in table.columns:
        table["label"] = [canonical(label) or "" for label in table["label"]]
    return _with_all_columns(table)


def split_images(run: Path, split: str, command: str) -> pd.DataFrame:
    """Return one row per image of a split of a finished run, with the columns of `input_images`.

    Args:
        run: Folder of the run.
        split: train, val or test. An access to test is logged.
        command: The command as typed, for the log.

    Raises:
        InputError: If there is no such split or the run is not finished.
    """
    if split not in SPLITS:
        raise InputError(f"split={split}: must be one of {listed(SPLITS)}")
    record, task = finished_run(run)
    config = record["config"]
    # With the canvas of the training run, the images that it decoded are used again.
    canvas = Augment(**config["augment"]).canvas(config["preprocess"]["crop"])
    data = Radiographs(task, canvas, config["seed"], DataSettings(**config["data"]))
    # Decisions and labels of test images are shown, so this counts as an access even though nothing is scored.
    if split == "test":
        record_test_access(run, command)
    return _with_all_columns(data.table[data.table["split"] == split].reset_index(drop=True))


def check_options(options: Options, task: Task) -> None:
    """Raise InputError if an option is out of range or names no class of the task."""
    if options.method not in METHODS:
        raise InputError(f"method={options.method}: must be one of {listed(list(METHODS))}")
    targets = ["decided", "label", *task.classes]
    if options.target not in targets:
        raise InputError(f"target={options.target}: must be one of {listed(targets)} (the model's task is {task.name})")
    for name, least in _MIN_OPTIONS.items():
        if getattr(options, name) < least:
            raise InputError(f"{name}={getattr(options, name)}: must be at least {least}")


def explain_images(model: Model, images: pd.DataFrame, options: Options) -> Explained:
    """Compute and test the maps of images.

    Args:
        model: The model.
        images: A table as `input_images` returns it.
        options: How maps are made.

    Returns:
        The table has one row per image, in the order of `images`: image_id, patient_id, label, the columns of
        `Model.predict`, target (the class explained; "" for an unreadable image), those of `MapMetrics`, and published
        (whether the map differs from those of re-initialised networks and may be shown).

    Raises:
        InputError: If no image can be read, a mask is at fault, or labels are explained but missing.
    """
    unlabelled = images.loc[~images["label"].isin(model.task.classes), "image_id"].tolist()
    if options.target == "label" and unlabelled:
        raise InputError(
            f"target=label: {len(unlabelled)} images have no label of task {model.task.name}: {listed(unlabelled, 5)}. "
            "Add a column label to the manifest, or use target=decided."
        )
    masks = mask_files(images)
    # All images are compared with the same networks, so that their similarities can be averaged.
    randomised = [randomise(model.scorer, options.seed + k) for k in range(options.draws)]
    # Neighbours are often images of one patient or class, so the images to draw are spread over the table.
    drawn = set(np.linspace(0, len(images) - 1, min(options.figures, len(images))).round().astype(int).tolist())
    tables: list[pd.DataFrame] = []
    mapped: list[MappedImage] = []
    starts = range(0, len(images), _BATCH)
    # A progress bar for a single batch would only flicker.
    for start in track(starts, "explaining", transient=True, disable=len(starts) < 2):
        batch = slice(start, start + _BATCH)
        table, found = _explain_batch(model, randomised, images[batch], masks[batch], options)
        tables.append(table)
        mapped += [image for image in found if image.number in drawn]
    table = pd.concat(tables, ignore_index=True)
    readable = table[table["target"] != ""]
    if readable.empty:
        faults = [f"{name}: {fault}" for name, fault in zip(table["image_id"], table["detail"], strict=True)]
        raise InputError(f"none of the {len(table)} files can be read: {listed(faults, 3)}")
    summary = summarise_maps(readable, model.task, model.scorer.preprocess.crop, seed=options.seed)
    notes = [*_notes(table, summary), *model.record["notes"]]
    return Explained(table, summary, mapped if summary["weights"]["passed"] else [], notes)


def write_explained(output: Path, explained: Explained, options: Options, facts: dict[str, Any]) -> None:
    """Write explain.csv, explain.json, explain.html and, if maps may be shown, overlays/ and contact_sheet.png.

    Args:
        output: Folder of the results.
        explained: What to write.
        options: How the maps were made.
        facts: model (its name), images (what was explained) and command, for the page and explain.json.
    """
    # An earlier call may have left figures of maps that fail the test now.
    for old in (output / _SHEET, *(output / "overlays").glob("[0-9]*_*.png")):
        old.unlink(missing_ok=True)
    method = _METHODS[options.method]
    for image in explained.images:
        # An image_id may contain folders and characters that a file system does not allow.
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", Path(image.row["image_id"]).stem)[-60:]
        save_figure(overlay(image, method), output / "overlays" / f"{image.number + 1:04d}_{name}.png")
    sheet = contact_sheet(explained.images, facts["model"], method) if explained.images else None
    if sheet:
        save_figure(sheet, output / _SHEET)
    with atomic_file(output / "explain.csv") as file:
        # 9 digits restore a float32 exactly.
        explained.table.to_csv(file, index=False, float_format="%.9g", lineterminator="\n")
    settings = {"method": options.method, "survives": MAX_SIMILARITY, **options._asdict()}
    record = {"disclaimer": DISCLAIMER, **facts, "settings": settings, **explained.summary, "notes": explained.notes}
    write_json(output / "explain.json", record)
    with atomic_file(output / "explain.html") as file:
        file.write(explain_page(explained, options, facts, sheet).encode())


def verdict_line(summary: dict[str, Any], method: str) -> str:
    """Return in one sentence whether the maps may be shown, and why; `method` is a key of `METHODS`."""
    weights, name = summary["weights"], _METHODS[method]
    if weights["passed"] is None:
        return f"No figure: every {name} map is 0. No place supports the classes explained."
    changed = (
        f"{weights['changed']['value']:.0%} of {summary['n_maps']} maps change when all weights are re-initialised"
    )
    if weights["passed"]:
        return f"{name} passes the randomisation test: {changed} (required: {weights['needed']:.0%})."
    return (
        f"No figure: {name} fails the randomisation test. Only {changed} (required: {weights['needed']:.0%}). An "
        "untrained network would give similar maps."
    )


def text_lines(explained: Explained, method: str) -> list[str]:
    """Return the most important results as text for the console."""
    summary = explained.summary
    lines = [verdict_line(summary, method)]
    for place, part in summary["where"].get("all", {}).items():
        if part["share"]["value"] is not None:
            lines.append(f"in the {place}: {with_interval(part['share'])} of the map on {part['area']:.3f} of the area")
    for name, curve in summary["curves"].items():
        if curve["map"]["value"] is not None:
            lines.append(f"{name}: {with_interval(curve['map'])}, in random order {with_interval(curve['random'])}")
    return [*lines, *(f"note: {note}" for note in explained.notes), DISCLAIMER]


def explain_page(explained: Explained, options: Options, facts: dict[str, Any], sheet: Figure | None) -> str:
    """Return the HTML page; `sheet` is the contact sheet, None if no map may be shown."""
    summary = explained.summary
    return render(
        "explain.html.j2",
        **facts,
        options=options,
        summary=summary,
        verdict=verdict_line(summary, options.method),
        n_drawn=len(explained.images),
        n_rows=len(explained.table),
        sheet=_jpeg(sheet) if sheet else None,
        where=_where_table(summary),
        curves=_curve_table(summary),
        weights=_weights_table(summary, options.draws),
        max_similarity=MAX_SIMILARITY,
        needed=f"{summary['weights']['needed']:.0%}",
        notes=explained.notes,
    )


def _with_all_columns(table: pd.DataFrame) -> pd.DataFrame:
    missing = {name: value for name, value in _MISSING.items() if name not in table.columns}
    return table.assign(image_id=table["path"], **missing)[list(_COLUMNS)]


def _explain_batch(
    model: Model,
    randomised: Sequence[Scorer],
    images: pd.DataFrame,
    masks: Sequence[Path | None],
    options: Options,
) -> tuple[pd.DataFrame, list[MappedImage]]:
    """Return the rows of these images, and those images whose map may be shown."""
    named = list(zip(images["image_id"], map(Path, images["file"]), strict=True))
    # There are at most `_BATCH` images, which give one table.
    (scored,) = predict_images(model, named, threshold=options.threshold, batch_size=_BATCH)
    identity = images[["image_id", "patient_id", "label"]].reset_index(drop=True)
    table = pd.concat([identity, scored[model.columns]], axis=1)
    readable = [row for row, reasons in enumerate(table["reasons"]) if reasons != UNREADABLE]
    if not readable:
        return table.assign(target="", **dict.fromkeys(MapMetrics._fields, math.nan), published=False), []
    view = model.scorer.preprocess
    targets = _targets(table.loc[readable], model.task, options.target)
    canvases = np.stack([model.canvas(named[row][1]) for row in readable])
    lungs = [read_mask(mask, named[row][1], view.size, view.crop) if (mask := masks[row]) else None for row in readable]
    maps, metrics = measure_maps(
        model.scorer,
        randomised,
        METHODS[options.method],
        torch.from_numpy(canvases).unsqueeze(1),
        torch.from_numpy(targets),
        lungs,
        options.steps,
    )
    numbers = pd.DataFrame(metrics, index=readable).assign(published=[m.published for m in metrics])
    numbers.insert(0, "target", [model.task.classes[k] for k in targets])
    table = table.join(numbers).fillna({"target": "", "published": False}).astype({"published": bool})
    rows = table.to_dict("records")
    mapped = [
        MappedImage(int(images.index[row]), {str(name): value for name, value in rows[row].items()}, canvas, heat, mask)
        for row, canvas, heat, mask in zip(readable, canvases, maps, lungs, strict=True)
        if rows[row]["published"]
    ]
    return table, mapped


def _targets(table: pd.DataFrame, task: Task, target: str) -> NDArray[np.int64]:
    """Return the class index that is explained for each row; for an undecided image the most probable class."""
    if target in task.classes:
        return np.full(len(table), task.classes.index(target), dtype=np.int64)
    prob = table[[f"calibrated_{name}" for name in task.classes]].to_numpy(dtype=np.float64)
    names = table["label" if target == "label" else "decision"]
    index = {name: k for k, name in enumerate(task.classes)}
    # An undecided image has no class in `index`.
    return np.array([index.get(name, k) for name, k in zip(names, decide(prob, task), strict=True)], dtype=np.int64)


def _notes(table: pd.DataFrame, summary: dict[str, Any]) -> list[str]:
    readable = table[table["target"] != ""]
    similar = readable["similarity"].notna() & ~readable["published"]
    # Maps that are 0 everywhere have no similarity and are counted separately.
    counts = {
        "cannot be read and have no map": len(table) - len(readable),
        "are undecided; the most probable class is explained": int((readable["decision"] == UNDECIDED).sum()),
        "have a map that is 0 everywhere: no place supports the class": len(readable) - summary["n_maps"],
        "have a map that is similar to those of re-initialised networks; it is not shown": int(similar.sum()),
    }
    notes = [f"{n} of {len(table)} images {what}" for what, n in counts.items() if n]
    if 0 < summary["n_maps"] < _ENOUGH_MAPS:
        notes.append(f"the randomisation test is meant for at least {_ENOUGH_MAPS} maps; here are {summary['n_maps']}")
    return notes


def _where_table(summary: dict[str, Any]) -> Table:
    rows = []
    for place in ("border", "lungs"):
        for name, parts in summary["where"].items():
            part = parts[place]
            if part["n"] and part["share"]["value"] is not None:
                numbers = [with_interval(part["share"]), number(part["area"]), number(part["times"], 2), str(part["n"])]
                rows.append([place, "all classes" if name == "all" else name, *numbers])
    headers = ["place", "class explained", "share of the map", "share of the area", "times", "images"]
    return Table(headers, rows, left=2)


def _curve_table(summary: dict[str, Any]) -> Table:
    rows = [
        [name, *(with_interval(curve[key]) for key in ("map", "random", "difference"))]
        for name, curve in summary["curves"].items()
        if curve["map"]["value"] is not None
    ]
    return Table(["curve", "order of the map", "random order", "difference"], rows)


def _weights_table(summary: dict[str, Any], draws: int) -> Table:
    weights = summary["weights"]
    rows = [
        ["mean similarity", with_interval(weights["similarity"])],
        [f"share of maps below {MAX_SIMILARITY}", with_interval(weights["changed"])],
        ["maps compared", str(summary["n_maps"])],
    ]
    return Table(["", f"against {draws} re-initialised networks"], rows)


def _jpeg(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="jpeg", dpi=120, pil_kwargs={"quality": 85})
    return data_uri(file.getvalue(), "jpeg")
