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

from covid_cls.data.manifest import read_manifest
from covid_cls.data.phantoms import build_phantoms
from covid_cls.data.splits import SplitSettings, assign_splits
from covid_cls.evaluation.assessment import summarise
from covid_cls.evaluation.thresholds import frozen_operating
from covid_cls.io import read_predictions
from covid_cls.runtime import cli, sweep
from covid_cls.tasks import TASKS
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


def run_folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("run.json"))


def record(folder: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


DEFAULT = ("trainer.max_epochs=3", "task=three_class", "logger=tensorboard")


@pytest.fixture(scope="module")
def finished(finished_runs: FinishedRuns) -> tuple[Path, str]:
    """A run of the default settings on small phantoms, and what it printed."""
    return finished_runs(*DEFAULT), finished_runs.printed(*DEFAULT)


def test_a_run_leaves_all_its_files(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert folder.parent.name == "phantom"
    assert folder.name.startswith("three_class-resnet18-partial-ce-s0-")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert present >= FILES
    assert any(name.startswith("tensorboard/events") for name in present)


def test_a_run_says_where_it_comes_from(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    found = record(folder)
    assert found["status"] == "finished"
    assert found["weights"]["asked"] == "auto"
    assert found["weights"]["used"] == "none"
    assert set(found["digests"]) == {"config", "data", "training"}
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
    assert any("RANDOM weights" in note for note in json.loads((folder / "metrics.json").read_text())["notes"])
    assert "layer4     8,393,728   8,393,728  batch" in printed
    assert "epoch 3/3" in printed
    assert "images/s" in printed


def test_every_metric_is_a_function_of_the_predictions(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    task = TASKS["three_class"]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for split in ("val", "test"):
        assert set(read_predictions(folder / f"predictions-{split}.csv", task.classes)["split"]) == {split}
    table = read_predictions(folder / "predictions-val.csv", task.classes)
    assert metrics["val"] == json.loads(json.dumps(summarise(table, task)))


def test_the_test_split_is_predicted_and_not_read(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert "test" not in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert not list((folder / "figures").glob("*test*"))
    assert not (folder / "test_accesses.csv").exists()
    assert "Test predictions were saved but not scored. To score them: python -m covid_cls.evaluate run=" in printed


def test_the_selected_epoch_is_the_best_on_validation(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    history = pd.read_csv(folder / "history.csv")
    assert list(history["epoch"]) == [1, 2, 3]
    best = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["best_epoch"]
    assert best == int(history.loc[history["loss/val"].idxmin(), "epoch"])
    assert torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] + 1 == best


def test_tensorboard_holds_scalars_pictures_and_hparams(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
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
    history = pd.read_csv(folder / "history.csv")
    (best,) = events.Scalars("best/auroc_val")
    assert best.value == pytest.approx(history.loc[history["loss/val"].idxmin(), "auroc/val"], abs=1e-6)


def test_the_same_command_again_reports_and_does_not_train(
    finished_runs: FinishedRuns, train: Command, tmp_path: Path
) -> None:
    folder = finished_runs.copy(tmp_path, "task=three_class")
    before = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = train(tmp_path, *SMALL, "trainer.max_epochs=1", "logger=none", "task=three_class")
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout
    assert "macro auroc" in again.stdout
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


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
    (whole,), (folder,) = run_folders(tmp_path / "whole"), run_folders(tmp_path / "outputs")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "continues from the last finished epoch" in errors
    assert record(folder)["status"] == "interrupted"

    resumed = train_process(tmp_path, *words)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 1/12" not in resumed.stdout
    assert record(folder)["status"] == "finished"
    expected, found = weights(whole), weights(folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for split in ("val", "test"):
        name = f"predictions-{split}.csv"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_fixed_draws_are_named_wherever_a_result_stands(train: Command, tmp_path: Path) -> None:
    words = (*SMALL, "strategy=fc", "feature_cache=views:2", "trainer.max_epochs=1", "baselines=false", "logger=none")
    done = train(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    (folder,) = run_folders(tmp_path / "outputs")
    assert "-views2-" in folder.name
    note = "trained on 2 fixed augmented views of each image (feature_cache=views:2)"
    assert note in done.stdout
    assert any(note in line for line in record(folder)["notes"])
    assert any(note in line for line in json.loads((folder / "metrics.json").read_text())["notes"])
    again = train(tmp_path, *words, "loss=focal")
    assert again.returncode == 0, again.stderr
    assert "images computed" in done.stdout
    assert "images computed" not in again.stdout  # the same frozen stages: their pass is shared


def test_a_feature_cache_that_is_too_small_says_what_it_needs(train: Command, tmp_path: Path) -> None:
    words = (*SMALL, "strategy=fc", "feature_cache=views:3", "trainer.max_epochs=1", "seed=5", "baselines=false")
    done = train(tmp_path, *words, "feature_cache_gb=1e-6")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "feature_cache_gb=1e-06" in line
    assert "raise feature_cache_gb to" in line
    (folder,) = run_folders(tmp_path / "outputs")
    assert record(folder)["status"] == "failed"
    again = train(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert run_folders(tmp_path / "outputs") == [folder]  # the limit is no part of what a folder is


def test_rerun_trains_anew(train: Command, tmp_path: Path) -> None:
    words = (*SMALL, "trainer=debug", "strategy=fc", "logger=none", "baselines=false")
    assert train(tmp_path, *words).returncode == 0
    (folder,) = run_folders(tmp_path)
    before = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = train(tmp_path, *words, "rerun=true")
    assert again.returncode == 0, again.stderr
    assert run_folders(tmp_path) == [folder]
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeed=3"], "Key 'seeed' is not in struct"),
        (["backbone=resnet19"], "Available options in 'backbone': resnet18"),
        (["data=manifest"], "data.path is not set"),
        (["data=manifest", "data.path=nowhere.csv"], "nowhere.csv: no such file"),
        (["data=folder", "data.root=nowhere"], "nowhere: no such folder"),
        (["optimizer.lr=fast"], "optimizer.lr=fast: expected float"),
        (["loss=weighted_ce", "data.sampler=balanced"], "together they count a rare class several times"),
        (["loss=focal", "loss.alpha=inverse_frequency", "data.sampler=balanced"], "Keep one"),
        (["backbone.weights=nowhere.pth", *SMALL], "nowhere.pth: no such file"),
        (["backbone.weights=imagenet", *SMALL], "resnet18-f37072fd.pth"),
        (["strategy=fc", "feature_cache=exact"], "set augment=none, or feature_cache=views:K"),
        (["strategy=fc", "feature_cache=3"], "feature_cache=3: expected str"),
        (["strategy=full", "feature_cache=views:2"], "strategy=full freezes no stages"),
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
    assert run_folders(tmp_path) == []


def test_a_single_run_is_composed_once_and_asks_for_no_gpu(train: Command, tmp_path: Path) -> None:
    with (
        mock.patch.object(cli, "_compose", side_effect=cli._compose) as composed,
        mock.patch.object(sweep, "gpu_slots") as asked,
    ):
        assert train(tmp_path, "data=folder", "data.root=nowhere", "experiment=original_part1/fc").returncode == 2
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
    assert said.startswith("error: the training loss became nan or inf in epoch 1, step ")
    (folder,) = run_folders(tmp_path)
    assert record(folder)["status"] == "failed"
    assert "Reduce optimizer.lr" in record(folder)["reason"]


@pytest.mark.parametrize(
    "recipe", ["original_part1/fc", "original_part1/full", "original_part2/bce", "original_part2/focal"]
)
def test_each_recipe_trains(recipe: str, train: Command, tmp_path: Path) -> None:
    done = train(tmp_path, f"experiment={recipe}", *SMALL, "trainer.max_epochs=1", "logger=none", "baselines=false")
    assert done.returncode == 0, done.stderr
    (folder,) = run_folders(tmp_path)
    assert folder.parent == tmp_path / "outputs" / recipe
    overall = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["val"]["overall"]
    if recipe.startswith("original_part2"):
        assert 0 <= overall["label_accuracy"] <= 1
        assert "covid_f1_at_half" in overall


@pytest.mark.slow(reason="a sweep starts a process for each run")
def test_the_grid_sweeps_without_being_asked_twice(train_process: Command, tmp_path: Path) -> None:
    words = ("task=binary", "backbone=resnet18", "strategy=fc", "seed=0", "baselines=false")
    done = train_process(tmp_path, "experiment=grid", *words, *SMALL, "trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    names = [folder.name.rsplit("-", 1)[0] for folder in run_folders(tmp_path / "outputs" / "grid")]
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
    (folder,) = run_folders(tmp_path)
    assert record(folder)["device"]["gpu"]
    assert record(folder)["precision"] == "bf16-mixed"


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
        done = train(tmp_path, *words, "strategy=partial", "trainer.max_epochs=1", "trainer=cpu", "baselines=false")
        assert done.returncode == 0, done.stderr
        (folder,) = run_folders(tmp_path)
        assert record(folder)["data"]["images"] == 120
        assert record(folder)["weights"]["pretrained_stages"] == ["stem", "layer1", "layer2", "layer3"]
        assert len(record(folder)["weights"]["fresh"]) == 20

    def test_fc_is_refused_for_frozen_tensors_are_missing(
        self, words: tuple[str, ...], train: Command, tmp_path: Path
    ) -> None:
        done = train(tmp_path, *words, "strategy=fc")
        assert done.returncode == 2
        assert "20 tensors of the frozen stages are missing: layer4.0.conv1.weight" in done.stderr
        assert run_folders(tmp_path) == []


def test_nothing_is_chosen_by_the_labels_of_the_test_split(train: Command, tmp_path: Path) -> None:
    source = build_phantoms(tmp_path / "phantoms", images=48)
    table = assign_splits(read_manifest(source), SplitSettings())
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
            tmp_path,
            *small,
            *words,
            "task=three_class",
            "strategy=fc",
            "trainer.max_epochs=2",
            "baselines=false",
            "logger=none",
        )
        assert done.returncode == 0, done.stderr
        (folder,) = run_folders(tmp_path / "outputs" / name)
        frozen_operating(folder, TASKS["three_class"], sensitivity=0.95, specificity=0.95)
        best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
        left[name] = ((folder / "operating.json").read_bytes(), best["epoch"], best["state_dict"])
    (before, epoch, network), (after, epoch_after, network_after) = left.values()
    assert before == after
    assert epoch == epoch_after
    assert all(torch.equal(network[key], network_after[key]) for key in network)


def test_a_leaky_split_is_noted_or_refused_as_asked(train: Command, tmp_path: Path) -> None:
    words = (*SMALL, "data.group=image", "trainer.max_epochs=1", "backbone.weights=none", "strategy=fc")
    refused = train(tmp_path, *words, "audit=fail")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: audit: patients in two splits.")
    assert "set audit=warn" in refused.stderr
    assert not run_folders(tmp_path)
    noted = train(tmp_path, *words)
    assert noted.returncode == 0, noted.stderr
    (folder,) = run_folders(tmp_path)
    assert any("audit: patients in two splits" in note for note in record(folder)["notes"])
    assert {path.name for path in (folder / "baselines").glob("*-test.csv")} == {
        f"{name}-test.csv"
        for name in ("majority", "header", "metadata", "frame", "histogram", "thumbnail", "corners", "marker")
    }
