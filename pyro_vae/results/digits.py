"""How numbers and their standard errors are written."""

import math

__all__ = ["error_text", "number_text"]


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
