"""Run folders are grouped into configurations and protocols, and everything that cannot be used is listed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.predictions import pool_folds
from covid_cls.io import read_predictions
from covid_cls.reporting.sweep_loading import LoadedSweep, find_runs, load_sweep
from covid_cls.tasks import TASKS
from tests.reporting.sweeps import changed, predictions, write_grid, write_run

TASK = TASKS["three_class"]


def read(root: Path) -> LoadedSweep:
    return load_sweep(find_runs(root), "report")


def states(sweep: LoadedSweep) -> dict[str, str]:
    return {omission.what: omission.state for omission in sweep.omissions}


def test_runs_that_differ_only_in_seed_and_fold_are_one_configuration(tmp_path: Path) -> None:
    for seed in (0, 1):
        for fold in (0, 1, 2):
            write_run(tmp_path / f"deep{fold}", changed(seed=seed, data__folds=3, data__fold=fold))
    sweep = read(tmp_path)
    (protocol,) = sweep.protocols
    (configuration,) = protocol.configurations
    assert configuration.name == "resnet18, fc, ce"
    assert (configuration.seeds, protocol.folds, protocol.of_folds) == ([0, 1], ["0", "1", "2"], 3)
    assert sweep.omissions == []
    for seed, table in zip(configuration.seeds, configuration.tables, strict=True):
        assert list(table["image_id"]) == [f"i{k:04d}" for k in range(60)]
        files = sorted(tmp_path.glob(f"*/*-s{seed}-*/predictions-test.csv"))
        pooled = pool_folds([read_predictions(path, TASK.classes) for path in files])
        pd.testing.assert_frame_equal(table, pooled)


def test_a_full_grid_has_all_configurations_and_nothing_missing(tmp_path: Path) -> None:
    write_grid(tmp_path)
    sweep = read(tmp_path)
    (protocol,) = sweep.protocols
    assert protocol.name == "three class, demo/manifest.csv, split by patient"
    assert [configuration.name for configuration in protocol.configurations] == [
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
        ({"strategy__freeze_until": "layer2"}, "resnet18, until_layer2, ce"),
        ({"loss": {"name": "ce", "class_weights": "inverse_frequency"}}, "resnet18, fc, weighted_ce"),
        ({"augment__name": "none"}, "resnet18, fc, ce, none augment"),
        ({"feature_cache": "views:6"}, "resnet18, fc, ce, views:6"),
        ({"optimizer__lr": 0.5}, "resnet18, fc, ce, optimizer.lr=0.5"),
        ({"data__batch_size": 8}, "resnet18, fc, ce, data.batch_size=8"),
    ],
    ids=str,
)
def test_the_name_of_a_configuration_has_the_settings_that_differ(
    tmp_path: Path, words: dict[str, Any], name: str
) -> None:
    write_run(tmp_path / "a", changed())
    write_run(tmp_path / "b", changed(**words))
    (protocol,) = read(tmp_path).protocols
    assert name in [configuration.name for configuration in protocol.configurations]
    assert len(protocol.configurations) == 2


@pytest.mark.parametrize(
    "words",
    [{"output_root": "elsewhere"}, {"data__path": "/other/demo/manifest.csv"}, {"data__cache": "x"}, {"rerun": True}],
    ids=str,
)
def test_settings_without_influence_do_not_split_a_configuration(tmp_path: Path, words: dict[str, Any]) -> None:
    write_run(tmp_path / "a", changed())
    write_run(tmp_path / "b", changed(seed=1, **words))
    (protocol,) = read(tmp_path).protocols
    assert [configuration.seeds for configuration in protocol.configurations] == [[0, 1]]


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
def test_runs_on_different_test_images_are_in_different_protocols(tmp_path: Path, words: dict[str, Any]) -> None:
    write_run(tmp_path / "a", changed())
    write_run(tmp_path / "b", changed(**words))
    protocols = read(tmp_path).protocols
    assert [len(protocol.configurations) for protocol in protocols] == [1, 1]
    assert len({protocol.name for protocol in protocols}) == 2


def test_the_weights_that_were_used_count_and_not_those_requested(tmp_path: Path) -> None:
    settings = changed(backbone__weights="auto")
    write_run(tmp_path / "a", settings, weights={"used": "imagenet", "sha256": "ab"})
    write_run(tmp_path / "b", {**settings, "seed": 1}, weights={"used": "none", "sha256": None})
    (protocol,) = read(tmp_path).protocols
    assert {configuration.axes["weights"]: configuration.seeds for configuration in protocol.configurations} == {
        "imagenet": [0],
        "random": [1],
    }


def test_a_run_of_version_0_1_saw_entire_images(tmp_path: Path) -> None:
    settings = changed()
    del settings["preprocess"]["seen"]
    write_run(tmp_path / "a", settings)
    write_run(tmp_path / "b", changed(seed=1))
    write_run(tmp_path / "c", changed(preprocess__seen="border"))
    (protocol,) = read(tmp_path).protocols
    assert [
        (configuration.name, configuration.baseline, configuration.seeds) for configuration in protocol.configurations
    ] == [
        ("resnet18, fc, ce", False, [0, 1]),
        ("resnet18, fc, ce, border seen", True, [0]),
    ]


def test_networks_on_partial_images_alone_give_no_report(tmp_path: Path) -> None:
    write_run(tmp_path, changed(preprocess__seen="border"))
    with pytest.raises(InputError, match="no network trained on entire images"):
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
        (_half_json, "damaged", "not valid JSON"),
        (_without_config, "damaged", "run.json: 'config' is missing"),
        (_unknown_task, "damaged", "unknown task five_class"),
        (_no_record, "damaged", "there are test predictions but no run.json"),
        (_no_predictions, "without test predictions", "predictions-test.csv is missing"),
        (_cut_predictions, "broken predictions", "predictions"),
        (_validation_as_test, "broken predictions", "images of the splits ['val'] instead of test only"),
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
    assert [configuration.seeds for configuration in sweep.protocols[0].configurations] == [[0]]
    (found,) = [omission for omission in sweep.omissions if omission.what == damaged.name]
    assert found.state == state
    assert says in found.reason


@pytest.mark.parametrize("status", ["new", "running", "failed", "interrupted"])
def test_an_unfinished_run_is_listed_once(tmp_path: Path, status: str) -> None:
    write_run(tmp_path, changed())
    folder = write_run(tmp_path, changed(seed=1), status=status, reason="MemoryError: 3 GB")
    sweep = read(tmp_path)
    assert [tuple(omission) for omission in sweep.omissions] == [(folder.name, status, "MemoryError: 3 GB")]


def test_a_run_without_test_predictions_is_listed(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    folder = write_run(tmp_path, changed(seed=1, test=False))
    (folder / "predictions-test.csv").unlink()
    (omission,) = read(tmp_path).omissions
    assert omission.reason == "trained with test=false"


def test_missing_runs_of_the_grid_are_listed(tmp_path: Path) -> None:
    for strategy, loss, seed in (("fc", "ce", 0), ("fc", "ce", 1), ("full", "ce", 0), ("fc", "focal", 0)):
        write_run(tmp_path, changed(strategy__name=strategy, loss__name=loss, seed=seed))
    assert {o.what: o.reason for o in read(tmp_path).omissions if o.state == "missing"} == {
        "resnet18, full, ce": "there is no run for seed 1",
        "resnet18, fc, focal": "there is no run for seed 1",
        "resnet18, full, focal": "there is no run for seed 0, seed 1",
    }


def test_a_seed_without_all_folds_is_left_out_and_listed(tmp_path: Path) -> None:
    for loss, seed, fold in (("ce", 0, 0), ("ce", 0, 1), ("focal", 0, 0), ("ce", 1, 1)):
        write_run(tmp_path, changed(loss__name=loss, seed=seed, data__folds=2, data__fold=fold))
    sweep = read(tmp_path)
    assert [(configuration.name, configuration.seeds) for configuration in sweep.protocols[0].configurations] == [
        ("resnet18, fc, ce", [0])
    ]
    incomplete = {o.what: o.reason for o in sweep.omissions if o.state == "incomplete"}
    assert set(incomplete) == {"resnet18, fc, ce, seed 1", "resnet18, fc, focal, seed 0"}
    assert "fold 1 is not finished" in incomplete["resnet18, fc, focal, seed 0"]
    assert "seed 1 fold 0" in {o.what: o.reason for o in sweep.omissions if o.state == "missing"}["resnet18, fc, ce"]


def test_a_fold_that_is_missing_everywhere_is_listed_and_the_others_are_compared(tmp_path: Path) -> None:
    for loss in ("ce", "focal"):
        write_run(tmp_path, changed(loss__name=loss, data__folds=2, data__fold=1))
    sweep = read(tmp_path)
    (protocol,) = sweep.protocols
    assert (len(protocol.configurations), protocol.folds, protocol.of_folds) == (2, ["1"], 2)
    assert set(states(sweep).values()) == {"missing"}


def test_overlapping_folds_are_refused(tmp_path: Path) -> None:
    for fold in (0, 1):
        write_run(tmp_path, changed(data__folds=2, data__fold=fold), table=predictions(TASK, n=30))
    with pytest.raises(InputError, match=r"resnet18, fc, ce, seed 0: 30 images are in the test part of more than one"):
        read(tmp_path)


def test_different_test_images_are_refused_with_their_configurations_and_ids(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    write_run(tmp_path, changed(loss__name="focal"), images=59)
    with pytest.raises(InputError, match=r"of resnet18, fc, focal, seed 0 and resnet18, fc, ce, seed 0 .*: i0059;"):
        read(tmp_path)


def test_different_labels_of_an_image_are_refused(tmp_path: Path) -> None:
    table = predictions(TASK)
    write_run(tmp_path, changed())
    write_run(tmp_path, changed(seed=1), table=table.assign(label=table["label"].replace("covid", "normal")))
    with pytest.raises(InputError, match="are not the same: i0000, i0000, i0001"):
        read(tmp_path)


def test_the_newest_of_equal_runs_is_used_and_the_other_is_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "b_old", changed(), ended="2026-01-01T00:00:00+00:00")
    write_run(tmp_path / "a_new", changed(), ended="2026-02-01T00:00:00+00:00", skill=3.0)
    sweep = read(tmp_path)
    (configuration,) = sweep.protocols[0].configurations
    assert [run.folder.parent.name for run in configuration.runs] == ["a_new"]
    (omission,) = sweep.omissions
    assert omission.what.startswith("b_old/")
    assert omission.state == "superseded"


def test_each_report_is_a_test_set_access(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, changed(seed=seed)) for seed in (0, 1)]
    unread = write_run(tmp_path, changed(seed=2), status="failed")
    assert [read(tmp_path).test_accesses.times for _ in range(3)] == [1, 2, 3]
    for folder in folders:
        assert len((folder / "test_accesses.csv").read_text(encoding="utf-8").splitlines()) == 1 + 3
    assert not (unread / "test_accesses.csv").exists()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run.json below it; give the folder of a sweep"):
        read(tmp_path)


def test_a_sweep_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, changed(), status="failed", reason="ValueError: x")
    with pytest.raises(InputError, match=r"none of its 1 runs can be reported: .* is failed \(ValueError: x\)"):
        read(tmp_path)


def test_a_run_of_an_earlier_version_belongs_to_the_same_configuration(tmp_path: Path) -> None:
    folder = write_run(tmp_path, changed(probes=True, augment__name="seed"), baselines={"frame": 0.5})
    new = write_run(tmp_path, changed(seed=1, baselines=False, augment__name="original"), baselines={"frame": 0.5})
    (folder / "baselines").rename(folder / "probes")
    (protocol,) = read(tmp_path).protocols
    (configuration,) = protocol.configurations
    files = [run.baseline_file("frame") for run in configuration.runs]
    assert files == [folder / "probes" / "frame-test.csv", new / "baselines" / "frame-test.csv"]
