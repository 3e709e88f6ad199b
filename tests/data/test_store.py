"""The image store: canvases, hashes, growing data sets, and builds that are shared, killed or fail."""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image
from torchvision.transforms import functional

from covid_cls.data.manifest import read_manifest
from covid_cls.data.readers import read_image
from covid_cls.data.store import default_cache, draw_on_canvas, hash_files, mapped_file, open_store, read_rows
from covid_cls.errors import InputError
from tools.soak.caches import caches

REPOSITORY = Path(__file__).parents[2]
REAL = REPOSITORY.parent / "shared" / "cxr"


def picture(seed: int, width: int = 48, height: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (height, width), dtype=np.uint8)


def image_set(root: Path, count: int, width: int = 48, height: int = 40) -> pd.DataFrame:
    """Write `count` PNG files and return their table as `read_manifest` would."""
    root.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.fromarray(picture(k, width + k % 3, height + k % 5)).save(root / f"{k:04d}.png")
    names = [f"{k:04d}.png" for k in range(count)]
    files = [str(root / name) for name in names]
    return pd.DataFrame({"path": names, "file": files, "line": np.arange(count) + 2, "sha256": ""})


def decoded(table: pd.DataFrame, size: int, canvas: int) -> np.ndarray:
    return np.stack([draw_on_canvas(read_image(Path(file)), size, canvas) for file in table["file"]])


def rewrite(path: Path, content: bytes, *, same_time: bool) -> None:
    """Replace the bytes of a file by others of the same length, with the same or a later modification time."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if same_time else 1_000_000)))


def stores(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "store").iterdir() if path.suffix != ".lock")


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    return image_set(tmp_path / "set", 10)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# canvases


@pytest.mark.parametrize(("width", "height"), [(64, 64), (90, 64), (64, 91), (65, 33), (200, 41), (39, 120)])
@pytest.mark.parametrize(("size", "canvas"), [(32, 32), (32, 24), (33, 24), (40, 31), (80, 64)])
def test_a_canvas_equals_that_of_torchvision(width: int, height: int, size: int, canvas: int) -> None:
    image = picture(0, width, height)
    theirs = functional.center_crop(functional.resize(Image.fromarray(image), [size]), [canvas])
    assert np.array_equal(draw_on_canvas(image, size, canvas), np.asarray(theirs))


def test_a_larger_canvas_has_a_black_border() -> None:
    image = picture(0, 40, 40)
    drawn = draw_on_canvas(image, 40, 60)
    assert drawn.shape == (60, 60)
    assert np.array_equal(drawn[10:50, 10:50], image)
    assert drawn.sum() == image.sum()


def test_a_smaller_canvas_crops_the_image() -> None:
    image = picture(0, 48, 40)
    assert np.array_equal(draw_on_canvas(image, 40, 20), image[10:30, 14:34])


def test_a_canvas_between_the_sides_crops_one_and_fills_the_other() -> None:
    image = picture(0, 80, 40)
    drawn = draw_on_canvas(image, 40, 60)
    assert np.array_equal(drawn[10:50], image[:, 10:70])
    assert drawn[:10].max() == drawn[50:].max() == 0


@pytest.mark.parametrize("size", [31, 32, 57, 200])
@pytest.mark.parametrize(("width", "height"), [(33, 33), (97, 64), (32, 159)])
def test_scaling_keeps_a_uniform_grey_and_the_aspect_ratio(size: int, width: int, height: int) -> None:
    drawn = draw_on_canvas(np.full((height, width), 200, np.uint8), size, 8 * size)
    rows, columns = (drawn.any(axis=axis).sum() for axis in (1, 0))
    assert set(np.unique(drawn)) == {0, 200}
    assert min(rows, columns) == size
    assert max(rows, columns) == pytest.approx(size * max(width, height) / min(width, height), abs=1)


# hashes


def test_hashes_are_the_sha256_of_the_bytes(table: pd.DataFrame, cache: Path) -> None:
    wanted = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in table["file"]]
    assert hash_files(table, cache) == wanted
    assert hash_files(table, cache) == wanted
    assert hash_files(table.iloc[::-1], cache) == wanted[::-1]


def test_only_changed_files_are_hashed_again(table: pd.DataFrame, cache: Path) -> None:
    before = hash_files(table, cache)
    unseen, seen = Path(table.loc[3, "file"]), Path(table.loc[4, "file"])
    rewrite(unseen, unseen.read_bytes()[::-1], same_time=True)
    rewrite(seen, seen.read_bytes()[::-1], same_time=False)
    after = hash_files(table, cache)
    # File 3 has its old size and time, so it was not opened.
    assert [k for k in range(10) if before[k] != after[k]] == [4]
    assert after[4] == hashlib.sha256(seen.read_bytes()).hexdigest()


def test_a_file_of_another_length_is_hashed_again(table: pd.DataFrame, cache: Path) -> None:
    before = hash_files(table, cache)
    path = Path(table.loc[0, "file"])
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hash_files(table, cache)[0] != before[0]


def test_hashing_a_part_of_the_set_keeps_the_other_hashes(table: pd.DataFrame, cache: Path) -> None:
    before = hash_files(table, cache)
    rewrite(Path(table.loc[7, "file"]), Path(table.loc[7, "file"]).read_bytes()[::-1], same_time=True)
    Path(table.loc[0, "file"]).touch()
    hash_files(table[:3], cache)
    assert hash_files(table, cache) == before


def test_a_wrong_sha256_is_reported_with_its_line(table: pd.DataFrame, cache: Path) -> None:
    hashes = hash_files(table, cache)
    table["sha256"] = [hash_.upper() if k % 2 else hash_ for k, hash_ in enumerate(hashes)]
    assert hash_files(table, cache) == hashes
    table.loc[[2, 5], "sha256"] = "0" * 64
    with pytest.raises(InputError, match=r"2 files do not have the sha256 .*: line 4: 0002\.png, line 7: 0005\.png\."):
        hash_files(table, cache)
    table.loc[[2, 5], "sha256"] = ""
    assert hash_files(table, cache) == hashes


def test_a_flipped_bit_is_noticed(table: pd.DataFrame, cache: Path) -> None:
    table["sha256"] = hash_files(table, cache)
    path = Path(table.loc[6, "file"])
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    rewrite(path, bytes(content), same_time=False)
    with pytest.raises(InputError, match=r"line 8: 0006\.png"):
        hash_files(table, cache)


# stores


@pytest.mark.parametrize(("size", "canvas"), [(32, 32), (24, 40), (40, 24)])
def test_a_store_contains_the_decoded_images(table: pd.DataFrame, cache: Path, size: int, canvas: int) -> None:
    store = open_store(table, hash_files(table, cache), size=size, canvas=canvas, cache=cache)
    assert (store.images.shape, store.images.dtype) == ((10, canvas, canvas), np.uint8)
    assert np.array_equal(store.images, decoded(table, size, canvas))
    assert store.bad == {}
    assert not store.images.flags.writeable


def test_a_store_is_opened_again_without_reading_an_image(table: pd.DataFrame, cache: Path) -> None:
    hashes = hash_files(table, cache)
    wanted = open_store(table, hashes, size=32, canvas=32, cache=cache).images.copy()
    for file in table["file"]:
        rewrite(Path(file), bytes(Path(file).stat().st_size), same_time=True)
    assert hash_files(table, cache) == hashes
    assert np.array_equal(open_store(table, hashes, size=32, canvas=32, cache=cache).images, wanted)
    shutil.rmtree(Path(table.loc[0, "file"]).parent)
    assert np.array_equal(open_store(table, hashes, size=32, canvas=32, cache=cache).images, wanted)
    assert len(stores(cache)) == 1


def test_changed_content_makes_another_store(table: pd.DataFrame, cache: Path) -> None:
    first = open_store(table, hash_files(table, cache), size=32, canvas=32, cache=cache).images.copy()
    Image.fromarray(picture(99)).save(table.loc[2, "file"])
    second = open_store(table, hash_files(table, cache), size=32, canvas=32, cache=cache).images
    assert [k for k in range(10) if not np.array_equal(first[k], second[k])] == [2]
    assert np.array_equal(second, decoded(table, 32, 32))
    assert len(stores(cache)) == 2


def test_settings_and_the_order_of_rows_have_separate_stores(table: pd.DataFrame, cache: Path) -> None:
    hashes = hash_files(table, cache)
    for size, canvas in ((32, 32), (33, 32), (32, 33), (32, 32)):
        open_store(table, hashes, size=size, canvas=canvas, cache=cache)
    assert len(stores(cache)) == 3
    assert len({name.partition("-")[0] for name in stores(cache)}) == 3
    turned = open_store(table[::-1], hashes[::-1], size=32, canvas=32, cache=cache)
    assert np.array_equal(turned.images, decoded(table, 32, 32)[::-1])


def test_a_moved_data_set_keeps_its_store(table: pd.DataFrame, cache: Path, tmp_path: Path) -> None:
    open_store(table, hash_files(table, cache), size=32, canvas=32, cache=cache)
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    moved = table.assign(file=[file.replace("/set/", "/elsewhere/") for file in table["file"]])
    open_store(moved, hash_files(moved, cache), size=32, canvas=32, cache=cache)
    assert len(stores(cache)) == 1


def test_bad_images_are_black_and_listed(table: pd.DataFrame, cache: Path) -> None:
    Path(table.loc[3, "file"]).write_bytes(b"<html>not found</html>")
    Path(table.loc[8, "file"]).write_bytes(Path(table.loc[8, "file"]).read_bytes()[:300])
    # Once when the store is built, and once when it is opened again.
    for _ in range(2):
        store = open_store(table, hash_files(table, cache), size=32, canvas=32, cache=cache)
        assert list(store.bad) == [3, 8]
        assert "web page" in store.bad[3]
        assert "damaged" in store.bad[8]
        assert store.images[[3, 8]].max() == 0
        good = table.drop(index=[3, 8])
        assert np.array_equal(store.images[good.index], decoded(good, 32, 32))


def test_several_processes_build_the_same_store(tmp_path: Path, cache: Path) -> None:
    files = image_set(tmp_path / "set", 20, 40, 40)
    # 540 rows are more than one process decodes.
    table = pd.concat([files] * 27, ignore_index=True)
    table["path"] = [f"{k}.png" for k in range(len(table))]
    # On both sides of a border between chunks, and at the end.
    table.loc[[31, 32, 539], "file"] = str(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes(b"a text")
    store = open_store(table, hash_files(table, cache), size=20, canvas=16, cache=cache)
    assert sorted(store.bad) == [31, 32, 539]
    good = [k for k in range(len(table)) if k not in store.bad]
    assert np.array_equal(store.images[good], np.tile(decoded(files, 20, 16), (27, 1, 1))[good])
    assert store.images[list(store.bad)].max() == 0


def test_the_index_describes_each_row(table: pd.DataFrame, cache: Path) -> None:
    Path(table.loc[3, "file"]).write_bytes(b"not, an image")
    table.loc[4, "path"] = 'a "quoted", name.png'
    hashes = hash_files(table, cache)
    store = open_store(table, hashes, size=32, canvas=32, cache=cache)
    (name,) = stores(cache)
    assert name.endswith(f"-{store.digest}")
    index = pd.read_csv(cache / "store" / name / "index.csv", dtype=str, keep_default_na=False)
    assert index.columns.tolist() == ["path", "sha256", "fault"]
    assert index["path"].tolist() == table["path"].tolist()
    assert index["sha256"].tolist() == hashes
    assert index["fault"].tolist() == ["", "", "", store.bad[3], *[""] * 6]


def test_a_new_decoder_builds_another_store(
    table: pd.DataFrame, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A DICOM file that no decoder could read is tried again when one has been installed.
    hashes = hash_files(table, cache)
    first = open_store(table, hashes, size=32, canvas=32, cache=cache)
    record = tmp_path / "site" / "python_gdcm-99.0.dist-info" / "METADATA"
    record.parent.mkdir(parents=True)
    record.write_text("Metadata-Version: 2.1\nName: python-gdcm\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    second = open_store(table, hashes, size=32, canvas=32, cache=cache)
    assert first.digest != second.digest
    assert len(stores(cache)) == 2


# a growing data set


def make_unreadable(table: pd.DataFrame) -> None:
    """Replace the content of files by zeros, with the same size and time, so that decoding one would be noticed."""
    for file in table["file"]:
        rewrite(Path(file), bytes(Path(file).stat().st_size), same_time=True)


def grown(table: pd.DataFrame, rows: list[int]) -> pd.DataFrame:
    return table.loc[rows].reset_index(drop=True)


def test_only_new_images_are_decoded(table: pd.DataFrame, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    wanted = decoded(table, 32, 32)
    hashes = hash_files(table, cache)
    open_store(table[:6], hashes[:6], size=32, canvas=32, cache=cache)
    make_unreadable(table[:6])
    order = [9, 0, 7, 5, 3, 8, 1, 2, 6, 4]
    store = open_store(grown(table, order), [hashes[k] for k in order], size=32, canvas=32, cache=cache)
    assert np.array_equal(store.images, wanted[order])
    assert store.bad == {}
    assert [m for m in caplog.messages if m.startswith("decoding")] == [
        "decoding 6 of 6 images, 0 known",
        "decoding 4 of 10 images, 6 known",
    ]


def test_known_images_are_copied_from_several_stores(table: pd.DataFrame, cache: Path) -> None:
    wanted = decoded(table, 32, 32)
    hashes = hash_files(table, cache)
    for part in (slice(0, 4), slice(3, 7), slice(6, 10)):
        open_store(table[part], hashes[part], size=32, canvas=32, cache=cache)
    make_unreadable(table)
    twice = pd.concat([table, table.assign(path="again/" + table["path"])], ignore_index=True)
    store = open_store(twice, hashes * 2, size=32, canvas=32, cache=cache)
    assert np.array_equal(store.images, np.concatenate([wanted, wanted]))
    assert store.bad == {}


def test_a_known_fault_is_kept(table: pd.DataFrame, cache: Path) -> None:
    Path(table.loc[2, "file"]).write_bytes(b"<html>not found</html>")
    hashes = hash_files(table, cache)
    before = open_store(table[:6], hashes[:6], size=32, canvas=32, cache=cache).bad
    # Decoding it again would give "no known image format".
    make_unreadable(table[:6])
    after = open_store(table[::-1], hashes[::-1], size=32, canvas=32, cache=cache)
    assert after.bad == {7: before[2]}
    assert after.images[7].max() == 0


def test_nothing_is_copied_from_a_store_with_other_settings(table: pd.DataFrame, cache: Path) -> None:
    hashes = hash_files(table, cache)
    open_store(table, hashes, size=32, canvas=32, cache=cache)
    for size, canvas in ((33, 32), (32, 33)):
        store = open_store(table, hashes, size=size, canvas=canvas, cache=cache)
        assert np.array_equal(store.images, decoded(table, size, canvas))


def test_the_same_bytes_with_another_suffix_are_decoded_again(tmp_path: Path, cache: Path) -> None:
    table = pd.DataFrame({"path": ["a.bin", "b.dcm"], "line": [2, 3], "sha256": ""})
    table["file"] = [str(tmp_path / name) for name in table["path"]]
    for file in table["file"]:
        Path(file).write_bytes(bytes(range(256)))
    hashes = hash_files(table, cache)
    alone = open_store(table[:1], hashes[:1], size=32, canvas=32, cache=cache)
    both = open_store(table, hashes, size=32, canvas=32, cache=cache)
    assert "no known image format" in alone.bad[0]
    assert both.bad[0] == alone.bad[0]
    assert "DICOM" in both.bad[1].partition(";")[0]


def lose_rows(folder: Path) -> None:
    with (folder / "images.npy").open("r+b") as file:
        file.truncate(128 + 3 * 32 * 32 + 7)


DAMAGES = {
    "no index": lambda folder: (folder / "index.csv").unlink(),
    "empty index": lambda folder: (folder / "index.csv").write_bytes(b""),
    "index of something else": lambda folder: (folder / "index.csv").write_bytes(b"a,b\n1,2\n"),
    "index that is no text": lambda folder: (folder / "index.csv").write_bytes(b"\xff\xfe\0" * 40),
    "no images": lambda folder: (folder / "images.npy").unlink(),
    "empty images": lambda folder: (folder / "images.npy").write_bytes(b""),
    "rows lost": lose_rows,
    "another shape": lambda folder: np.save(folder / "images.npy", np.ones((2, 1, 1), np.uint8)),
    "a file in place of the folder": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_copied_from_a_damaged_store(
    table: pd.DataFrame, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    hashes = hash_files(table, cache)
    open_store(table[:6], hashes[:6], size=32, canvas=32, cache=cache)
    (name,) = stores(cache)
    DAMAGES[damage](cache / "store" / name)
    store = open_store(table, hashes, size=32, canvas=32, cache=cache)
    assert np.array_equal(store.images, decoded(table, 32, 32))
    assert store.bad == {}
    assert f"{name}: nothing could be copied" in caplog.text


def test_many_known_images_are_not_decoded(tmp_path: Path, cache: Path) -> None:
    files = image_set(tmp_path / "set", 20, 40, 40)
    wanted = np.tile(decoded(files, 32, 32), (27, 1, 1))
    open_store(files, hash_files(files, cache), size=32, canvas=32, cache=cache)
    # 540 rows are more than one process decodes.
    table = pd.concat([files] * 27, ignore_index=True)
    table["path"] = [f"{k}.png" for k in range(len(table))]
    hashes = hash_files(table, cache)
    make_unreadable(files)
    assert np.array_equal(open_store(table, hashes, size=32, canvas=32, cache=cache).images, wanted)


# rows of large arrays


@pytest.mark.parametrize(
    ("shape", "dtype"), [((40, 9, 9), "u1"), ((40, 3, 5, 2), "u2"), ((40, 7), "f4"), ((40,), "f8")]
)
@pytest.mark.parametrize("rows", [[], [0], [39, 0, 7, 7], list(range(40))], ids=len)
def test_read_rows_equals_indexing(tmp_path: Path, shape: tuple[int, ...], dtype: str, rows: list[int]) -> None:
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    np.save(tmp_path / "c.npy", array)
    np.save(tmp_path / "f.npy", np.asfortranarray(array))
    mapped = np.load(tmp_path / "c.npy", mmap_mode="r")
    wanted = array[rows]
    for source in (array, mapped, np.load(tmp_path / "f.npy", mmap_mode="r"), np.asarray(mapped)):
        found = read_rows(source, np.array(rows, dtype=np.int64))
        assert np.array_equal(found, wanted)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.flags.writeable
        assert not np.shares_memory(found, source)


def test_a_part_of_a_memory_map_is_not_mistaken_for_its_file(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.uint16).reshape(12, 5)
    np.save(tmp_path / "a.npy", array)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert mapped_file(mapped) == tmp_path / "a.npy"
    rows = np.array([2, 0])
    for part, same in (
        (mapped[3:], array[3:]),
        (mapped[::2], array[::2]),
        (mapped.T, array.T),
        (mapped[:, 1:], array[:, 1:]),
    ):
        assert mapped_file(part) is None
        assert np.array_equal(read_rows(part, rows), same[rows])
    private = np.load(tmp_path / "a.npy", mmap_mode="c")
    # A change of this map is not written to the file.
    private[2] = 7
    assert (read_rows(private, rows)[0] == 7).all()


def test_rows_can_be_read_after_their_file_is_removed_but_not_truncated(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 200, (50, 9), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    rows = np.array([49, 3])
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    assert np.array_equal(read_rows(mapped, rows), array[rows])
    (tmp_path / "b.npy").rename(tmp_path / "a.npy")
    os.truncate(tmp_path / "a.npy", 300)
    with pytest.raises(OSError, match=r"a\.npy: ends before row 49"):
        read_rows(mapped, rows)


def mapped_bytes() -> int:
    """Return the resident memory of this process that is mapped from files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_reading_all_rows_of_a_large_map_uses_no_resident_memory(tmp_path: Path) -> None:
    size = 64 * 2**20
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (256, size // 256)).flush()
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    before = mapped_bytes()
    for start in range(0, 256, 32):
        read_rows(mapped, np.arange(start, start + 32))
    assert mapped_bytes() - before < size / 8
    # Indexing the map keeps what it reads.
    mapped[np.arange(256)]
    assert mapped_bytes() - before > size / 2


def test_other_users_can_read_a_store(table: pd.DataFrame, cache: Path) -> None:
    open_store(table, hash_files(table, cache), size=32, canvas=32, cache=cache)
    (folder,) = (cache / "store" / name for name in stores(cache))
    assert folder.stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir())


def test_a_full_disk_is_reported_before_anything_is_written(
    table: pd.DataFrame, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    hashes = hash_files(table, cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(
        InputError, match=r"cache/store: the image store needs 10,240 bytes and 5,000 are free.*data\.cache"
    ):
        open_store(table, hashes, size=32, canvas=32, cache=cache)
    assert stores(cache) == []
    monkeypatch.undo()
    assert open_store(table, hashes, size=32, canvas=32, cache=cache).bad == {}


def test_default_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("COVID_CLS_CACHE", raising=False)
    assert default_cache() == tmp_path / ".cache" / "covid_cls"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "covid_cls"
    monkeypatch.setenv("COVID_CLS_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"


# several processes

OPEN = """
import sys, json, hashlib
from pathlib import Path
import pandas as pd
import psutil
from covid_cls.data import store
table_at, hashes_at, cache, log, size = sys.argv[1:]
build = store._build
def counted(*arguments):
    with open(log, "a") as file:
        file.write("build\\n")
    build(*arguments)
store._build = counted
print("ready", flush=True)
sys.stdin.readline()
table = pd.read_json(table_at, dtype={"path": str})
hashes = json.loads(Path(hashes_at).read_text())
found = store.open_store(table, hashes, size=int(size), canvas=int(size), cache=Path(cache))
print(hashlib.sha256(found.images.tobytes()).hexdigest(), flush=True)
"""


def start_open(table: pd.DataFrame, hashes: list[str], cache: Path, size: int) -> "subprocess.Popen[str]":
    """Start a process that opens the store when it reads a line; it leads a separate process group."""
    table.to_json(cache.parent / "table.json")
    (cache.parent / "hashes.json").write_text(json.dumps(hashes))
    arguments = [cache.parent / "table.json", cache.parent / "hashes.json", cache, cache.parent / "log", size]
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def slow_set(root: Path, rows: int) -> pd.DataFrame:
    """Return a table whose rows take about 10 ms each to decode; it has few files, which are hashed quickly."""
    files = image_set(root, 4, 700, 700)
    table = pd.concat([files] * (rows // 4), ignore_index=True)
    table["path"] = [f"{k}.png" for k in range(len(table))]
    return table


@pytest.mark.slow(reason="processes that decode are killed")
def test_processes_that_ask_at_once_build_once_and_survive_a_killed_builder(tmp_path: Path) -> None:
    # Half of these caches are feature caches.
    outcome = caches(4, tmp_path)
    assert outcome.held, outcome


def group_members(group: int) -> list[int]:
    """Return the living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def has_first_row(images: Path) -> bool:
    """Return whether the first row is decoded. The file is read as bytes, because it may be incomplete."""
    try:
        with images.open("rb") as file:
            file.seek(128)
            return any(file.read(64 * 64))
    except FileNotFoundError:
        return False


@pytest.mark.slow(reason="processes that decode are killed")
@pytest.mark.parametrize("rows", [400, 1200], ids=["one process", "several processes"])
def test_a_killed_build_is_never_used(tmp_path: Path, cache: Path, rows: int) -> None:
    table = slow_set(tmp_path / "set", rows)
    hashes = hash_files(table, cache)
    process = start_open(table, hashes, cache, 64)
    try:
        go(process)
        while not any(has_first_row(file) for file in (cache / "store").glob("*.tmp*/images.npy")):
            assert process.poll() is None, "the build was over before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (scratch,) = stores(cache)
        assert ".tmp" in scratch
        unfinished = np.load(cache / "store" / scratch / "images.npy", "r")
        assert not unfinished.any(axis=(1, 2)).all()

        small = open_store(table[:40], hashes[:40], size=64, canvas=64, cache=cache)
        four = decoded(table[:4], 64, 64)
        # Nothing was copied from the unfinished store.
        assert np.array_equal(small.images, np.tile(four, (10, 1, 1)))
        if rows == 400:
            (finished,) = (name for name in stores(cache) if ".tmp" not in name)
            shutil.rmtree(cache / "store" / finished)
            store = open_store(table, hashes, size=64, canvas=64, cache=cache)
            assert np.array_equal(store.images, np.tile(four, (rows // 4, 1, 1)))
            assert store.bad == {}
            assert not [name for name in stores(cache) if ".tmp" in name]
        # No worker outlives the build for long: one that is importing ends after that.
        while group_members(process.pid):
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow(reason="processes that decode are killed")
def test_a_killed_decoding_process_is_reported(tmp_path: Path, cache: Path) -> None:
    table = slow_set(tmp_path / "set", 1200)
    hashes = hash_files(table, cache)

    def kill_one() -> None:
        while not any(has_first_row(file) for file in (cache / "store").glob("*.tmp*/images.npy")):
            time.sleep(0.005)
        next(child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())).kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(InputError, match=r"a process that decodes images was killed.*more memory or fewer processors"):
        open_store(table, hashes, size=64, canvas=64, cache=cache)
    killer.join()
    assert stores(cache) == []


def test_a_failed_build_leaves_nothing(table: pd.DataFrame, cache: Path) -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        open_store(table, hash_files(table, cache), size=0, canvas=32, cache=cache)
    assert stores(cache) == []


# real sets


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real radiographs at {REAL}")
@pytest.mark.parametrize("name", ["raw", "external", "darkcovidnet"])
def test_every_real_radiograph_is_decoded(name: str, cache: Path) -> None:
    table = read_manifest(REAL / name / "manifest.csv")
    store = open_store(table, hash_files(table, cache), size=32, canvas=32, cache=cache)
    assert store.bad == {}
    assert (store.images.reshape(len(table), -1).max(axis=1) > 0).all()


WITHOUT_GUARD = """
import sys
from pathlib import Path
import pandas as pd
from covid_cls.data import store
store._MIN_FOR_PROCESSES = 0
table = pd.read_json(sys.argv[1])
store.open_store(table, ["0"] * len(table), size=32, canvas=32, cache=Path(sys.argv[2]))
"""


@pytest.mark.slow(reason="a script that starts processes is run as one")
def test_a_script_without_main_guard_fails_instead_of_waiting_for_itself(tmp_path: Path, cache: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_GUARD)
    image_set(tmp_path / "set", 70).to_json(tmp_path / "table.json")
    command = [sys.executable, str(script), str(tmp_path / "table.json"), str(cache)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        # Only reached by a script that waits for itself: a busy machine may need more than a minute.
        timeout=300,
    )
    assert done.returncode == 1
    assert "if __name__ == '__main__':" in done.stderr
    assert not list((cache / "store").glob("*.tmp*"))
