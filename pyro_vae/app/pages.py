"""Self-contained HTML pages: paragraphs, formulas, tables and pictures, readable offline."""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

import pyro_vae
from pyro_vae.results import write_text

__all__ = [
    "Formula",
    "Heading",
    "Note",
    "Page",
    "Panel",
    "Paragraph",
    "Picture",
    "Table",
    "Verbatim",
    "figure_panels",
    "figure_png",
    "render_template",
]

_DPI = 110
_CSS_PER_INCH, _LEAST_CSS_PER_INCH = 80, 56  # pixels
_PAGE = 1160  # pixels that a page has at most
_PAD = 0.1  # inches around a picture
_SHORT = 32  # letters of a cell that stays on one line
_DENSE = 9  # columns from which on a table is set smaller


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text; it is escaped."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Note:
    """A warning that must not be overlooked."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Verbatim:
    """Text in a fixed width: a command, or the table of a `Result`."""

    kind: ClassVar[str] = "verbatim"
    text: str


@dataclass(frozen=True)
class Formula:
    """A formula in TeX, as far as matplotlib's mathtext goes."""

    kind: ClassVar[str] = "formula"
    tex: str

    @property
    def image(self) -> str:
        """The formula drawn as SVG, in base64."""
        figure = Figure(figsize=(0.01, 0.01))
        figure.text(0, 0, f"${self.tex}$", fontsize=13)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.03, transparent=True)
        return base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def dense(self) -> bool:
        """Whether so many columns stand side by side that they are set smaller."""
        return len(self.header) >= _DENSE

    @property
    def cells(self) -> list[list[tuple[str, str]]]:
        """Rows of cells, each with its class: numbers and short words do not break."""
        return [[(cell, "short" if len(cell) <= _SHORT else "") for cell in r] for r in self.rows]


@dataclass(frozen=True)
class Panel:
    """A picture, or a part of one.

    Attributes:
        image: PNG, in base64.
        alt: What it shows, for readers who cannot see it.
        width: In CSS pixels, where there is room.
    """

    image: str
    alt: str
    width: int


@dataclass(frozen=True)
class Picture:
    """A figure with its caption, if it needs one.

    Panels that stand beside one another become pictures of their own, which stand below one another
    where the page is narrow.
    """

    kind: ClassVar[str] = "picture"
    figure: Figure
    caption: str = ""

    @property
    def panels(self) -> list[Panel]:
        """The figure in as many pieces as it has panels in a row."""
        return figure_panels(self.figure)


Part = Heading | Paragraph | Note | Verbatim | Formula | Table | Picture


@dataclass
class Page:
    """A page to which parts are added one after the other.

    Example:
        >>> page = Page("A page")
        >>> page.add(Heading("First"), Paragraph("1 < 2"))
        >>> "1 &lt; 2" in page.html()
        True
    """

    title: str
    parts: list[Part] = field(default_factory=list)

    def add(self, *parts: Part) -> None:
        """Adds parts at the end."""
        self.parts.extend(parts)

    def html(self) -> str:
        """The page as one HTML document without references to anything outside it."""
        return render_template("page.html.j2", title=self.title, parts=self.parts)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page, wholly or not at all, and returns its path."""
        write_text(Path(path), self.html())
        return Path(path)


def render_template(name: str, **values: object) -> str:
    """Fills one of the package's templates; text is escaped, and a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("pyro_vae.app"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name).render(version=pyro_vae.__version__, **values)


def figure_png(figure: Figure, box: Bbox | None = None) -> bytes:
    """A figure, or what a box in inches holds of it, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight" if box is None else box)
    return buffer.getvalue()


def figure_panels(figure: Figure) -> list[Panel]:
    """The panels of a figure that stand in one row, or the whole figure as one.

    A title or a legend of the whole figure keeps its panels together.
    """
    boxes = _boxes(figure, _describe(figure))
    widths = [figure.get_figwidth() if box is None else box.width for box, _ in boxes]
    # A row that is a little too wide for a page is made to fit; a wider one breaks.
    scale = max(min(_CSS_PER_INCH, _PAGE / sum(widths)), _LEAST_CSS_PER_INCH)
    return [
        Panel(base64.b64encode(figure_png(figure, box)).decode("ascii"), alt, int(scale * width))
        for (box, alt), width in zip(boxes, widths, strict=True)
    ]


def _boxes(figure: Figure, alts: Sequence[str]) -> list[tuple[Bbox | None, str]]:
    """Where to cut, with what each piece shows."""
    row = _row(figure)
    title = figure.get_suptitle()
    whole: list[tuple[Bbox | None, str]] = [
        (None, f"{title}: {'; '.join(alts)}" if title else "; ".join(alts))
    ]
    if len(row) < 2 or title or figure.legends or figure.texts:
        return whole
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    spans: list[list[Any]] = [[ax.get_tightbbox(renderer)] for ax in row]
    for ax in figure.axes:
        if ax not in row:  # a colour bar belongs to the panel on its left
            box: Any = ax.get_tightbbox(renderer)
            left = [i for i, span in enumerate(spans) if span[0].x0 <= box.x0]
            spans[left[-1] if left else 0].append(box)
    joined = [Bbox.union(boxes) for boxes in spans]
    cuts = [(a.x1 + b.x0) / 2 for a, b in pairwise(joined)]
    if any(a.x1 > b.x0 for a, b in pairwise(joined)):
        return whole
    around = figure.get_tightbbox(renderer)
    edges = [around.x0 - _PAD, *(cut / figure.dpi for cut in cuts), around.x1 + _PAD]
    boxes = [
        Bbox.from_extents(left, around.y0 - _PAD, right, around.y1 + _PAD)
        for left, right in pairwise(edges)
    ]
    return list(zip(boxes, alts, strict=True))


def _row(figure: Figure) -> list[Axes]:
    """The panels, from left to right, if they stand in one row; else none."""
    panels = [ax for ax in figure.axes if ax.get_subplotspec() is not None and not _is_bar(ax)]
    specs = [ax.get_subplotspec() for ax in panels]
    grids = {spec.get_gridspec() for spec in specs if spec is not None}
    alone = all(ax.yaxis.get_tick_params().get("labelleft", True) for ax in panels)
    if len(grids) != 1 or next(iter(grids)).nrows != 1 or not alone:  # they share an axis
        return []
    return sorted(panels, key=lambda ax: ax.get_position().x0)


def _is_bar(ax: Axes) -> bool:
    return ax.get_label() == "<colorbar>"


def _describe(figure: Figure) -> list[str]:
    """What each panel shows, in words of its own labels."""
    panels = _row(figure) or [ax for ax in figure.axes if not _is_bar(ax)]
    return [text for ax in panels if (text := _describe_panel(ax))] or ["figure"]


def _describe_panel(ax: Axes) -> str:
    x, y, title = (" ".join(t.split()) for t in (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()))
    axes = f"{y} against {x}" if x and y else x or y
    return ": ".join(part for part in (title, axes) if part)
