"""Manifests, folders of images and the inputs of commands: what is read, and which faults are reported with lines."""

import os
import random
import socket
from pathlib import Path

import pytest

from covid_cls.data.manifest import find_inputs, input_name, read_folder, read_manifest
from covid_cls.errors import InputError

REAL = Path(__file__).parents[2].parent / "shared" / "cxr"


def touch(root: Path, *names: str) -> None:
    """Write files that are not images: nothing is decoded here."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not an image")


def manifest(root: Path, text: str | bytes) -> Path:
    path = root / "manifest.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fault(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_manifest(path)
    message = str(error.value)
    assert str(path) in message
    # A command prints it on one line.
    assert "\n" not in message
    return message


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    touch(folder, "a.png", "b.png", "c.png", "deep/d.png")
    return folder


# correct manifests


def test_a_minimal_manifest(root: Path) -> None:
    table = read_manifest(manifest(root, "path,label\nb.png,Normal\ndeep/d.png,Viral Pneumonia\na.png,COVID-19\n"))
    assert table["path"].tolist() == ["a.png", "b.png", "deep/d.png"]
    assert table["label"].tolist() == ["covid", "normal", "pneumonia"]
    assert table["line"].tolist() == [4, 2, 3]
    assert table["file"].tolist() == [str(root.resolve() / name) for name in ("a.png", "b.png", "deep/d.png")]
    assert table["patient_id"].tolist() == ["image:a.png", "image:b.png", "image:deep/d.png"]
    for column in ("source", "split", "fold", "sha256"):
        assert table[column].tolist() == ["", "", ""], column
    assert list(table.index) == [0, 1, 2]


def test_extra_columns_are_kept_as_text(root: Path) -> None:
    text = "age,path,label,patient_id,view,note\n007,a.png,covid,0042,PA,NA\n,b.png,normal,1e5,,nan\n"
    table = read_manifest(manifest(root, text))
    assert table["age"].tolist() == ["007", ""]
    assert table["patient_id"].tolist() == ["0042", "1e5"]
    assert table["view"].tolist() == ["PA", ""]
    assert table["note"].tolist() == ["NA", "nan"]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_csv_files_of_spreadsheets(root: Path, ends: str, bom: bytes) -> None:
    touch(root, "x, y.png")
    lines = ['path,label,"note, free"', '"x, y.png",covid,"said ""old"", really"', "b.png,normal,é", ""]
    table = read_manifest(manifest(root, bom + ends.join(lines).encode()))
    assert table["path"].tolist() == ["b.png", "x, y.png"]
    assert table["note, free"].tolist() == ["é", 'said "old", really']
    assert table["line"].tolist() == [3, 2]


def test_spaces_in_the_header_are_ignored(root: Path) -> None:
    table = read_manifest(manifest(root, "path, label , patient_id\na.png,covid,p1\n"))
    assert (table.loc[0, "label"], table.loc[0, "patient_id"]) == ("covid", "p1")


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_an_image_without_patient_id_is_a_separate_patient(root: Path, blank: str) -> None:
    text = f"path,label,patient_id\na.png,covid,{blank}\nb.png,covid,{blank}\nc.png,covid,p1\n"
    assert read_manifest(manifest(root, text))["patient_id"].tolist() == ["image:a.png", "image:b.png", "p1"]


def test_spaces_around_a_patient_id_are_ignored(root: Path) -> None:
    text = "path,label,patient_id\na.png,covid,p1\nb.png,covid,p1 \nc.png,covid, p1\n"
    assert read_manifest(manifest(root, text))["patient_id"].nunique() == 1


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("VAL", "val"),
        ("Validation", "val"),
        ("valid", "val"),
        (" test ", "test"),
    ],
)
def test_names_of_splits(root: Path, written: str, meant: str) -> None:
    table = read_manifest(manifest(root, f"path,label,split\na.png,covid,{written}\nb.png,covid,\n"))
    assert table["split"].tolist() == [meant, ""]


def test_a_link_inside_the_folder_is_followed(root: Path) -> None:
    (root / "link.png").symlink_to(root / "deep" / "d.png")
    assert len(read_manifest(manifest(root, "path,label\nlink.png,covid\n"))) == 1


def test_the_folder_of_a_manifest_may_be_a_link(root: Path, tmp_path: Path) -> None:
    manifest(root, "path,label\na.png,covid\n")
    (tmp_path / "alias").symlink_to(root)
    table = read_manifest(tmp_path / "alias" / "manifest.csv")
    assert table["path"].tolist() == ["a.png"]


def test_line_numbers_include_blank_and_multi_line_rows(root: Path) -> None:
    text = 'path,label,note\n\na.png,covid,"two\nlines"\n\nb.png,lungs,\n'
    assert "line 6: label 'lungs' is not a class" in fault(manifest(root, text))


def test_the_order_of_lines_changes_only_line_numbers(root: Path) -> None:
    lines = ["a.png,covid,p1", "b.png,normal,p2", "c.png,pneumonia,p3", "deep/d.png,covid,p1"]
    tables = []
    for seed in range(4):
        random.Random(seed).shuffle(lines)
        tables.append(read_manifest(manifest(root, "\n".join(["path,label,patient_id", *lines]))).drop(columns="line"))
    for table in tables[1:]:
        assert table.equals(tables[0])


# faults of a line


def test_a_missing_file_is_reported(root: Path) -> None:
    assert "line 3: gone.png is missing" in fault(manifest(root, "path,label\na.png,covid\ngone.png,covid\n"))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../outside.png", "deep/../../outside.png", "out.png", "outdir/outside.png"]
)
def test_a_file_outside_the_folder_is_rejected(root: Path, name: str) -> None:
    touch(root.parent, "outside.png")
    (root / "out.png").symlink_to(root.parent / "outside.png")
    (root / "outdir").symlink_to(root.parent)
    message = fault(manifest(root, f"path,label\na.png,covid\n{name},covid\n"))
    assert f"line 3: {name} leaves the manifest's folder" in message
    assert "1 faults" in message


def test_an_absolute_path_into_the_folder_is_rejected(root: Path) -> None:
    # Such a manifest would break when its folder is moved, and its digest would depend on the place.
    name = str(root / "a.png")
    assert f"line 2: {name} leaves the manifest's folder" in fault(manifest(root, f"path,label\n{name},covid\n"))


def test_a_folder_whose_name_starts_with_the_root_is_outside(root: Path) -> None:
    # Its path starts with the path of the root.
    touch(root.parent, "set-two/a.png")
    assert "leaves the manifest's folder" in fault(manifest(root, "path,label\n../set-two/a.png,covid\n"))


@pytest.mark.parametrize("name", ["deep", ".", "pipe", "dangling", "loop", "x" * 4096])
def test_a_path_that_is_not_a_regular_file_is_rejected_without_opening_it(root: Path, name: str) -> None:
    os.mkfifo(root / "pipe")
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "loop").symlink_to(root / "loop")
    message = fault(manifest(root, f"path,label\na.png,covid\nb.png,covid\n{name},covid\n"))
    assert f"line 4: {name} is " in message
    assert ("not a regular file" in message) == (name in ("deep", ".", "pipe"))


def test_a_device_is_rejected(root: Path) -> None:
    (root / "zero").symlink_to("/dev/zero")
    assert "line 2: zero leaves the manifest's folder" in fault(manifest(root, "path,label\nzero,covid\n"))


def test_a_nul_byte_in_a_path_is_rejected(root: Path) -> None:
    message = fault(manifest(root, b"path,label\na.png,covid\nb\0.png,covid\n"))
    assert "line 3: path is empty or contains a NUL" in message


@pytest.mark.parametrize("name", ["two\nlines.png", "tab\t.png", "bell\a.png", "esc\x1b[31m.png", "c1\x9b.png"])
def test_a_control_character_in_a_path_is_rejected(root: Path, name: str) -> None:
    # It would break the line of the error message and could act on a terminal.
    touch(root, name)
    message = fault(manifest(root, f'path,label\na.png,covid\n"{name}",covid\n'))
    assert f"{name!r} contains a line break, control character or invalid UTF-8" in message
    assert message.isprintable()


def test_a_file_too_large_for_an_image_is_not_hashed(root: Path) -> None:
    with (root / "sparse.png").open("wb") as file:
        file.truncate(600 * 2**20)
    assert "line 3: sparse.png is a file of more than 512 MiB" in fault(
        manifest(root, "path,label\na.png,covid\nsparse.png,covid\n")
    )


ESCAPES = (
    "/etc/passwd",
    "//etc/passwd",
    "../outside.png",
    "./../outside.png",
    "deep/../../outside.png",
    "deep/./.././../outside.png",
    "../set-two/a.png",
    "../" * 40 + "etc/passwd",
    "out.png",
    "outdir/outside.png",
    "chain.png",
    "passwd",
    "zero",
    "self/environ",
    "~/a.png",
    "C:\\a.png",
    "file:///etc/passwd",
    "a.png/..",
    "pipe",
    "socket",
    "deep",
    "loop",
    "n" * 4096,
    "n" * 256,
    "a.png\0.csv",
)


def test_every_unsafe_path_is_rejected_with_its_line(root: Path) -> None:
    touch(root.parent, "outside.png", "set-two/a.png")
    links = {"out.png": "../outside.png", "outdir": "..", "chain.png": "out.png", "passwd": "/etc/passwd"}
    links |= {"zero": "/dev/zero", "self": "/proc/self", "loop": "loop"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        # The address of a socket has at most 108 bytes.
        os.chdir(root)
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    for line, name in enumerate(ESCAPES, start=2):
        message = fault(manifest(root, "path,label\n" + "\n" * (line - 2) + f"{name},covid\n"))
        assert f"line {line}: " in message, name
        assert "1 faults" in message


def test_an_empty_path_is_rejected(root: Path) -> None:
    assert "line 3: path is empty" in fault(manifest(root, "path,label\na.png,covid\n,covid\n"))


@pytest.mark.parametrize("again", ["a.png", "./a.png", "deep/../a.png", "deep//../a.png"])
def test_a_file_in_two_lines_is_rejected(root: Path, again: str) -> None:
    # Otherwise the same image could be in training and test.
    message = fault(manifest(root, f"path,label\na.png,covid\nb.png,covid\n{again},covid\n"))
    assert "line 4: " in message
    assert "is already in line 2" in message


def test_unknown_labels_are_counted(root: Path) -> None:
    text = "path,label\na.png,tb\nb.png,covid\nc.png,tb\ndeep/d.png,\n"
    message = fault(manifest(root, text))
    assert "3 faults" in message
    assert "line 2: label 'tb' is not a class" in message
    assert "line 4: label 'tb' is not a class" in message
    assert "line 5: label '' is not a class" in message
    assert "{'tb': 2, '': 1}" in message
    assert "covid, normal, pneumonia" in message


def test_an_unknown_split_is_rejected(root: Path) -> None:
    message = fault(manifest(root, "path,label,split\na.png,covid,train\nb.png,covid,holdout\n"))
    assert "line 3: split 'holdout' is not one of train, val, test" in message


def test_faults_are_reported_together(root: Path) -> None:
    text = "path,label,split\ngone.png,covid,train\na.png,lungs,train\na.png,covid,sometime\n../x,covid,\n"
    message = fault(manifest(root, text))
    for part in (
        "line 2: gone.png",
        "line 3: label 'lungs'",
        "line 4: a.png is already in line 3",
        "line 4: split",
        "line 5: ",
    ):
        assert part in message
    assert "5 faults" in message


def test_a_thousand_faults_give_a_short_message(root: Path) -> None:
    message = fault(manifest(root, "path,label\n" + "".join(f"gone{k}.png,covid\n" for k in range(1000))))
    assert "1000 faults" in message
    assert "and 995 more" in message
    assert len(message) < 1000


# faults of the file


@pytest.mark.parametrize("row", ["b.png", "b.png,covid,more"])
def test_a_row_with_another_number_of_fields_is_rejected(root: Path, row: str) -> None:
    message = fault(manifest(root, f"path,label\na.png,covid\n{row}\n"))
    assert "manifest.csv:3: expected 2 fields" in message


@pytest.mark.parametrize(
    ("header", "missing"),
    [("path", "label"), ("label,x", "path"), ("file,class", "path, label"), ("path;label", "path, label")],
)
def test_missing_columns_are_reported(root: Path, header: str, missing: str) -> None:
    message = fault(manifest(root, f"{header}\na.png,covid\n"))
    assert f"manifest.csv:1: column {missing} is missing" in message
    assert header.split(",")[0] in message


def test_a_repeated_column_is_rejected(root: Path) -> None:
    assert "column label is there twice" in fault(manifest(root, "path,label,label\na.png,covid,normal\n"))


def test_an_empty_manifest_is_rejected(root: Path) -> None:
    assert "column path, label is missing; found nothing" in fault(manifest(root, ""))


def test_a_manifest_without_images_is_rejected(root: Path) -> None:
    assert "has a header and no images" in fault(manifest(root, "path,label\n"))


@pytest.mark.parametrize(
    "text", [b"path,label\na.png,covid\nb\xe9.png,covid\n", b"\xff\xfep\0a\0t\0h\0", b'path,label\n"a.png,covid\n']
)
def test_a_file_that_is_not_a_utf8_csv_is_rejected(root: Path, text: bytes) -> None:
    assert "not a UTF-8 CSV file" in fault(manifest(root, text))


@pytest.mark.parametrize("name", ["nowhere.csv", "deep", "pipe.csv"])
def test_a_missing_manifest_is_reported(root: Path, name: str) -> None:
    os.mkfifo(root / "pipe.csv")
    assert "no such file" in fault(root / name)


# folders


def folder_fault(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_folder(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test", "covid", "normal", "pneumonia"),
        ("Train", "VALIDATION", "Test", "COVID-19", "No_findings", "Viral Pneumonia"),
        ("TRAIN", "Valid", "TEST", "Covid-19 125", "NORMAL", "Lung_Opacity"),
    ],
)
def test_split_and_class_folders_may_have_aliases_in_any_case(tmp_path: Path, names: tuple[str, ...]) -> None:
    splits, classes = names[:3], names[3:]
    touch(tmp_path, *(f"{split}/{label}/{k}.png" for split in splits for label in classes for k in range(2)))
    table = read_folder(tmp_path)
    assert len(table) == 18
    meant = dict(zip(names, ("train", "val", "test", "covid", "normal", "pneumonia"), strict=True))
    for path, split, label, line in zip(table["path"], table["split"], table["label"], table["line"], strict=True):
        parts = Path(path).parts
        assert (split, label, line) == (meant[parts[0]], meant[parts[1]], 0)
    assert table["patient_id"].str.startswith("image:").all()
    assert all(Path(file).is_absolute() for file in table["file"])


def test_class_folders_without_splits(tmp_path: Path) -> None:
    touch(tmp_path, "COVID/a.png", "Normal/b.png", "covid-19/c.png")
    table = read_folder(tmp_path)
    assert table["path"].tolist() == ["COVID/a.png", "Normal/b.png", "covid-19/c.png"]
    assert table["label"].tolist() == ["covid", "normal", "covid"]
    assert table["split"].tolist() == ["", "", ""]


def test_nested_files_belong_to_their_class(tmp_path: Path) -> None:
    touch(tmp_path, "train/covid/hospital/p1/a.png", "train/normal/b.png", "test/covid/normal/c.png")
    table = read_folder(tmp_path)
    assert dict(zip(table["path"], table["label"], strict=True)) == {
        "test/covid/normal/c.png": "covid",
        "train/covid/hospital/p1/a.png": "covid",
        "train/normal/b.png": "normal",
    }


def test_files_of_file_managers_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "covid/a.png", "covid/.DS_Store", "covid/Thumbs.db", "covid/sub/desktop.ini", "covid/._a.png")
    touch(tmp_path, "normal/THUMBS.DB", "normal/b.png", ".git/covid/x.png", ".cache/y.png", "README.txt")
    assert read_folder(tmp_path)["path"].tolist() == ["covid/a.png", "normal/b.png"]


def test_a_hidden_folder_inside_a_class_is_ignored(tmp_path: Path) -> None:
    # Jupyter keeps copies there, and a copy in another split is a leak.
    touch(tmp_path, "covid/a.png", "covid/.ipynb_checkpoints/a-checkpoint.png")
    assert read_folder(tmp_path)["path"].tolist() == ["covid/a.png"]


def test_a_data_set_below_a_hidden_folder_is_read(tmp_path: Path) -> None:
    # Only folders below the root of the set are ignored if they are hidden.
    touch(tmp_path, ".data/set/covid/a.png")
    assert read_folder(tmp_path / ".data" / "set")["path"].tolist() == ["covid/a.png"]


@pytest.mark.parametrize("where", ["covid", "train/covid"])
def test_a_fifo_in_a_class_folder_is_rejected(tmp_path: Path, where: str) -> None:
    # Hashing it would wait for a writer for ever.
    touch(tmp_path, f"{where}/a.png")
    os.mkfifo(tmp_path / where / "pipe.png")
    assert f"{where}/pipe.png" in folder_fault(tmp_path)


@pytest.mark.parametrize(("name", "shown"), [(b"\xff.png", r"\\xff.png"), (b"two\nlines.png", r"two\nlines.png")])
def test_a_file_name_that_a_table_cannot_contain_is_rejected(tmp_path: Path, name: bytes, shown: str) -> None:
    touch(tmp_path, "covid/a.png")
    (tmp_path / "covid" / os.fsdecode(name)).touch()
    message = folder_fault(tmp_path)
    assert shown in message
    assert message.isprintable()


def test_a_dangling_link_in_a_class_folder_is_rejected(tmp_path: Path) -> None:
    # If it were ignored, a disk that is not mounted would silently make the set smaller.
    touch(tmp_path, "covid/a.png")
    (tmp_path / "covid" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert "covid/gone.png" in folder_fault(tmp_path)


def test_unknown_folders_are_listed(tmp_path: Path) -> None:
    touch(tmp_path, "covid/a.png", "masks/b.png", "lungs/c.png")
    message = folder_fault(tmp_path)
    assert "folders lungs, masks are neither a split" in message


def test_unknown_folders_next_to_and_inside_splits_are_listed(tmp_path: Path) -> None:
    touch(tmp_path, "train/covid/a.png", "train/tuberculosis/b.png", "extra/covid/c.png", "covid/d.png")
    message = folder_fault(tmp_path)
    assert "covid, extra, train/tuberculosis" in message


@pytest.mark.parametrize("inside", [(), ("covid/",), ("train/covid/", "test/"), ("covid/.hidden",)])
def test_a_folder_without_images_is_rejected(tmp_path: Path, inside: tuple[str, ...]) -> None:
    for name in inside:
        (tmp_path / name).mkdir(parents=True) if name.endswith("/") else touch(tmp_path, name)
    assert "no images under" in folder_fault(tmp_path)


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt")
    for name in ("nowhere", "a.txt"):
        assert f"data.root={tmp_path / name}: no such folder" in folder_fault(tmp_path / name)


def test_the_table_does_not_depend_on_the_order_of_files_on_disk(tmp_path: Path) -> None:
    names = [
        f"{split}/{label}/{k}.png" for split in ("train", "test") for label in ("covid", "normal") for k in range(6)
    ]
    tables = []
    for seed in range(3):
        order = list(names)
        random.Random(seed).shuffle(order)
        touch(tmp_path / str(seed), *order)
        tables.append(read_folder(tmp_path / str(seed)).drop(columns="file"))
    assert [table["path"].tolist() for table in tables] == [sorted(names)] * 3
    assert all(table.equals(tables[0]) for table in tables)


# real sets


@pytest.fixture
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip(f"no real radiographs at {REAL}")
    return REAL


@pytest.mark.real
def test_darkcovidnet_has_1124_images(real: Path) -> None:
    table = read_manifest(real / "darkcovidnet" / "manifest.csv")
    assert table["label"].value_counts().to_dict() == {"covid": 124, "normal": 500, "pneumonia": 500}
    assert len(table) == 1124
    assert not table["patient_id"].str.startswith("image:").any()


@pytest.mark.real
@pytest.mark.parametrize("name", ["raw", "external", "imbalanced"])
def test_the_other_real_sets_have_no_fault(real: Path, name: str) -> None:
    path = real / name / "manifest.csv"
    assert len(read_manifest(path)) == len(path.read_text().splitlines()) - 1


@pytest.fixture
def input_root(tmp_path: Path) -> Path:
    """A folder of files, some of which are to be ignored."""
    folder = tmp_path / "scans"
    for name in ("b.png", "a b.JPG", "IM0001", "deep/er/c.dcm", "Thumbs.db", "DICOMDIR", ".x.png", ".h/y.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not an image")
    return folder


def names(path: object) -> list[str]:
    found = find_inputs(str(path))
    assert all(os.path.lexists(file) for _, file in found)
    assert len({name for name, _ in found}) == len(found)
    return [name for name, _ in found]


def input_fault(path: object) -> str:
    with pytest.raises(InputError) as error:
        find_inputs(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_gives_its_files_in_order(input_root: Path) -> None:
    assert names(input_root) == ["IM0001", "a b.JPG", "b.png", "deep/er/c.dcm"]


def test_special_files_and_links_are_listed_for_the_reader(input_root: Path) -> None:
    os.mkfifo(input_root / "pipe")
    (input_root / "dangling").symlink_to(input_root / "nowhere")
    # Following this link would never end.
    (input_root / "elsewhere").symlink_to(input_root.parent)
    assert names(input_root) == ["IM0001", "a b.JPG", "b.png", "dangling", "deep/er/c.dcm", "elsewhere", "pipe"]


def test_the_id_of_a_file_is_its_name(input_root: Path) -> None:
    assert find_inputs(str(input_root / "deep" / "er" / "c.dcm")) == [("c.dcm", input_root / "deep" / "er" / "c.dcm")]


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
    input_root: Path, pattern: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names(input_root.parent / pattern) == expected
    monkeypatch.chdir(input_root.parent)
    assert names(pattern) == expected


def test_a_file_whose_name_looks_like_a_glob_is_that_file(input_root: Path) -> None:
    (input_root / "a[1].png").write_bytes(b"x")
    (input_root / "a1.png").write_bytes(b"x")
    assert names(input_root / "a[1].png") == ["a[1].png"]


def test_an_input_manifest_keeps_its_order_and_needs_no_label(input_root: Path) -> None:
    (input_root / "list.csv").write_text("view,path\nPA,deep/er/c.dcm\nAP,b.png\n,./IM0001\n")
    assert find_inputs(str(input_root / "list.csv")) == [
        ("deep/er/c.dcm", input_root / "deep/er/c.dcm"),
        ("b.png", input_root / "b.png"),
        ("./IM0001", input_root / "IM0001"),
    ]


def test_an_input_manifest_has_the_same_rules_as_in_training(input_root: Path) -> None:
    (input_root.parent / "outside.png").write_bytes(b"x")
    (input_root / "list.csv").write_text("path\n../outside.png\n/etc/passwd\ngone.png\nb.png\n./b.png\n")
    message = input_fault(input_root / "list.csv")
    assert "4 faults" in message
    for part in ("line 2: ../outside.png leaves", "line 3: /etc/passwd leaves", "line 4: gone.png", "line 6: ./b.png"):
        assert part in message
    (input_root / "list.csv").write_text("file\nb.png\n")
    assert "column path is missing; found file" in input_fault(input_root / "list.csv")


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.png", "scans/*.tif", "gone.csv", "empty"])
def test_the_message_names_the_place_where_nothing_was_found(
    input_root: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (input_root.parent / "empty" / ".hidden").mkdir(parents=True)
    monkeypatch.chdir(input_root.parent)
    message = input_fault(path)
    assert path in message
    assert str(input_root.parent) in message


def test_a_name_that_is_not_utf_8_is_escaped(input_root: Path) -> None:
    (input_root / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    (name,) = [name for name in names(input_root) if "xff" in name]
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


def test_a_folder_is_searched_without_a_stat_call_per_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(2000):
        (tmp_path / f"{k:04}.png").touch()
    calls: list[object] = []
    real = os.stat

    def counting(path: object, *words: object, **more: object) -> os.stat_result:
        calls.append(path)
        return real(path, *words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", counting)
    assert len(find_inputs(str(tmp_path))) == 2000
    assert len(calls) < 20
