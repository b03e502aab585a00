"""Which cases of a family run in `make test`; `make test-long` runs the others."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

__all__ = ["every", "pairs"]


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """One case in so many, the first among them; the others are long."""
    return [
        case if number % step == 0 else pytest.param(case, marks=pytest.mark.long)
        for number, case in enumerate(cases)
    ]


def pairs(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Each of the first with each of the second; those off a diagonal, in which all are, long."""
    period = min(len(first), len(second))
    return [
        pytest.param(one, other, marks=() if (i - j) % period == 0 else pytest.mark.long)
        for i, one in enumerate(first)
        for j, other in enumerate(second)
    ]
