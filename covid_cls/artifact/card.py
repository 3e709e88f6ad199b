"""The model card: what is in model.json, for a reader."""

from collections.abc import Iterable, Sequence
from typing import Any

from covid_cls.records import DISCLAIMER

_SHOWN = ("accuracy", "balanced_accuracy", "macro_auroc", "macro_f1", "nll", "brier")
_OF_A_CLASS = ("auroc", "average_precision", "sensitivity", "specificity", "ppv", "npv")


def model_card(record: dict[str, Any]) -> str:
    """MODEL_CARD.md, made of a model's record alone; see `artifact.record.model_record`.

    After Mitchell et al. 2019, "Model cards for model reporting": details, intended use, data, metrics, limits.
    """
    task, network, view = record["task"], record["network"], record["preprocessing"]
    operating, training = record["operating"], record["training"]
    parts = [
        f"# {record['name']}",
        f"**{DISCLAIMER}** {record['intended_use']}",
        "## Model",
        markdown_table(
            ("", ""),
            [
                ("task", f"{task['name']}: {', '.join(task['classes'])}; positive class {task['positive']}"),
                ("scores", "a sigmoid per class" if task["multilabel"] else "a softmax over the classes"),
                ("network", f"{network['backbone']}, trained {_depth(network)}"),
                ("head", _head(network["head"])),
                ("starting weights", _weights(record["weights"])),
                ("loss, optimizer", f"{training['loss']}, {training['optimizer']}"),
                ("epochs", f"{training['epochs']}; number {training['best_epoch']} was selected by validation loss"),
                ("seed, precision", f"{training['seed']}, {training['precision']}"),
                ("made", f"{record['created']} by covid_cls {record['versions']['covid_cls']}"),
            ],
        ),
        "## What it expects of an image",
        f"A frontal chest radiograph. It is read as 8-bit grey (0 is black), scaled to a short side of {view['size']} "
        f"pixels, cut to the {view['crop']} × {view['crop']} pixels in its middle and normalised with mean "
        f"{view['mean']} and standard deviation {view['sd']} of grey levels in [0, 1]{_seen(view['seen'])}.",
        "## Decisions",
        f"Temperature {operating['temperature']:.3g} and thresholds of the calibrated p({task['positive']}), fitted to "
        f"{operating['n_images']} validation images of {operating['n_patients']} patients:",
        markdown_table(
            ("threshold", "p(covid) at least"), [(name, _number(cut)) for name, cut in operating["thresholds"].items()]
        ),
        "## Scores",
        *(part for block in record["metrics"] for part in _metrics(block, task["classes"])),
        "## Data",
        *_data(record),
        "## What limits this",
        _bullets(_limits(record)),
        "## Licence and identity",
        f"Code: {record['licence']['code']}. {record['licence']['weights']}",
        markdown_table(("digest", ""), [(k, f"`{v}`") for k, v in record["digests"].items()]),
        f"Versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}.",
    ]
    return "\n\n".join(parts) + "\n"


def _depth(network: dict[str, Any]) -> str:
    if network["freeze_until"]:
        return f"behind {network['freeze_until']}"
    return {"fc": "in its head alone", "partial": "in its last block and head", "full": "as a whole"}[
        network["strategy"]
    ]


def _head(head: dict[str, Any]) -> str:
    if head["hidden"] is None:
        return "one linear layer"
    return f"{head['hidden']} hidden units, dropout {head['dropout']} in training"


def _weights(weights: dict[str, Any]) -> str:
    used = str(weights["used"])
    return {"none": "random", "imagenet": "ImageNet (torchvision IMAGENET1K_V1)"}.get(used, used)


def _seen(seen: str) -> str:
    return "" if seen == "whole" else f"; of that it sees {seen} alone, as a probe"


def _metrics(block: dict[str, Any], classes: Sequence[str]) -> list[str]:
    overall = [(name.replace("_", " "), _interval(block["scores"].get(name))) for name in _SHOWN]
    rows = [(name, *(_interval(block["scores"].get(f"{name}.{score}")) for score in _OF_A_CLASS)) for name in classes]
    counts = f"{block['n_images']} images of {block['n_patients']} patients"
    return [
        f"### {block['on']}: {counts}",
        f"{block['note']} Intervals are {block['level']:.0%}, by patient; decisions are for the likeliest class.",
        markdown_table(("score", "value"), overall),
        markdown_table(("class", *(score.replace("_", " ") for score in _OF_A_CLASS)), rows),
    ]


def _data(record: dict[str, Any]) -> list[str]:
    data, classes = record["data"], record["task"]["classes"]
    splits = data["images_per_split_and_class"]
    patients = data["patients_per_split"]
    rows = [(split, *(str(n[name]) for name in classes), str(patients.get(split, 0))) for split, n in splits.items()]
    sources = ", ".join(f"{name} ({n})" for name, n in data["sources"].items())
    licences = ", ".join(f"{name or 'not stated'} ({n})" for name, n in record["licence"]["images"].items())
    return [
        f"{data['name']}: {data['images']} images of {data['patients']} patients. Sources: {sources}. "
        f"Licences of the images: {licences}.",
        markdown_table(("split", *(f"images of {name}" for name in classes), "patients"), rows),
    ]


def _limits(record: dict[str, Any]) -> list[str]:
    drawn = ["Trained on drawn radiographs: its scores say nothing about real ones."]
    notes = [*(drawn if record["data"]["name"] == "phantom" else []), *record["notes"]]
    return notes or ["Nothing was noted in training, which is no proof that there is nothing."]


def _interval(score: dict[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "undefined"
    if score["low"] is None or score["high"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} ({score['low']:.3f}–{score['high']:.3f})"


def _number(value: float | None) -> str:
    return "none could be chosen" if value is None else f"{value:.4g}"


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of plain texts, which may hold bars and line breaks."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", "<br>")
