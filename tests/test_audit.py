"""`audit` on phantoms and on small data sets with faults: exit codes, findings, the page and the record."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from covid_cls.data.phantoms import build_phantoms
from covid_cls.evaluation.intervals import score_intervals
from covid_cls.shortcuts import baselines
from tests.conftest import Command, command

PHANTOMS = ("data=phantom", "data.images=99", "data.phantom_seed=7", "baseline_folds=3")


@pytest.fixture
def audit(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`audit` in this process, with 20 trees instead of 300 and 200 resamples instead of 2,000, which saves time."""
    monkeypatch.setitem(score_intervals.__kwdefaults__, "resamples", 200)
    for function in (baselines.cross_validated_baselines, baselines.source_within_class):
        monkeypatch.setitem(function.__kwdefaults__, "trees", 20)
    return command("audit", environment)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def levels(found: dict[str, Any]) -> set[str]:
    return {finding["level"] for finding in found["findings"]}


def test_clean_phantoms_pass_with_a_page_that_needs_no_network(audit: Command, tmp_path: Path) -> None:
    done = audit(tmp_path, *PHANTOMS)
    assert done.returncode == 0, done.stderr
    assert "No check failed" in done.stdout
    found = record(tmp_path / "outputs" / "audit" / "phantom")
    assert "fail" not in levels(found)
    assert found["data"]["images"] == 99
    assert sum(row["images"] for row in found["data"]["counts"]) == 99
    assert set(found["baselines"]) >= {"header", "metadata", "frame", "thumbnail"}
    interval = found["baselines"]["frame"]["scores"]["macro_auroc"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    page = (tmp_path / "outputs" / "audit" / "phantom" / "audit.html").read_text(encoding="utf-8")
    assert "Research use, not for diagnosis" in page
    assert found["verdict"] in page
    assert not re.search(r"""(src|href|url)[="'(]+https?:|<script|@import""", page)


def test_a_planted_marker_fails(audit: Command, tmp_path: Path) -> None:
    done = audit(tmp_path, *PHANTOMS, "data.shortcut=marker", "output=here")
    assert done.returncode == 1, done.stderr
    assert "fail: the frame baseline predicts the class" in done.stdout
    assert "not evidence of disease detection" in record(tmp_path / "here")["verdict"]


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A small folder of class folders in splits: a copy in two splits, one in two classes, a file that is no image."""
    drawn = build_phantoms(tmp_path / "drawn", images=18, seed=1)
    root = tmp_path / "set"
    for k, row in enumerate(pd.read_csv(drawn).to_dict("records")):
        split = ("train", "val", "test")[k % 3]
        (root / split / row["label"]).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(drawn.parent / row["path"], root / split / row["label"] / Path(row["path"]).name)
    image = next((root / "train" / "covid").iterdir())
    shutil.copyfile(image, root / "test" / "covid" / "again.png")
    other = next((root / "train" / "normal").iterdir())
    shutil.copyfile(other, root / "train" / "pneumonia" / "other.png")
    (root / "train" / "covid" / "notes.txt").write_text("not an image", encoding="utf-8")
    return root


def test_faults_of_a_small_set_are_all_reported(audit: Command, faulty: Path) -> None:
    done = audit(faulty.parent, "data=folder", "data.root=set", "output=out", "baselines=false")
    assert done.returncode == 1, done.stderr
    found = {finding["title"]: finding for finding in record(faulty.parent / "out")["findings"]}
    assert any("again.png" in line for line in found["copies of one image in two splits"]["examples"])
    assert any("other.png" in line for line in found["copies of one image in two classes"]["examples"])
    (line,) = found["unreadable files"]["examples"]
    assert line == "train/covid/notes.txt: a text file, not an image"
    assert found["images without patient_id"]["level"] == "warn"
    assert found["sources are not named"]["level"] == "warn"
    page = (faulty.parent / "out" / "audit.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 4


def test_a_set_too_small_for_folds_is_audited_without_baselines(audit: Command, tmp_path: Path) -> None:
    drawn = build_phantoms(tmp_path / "few", images=6)
    table = pd.read_csv(drawn)
    table[table["label"] != "pneumonia"].assign(patient_id="one").to_csv(drawn, index=False)
    done = audit(tmp_path, "data=manifest", "data.path=few/manifest.csv", "output=out")
    assert done.returncode == 0, done.stderr
    found = record(tmp_path / "out")
    assert found["data"]["task"] == "binary"
    assert found["data"]["splits"] == "none, because there are too few patients"
    assert "shortcut baselines could not be computed" in {finding["title"] for finding in found["findings"]}


def test_a_patient_in_two_given_splits_is_a_finding_and_no_error(audit: Command, tmp_path: Path) -> None:
    drawn = build_phantoms(tmp_path / "few", images=12)
    table = pd.read_csv(drawn)
    table["split"] = ["train", "val"] * 6
    table.loc[[0, 1], "patient_id"] = "leak"
    table.to_csv(drawn, index=False)
    done = audit(tmp_path, "data=manifest", "data.path=few/manifest.csv", "output=out", "baselines=false")
    assert done.returncode == 1, done.stderr
    (finding,) = (one for one in record(tmp_path / "out")["findings"] if one["title"] == "patients in two splits")
    assert "leak (train+val)" in finding["examples"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=manifest", "data.path=nowhere.csv"], "nowhere.csv: no such file"),
        (["data.sice=3"], "sice"),
        (["output=3", "data.size=large"], "data.size=large: expected int"),
        (["baseline_folds=1"], "baseline_folds=1 seed=0: give at least 2 folds and a seed of at least 0"),
    ],
)
def test_a_fault_of_the_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, audit: Command, tmp_path: Path
) -> None:
    done = audit(tmp_path, *words)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_help_names_what_audit_takes(audit: Command, tmp_path: Path) -> None:
    done = audit(tmp_path, "--help")
    assert done.returncode == 0
    for word in ("covid_cls.audit", "baseline_folds", "data.root=DIR"):
        assert word in done.stdout
