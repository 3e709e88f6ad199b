"""TensorBoard shows a small sweep: its HTTP interface has the data, and a browser displays them."""

import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.browser import CHROMIUM, Page, chromium, stop
from tests.conftest import SMALL, Command

pytestmark = pytest.mark.slow(reason="TensorBoard's server and the browser are processes that communicate over sockets")
CLASSES = ("covid", "normal", "pneumonia")
CHARTS = {
    "validation": [
        "loss",
        "AUROC, mean over classes",
        "AUROC of covid",
        "accuracy",
        "F1, mean over classes",
        "sensitivity to covid",
    ],
    "generalisation": [f"{name}: training and validation" for name in ("loss", "AUROC", "accuracy")],
    "running": ["learning rates: head and pretrained backbone", "speed: images per second"],
}


class Board(NamedTuple):
    """A running TensorBoard.

    Attributes:
        url: Its address.
        runs: Names that it gives to the runs.
    """

    url: str
    runs: list[str]

    def ask(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        """Return the JSON that TensorBoard answers under /data."""
        url = f"{self.url}data/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def board(train: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """Return TensorBoard for two runs of three epochs after it has read both."""
    folder = tmp_path_factory.mktemp("board")
    words = ("task=three_class", "trainer.max_epochs=3", "image_every=2", "baselines=false", "audit=off", "test=false")
    for strategy in ("fc", "partial"):
        done = train(folder, f"strategy={strategy}", *SMALL, *words)
        assert done.returncode == 0, done.stderr
    outputs = folder / "outputs"
    runs = sorted(path.parent.relative_to(outputs).as_posix() + "/tensorboard" for path in outputs.rglob("run.json"))
    assert len(runs) == 2
    # Without fast loading, TensorBoard is a single process, which stops at a signal and leaves no other process.
    words = ("--logdir", str(outputs), "--host", "localhost", "--port", "0", "--load_fast", "false")
    command = [sys.executable, "-m", "tensorboard.main", *words, "--reload_interval", "1"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        found = Board(_address(server, folder / "log"), runs)
        _wait_until_read(found, server)
        yield found
    finally:
        stop(server)


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for the address that the server prints as soon as it listens."""
    while not (match := re.search(r"TensorBoard \S+ at (http://localhost:\d+/)", log.read_text())):
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    return match[1]


def _wait_until_read(board: Board, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server shows both cards of each run, which are the last entries of a run."""
    while sorted(run for run, tags in board.ask("plugin/text/tags").items() if len(tags) == 2) != board.runs:
        assert server.poll() is None
        time.sleep(0.1)


def test_every_plugin_has_data_of_every_run(board: Board) -> None:
    assert sorted(board.ask("runs")) == board.runs
    wanted = {
        "images": {"confusion_matrix/val", "grad_cam/val", "images/train_batch"},
        "pr_curves": {f"pr/val/{name}" for name in CLASSES},
        "text": {"model_card/text_summary", "data_card/text_summary"},
    }
    for plugin, names in wanted.items():
        tags = board.ask(f"plugin/{plugin}/tags")
        assert {run: set(found) for run, found in tags.items()} == dict.fromkeys(board.runs, names)
    for run in board.runs:
        for tag in wanted["images"]:
            pictures = board.ask("plugin/images/images", run=run, tag=tag, sample="0")
            assert [picture["step"] for picture in pictures] == [1, 3]
        curves = board.ask("plugin/pr_curves/pr_curves", run=run, tag="pr/val/covid")[run]
        assert [curve["step"] for curve in curves] == [1, 3]


def test_scalars_are_in_few_groups(board: Board) -> None:
    for run, tags in board.ask("plugin/scalars/tags").items():
        groups = {tag.split("/")[0] for tag in tags}
        assert groups == {"accuracy", "auroc", "best", "epoch", "f1", "loss", "lr", "sensitivity", "speed"}, run


def test_each_chart_of_the_layout_has_a_curve_of_every_run(board: Board) -> None:
    layout = board.ask("plugin/custom_scalars/layout")["category"]
    assert {part["title"]: [chart["title"] for chart in part["chart"]] for part in layout} == CHARTS
    for part in layout:
        for chart in part["chart"]:
            for tag in chart["multiline"]["tag"]:
                for run in board.runs:
                    lines = board.ask("plugin/custom_scalars/scalars", run=run, tag=tag)["tag_to_events"]
                    # With random initialisation, the backbone has no separate learning rate.
                    assert set(lines) == ({tag.rstrip("$")} if tag != "lr/backbone$" else set())
                    assert all(len(points) == 3 for points in lines.values())


def test_hparams_has_a_row_with_validation_scores_for_each_run(board: Board) -> None:
    experiment = board.ask("plugin/hparams/experiment", {"experimentName": ""})
    columns = [info["name"] for info in experiment["hparamInfos"]]
    # The columns that are shown by default.
    assert columns[:5] == ["backbone", "loss", "seed", "strategy", "task"]
    scores = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert [info["displayName"] for info in experiment["metricInfos"]] == [
        "loss (val)",
        "AUROC (val)",
        "accuracy (val)",
        "F1 (val)",
        "covid sensitivity (val)",
    ]
    query = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 100,
    }
    rows = board.ask("plugin/hparams/session_groups", query)["sessionGroups"]
    assert sorted(row["sessions"][0]["name"] for row in rows) == board.runs
    for row in rows:
        (session,) = row["sessions"]
        assert session["name"].removesuffix("/tensorboard").endswith(f"-{row['name']}")
        assert set(row["hparams"]) == set(columns)
        assert row["hparams"]["seed"] == "0"
        assert row["hparams"]["lr"] > 0
        found = {value["name"]["tag"]: value["value"] for value in row["metricValues"]}
        history = {
            tag: [point[2] for point in board.ask("plugin/scalars/scalars", run=session["name"], tag=tag)]
            for tag in ("loss/val", "auroc/val", "accuracy/val", "f1/val", "sensitivity/val/covid")
        }
        best = min(range(3), key=history["loss/val"].__getitem__)
        assert found == {f"best/{tag.replace('/', '_')}": values[best] for tag, values in history.items()}
        assert list(found) == scores


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """Return the window of a browser."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    with chromium() as shown:
        yield shown


# Text that each tab must show, in addition to the names of the runs.
TABS = {
    "timeseries": ["accuracy", "auroc", "Smoothed"],
    "scalars": ["accuracy/train", "accuracy/val", "auroc/val"],
    "custom_scalars": [*CHARTS, *CHARTS["validation"], *CHARTS["generalisation"], "Matches (2)", "Matches (4)"],
    "images": ["confusion_matrix/val", "grad_cam/val", "step 3"],
    "pr_curves": [*(f"pr/val/{name}" for name in CLASSES), "is at step 3"],
    "text": ["data_card", "model_card", "Research use, not for diagnosis.", "patients", "phantom"],
    "hparams": ["AUROC (val)", "strategy", "resnet18", "partial", "three_class"],
}


@pytest.mark.parametrize("tab", TABS)
def test_each_tab_shows_its_data_in_a_browser(tab: str, page: Page, board: Board) -> None:
    names = [run.removesuffix("/tensorboard").rpartition("-")[2] for run in board.runs]
    page.open(f"{board.url}#{tab}")
    text = page.wait_for(*TABS[tab], *names)
    if tab == "images":
        # A confusion matrix and a Grad-CAM panel of each of the two runs.
        page.wait_for_pictures(4)
    if tab == "hparams":
        assert not re.search(r"\b(NaN|None|undefined)\b|-1\b", text)
