"""The patch of docs/your-loss.md applies, gives known values, and trains from the command line."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from covid_cls.labels import TASKS
from tests.conftest import ROOT, SMALL
from tests.examples.documents import code_blocks


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its configuration after what the document says was done to it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("covid_cls", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (patch,), (option,) = code_blocks("your-loss.md", "diff"), code_blocks("your-loss.md", "yaml")
    (folder / "conf" / "loss" / "poly1.yaml").write_text(option, encoding="utf-8")
    # Inside of a repository git would leave out what the patch changes in other folders, without a word.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    applied = subprocess.run(["git", "apply"], cwd=folder, env=env, input=patch, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    return folder


@pytest.fixture(scope="module")
def losses(checkout: Path) -> ModuleType:
    """The patched module, beside the one that is installed."""
    module = ModuleType("patched_losses")
    source = (checkout / "covid_cls" / "models" / "losses.py").read_text(encoding="utf-8")
    exec(compile(source, "losses.py", "exec"), module.__dict__)
    return module


def test_epsilon_zero_is_cross_entropy_and_one_adds_what_is_left_of_p(losses: ModuleType) -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(32, 3, dtype=torch.float64), torch.randint(0, 3, (32,))
    torch.testing.assert_close(losses.poly1_loss(logits, y, 0.0), F.cross_entropy(logits.float(), y))
    quarter = torch.tensor([[0.0, math.log(3.0)]])  # p = 0.25
    assert losses.poly1_loss(quarter, torch.tensor([0]), 2.0).item() == pytest.approx(-math.log(0.25) + 2 * 0.75)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e4])
def test_value_and_gradient_are_finite(size: float, losses: ModuleType) -> None:
    logits = (size * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])).requires_grad_()
    loss = losses.poly1_loss(logits, torch.tensor([0, 0]), 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_several_labels_are_refused(losses: ModuleType) -> None:
    targets = TASKS["three_class_multilabel"].targets
    with pytest.raises(Exception, match="no form for several labels"):
        losses.Criterion("poly1", targets, [3, 3, 3], 9, multilabel=True, epsilon=1.0)


@pytest.mark.slow(reason="a changed copy of the package is imported in a process of its own")
def test_it_trains_from_the_command_line(checkout: Path, environment: dict[str, str]) -> None:
    words = ("task=three_class", "loss=poly1", "strategy=fc", "backbone.weights=none", "trainer.max_epochs=1", *SMALL)
    command = [sys.executable, "-m", "covid_cls.train", *words]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (cell,) = (checkout / "outputs" / "phantom").iterdir()
    assert cell.name.startswith("three_class-resnet18-fc-poly1-s0-")
