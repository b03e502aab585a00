"""The page of an analysis: its essay is a template with named numbers, figures and tables.

A template is a file of blocks with blank lines between them, filled by jinja2. A block is
``# Title`` (the first), ``## Heading``, ``> a note``, ``$$ a formula $$``, a table of lines
``| a | b |``, ``![caption](name)`` for a figure, a table or a text that was passed by that name,
or a paragraph.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vae.app.pages import (
    Formula,
    Heading,
    Note,
    Page,
    Paragraph,
    Part,
    Picture,
    Table,
    Verbatim,
)
from pyro_vae.text import rows_text

__all__ = ["Rows", "figure_of", "make_page", "mean_and_error", "page_lines"]

Rows = Sequence[dict[str, str]]
LAST_SECTION = "How it was made"


def make_page(template: str, **told: Any) -> Page:
    """Fills a template of `analyses/templates`.

    Args:
        template: Its name.
        told: Numbers and words by name; figures, tables (`Rows`) and texts of fixed width too.
    """
    filled = _environment().get_template(f"{template}.md.j2").render(told)
    title, *blocks = (b.strip() for b in re.split(r"\n\s*\n", filled) if b.strip())
    return Page(title.removeprefix("# "), [_part(block, told) for block in blocks])


def page_lines(page: Page) -> list[str]:
    """What a page says, as text, without formulas, pictures and how it was made."""
    lines = []
    for part in page.parts:
        if isinstance(part, Heading):
            if part.text == LAST_SECTION:
                break
            lines.append(f"\n## {part.text}")
        elif isinstance(part, Table):
            rows = [dict(zip(part.header, row, strict=True)) for row in part.rows]
            lines.append(f"{rows_text(rows)}\n")
        elif isinstance(part, Note | Paragraph | Verbatim):
            lines.append(part.text)
    return lines


@cache
def _environment() -> Environment:
    """Text is escaped later, in the page's own template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"abs": abs, "paragraphs": "\n\n".join}
    environment.filters["form"] = lambda value, form: format(float(value), form)
    environment.filters["fields"] = lambda settings: ", ".join(
        f"{name} {value}"
        for name, value in asdict(settings).items()
        if (name, value) != ("cases", ())  # which stands for all of them
    )
    return environment


def _part(block: str, told: dict[str, Any]) -> Part:
    if block.startswith("|"):
        header, *rows = (re.split(r" *\| *", line)[1:-1] for line in block.splitlines())
        return Table(header, rows)
    text = " ".join(block.split())
    if shown := re.fullmatch(r"!\[(.*)\]\((\w+)\)", text):
        caption, name = shown.groups()
        what = told[name]
        if isinstance(what, Figure):
            return Picture(what, caption)
        if isinstance(what, str):
            return Verbatim(what)
        return Table(list(what[0]), [list(row.values()) for row in what])
    for mark, kind in (("## ", Heading), ("> ", Note)):
        if text.startswith(mark):
            return kind(text.removeprefix(mark))
    return Formula(text.strip("$ ")) if text.startswith("$$") else Paragraph(text)


def figure_of(axes: Axes) -> Figure:
    """The figure that axes are on."""
    assert isinstance(axes.figure, Figure)
    return axes.figure


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of the values that are known (not nan), and its standard error; nan if unknown."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return float(known.mean()) if len(known) else math.nan, math.nan
    return float(known.mean()), float(known.std(ddof=1) / math.sqrt(len(known)))
