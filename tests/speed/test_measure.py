"""What is computed from the rounds, what is refused, and how a measured process ends."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from covid_cls.benchmark import KEYS, _own
from covid_cls.data.manifest import read_folder
from covid_cls.errors import InputError
from covid_cls.speed.child import in_child
from covid_cls.speed.measure import _best, check_options
from covid_cls.speed.start import seconds_to_line
from tests.speed.small import epoch, result, settings


def test_a_result_is_the_medians_of_its_rounds() -> None:
    found = result()
    assert found["ratio"] == {"median": 4.0, "least": 4.0, "most": 8.0}
    assert found["rounds"]["ratios"] == [4.0, 6.0, 8.0]
    plain, ours = found["plain"], found["ours"]
    assert (plain["images_per_second"], ours["images_per_second"]) == (25.0, 100.0)
    assert plain["ms_per_image"] == {"data": 20.0, "forward": 10.0, "backward": 10.0}
    assert (plain["loader_images_per_second"], ours["loader_images_per_second"]) == (50.0, pytest.approx(1000.0))
    assert (plain["tflops"], ours["tflops"]) == (0.25, 0.5)
    assert (plain["share_of_peak"], ours["share_of_peak"]) == (0.25, 0.25)  # of 1.0 in float32, of 2.0 in bfloat16
    assert found["bare"] == {"images_per_second": 125.0, "share": 0.8}
    assert found["to_epochs"]["plain"] == {"seconds": 20.0, "extrapolated": True}
    assert found["to_epochs"]["ours"]["extrapolated"] is False


def test_parts_come_from_the_profile_where_there_is_one() -> None:
    found = result(device="cuda:0", profile={"plain": epoch(10), "ours": epoch(2)})
    assert found["plain"]["ms_per_image"]["data"] == 50.0
    assert found["plain"]["images_per_second"] == 25.0
    assert any("waits for the GPU" in note for note in found["notes"])


def test_the_peak_is_the_best_of_the_rounds() -> None:
    first = {"float32": {"matmul": 0.2, "convolution": 0.4}}
    second = {"float32": {"matmul": 0.1, "convolution": 0.5}}
    assert _best(_best({}, first), second) == {"float32": {"matmul": 0.2, "convolution": 0.5}}


def test_the_benchmarks_own_keys_are_known() -> None:
    assert set(settings()) - set(settings(config="train")) == set(KEYS)


@pytest.mark.parametrize(
    ("word", "own"),
    [
        ("images=16", True),
        ("plain.workers=2", True),
        ("+keep=a.md", True),
        ("output_root=x", True),
        ("trainer.max_epochs=3", True),
        ("data.images=16", False),
        ("trainer=cpu", False),
        ("image_every=1", False),
    ],
)
def test_what_is_passed_on_to_train(word: str, own: bool) -> None:
    assert _own(word) is own


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("images=1", "images=1: must be a whole number of at least 4"),
        ("images=5 task=three_class", "at least 6"),
        ("images=many", "images=many: must be a whole number"),
        ("rounds=0", "rounds=0: must be a whole number of at least 1"),
        ("rounds=2.5", "rounds=2.5"),
        ("epochs=-1", "epochs=-1: must be a whole number of at least 0"),
        ("plain.workers=-1", r"plain\.workers=-1"),
        ("plain.lightning=yesterday", r"plain\.lightning=yesterday: must be true or false"),
        ("start=2", "start=2: must be true or false"),
        ("growth=[100,0]", "growth=0"),
        ("growth=100", "growth=100: must be a list"),
        ("trainer.devices=2", "measures one device"),
        ("trainer=ddp", "measures one device"),
    ],
)
def test_options_that_cannot_be_measured_with(word: str, message: str) -> None:
    check_options(settings())
    with pytest.raises(InputError, match=message):
        check_options(settings(*word.split()))


def test_a_process_of_its_own_returns_what_it_computed() -> None:
    assert in_child(math.sqrt, 16.0) == 4.0


@pytest.mark.parametrize(
    ("function", "argument", "kind", "message"),
    [
        (read_folder, Path("nowhere"), InputError, "nowhere: no such folder"),
        (math.sqrt, -1.0, RuntimeError, "ValueError"),
        (os._exit, 3, RuntimeError, "exit code 3"),
    ],
)
def test_how_a_process_fails_is_told(function: Any, argument: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        in_child(function, argument)


def test_a_command_is_ended_at_its_line(tmp_path: Path) -> None:
    mark = tmp_path / "reached"
    code = f"print('first step', flush=True); import signal; signal.pause(); open({str(mark)!r}, 'w')"
    assert seconds_to_line([sys.executable, "-c", code], "first step") > 0
    assert not mark.exists()


def test_a_command_without_its_line_says_why() -> None:
    refused = "import sys; print('error: no such folder', file=sys.stderr); sys.exit(2)"
    with pytest.raises(InputError, match=r"^no such folder$"):
        seconds_to_line([sys.executable, "-c", refused], "first step")
    with pytest.raises(RuntimeError, match="ended without 'first step': something else"):
        seconds_to_line([sys.executable, "-c", "print('something else')"], "first step")
