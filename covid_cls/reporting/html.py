"""Render pages and their parts from the templates, and set numbers and tables as text."""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from covid_cls.evaluation.intervals import Interval
from covid_cls.io import DISCLAIMER, digest
from covid_cls.reporting.style import INK

# Names of files, patients and classes come from users: everything is escaped unless it is Markup already.
_TEMPLATES = Environment(
    loader=PackageLoader("covid_cls.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["anchor"] = lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
_TEMPLATES.globals["disclaimer"] = DISCLAIMER

_SCORE_LABELS = {
    "brier": "Brier score",
    "nll": "negative log likelihood",
    "label_accuracy": "accuracy per label",
    "covid_f1_at_half": "covid F1, label cut at 0.5",
}


class Table(NamedTuple):
    r"""A table of plain text, which templates and notebooks show as HTML.

    Attributes:
        headers: One text per column.
        rows: One text per column; "\n" starts a new line within a field.
        left: Number of leading columns that hold words. The others hold numbers and are aligned to the right.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def __html__(self) -> str:
        """Return the table as HTML; templates call this method."""
        return _part("table", *self)

    def _repr_html_(self) -> str:
        """Return the table as HTML; notebooks call this method."""
        return self.__html__()


def render(template: str, **context: Any) -> str:
    """Return the page that a template of templates/ makes from `context`.

    Raises:
        jinja2.UndefinedError: If the template uses a name that is not in `context`.
    """
    return _TEMPLATES.get_template(template).render(contents=[], **context)


def bullets(items: Sequence[str]) -> Markup:
    """Return plain texts as an HTML list; "" for no items."""
    return _part("bullets", items)


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]], caption: str) -> Markup:
    """Return a confusion matrix as an HTML table; rows of `counts` are the truth, columns the decision."""
    return _part("confusion", classes, counts, caption)


def svg_figure(figure: Figure, caption: str) -> Markup:
    """Return a figure as inline SVG with its text kept as text.

    What the figure draws in `INK` takes the text colour of the page, and its background is transparent, so that it can
    be read on a light and on a dark page.
    """
    file = io.StringIO()
    figure.set_facecolor("none")
    for axes in figure.axes:
        axes.set_facecolor("none")
    # Without the date, and with ids that depend on the content alone, the same figure gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK.lower(), "currentColor").replace("DejaVu Sans", "system-ui")
    # The page sets the size: the first width and the first height are those of the svg element.
    for name in ("width", "height"):
        svg = re.sub(rf' {name}="[^"]*"', "", svg, count=1)
    # matplotlib numbers the groups of each figure from 1, but the ids of a page must differ.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{digest(svg)[:8]}-", svg)
    return _part("figure", Markup(svg), caption)  # noqa: S704 (matplotlib escapes the text of a figure)


def data_uri(content: bytes, image_type: str) -> str:
    """Return the bytes of an image file as a URI that holds them; image_type: "png" or "jpeg"."""
    return f"data:image/{image_type};base64,{base64.b64encode(content).decode()}"


def score_label(name: str) -> str:
    """Return a flat score name as text, e.g. "covid.auroc" as "covid AUROC"."""
    words = re.sub(r"[._]", " ", name)
    return _SCORE_LABELS.get(name, re.sub(r"\b(auroc|f1|ppv|npv|mcc)\b", lambda word: word[0].upper(), words))


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """Return a number as text, a dash if it is undefined; with sign="+", positive numbers have a sign."""
    return "–" if value is None or not math.isfinite(value) else f"{value:{sign}.{digits}f}"


def with_interval(score: Interval | Mapping[str, Any] | None, digits: int = 3, sign: str = "") -> str:
    """Return a score with its interval, e.g. "0.871 (0.843 to 0.899)"; a dash if the score is undefined.

    Args:
        score: An interval, or the mapping with value, low and high that records contain.
        digits: Digits after the decimal point.
        sign: "+" for differences.
    """
    if score is None:
        return "–"
    ends = score if isinstance(score, Mapping) else score._asdict()
    value, low, high = (number(ends[key], digits, sign) for key in ("value", "low", "high"))
    if value == "–":
        return value
    return f"{value} (no interval)" if low == "–" else f"{value} ({low} to {high})"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of text with aligned columns; the first column is aligned to the left."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _part(name: str, *arguments: Any) -> Markup:
    """Return what a macro of parts.html.j2 makes of its arguments."""
    part: Markup = getattr(_TEMPLATES.get_template("parts.html.j2").module, name)(*arguments)
    return part
