"""Parts of pages: escaping, tables, figures, numbers; and that templates are complete."""

import math
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from matplotlib.figure import Figure

from covid_cls.evaluation.intervals import Interval
from covid_cls.reporting import html
from covid_cls.reporting.style import INK

EVIL = '<script>alert("x")</script>'


def drawn() -> Figure:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=INK, label="a < b")
    axes.legend()
    return figure


@pytest.mark.parametrize(
    "text",
    [
        html.Table([EVIL], [[EVIL]]).__html__(),
        html.bullets([EVIL]),
        html.confusion([EVIL], [[1]], EVIL),
        html.svg_figure(drawn(), EVIL),
    ],
    ids=["table", "bullets", "confusion", "figure"],
)
def test_names_cannot_become_markup(text: str) -> None:
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_page_fails_if_it_uses_a_name_that_it_was_not_given() -> None:
    with pytest.raises(UndefinedError):
        html.render("audit.html.j2")


def test_templates_mark_nothing_from_outside_as_safe() -> None:
    for path in (Path(html.__file__).parent / "templates").iterdir():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"([^\s(|]+)\s*\|\s*safe", text)) <= {'"<br>"'}, path
        assert "autoescape" not in text, path


def test_figures_have_different_ids_and_use_the_text_colour_of_the_page() -> None:
    figures = [html.svg_figure(drawn(), caption) for caption in ("one", "two")]
    ids = [set(re.findall(r'id="([^"]+)"', figure)) for figure in figures]
    assert ids[0]
    assert not ids[0] & ids[1]
    for figure, own in zip(figures, ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', figure)) <= own
        assert "currentColor" in figure
        assert INK.lower() not in figure
        assert "a &lt; b" in figure  # text, not outlines
        assert re.search(r"<svg[^>]*>", figure)[0].count(" width=") == 0  # type: ignore[index]


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert html.svg_figure(drawn(), "a caption") == html.svg_figure(drawn(), "a caption")


def test_words_are_aligned_to_the_left_and_numbers_to_the_right() -> None:
    text = html.Table(["run", "loss", "AUROC"], [["a", "ce", "0.9\n0.8 to 1.0"]], left=2).__html__()
    assert "<td>a</td><td>ce</td>" in text
    assert '<td class="n">0.9<br>0.8 to 1.0</td>' in text


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (Interval(0.871, 0.843, 0.899, "any"), "0.871 (0.843 to 0.899)"),
        ({"value": 0.5, "low": None, "high": None}, "0.500 (no interval)"),
        ({"value": None, "low": None, "high": None}, "–"),
        (Interval(math.nan, math.nan, math.nan, "none"), "–"),
        (None, "–"),
    ],
)
def test_scores_are_shown_with_their_intervals(score: Interval | dict[str, float | None] | None, text: str) -> None:
    assert html.with_interval(score) == text


def test_differences_have_a_sign() -> None:
    assert html.with_interval(Interval(0.1, -0.05, 0.25, "any"), 2, "+") == "+0.10 (-0.05 to +0.25)"


def test_scores_have_names_that_can_be_read() -> None:
    names = ["covid.auroc", "balanced_accuracy", "macro_f1", "npv", "nll"]
    labels = ["covid AUROC", "balanced accuracy", "macro F1", "NPV", "negative log likelihood"]
    assert [html.score_label(name) for name in names] == labels
