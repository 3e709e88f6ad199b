"""What is computed from the rounds, which settings are refused, and which images are used."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torchvision.datasets import ImageFolder

from covid_cls.benchmark import NOT_FOR_TRAIN, BenchmarkSettings, _for_train
from covid_cls.benchmarking import measure
from covid_cls.benchmarking.measure import (
    check_options,
    class_shares,
    count_flops,
    measure_growth,
    stage_images,
    staged_settings,
    usable_images,
)
from covid_cls.benchmarking.plain_loops import plain_network
from covid_cls.benchmarking.timing import step_flops
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.image_source import DataSettings
from covid_cls.errors import InputError
from covid_cls.io import Batch
from covid_cls.tasks import TASKS
from tests.benchmarking.small import epoch, found, result, settings, table_settings
from tools.soak.training import make_classifier

TASK = TASKS["three_class"]
SECONDS = ("write_seconds", "build_seconds", "reopen_seconds", "epoch_seconds")
FULL_SIZE = ("data.size=256", "preprocess.crop=224")


def test_a_result_is_the_median_of_its_rounds() -> None:
    made = result()
    assert made["ratio"] == {"median": 4.0, "least": 4.0, "most": 8.0}
    assert made["rounds"] == {"plain": [4, 3, 8], "ours": [1, 0.5, 1], "ratios": [4.0, 6.0, 8.0]}
    plain, ours = made["plain"], made["ours"]
    assert (plain["images_per_second"], ours["images_per_second"]) == (25.0, 100.0)
    assert plain["ms_per_image"] == {"data": 20.0, "forward": 10.0, "backward": 10.0}
    assert (plain["loader_images_per_second"], ours["loader_images_per_second"]) == (50.0, pytest.approx(1000.0))
    assert (plain["tflops"], ours["tflops"]) == (0.25, 0.5)
    assert made["bare"] == {"images_per_second": 125.0, "share": 0.8}
    assert made["to_epochs"]["plain"] == {"seconds": 20.0, "extrapolated": True}
    assert made["to_epochs"]["ours"]["extrapolated"] is False


def test_the_peak_is_the_best_of_all_rounds() -> None:
    made = result()
    assert made["peak_tflops"]["float32"] == {"matmul": 0.5, "convolution": 1.0}
    # Of 1.0 TFLOP/s in float32 and 2.0 in bfloat16.
    assert (made["plain"]["share_of_peak"], made["ours"]["share_of_peak"]) == (0.25, 0.25)


def test_on_a_gpu_the_parts_come_from_the_profile() -> None:
    measured = found()
    measured["plain"]["profile"], measured["ours"]["profile"] = epoch(10), epoch(2)
    made = result(measured)
    assert made["plain"]["ms_per_image"]["data"] == 50.0
    assert made["plain"]["images_per_second"] == 25.0
    assert any("waits for the GPU" in note for note in made["notes"])


def test_the_schema_lists_the_settings_that_train_does_not_have() -> None:
    assert set(settings()) - set(settings(config="train")) == {*BenchmarkSettings._fields, "plain"}
    plain = {f"plain.{name}" for name in settings()["plain"]}
    assert {*BenchmarkSettings._fields, *plain} < NOT_FOR_TRAIN


def test_settings_of_the_benchmark_are_not_passed_on_to_train() -> None:
    own = ["images=16", "plain.workers=2", "+keep=a.md", "output_root=x", "trainer.max_epochs=3"]
    others = ["data.images=16", "trainer=cpu", "image_every=1", "+data.workers=2"]
    assert _for_train([*own, *others]) == others


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("images=1", "images=1: must be an integer of at least 4"),
        ("images=5 task=three_class", "at least 6"),
        ("rounds=0", "rounds=0: must be an integer of at least 1"),
        ("epochs=-1", "epochs=-1: must be an integer of at least 0"),
        ("plain.workers=-1", r"plain\.workers=-1"),
        ("growth=[100,0]", "growth=0"),
        ("growth=[100,many]", "growth=many: must be an integer of at least 14"),
        ("growth=[]", r"growth=\[\]: give numbers"),
        ("trainer.devices=2", "measures one device"),
        ("trainer=ddp", "measures one device"),
    ],
)
def test_settings_out_of_range_are_refused(word: str, message: str) -> None:
    check_options(settings())
    with pytest.raises(InputError, match=message):
        check_options(settings(*word.split()))


@pytest.mark.slow(reason="each size is measured in separate processes")
def test_growth_records_are_complete_and_no_file_is_left(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    made = measure_growth(table_settings(cache, "task=three_class", "growth=[42,84]"), folder)
    assert [record["images"] for record in made["growth"]] == [42, 84]
    for record in made["growth"]:
        side = settings()["preprocess"]["crop"] + 20  # the margin in which augment=cxr rotates
        index = record["store_bytes"] - record["images"] * side * side  # and the header of the array
        assert 64 * record["images"] < index < 300 * record["images"]
        assert all(record[key] > 0 for key in SECONDS)
        train = record["images_per_second"] * record["epoch_seconds"]
        assert train == pytest.approx(record["images"] * 5 / 7)
        assert 50e6 < record["peak_bytes"] < 2e9
    assert list(folder.iterdir()) == []


def test_growth_beyond_the_disk_is_refused_before_anything_is_written(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"10,000,000,000 images need .* bytes and .* are free"):
        measure_growth(table_settings(cache, f"growth=[{10**10}]"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize(
    ("backbone", "strategy", "gflop"),
    [  # 224 x 224, three channels
        ("resnet18", "fc", 3.63),
        ("resnet18", "partial", 5.14),
        ("resnet18", "full", 10.65),
        ("vgg16", "partial", 35.34),
        ("vgg16", "full", 91.93),
    ],
)
def test_flop_of_a_step_of_the_plain_network(backbone: str, strategy: str, gflop: float) -> None:
    chosen = settings(*FULL_SIZE, f"backbone={backbone}", f"strategy={strategy}")
    # Without this, initialising the 138 million weights of a VGG16 takes seconds.
    with torch.device("meta"):
        network = plain_network(chosen)
    assert step_flops(network, torch.empty(2, 3, 224, 224)) / 1e9 == pytest.approx(gflop, rel=0.002)


def our_flops(chosen: dict[str, Any], x: torch.Tensor, stage: int) -> float:
    """Return the FLOP per image of our network, if `x` are its batches, which enter at `stage`."""
    batch = Batch(x, torch.zeros(len(x)), torch.arange(len(x)), stage)
    data = SimpleNamespace(train_dataloader=lambda: [batch])
    fit: Any = SimpleNamespace(data=data, to_device=lambda batch: batch, classifier=make_classifier(chosen))
    return count_flops(fit)


def test_one_channel_saves_two_thirds_of_the_first_convolution() -> None:
    chosen = settings(*FULL_SIZE, "strategy=partial")
    plain = step_flops(plain_network(chosen), torch.empty(2, 3, 224, 224))
    ours = our_flops(chosen, torch.empty(2, 1, 224, 224), 0)
    assert plain - ours == 2 * (2 * 64 * 7 * 7 * 112 * 112)


def test_with_cached_features_only_the_head_is_computed() -> None:
    hidden, out = 2 * 512 * 150, 2 * 150 * 2
    features = torch.empty(2, 512, dtype=torch.bfloat16)
    assert our_flops(settings(*FULL_SIZE, "strategy=fc"), features, 6) == 2 * (hidden + out) + out


@pytest.fixture(scope="module")
def table(cache: Path) -> pd.DataFrame:
    return usable_images(table_settings(cache, "task=three_class")["data"], TASK)


@pytest.mark.parametrize(
    ("counts", "total", "shares"),
    [
        ([124, 500, 500], 128, [14, 57, 57]),
        ([500, 124], 10, [8, 2]),
        ([1, 999], 10, [1, 9]),
        ([1, 1, 9998], 4, [1, 1, 2]),
        ([3, 5], 800, [300, 500]),
    ],
)
def test_shares_are_proportional_with_at_least_one_per_class(counts: list[int], total: int, shares: list[int]) -> None:
    assert class_shares(counts, total) == shares


def links(root: Path) -> dict[str, str]:
    paths = sorted(path for path in root.rglob("*") if path.is_symlink())
    return {path.relative_to(root).as_posix(): str(path.resolve()) for path in paths}


def test_the_same_seed_selects_the_same_files(table: pd.DataFrame, tmp_path: Path) -> None:
    staged = stage_images(table, TASK, 12, 6, tmp_path / "a")
    stage_images(table, TASK, 12, 6, tmp_path / "b")
    stage_images(table, TASK, 12, 6, tmp_path / "c", seed=1)
    assert links(tmp_path / "a") == links(tmp_path / "b") != links(tmp_path / "c")
    assert staged == {"images": 12, "distinct": 12, "per_class": {"covid": 4, "normal": 4, "pneumonia": 4}}
    labels = dict(zip(table["file"].map(lambda f: str(Path(f).resolve())), table["label"], strict=True))
    for name, file in links(tmp_path / "a").items():
        assert labels[file] == name.split("/")[1]
    splits = Counter(name.split("/")[0] for name in links(tmp_path / "a"))
    assert splits == {"train": 12, "val": 6, "test": 6}
    # No file is in two splits if there are enough files.
    assert len(set(links(tmp_path / "a").values())) == 24


def test_files_are_repeated_if_there_are_too_few(table: pd.DataFrame, tmp_path: Path) -> None:
    staged = stage_images(table, TASK, 96, 3, tmp_path / "images")
    assert (staged["images"], staged["distinct"]) == (96, 48)
    train = {name: file for name, file in links(tmp_path / "images").items() if name.startswith("train")}
    assert len(train) == 96
    assert set(Counter(train.values()).values()) == {2}


def test_without_a_number_all_images_are_used(table: pd.DataFrame, tmp_path: Path) -> None:
    assert stage_images(table, TASK, None, 3, tmp_path / "images")["distinct"] == len(table) == 48


def test_both_sides_train_on_the_same_files(table: pd.DataFrame, cache: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    stage_images(table, TASK, 12, 6, images)
    chosen = staged_settings(table_settings(cache, "task=three_class"), images, tmp_path / "cache", 2)
    data = Radiographs(TASK, 48, 0, DataSettings(**chosen["data"]))
    ours = set(data.table.loc[data.table["split"] == "train", "file"])
    samples = ImageFolder(str(images / "train")).samples
    assert ours == {str(Path(file)) for file, _ in samples}
    assert tuple(ImageFolder(str(images / "train")).classes) == TASK.classes


def test_a_file_that_the_plain_loop_would_ignore_is_named(tmp_path: Path) -> None:
    for name in ("covid/a.png", "normal/b.dcm"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot read 1 files: normal/b\.dcm"):
        usable_images({"kind": "folder", "root": str(tmp_path)}, TASKS["binary"])


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "covid").mkdir()
    (tmp_path / "covid" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="no image of normal"):
        usable_images({"kind": "folder", "root": str(tmp_path)}, TASKS["binary"])


def test_a_large_product_reaches_a_plausible_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(256, 256)
    assert 1e-4 < measure._tflops(torch.matmul, a, a) < 100
