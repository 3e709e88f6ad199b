"""The model card: the content of model.json for a reader, as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from covid_cls.io import DISCLAIMER
from covid_cls.models.names import strategy_label

_OVERALL = ("accuracy", "balanced_accuracy", "macro_auroc", "macro_f1", "nll", "brier")
_PER_CLASS = ("auroc", "average_precision", "sensitivity", "specificity", "ppv", "npv")


def model_card(record: dict[str, Any]) -> str:
    """Return MODEL_CARD.md for a record as written by `files.write_model_folder`.

    The sections follow Mitchell et al. 2019, "Model cards for model reporting".
    """
    task, view, operating = record["task"], record["preprocessing"], record["operating"]
    cuts = operating["thresholds"].items()
    thresholds = [(name, "undefined" if value is None else f"{value:.4g}") for name, value in cuts]
    scores = "\n\n".join(_scores(block, task["classes"]) for block in record["metrics"])
    synthetic = ["It was trained on synthetic radiographs. Its scores do not apply to real ones."]
    limits = [*(synthetic if record["data"]["name"] == "phantom" else []), *record["notes"]]
    bullets = "\n".join(f"- {limit}" for limit in limits or ["Training reported no limits. There may still be some."])
    seen = "" if view["seen"] == "whole" else f" As a baseline, the network sees only a part of it: {view['seen']}."
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""# {record["name"]}

**{DISCLAIMER}** {record["intended_use"]}

## Model

{markdown_table(("", ""), _model_rows(record))}

## Input

A frontal chest radiograph. It is converted to 8-bit grey levels (0 is black) and scaled to a short side of
{view["size"]} pixels. The central {view["crop"]} × {view["crop"]} pixels are normalised with mean {view["mean"]} and
standard deviation {view["sd"]} of grey levels in [0, 1].{seen}

## Decisions

Temperature {operating["temperature"]:.3g} and thresholds of the calibrated p({task["positive"]}), fitted to
{operating["n_images"]} validation images of {operating["n_patients"]} patients, which can leave one undefined:

{markdown_table(("threshold", "p(covid) at least"), thresholds)}

## Scores

{scores}

## Data

{_data(record)}

## Limits

{bullets}

## Licence and identity

Code: {record["licence"]["code"]}. {record["licence"]["weights"]}

{markdown_table(("digest", ""), [(name, f"`{digest}`") for name, digest in record["digests"].items()])}

Versions: {versions}.
"""


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table of plain texts, which may contain vertical bars and line breaks."""
    lines = [headers, ["---"] * len(headers), *rows]
    escaped = ([text.replace("|", "\\|").replace("\n", "<br>") for text in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _model_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    task, network, training = record["task"], record["network"], record["training"]
    head, used = network["head"], str(record["weights"]["used"])
    label = strategy_label({"name": network["strategy"], "freeze_until": network["freeze_until"]})
    trained = {"fc": "only its head", "partial": "its last stage and its head", "full": "all stages"}
    trained_part = trained.get(label, f"all stages after {network['freeze_until']}")
    hidden = f"{head['hidden']} hidden units, dropout {head['dropout']} in training"
    # Version 0.1.0 recorded no monitor and selected by the validation loss.
    value = training.get("monitor_value")
    monitor = training.get("monitor", "loss/val") + ("" if value is None else f" = {value:.4g}")
    return [
        ("task", f"{task['name']}: {', '.join(task['classes'])}; positive class {task['positive']}"),
        ("scores", "a sigmoid per class" if task["multilabel"] else "a softmax over the classes"),
        ("network", f"{network['backbone']}, trained: {trained_part}"),
        ("head", "one linear layer" if head["hidden"] is None else hidden),
        ("initial weights", {"none": "random", "imagenet": "ImageNet (torchvision IMAGENET1K_V1)"}.get(used, used)),
        ("loss, optimizer", f"{training['loss']}, {training['optimizer']}"),
        ("epochs", f"{training['epochs']}; epoch {training['best_epoch']} was selected by {monitor}"),
        ("seed, precision", f"{training['seed']}, {training['precision']}"),
        ("created", f"{record['created']} by covid_cls {record['versions']['covid_cls']}"),
    ]


def _scores(block: dict[str, Any], classes: Sequence[str]) -> str:
    scores = block["scores"]
    overall = [(name.replace("_", " "), _interval(scores.get(name))) for name in _OVERALL]
    rows = [(name, *(_interval(scores.get(f"{name}.{score}")) for score in _PER_CLASS)) for name in classes]
    return f"""### {block["on"]}: {block["n_images"]} images of {block["n_patients"]} patients

{block["note"]} Intervals are {block["level"]:.0%}, by patient; each image is assigned to its likeliest class.

{markdown_table(("score", "value"), overall)}

{markdown_table(("class", *(score.replace("_", " ") for score in _PER_CLASS)), rows)}"""


def _data(record: dict[str, Any]) -> str:
    data, classes = record["data"], record["task"]["classes"]
    splits, patients = data["images_per_split_and_class"], data["patients_per_split"]
    rows = [(split, *(str(n[name]) for name in classes), str(patients.get(split, 0))) for split, n in splits.items()]
    sources = ", ".join(f"{name} ({n})" for name, n in data["sources"].items())
    licences = ", ".join(f"{name or 'not stated'} ({n})" for name, n in record["licence"]["images"].items())
    return f"""{data["name"]}: {data["images"]} images of {data["patients"]} patients. Sources: {sources}.
Licences of the images: {licences}.

{markdown_table(("split", *(f"images of {name}" for name in classes), "patients"), rows)}"""


def _interval(score: dict[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "undefined"
    if score["low"] is None or score["high"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} ({score['low']:.3f}–{score['high']:.3f})"
