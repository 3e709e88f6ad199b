"""Pages that are one file: they work offline, on a phone, in light and dark, and carry their figures as inline SVG."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from covid_cls.records import DISCLAIMER, digest
from covid_cls.reporting.figures import INK

_STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --quiet: #5d646d; --line: #d9dde2; --paper: #ffffff;
  --shade: #f3f6f9; --accent: #0060a0; --bad: #b3261e; --good: #1b6e3c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --quiet: #a2abb5; --line: #3a4048; --paper: #15181c;
  --shade: #1f242a; --accent: #7cc0f0; --bad: #ff8a80; --good: #7fd6a0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .2rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .3rem; } h3 { font-size: 1rem; }
p { max-width: 46rem; margin: .4rem 0; } a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: .5rem 0; border-bottom: 1px solid var(--line); }
.quiet, figcaption, .note { color: var(--quiet); font-size: .9rem; }
.banner { background: var(--shade); border-left: 4px solid var(--accent); padding: .5rem .8rem; margin: .6rem 0; }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); font-weight: 600; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { border-bottom: 2px solid var(--line); font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: .5rem 0; max-width: 46rem; } figure svg { width: 100%; height: auto; }
details { margin: .4rem 0; } summary { cursor: pointer; }
footer { margin-top: 2.5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
@media print { nav { display: none; } }
"""


class Section(NamedTuple):
    """A heading with HTML below it; `note`, plain text, says how to read it."""

    title: str
    body: str
    note: str = ""


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole HTML document. title: plain text; lead: HTML above the contents, e.g. from `banner`."""
    anchors = [re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") for section in sections]
    links = "".join(f'<a href="#{anchor}">{escape(s.title)}</a>' for anchor, s in zip(anchors, sections, strict=True))
    notes = [paragraph(section.note, "quiet") if section.note else "" for section in sections]
    parts = [
        f'<section id="{anchor}"><h2>{escape(s.title)}</h2>{note}{s.body}</section>'
        for anchor, note, s in zip(anchors, notes, sections, strict=True)
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><header><h1>{escape(title)}</h1>"
        f'<p class="quiet">{DISCLAIMER}</p>{lead}</header><nav>{links}</nav>{"".join(parts)}'
        f'<footer class="quiet">Made by covid_cls. {DISCLAIMER}</footer></body></html>\n'
    )


def paragraph(text: str, style: str = "") -> str:
    """Plain text as a paragraph; style: quiet, note, bad, good or banner."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def bullets(items: Sequence[str]) -> str:
    """Plain texts as a list; "" for none."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table of plain texts that scrolls sideways on a narrow screen; the first `left` columns are words."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}>{escape(cell)}</{tag}>" if k < left else f'<{tag} class="n">{escape(cell)}</{tag}>'
            for k, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="wide"><table><thead><tr>{row(headers, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(drawn: Figure, caption: str) -> str:
    """A matplotlib figure as inline SVG with real text on a clear ground; what it drew in `INK` follows the page."""
    text = io.StringIO()
    drawn.set_facecolor("none")
    for axes in drawn.axes:
        axes.set_facecolor("none")
    # The same figure gives the same bytes: no date, and ids that depend on the content alone.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption, "font.family": "sans-serif"}):
        drawn.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK.lower(), "currentColor").replace("DejaVu Sans", "system-ui")
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    return f"<figure>{_own_ids(svg)}<figcaption>{escape(caption)}</figcaption></figure>"


def panels(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="panels">{"".join(figures)}</div>'


def _own_ids(svg: str) -> str:
    """`svg` with ids of its own: matplotlib numbers each figure's groups from 1, and a page holds many figures."""
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{digest(svg)[:8]}-", svg)
