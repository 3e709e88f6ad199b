"""Images go through in order, decoded ahead of the network, with the numbers of the run and without growing."""

import os
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from covid_cls.artifact.model import UNDECIDED, UNREADABLE, Model
from covid_cls.artifact.screen import Screen, fit_screen
from covid_cls.artifact.stream import REASONS, Tally, predict_pictures
from covid_cls.data import header
from covid_cls.data.datamodule import Radiographs
from covid_cls.errors import InputError
from covid_cls.training.predict import predict_split
from tests.data.test_dicom import radiograph, saved
from tests.training.small import compose_small, make_classifier, make_data

OPERATING = {"temperature": 1.7, "thresholds": {"youden": 0.4, "sensitivity_95": 0.2, "specificity_95": None}}
SCORES = ["logit_covid", "logit_normal", "prob_covid", "prob_normal"]


@pytest.fixture(scope="module")
def data(cache: Path) -> Radiographs:
    """Phantoms whose canvas is wider than what the network sees, as augmentation needs it."""
    return make_data(compose_small("augment=seed"), cache)


@pytest.fixture(scope="module")
def model(data: Radiographs) -> Model:
    """An untrained network as a model."""
    scorer = make_classifier(compose_small("augment=seed")).scorer()
    return Model(Path("nowhere"), {"operating": OPERATING}, scorer, Screen(fit_screen(scorer, data)))


@pytest.fixture(scope="module")
def files(data: Radiographs) -> list[tuple[str, Path]]:
    """All phantoms, by name."""
    return [(str(path), Path(file)) for path, file in zip(data.table["path"], data.table["file"], strict=True)]


def whole(tables: Iterator[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(list(tables), ignore_index=True)


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_the_numbers_are_those_of_the_run(
    model: Model, data: Radiographs, files: list[tuple[str, Path]], batch_size: int
) -> None:
    ours = whole(predict_pictures(model, files, batch_size=batch_size)).set_index("image_id")
    for split in ("train", "val", "test"):
        theirs = predict_split(model.scorer, data, split).set_index("image_id")
        assert len(theirs)
        np.testing.assert_allclose(ours.loc[theirs.index, SCORES], theirs[SCORES], atol=1e-5, rtol=0)


def test_rows_come_in_the_order_of_the_images_in_tables_of_a_batch(model: Model, files: list[tuple[str, Path]]) -> None:
    turned = files[::-1]
    tables = list(predict_pictures(model, turned, batch_size=7))
    assert [len(table) for table in tables] == [7] * (len(files) // 7) + [len(files) % 7] * (len(files) % 7 > 0)
    assert [name for table in tables for name in table["image_id"]] == [name for name, _ in turned]
    assert all(list(table.columns) == ["image_id", *model.columns] for table in tables)


def test_no_image_is_no_table(model: Model) -> None:
    assert list(predict_pictures(model, [])) == []


def test_images_are_asked_for_only_a_few_batches_ahead(model: Model) -> None:
    asked = 0

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal asked
        for k in range(1000):
            asked += 1
            yield str(k), np.random.default_rng(k).integers(0, 256, (40, 40), np.uint8)

    threads = set(threading.enumerate())
    tables = predict_pictures(model, pictures(), batch_size=4)
    for k in range(1, 6):
        next(tables)
        assert asked <= 4 * (k + 3)
    before = asked
    tables.close()  # what a Ctrl-C does
    assert asked == before  # it asks for nothing more, and leaves no thread that waits
    assert set(threading.enumerate()) <= threads


def test_memory_does_not_grow_with_the_number_of_images(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)).save(path)

    def peak(images: int) -> int:
        tracemalloc.start()
        try:
            for _ in predict_pictures(model, ((str(k), path) for k in range(images)), batch_size=8):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(16)  # imports and caches
    few, many = peak(32), peak(256)
    assert many - few < 5e6  # 224 images more, if kept, would add 20 MB


def test_an_unreadable_file_is_a_row_and_spoils_no_other(
    model: Model, files: list[tuple[str, Path]], tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(files[0][1].read_bytes()[:400])
    os.mkfifo(tmp_path / "pipe")
    bad = [(name, tmp_path / name) for name in ("text.png", "cut.png", "pipe", "gone.png")]
    mixed = [files[0], *bad, *files[1:4]]
    table = whole(predict_pictures(model, mixed, batch_size=3))  # one batch has no readable image at all
    assert table["image_id"].tolist() == [name for name, _ in mixed]
    broken = table[table["image_id"].isin([name for name, _ in bad])]
    assert broken["decision"].tolist() == [UNDECIDED] * 4
    assert broken["reasons"].tolist() == [UNREADABLE] * 4
    assert broken[model.columns[:-3]].isna().all(axis=None)
    for detail, words in zip(broken["detail"], ("a text file", "", "not a regular file", "No such file"), strict=True):
        assert detail
        assert words in detail
    fine = table.drop(broken.index)
    assert (fine["detail"] == "").all()
    alone = whole(predict_pictures(model, [files[0], *files[1:4]]))
    np.testing.assert_allclose(fine[SCORES], alone[SCORES], atol=1e-5, rtol=0)


def test_what_a_dicom_header_says_is_added_to_the_reasons(
    model: Model, files: list[tuple[str, Path]], tmp_path: Path
) -> None:
    pixels = np.asarray(Image.open(files[0][1]).convert("L"))
    tags = {
        "frontal": {"ViewPosition": "PA"},
        "lateral": {"ViewPosition": "LL"},
        "ankle": {"BodyPartExamined": "ANKLE"},
    }
    named = [(name, saved(radiograph(pixels, 8, **more), tmp_path, name)) for name, more in tags.items()]
    table = whole(predict_pictures(model, named, dicom_tags=["PatientID", "ViewPosition"])).set_index("image_id")
    codes = [set(filter(None, reasons.split(";"))) for reasons in table["reasons"]]
    assert codes[1] - codes[0] == {"lateral_view"}
    assert codes[2] - codes[0] == {"not_a_chest_radiograph"}
    assert table["decision"].tolist()[1:] == [UNDECIDED, UNDECIDED]
    assert table["ViewPosition"].tolist() == ["PA", "LL", ""]
    assert list(table.columns) == [*model.columns, "PatientID", "ViewPosition"]
    assert table[SCORES].notna().all(axis=None)  # what the network says stays visible


def test_a_tag_asked_for_is_empty_for_other_files(model: Model, files: list[tuple[str, Path]], tmp_path: Path) -> None:
    (tmp_path / "bad.dcm").write_bytes(b"\0" * 200)
    table = whole(predict_pictures(model, [files[0], ("bad", tmp_path / "bad.dcm")], dicom_tags=["PatientID"]))
    assert table["PatientID"].tolist() == ["", ""]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"threshold": "best"}, "threshold=best: this model has youden, sensitivity_95"),
        ({"threshold": "specificity_95"}, "threshold=specificity_95"),  # validation gave none
        ({"dicom_tags": ["Patient"]}, "PatientID"),
    ],
)
def test_an_option_out_of_range_is_refused_before_an_image_is_read(
    model: Model, options: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        predict_pictures(model, iter([]), **options)  # type: ignore[arg-type]


def test_every_code_has_its_meaning() -> None:
    assert set(header.REASONS) < set(REASONS)
    assert UNREADABLE in REASONS
    assert all(REASONS.values())


def test_a_tally_counts_decisions_reasons_and_the_first_unreadable_files() -> None:
    tally = Tally(("covid", "normal", "pneumonia"))
    for k in range(3):
        names = [f"{k}{letter}\x1b.png" for letter in "abcdefgh"]
        reasons = ["", "", "", "lateral_view;inverted", *[UNREADABLE] * 4]
        decisions = ["normal", "covid", "covid", *[UNDECIDED] * 5]
        detail = ["", "", "", "", *["empty file"] * 4]
        tally.add(pd.DataFrame({"image_id": names, "decision": decisions, "reasons": reasons, "detail": detail}))
    assert (tally.images, tally.readable) == (24, 12)
    lines = tally.lines(REASONS)
    assert lines[0] == "24 images: 6 covid, 3 normal, 0 pneumonia, 15 undecided"
    assert sum("empty file" in line for line in lines) == 10
    assert "2 more" in lines[-1]
    assert [line.split()[:2] for line in lines if "lateral_view" in line] == [["3", "lateral_view"]]
    assert "\x1b" not in "".join(lines)
