"""Self-contained HTML pages: paragraphs, formulas, tables and pictures, readable offline."""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

import pyro_vae
from pyro_vae.results import write_text

__all__ = [
    "Formula",
    "Heading",
    "Note",
    "Page",
    "Paragraph",
    "Picture",
    "Table",
    "Verbatim",
    "figure_png",
    "render_template",
]

_DPI = 110


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


@dataclass(frozen=True)
class Picture:
    """A figure with its caption."""

    kind: ClassVar[str] = "picture"
    figure: Figure
    caption: str

    @property
    def image(self) -> str:
        """The figure as PNG, in base64."""
        return base64.b64encode(figure_png(self.figure)).decode("ascii")


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


def figure_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
    return buffer.getvalue()
