"""Labelled numbers as a table, in text and in HTML."""

import html
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from pyro_vae.results.digits import error_text, number_text
from pyro_vae.results.labelled import (
    check_has_mean,
    label_at,
    labelled_names,
    nan_text,
    num_data,
    num_particles,
    num_unreliable,
    standard_error,
)

__all__ = [
    "WIDTH",
    "hidden_rows",
    "rows_html",
    "summary_html",
    "table_html",
    "table_rows",
    "table_text",
]

_HEADER = ("quantity", "value", "std. error", "unit", "kind", "particles", "data")

_MAX_STEPS = 12  # rows that a variable along one further dimension, as a history, takes in a table
_MAX_ROWS = 60  # the same along several
_MAX_BRIEF = 40  # rows of a whole table that is shown when a result's name is typed
_END_ROWS = 2  # where there are more, so many from either end are shown
WIDTH = 100
"""Columns that a table takes at most."""


def table_rows(dataset: xr.Dataset, *, brief: bool = False) -> Iterator[tuple[str, ...]]:
    """The cells of the table, row by row.

    Args:
        dataset: With labelled variables.
        brief: Whether variables over further dimensions show their ends alone, where all of them
            would take more than 40 rows.
    """
    short = brief and bool(hidden_rows(dataset))
    end_rows = 1 if short else _END_ROWS
    for name in labelled_names(dataset):
        needed = (name, f"{name}_se", f"{name}_bias", dataset[name].attrs.get("reliable_by"))
        part = dataset[[n for n in needed if n in dataset.data_vars]]
        others = [d for d in dataset[name].dims if d != "datum"]
        places = list(itertools.product(*(range(dataset.sizes[d]) for d in others)))
        limit = 2 * end_rows + 1 if short else _MAX_STEPS if len(others) == 1 else _MAX_ROWS
        left_out = len(places) - 2 * end_rows if len(places) > limit else 0
        for number, place in enumerate(places):
            if left_out and end_rows <= number < len(places) - end_rows:
                if number == end_rows:
                    yield (f"  ... {left_out} more", "", "", "", "", "", "")
                continue
            chosen = part.isel(dict(zip(others, place, strict=True)))
            where = ", ".join(_place(chosen, d, i) for d, i in zip(others, place, strict=True))
            yield _row(f"{name} ({where})" if where else name, name, chosen)


def rows_html(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as an HTML table that scrolls where it is too wide."""
    return _html(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""


def _html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Without colours of its own: a notebook's theme, light or dark, gives them."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        '<div style="overflow-x: auto"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def hidden_rows(dataset: xr.Dataset) -> int:
    """Rows of a table that is too long to be shown in full when a name is typed; 0 if it is not."""
    rows = sum(
        math.prod(size for dim, size in dataset[name].sizes.items() if dim != "datum")
        for name in labelled_names(dataset)
    )
    return rows if rows > _MAX_BRIEF else 0


def table_text(dataset: xr.Dataset, *, brief: bool = False) -> str:
    """The table as aligned text; see `Result.table`."""
    rows = [_HEADER, *table_rows(dataset, brief=brief)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    widths[0] = max(min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)), 6)
    lines = [_aligned(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def table_html(dataset: xr.Dataset, *, brief: bool = False) -> str:
    """The table as an HTML element."""
    return _html(_HEADER, list(table_rows(dataset, brief=brief)))


def summary_html(text: str, dataset: xr.Dataset) -> str:
    """A sentence above the table, as HTML."""
    return f"<p>{html.escape(text)}</p>{table_html(dataset, brief=True)}"


def _row(title: str, name: str, chosen: xr.Dataset) -> tuple[str, ...]:
    attrs = chosen[name].attrs
    unit = {"bits per dimension": "bits/dim", "nats squared": "nats^2", "none": "-"}.get(
        attrs["unit"], attrs["unit"]
    )
    if attrs["unit"] in ("nats", "nats squared") and attrs["reduction"] != "none":
        unit += "/datum" if attrs["reduction"] == "per datum" else " total"
    bound = str(label_at(chosen[name], "bound"))
    kind = {"lower": "lower bound", "upper": "upper bound", "none": "-"}.get(bound, bound)
    values = np.atleast_1d(chosen[name].values.astype(np.float64))
    data = num_data(chosen, chosen[name])
    particles = num_particles(chosen[name])
    try:
        check_has_mean(name, values)
    except ValueError:
        bad = int(np.isnan(values).sum())
        value, error = (
            (nan_text(bad, values.size) if bad else "nan (inf - inf)")
            if values.size
            else "no data",
            None,
        )
    else:
        with np.errstate(over="ignore"):
            mean = float(values.mean())
        error = standard_error(chosen, name, mean)
        value = number_text(mean, error)
        infinite = int(np.isinf(values).sum())
        if infinite and values.size > 1:
            value += f" ({infinite} of {values.size} data)"
    return (
        title,
        value,
        "-" if error is None else error_text(error) + "?" * bool(num_unreliable(chosen, name)),
        unit,
        kind,
        "-" if particles is None else str(particles),
        " ".join(str(x) for x in (data, attrs.get("measure")) if x is not None) or "-",
    )


def _place(chosen: xr.Dataset, dim: Hashable, index: int) -> str:
    if dim not in chosen.coords:
        return f"{dim} {index}"
    value = chosen.coords[dim].values[()]
    return f"{value:.6g}" if isinstance(value, np.floating) else str(value)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Numbers to the right, words to the left."""
    cells = [_shortened(row[0], widths[0]).ljust(widths[0])]
    for i, (cell, width) in enumerate(zip(row[1:], widths[1:], strict=True), start=1):
        cells.append(
            cell.rjust(width)
            if _HEADER[i] in ("value", "std. error", "particles")
            else cell.ljust(width)
        )
    return "  ".join(cells).rstrip()


def _shortened(text: str, width: int) -> str:
    """Leaves out the middle, since names differ at either end."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"
