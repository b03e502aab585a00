"""Ranks and their tests of uniformity, against enumeration of all outcomes and against faults."""

import itertools

import numpy as np
import pytest
from scipy import stats

from pyro_vae.diagnostics.calibration import coverage
from pyro_vae.diagnostics.calibration.ecdf import ecdf, ecdf_band, ecdf_p_value
from pyro_vae.diagnostics.calibration.ranks import (
    chi_square_p_value,
    rank_shape,
    sbc_ranks,
    tarp,
    vsbc_p_values,
)

N, L, D = 250, 49, 3
STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def uniform_ranks(rng, columns, num_draws=L, num_simulations=N):
    return rng.integers(0, num_draws + 1, (num_simulations, columns))


def rank_under(rng, shift=0.0, scale=1.0):
    """Ranks of standard normal truths among draws that are shifted and scaled."""
    truth, draws = rng.standard_normal((N, D)), rng.standard_normal((L, N, D))
    return sbc_ranks(truth, shift + scale * draws)


def rejections(p_values, level=0.05):
    return (p_values <= level).mean()


# --- ranks ----------------------------------------------------------------------------------------


def test_a_rank_counts_the_draws_below_the_truth():
    truth = np.array([[0.5, -9.0], [2.0, 9.0]])
    draws = np.arange(4.0)[:, None, None] * np.ones((4, 2, 2))
    draws[2] += 0.5  # 0, 1, 2.5, 3
    assert sbc_ranks(truth[:1], draws[:, :1]).tolist() == [[1, 0]]
    assert sbc_ranks(truth[1:] + 0.1, draws[:, 1:]).tolist() == [[2, 4]]


def test_ties_are_broken_evenly_and_by_the_seed(rng):
    truth, draws = np.ones((3000, 1)), np.ones((4, 3000, 1))
    draws[0] = 0.0
    ranks = sbc_ranks(truth, draws, seed=3)
    counts = np.bincount(ranks[:, 0], minlength=5)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-5  # failure rate 1e-5
    assert np.array_equal(ranks, sbc_ranks(truth, draws, seed=3))
    assert not np.array_equal(ranks, sbc_ranks(truth, draws, seed=4))


def test_a_tolerance_makes_ties_of_what_differs_by_rounding():
    truth, draws = np.full((3000, 1), 100.0), np.full((3, 3000, 1), 100.0 + 1e-10)
    assert set(sbc_ranks(truth, draws).ravel()) == {0}
    assert set(sbc_ranks(truth, draws, tolerance=1e-11).ravel()) == {0, 1, 2, 3}
    infinite = np.full((5, 1), -np.inf)
    assert not sbc_ranks(infinite, np.zeros((3, 5, 1)), tolerance=1e-11).any()


def test_nan_and_no_draws_are_refused():
    with pytest.raises(ValueError, match="nan in 1 of 2 simulations"):
        sbc_ranks(np.array([[1.0], [np.nan]]), np.zeros((3, 2, 1)))
    with pytest.raises(ValueError, match="no draws"):
        sbc_ranks(np.ones((2, 1)), np.zeros((0, 2, 1)))


# --- the ECDF test --------------------------------------------------------------------------------


def smallest_tails(ranks, num_draws):
    """The statistic of the band, twice the least binomial tail, from its definition."""
    tails = []
    for r in range(num_draws):
        law = stats.binom(len(ranks), (r + 1) / (num_draws + 1))
        count = (ranks <= r).sum(0)
        tails += [law.cdf(count), law.sf(count - 1)]
    return 2 * np.min(tails, axis=0)


@pytest.mark.parametrize(("num_simulations", "num_draws"), [(5, 3), (4, 4), (3, 1), (1, 5)])
def test_p_value_and_band_equal_enumeration_of_all_outcomes(num_simulations, num_draws):
    outcomes = list(itertools.product(range(num_draws + 1), repeat=num_simulations))
    ranks = np.array(outcomes).T
    tails = smallest_tails(ranks, num_draws)
    exact = np.array([(tails <= tail * (1 + 1e-9)).mean() for tail in tails])
    assert ecdf_p_value(ranks, num_draws) == pytest.approx(exact, abs=1e-12)
    for level in (0.5, 0.8, 0.95):
        band = ecdf_band(num_simulations, num_draws, level)
        shares = ecdf(ranks, num_draws)
        inside = ((shares >= band.lower - 1e-9) & (shares <= band.upper + 1e-9)).all(1)
        assert inside.mean() == pytest.approx(band.coverage, abs=1e-12)
        assert band.coverage >= level
        # The largest gamma: the narrower band that leaves out the next outcomes covers too little.
        narrower = tails[inside].min()
        assert (tails > narrower * (1 + 1e-9)).mean() < level


def test_the_band_covers_uniform_ranks_as_often_as_it_says(rng):
    ranks = uniform_ranks(rng, 2000)
    band, shares = ecdf_band(N, L, 0.9), ecdf(ranks, L)
    inside = ((shares >= band.lower) & (shares <= band.upper)).all(1)
    error = (0.9 * 0.1 / 2000) ** 0.5
    assert abs(inside.mean() - band.coverage) < STANDARD_ERRORS * error
    assert 0.9 <= band.coverage < 0.905
    # A test at this level and the band are one.
    assert np.array_equal(inside, ecdf_p_value(ranks, L) > 1 - band.coverage + 1e-9)
    # Pointwise limits of the same level are left far more often.
    z = np.arange(1, L + 1) / (L + 1)
    counts = shares[:, :-1] * N
    pointwise = (counts >= stats.binom.ppf(0.05, N, z)) & (counts <= stats.binom.ppf(0.95, N, z))
    assert pointwise.all(1).mean() < 0.6


def test_p_values_of_uniform_ranks_reject_at_the_stated_level(rng):
    ranks = uniform_ranks(rng, 800)
    error = (0.05 * 0.95 / 800) ** 0.5
    symmetry = vsbc_p_values(ranks, L).p_value
    for p_values in (ecdf_p_value(ranks, L), chi_square_p_value(ranks, L), symmetry):
        assert rejections(p_values) < 0.05 + STANDARD_ERRORS * error
        assert rejections(p_values) > 0.05 - STANDARD_ERRORS * error - 0.01  # discrete: a bit below


@pytest.mark.parametrize(
    ("fault", "slope", "spread"),
    [
        ({"shift": 0.5}, -1, None),
        ({"shift": -0.5}, 1, None),
        ({"scale": 0.5}, None, 1),
        ({"scale": 2.0}, None, -1),
    ],
)
def test_wrong_draws_are_rejected_and_the_direction_is_said(rng, fault, slope, spread):
    # Of 180 such columns all were rejected, the weakest with p = 6e-6 and 2e-4.
    ranks = rank_under(rng, **fault)
    assert (ecdf_p_value(ranks, L) < 1e-3).all()
    assert (chi_square_p_value(ranks, L) < 1e-2).all()
    shape, symmetry = rank_shape(ranks, L), vsbc_p_values(ranks, L)
    if slope is not None:
        assert (np.sign(shape.slope) == slope).all()
        assert (symmetry.p_value < 1e-3).all()
        assert (np.sign(symmetry.mean - 0.5) == slope).all()
    else:
        assert (np.sign(shape.spread) == spread).all()
        assert (abs(shape.spread) > 5).all()
        assert (symmetry.p_value > 1e-5).all()  # no bias; failure rate 1e-5 a column


def test_tiny_p_values_keep_their_size():
    assert 0 < ecdf_p_value(np.zeros((500, 1), dtype=np.int64), L)[0] < 1e-100


def test_rank_shape_is_in_exact_standard_errors(rng):
    shape = rank_shape(uniform_ranks(rng, 4000), L)
    for z in shape:
        assert abs(z.mean()) < STANDARD_ERRORS / 4000**0.5
        assert abs(z.var() - 1) < STANDARD_ERRORS * (2 / 4000) ** 0.5


# --- chi-square, coverage, symmetry ---------------------------------------------------------------


def test_chi_square_against_hand_and_with_unequal_bins(rng):
    ranks = np.repeat(np.arange(10), [4, 6, 5, 5, 5, 5, 5, 5, 7, 3])[:, None]
    by_hand = ((10 - 10) ** 2 * 5) / 10  # five bins of two ranks hold 10 each
    assert chi_square_p_value(ranks, 9, bins=5)[0] == pytest.approx(stats.chi2.sf(by_hand, 4))
    # Ten ranks in four bins: 2, 3, 3 and 2 or the like, and 50 simulations.
    edges = np.rint(np.linspace(0, 10, 5)).astype(int)
    counts = [((ranks >= a) & (ranks < b)).sum() for a, b in itertools.pairwise(edges)]
    expected = np.diff(edges) * 5.0
    value = ((counts - expected) ** 2 / expected).sum()
    assert chi_square_p_value(ranks, 9, bins=4)[0] == pytest.approx(stats.chi2.sf(value, 3))


@pytest.mark.parametrize("num_draws", [9, 10, 37, 99])
def test_coverage_of_uniform_ranks_is_the_level_for_any_number_of_draws(num_draws):
    every = np.arange(num_draws + 1)[:, None]
    levels = (0.03, 0.5, 0.9, 0.97, 0.999)
    found, error = coverage(every, num_draws, levels)
    assert found[:, 0] == pytest.approx(levels, abs=1e-12)
    assert (error > 0).all()


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(("simulations", "num_draws"), [(50, 9), (50, 99), (400, 9)])
def test_the_standard_error_of_coverage_is_the_spread_over_replications(
    rng, simulations, num_draws, scale
):
    """Cells that are covered in part vary less than hits and misses do."""
    levels, replications = np.array([0.5, 0.8, 0.9]), 2000
    below = stats.norm.cdf(rng.standard_normal((simulations, replications)) / scale)
    found, error = coverage(rng.binomial(num_draws, below), num_draws, levels.tolist())
    spread = found.std(1)
    ratio = (error**2).mean(1) ** 0.5 / spread
    # 2000 replications know a spread to 1.6 %. The larger of two variances is a little too large,
    # more so for wrong draws whose coverage varies less than that of right ones.
    assert (np.log(ratio) > -STANDARD_ERRORS * 0.016).all(), ratio
    assert (np.log(ratio) < (0.06 if scale == 1 else 0.14) + STANDARD_ERRORS * 0.016).all(), ratio
    if (num_draws, scale) == (9, 1.0):
        assert (levels * (1 - levels) / simulations)[2] ** 0.5 / spread[2] > 1.35


def test_coverage_of_wrong_draws_is_the_normal_one(rng):
    # Draws of half the width: the interval of level c covers 2 Phi(z_c / 2) - 1.
    ranks = rank_under(rng, scale=0.5)
    found, error = coverage(ranks, L, (0.5, 0.9))
    exact = 2 * stats.norm.cdf(stats.norm.ppf([0.75, 0.95]) / 2) - 1
    # Fifty draws know their quantiles to about 0.02 of coverage.
    assert (abs(found - exact[:, None]) < STANDARD_ERRORS * error + 0.02).all()
    assert (abs(found - [[0.5], [0.9]]) > 3 * error).all()


def test_the_law_of_the_symmetry_test_equals_enumeration():
    # All 2^9 signs of nine distances from 1/2: ranks below and above the middle of 0, ..., 1999.
    steps, num_draws = 9, 1999
    signs = np.array(list(itertools.product([-1, 1], repeat=steps)))
    distance = 100 * np.arange(steps, 0, -1)  # far apart, so the uniform numbers do not matter
    ranks = np.where(signs > 0, 1000 + distance, 999 - distance)
    reach = abs(signs.cumsum(1)).max(1)
    exact = [(reach >= r).mean() for r in reach]
    assert vsbc_p_values(ranks.T, num_draws).p_value == pytest.approx(exact, abs=1e-12)


def test_the_two_sample_table_would_reject_too_often(rng):
    # Why the test has its own law: the same statistic by the table of two independent samples
    # rejected 3.4 % of 2000 at level 0.01.
    p = rng.random((N, 600))
    table = [stats.ks_2samp(column, 1 - column).pvalue for column in p.T]
    assert rejections(np.array(table), 0.01) > 0.01 + 3 * (0.01 * 0.99 / 600) ** 0.5


# --- TARP -----------------------------------------------------------------------------------------


def correlated(rng, shape, correlation):
    u, v = rng.standard_normal((2, *shape))
    return np.stack([u, correlation * u + (1 - correlation**2) ** 0.5 * v], -1)


def tarp_p_value(rng, correlation):
    """Of draws with this correlation where the posterior has 0.9, in coordinates that whiten it."""
    data = rng.standard_normal((N, 2))
    axes = np.linalg.inv(np.linalg.cholesky([[1.0, 0.9], [0.9, 1.0]])).T
    truth = data + correlated(rng, (N,), 0.9)
    draws = data + correlated(rng, (L, N), correlation)
    assert (ecdf_p_value(sbc_ranks(truth, draws), L) > 1e-5).all()  # failure rate 2e-5
    points = data @ axes + 0.5 * rng.standard_normal((N, 2))
    ranks = tarp(truth @ axes, draws @ axes, references=points, scale=np.ones(2))
    return ecdf_p_value(ranks, L)[0]


def test_tarp_sees_a_dropped_correlation_that_no_latent_shows(rng):
    # Of 200 runs each 0 and 200 were rejected at 0.01; three of ten are by chance with rate 1e-4.
    assert sum(tarp_p_value(rng, 0.9) <= 0.01 for _ in range(10)) <= 2
    assert sum(tarp_p_value(rng, 0.0) <= 0.01 for _ in range(10)) >= 9


def test_tarp_sees_the_prior_only_from_points_that_depend_on_the_data(rng):
    data = rng.standard_normal((N, 2))
    truth = data + 0.3 * rng.standard_normal((N, 2))
    draws = (1.09**0.5) * rng.standard_normal((L, N, 2))
    assert ecdf_p_value(tarp(truth, draws, references=data), L)[0] < 1e-6
    assert ecdf_p_value(tarp(truth, draws), L)[0] > 1e-5  # the prior's points: no power, rate 1e-5
    constant = tarp(np.ones((N, 2)), np.ones((L, N, 2)))  # no scale, all tied
    assert ecdf_p_value(constant, L)[0] > 1e-5


# --- what is refused ------------------------------------------------------------------------------


def test_arguments_out_of_range_are_refused():
    ranks = np.array([[0], [10]])
    with pytest.raises(ValueError, match="ranks run from 0 to 10"):
        ecdf_p_value(ranks, 9)
    with pytest.raises(ValueError, match="num_simulations must be an integer from 1"):
        ecdf_band(0, 9)
    with pytest.raises(ValueError, match="num_draws must be an integer from 1"):
        ecdf_band(10, 0)
    with pytest.raises(ValueError, match="level is a probability"):
        ecdf_band(10, 9, 1.0)
    with pytest.raises(ValueError, match="levels are probabilities"):
        coverage(ranks, 10, (0.5, 1.0))
    with pytest.raises(ValueError, match="bins must be from 2 to 11"):
        chi_square_p_value(ranks, 10, bins=12)
