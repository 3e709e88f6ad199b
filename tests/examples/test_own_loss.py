"""The loss of docs/your-loss.md has known values, and trains from its script and in a checkout."""

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from covid_cls.errors import InputError
from covid_cls.models.losses import LOSSES, Loss, build_loss
from covid_cls.runtime.schema import check_section
from covid_cls.tasks import TASKS
from tests.conftest import ROOT, SMALL
from tests.examples.documents import code_blocks, registered_part, stated_lines

(SCRIPT,) = code_blocks("your-loss.md")
(OPTION,) = code_blocks("your-loss.md", "yaml")
WORDS = ("task=three_class", "loss=poly1", "strategy=fc", "backbone.weights=none", "trainer.max_epochs=1", *SMALL)


@pytest.fixture(scope="module", autouse=True)
def registered_loss() -> Iterator[None]:
    """Run the script as a module, which registers the loss and trains nothing."""
    exec(compile(SCRIPT, "docs/your-loss.md", "exec"), {"__name__": "train_poly1"})
    yield
    del LOSSES["poly1"]


def poly1(epsilon: float) -> Loss:
    return build_loss({"name": "poly1", "epsilon": epsilon}, TASKS["three_class"], [3, 3, 3])


def test_the_page_states_the_number_of_lines() -> None:
    assert stated_lines("your-loss.md", registered_part(SCRIPT))
    assert len(OPTION.splitlines()) == 2


def test_the_loss_has_the_known_values() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(32, 3, dtype=torch.float64), torch.randint(0, 3, (32,))
    torch.testing.assert_close(poly1(0.0)(logits, y), F.cross_entropy(logits.float(), y))
    quarter = torch.tensor([[0.0, math.log(3.0)]])  # p = 0.25
    assert poly1(2.0)(quarter, torch.tensor([0])).item() == pytest.approx(-math.log(0.25) + 2 * 0.75)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e4])
def test_value_and_gradient_are_finite(size: float) -> None:
    logits = (size * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])).requires_grad_()
    loss = poly1(1.0)(logits, torch.tensor([0, 0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_several_labels_per_image_are_refused() -> None:
    with pytest.raises(InputError, match="not defined for several labels"):
        build_loss({"name": "poly1"}, TASKS["three_class_multilabel"], [3, 3, 3])


def test_the_signature_is_the_schema() -> None:
    check_section("loss", LOSSES, {"name": "poly1", "epsilon": 1.0})
    with pytest.raises(InputError, match=r"loss\.gamma: no such setting; loss\.name=poly1 takes epsilon"):
        check_section("loss", LOSSES, {"name": "poly1", "gamma": 1.0})


def assert_trained(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "outputs" / "phantom").iterdir()
    assert run.name.startswith("three_class-resnet18-fc-poly1-s0-")


@pytest.mark.slow(reason="a script of the documentation starts a training")
def test_the_script_trains_with_the_loss(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "train_poly1.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "my_conf" / "loss").mkdir(parents=True)
    (tmp_path / "my_conf" / "loss" / "poly1.yaml").write_text(OPTION, encoding="utf-8")
    assert_trained(["train_poly1.py", "--config-dir", "my_conf", *WORDS], tmp_path, environment)


@pytest.mark.slow(reason="a changed copy of the package is imported in a separate process")
def test_a_checkout_with_the_loss_trains_from_the_command_line(environment: dict[str, str], tmp_path: Path) -> None:
    for name in ("covid_cls", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "covid_cls" / "models" / "losses.py").open("a", encoding="utf-8") as file:
        file.write("\n\n" + registered_part(SCRIPT))
    (tmp_path / "conf" / "loss" / "poly1.yaml").write_text(OPTION, encoding="utf-8")
    assert_trained(["-m", "covid_cls.train", *WORDS], tmp_path, environment)
