"""How numbers and their standard errors are written, and how little of tensors is."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

__all__ = ["ShortRepr", "data_text", "error_text", "number_text", "shapes_text"]

_MOST_LETTERS = 60  # of a value that is no tensor


def number_text(value: float, error: float | None = None) -> str:
    """Formats a value to the second digit of its standard error, or to six digits without one."""
    if not math.isfinite(value):
        return str(value)
    if error is None or not math.isfinite(error) or error <= 0.0:
        return f"{value:.6g}"
    decimals = 1 - math.floor(math.log10(error))
    if decimals > 10 or abs(value) >= 1e9:
        return f"{value:.6g}"
    return f"{value:.{max(decimals, 0)}f}"


def error_text(error: float) -> str:
    """Formats a standard error to two digits."""
    if not math.isfinite(error) or not 1e-9 < error < 1e9:
        return f"{error:.2g}"
    return f"{error:.{max(1 - math.floor(math.log10(error)), 0)}f}"


def data_text(count: int, total: int) -> str:
    """Some of the data, as in ``for 3 of 8 data``; of a single datum, ``the one datum``."""
    return "the one datum" if count == total == 1 else f"{count} of {total} data"


class ShortRepr:
    """A dataclass (with ``repr=False``) that prints the shapes of its tensors, not their values."""

    __slots__ = ()

    def __repr__(self) -> str:
        shown = [f for f in fields(self) if f.repr]  # type: ignore[arg-type]
        values = ", ".join(f"{f.name}={_short(getattr(self, f.name))}" for f in shown)
        return f"{type(self).__name__}({values})"


def shapes_text(values: Mapping[str, Any]) -> str:
    """Names with the shapes of their tensors: ``z [200, 5, 2], w [200, 5]``."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items()) or "none"


def _short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_short(one)}" for name, one in value.items()) + "}"
    text = repr(value)
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"
