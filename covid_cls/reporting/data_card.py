"""The data card of a run: what it was trained and selected on, and what is known to be wrong with it."""

from typing import Any

from covid_cls.artifact.card import markdown_table
from covid_cls.data.datamodule import set_name
from covid_cls.labels import TASKS
from covid_cls.records import DISCLAIMER

_LISTED = 20  # quarantined images; run.json has them all


def data_card(record: dict[str, Any]) -> str:
    """Markdown of the data in a run's record, run.json: images per split and class, sources, quarantine, notes.

    After Gebru et al. 2021, "Datasheets for datasets", as far as a manifest can answer. Test images are counted, too.
    """
    data, settings = record["data"], record["config"]["data"]
    classes = TASKS[record["config"]["task"]["name"]].classes
    splits, patients = data["images_per_split_and_class"], data["patients_per_split"]
    rows = [
        [split, *(f"{n[name]:,}" for name in classes), f"{sum(n.values()):,}", f"{patients.get(split, 0):,}"]
        for split, n in splits.items()
    ]
    totals = [sum(n[name] for n in splits.values()) for name in classes]
    rows.append(["all", *(f"{n:,}" for n in totals), f"{data['images']:,}", f"{data['patients']:,}"])
    parts = [
        f"# {set_name(settings['kind'], settings.get('path'), settings.get('root'))}",
        f"**{DISCLAIMER}** {_drawn(settings)}",
        markdown_table(["split", *classes, "images", "patients"], rows),
        "## Sources",
        markdown_table(["source", "images"], [[name, f"{n:,}"] for name, n in data["sources"].items()]),
    ]
    if data["quarantined"]:
        found = data["quarantined"]
        shown = [[row["path"], str(row["line"] or ""), row["reason"]] for row in found[:_LISTED]]
        left = f" The first {_LISTED}; run.json lists them all." if len(found) > _LISTED else ""
        parts += [
            "## Quarantined",
            f"{len(found):,} images could not be decoded and were left out.{left}",
            markdown_table(["file", "line", "reason"], shown),
        ]
    notes = "\n".join(f"- {note}" for note in record["notes"])
    return "\n\n".join([*parts, "## Notes", notes or "Nothing was noted."]) + "\n"


def _drawn(settings: dict[str, Any]) -> str:
    """How images came into their splits, in a sentence."""
    how = "by patient" if settings["group"] == "patient" else "by image, so that a patient can be in two of them"
    folds = "" if settings["folds"] is None else f"; fold {settings['fold']} of {settings['folds']} is the test part"
    return f"Splits {how}, seed {settings['seed']}{folds}."
