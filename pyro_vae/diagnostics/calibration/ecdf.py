r"""The ECDF of ranks: its simultaneous band and its exact test of uniformity.

Ranks are of a truth among L draws, in 0, ..., L; each column of `ranks` (dim) has a test of its
own. Arrays are NumPy's, in float64.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from scipy import stats

__all__ = ["EcdfBand", "Ranks", "check_ranks", "ecdf", "ecdf_band", "ecdf_p_value"]

Ranks = Int64[np.ndarray, "simulations dim"]

_TINY = 1e-300
_NO_DIGITS = 1e-10
_TIE = 1e-9  # relative; a binomial probability is known to more digits than that


class EcdfBand(NamedTuple):
    """Limits that the ECDF of uniform ranks keeps to at all ranks at once.

    Attributes:
        gamma: Level of the pointwise tests: each limit is crossed with probability at most gamma/2.
        lower: Of the share of ranks <= r, for r = 0, ..., L.
        upper: The same; a share equal to a limit is inside.
        coverage: The exact probability of staying inside, at least the level asked for.
    """

    gamma: float
    lower: Float64[np.ndarray, " ranks"]
    upper: Float64[np.ndarray, " ranks"]
    coverage: float


def ecdf(ranks: Ranks, num_draws: int) -> Float64[np.ndarray, "dim ranks"]:
    """The share of ranks <= r, for r = 0, ..., L; for uniform ranks (r + 1) / (L + 1)."""
    check_ranks(ranks, num_draws)
    counts = np.stack([np.bincount(column, minlength=num_draws + 1) for column in ranks.T])
    return counts.cumsum(1) / len(ranks)


@lru_cache(maxsize=64)
def ecdf_band(num_simulations: int, num_draws: int, level: float = 0.95) -> EcdfBand:
    r"""Simultaneous limits for the ECDF of uniform ranks.

    At rank r the number of ranks <= r is binomial with probability (r + 1) / (L + 1). The band
    takes the same tail probability :math:`\gamma/2` of it everywhere, with the largest
    :math:`\gamma` at which all numbers are inside with probability at least `level`.

    Args:
        num_simulations: N, the number of ranks.
        num_draws: L; ranks run over 0, ..., L.
        level: Probability of staying inside at every rank.

    Raises:
        ValueError: If an argument is out of its range.

    Note: exact for discrete ranks. Given their sum, Poisson numbers of each rank are multinomial;
        so the probability follows from a Poisson walk inside the band, by convolution.

    References:
        Säilynoja, Bürkner & Vehtari (2022), Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison.
    """
    _check_counts(num_simulations, num_draws)
    if not 0 < level < 1:
        raise ValueError(f"level is a probability between 0 and 1, not {level!r}")
    # Each of L ranks is outside with probability at most gamma, and gamma never exceeds 2.
    low, high = (1 - level) / num_draws, 2.0
    for _ in range(50):
        middle = (low * high) ** 0.5
        inside = _probability_inside(num_simulations, num_draws, middle) >= level
        low, high = (middle, high) if inside else (low, middle)
    lower, upper = _limits(num_simulations, num_draws, low)
    ends = [num_simulations]
    return EcdfBand(
        low,
        np.concatenate([lower, ends]) / num_simulations,
        np.concatenate([upper, ends]) / num_simulations,
        _probability_inside(num_simulations, num_draws, low),
    )


def ecdf_p_value(ranks: Ranks, num_draws: int) -> Float64[np.ndarray, " dim"]:
    r"""Exact p-values of uniformity, by the statistic of `ecdf_band`.

    The statistic is the smallest pointwise tail probability, and its p-value is at most u with
    probability at most u; ranks leave the band of level 1 - u where it is at most u. Where it is
    tiny (about 1e-10 and below), an upper bound of it is given, the sum over the pointwise tests.

    Args:
        ranks: In 0, ..., L.
        num_draws: L.

    Raises:
        ValueError: If a rank is out of its range.
    """
    num_simulations = len(ranks)
    _check_counts(num_simulations, num_draws)
    counts = np.rint(ecdf(ranks, num_draws)[:, :-1] * num_simulations)
    z = _points(num_draws)
    below = stats.binom.cdf(counts, num_simulations, z)
    above = stats.binom.cdf(num_simulations - counts, num_simulations, z[::-1])
    gammas = np.maximum(2 * np.minimum(below, above).min(1), _TINY)
    p = [_p_value(num_simulations, num_draws, gamma) for gamma in gammas.tolist()]
    return np.array(p)


def _p_value(num_simulations: int, num_draws: int, gamma: float) -> float:
    if gamma < _NO_DIGITS:  # of 1 - (nearly 1): the sum of the pointwise probabilities is above it
        return gamma * num_draws
    return 1 - _probability_inside(num_simulations, num_draws, gamma)


def _points(num_draws: int) -> Float64[np.ndarray, " draws"]:
    return np.arange(1, num_draws + 1) / (num_draws + 1)


def _limits(num_simulations: int, num_draws: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Counts of ranks <= r, r = 0, ..., L - 1, whose tails both exceed gamma/2."""
    lower = stats.binom.ppf(gamma / 2 * (1 + _TIE), num_simulations, _points(num_draws))
    lower = np.where(np.isnan(lower), num_simulations + 1, lower).astype(int)
    return lower, num_simulations - lower[::-1]


@lru_cache(maxsize=4096)
def _probability_inside(num_simulations: int, num_draws: int, gamma: float) -> float:
    lower, upper = _limits(num_simulations, num_draws, gamma)
    if (lower > upper).any():
        return 0.0
    rate = num_simulations / (num_draws + 1)
    most = int(min(num_simulations, rate + 12 * rate**0.5 + 40))
    step = stats.poisson.pmf(np.arange(most + 1), rate)
    walk, start = np.ones(1), 0  # mass of the counts start, start + 1, ...
    for low, high in zip(lower.tolist(), upper.tolist(), strict=True):
        low = max(low, start)
        walk = np.convolve(walk, step)[low - start : high - start + 1]
        start = low
    rest = num_simulations - start - np.arange(len(walk))
    end = (walk * stats.poisson.pmf(rest, rate)).sum()
    return float(min(end / stats.poisson.pmf(num_simulations, num_simulations), 1.0))


def _check_counts(num_simulations: int, num_draws: int) -> None:
    for name, value in (("num_simulations", num_simulations), ("num_draws", num_draws)):
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"{name} must be an integer from 1, not {value!r}")


def check_ranks(ranks: Ranks, num_draws: int) -> None:
    """Refuses ranks that are not among 0, ..., L.

    Raises:
        ValueError: If there are none, or one is out of range.
    """
    _check_counts(len(ranks), num_draws)
    if ranks.min(initial=0) < 0 or ranks.max(initial=0) > num_draws:
        raise ValueError(
            f"ranks run from {ranks.min()} to {ranks.max()}, but among {num_draws} draws they are "
            f"from 0 to {num_draws}; say how many draws they are ranks among"
        )
