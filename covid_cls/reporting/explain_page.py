"""What a model looks at: overlays, a contact sheet, a page, a table and a record."""

import base64
import io
import re
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from covid_cls.attribution.audit import SURVIVES
from covid_cls.records import DISCLAIMER, whole_file, write_json
from covid_cls.reporting.explain_figures import contact_sheet, overlay
from covid_cls.reporting.explanations import Explained, Options
from covid_cls.reporting.figures import save_figure
from covid_cls.reporting.html import Section, bullets, page, paragraph, table

_METHODS = {"grad_cam": "Grad-CAM", "occlusion": "Occlusion"}
_SHEET = "contact_sheet.png"


def write_explained(output: Path, explained: Explained, options: Options, facts: dict[str, Any]) -> None:
    """Write explain.csv, explain.json, explain.html and, where maps may be shown, overlays/ and contact_sheet.png.

    facts: model (its name), images (what was explained) and command, for reader and record. Figures that an earlier
    call left in `output` are removed first: they might show what has failed since.
    """
    for old in (output / _SHEET, *(output / "overlays").glob("[0-9]*_*.png")):
        old.unlink(missing_ok=True)
    method = _METHODS[options.method]
    for image in explained.images:
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", Path(image.row["image_id"]).stem)[-60:]
        save_figure(overlay(image, method), output / "overlays" / f"{image.number + 1:04d}_{name}.png")
    sheet = contact_sheet(explained.images, facts["model"], method) if explained.images else None
    if sheet:
        save_figure(sheet, output / _SHEET)
    with whole_file(output / "explain.csv") as file:
        explained.table.to_csv(file, index=False, float_format="%.9g", lineterminator="\n")
    settings = {"method": options.method, "survives": SURVIVES, **options._asdict()}
    record = {"disclaimer": DISCLAIMER, **facts, "settings": settings, **explained.summary, "notes": explained.notes}
    write_json(output / "explain.json", record)
    with whole_file(output / "explain.html") as file:
        file.write(explain_page(explained, options, facts, sheet).encode())


def verdict_line(summary: dict[str, Any], method: str) -> str:
    """Whether the maps may be shown, and why, in a sentence; method: its name in the settings."""
    weights, name = summary["weights"], _METHODS[method]
    if weights["passed"] is None:
        return f"No figure: every {name} map is 0, nothing speaks for the classes explained."
    changed = f"{weights['changed']['value']:.0%} of {summary['n_maps']} maps change when all weights are drawn anew"
    if weights["passed"]:
        return f"{name} passes the check of the weights: {changed} (at least {weights['needed']:.0%} must)."
    return (
        f"No figure: {name} fails the check of the weights. Only {changed}, and {weights['needed']:.0%} must: what "
        "these maps show, an untrained network shows as well."
    )


def text_lines(explained: Explained, method: str) -> list[str]:
    """The figures that matter, for the console."""
    summary = explained.summary
    lines = [verdict_line(summary, method)]
    for place, part in summary["where"].get("all", {}).items():
        if part["share"]["value"] is not None:
            lines.append(f"in the {place}: {_interval(part['share'])} of the map on {part['area']:.3f} of the area")
    for name, curve in summary["curves"].items():
        if curve["map"]["value"] is not None:
            lines.append(f"{name}: {_interval(curve['map'])}, in random order {_interval(curve['random'])}")
    return [*lines, *(f"note: {note}" for note in explained.notes), DISCLAIMER]


def explain_page(explained: Explained, options: Options, facts: dict[str, Any], sheet: Figure | None) -> str:
    """The page, as HTML that needs no other file."""
    summary = explained.summary
    style = "banner" if summary["weights"]["passed"] else "banner bad"
    lead = paragraph(verdict_line(summary, options.method), style)
    lead += paragraph(f"{facts['images']}: {summary['n_images']} images of {summary['n_patients']} patients.", "quiet")
    sections = [
        Section("Maps", _maps(explained, sheet), _how_to_read(options)),
        Section(
            "Where the maps lie",
            _where(summary),
            "Share of the map inside the border, a frame of 3/32 of the side, and inside the lungs where a mask is "
            "known; then the share of the area, which is what a map that is the same everywhere would have there. "
            "Lungs at 1 times their area are no evidence of reading the lungs. Grad-CAM is coarse: a cell of a ResNet "
            "is 1/7 of the side wide, and reaches over any outline by half of that.",
        ),
        Section(
            "Whether the network needs these places",
            _curves(summary),
            "Area under the probability of the class explained while the highest places are greyed first (deletion; "
            "lower is better) or restored first into a blurred picture (insertion; higher is better), against a random "
            "smooth map (Petsiuk et al. 2018). A difference whose interval holds 0 says that the map ranks places no "
            "better than chance.",
        ),
        Section(
            "Whether the maps need the trained weights",
            _weights(summary, options),
            f"Similarity (SSIM) of a map with those of {options.draws} networks whose weights were drawn anew (Adebayo "
            f"et al. 2018). A map at {SURVIVES} or more survives and is not shown; where fewer than "
            f"{summary['weights']['needed']:.0%} change, none is.",
        ),
        Section("Notes", bullets([*explained.notes, *_limits()]) + _made(options, facts)),
    ]
    return page(f"What {facts['model']} looks at", lead, sections)


def _maps(explained: Explained, sheet: Figure | None) -> str:
    if sheet is None:
        return paragraph("None is shown; explain.csv has the numbers of each.", "bad")
    content = io.BytesIO()
    sheet.savefig(content, format="jpeg", dpi=120, pil_kwargs={"quality": 85})
    source = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
    count = len(explained.images)
    words = f"{count} of {len(explained.table)} images; each is in the folder overlays, beside its radiograph."
    picture = f'<img style="width:100%;height:auto" alt="{count} maps over radiographs" src="{source}">'
    return f'<figure style="max-width:none">{picture}<figcaption>{escape(words)}</figcaption></figure>'


def _how_to_read(options: Options) -> str:
    how = {
        "grad_cam": "Places whose activations in the last convolution speak for the class (Selvaraju et al. 2017).",
        "occlusion": "Places without which the class's logit falls, hidden one square after another (Zeiler and Fergus "
        "2014).",
    }
    return (
        f"{how[options.method]} Each map is scaled to its own highest value: colours do not compare between images. A "
        "map says where, never why, and nothing of whether the class is right. White outline: the lungs, where known."
    )


def _where(summary: dict[str, Any]) -> str:
    rows = [
        (place, "all classes" if name == "all" else name, *_against(part[place]))
        for place in ("border", "lungs")
        for name, part in summary["where"].items()
        if part[place]["n"] and part[place]["share"]["value"] is not None
    ]
    if not rows:
        return paragraph("There is no map.", "quiet")
    shown = table(
        ("place", "class explained", "share of the map", "share of the area", "times", "images"), rows, left=2
    )
    known = any(row[0] == "lungs" for row in rows)
    return shown if known else shown + paragraph("No mask of the lungs is known for these images.", "quiet")


def _against(part: dict[str, Any]) -> tuple[str, ...]:
    return _interval(part["share"]), f"{part['area']:.3f}", f"{part['times']:.2f}", str(part["n"])


def _curves(summary: dict[str, Any]) -> str:
    rows = [
        (name, *(_interval(curve[key]) for key in ("map", "random", "difference")))
        for name, curve in summary["curves"].items()
        if curve["map"]["value"] is not None
    ]
    if not rows:
        return paragraph("Not measured (steps=0), or there is no map.", "quiet")
    return table(("curve", "the map's order", "random order", "difference"), rows)


def _weights(summary: dict[str, Any], options: Options) -> str:
    weights = summary["weights"]
    rows = [
        ("mean similarity", _interval(weights["similarity"])),
        (f"share of maps below {SURVIVES}", _interval(weights["changed"])),
        ("maps compared", str(summary["n_maps"])),
    ]
    return table(("of the maps", f"against {options.draws} random networks"), rows)


def _limits() -> list[str]:
    return [
        "Intervals are 95 %, over resampled patients: what other patients like these could have shown. They say "
        "nothing of another training seed.",
        "Greyed and blurred pictures are no radiographs: a network may answer to the change itself.",
    ]


def _made(options: Options, facts: dict[str, Any]) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in options._asdict().items())
    return paragraph(f"Made by: {facts['command']}", "quiet") + paragraph(f"Settings: {settings}.", "quiet")


def _interval(interval: dict[str, Any]) -> str:
    if interval["value"] is None:
        return "–"
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"
