"""Masks are found, checked and scaled as images are."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from covid_cls.attribution.masks import mask_files, read_mask
from covid_cls.data.manifest import read_manifest
from covid_cls.data.phantoms import build_phantoms
from covid_cls.data.readers import read_image
from covid_cls.data.store import draw_on_canvas
from covid_cls.errors import InputError


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_phantoms(tmp_path_factory.mktemp("phantoms"), images=6)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Write two images, the first one with a mask in a separate folder."""
    rng = np.random.default_rng(0)
    (tmp_path / "set" / "masks").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (60, 80), dtype=np.uint8)).save(tmp_path / "set" / name)
    mask = np.zeros((60, 80), np.uint8)
    # Labels instead of brightness: 1 is the right lung and 2 the left one.
    mask[10:50, 20:40] = 1
    mask[10:50, 45:60] = 2
    Image.fromarray(mask).save(tmp_path / "set" / "masks" / "a.png")
    Image.fromarray(mask).save(tmp_path / "outside.png")
    path = tmp_path / "set" / "manifest.csv"
    path.write_text("path,label,mask\na.png,covid,masks/a.png\nb.png,normal,\n")
    return path


def test_each_row_has_its_mask_or_none(manifest: Path) -> None:
    assert mask_files(read_manifest(manifest)) == [manifest.parent.resolve() / "masks" / "a.png", None]


def test_a_table_without_the_column_has_no_masks(manifest: Path) -> None:
    manifest.write_text("path,label\na.png,covid\nb.png,normal\n")
    assert mask_files(read_manifest(manifest)) == [None, None]


@pytest.mark.parametrize(
    ("mask", "fault"),
    [
        ("masks/none.png", "line 3: masks/none.png is missing"),
        ("../outside.png", "line 3: ../outside.png leaves the manifest's folder"),
        ("masks", "line 3: masks is not a regular file"),
    ],
)
def test_messages_name_the_line(manifest: Path, mask: str, fault: str) -> None:
    manifest.write_text(f"path,label,mask\na.png,covid,masks/a.png\nb.png,normal,{mask}\n")
    with pytest.raises(InputError, match=fault):
        mask_files(read_manifest(manifest))


def test_pixels_that_are_not_black_are_lung_and_are_scaled_like_the_image(manifest: Path) -> None:
    root = manifest.parent
    lungs = read_mask(root / "masks" / "a.png", root / "a.png", size=60, crop=48)
    expected = np.zeros((60, 80), bool)
    expected[10:50, 20:40] = expected[10:50, 45:60] = True
    assert np.array_equal(lungs, expected[6:54, 16:64])
    half = read_mask(root / "masks" / "a.png", root / "a.png", size=30, crop=30)
    assert half.mean() == pytest.approx(expected[:, 10:70].mean(), abs=0.02)


def test_masks_of_phantoms_cover_their_dark_lungs(phantoms: Path) -> None:
    table = read_manifest(phantoms)
    for mask, file in zip(mask_files(table), map(Path, table["file"]), strict=True):
        assert mask is not None
        lungs = read_mask(mask, file, size=112, crop=96)
        view = draw_on_canvas(read_image(file), 112, 96).astype(float)
        assert 0.2 < lungs.mean() < 0.6
        assert view[lungs].mean() < view[~lungs][view[~lungs] > 40].mean() - 20


def test_a_mask_of_another_size_or_that_cannot_be_read_is_refused(manifest: Path) -> None:
    root = manifest.parent
    Image.fromarray(np.eye(40, dtype=np.uint8)).save(root / "masks" / "small.png")
    with pytest.raises(InputError, match=r"40 x 40 pixels and its image, .*a.png, 80 x 60"):
        read_mask(root / "masks" / "small.png", root / "a.png", 60, 48)
    (root / "masks" / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"the mask of .*a.png: a text file"):
        read_mask(root / "masks" / "text.png", root / "a.png", 60, 48)
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(root / "masks" / "black.png")
    with pytest.raises(InputError, match="blank"):
        read_mask(root / "masks" / "black.png", root / "a.png", 60, 48)


def test_masks_of_images_in_subfolders_are_relative_to_the_manifest(manifest: Path) -> None:
    table = pd.DataFrame(
        {
            "mask": ["masks/a.png"],
            "path": ["sub/../a.png"],
            "file": [str(manifest.parent / "sub/../a.png")],
            "line": [2],
        }
    )
    (manifest.parent / "sub").mkdir()
    assert mask_files(table) == [manifest.parent / "masks" / "a.png"]
