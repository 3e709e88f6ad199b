"""Planted copies are found, and radiographs of different patients are not mistaken for copies."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from covid_cls.data.datamodule import decode_images
from covid_cls.data.image_source import ImageSource
from covid_cls.data.manifest import read_manifest
from covid_cls.shortcuts.data_audit import AuditedData, find_copies, load_audited_data
from covid_cls.shortcuts.duplicates import KINDS, content_side, duplicate_groups, find_pairs
from covid_cls.tasks import TASKS
from tests.conftest import ROOT
from tests.shortcuts.planting import EXACT, NUMBERS, one_per_patient, plant_copies

REAL = ROOT.parent / "shared" / "cxr"
SECTION = {
    **dict.fromkeys(("path", "root", "folds")),
    **{
        "kind": "manifest",
        "size": 256,
        "seed": 0,
        "group": "patient",
        "val_share": 0.15,
        "test_share": 0.15,
        "fold": 0,
    },
}


def load_data(manifest: Path, cache: Path) -> AuditedData:
    return load_audited_data(TASKS["three_class"], {**SECTION, "path": str(manifest), "cache": str(cache)})


def measure(distinct: pd.DataFrame, folder: Path, cache: Path) -> tuple[Counter[str], list[str], pd.DataFrame]:
    """Return the number of copies found of each kind, the pairs of different patients, and all pairs."""
    manifest, planted = plant_copies(distinct, folder)
    data = load_data(manifest, cache)
    pairs = find_copies(data)
    paths = data.table["path"]
    linked = {path: k for k, rows in enumerate(duplicate_groups(pairs, paths.index.to_numpy())) for path in paths[rows]}
    found = Counter(kind for one, other, kind in planted if one in linked and linked[one] == linked.get(other))
    true = {path: original for original, copy, _ in planted for path in (original, copy)}
    false = [
        f"{paths[first]} {paths[second]} {likeness}"
        for first, second, likeness in zip(pairs["first"], pairs["second"], pairs["likeness"], strict=True)
        if true.get(paths[first], paths[first]) != true.get(paths[second], paths[second])
    ]
    return found, false, pairs


def check(found: Counter[str], false: list[str], distinct: int) -> None:
    exact = {kind: found[kind] for kind in EXACT}
    assert exact == {kind: NUMBERS[kind] for kind in EXACT}
    assert found.total() - sum(exact.values()) >= 55, found
    assert len(false) <= 0.01 * distinct, false


@pytest.fixture(scope="module")
def phantoms(cache: Path) -> pd.DataFrame:
    return ImageSource("phantom", images=450, phantom_seed=3, cache=str(cache)).read_table()


def test_planted_copies_are_found_and_different_patients_are_not(
    phantoms: pd.DataFrame, cache: Path, tmp_path: Path
) -> None:
    distinct = one_per_patient(phantoms, 140)
    found, false, pairs = measure(distinct, tmp_path, cache)
    check(found, false, len(distinct))
    assert set(pairs["kind"]) == set(KINDS)
    assert (pairs["first"] < pairs["second"]).all()
    assert pairs["likeness"].between(0.8, 1).all()


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/cxr is not available")
def test_planted_copies_of_real_radiographs_are_found(cache: Path, tmp_path: Path) -> None:
    distinct = one_per_patient(read_manifest(REAL / "darkcovidnet" / "manifest.csv"), 500)
    found, false, _ = measure(distinct, tmp_path, cache)
    check(found, false, len(distinct))


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/cxr is not available")
def test_a_case_published_twice_is_found_under_both_its_patients(cache: Path) -> None:
    table = read_manifest(REAL / "imbalanced" / "manifest.csv")
    table = table[table["source"] == "ieee8023"].reset_index(drop=True)
    store, table, _ = decode_images(table, size=256, canvas=256, cache=cache, on_bad_image="stop")
    pairs = find_pairs(store.images, table["sha256"], cache, store.digest)
    names = table["patient_id"]
    met = {tuple(sorted((names[a], names[b]))) for a, b in zip(pairs["first"], pairs["second"], strict=True)}
    assert {("ieee-178", "ieee-97"), ("ieee-201", "ieee-78")} <= met
    assert len(pairs) < 0.05 * len(table)


def random_images(number: int, side: int = 256, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 256, (number, side, side), dtype=np.uint8)


def test_files_with_equal_pixels_are_copies(tmp_path: Path) -> None:
    images = random_images(4)
    images[3] = images[1]
    found = find_pairs(images, pd.Series(["a", "b", "a", "d"]), tmp_path, "key")
    assert found.to_dict("records") == [
        {"first": 0, "second": 2, "kind": "bytes", "likeness": 1.0},
        {"first": 1, "second": 3, "kind": "pixels", "likeness": 1.0},
    ]


def test_only_the_given_rows_are_searched(tmp_path: Path) -> None:
    images = random_images(3)
    images[:] = images[0]
    found = find_pairs(images, pd.Series(["a", "b"], index=[0, 2]), tmp_path, "key")
    assert list(found[["first", "second"]].iloc[0]) == [0, 2]
    assert len(found) == 1


def test_the_result_of_a_search_is_cached(tmp_path: Path) -> None:
    images = random_images(3)
    hashes = pd.Series(["a", "b", "c"])
    assert find_pairs(images, hashes, tmp_path, "key").empty
    (kept,) = (tmp_path / "audits").iterdir()
    kept.write_text("first,second,kind,likeness\n0,2,near,0.9\n", encoding="utf-8")
    assert len(find_pairs(images, hashes, tmp_path, "key")) == 1  # read from the cache
    assert find_pairs(images, hashes, tmp_path, "other content").empty


def test_small_images_are_only_compared_by_pixels(tmp_path: Path) -> None:
    images = random_images(4, side=64)
    images[1] = images[0] // 2 + 20  # another contrast
    images[3] = images[2]
    found = find_pairs(images, pd.Series(list("abcd")), tmp_path, "key")
    assert found[["first", "second", "kind"]].to_numpy().tolist() == [[2, 3, "pixels"]]


def test_the_content_is_found_within_black_margins() -> None:
    images = np.zeros((2, 312, 312), np.uint8)
    images[0, 28:284, 10:300] = 90
    images[1, 0:312, 28:284] = 90
    assert content_side(images, np.arange(2)) == 256


def test_pairs_that_share_an_image_are_one_group() -> None:
    pairs = pd.DataFrame({"first": [10, 12, 30], "second": [12, 20, 31]})
    found = duplicate_groups(pairs, np.array([10, 12, 20, 30, 31, 40]))
    assert [rows.tolist() for rows in found] == [[10, 12, 20], [30, 31]]
    assert duplicate_groups(pairs.head(0), np.array([1, 2])) == []
