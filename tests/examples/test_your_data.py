"""The error messages in docs/your-data.md are those that the described faults cause."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covid_cls.errors import InputError
from tests.examples.documents import code_blocks
from tests.training.small import compose_small, make_data

(LINES,) = code_blocks("your-data.md", "text")
COUNTS = {"covid": 12, "normal": 12}


def write_set(root: Path, counts: dict[str, int], column: str = "", first: str = "", rest: str = "") -> None:
    """Write noise images and their manifest, with `first` in the first row of `column` and `rest` in the others."""
    (root / "images").mkdir(parents=True)
    lines = [",".join(["path,label", *([column] if column else [])])]
    generator = np.random.default_rng(0)
    for label, count in counts.items():
        for k in range(count):
            noise = generator.integers(0, 256, (48, 48), dtype=np.uint8)
            Image.fromarray(noise).save(root / "images" / f"{label}{k}.png")
            value = [first if len(lines) == 1 else rest] if column else []
            lines.append(",".join([f"images/{label}{k}.png", label, *value]))
    (root / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def no_path_column(root: Path) -> None:
    root.mkdir()
    (root / "manifest.csv").write_text("file,label\na.png,covid\n", encoding="utf-8")


def three_faults(root: Path) -> None:
    write_set(root, {"covid": 1})
    text = "path,label\nimages/a.png,covid\n../b.png,covid\nimages/covid0.png,tuberculosis\n"
    (root / "manifest.csv").write_text(text, encoding="utf-8")


def patient_in_two_splits(root: Path) -> None:
    write_set(root, {"covid": 2})
    text = "path,label,patient_id,split\nimages/covid0.png,covid,p1,train\nimages/covid1.png,covid,p1,test\n"
    (root / "manifest.csv").write_text(text, encoding="utf-8")


def rare_class(root: Path) -> None:
    write_set(root, {"covid": 2, "normal": 12})


def truncated_image(root: Path) -> None:
    write_set(root, COUNTS)
    image = root / "images" / "covid0.png"
    image.write_bytes(image.read_bytes()[:200])


def changed_file(root: Path) -> None:
    write_set(root, COUNTS, "sha256", first="0" * 64)


def unknown_folder(root: Path) -> None:
    (root / "train" / "covid").mkdir(parents=True)
    (root / "Lungs").mkdir()
    Image.new("L", (48, 48)).save(root / "Lungs" / "a.png")


FAULTS: list[Callable[[Path], None]] = [
    no_path_column,
    three_faults,
    patient_in_two_splits,
    rare_class,
    truncated_image,
    changed_file,
    unknown_folder,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_page_shows_the_message_of_each_fault(
    fault: Callable[[Path], None], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fault(Path("my_set"))
    settings = compose_small()
    drawn = ("images", "phantom_seed", "shortcut", "shortcut_strength")
    images = {"kind": "manifest", "path": "my_set/manifest.csv"}
    if fault is unknown_folder:
        images = {"kind": "folder", "root": "my_set"}
    settings["data"] = {**{key: value for key, value in settings["data"].items() if key not in drawn}, **images}
    with pytest.raises(InputError) as error:
        make_data(settings, cache)
    line = f"error: {error.value}".replace(str(tmp_path), "/home/me")
    assert line in LINES.splitlines()


def test_every_message_on_the_page_has_a_fault() -> None:
    assert len(LINES.splitlines()) == len(FAULTS)
