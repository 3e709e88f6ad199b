"""Run folders like those of `train`, with random predictions in place of those of a network."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from covid_cls.io import prediction_columns, write_predictions
from covid_cls.tasks import TASKS, Task

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "output_root": "outputs",
    "name": "sweep",
    "rerun": False,
    "test": True,
    "feature_cache": "off",
    "head": {"hidden": 150, "dropout": 0.5},
    "preprocess": {"size": 256, "crop": 224, "seen": "whole"},
    "task": {"name": "three_class"},
    "data": {
        "kind": "manifest",
        "path": "sets/demo/manifest.csv",
        "seed": 0,
        "group": "patient",
        "folds": None,
        "fold": 0,
    },
    "backbone": {"name": "resnet18", "weights": "none"},
    "strategy": {"name": "fc", "freeze_until": None},
    "loss": {"name": "ce"},
    "augment": {"name": "cxr", "rotation": 10.0},
    "optimizer": {"name": "sgd", "lr": 0.02},
}


def changed(**words: Any) -> dict[str, Any]:
    """Return SETTINGS with some values replaced; `__` replaces the dot of a nested key."""
    settings: dict[str, Any] = json.loads(json.dumps(SETTINGS))
    for word, value in words.items():
        *path, last = word.split("__")
        section = settings
        for key in path:
            section = section[key]
        section[last] = value
    return settings


def predictions(
    task: Task, n: int = 60, skill: float = 2.0, seed: int = 0, fold: str = "", of: int = 1
) -> pd.DataFrame:
    """Return the predictions table of a test split.

    Args:
        task: Task of the table.
        n: Number of images; each patient has two.
        skill: By how much the logit of the true class is larger on average.
        seed: Random seed of the logits. Images, patients, labels and folds depend on n only.
        fold: Number of the fold that is returned, "" for all images.
        of: Number of folds.
    """
    rng = np.random.default_rng([seed, round(100 * skill)])
    k = np.arange(n)
    truth = (k // 2) % len(task.classes)
    targets = np.array(task.targets)[truth]
    logit = rng.normal(size=(n, len(task.classes))) + skill * targets
    prob = 1 / (1 + np.exp(-logit)) if task.multilabel else np.exp(logit) / np.exp(logit).sum(axis=1, keepdims=True)
    table = pd.DataFrame({"image_id": [f"i{i:04d}" for i in k], "patient_id": [f"p{i // 2:04d}" for i in k]})
    table["source"] = np.where(truth == 0, "hospital_a", "hospital_b")
    table["split"], table["fold"] = "test", fold
    table["label"] = [task.classes[t] for t in truth]
    for c, name in enumerate(task.classes):
        table[f"logit_{name}"], table[f"prob_{name}"] = logit[:, c], prob[:, c]
    table = table[prediction_columns(task.classes)]
    return table[(k // 2) % of == int(fold)] if fold else table


def write_run(
    root: Path,
    settings: dict[str, Any],
    *,
    table: pd.DataFrame | None = None,
    skill: float = 2.0,
    images: int = 60,
    status: str = "finished",
    baselines: dict[str, float] | None = None,
    **facts: Any,
) -> Path:
    """Write a run folder below `root` and return its path.

    Args:
        root: Folder of the sweep.
        settings: Configuration of the run, see `changed`.
        table: Test predictions; None for random ones with `skill`.
        skill: See `predictions`.
        images: Number of test images.
        status: Status in run.json.
        baselines: Skill of each baseline and perturbation test by its name.
        **facts: Other entries of run.json.
    """
    task, data = TASKS[settings["task"]["name"]], settings["data"]
    folds = data["folds"] or 1
    fold = str(data["fold"]) if data["folds"] else ""
    configuration = [settings[key]["name"] for key in ("backbone", "strategy", "loss")]
    place = [data["group"], settings["preprocess"].get("seen", "whole"), f"s{settings['seed']}", f"f{fold}"]
    folder = root / "-".join([task.name, *configuration, *place])
    folder.mkdir(parents=True)
    record = {
        "status": status,
        "config": settings,
        "digests": {"config": "c", "data": "d", "training": "1"},
        "weights": {"used": "none", "sha256": None},
        "freeze": [
            {"stage": "stem", "parameters": 90, "trainable": 0},
            {"stage": "head", "parameters": 10, "trainable": 10},
        ],
        "notes": ["random weights"],
        "device": {"gpu": None, "machine": "x86_64", "threads": 2},
        "versions": {"torch": "2.15.0"},
        "ended": "2026-11-24T20:09:25+00:00",
        "seconds": 12.5,
        **facts,
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    options = {"skill": skill, "seed": settings["seed"], "fold": fold, "of": folds, "n": images}
    if status == "finished":
        write_predictions(predictions(task, **options) if table is None else table, folder / "predictions-test.csv")
        val = predictions(task, n=40, skill=skill, seed=1000 + settings["seed"]).assign(split="val")
        write_predictions(val, folder / "predictions-val.csv")
        epochs = pd.DataFrame({"epoch": [1, 2, 3], "loss/train": [1.0, 0.7, 0.5], "loss/val": [1.1, 0.8, 0.7]})
        epochs.to_csv(folder / "history.csv", index=False)
    for name, baseline_skill in (baselines or {}).items():
        write_predictions(
            predictions(task, **{**options, "skill": baseline_skill, "seed": 77}),
            folder / "baselines" / f"{name}-test.csv",
        )
    return folder


def write_grid(root: Path, **words: Any) -> None:
    """Write 2 backbones x 2 strategies x 2 losses x 2 seeds, each with baselines; `words` are passed to `write_run`."""
    levels = product(enumerate(("resnet18", "vgg16")), enumerate(("fc", "full")), enumerate(("ce", "focal")), (0, 1))
    for (b, backbone), (s, strategy), (e, loss), seed in levels:
        settings = changed(backbone__name=backbone, strategy__name=strategy, loss__name=loss, seed=seed)
        skill = 1.0 + b + s + 0.1 * e
        write_run(root, settings, skill=skill, baselines={"frame": 0.5, "majority": 0.0}, **words)
