"""The backbone of docs/your-backbone.md is built, frozen, loaded and trained, from its script and in a checkout."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from covid_cls.errors import InputError
from covid_cls.models.backbones import BACKBONES, STRATEGIES, apply_strategy, build_network, freeze_report
from covid_cls.models.weights import load_pretrained
from covid_cls.training.checkpoints import load_classifier
from tests.conftest import ROOT, SMALL
from tests.examples.documents import code_blocks, registered_part, stated_lines
from tests.training.small import changed, compose_small, make_classifier, make_data, make_trainer, snapshot

(SCRIPT,) = code_blocks("your-backbone.md")
(LOADING,) = code_blocks("your-backbone.md", "py")
(OPTION,) = code_blocks("your-backbone.md", "yaml")
NAME = "efficientnet_b0"
STAGES = ("stem", "stage1", "stage2", "stage3", "stage4", "stage5", "stage6", "stage7")
# Known answers, written out by hand.
TRAINED = {"fc": ("head",), "partial": ("stage7", "head"), "full": (*STAGES, "head")}
WORDS = (f"backbone={NAME}", "strategy=partial", "backbone.weights=none", "trainer.max_epochs=1", *SMALL)


@pytest.fixture(scope="module", autouse=True)
def registered_backbone() -> Iterator[None]:
    """Run the script as a module, which registers the backbones and trains nothing."""
    exec(compile(SCRIPT, "docs/your-backbone.md", "exec"), {"__name__": "train_efficientnet"})
    yield
    for name in ("efficientnet_b0", "efficientnet_b1"):
        del BACKBONES[name]


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """Return torchvision's network with batch norm statistics as after training."""
    torch.manual_seed(3)
    network: nn.Module = models.get_model(NAME, weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def test_the_page_states_the_number_of_lines() -> None:
    assert stated_lines("your-backbone.md", registered_part(SCRIPT))
    assert len(OPTION.splitlines()) == 2


def test_loaded_weights_compute_what_torchvision_computes_for_grey_images(theirs: nn.Module, tmp_path: Path) -> None:
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    network = build_network(NAME, 3).eval()
    report = load_pretrained(network, NAME, str(tmp_path / "weights.pth"))
    assert (report.fresh, report.pretrained_stages) == ((), STAGES)
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        expected = theirs.get_submodule("avgpool")(theirs.get_submodule("features")(x.expand(-1, 3, -1, -1))).flatten(1)
        found = network.run(x, stop=network.stage_names.index("pool") + 1)
        for k in range(len(network.stage_names) + 1):
            assert torch.equal(network.run(network.run(x, stop=k), start=k), network(x)), k
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_file_without_a_tensor_of_a_frozen_stage_is_refused(theirs: nn.Module, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("features.3.0")}
    torch.save(state, tmp_path / "weights.pth")
    network = build_network(NAME, 3)
    apply_strategy(network, "partial")
    with pytest.raises(InputError, match=r"frozen stages are missing: stage3\.3\.0\."):
        load_pretrained(network, NAME, str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_changes_the_stages_of_the_strategy_and_no_others(strategy: str, cache: Path, tmp_path: Path) -> None:
    settings = compose_small(f"backbone.name={NAME}", f"strategy={strategy}", "trainer.max_epochs=1")
    settings["trainer"]["limit_train_batches"] = 2
    data, classifier = make_data(settings, cache), make_classifier(settings)
    trainer, history = make_trainer(settings, tmp_path)
    before = snapshot(classifier)
    trainer.fit(classifier, data)
    moved = {name.split(".")[1] for name in changed(before, snapshot(classifier)) if name.startswith("net.")}
    assert moved == set(TRAINED[strategy])
    assert len(history.rows) == 1
    frozen = [line.stage for line in freeze_report(classifier.net) if not line.trainable]
    assert frozen == [stage for stage in STAGES if stage not in TRAINED[strategy]]
    for name, stage in classifier.net.train().named_children():
        depths = [module for module in stage.modules() if isinstance(module, StochasticDepth)]
        assert {module.training for module in depths} <= {name not in frozen}
    assert load_classifier(tmp_path / "checkpoints" / "best.ckpt").net.stage_names == (*STAGES, "pool", "head")


def assert_trained(command: list[str], folder: Path, environment: dict[str, str]) -> Path:
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stage7" in done.stdout
    (run,) = (folder / "outputs" / "phantom").iterdir()
    assert run.name.startswith(f"binary-{NAME}-partial-ce-s0-")
    return run


@pytest.mark.slow(reason="a script of the documentation starts a training")
def test_the_script_trains_and_its_model_can_be_loaded(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "train_efficientnet.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "my_conf" / "backbone").mkdir(parents=True)
    (tmp_path / "my_conf" / "backbone" / f"{NAME}.yaml").write_text(OPTION, encoding="utf-8")
    run = assert_trained(["train_efficientnet.py", "--config-dir", "my_conf", *WORDS], tmp_path, environment)
    loading = re.sub(r'"outputs/.*"', repr(str(run)), LOADING)
    loaded = subprocess.run([sys.executable, "-c", loading], cwd=tmp_path, env=environment, capture_output=True)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.slow(reason="a changed copy of the package is imported in a separate process")
def test_a_checkout_with_the_backbone_trains_from_the_command_line(environment: dict[str, str], tmp_path: Path) -> None:
    for folder in ("covid_cls", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "covid_cls" / "models" / "backbones.py").open("a", encoding="utf-8") as file:
        file.write("\n\n" + registered_part(SCRIPT))
    (tmp_path / "conf" / "backbone" / f"{NAME}.yaml").write_text(OPTION, encoding="utf-8")
    assert_trained(["-m", "covid_cls.train", *WORDS], tmp_path, environment)
