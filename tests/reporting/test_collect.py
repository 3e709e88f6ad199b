from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.grid import pool_folds
from covid_cls.labels import TASKS
from covid_cls.records import read_predictions
from covid_cls.reporting.collect import Sweep, collect
from tests.reporting.sweeps import changed, predictions, write_grid, write_run

TASK = TASKS["three_class"]


def read(root: Path) -> Sweep:
    return collect(root, "report")


def states(sweep: Sweep) -> dict[str, str]:
    return {omission.what: omission.state for omission in sweep.omissions}


def test_runs_that_differ_in_seed_and_fold_alone_are_one_cell(tmp_path: Path) -> None:
    for seed in (0, 1):
        for fold in (0, 1, 2):
            write_run(tmp_path / f"deep{fold}", changed(seed=seed, data__folds=3, data__fold=fold))
    sweep = read(tmp_path)
    (protocol,) = sweep.protocols
    (cell,) = protocol.cells
    assert cell.name == "resnet18, fc, ce"
    assert (cell.seeds, protocol.folds, protocol.of_folds) == ([0, 1], ["0", "1", "2"], 3)
    assert sweep.omissions == []
    for seed, table in zip(cell.seeds, cell.tables, strict=True):
        assert list(table["image_id"]) == [f"i{k:04d}" for k in range(60)]
        files = sorted(tmp_path.glob(f"*/*-s{seed}-*/predictions-test.csv"))
        whole = pool_folds([read_predictions(path, TASK.classes) for path in files])
        pd.testing.assert_frame_equal(table, whole)


def test_a_grid_has_its_axes_and_no_holes(tmp_path: Path) -> None:
    write_grid(tmp_path)
    sweep = read(tmp_path)
    (protocol,) = sweep.protocols
    assert protocol.name == "three class, demo/manifest.csv, split by patient"
    assert [cell.name for cell in protocol.cells] == [
        f"{backbone}, {strategy}, {loss}"
        for backbone in ("resnet18", "vgg16")
        for strategy in ("fc", "full")
        for loss in ("ce", "focal")
    ]
    assert sweep.omissions == []
    assert sweep.notes == {"random weights": 16}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ({"strategy__freeze_until": "layer2"}, "resnet18, until layer2, ce"),
        ({"loss": {"name": "ce", "class_weights": "inverse_frequency"}}, "resnet18, fc, weighted_ce"),
        ({"augment__name": "none"}, "resnet18, fc, ce, none augment"),
        ({"feature_cache": "views:6"}, "resnet18, fc, ce, views:6"),
        ({"optimizer__lr": 0.5}, "resnet18, fc, ce, optimizer.lr=0.5"),
        ({"data__batch_size": 8}, "resnet18, fc, ce, data.batch_size=8"),
    ],
    ids=str,
)
def test_what_sets_a_cell_apart_is_in_its_name(tmp_path: Path, words: dict[str, Any], name: str) -> None:
    write_run(tmp_path / "a", changed())
    write_run(tmp_path / "b", changed(**words))
    (protocol,) = read(tmp_path).protocols
    assert name in [cell.name for cell in protocol.cells]
    assert len(protocol.cells) == 2


@pytest.mark.parametrize(
    "words",
    [{"output_root": "elsewhere"}, {"data__path": "/other/demo/manifest.csv"}, {"data__cache": "x"}, {"rerun": True}],
    ids=str,
)
def test_what_decides_nothing_does_not_split_a_cell(tmp_path: Path, words: dict[str, Any]) -> None:
    write_run(tmp_path / "a", changed())
    write_run(tmp_path / "b", changed(seed=1, **words))
    (protocol,) = read(tmp_path).protocols
    assert [cell.seeds for cell in protocol.cells] == [[0, 1]]


@pytest.mark.parametrize(
    "words",
    [
        {"task__name": "binary"},
        {"data__group": "image"},
        {"data__path": "sets/other/manifest.csv"},
        {"data__seed": 1},
        {"data__folds": 2},
    ],
    ids=str,
)
def test_another_protocol_is_never_compared(tmp_path: Path, words: dict[str, Any]) -> None:
    write_run(tmp_path / "a", changed())
    write_run(tmp_path / "b", changed(**words))
    protocols = read(tmp_path).protocols
    assert [len(protocol.cells) for protocol in protocols] == [1, 1]
    assert len({protocol.name for protocol in protocols}) == 2


def test_weights_that_were_fallen_back_to_are_not_those_asked_for(tmp_path: Path) -> None:
    settings = changed(backbone__weights="auto")
    write_run(tmp_path / "a", settings, weights={"used": "imagenet", "sha256": "ab"})
    write_run(tmp_path / "b", {**settings, "seed": 1}, weights={"used": "none", "sha256": None})
    (protocol,) = read(tmp_path).protocols
    assert {cell.axes["weights"]: cell.seeds for cell in protocol.cells} == {"imagenet": [0], "random": [1]}


def test_a_run_without_the_newer_key_saw_whole_images(tmp_path: Path) -> None:
    settings = changed()
    del settings["preprocess"]["seen"]
    write_run(tmp_path / "a", settings)
    write_run(tmp_path / "b", changed(seed=1))
    write_run(tmp_path / "c", changed(preprocess__seen="border"))
    (protocol,) = read(tmp_path).protocols
    assert [(cell.name, cell.probe, cell.seeds) for cell in protocol.cells] == [
        ("resnet18, fc, ce", False, [0, 1]),
        ("resnet18, fc, ce, border seen", True, [0]),
    ]


def test_probes_alone_are_no_report(tmp_path: Path) -> None:
    write_run(tmp_path, changed(preprocess__seen="border"))
    with pytest.raises(InputError, match="no network that saw whole images"):
        read(tmp_path)


def _without_config(folder: Path) -> None:
    (folder / "run.json").write_text('{"status": "finished"}', encoding="utf-8")


def _half_json(folder: Path) -> None:
    (folder / "run.json").write_text('{"status": "fini', encoding="utf-8")


def _unknown_task(folder: Path) -> None:
    path = folder / "run.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"three_class"', '"five_class"'), encoding="utf-8")


def _no_predictions(folder: Path) -> None:
    (folder / "predictions-test.csv").unlink()


def _no_record(folder: Path) -> None:
    (folder / "run.json").unlink()


def _cut_predictions(folder: Path) -> None:
    path = folder / "predictions-test.csv"
    path.write_bytes(path.read_bytes()[:900])


def _validation_as_test(folder: Path) -> None:
    (folder / "predictions-test.csv").write_bytes((folder / "predictions-val.csv").read_bytes())


@pytest.mark.parametrize(
    ("damage", "state", "says"),
    [
        (_half_json, "half-written", "not valid JSON"),
        (_without_config, "half-written", "run.json lacks or misstates 'config'"),
        (_unknown_task, "half-written", "unknown task five_class"),
        (_no_record, "half-written", "test predictions without a run.json"),
        (_no_predictions, "without test predictions", "predictions-test.csv is missing"),
        (_cut_predictions, "broken predictions", "predictions"),
        (_validation_as_test, "broken predictions", "holds images of the splits ['val'], not of test alone"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_run_is_listed_with_the_reason(
    tmp_path: Path, damage: Callable[[Path], None], state: str, says: str
) -> None:
    write_run(tmp_path, changed())
    damaged = write_run(tmp_path, changed(seed=1))
    damage(damaged)
    sweep = read(tmp_path)
    assert [cell.seeds for cell in sweep.protocols[0].cells] == [[0]]
    (found,) = [omission for omission in sweep.omissions if omission.what == damaged.name]
    assert found.state == state
    assert says in found.reason


@pytest.mark.parametrize("status", ["new", "running", "failed", "interrupted"])
def test_an_unfinished_run_is_listed_and_is_no_hole(tmp_path: Path, status: str) -> None:
    write_run(tmp_path, changed())
    folder = write_run(tmp_path, changed(seed=1), status=status, reason="MemoryError: 3 GB")
    sweep = read(tmp_path)
    assert [tuple(omission) for omission in sweep.omissions] == [(folder.name, status, "MemoryError: 3 GB")]


def test_a_search_that_left_the_test_alone_is_listed(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    folder = write_run(tmp_path, changed(seed=1, test=False))
    (folder / "predictions-test.csv").unlink()
    (omission,) = read(tmp_path).omissions
    assert omission.reason == "trained with test=false"


def test_holes_of_the_grid_are_listed(tmp_path: Path) -> None:
    for strategy, loss, seed in (("fc", "ce", 0), ("fc", "ce", 1), ("full", "ce", 0), ("fc", "focal", 0)):
        write_run(tmp_path, changed(strategy__name=strategy, loss__name=loss, seed=seed))
    assert {o.what: o.reason for o in read(tmp_path).omissions if o.state == "missing"} == {
        "resnet18, full, ce": "no run for seed 1",
        "resnet18, fc, focal": "no run for seed 1",
        "resnet18, full, focal": "no run for seed 0, seed 1",
    }


def test_a_seed_that_lacks_a_fold_is_left_out_and_listed(tmp_path: Path) -> None:
    for loss, seed, fold in (("ce", 0, 0), ("ce", 0, 1), ("focal", 0, 0), ("ce", 1, 1)):
        write_run(tmp_path, changed(loss__name=loss, seed=seed, data__folds=2, data__fold=fold))
    sweep = read(tmp_path)
    assert [(cell.name, cell.seeds) for cell in sweep.protocols[0].cells] == [("resnet18, fc, ce", [0])]
    incomplete = {o.what: o.reason for o in sweep.omissions if o.state == "incomplete"}
    assert set(incomplete) == {"resnet18, fc, ce, seed 1", "resnet18, fc, focal, seed 0"}
    assert "fold 1 is not finished" in incomplete["resnet18, fc, focal, seed 0"]
    assert "seed 1 fold 0" in {o.what: o.reason for o in sweep.omissions if o.state == "missing"}["resnet18, fc, ce"]


def test_a_fold_that_all_lack_is_missing_and_the_others_are_compared(tmp_path: Path) -> None:
    for loss in ("ce", "focal"):
        write_run(tmp_path, changed(loss__name=loss, data__folds=2, data__fold=1))
    sweep = read(tmp_path)
    (protocol,) = sweep.protocols
    assert (len(protocol.cells), protocol.folds, protocol.of_folds) == (2, ["1"], 2)
    assert set(states(sweep).values()) == {"missing"}


def test_overlapping_folds_are_refused(tmp_path: Path) -> None:
    for fold in (0, 1):
        write_run(tmp_path, changed(data__folds=2, data__fold=fold), table=predictions(TASK, n=30))
    with pytest.raises(InputError, match=r"resnet18, fc, ce, seed 0: 30 images are in the test part of more than one"):
        read(tmp_path)


def test_different_test_images_are_refused_with_cells_and_ids(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    write_run(tmp_path, changed(loss__name="focal"), images=59)
    with pytest.raises(InputError, match=r"of resnet18, fc, focal, seed 0 and resnet18, fc, ce, seed 0 .*: i0059;"):
        read(tmp_path)


def test_other_labels_are_other_images(tmp_path: Path) -> None:
    table = predictions(TASK)
    write_run(tmp_path, changed())
    write_run(tmp_path, changed(seed=1), table=table.assign(label=table["label"].replace("covid", "normal")))
    with pytest.raises(InputError, match="are not the same: i0000, i0000, i0001"):
        read(tmp_path)


def test_of_repeated_runs_the_last_counts_and_the_other_is_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "b_old", changed(), ended="2026-01-01T00:00:00+00:00")
    write_run(tmp_path / "a_new", changed(), ended="2026-02-01T00:00:00+00:00", skill=3.0)
    sweep = read(tmp_path)
    (cell,) = sweep.protocols[0].cells
    assert [run.folder.parent.name for run in cell.runs] == ["a_new"]
    (omission,) = sweep.omissions
    assert omission.what.startswith("b_old/")
    assert omission.state == "superseded"


def test_each_reading_is_an_opening(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, changed(seed=seed)) for seed in (0, 1)]
    unread = write_run(tmp_path, changed(seed=2), status="failed")
    assert [read(tmp_path).openings.times for _ in range(3)] == [1, 2, 3]
    for folder in folders:
        assert len((folder / "openings.csv").read_text(encoding="utf-8").splitlines()) == 1 + 3
    assert not (unread / "openings.csv").exists()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run.json below it; give the folder of a sweep"):
        read(tmp_path)


def test_a_sweep_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, changed(), status="failed", reason="ValueError: x")
    with pytest.raises(
        InputError, match=r"none of its 1 runs is finished and readable: .* is failed \(ValueError: x\)"
    ):
        read(tmp_path)
