"""The settings of a data set: names, the cache folder, and which keys of the configuration are accepted."""

from pathlib import Path
from typing import Any

import pytest

from covid_cls.data.image_source import EXTERNAL_SETTINGS, DataSettings, ImageSource
from covid_cls.errors import InputError
from covid_cls.runtime.schema import check_section


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kind": "phantom"}, "phantom"),
        ({"kind": "folder", "root": "sets/x-rays"}, "x-rays"),
        ({"kind": "manifest", "path": "sets/x-rays/manifest.csv"}, "x-rays"),
    ],
)
def test_name_of_a_data_set(settings: dict[str, Any], name: str) -> None:
    assert ImageSource(**settings).name == name


def test_the_cache_folder_is_the_given_or_the_default_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COVID_CLS_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/me")
    assert ImageSource("phantom").cache_folder == tmp_path
    assert ImageSource("phantom", cache="~/cache").cache_folder == Path("/home/me/cache")


def test_an_image_source_takes_its_settings_from_a_section() -> None:
    section = {"kind": "manifest", "path": "a.csv", "cache": None, "size": 48, "fold": 2}
    assert ImageSource.from_settings(section) == ImageSource("manifest", path="a.csv")
    assert DataSettings.from_settings(section) == DataSettings("manifest", path="a.csv", size=48, fold=2)


def test_settings_of_external_images_are_settings_of_a_data_set() -> None:
    assert set(EXTERNAL_SETTINGS) <= set(DataSettings.__dataclass_fields__)
    assert "seed" not in EXTERNAL_SETTINGS


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"pathh": "a.csv"}, r"data\.pathh: no such setting; data takes batch_size, .*, workers"),
        ({"task": "binary"}, r"data\.task: no such setting"),
        ({"images": "many"}, r"data\.images=many: expected int"),
        ({"val_share": "0.2"}, r"data\.val_share=0\.2: expected float"),
    ],
)
def test_a_misspelt_key_or_a_wrong_type_is_rejected(section: dict[str, Any], message: str) -> None:
    check_section("data", DataSettings, {"kind": "phantom", "path": None, "val_share": 0, "folds": 5})
    with pytest.raises(InputError, match=message):
        check_section("data", DataSettings, section)
