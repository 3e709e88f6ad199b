"""Verdicts, and the gate that a run passes before it trains."""

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from covid_cls.audits.checks import Finding
from covid_cls.audits.findings import gate, gravest_first, no_probes, probe_findings, verdict_line
from covid_cls.data.datamodule import Radiographs
from covid_cls.data.phantom import build_phantoms
from covid_cls.errors import InputError
from covid_cls.evaluation.intervals import Interval
from covid_cls.labels import TASKS

SOURCE = Finding("fail", "source predicts label, Cramér's V 1.00", "", consequence="not evidence of disease detection")


def test_the_verdict_counts_what_fails_and_names_the_gravest() -> None:
    warning, leak = Finding("warn", "few", ""), Finding("fail", "patients in two splits", "")
    assert verdict_line([]) == "No finding fails; 0 warnings"
    assert verdict_line([warning, no_probes("too few")]) == "No finding fails; 1 warning"
    assert verdict_line([warning, leak]) == (
        "1 finding that fails: scores on this set are not to be trusted (patients in two splits)"
    )
    assert verdict_line([leak, SOURCE]) == (
        "2 findings that fail: scores on this set are not evidence of disease detection "
        "(source predicts label, Cramér's V 1.00)"
    )
    assert gravest_first([warning, leak, SOURCE]) == [leak, SOURCE, warning]


@pytest.mark.parametrize(
    ("probe", "low", "fires"),
    [("frame", 0.61, True), ("frame", 0.60, False), ("thumbnail", 0.9, False), ("header", math.nan, False)],
)
def test_a_probe_fires_if_it_sees_no_lungs_and_is_surely_good(probe: str, low: float, fires: bool) -> None:
    found = probe_findings({probe: {"macro_auroc": Interval(0.95, low, 0.99, "")}})
    assert [finding.level for finding in found] == ["fail"] * fires


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 phantoms with their manifest; not to be changed."""
    return build_phantoms(tmp_path_factory.mktemp("drawn"), images=60, seed=4).parent


def radiographs(folder: Path, cache: Path, **settings: Any) -> Radiographs:
    settings = {"kind": "manifest", "path": str(folder / "manifest.csv"), "cache": str(cache), **settings}
    settings = {"val_share": 0.25, "test_share": 0.25, **settings}
    return Radiographs(TASKS["three_class"], 312, 0, **settings)


def edited(drawn: Path, folder: Path, **columns: Any) -> Path:
    shutil.copytree(drawn, folder)
    pd.read_csv(folder / "manifest.csv").assign(**columns).to_csv(folder / "manifest.csv", index=False)
    return folder


def test_clean_phantoms_pass_the_gate_and_are_searched_once(drawn: Path, tmp_path: Path) -> None:
    assert gate(radiographs(drawn, tmp_path), "fail") == []
    assert gate(radiographs(drawn, tmp_path, seed=1), "fail") == []  # other splits, the same copies
    assert len(list((tmp_path / "audits").iterdir())) == 1


def test_a_label_pure_source_is_noted_or_refused(drawn: Path, cache: Path, tmp_path: Path) -> None:
    folder = edited(drawn, tmp_path / "own", source=lambda table: "from " + table["label"])
    data = radiographs(folder, cache)
    (note,) = gate(data, "warn")
    assert note.startswith("audit: source predicts label, Cramér's V 1.00")
    with pytest.raises(
        InputError, match=r"source predicts label.*test on a source that was not trained on.*audit=warn"
    ):
        gate(data, "fail")
    assert gate(data, "off") == gate(data, False) == []


def test_the_leaky_split_is_noted(drawn: Path, cache: Path) -> None:
    (note, *_) = gate(radiographs(drawn, cache, group="image"), "warn")
    assert note.startswith("audit: patients in two splits")


def test_a_copy_in_another_split_is_noted(drawn: Path, cache: Path, tmp_path: Path) -> None:
    folder = edited(drawn, tmp_path / "own")
    table = pd.read_csv(folder / "manifest.csv")
    table["split"] = ["train", "val", "test"] * 20
    table["patient_id"] = [f"q{k}" for k in range(60)]
    original = table.iloc[0]
    shutil.copyfile(folder / original["path"], folder / "images" / "again.png")
    again = {**original, "path": "images/again.png", "split": "test", "patient_id": "someone else"}
    pd.concat([table, pd.DataFrame([again])]).to_csv(folder / "manifest.csv", index=False)
    with pytest.raises(InputError, match="copies of one image in two splits"):
        gate(radiographs(folder, cache), "fail")


def test_another_mode_is_refused(drawn: Path, cache: Path) -> None:
    with pytest.raises(InputError, match="audit=loud: must be off, warn, fail"):
        gate(radiographs(drawn, cache), "loud")
