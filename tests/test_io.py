"""What is written is read back as it was, and a reader never meets half a file."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from covid_cls.errors import InputError, listed
from covid_cls.io import (
    ID_COLUMNS,
    atomic_file,
    digest,
    file_sha256,
    prediction_columns,
    read_json,
    read_predictions,
    write_json,
    write_predictions,
)
from covid_cls.tasks import CLASSES

TRICKY_IDS = [
    "007",
    "NA",
    "nan",
    "None",
    "null",
    "1e5",
    "0x1F",
    "True",
    "a,b",
    'say "hi"',
    "é 測",
    " padded ",
    "-0",
    "",
]


def predictions(scores: np.ndarray, ids: list[str]) -> pd.DataFrame:
    table = pd.DataFrame(dict.fromkeys(ID_COLUMNS, ids))
    for k, name in enumerate(prediction_columns(CLASSES)[len(ID_COLUMNS) :]):
        table[name] = scores[:, k]
    return table


def test_columns_of_a_predictions_table() -> None:
    assert prediction_columns(("covid", "normal")) == [
        "image_id",
        "patient_id",
        "source",
        "split",
        "fold",
        "label",
        "logit_covid",
        "logit_normal",
        "prob_covid",
        "prob_normal",
    ]


def test_every_float32_comes_back_exactly(tmp_path: Path) -> None:
    # random bit patterns: every exponent, subnormals and both signs, without NaN and infinity
    bits = np.random.default_rng(0).integers(0, 2**32, 12_000, dtype=np.uint64).astype(np.uint32)
    scores = bits.view(np.float32)
    edges = np.array(
        [0.0, -0.0, 1.0, np.nextafter(np.float32(1), np.float32(0)), 1 / 3, 1e-45, 3.4028235e38], np.float32
    )
    scores = np.concatenate([scores[np.isfinite(scores)], edges])
    scores = scores[: len(scores) // 6 * 6].reshape(-1, 6)
    write_predictions(predictions(scores, [str(k) for k in range(len(scores))]), tmp_path / "p.csv")
    back = read_predictions(tmp_path / "p.csv", CLASSES)
    columns = prediction_columns(CLASSES)[len(ID_COLUMNS) :]
    assert (back[columns].dtypes == np.float64).all()
    assert np.array_equal(back[columns].to_numpy().astype(np.float32).view(np.uint32), scores.view(np.uint32))


def test_scores_that_are_whole_numbers_are_floats_again(tmp_path: Path) -> None:
    write_predictions(predictions(np.ones((2, 6), np.float32), ["a", "b"]), tmp_path / "p.csv")
    back = read_predictions(tmp_path / "p.csv", CLASSES)
    assert (back["prob_covid"].dtype, back["logit_normal"].dtype) == (np.float64, np.float64)


def test_scores_that_are_no_numbers_are_still_scores(tmp_path: Path) -> None:
    # a model that diverged writes them: whoever judges the table must meet NaN and infinity, not text
    scores = np.array([[math.nan, math.inf, -math.inf, 0.5, 0.5, 0.0]], np.float32)
    write_predictions(predictions(scores, ["a"]), tmp_path / "p.csv")
    back = read_predictions(tmp_path / "p.csv", CLASSES)
    assert math.isnan(back.loc[0, "logit_covid"])
    assert back.loc[0, ["logit_normal", "logit_pneumonia"]].tolist() == [math.inf, -math.inf]


def test_ids_stay_text(tmp_path: Path) -> None:
    table = predictions(np.zeros((len(TRICKY_IDS), 6), np.float32), TRICKY_IDS)
    table["fold"] = "0"
    write_predictions(table, tmp_path / "p.csv")
    back = read_predictions(tmp_path / "p.csv", CLASSES)
    for name in ("image_id", "patient_id", "source", "split", "label"):
        assert back[name].tolist() == TRICKY_IDS, name
    assert back["fold"].tolist() == ["0"] * len(TRICKY_IDS)


def test_no_fold_is_missing_and_not_the_text_nan(tmp_path: Path) -> None:
    table = predictions(np.zeros((2, 6), np.float32), ["a", "b"])
    table["fold"] = ""
    write_predictions(table, tmp_path / "p.csv")
    assert read_predictions(tmp_path / "p.csv", CLASSES)["fold"].isna().all()


@pytest.mark.parametrize("column", ["patient_id", "fold", "label", "logit_normal", "prob_pneumonia"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    predictions(np.zeros((2, 6), np.float32), ["a", "b"]).drop(columns=column).to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(InputError, match=rf"p\.csv: columns \['{column}'\] are missing"):
        read_predictions(tmp_path / "p.csv", CLASSES)


def test_a_missing_predictions_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.csv: no such predictions file"):
        read_predictions(tmp_path / "nowhere.csv", CLASSES)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\xff\xfe\x00bad", b'image_id,label\n"open', b"a,b\n1,2,3\n1,2,3,4\n"]
)
def test_a_file_that_is_no_predictions_table_is_the_users_fault(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"p\.csv"):
        read_predictions(tmp_path / "p.csv", CLASSES)


def test_columns_beyond_the_schema_are_kept(tmp_path: Path) -> None:
    table = predictions(np.zeros((1, 6), np.float32), ["a"]).assign(reader="someone")
    write_predictions(table, tmp_path / "p.csv")
    assert read_predictions(tmp_path / "p.csv", CLASSES)["reader"].tolist() == ["someone"]


def test_json_round_trip(tmp_path: Path) -> None:
    record = {"text": "é 測", "number": 0.1, "none": None, "nested": {"list": [1, True, ""]}}
    write_json(tmp_path / "deep" / "er" / "run.json", record)
    assert read_json(tmp_path / "deep" / "er" / "run.json") == record
    assert (tmp_path / "deep" / "er" / "run.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(tmp_path: Path, value: float) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": value})
    assert read_json(path) == {"loss": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"run\.json: {message}"):
        read_json(tmp_path / "run.json")


def test_whole_file_keeps_the_old_content_when_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_whole_file_leaves_nothing_when_a_new_file_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_file(tmp_path / "new") as file:
            file.write(b"x")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_until_the_block_ends_readers_see_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_outputs_can_be_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {})
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    write_json(path, {})
    assert path.stat().st_mode & 0o777 == 0o644


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert (
        file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-2
    assert digest("abc") == "ba7816bf8f01cfea414140de5dae2223"
    assert digest("é") == hashlib.sha256("é".encode()).hexdigest()[:32]


def test_listed_says_how_many_more() -> None:
    assert listed([]) == ""
    assert listed(["a", 1]) == "a, 1"
    assert listed(list("abc"), 3) == "a, b, c"
    assert listed(list("abcde"), 3) == "a, b, c … and 2 more"
