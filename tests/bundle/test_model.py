"""Predictions come in the order of the images, are those of the run, and need a constant amount of memory."""

import os
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from covid_cls.bundle.model import REASONS, UNDECIDED, UNREADABLE, Model, PredictionSummary, predict_images
from covid_cls.bundle.ood import OodDetector, fit_ood
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.readers import HEADER_REASONS
from covid_cls.errors import InputError
from covid_cls.training.split_predictions import predict_split
from tests.data.test_dicom import radiograph, saved
from tests.training.small import compose_small, make_classifier, make_data

OPERATING = {"temperature": 1.7, "thresholds": {"youden": 0.4, "sensitivity_95": 0.2, "specificity_95": None}}
SCORES = ["logit_covid", "logit_normal", "prob_covid", "prob_normal"]


@pytest.fixture(scope="module")
def data(cache: Path) -> Radiographs:
    """Phantoms whose canvas is larger than the network's input, as augmentation needs it."""
    return make_data(compose_small("augment=original"), cache)


@pytest.fixture(scope="module")
def model(data: Radiographs) -> Model:
    """A model with an untrained network."""
    scorer = make_classifier(compose_small("augment=original")).scorer()
    return Model(Path("nowhere"), {"operating": OPERATING}, scorer, OodDetector(fit_ood(scorer, data)))


@pytest.fixture(scope="module")
def files(data: Radiographs) -> list[tuple[str, Path]]:
    """All phantoms with their names."""
    return [(str(path), Path(file)) for path, file in zip(data.table["path"], data.table["file"], strict=True)]


def join(tables: Iterator[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(list(tables), ignore_index=True)


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_scores_are_those_of_the_run(
    model: Model, data: Radiographs, files: list[tuple[str, Path]], batch_size: int
) -> None:
    ours = join(predict_images(model, files, batch_size=batch_size)).set_index("image_id")
    for split in ("train", "val", "test"):
        theirs = predict_split(model.scorer, data, split).set_index("image_id")
        assert len(theirs)
        np.testing.assert_allclose(ours.loc[theirs.index, SCORES], theirs[SCORES], atol=1e-5, rtol=0)


def test_tables_have_one_batch_each_in_the_order_of_the_images(model: Model, files: list[tuple[str, Path]]) -> None:
    backwards = files[::-1]
    tables = list(predict_images(model, backwards, batch_size=7))
    assert [len(table) for table in tables] == [7] * (len(files) // 7) + [len(files) % 7] * (len(files) % 7 > 0)
    assert [name for table in tables for name in table["image_id"]] == [name for name, _ in backwards]
    assert all(list(table.columns) == ["image_id", *model.columns] for table in tables)


def test_no_image_gives_no_table(model: Model) -> None:
    assert list(predict_images(model, [])) == []


def test_images_are_read_only_a_few_batches_ahead(model: Model) -> None:
    count = 0

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal count
        for k in range(1000):
            count += 1
            yield str(k), np.random.default_rng(k).integers(0, 256, (40, 40), np.uint8)

    threads = set(threading.enumerate())
    tables = predict_images(model, pictures(), batch_size=4)
    for k in range(1, 6):
        next(tables)
        assert count <= 4 * (k + 3)
    before = count
    tables.close()  # as after Ctrl-C
    assert count == before  # no further image is read, and no thread is left
    assert set(threading.enumerate()) <= threads


def test_memory_does_not_grow_with_the_number_of_images(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)).save(path)

    def peak(images: int) -> int:
        tracemalloc.start()
        try:
            for _ in predict_images(model, ((str(k), path) for k in range(images)), batch_size=8):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(16)  # fills imports and caches
    few, many = peak(32), peak(256)
    assert many - few < 5e6  # keeping 224 more images would need 20 MB


def test_an_unreadable_file_has_a_row_and_does_not_affect_the_others(
    model: Model, files: list[tuple[str, Path]], tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(files[0][1].read_bytes()[:400])
    os.mkfifo(tmp_path / "pipe")
    bad = [(name, tmp_path / name) for name in ("text.png", "cut.png", "pipe", "gone.png")]
    mixed = [files[0], *bad, *files[1:4]]
    table = join(predict_images(model, mixed, batch_size=3))  # one batch has no readable image
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
    alone = join(predict_images(model, [files[0], *files[1:4]]))
    np.testing.assert_allclose(fine[SCORES], alone[SCORES], atol=1e-5, rtol=0)


def test_reasons_from_the_dicom_header_are_added(model: Model, files: list[tuple[str, Path]], tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(files[0][1]).convert("L"))
    tags = {
        "frontal": {"ViewPosition": "PA"},
        "lateral": {"ViewPosition": "LL"},
        "ankle": {"BodyPartExamined": "ANKLE"},
    }
    named = [(name, saved(radiograph(pixels, 8, **more), tmp_path, name)) for name, more in tags.items()]
    table = join(predict_images(model, named, dicom_tags=["PatientID", "ViewPosition"])).set_index("image_id")
    codes = [set(filter(None, reasons.split(";"))) for reasons in table["reasons"]]
    assert codes[1] - codes[0] == {"lateral_view"}
    assert codes[2] - codes[0] == {"not_a_chest_radiograph"}
    assert table["decision"].tolist()[1:] == [UNDECIDED, UNDECIDED]
    assert table["ViewPosition"].tolist() == ["PA", "LL", ""]
    assert list(table.columns) == [*model.columns, "PatientID", "ViewPosition"]
    assert table[SCORES].notna().all(axis=None)  # the scores are kept


def test_a_requested_tag_is_empty_for_other_files(model: Model, files: list[tuple[str, Path]], tmp_path: Path) -> None:
    (tmp_path / "bad.dcm").write_bytes(b"\0" * 200)
    table = join(predict_images(model, [files[0], ("bad", tmp_path / "bad.dcm")], dicom_tags=["PatientID"]))
    assert table["PatientID"].tolist() == ["", ""]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"threshold": "best"}, "threshold=best: unknown. This model has youden, sensitivity_95"),
        ({"threshold": "specificity_95"}, "threshold=specificity_95"),  # the validation split gave no value
        ({"dicom_tags": ["Patient"]}, "PatientID"),
    ],
)
def test_an_option_out_of_range_is_an_error_before_an_image_is_read(
    model: Model, options: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        predict_images(model, iter([]), **options)  # type: ignore[arg-type]


def test_every_code_has_a_meaning() -> None:
    assert set(HEADER_REASONS) < set(REASONS)
    assert UNREADABLE in REASONS
    assert all(REASONS.values())


def test_the_summary_counts_decisions_and_reasons_and_lists_unreadable_files() -> None:
    summary = PredictionSummary(("covid", "normal", "pneumonia"))
    for k in range(3):
        names = [f"{k}{letter}\x1b.png" for letter in "abcdefgh"]
        reasons = ["", "", "", "lateral_view;inverted", *[UNREADABLE] * 4]
        decisions = ["normal", "covid", "covid", *[UNDECIDED] * 5]
        detail = ["", "", "", "", *["empty file"] * 4]
        summary.add(pd.DataFrame({"image_id": names, "decision": decisions, "reasons": reasons, "detail": detail}))
    assert (summary.images, summary.readable) == (24, 12)
    lines = summary.lines(REASONS)
    assert lines[0] == "24 images: 6 covid, 3 normal, 0 pneumonia, 15 undecided"
    assert sum("empty file" in line for line in lines) == 10
    assert "2 more" in lines[-1]
    assert [line.split()[:2] for line in lines if "lateral_view" in line] == [["3", "lateral_view"]]
    assert "\x1b" not in "".join(lines)
