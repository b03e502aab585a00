"""What an analysis tells, section by section: as text, as figures and as one HTML page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pyro_vae.app.pages import Heading, Page, Paragraph, Picture, Table, Verbatim, figure_png
from pyro_vae.results import atomic_path
from pyro_vae.results import rows_text as as_text

__all__ = ["COMMAND_NOTE", "Section", "as_text", "mean_and_error", "save_figures", "save_sections"]


COMMAND_NOTE = (
    "These settings made this page. The command alone takes its defaults, and --help lists the "
    "options that change them."
)


@dataclass(frozen=True)
class Section:
    """A part of the page; `name` is that of the figure's file."""

    name: str
    title: str
    text: str
    tables: tuple[list[dict[str, str]], ...] = ()
    figure: Figure | None = None
    notes: tuple[str, ...] = ()


def save_sections(
    folder: Path, title: str, sections: Sequence[Section], made: str, command: str
) -> Path:
    """Writes the figures and one page that needs no network; returns the page's path."""
    page = Page(title)
    for section in sections:
        page.add(Heading(section.title), Paragraph(section.text))
        if section.figure is not None:
            page.add(Picture(section.figure))
            save_figures(folder, {section.name: section.figure})
        page.add(*(Table(list(t[0]), [list(row.values()) for row in t]) for t in section.tables))
        page.add(*(Paragraph(note) for note in section.notes))
    page.add(
        Heading("How it was made"), Paragraph(made), Paragraph(COMMAND_NOTE), Verbatim(command)
    )
    return page.save(folder / "report.html")


def save_figures(folder: Path, figures: Mapping[str, Figure]) -> None:
    """Writes each figure as a PNG under its name."""
    for name, figure in figures.items():
        with atomic_path(folder / f"{name}.png") as temporary:
            temporary.write_bytes(figure_png(figure))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of the values that are known (not nan), and its standard error; nan if unknown."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return float(known.mean()) if len(known) else math.nan, math.nan
    return float(known.mean()), float(known.std(ddof=1) / math.sqrt(len(known)))
