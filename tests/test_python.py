"""Commands as Python functions: they return results, raise exceptions and can be called several times."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest

from covid_cls.errors import InputError
from covid_cls.evaluate import evaluate
from covid_cls.models import losses
from covid_cls.predict import predict
from covid_cls.report import report
from covid_cls.train import train
from tests.conftest import SMALL, restored_state

WORDS = (*SMALL, "trainer.max_epochs=1", "logger=none", "backbone.weights=none", "strategy=fc", "baselines=false")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Use the cache of the tests, and restore what the functions change."""
    monkeypatch.setenv("COVID_CLS_CACHE", str(cache))
    with restored_state():
        yield


def test_train_evaluate_report_and_predict_return_their_results(tmp_path: Path) -> None:
    run = train(*WORDS, output_root=tmp_path)
    assert run.folder.parent == tmp_path / "phantom"
    assert run.metrics["best_epoch"] == 1
    assert list(run.history["epoch"]) == [1]
    assert set(run.predictions("test")["split"]) == {"test"}
    assert run.model("cpu").task.classes == ("covid", "normal")
    assert train(*WORDS, output_root=tmp_path) == run
    assert evaluate(run=run.folder, resamples=100).metrics["openings"]["times"] == 1
    assert len(report(runs=tmp_path / "phantom", resamples=100).results) > 0
    image = next((Path(str(run.folder)).parents[1]).rglob("confusion-val.png"))
    found = predict(model=run.folder, input=image, output=tmp_path / "table.csv", threshold="argmax", device="cpu")
    assert list(found.table["image_id"]) == [image.name]


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        (["seeed=3"], {}, "Key 'seeed' is not in struct"),
        ([], {"seed": "abc"}, "seed=abc: expected int"),
        ([], {"rerun": "maybe"}, "rerun=maybe: expected bool"),
        (["head.hidden=abc"], {}, "head.hidden=abc: expected"),
        (["strategy.freeze_untill=layer1"], {}, "freeze_untill"),
        (["backbone.weights=[1]"], {}, "backbone.weights=[1]: expected str"),
        (["seed=0,1"], {}, "several values are for the command line"),
        (["--help"], {}, "options and several values are for the command line"),
        (["probes=false"], {}, "probes: this setting is now called baselines"),
        (["experiment=seed_part1/fc"], {}, "this option is now called experiment=original_part1/fc"),
        (["augment=seed"], {}, "this option is now called augment=original"),
    ],
)
def test_wrong_input_raises_the_message_of_the_command(
    overrides: list[str], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        train(*overrides, output_root=tmp_path, **settings)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_gamma_reaches_the_loss_in_at_most_four_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopHere(Exception):  # noqa: N818  # no error
        pass

    paths: list[list[str]] = []

    # The signature stays, because it is the schema of the section.
    @functools.wraps(losses.LOSSES["focal"].__init__)
    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        names, frame = [], sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "_train":
            if "/covid_cls/" in frame.f_code.co_filename:
                names.append(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        paths.append(names)
        raise StopHere

    monkeypatch.setattr(losses.LOSSES["focal"], "__init__", record)
    with pytest.raises(StopHere):
        train(*WORDS, "loss=focal", "loss.gamma=3", output_root=tmp_path)
    assert len(paths[0]) <= 4, paths
