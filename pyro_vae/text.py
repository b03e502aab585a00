"""Rows of cells as aligned text; importing it takes no time."""

from collections.abc import Mapping, Sequence

__all__ = ["rows_text"]


def rows_text(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as an aligned table, keys first."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
