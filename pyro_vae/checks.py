"""Checks of arguments that many tools have in common, each with its one wording."""

import math
from typing import Any

__all__ = ["check_count", "check_max_memory", "check_positive"]


def check_count(
    name: str, value: Any, least: int = 1, *, optional: bool = False, because: str = ""
) -> None:
    """Refuses what is no integer from `least` on.

    Args:
        name: Of the argument.
        value: As the caller gave it.
        least: The smallest that will do.
        optional: Whether None will do as well.
        because: What the sentence ends with.

    Raises:
        ValueError: If it will not do.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        allowed = f"an integer from {least}" + " or None" * optional
        raise ValueError(f"{name} must be {allowed}, not {value!r}{because}")


def check_positive(name: str, value: float) -> None:
    """Refuses what is no positive and finite number."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, not {value!r}")


def check_max_memory(value: float) -> None:
    """Refuses what is no size of memory."""
    if not value > 0:
        raise ValueError(f"max_memory is in GiB and must be positive, not {value!r}")
