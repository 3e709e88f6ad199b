"""The sections of a train configuration are checked against the signatures of what takes them."""

import pytest

from covid_cls.errors import InputError
from covid_cls.runtime.schema import check_sections
from covid_cls.training.settings import SECTIONS, Head
from tests.training.small import compose_small


def test_the_shipped_configuration_fits() -> None:
    check_sections(compose_small(), SECTIONS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("head.hidden=abc",), r"head\.hidden=abc: expected int \| None"),
        (("head.prior_bias=1",), r"head\.prior_bias=1: expected bool"),
        (("+head.layers=2",), r"head\.layers: no such setting"),
        (("strategy.freeze_until=3",), r"strategy\.freeze_until=3: expected str \| None"),
        (("backbone.weights=1",), r"backbone\.weights=1: expected str"),
        (("task.name=lungs",), r"task\.name=lungs: unknown; choose one of binary"),
        (("loss.name=hinge",), r"loss\.name=hinge: unknown; choose one of"),
        (("loss=ce", "+loss.gamma=2.0"), r"loss\.gamma: no such setting; loss\.name=ce takes"),
        (("+optimizer.network=1",), r"optimizer\.network: no such setting"),
        (("operating.sensitivity=high",), r"operating\.sensitivity=high: expected float"),
        (("sweep.jobs_per_gpu=two",), r"sweep\.jobs_per_gpu=two: expected int"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_key_or_type_is_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sections(compose_small(*words), SECTIONS)


@pytest.mark.parametrize(("hidden", "dropout"), [(0, 0.5), (-3, 0.5), (150, 1.0), (None, -0.1), (150, float("nan"))])
def test_an_impossible_head_is_refused(hidden: int | None, dropout: float) -> None:
    with pytest.raises(InputError, match=r"head\."):
        Head(hidden, dropout)
