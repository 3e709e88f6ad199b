"""A sweep over heads fits the screen once; another network, split or view has one of its own."""

from pathlib import Path

import pytest
import torch

from covid_cls.artifact.record import known_screen
from covid_cls.artifact.screen import fit_screen
from covid_cls.models.scorer import Scorer
from tests.training.small import compose_small, make_classifier, make_data


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that a network has embedded since the test began."""
    seen: list[int] = []
    embed = Scorer.embed

    def counted(scorer: Scorer, canvases: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(canvases))
        return embed(scorer, canvases)

    monkeypatch.setattr(Scorer, "embed", counted)
    return seen


def test_networks_that_differ_in_the_head_share_a_screen(tmp_path: Path, passes: list[int]) -> None:
    settings = compose_small("augment=none")
    data, classifier = make_data(settings, tmp_path), make_classifier(settings)
    expected = fit_screen(classifier.scorer(), data)
    passes.clear()
    first = known_screen(classifier.scorer(), data)
    assert sum(passes) == len(data.dataset("train")) + len(data.dataset("val"))
    assert first.keys() == expected.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in expected.items())
    passes.clear()
    torch.nn.init.normal_(classifier.net.get_parameter("head.out.weight"))
    again = known_screen(classifier.scorer(), data)
    assert passes == []
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_another_network_view_or_split_has_its_own(tmp_path: Path, passes: list[int]) -> None:
    settings = compose_small("augment=none")
    data, classifier = make_data(settings, tmp_path), make_classifier(settings)
    known_screen(classifier.scorer(), data)
    others = (compose_small("augment=none", "seed=1"), compose_small("augment=none", "preprocess.sd=0.3"))
    for scorer, split in (
        *((make_classifier(other).scorer(), data) for other in others),
        (classifier.scorer(), make_data(compose_small("augment=none", "data.seed=1"), tmp_path)),
    ):
        passes.clear()
        known_screen(scorer, split)
        assert passes


def test_a_damaged_file_of_the_cache_is_made_anew(tmp_path: Path, passes: list[int]) -> None:
    settings = compose_small("augment=none")
    data, scorer = make_data(settings, tmp_path), make_classifier(settings).scorer()
    expected = known_screen(scorer, data)
    (file,) = (tmp_path / "screens").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    passes.clear()
    again = known_screen(scorer, data)
    assert passes
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    assert len(file.read_bytes()) > 100
