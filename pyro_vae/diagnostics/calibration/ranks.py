r"""Uniformity of ranks: what simulation-based calibration is judged by, as functions of arrays.

A rank counts how many of L draws lie below the truth. Where draws and truth have one distribution
it is uniform on 0, ..., L, exactly and for every L. Arrays are NumPy's, in float64; the columns of
`ranks` (dim) are judged one by one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped
from scipy import stats

from pyro_vae.diagnostics.calibration.ecdf import Ranks, check_ranks

__all__ = [
    "RankShape",
    "Symmetry",
    "chi_square_p_value",
    "coverage",
    "mean_bias",
    "rank_shape",
    "sbc_ranks",
    "tarp",
    "vsbc_p_values",
]


class RankShape(NamedTuple):
    """How ranks depart from uniform, in standard errors; each is about N(0, 1) for uniform ranks.

    Attributes:
        slope: Of the mean rank: positive where the truth is above the draws.
        spread: Of the squared distance from the middle: positive for a U (draws too narrow),
            negative for a hump (draws too wide).
    """

    slope: Float64[np.ndarray, " dim"]
    spread: Float64[np.ndarray, " dim"]


class Symmetry(NamedTuple):
    """Whether p = Pr_q(z < truth) is symmetric about 1/2.

    Attributes:
        p_value: Of the hypothesis that it is.
        mean: The mean of p: above 1/2 the truth is often above the guide's draws. This is a bias
            where guide and posterior are symmetric, and may be none where one of them is skewed.
    """

    p_value: Float64[np.ndarray, " dim"]
    mean: Float64[np.ndarray, " dim"]


def sbc_ranks(
    truth: Shaped[np.ndarray, "simulations dim"],
    draws: Shaped[np.ndarray, "draws simulations dim"],
    *,
    tolerance: float = 0.0,
    seed: int | np.random.Generator = 0,
) -> Ranks:
    """Counts the draws below the truth; ties, as discrete latents have them, are broken at random.

    Args:
        truth: What the model drew.
        draws: L draws from the guide for each simulation.
        tolerance: Numbers that differ by no more than this times (1 + |truth|) are ties: for
            numbers that were computed in two ways.
        seed: Of the ties.

    Returns:
        Ranks in 0, ..., L.

    Raises:
        ValueError: If a number is nan, or there is no draw.

    References:
        Talts, Betancourt, Simpson, Vehtari & Gelman (2018), Validating Bayesian inference
        algorithms with simulation-based calibration.
    """
    if len(draws) < 1:
        raise ValueError("there are no draws to rank the truth among; draw at least one")
    missing = np.isnan(draws).any((0, 2)) | np.isnan(truth).any(1)
    if missing.any():
        raise ValueError(
            f"draws or truth are nan in {int(missing.sum())} of {len(truth)} simulations, so they "
            "have no ranks; look at what the model or the guide does there"
        )
    room = tolerance * (1 + np.where(np.isfinite(truth), np.abs(truth), 0.0))
    below = (draws < truth - room).sum(0)
    ties = (draws <= truth + room).sum(0) - below
    return (below + np.random.default_rng(seed).integers(0, ties + 1)).astype(np.int64)


def tarp(
    truth: Shaped[np.ndarray, "simulations dim"],
    draws: Shaped[np.ndarray, "draws simulations dim"],
    *,
    references: Float[np.ndarray, "simulations dim"] | None = None,
    scale: Float[np.ndarray, " dim"] | None = None,
    seed: int | np.random.Generator = 0,
) -> Int64[np.ndarray, "simulations 1"]:
    r"""Ranks of the truth's distance to a reference point among those of the draws (TARP).

    The share of simulations with rank <= r is the coverage of balls about the reference that hold
    r + 1 of L + 1 points: `rank_ecdf.ecdf` is the coverage curve and
    `rank_ecdf.ecdf_p_value` tests it. It sees faults
    of the joint distribution, such as a correlation that is left out, that no single latent shows.

    Args:
        truth: What the model drew.
        draws: L draws from the guide for each simulation.
        references: The points. They must not depend on the truth, given the data; they should
            depend on the data, or a guide that returns the prior passes. None takes the truth of
            the simulation before, a draw from the prior (which has no power against that guide).
        scale: Unit of length of each latent; None for the standard deviation of the truth.
        seed: Of the ties.

    Returns:
        Ranks in 0, ..., L, in one column.

    Raises:
        ValueError: As `sbc_ranks`.

    References:
        Lemos, Coogan, Hezaveh & Perreault-Levasseur (2023), Sampling-based accuracy testing of
        posterior estimators for general inference.
    """
    points = np.roll(truth, 1, axis=0) if references is None else references
    unit = truth.std(0) if scale is None else scale
    unit = np.where(unit > 0, unit, 1.0)
    both = np.concatenate([truth[None], draws]).astype(np.float64)
    distance = np.sqrt((((both - points) / unit) ** 2).sum(-1, keepdims=True))
    return sbc_ranks(distance[0], distance[1:], tolerance=1e-12, seed=seed)


def chi_square_p_value(
    ranks: Ranks, num_draws: int, bins: int | None = None
) -> Float64[np.ndarray, " dim"]:
    """Pearson's test of uniformity on bins of neighbouring ranks.

    Args:
        ranks: In 0, ..., L.
        num_draws: L.
        bins: At most L + 1; where it does not divide L + 1 the bins differ by one rank, and the
            expected counts with them. None for about 20 simulations in a bin, at most 50 bins.

    Raises:
        ValueError: If a rank or `bins` is out of its range.

    References:
        Talts et al. (2018) (bins of ranks).
    """
    check_ranks(ranks, num_draws)
    most = num_draws + 1
    chosen = max(2, min(most, len(ranks) // 20, 50)) if bins is None else bins
    if not 2 <= chosen <= most:
        raise ValueError(f"bins must be from 2 to {most}, the number of ranks, not {bins!r}")
    edges = np.rint(np.linspace(0, most, chosen + 1)).astype(int)
    shares = np.diff(edges) / most
    counts = np.stack([np.histogram(column, edges)[0] for column in ranks.T])
    return stats.chisquare(counts, shares * len(ranks), axis=1).pvalue


def coverage(
    ranks: Ranks, num_draws: int, levels: Sequence[float]
) -> tuple[Float64[np.ndarray, "levels dim"], Float64[np.ndarray, "levels dim"]]:
    r"""How often central intervals of the draws hold the truth, and its standard error.

    A rank r stands for the cell [r, r + 1] of [0, L + 1], and counts with the part of it that lies
    inside the interval. So any level is attainable: uniform ranks give exactly `level` in
    expectation.

    Args:
        ranks: In 0, ..., L.
        num_draws: L.
        levels: Of the intervals, between 0 and 1.

    Returns:
        Coverage c and its standard error. With f(r) the covered part of the cell of rank r,

        .. math:: \mathrm{se}^2 = \frac1N \max\Bigl(\frac{1}{N-1} \sum_n (f(r_n) - c)^2, \;
                  \frac{1}{L+1} \sum_{r=0}^{L} f(r)^2 - \text{level}^2\Bigr)

        The second is the variance under uniform ranks, in closed form, so that a run without a miss
        does not look certain. That of hits and misses, c (1 - c), is too large: cells covered in
        part vary less.

    Raises:
        ValueError: If a rank or a level is out of its range.
    """
    check_ranks(ranks, num_draws)
    wanted = np.asarray(levels, dtype=np.float64)
    if wanted.ndim != 1 or not ((wanted > 0) & (wanted < 1)).all():
        raise ValueError(f"levels are probabilities between 0 and 1, not {tuple(levels)!r}")
    size = num_draws + 1
    tail = (1 - wanted[:, None]) / 2 * size
    cells = np.arange(size)
    covered = np.clip(np.minimum(cells + 1, size - tail) - np.maximum(cells, tail), 0, 1)
    inside = covered[:, ranks]
    seen = inside.var(1, ddof=1) if len(ranks) > 1 else np.zeros(inside.shape[::2])
    variance = np.maximum(seen, covered.var(1)[:, None])
    return inside.mean(1), np.sqrt(variance / len(ranks))


def rank_shape(ranks: Ranks, num_draws: int) -> RankShape:
    """In which direction ranks depart from uniform, in exact standard errors."""
    check_ranks(ranks, num_draws)
    middle = np.arange(num_draws + 1) - num_draws / 2
    distance = ranks - num_draws / 2
    root = len(ranks) ** 0.5
    slope = distance.mean(0) * root / middle.std()
    squares = middle**2
    spread = ((distance**2).mean(0) - squares.mean()) * root / max(squares.std(), 1e-300)
    return RankShape(slope, spread if num_draws > 1 else np.zeros_like(slope))


def mean_bias(
    truth: Shaped[np.ndarray, "simulations dim"],
    draws: Shaped[np.ndarray, "draws simulations dim"],
) -> Float64[np.ndarray, "simulations dim"]:
    """The mean of the draws less the truth: in expectation the bias of the guide's mean.

    No symmetry is assumed, and the draws' own noise is part of the spread over simulations.
    """
    return draws.mean(0, dtype=np.float64) - truth


def vsbc_p_values(ranks: Ranks, num_draws: int, *, seed: int | np.random.Generator = 0) -> Symmetry:
    r"""Tests whether p = Pr_q(z < truth) is symmetric about 1/2 (VSBC).

    It is where guide and posterior are symmetric about one point. So if it is not, q is biased, or
    one of the two is skewed and the other is not, or in another way: a normal guide with the mean
    and the standard deviation of an exponential posterior is rejected. `mean_bias` tells.

    The statistic is the Kolmogorov-Smirnov distance between p and 1 - p. As these are one sample
    seen twice, the tables of the two-sample test do not hold (they reject too often). Given
    |p - 1/2|, the signs are independent and fair under symmetry, so the distance is the
    largest excursion of a simple random walk, which has a closed form.

    Args:
        ranks: In 0, ..., L; p is (rank + a uniform number) / (L + 1).
        num_draws: L.
        seed: Of the uniform numbers.

    Returns:
        p-value and the mean of p.

    References:
        Yao, Vehtari, Simpson & Gelman (2018), Yes, but did it work? Evaluating variational
        inference, proposition 2; Butler (1969), A test for symmetry using the sample distribution
        function (the law of the statistic).
    """
    check_ranks(ranks, num_draws)
    p = (ranks + np.random.default_rng(seed).random(ranks.shape)) / (num_draws + 1)
    order = np.abs(p - 0.5).argsort(0)[::-1]
    signs = np.where(np.take_along_axis(p, order, 0) > 0.5, 1, -1)
    reach = np.abs(signs.cumsum(0)).max(0)
    values = [_excursion_probability(len(ranks), most) for most in reach.tolist()]
    return Symmetry(np.array(values), p.mean(0))


def _excursion_probability(steps: int, reach: int) -> float:
    """Probability that a fair walk of so many steps is ever `reach` from its start (reflection)."""
    images = np.arange(-(steps // reach) - 2, steps // reach + 3)
    # The walk ends at 2 B - steps, B binomial, strictly between (2k - 1) reach and (2k + 1) reach.
    first = np.floor(((2 * images - 1) * reach + steps) / 2) + 1
    last = np.ceil(((2 * images + 1) * reach + steps) / 2) - 1
    law = stats.binom(steps, 0.5)
    stays = ((-1.0) ** np.abs(images) * (law.cdf(last) - law.cdf(first - 1))).sum()
    return float(np.clip(1 - stays, 0.0, 1.0))
