"""What a row of the registry is, and when its number is called wrong."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import beta, binom

from pyro_vae.results import Result

__all__ = [
    "CLAIMED",
    "SEEN",
    "Checked",
    "Row",
    "Study",
    "Z",
    "alarm",
    "clopper_pearson",
    "interval",
    "joined",
    "p_value",
    "watched",
]

Z = 1.959964
LEVEL = 0.05
CLAIMED = re.compile(
    r"^(se|p_value|pvalue|stderr|half_width|.+_(se|error|p_value|pvalue|stderr|half_width))$"
)
"""Names of numbers that claim how sure another number is."""

SEEN: set[tuple[str, str]] = set()
"""Function and name of every such number in the results that simulators looked at."""


class Checked(NamedTuple):
    """What came of the replications of one number, in one shape.

    Attributes:
        missed: Whether the truth lies outside of the interval, or p is at most 0.05; nan where
            there is no number.
        flagged: Whether the guard spoke.
    """

    missed: np.ndarray
    flagged: np.ndarray


@dataclass(frozen=True)
class Row:
    """One uncertainty that the package states.

    Attributes:
        quantity: The variable that states it; of one study, all differ.
        nominal: The share of intervals that are to hold; of p-values, that are to be above 0.05.
        most: The share of misses that counts as right: a delta method of a hundred numbers holds
            94 %, not 95. None in rows that show a breakdown.
        breaks: When it breaks down.
        guard: What then speaks.
        speaks: In rows that show a breakdown, in what share of replications it must, at least.
    """

    quantity: str
    nominal: float = 0.95
    most: float | None = 0.07
    breaks: str = ""
    guard: str = ""
    speaks: float = 0.0


@dataclass(frozen=True)
class Study:
    """A simulation that several rows share.

    Attributes:
        name: What is simulated.
        function: The public function, as results record it; several with commas.
        run: Replications and seed -> outcome by quantity.
        rows: Those that it fills.
        quick: Replications in the test; 0 where it is for the benchmark alone.
        longest: Replications in the benchmark, at most, where one call is one of them.
    """

    name: str
    function: str
    run: Callable[[int, int], dict[str, Checked]]
    rows: tuple[Row, ...]
    quick: int = 150
    longest: int = 1_000_000


def watched(result: Result) -> Result:
    """Notes which uncertainties a result holds."""
    function = str(result.provenance.get("function"))
    SEEN.update((function, str(name)) for name in result.data_vars if CLAIMED.search(str(name)))
    return result


def interval(value: Any, error: Any, truth: Any, flagged: Any = False) -> Checked:
    """Whether value -+ 1.96 errors misses the truth.

    Args:
        value: Any shape.
        error: Its standard error.
        truth: Known beforehand.
        flagged: Whether the guard spoke.
    """
    value, error = np.asarray(value, dtype=float), np.asarray(error, dtype=float)
    away = np.abs(value - truth)
    missed = np.where(np.isnan(away), np.nan, ~(away <= Z * error + 1e-9 * (1 + np.abs(value))))
    return Checked(missed.ravel(), np.broadcast_to(flagged, missed.shape).ravel())


def p_value(p: Any, flagged: Any = False) -> Checked:
    """Whether a right model is rejected at 5 %."""
    p = np.asarray(p, dtype=float)
    missed = np.where(np.isnan(p), np.nan, p <= LEVEL)
    return Checked(missed.ravel(), np.broadcast_to(flagged, missed.shape).ravel())


def joined(parts: list[dict[str, Checked]]) -> dict[str, Checked]:
    """Replications of several runs, put together."""
    return {
        name: Checked(*(np.concatenate([part[name][i] for part in parts]) for i in (0, 1)))
        for name in parts[0]
    }


def clopper_pearson(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """The exact binomial band of a share.

    References:
        Clopper & Pearson (1934), The use of confidence or fiducial limits.
    """
    tail = (1 - level) / 2
    low = beta.ppf(tail, count, total - count + 1) if count else 0.0
    high = beta.isf(tail, count + 1, total - count) if count < total else 1.0
    return float(low), float(high)


def alarm(row: Row, found: Checked, false_alarms: float) -> str | None:
    """What is wrong with a row, if that is sure; None if nothing is.

    A right row is called wrong with at most the probability `false_alarms`: by the binomial tail of
    its misses, or where it shows a breakdown, of the guard's silence.
    """
    known = ~np.isnan(found.missed)
    total = int(known.sum())
    if not total:
        return f"{row.quantity}: no replication gave a number"
    if row.most is None:
        silent = int((~found.flagged[known]).sum())
        if binom.sf(silent - 1, total, 1 - row.speaks) < false_alarms:
            return f"{row.quantity}: the guard was silent in {silent} of {total}"
        return None
    misses = int(found.missed[known].sum())
    if binom.sf(misses - 1, total, row.most) < false_alarms:
        return f"{row.quantity}: {misses} of {total} missed, {row.most:.0%} are allowed"
    return None
