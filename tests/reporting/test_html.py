"""Pages are one file, whatever names and figures come into them."""

import re

from matplotlib.figure import Figure

from covid_cls.reporting import html


def drawn() -> Figure:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=html.INK, label="a < b")
    axes.legend()
    return figure


def test_names_cannot_become_markup() -> None:
    evil = '<script>alert("x")</script>'
    text = html.page(evil, html.paragraph(evil), [html.Section(evil, html.table([evil], [[evil]]), evil)])
    text += html.bullets([evil]) + html.figure(drawn(), evil)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_page_needs_nothing_but_itself() -> None:
    figures = html.panels([html.figure(drawn(), f"figure {k}") for k in range(2)])
    text = html.page("title", "", [html.Section("First part", figures), html.Section("Second", html.table(["a"], []))])
    assert re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', text) == []
    assert "url(http" not in text
    assert text.count(html.DISCLAIMER) == 2
    anchors = re.findall(r'<a href="#([^"]*)"', text)
    assert anchors == ["first-part", "second"]
    assert all(f'<section id="{anchor}"' in text for anchor in anchors)


def test_figures_keep_their_ids_apart_and_follow_the_page_s_ink() -> None:
    figures = [html.figure(drawn(), caption) for caption in ("one", "two")]
    ids = [set(re.findall(r'id="([^"]+)"', figure)) for figure in figures]
    assert ids[0]
    assert not ids[0] & ids[1]
    for figure, own in zip(figures, ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', figure)) <= own
        assert "currentColor" in figure
        assert html.INK.lower() not in figure
        assert "a &lt; b" in figure  # text, not outlines


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert html.figure(drawn(), "a caption") == html.figure(drawn(), "a caption")


def test_words_stand_left_and_numbers_right() -> None:
    text = html.table(["cell", "loss", "AUROC"], [["a", "ce", "0.9"]], left=2)
    assert "<td>a</td><td>ce</td>" in text
    assert '<td class="n">0.9</td>' in text
