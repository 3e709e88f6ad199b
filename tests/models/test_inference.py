"""The prefix gives the numbers of the frozen stages, and in half precision nearly the same."""

import copy
import shutil

import pytest
import torch
from torch import nn

from covid_cls.models.backbones import Staged, apply_strategy, build_network
from covid_cls.models.inference import Prefix

STRATEGIES = ("fc", "partial")


def network(backbone: str, strategy: str) -> Staged:
    """Return a network with batch norm statistics as after training, frozen by `strategy`."""
    torch.manual_seed(0)
    built = build_network(backbone, 3)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    apply_strategy(built, strategy)
    return built


def images(n: int = 4, side: int = 64) -> torch.Tensor:
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "vgg11", "vgg11_bn"])
def test_a_prefix_computes_what_the_frozen_stages_compute(backbone: str, strategy: str) -> None:
    built = network(backbone, strategy).train()
    prefix = Prefix(built)
    with torch.no_grad():
        wanted = built.run(images(), stop=prefix.stop)
    torch.testing.assert_close(prefix(images()), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("backbone", ["resnet50", "vgg11_bn"])
def test_a_prefix_has_no_batch_norm(backbone: str) -> None:
    built = network(backbone, "fc")
    prefix = Prefix(built)
    assert not [m for m in prefix._part.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in built.modules() if isinstance(m, nn.BatchNorm2d)], "the network itself must not change"


@pytest.mark.parametrize(
    ("backbone", "strategy", "until"),
    [
        ("resnet18", "fc", "pool"),
        ("resnet18", "partial", "layer3"),
        ("vgg11", "fc", "pool"),
        ("vgg11", "partial", "block4"),
    ],
)
def test_a_prefix_ends_before_the_first_trained_stage(backbone: str, strategy: str, until: str) -> None:
    built = network(backbone, strategy)
    assert built.stage_names[Prefix(built).stop - 1] == until


def test_without_frozen_stages_there_is_nothing_to_compute_ahead() -> None:
    assert network("resnet18", "full").entry == 0


def test_a_prefix_is_neither_trained_nor_part_of_a_state_dict() -> None:
    built = network("resnet18", "fc")
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    holder = nn.Module()
    holder.net, holder.prefix = built, Prefix(built)
    assert not holder.prefix(images()).requires_grad
    assert all(name.startswith("net.") for name in holder.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.state_dict().items())


def test_the_digest_depends_on_the_weights_of_the_frozen_stages_only() -> None:
    first, same = network("resnet18", "partial"), network("resnet18", "partial")
    with torch.no_grad():
        same.get_submodule("head.out").weight.add_(1)
    assert Prefix(first).digest == Prefix(same).digest == Prefix(first, dtype=torch.bfloat16).digest
    for name in ("stem.conv1.weight", "layer3.1.bn2.running_var"):
        other = copy.deepcopy(first)
        other.state_dict()[name].view(-1)[0] += 1e-6
        assert Prefix(other).digest != Prefix(first).digest


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backbone", ["resnet18", "vgg11"])
def test_half_precision_is_close_to_float32(backbone: str, strategy: str) -> None:
    built = network(backbone, strategy).eval()
    wanted, found = Prefix(built)(images(64, 32)), Prefix(built, dtype=torch.bfloat16)(images(64, 32))
    assert found.dtype == torch.bfloat16
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.slow(reason="inductor starts a C++ compiler")
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_a_compiled_prefix_computes_the_same() -> None:
    built = build_network("vgg11", 3)
    # One convolution: compiling takes seconds instead of a minute.
    built.freeze("block1")
    wanted, found = Prefix(built), Prefix(built, compiled=True)
    assert wanted.stop == 1
    # The last batch of an epoch is smaller.
    for n in (4, 3):
        torch.testing.assert_close(found(images(n)), wanted(images(n)), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_computes_nearly_the_same() -> None:
    built = network("resnet18", "fc")
    wanted = Prefix(built)(images())
    for dtype, share in ((torch.float32, 0.005), (torch.bfloat16, 0.02)):
        found = Prefix(built, "cuda", dtype)(images().cuda())
        assert (found.device.type, found.dtype) == ("cuda", dtype)
        assert float((found.cpu() - wanted).norm() / wanted.norm()) < share
