"""Every option of conf/ composes, and every section fits the constructor that takes it."""

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from covid_cls.models.backbones import BACKBONES, STRATEGIES
from covid_cls.models.losses import LOSSES
from covid_cls.runtime.cli import conf_folder
from covid_cls.runtime.schema import check_section
from covid_cls.tasks import TASKS
from covid_cls.training.optimizers import build_optimizer
from covid_cls.training.settings import SECTIONS

CONF = conf_folder()
GROUPS = ("task", "data", "backbone", "strategy", "loss", "augment", "optimizer", "scheduler", "trainer", "logger")
OPTIONS = {
    group: [path.stem for path in sorted((CONF / group).glob("*.yaml")) if path.stem != "base"]
    for group in (*GROUPS, "callbacks")
}
RECIPES = [
    path.relative_to(CONF / "experiment").with_suffix("").as_posix()
    for path in sorted((CONF / "experiment").rglob("*.yaml"))
    if path.stem != "base"
]


@cache
def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides))
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def assert_fits(settings: dict[str, Any]) -> None:
    for name, constructor in SECTIONS.items():
        section = {key: None if value == "???" else value for key, value in settings[name].items()}
        check_section(name, constructor, section)
    for section in (settings["trainer"], settings["logger"], *settings["callbacks"].values()):
        if section:
            known = inspect.signature(get_class(section["_target_"])).parameters
            assert set(section) - {"_target_"} <= set(known)


@pytest.mark.parametrize("row", range(max(len(names) for names in OPTIONS.values())))
def test_each_option_fits_its_constructor(row: int) -> None:
    """Every option is in one of the rows at least: the groups are composed together, which saves most compositions."""
    chosen = {group: names[row % len(names)] for group, names in OPTIONS.items()}
    settings = composed(*(f"{group}={name}" for group, name in chosen.items()))
    assert_fits(settings)
    for group in ("task", "backbone", "strategy"):
        assert settings[group]["name"] == chosen[group]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_fits_and_is_not_ignored(recipe: str) -> None:
    plain, settings = composed(), composed(f"experiment={recipe}")
    assert_fits(settings)
    # The grid sets Hydra's sweeper and leaves the cell alone; the others must change it.
    assert (settings == plain) == (recipe == "grid")


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_opens_with_its_command(recipe: str) -> None:
    head = (CONF / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8").split("defaults:")[0]
    assert f"experiment={recipe}" in head
    assert "Selected on" in head or "that selects" in head or recipe.startswith("original_part2")


def test_options_are_those_of_the_code() -> None:
    names = {group: {path.stem for path in (CONF / group).glob("*.yaml")} for group in GROUPS}
    assert names["backbone"] == set(BACKBONES)
    assert names["strategy"] == set(STRATEGIES)
    assert names["loss"] == {*LOSSES, "weighted_ce"}
    assert names["task"] == set(TASKS)


def test_the_original_protocol_is_the_published_one() -> None:
    part1, part2 = composed("experiment=original_part1/fc"), composed("experiment=original_part2/focal")
    assert part1["task"]["name"] == "binary"
    assert part1["preprocess"] == {"size": 256, "crop": 224, "mean": 0.4905, "sd": 0.2494, "seen": "whole"}
    assert part2["preprocess"] == {"size": 256, "crop": 224, "mean": 0.4924, "sd": 0.2491, "seen": "whole"}
    for settings in (part1, part2):
        assert settings["data"]["batch_size"] == 32
        assert settings["augment"] == {"name": "original", "rotation": 30.0, "mirror": 0.5}
        assert settings["optimizer"]["lr"] == 1e-5
        assert settings["optimizer"]["momentum"] == 0.9
        assert settings["trainer"]["max_epochs"] == 50
        assert settings["callbacks"]["early_stopping"] is None
        assert settings["callbacks"]["best_checkpoint"]["monitor"] == "loss/val"
        rule = {k: settings["scheduler"][k] for k in ("monitor", "factor", "threshold", "max_lr")}
        assert rule == {"monitor": "accuracy/val", "factor": 10.0, "threshold": 0.004, "max_lr": 0.1}
    assert part2["task"]["name"] == "three_class_multilabel"
    assert part2["loss"] == {"name": "focal", "gamma": 2.0, "alpha": "inverse_frequency"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"lr_typo": 1.0}, "optimizer.lr_typo: no such setting"),
        ({"lr": "fast"}, "optimizer.lr=fast: expected float"),
        ({"nesterov": 1}, "optimizer.nesterov=1: expected bool"),
    ],
)
def test_a_misspelt_key_or_a_wrong_type_is_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        check_section("optimizer", build_optimizer, section)


HELPED = sorted(path.stem for path in Path(CONF).glob("*.yaml"))


@pytest.mark.parametrize("command", HELPED)
def test_help_explains_each_key_of_its_command(command: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = compose(command, return_hydra_config=True).hydra.runtime.choices["hydra/help"]
    template = OmegaConf.to_container(OmegaConf.load(CONF / "hydra" / "help" / f"{chosen}.yaml"))["template"]  # type: ignore[index, call-overload]
    own = OmegaConf.load(CONF / f"{command}.yaml")
    assert isinstance(own, DictConfig)
    words = set(re.findall(r"[\w.]+", template.partition("$CONFIG")[0]))
    words |= {word.partition(".")[0] for word in words}
    assert {str(key) for key in own if key not in ("defaults", "hydra")} <= words
    assert f"python -m covid_cls.{command} " in template
    assert all(len(line) <= 120 for line in template.splitlines())
    named = set(re.findall(r"python -m covid_cls\.(\w+)", template))
    assert all((CONF / f"{name}.yaml").is_file() for name in named)


def test_no_configuration_names_our_own_code() -> None:
    """`_target_` is for third parties: what is ours is assembled in code that an editor can follow."""
    targets = [
        line.split(":", 1)[1].strip()
        for path in Path(CONF).rglob("*.yaml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith("_target_:")
    ]
    own = {target for target in targets if not target.startswith("pytorch_lightning.")}
    assert own == {"covid_cls.runtime.sweep.SweepStart"}  # Hydra tells of a multirun's start in no other way
    assert len(targets) > 1
