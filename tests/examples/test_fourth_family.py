"""A fourth family in under 40 lines: the code of docs/your-backbone.md, built, frozen, loaded, trained and started."""

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
from covid_cls.models.backbones import FAMILIES, STRATEGIES, build_network, freeze_depth, freeze_report
from covid_cls.models.weights import load_pretrained
from covid_cls.training.checkpoints import load_classifier
from tests.conftest import ROOT, SMALL
from tests.examples.documents import code_blocks
from tests.training.small import changed, compose_small, make_classifier, make_data, make_trainer, snapshot

IMPORTS, FAMILY = code_blocks("your-backbone.md")
NAME = "efficientnet_b0"
STAGES = ("stem", "stage1", "stage2", "stage3", "stage4", "stage5", "stage6", "stage7")
TRAINED = {"fc": ("head",), "partial": ("stage7", "head"), "full": (*STAGES, "head")}  # written out, not derived


@pytest.fixture(scope="module", autouse=True)
def fourth_family() -> Iterator[None]:
    """The document's code has been run."""
    exec(compile(IMPORTS + FAMILY, "docs/your-backbone.md", "exec"), {})
    yield
    del FAMILIES["efficientnet"]


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """torchvision's own network, its batch norms as they look after training."""
    torch.manual_seed(3)
    whole: nn.Module = models.get_model(NAME, weights=None)
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return whole.eval()


def test_the_family_takes_fewer_than_forty_lines() -> None:
    assert len((IMPORTS + FAMILY).splitlines()) < 40


def test_what_is_loaded_computes_what_torchvision_computes_on_grey(theirs: nn.Module, tmp_path: Path) -> None:
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


def test_a_file_without_a_frozen_tensor_is_refused(theirs: nn.Module, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("features.3.0")}
    torch.save(state, tmp_path / "weights.pth")
    network = build_network(NAME, 3)
    network.freeze(freeze_depth(network, "partial"))
    with pytest.raises(InputError, match=r"frozen stages are missing: stage3\.3\.0\."):
        load_pretrained(network, NAME, str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_moves_what_the_strategy_trains_and_no_bit_of_the_rest(
    strategy: str, cache: Path, tmp_path: Path
) -> None:
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
        draws = [module for module in stage.modules() if isinstance(module, StochasticDepth)]
        assert {module.training for module in draws} <= {name not in frozen}
    assert load_classifier(tmp_path / "checkpoints" / "best.ckpt").net.stage_names == (*STAGES, "pool", "head")


@pytest.mark.slow(reason="a changed copy of the package is imported in a process of its own")
def test_in_a_checkout_it_trains_from_the_command_line(environment: dict[str, str], tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in ("covid_cls", "conf"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    backbones = checkout / "covid_cls" / "models" / "backbones.py"
    function, entry = FAMILY.split('FAMILIES["efficientnet"] = ')
    before, after = backbones.read_text(encoding="utf-8").split("FAMILIES = {\n")
    placed = f'{before}{function}FAMILIES = {{\n    "efficientnet": {entry.rstrip()},\n{after}'
    backbones.write_text(placed, encoding="utf-8")
    (option,) = code_blocks("your-backbone.md", "yaml")
    (checkout / "conf" / "backbone" / f"{NAME}.yaml").write_text(option, encoding="utf-8")
    words = (f"backbone={NAME}", "strategy=partial", "backbone.weights=none", "trainer.max_epochs=1", *SMALL)
    command = [sys.executable, "-m", "covid_cls.train", *words]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name.rsplit("-", 1)[0] for path in (checkout / "outputs").glob("*/*")] == [
        f"binary-{NAME}-partial-ce-s0"
    ]
    assert "stage7" in done.stdout
