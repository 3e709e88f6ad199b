"""Phantoms are reproducible and complete, and only their lungs depend on the class."""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from covid_cls.data.drawing import MIN_CHEST, SITES, Opacity, draw_radiograph, draw_vessels
from covid_cls.data.phantoms import COLUMNS, build_phantoms
from covid_cls.errors import InputError
from covid_cls.tasks import CLASSES


def rows_of(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels_of(folder: Path, row: dict[str, str]) -> np.ndarray:
    with Image.open(folder / row["path"]) as image:
        assert image.format == "PNG"
        assert image.mode == "L"
        return np.asarray(image)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_phantoms(tmp_path_factory.mktemp("clean"), images=48, seed=3).parent


@pytest.fixture(scope="module")
def rows(clean: Path) -> list[dict[str, str]]:
    return rows_of(clean / "manifest.csv")


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (build_phantoms(tmp_path / name, images=24, seed=1).parent for name in "ab")
    assert contents(first) == contents(second)
    # Images, masks and the manifest: no temporary file is left.
    assert len(contents(first)) == 2 * 24 + 1


def test_another_seed_gives_other_images(tmp_path: Path, clean: Path, rows: list[dict[str, str]]) -> None:
    other = build_phantoms(tmp_path, images=6, seed=4)
    known = {(clean / row["path"]).read_bytes() for row in rows}
    assert not known & {(tmp_path / row["path"]).read_bytes() for row in rows_of(other)}


def test_the_manifest_lists_every_image_once(clean: Path, rows: list[dict[str, str]]) -> None:
    assert tuple(rows[0]) == COLUMNS
    listed = [row["path"] for row in rows]
    assert sorted(listed) == sorted(path.relative_to(clean).as_posix() for path in (clean / "images").rglob("*.png"))
    assert all(row["path"].startswith(f"images/{row['label']}/") for row in rows)
    assert {row["view"] for row in rows} == {"PA", "AP"}


@pytest.mark.parametrize(("images", "counts"), [(6, (2, 2, 2)), (8, (3, 3, 2))])
def test_a_small_set_has_at_least_two_patients_per_class(
    tmp_path: Path, images: int, counts: tuple[int, int, int]
) -> None:
    found = rows_of(build_phantoms(tmp_path, images=images))
    assert tuple(sum(row["label"] == c for row in found) for c in CLASSES) == counts
    assert all(len({row["patient_id"] for row in found if row["label"] == c}) >= 2 for c in CLASSES)


def test_patients_have_several_images_one_label_and_one_source(rows: list[dict[str, str]]) -> None:
    patients = defaultdict(list)
    for row in rows:
        patients[row["patient_id"]].append(row)
    assert max(map(len, patients.values())) > 1
    assert len(patients) >= 4 * len(CLASSES)
    for images in patients.values():
        assert len({(row["label"], row["source"]) for row in images}) == 1


def test_sources_and_images_per_patient_are_independent_of_the_class(rows: list[dict[str, str]]) -> None:
    by_class = {c: [row for row in rows if row["label"] == c] for c in CLASSES}
    sources = {c: sorted(row["source"] for row in found) for c, found in by_class.items()}
    sizes = {
        c: sorted(sum(row["patient_id"] == p for row in found) for p in {row["patient_id"] for row in found})
        for c, found in by_class.items()
    }
    assert sources["covid"] == sources["normal"] == sources["pneumonia"]
    assert sizes["covid"] == sizes["normal"] == sizes["pneumonia"]
    assert set(sources["covid"]) == {"site_a", "site_b"}


def test_images_are_grey_with_dark_lungs_and_a_bright_middle(clean: Path, rows: list[dict[str, str]]) -> None:
    for row in rows:
        pixels = pixels_of(clean, row)
        assert pixels.dtype == np.uint8
        assert pixels.std() > 25
        height, width = pixels.shape
        assert (width > height) == (row["source"] == "site_b")
        spine = pixels[height // 3 : height // 2, int(0.47 * width) : int(0.53 * width)]
        lungs = pixels[height // 4 : height // 2, int(0.3 * width) : int(0.4 * width)]
        assert spine.mean() > lungs.mean() + 15


def test_masks_cover_the_dark_lungs(clean: Path, rows: list[dict[str, str]]) -> None:
    for row in rows:
        pixels = pixels_of(clean, row).astype(float)
        with Image.open(clean / row["mask"]) as image:
            assert (image.format, image.mode) == ("PNG", "1")
            lungs = np.asarray(image)
        assert lungs.shape == pixels.shape
        assert 0.15 < lungs.mean() < 0.4
        height, width = lungs.shape
        assert not lungs[:, int(0.48 * width) : int(0.52 * width)].any()  # the spine
        assert not lungs[int(0.95 * height) :].any()  # the belly
        halves = lungs[:, : width // 2].mean(), lungs[:, width // 2 :].mean()
        # The heart makes the left lung smaller.
        assert halves[0] > halves[1] > 0.5 * halves[0]
        around = binary_dilation(lungs, iterations=12) & ~binary_dilation(lungs, iterations=4)
        assert pixels[around].mean() > pixels[lungs].mean() + 15


def test_opacities_change_only_the_lungs() -> None:
    chest, vessels = MIN_CHEST, draw_vessels(np.random.default_rng(0))
    spots = [Opacity(0.6, 0.5, 0.2, 0.2, 1.7, side=side) for side in (-1, 1)]
    clear, lungs = draw_radiograph(chest, vessels, [], SITES["site_a"], "PA", np.random.default_rng(1))
    dense, same = draw_radiograph(chest, vessels, spots, SITES["site_a"], "PA", np.random.default_rng(1))
    assert np.array_equal(lungs, same)
    change = dense.astype(float) - clear
    assert change[binary_erosion(lungs, iterations=8)].mean() > 20
    # The edges of lungs and heart are soft, and a tenth of what lies behind the heart shows through.
    assert np.abs(change[lungs]).sum() > 0.9 * np.abs(change).sum()
    body = ~binary_dilation(lungs, iterations=16)
    assert np.abs(change[body]).mean() < 0.02 * np.abs(change[lungs]).mean()


def test_two_images_of_a_patient_differ(clean: Path, rows: list[dict[str, str]]) -> None:
    assert len({(clean / row["path"]).read_bytes() for row in rows}) == len(rows)


def test_lungs_of_patients_with_disease_are_denser(clean: Path, rows: list[dict[str, str]]) -> None:
    density: dict[str, list[float]] = {c: [] for c in CLASSES}
    for row in rows:
        pixels = pixels_of(clean, row).astype(float)
        height, width = pixels.shape
        lung = pixels[height // 3 : int(0.65 * height), int(0.2 * width) : int(0.38 * width)]
        density[row["label"]].append(lung.mean() / pixels[int(0.9 * height) :].mean())
    mean = {c: np.mean(values) for c, values in density.items()}
    assert min(mean["covid"], mean["pneumonia"]) > mean["normal"]
    # But the mean grey level does not separate the classes.
    assert min(density["covid"]) < max(density["normal"])


def test_a_marker_of_strength_1_is_in_a_corner_of_covid_images_only(tmp_path: Path, clean: Path) -> None:
    marked = build_phantoms(tmp_path, images=48, seed=3, shortcut="marker")
    assert marked.read_bytes() == (clean / "manifest.csv").read_bytes()
    for row in rows_of(marked):
        before, after = pixels_of(clean, row), pixels_of(tmp_path, row)
        changed = np.argwhere(before != after)
        assert bool(len(changed)) == (row["label"] == "covid")
        if len(changed):
            assert changed[:, 0].max() < 0.2 * before.shape[0]
            assert changed[:, 1].min() > 0.8 * before.shape[1]
            assert after.max() == 250 or before.max() > 250


def test_a_marker_of_strength_0_is_in_half_of_the_images_of_every_class(tmp_path: Path, clean: Path) -> None:
    marked = build_phantoms(tmp_path, images=48, seed=3, shortcut="marker", shortcut_strength=0)
    found = rows_of(marked)
    for c in CLASSES:
        mine = [row for row in found if row["label"] == c]
        changed = sum((clean / row["path"]).read_bytes() != (tmp_path / row["path"]).read_bytes() for row in mine)
        assert 2 <= changed <= len(mine) - 2


def test_an_interrupted_build_is_repeated(tmp_path: Path) -> None:
    manifest = build_phantoms(tmp_path, images=6)
    complete = contents(tmp_path)
    half = tmp_path / rows_of(manifest)[0]["path"]
    half.write_bytes(half.read_bytes()[:100])
    manifest.unlink()
    build_phantoms(tmp_path, images=6)
    assert contents(tmp_path) == complete


def test_a_complete_set_is_not_written_again(tmp_path: Path) -> None:
    manifest = build_phantoms(tmp_path, images=6)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert build_phantoms(tmp_path, images=6) == manifest
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"images": 5}, "ask for 6 or more"),
        ({"seed": -1}, "0 or more"),
        ({"shortcut": "text"}, "none, marker"),
        ({"shortcut_strength": 1.5}, "from 0"),
        ({"shortcut_strength": float("nan")}, "from 0"),
    ],
)
def test_bad_arguments_are_rejected_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, object], remedy: str
) -> None:
    with pytest.raises(InputError, match=remedy):
        build_phantoms(tmp_path / "set", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()
