"""Sets of several sizes are written, opened, trained from and removed, and the records say what was done."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from covid_cls.data.manifest import read_manifest
from covid_cls.data.readers import read_image
from covid_cls.data.store import hash_files
from covid_cls.errors import InputError
from covid_cls.speed.growth import AUGMENT, measure_growth, write_set

CONF = Path(__file__).parents[2] / "conf"
SECONDS = ("write_seconds", "build_seconds", "reopen_seconds", "epoch_seconds")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return read_manifest(write_set(tmp_path_factory.mktemp("set"), 1030, 68))


@pytest.mark.slow(reason="each size is measured in a process of its own")
def test_records_say_what_was_measured_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    records = measure_growth([40, 80], folder, size=48, canvas=68, crop=48, batch_size=8)
    assert [record["images"] for record in records] == [40, 80]
    for record in records:
        pixels = record["images"] * 68 * 68
        index = record["store_bytes"] - pixels  # and the array's header
        assert 64 * record["images"] < index < 300 * record["images"]
        assert all(record[key] > 0 for key in SECONDS)
        train = record["images_per_second"] * record["epoch_seconds"]
        assert train == pytest.approx(0.7 * record["images"], rel=0.1)
        if Path("/proc/self/status").is_file():
            assert 50e6 < record["resident_bytes"] <= record["peak_bytes"] < 2e9
    assert list(folder.iterdir()) == []


def test_every_file_has_bytes_of_its_own_and_can_be_read(table: pd.DataFrame, tmp_path: Path) -> None:
    assert len(table) == 1030
    assert len(set(hash_files(table, tmp_path))) == 1030
    assert table["label"].value_counts().min() > 300
    for row in (0, 24, 1029):  # readers check the sums of all chunks
        assert read_image(Path(table["file"][row])).shape == read_image(Path(table["file"][row % 24])).shape
    assert not np.array_equal(*(read_image(Path(table["file"][row]))[:250, :250] for row in (0, 1)))


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"10,000,000,000 images need .* bytes and .* are free"):
        measure_growth([10**10], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_augmentation_is_the_default_one() -> None:
    written = OmegaConf.to_container(OmegaConf.load(CONF / "augment" / "cxr.yaml"))
    assert written == {"mirror": 0.0, **AUGMENT}
