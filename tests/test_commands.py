"""`train`: what it prints, what it leaves behind, and how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from covid_cls import multirun
from covid_cls.data.manifest import read_manifest
from covid_cls.data.phantom import build_phantoms
from covid_cls.data.splits import assign_splits
from covid_cls.evaluation.operating import frozen_operating
from covid_cls.evaluation.summary import summarise
from covid_cls.labels import TASKS
from covid_cls.records import read_predictions
from covid_cls.targets import CheckedLoader
from tests.conftest import ROOT, SMALL, Command, FinishedRuns, start

REAL = ROOT.parent / "shared"
FILES = {
    "run.json",
    "run.log",
    "metrics.json",
    "history.csv",
    "predictions-val.csv",
    "predictions-test.csv",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    *(f"figures/{name}.png" for name in ("loss", "accuracy", "confusion-val", "roc-val")),
}


def cells(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("run.json"))


def record(cell: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((cell / "run.json").read_text(encoding="utf-8"))


def weights(cell: Path) -> dict[str, torch.Tensor]:
    return torch.load(cell / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


DEFAULT = ("trainer.max_epochs=3", "task=three_class", "logger=tensorboard")


@pytest.fixture(scope="module")
def finished(finished_runs: FinishedRuns) -> tuple[Path, str]:
    """A run of the default settings on small phantoms, and what it printed."""
    return finished_runs(*DEFAULT), finished_runs.printed(*DEFAULT)


def test_a_run_leaves_all_its_files(finished: tuple[Path, str]) -> None:
    cell, _ = finished
    assert cell.parent.name == "phantom"
    assert cell.name.startswith("three_class-resnet18-partial-ce-s0-")
    present = {path.relative_to(cell).as_posix() for path in cell.rglob("*") if path.is_file()}
    assert present >= FILES
    assert any(name.startswith("tensorboard/events") for name in present)


def test_a_run_says_where_it_comes_from(finished: tuple[Path, str]) -> None:
    cell, printed = finished
    found = record(cell)
    assert found["status"] == "finished"
    assert found["weights"]["asked"] == "auto"
    assert found["weights"]["used"] == "none"
    assert set(found["digests"]) == {"config", "data", "code"}
    assert found["config"]["backbone"]["name"] == "resnet18"
    assert {line["stage"]: line["trainable"] for line in found["freeze"]} == {
        "stem": 0,
        "layer1": 0,
        "layer2": 0,
        "layer3": 0,
        "layer4": 8_393_728,
        "head": 77_403,
    }
    assert sum(sum(row.values()) for row in found["data"]["images_per_split_and_class"].values()) == 48
    # The fallback is said once loudly, and again with the results.
    assert "RANDOM weights" in printed
    assert any("RANDOM weights" in note for note in json.loads((cell / "metrics.json").read_text())["notes"])
    assert "layer4     8,393,728   8,393,728  batch" in printed
    assert "epoch 3/3" in printed
    assert "images/s" in printed


def test_every_metric_is_a_function_of_the_predictions(finished: tuple[Path, str]) -> None:
    cell, _ = finished
    task = TASKS["three_class"]
    metrics = json.loads((cell / "metrics.json").read_text(encoding="utf-8"))
    for split in ("val", "test"):
        assert set(read_predictions(cell / f"predictions-{split}.csv", task.classes)["split"]) == {split}
    table = read_predictions(cell / "predictions-val.csv", task.classes)
    assert metrics["val"] == json.loads(json.dumps(summarise(table, task)))


def test_the_test_split_is_predicted_and_not_read(finished: tuple[Path, str]) -> None:
    cell, printed = finished
    assert "test" not in json.loads((cell / "metrics.json").read_text(encoding="utf-8"))
    assert not list((cell / "figures").glob("*test*"))
    assert not (cell / "openings.csv").exists()
    assert "the test predictions are unread; this opens them: python -m covid_cls.evaluate run=" in printed


def test_the_selected_epoch_is_the_best_on_validation(finished: tuple[Path, str]) -> None:
    cell, _ = finished
    history = pd.read_csv(cell / "history.csv")
    assert list(history["epoch"]) == [1, 2, 3]
    best = json.loads((cell / "metrics.json").read_text(encoding="utf-8"))["best_epoch"]
    assert best == int(history.loc[history["loss/val"].idxmin(), "epoch"])
    assert torch.load(cell / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] + 1 == best


def test_tensorboard_holds_scalars_pictures_and_hparams(finished: tuple[Path, str]) -> None:
    cell, _ = finished
    events = EventAccumulator(str(cell / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    for name in ("loss/train", "loss/val", "auroc/val", "auroc/val/covid", "sensitivity/val/pneumonia", "lr/head"):
        assert name in tags["scalars"]
        assert len(events.Scalars(name)) == 3
    train, val = ([point.step for point in events.Scalars(f"loss/{split}")] for split in ("train", "val"))
    assert train == val  # or curves that belong together would stand side by side
    assert "speed/images_per_second" in tags["scalars"]
    assert set(tags["images"]) == {"images/train_batch", "confusion_matrix/val", "grad_cam/val"}
    assert {"data_card/text_summary", "model_card/text_summary", "pr/val/covid"} <= set(tags["tensors"])
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for word in (b"backbone", b"resnet18", b"strategy", b"partial", b"three_class"):
        assert word in content
    history = pd.read_csv(cell / "history.csv")
    (best,) = events.Scalars("best/auroc_val")
    assert best.value == pytest.approx(history.loc[history["loss/val"].idxmin(), "auroc/val"], abs=1e-6)


def test_the_same_command_again_reports_and_does_not_train(
    finished_runs: FinishedRuns, train: Command, tmp_path: Path
) -> None:
    cell = finished_runs.copy(tmp_path, "task=three_class")
    before = (cell / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = train(tmp_path, *SMALL, "trainer.max_epochs=1", "logger=none", "task=three_class")
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout
    assert "macro auroc" in again.stdout
    assert (cell / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


@pytest.mark.slow(reason="a signal stops a process while it trains")
def test_ctrl_c_leaves_a_run_that_goes_on_to_the_same_weights(
    environment: dict[str, str], train_process: Command, tmp_path: Path
) -> None:
    # long enough to be caught in time
    words = (*SMALL, "trainer.max_epochs=12", "task=three_class", "logger=none", "feature_cache=views:2")
    assert train_process(tmp_path, *words, "output_root=whole").returncode == 0
    process = start("train", tmp_path, environment, *words)
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 2/12" in line:  # the checkpoint of the first is written, or waits to be
            break
    (whole,), (cell,) = cells(tmp_path / "whole"), cells(tmp_path / "outputs")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "goes on from the last finished epoch" in errors
    assert record(cell)["status"] == "interrupted"

    resumed = train_process(tmp_path, *words)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 1/12" not in resumed.stdout
    assert record(cell)["status"] == "finished"
    expected, found = weights(whole), weights(cell)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for split in ("val", "test"):
        name = f"predictions-{split}.csv"
        assert (cell / name).read_bytes() == (whole / name).read_bytes()


def test_fixed_draws_are_named_wherever_a_result_stands(train: Command, tmp_path: Path) -> None:
    words = (*SMALL, "strategy=fc", "feature_cache=views:2", "trainer.max_epochs=1", "probes=false", "logger=none")
    done = train(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    (cell,) = cells(tmp_path / "outputs")
    assert "-views2-" in cell.name
    note = "trained on 2 fixed draws of each image (feature_cache=views:2)"
    assert note in done.stdout
    assert any(note in line for line in record(cell)["notes"])
    assert any(note in line for line in json.loads((cell / "metrics.json").read_text())["notes"])
    again = train(tmp_path, *words, "loss=focal")
    assert again.returncode == 0, again.stderr
    assert "images computed" in done.stdout
    assert "images computed" not in again.stdout  # the same frozen stages: their pass is shared


def test_a_feature_cache_that_is_too_small_says_what_it_needs(train: Command, tmp_path: Path) -> None:
    words = (*SMALL, "strategy=fc", "feature_cache=views:3", "trainer.max_epochs=1", "seed=5", "probes=false")
    done = train(tmp_path, *words, "feature_cache_gb=1e-6")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "feature_cache_gb=1e-06" in line
    assert "raise feature_cache_gb to" in line
    (cell,) = cells(tmp_path / "outputs")
    assert record(cell)["status"] == "failed"
    again = train(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert cells(tmp_path / "outputs") == [cell]  # the limit is no part of what a cell is


def test_rerun_trains_anew(train: Command, tmp_path: Path) -> None:
    words = (*SMALL, "trainer=debug", "strategy=fc", "logger=none", "probes=false")
    assert train(tmp_path, *words).returncode == 0
    (cell,) = cells(tmp_path)
    before = (cell / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = train(tmp_path, *words, "rerun=true")
    assert again.returncode == 0, again.stderr
    assert cells(tmp_path) == [cell]
    assert (cell / "checkpoints" / "last.ckpt").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeed=3"], "Key 'seeed' is not in struct"),
        (["backbone=resnet19"], "Available options in 'backbone': resnet18"),
        (["data=manifest"], "data.path is not set"),
        (["data=manifest", "data.path=nowhere.csv"], "nowhere.csv: no such file"),
        (["data=folder", "data.root=nowhere"], "nowhere: no such folder"),
        (["optimizer.lr=fast"], "optimizer.lr=fast: expected float"),
        (["loss=weighted_ce", "data.sampler=balanced"], "each of these evens the classes out by itself"),
        (["loss=focal", "loss.alpha=inverse_frequency", "data.sampler=balanced"], "Keep one"),
        (["backbone.weights=nowhere.pth", *SMALL], "nowhere.pth: no such file"),
        (["backbone.weights=imagenet", *SMALL], "resnet18-f37072fd.pth"),
        (["strategy=fc", "feature_cache=exact"], "set augment=none, or feature_cache=views:K"),
        (["strategy=fc", "feature_cache=3"], "must be off, exact or views:K"),
        (["strategy=full", "feature_cache=views:2"], "strategy=full freezes nothing"),
        (["strategy.freeze_until=layer9", *SMALL], "this backbone has stem, layer1, layer2, layer3, layer4"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_fault_of_the_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, train: Command, tmp_path: Path
) -> None:
    done = train(tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert cells(tmp_path) == []


def test_a_single_run_is_composed_once_and_asks_for_no_gpu(train: Command, tmp_path: Path) -> None:
    compose = CheckedLoader.load_configuration
    with (
        mock.patch.object(CheckedLoader, "load_configuration", autospec=True, side_effect=compose) as composed,
        mock.patch.object(multirun, "gpu_slots") as asked,
    ):
        assert train(tmp_path, "data=folder", "data.root=nowhere", "experiment=seed_part1/fc").returncode == 2
    assert (composed.call_count, asked.call_count) == (1, 0)


def test_a_bad_manifest_is_named_with_its_line_before_training(train: Command, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,label\nmissing.png,covid\n../x.png,normal\n", encoding="utf-8")
    done = train(tmp_path, "data=manifest", "data.path=m.csv")
    assert done.returncode == 2
    assert "line 2: missing.png is missing" in done.stderr
    assert "line 3: ../x.png leaves the manifest's folder" in done.stderr


def test_a_diverging_run_stops_with_exit_code_1_and_says_so(train: Command, tmp_path: Path) -> None:
    done = train(tmp_path, *SMALL, "optimizer.lr=1e30", "trainer.max_epochs=3", "scheduler=none", "strategy=full")
    assert done.returncode == 1, done.stdout
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: the training loss became nan or inf in epoch 0, step ")
    (cell,) = cells(tmp_path)
    assert record(cell)["status"] == "failed"
    assert "lower optimizer.lr" in record(cell)["reason"]


@pytest.mark.parametrize("recipe", ["seed_part1/fc", "seed_part1/full", "seed_part2/bce", "seed_part2/focal"])
def test_each_recipe_trains(recipe: str, train: Command, tmp_path: Path) -> None:
    done = train(tmp_path, f"experiment={recipe}", *SMALL, "trainer.max_epochs=1", "logger=none", "probes=false")
    assert done.returncode == 0, done.stderr
    (cell,) = cells(tmp_path)
    assert cell.parent == tmp_path / "outputs" / recipe
    overall = json.loads((cell / "metrics.json").read_text(encoding="utf-8"))["val"]["overall"]
    if recipe.startswith("seed_part2"):
        assert 0 <= overall["label_accuracy"] <= 1
        assert "covid_f1_at_half" in overall


@pytest.mark.slow(reason="a sweep starts a process for each run")
def test_the_grid_sweeps_without_being_asked_twice(train_process: Command, tmp_path: Path) -> None:
    words = ("task=binary", "backbone=resnet18", "strategy=fc", "seed=0", "probes=false")
    done = train_process(tmp_path, "experiment=grid", *words, *SMALL, "trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    names = [cell.name.rsplit("-", 1)[0] for cell in cells(tmp_path / "outputs" / "grid")]
    assert names == ["binary-resnet18-fc-ce-s0", "binary-resnet18-fc-focal-s0"]


def test_help_lists_groups_values_and_examples(train: Command, tmp_path: Path) -> None:
    done = train(tmp_path, "--help")
    assert done.returncode == 0
    for word in ("not a diagnostic device", "experiment=grid", "backbone: resnet18", "strategy: fc, full, partial"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_trains_in_bf16(environment: dict[str, str], tmp_path: Path) -> None:
    env = {**environment, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    words = [*(word for word in SMALL if word != "trainer=cpu"), "trainer=gpu", "trainer.max_epochs=2"]
    command = [sys.executable, "-m", "covid_cls.train", *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (cell,) = cells(tmp_path)
    assert record(cell)["device"]["gpu"]
    assert record(cell)["precision"] == "bf16-mixed"


@pytest.mark.real
@pytest.mark.skipif(not (REAL / "cxr").is_dir(), reason="../shared/cxr is not here")
class TestRealRadiographs:
    partial_weights = f"backbone.weights={REAL}/weights/resnet18_imagenet_partial.pth"

    @pytest.fixture
    def words(self, tmp_path: Path) -> tuple[str, ...]:
        """What trains three classes on 40 radiographs of each class."""
        table = pd.read_csv(REAL / "cxr" / "darkcovidnet" / "manifest.csv", dtype=str)
        table = table.groupby("label").head(40)
        for path in table["path"]:
            (tmp_path / "real" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REAL / "cxr" / "darkcovidnet" / path, tmp_path / "real" / path)
        table.to_csv(tmp_path / "real" / "manifest.csv", index=False)
        manifest = f"data.path={tmp_path}/real/manifest.csv"
        return (
            "task=three_class",
            "data=manifest",
            manifest,
            self.partial_weights,
            "data.size=64",
            "preprocess.crop=64",
        )

    def test_partial_trains_on_the_partial_weights(
        self, words: tuple[str, ...], train: Command, tmp_path: Path
    ) -> None:
        done = train(tmp_path, *words, "strategy=partial", "trainer.max_epochs=1", "trainer=cpu", "probes=false")
        assert done.returncode == 0, done.stderr
        (cell,) = cells(tmp_path)
        assert record(cell)["data"]["images"] == 120
        assert record(cell)["weights"]["pretrained_stages"] == ["stem", "layer1", "layer2", "layer3"]
        assert len(record(cell)["weights"]["fresh"]) == 20

    def test_fc_is_refused_for_frozen_tensors_are_missing(
        self, words: tuple[str, ...], train: Command, tmp_path: Path
    ) -> None:
        done = train(tmp_path, *words, "strategy=fc")
        assert done.returncode == 2
        assert "20 tensors of the frozen stages are missing: layer4.0.conv1.weight" in done.stderr
        assert cells(tmp_path) == []


def test_nothing_is_chosen_by_the_labels_of_the_test_split(train: Command, tmp_path: Path) -> None:
    source = build_phantoms(tmp_path / "phantoms", images=48)
    table = assign_splits(read_manifest(source))
    left = {}
    for name in ("as_they_are", "shuffled"):
        if name == "shuffled":
            test = table["split"] == "test"
            shuffled = np.random.default_rng(0).permutation(table.loc[test, "label"])
            assert (shuffled != table.loc[test, "label"]).any()
            table.loc[test, "label"] = shuffled
        table[["path", "label", "patient_id", "split"]].to_csv(source.with_name(f"{name}.csv"), index=False)
        words = ("data=manifest", f"data.path={source.with_name(f'{name}.csv')}", "data.group=image", f"name={name}")
        small = [word for word in SMALL if not word.startswith("data.images")]
        done = train(
            tmp_path, *small, *words, "task=three_class", "trainer.max_epochs=2", "probes=false", "logger=none"
        )
        assert done.returncode == 0, done.stderr
        (cell,) = cells(tmp_path / "outputs" / name)
        frozen_operating(cell, TASKS["three_class"], sensitivity=0.95, specificity=0.95)
        best = torch.load(cell / "checkpoints" / "best.ckpt", weights_only=True)
        left[name] = ((cell / "operating.json").read_bytes(), best["epoch"], best["state_dict"])
    (before, epoch, network), (after, epoch_after, network_after) = left.values()
    assert before == after
    assert epoch == epoch_after
    assert all(torch.equal(network[key], network_after[key]) for key in network)


def test_a_leaky_split_is_noted_or_refused_as_asked(train: Command, tmp_path: Path) -> None:
    words = (*SMALL, "data.group=image", "trainer.max_epochs=1", "backbone.weights=none", "strategy=full")
    refused = train(tmp_path, *words, "audit=fail")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: audit: patients in two splits.")
    assert "or set audit=warn" in refused.stderr
    assert not cells(tmp_path)
    noted = train(tmp_path, *words)
    assert noted.returncode == 0, noted.stderr
    (cell,) = cells(tmp_path)
    assert any("audit: patients in two splits" in note for note in record(cell)["notes"])
    assert {path.name for path in (cell / "probes").glob("*-test.csv")} == {
        f"{name}-test.csv"
        for name in ("majority", "header", "metadata", "frame", "histogram", "thumbnail", "corners", "marker")
    }
