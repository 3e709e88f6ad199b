"""Both sides read the same files, drawn in class proportion."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from torchvision.datasets import ImageFolder

from covid_cls.data.datamodule import Radiographs
from covid_cls.errors import InputError
from covid_cls.labels import TASKS
from covid_cls.speed.ours import staged_settings
from covid_cls.speed.staging import class_shares, stage_images, usable_images
from tests.speed.small import table_settings

TASK = TASKS["three_class"]


@pytest.fixture(scope="module")
def table(cache: Path) -> pd.DataFrame:
    return usable_images(table_settings(cache, "task=three_class")["data"], TASK)


@pytest.mark.parametrize(
    ("counts", "total", "shares"),
    [
        ([124, 500, 500], 128, [14, 57, 57]),
        ([500, 124], 10, [8, 2]),
        ([1, 999], 10, [1, 9]),  # no class is left out
        ([1, 1, 9998], 4, [1, 1, 2]),
        ([3, 5], 800, [300, 500]),  # more than there are
    ],
)
def test_shares_are_proportional_and_sum_up(counts: list[int], total: int, shares: list[int]) -> None:
    assert class_shares(counts, total) == shares


def links(root: Path) -> dict[str, str]:
    found = sorted(path for path in root.rglob("*") if path.is_symlink())
    return {path.relative_to(root).as_posix(): str(path.resolve()) for path in found}


def test_the_same_seed_stages_the_same_files(table: pd.DataFrame, tmp_path: Path) -> None:
    staged = stage_images(table, TASK, 12, 6, tmp_path / "a")
    stage_images(table, TASK, 12, 6, tmp_path / "b")
    stage_images(table, TASK, 12, 6, tmp_path / "c", seed=1)
    assert links(tmp_path / "a") == links(tmp_path / "b") != links(tmp_path / "c")
    assert staged.per_class == {"covid": 4, "normal": 4, "pneumonia": 4}
    assert staged.distinct == staged.images == 12
    labels = dict(zip(table["file"].map(lambda f: str(Path(f).resolve())), table["label"], strict=True))
    for name, file in links(tmp_path / "a").items():
        assert labels[file] == name.split("/")[1]
    splits = Counter(name.split("/")[0] for name in links(tmp_path / "a"))
    assert splits == {"train": 12, "val": 6, "test": 6}
    assert len(set(links(tmp_path / "a").values())) == 24  # no file in two splits while there are enough


def test_files_are_repeated_where_there_are_too_few(table: pd.DataFrame, tmp_path: Path) -> None:
    staged = stage_images(table, TASK, 96, 3, tmp_path / "images")
    assert (staged.images, staged.distinct) == (96, 48)
    train = {name: file for name, file in links(tmp_path / "images").items() if name.startswith("train")}
    assert len(train) == 96
    assert set(Counter(train.values()).values()) == {2}


def test_all_images_are_taken_without_a_number(table: pd.DataFrame, tmp_path: Path) -> None:
    assert stage_images(table, TASK, None, 3, tmp_path / "images").distinct == len(table) == 48


def test_both_sides_train_on_the_same_files(table: pd.DataFrame, cache: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    stage_images(table, TASK, 12, 6, images)
    settings = staged_settings(table_settings(cache, "task=three_class"), images, tmp_path / "cache", 2)
    data = Radiographs(TASK, 48, 0, **settings["data"])
    ours = set(data.table.loc[data.table["split"] == "train", "file"])
    samples = ImageFolder(str(images / "train")).samples
    assert ours == {str(Path(file)) for file, _ in samples}
    assert tuple(ImageFolder(str(images / "train")).classes) == TASK.classes


def test_a_file_that_the_plain_loop_passes_over_is_named(tmp_path: Path) -> None:
    for name in ("covid/a.png", "normal/b.dcm"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"normal/b\.dcm: the plain loop cannot read"):
        usable_images({"kind": "folder", "root": str(tmp_path)}, TASKS["binary"])


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "covid").mkdir()
    (tmp_path / "covid" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="no image of normal"):
        usable_images({"kind": "folder", "root": str(tmp_path)}, TASKS["binary"])
