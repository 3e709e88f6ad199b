"""What a path on the command line stands for."""

import os
from pathlib import Path

import pytest

from covid_cls.data.inputs import find_inputs, input_name
from covid_cls.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of files, of which some are litter and none is an image."""
    folder = tmp_path / "scans"
    for name in ("b.png", "a b.JPG", "IM0001", "deep/er/c.dcm", "Thumbs.db", "DICOMDIR", ".x.png", ".h/y.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not looked at")
    return folder


def names(path: object) -> list[str]:
    found = find_inputs(str(path))
    assert all(os.path.lexists(file) for _, file in found)
    assert len({name for name, _ in found}) == len(found)
    return [name for name, _ in found]


def fault(path: object) -> str:
    with pytest.raises(InputError) as error:
        find_inputs(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_is_looked_through_in_order_without_litter(root: Path) -> None:
    assert names(root) == ["IM0001", "a b.JPG", "b.png", "deep/er/c.dcm"]


def test_what_is_no_regular_file_is_listed_for_the_reader_to_refuse(root: Path) -> None:
    os.mkfifo(root / "pipe")
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "elsewhere").symlink_to(root.parent)  # followed, it would never end
    assert names(root) == ["IM0001", "a b.JPG", "b.png", "dangling", "deep/er/c.dcm", "elsewhere", "pipe"]


def test_a_file_goes_by_its_name(root: Path) -> None:
    assert find_inputs(str(root / "deep" / "er" / "c.dcm")) == [("c.dcm", root / "deep" / "er" / "c.dcm")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("scans/*", ["IM0001", "a b.JPG", "b.png"]),
        ("scans/**", ["IM0001", "a b.JPG", "b.png", "deep/er/c.dcm"]),
        ("scans/**/*.dcm", ["deep/er/c.dcm"]),
        ("*/b.png", ["scans/b.png"]),
        ("scans/[a-b]*", ["a b.JPG", "b.png"]),
        ("./scans/d*/er/c.dcm", ["deep/er/c.dcm"]),
    ],
)
def test_a_glob_gives_files_relative_to_its_fixed_part(
    root: Path, pattern: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names(root.parent / pattern) == expected
    monkeypatch.chdir(root.parent)
    assert names(pattern) == expected


def test_a_file_whose_name_looks_like_a_glob_is_that_file(root: Path) -> None:
    (root / "a[1].png").write_bytes(b"x")
    (root / "a1.png").write_bytes(b"x")
    assert names(root / "a[1].png") == ["a[1].png"]


def test_a_manifest_keeps_its_order_and_needs_no_label(root: Path) -> None:
    (root / "list.csv").write_text("view,path\nPA,deep/er/c.dcm\nAP,b.png\n,./IM0001\n")
    assert find_inputs(str(root / "list.csv")) == [
        ("deep/er/c.dcm", root / "deep/er/c.dcm"),
        ("b.png", root / "b.png"),
        ("./IM0001", root / "IM0001"),
    ]


def test_a_manifest_is_held_to_the_same_rules_as_in_training(root: Path) -> None:
    (root.parent / "outside.png").write_bytes(b"x")
    (root / "list.csv").write_text("path\n../outside.png\n/etc/passwd\ngone.png\nb.png\n./b.png\n")
    message = fault(root / "list.csv")
    assert "4 faults" in message
    for part in ("line 2: ../outside.png leaves", "line 3: /etc/passwd leaves", "line 4: gone.png", "line 6: ./b.png"):
        assert part in message
    (root / "list.csv").write_text("file\nb.png\n")
    assert "column path is missing; found file" in fault(root / "list.csv")


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.png", "scans/*.tif", "gone.csv", "empty"])
def test_where_nothing_is_found_the_message_says_where_was_looked(
    root: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root.parent / "empty" / ".hidden").mkdir(parents=True)
    monkeypatch.chdir(root.parent)
    message = fault(path)
    assert path in message
    assert str(root.parent) in message


def test_a_name_that_is_no_utf_8_can_be_written_to_a_table(root: Path) -> None:
    (root / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    (name,) = [name for name in names(root) if "xff" in name]
    assert name == "\\xff.png"
    assert name.encode()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("scans", "scans"),
        ("scans/", "scans"),
        (".", "here"),
        ("scans/b.png", "b"),
        ("scans/list.csv", "list"),
        ("scans/manifest.csv", "scans"),
        ("scans/**/*.png", "scans"),
        ("*.png", "here"),
    ],
)
def test_results_are_named_after_the_inputs(
    path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "scans").mkdir(parents=True)
    for file in ("b.png", "list.csv", "manifest.csv"):
        (here / "scans" / file).write_bytes(b"x")
    monkeypatch.chdir(here)
    assert input_name(path) == name


def test_thousands_of_files_are_found_without_a_look_at_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(2000):
        (tmp_path / f"{k:04}.png").touch()
    looks: list[object] = []
    real = os.stat

    def counting(path: object, *words: object, **more: object) -> os.stat_result:
        looks.append(path)
        return real(path, *words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", counting)
    assert len(find_inputs(str(tmp_path))) == 2000
    assert len(looks) < 20
