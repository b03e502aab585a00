"""Distances between samples against closed forms, SciPy and brute force; what a test must see."""

import math

import numpy as np
import pytest
import torch
from closed_forms import z_score
from scipy import stats

from pyro_vae.diagnostics.posterior import pairs
from pyro_vae.diagnostics.posterior.two_sample import (
    energy_distance,
    moment_errors,
    permutation_p_values,
    squared_mmd,
    standardised,
    wasserstein,
)


def correlated(draws: torch.Tensor, rho: float) -> torch.Tensor:
    """Standard normals made to have a correlation between their first two dimensions."""
    first, second = draws[..., 0], draws[..., 1]
    mixed = rho * first + math.sqrt(1 - rho**2) * second
    return torch.cat([first[..., None], mixed[..., None], draws[..., 2:]], -1)


def two_modes(draws: torch.Tensor, share: float) -> torch.Tensor:
    """Standard normals of which a share is moved from -3 to +3 in the first dimension."""
    sign = torch.where(torch.rand(draws.shape[:-1]) < share, 3.0, -3.0)
    return torch.cat([draws[..., :1] + sign[..., None], draws[..., 1:]], -1)


# What a posterior can get wrong, and the same posterior without the fault.
FAULTS = {
    "mean shifted by 0.5 sd": (lambda z: z + 0.5 * (torch.arange(z.shape[-1]) == 0), lambda z: z),
    "sd halved": (lambda z: 0.5 * z, lambda z: z),
    "sd doubled": (lambda z: 2 * z, lambda z: z),
    "correlation 0.9 dropped": (lambda z: z, lambda z: correlated(z, 0.9)),
    "a mode of two missing": (lambda z: two_modes(z, 1.0), lambda z: two_modes(z, 0.5)),
}


def normal_energy(shift: float, a: float, b: float) -> float:
    """Energy distance of N(shift, a^2) and N(0, b^2): twice E|X-Y| less E|X-X'| and E|Y-Y'|."""

    def mean_distance(mean: float, sd: float) -> float:  # of the folded normal
        return sd * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * sd**2)) + mean * math.erf(
            mean / (sd * math.sqrt(2))
        )

    within = mean_distance(0, math.sqrt(2) * a) + mean_distance(0, math.sqrt(2) * b)
    return 2 * mean_distance(shift, math.hypot(a, b)) - within


def normal_mmd(shift: float, a: float, b: float, h: float, dim: int) -> float:
    """Squared MMD of N(shift, a^2 I) and N(0, b^2 I) with a Gaussian kernel."""

    def mean_kernel(squared_mean: float, variance: float) -> float:
        total = h**2 + variance
        return (h**2 / total) ** (dim / 2) * math.exp(-squared_mean / (2 * total))

    between = mean_kernel(dim * shift**2, a**2 + b**2)
    return mean_kernel(0, 2 * a**2) + mean_kernel(0, 2 * b**2) - 2 * between


def test_moment_errors_are_those_of_numpy():
    sample, reference = 2 * torch.randn(9, 4, 3) + 1, correlated(torch.randn(13, 4, 3), 0.7)
    found = moment_errors(sample, reference)
    x, y = sample.numpy(), reference.numpy()
    mean = (x.mean(0) - y.mean(0)) / y.std(0, ddof=1)
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=1e-12)
    scale = np.log(x.std(0, ddof=1) / y.std(0, ddof=1))
    np.testing.assert_allclose(found.scale.numpy(), scale, rtol=1e-12, atol=1e-13)
    for n in range(4):
        factor = np.linalg.inv(np.linalg.cholesky(np.cov(y[:, n].T)))
        error = np.linalg.norm(factor @ np.cov(x[:, n].T) @ factor.T - np.eye(3)) / math.sqrt(3)
        assert float(found.covariance[n]) == pytest.approx(error, rel=1e-10)


def test_covariance_error_is_known_for_a_scaled_sample_and_ignores_linear_maps():
    reference = torch.randn(30, 2, 4)
    found = moment_errors(3 * reference + 5, reference)
    torch.testing.assert_close(found.covariance, torch.full((2,), 8.0))  # (9 - 1) sqrt(4) / sqrt(4)
    torch.testing.assert_close(found.scale, torch.full((2, 4), math.log(3)))
    sample, mix = torch.randn(25, 2, 4), torch.randn(4, 4)
    mapped = moment_errors(sample @ mix + 100, reference @ mix + 100).covariance
    torch.testing.assert_close(mapped, moment_errors(sample, reference).covariance)


def test_covariance_error_of_exact_samples_is_the_stated_noise():
    n, m, dim = 200, 400, 5
    error = moment_errors(torch.randn(n, 200, dim), torch.randn(m, 200, dim)).covariance
    root_mean_square = float(error.square().mean().sqrt())
    # To first order in 1 / n; the scatter of a single error is near a fifth of it.
    assert root_mean_square == pytest.approx(math.sqrt((dim + 1) * (1 / n + 1 / m)), rel=0.06)


def test_singular_covariances_of_the_reference_have_no_relative_error():
    sample, reference = torch.randn(20, 4, 3), torch.randn(15, 4, 3)
    reference[:, 0, 2] = 0.1  # a constant margin
    reference[:, 1, 2] = reference[:, 1, 0] - 3 * reference[:, 1, 1]
    sample[:, 2, 1] = 7.0  # this one is the sample's
    found = moment_errors(sample, reference)
    assert found.covariance.isnan().tolist() == [True, True, False, False]
    assert found.mean[0, 2].abs() == math.inf
    assert found.scale[0, 2] == math.inf
    assert found.scale[2, 1] == -math.inf
    assert found.mean[1].isfinite().all()
    few = moment_errors(sample, reference[:3])  # as many draws as dimensions
    assert few.covariance.isnan().all()


def test_two_equal_constants_differ_in_nothing():
    constant = torch.full((5, 2, 1), 0.1)
    found = moment_errors(constant, constant[:3])
    assert found.mean.tolist() == found.scale.tolist() == [[0.0], [0.0]]
    assert wasserstein(constant, constant[:3]).tolist() == [[0.0], [0.0]]
    assert energy_distance(constant, constant[:3]).tolist() == [0.0, 0.0]
    assert squared_mmd(constant, constant[:3]).tolist() == [0.0, 0.0]
    assert permutation_p_values(constant, constant[:3]).tolist() == [1.0, 1.0]
    assert permutation_p_values(constant, constant[:3], "mmd").tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 4), (5, 8), (1, 3)])
def test_first_wasserstein_distance_is_scipys(n, m):
    sample, reference = torch.randn(n, 3, 2), torch.randn(m, 3, 2) * 2 + 1
    found = wasserstein(sample, reference)
    for datum in range(3):
        for d in range(2):
            truth = stats.wasserstein_distance(sample[:, datum, d], reference[:, datum, d])
            assert float(found[datum, d]) == pytest.approx(truth, rel=1e-12)


def test_second_wasserstein_distance_is_that_of_the_best_assignment():
    # Every draw repeated until both are 12 makes equal numbers, whose best matching is the sorted.
    sample, reference = torch.randn(6, 2, 3), torch.randn(4, 2, 3)
    x, y = sample.repeat_interleave(2, 0).numpy(), reference.repeat_interleave(3, 0).numpy()
    truth = np.sqrt(np.mean((np.sort(x, 0) - np.sort(y, 0)) ** 2, 0))
    np.testing.assert_allclose(wasserstein(sample, reference, 2).numpy(), truth, rtol=1e-12)
    assert not np.allclose(wasserstein(sample, reference, 1).numpy(), truth)


@pytest.mark.parametrize("order", [1, 2])
def test_wasserstein_of_quantiles_is_that_of_the_normals(order):
    # Midpoint quantiles of N(0.3, 4) and N(0, 1); SciPy integrates the difference of quantiles.
    normal = stats.norm()

    def grid(count: int) -> torch.Tensor:
        return torch.tensor(normal.ppf((np.arange(count) + 0.5) / count))[:, None, None]

    shift, ratio = 0.3, 2.0
    if order == 2:
        truth = math.hypot(shift, ratio - 1)
    else:  # E |shift + Z|: the quantiles differ by shift + (ratio - 1) Z
        truth = math.sqrt(2 / math.pi) * math.exp(-(shift**2) / 2)
        truth += shift * math.erf(shift / math.sqrt(2))
    found = wasserstein(shift + ratio * grid(4000), grid(3000), order)
    assert float(found) == pytest.approx(truth, rel=2e-3)  # the tails that quantiles leave out


def test_energy_distance_is_scipys_without_the_pairs_of_a_draw_with_itself():
    n, m = 6, 9
    sample, reference = torch.randn(n, 3, 1), torch.randn(m, 3, 1) + 0.5
    for datum in range(3):
        x, y = sample[:, datum, 0].numpy(), reference[:, datum, 0].numpy()
        own = [np.abs(v[:, None] - v).sum() / (len(v) * (len(v) - 1)) for v in (x, y)]
        truth = stats.energy_distance(x, y) ** 2 - own[0] / n - own[1] / m
        assert float(energy_distance(sample, reference)[datum]) == pytest.approx(truth, rel=1e-10)


def test_mmd_is_the_mean_over_different_pairs():
    sample, reference, h = torch.randn(4, 2, 3), torch.randn(5, 2, 3) + 1, 1.3
    for datum in range(2):
        x, y = sample[:, datum], reference[:, datum]

        def mean(a, b, equal):
            pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not equal or i != j]
            kernel = [math.exp(-float((a[i] - b[j]).square().sum()) / (2 * h**2)) for i, j in pairs]
            return sum(kernel) / len(kernel)

        truth = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
        assert float(squared_mmd(sample, reference, h)[datum]) == pytest.approx(truth, rel=1e-11)


@pytest.mark.parametrize(("shift", "a"), [(0.0, 1.0), (0.7, 1.0), (0.0, 2.0)])
def test_energy_distance_of_normals_is_unbiased(shift, a):
    # 4 standard errors of 2000 repetitions: a right one fails 6e-5 of the time.
    values = energy_distance(shift + a * torch.randn(8, 2000, 1), torch.randn(13, 2000, 1))
    assert z_score(values, normal_energy(shift, a, 1.0)) < 4
    biased = values + normal_energy(0.0, 1.0, 1.0) + 2 * a / math.sqrt(math.pi) / 8
    assert z_score(biased, normal_energy(shift, a, 1.0)) > 4  # what the V-statistic adds


@pytest.mark.parametrize(("shift", "a"), [(0.0, 1.0), (0.7, 1.0), (0.0, 2.0)])
def test_mmd_of_normals_is_unbiased(shift, a):
    values = squared_mmd(shift + a * torch.randn(8, 2000, 3), torch.randn(13, 2000, 3), 1.5)
    truth = normal_mmd(shift, a, 1.0, 1.5, 3)
    assert z_score(values, truth) < 4
    assert z_score(values + (1 - 0.4) / 8, truth) > 4


def test_default_bandwidth_is_the_median_distance_of_each_datum():
    sample, reference = torch.randn(5, 3, 2), torch.randn(6, 3, 2) * torch.tensor([1.0, 9.0])
    together = squared_mmd(sample, reference)
    for n in range(3):
        pooled = torch.cat([sample[:, n], reference[:, n]])
        median = np.median(torch.pdist(pooled).numpy())
        alone = squared_mmd(sample[:, n : n + 1], reference[:, n : n + 1], float(median))
        assert float(together[n]) == pytest.approx(float(alone), rel=1e-10)


def test_equal_draws_do_not_count_in_the_median():
    draws = torch.zeros(1, 5, 1)
    draws[0, 4] = 3.0  # 6 of 10 distances are 0
    assert pairs.median_distance(draws).item() == 3.0
    many = torch.randn(1, 1500, 1)
    assert pairs.median_distance(many).item() == pytest.approx(0.6745 * math.sqrt(2), rel=0.1)


def test_blocks_change_nothing(monkeypatch):
    sample, reference = torch.randn(23, 6, 2), torch.randn(17, 6, 2) + 0.3
    whole = [energy_distance(sample, reference), permutation_p_values(sample, reference, "mmd")]
    for entries in (7 * 40, 3 * 40**2):  # blocks of 7 rows, and of 3 data
        monkeypatch.setattr(pairs, "_ENTRIES", entries)
        torch.testing.assert_close(energy_distance(sample, reference), whole[0])
        torch.testing.assert_close(permutation_p_values(sample, reference, "mmd"), whole[1])


def test_p_value_is_the_share_of_all_ways_to_share_the_draws_out():
    # 3 and 3 draws: 20 ways, of which the observed one and its mirror image are the most extreme.
    sample = torch.tensor([0.0, 0.1, 0.2])[:, None, None]
    p = permutation_p_values(sample, sample + 10, num_permutations=4000)
    assert float(p) == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / 4000))


@pytest.mark.parametrize("statistic", ["energy", "mmd"])
@pytest.mark.parametrize("others", [20, 11])
def test_p_values_are_uniform_where_nothing_is_wrong(statistic, others):
    sample, reference = torch.randn(20, 400, 2), torch.randn(others, 400, 2)
    p = permutation_p_values(sample, reference, statistic, num_permutations=99)
    # A Kolmogorov-Smirnov test at 1e-4; the grid of 0.01 shifts a distribution by at most 0.01.
    bound = math.sqrt(-math.log(1e-4 / 2) / (2 * len(p))) + 0.01
    assert stats.kstest(p.numpy(), "uniform").statistic < bound
    too_small = p**2  # a test that says wrong too often
    assert stats.kstest(too_small.numpy(), "uniform").statistic > bound


def test_more_permutations_where_none_reached_keep_p_values_right():
    sample, reference = torch.randn(8, 500, 1), torch.randn(7, 500, 1)
    sample[:, :3] += 10  # of 6435 ways to share these out, the observed one alone is as extreme
    p = permutation_p_values(sample, reference, num_permutations=19, resolve=0.01 / 500)
    assert 1 / (1 + 20_000) <= float(p[:3].max()) < 7 / 6435
    right = p[3:].sort().values
    # Dvoretzky, Kiefer & Wolfowitz: above the diagonal by this much with probability 1e-4.
    level = torch.arange(1, 498) / 497
    assert bool((level <= right + math.sqrt(-math.log(1e-4) / (2 * 497))).all())
    assert 0 < float(right.min()) < 1 / 20  # which the first permutations could not say
    none = permutation_p_values(sample, reference, num_permutations=19)
    assert float(none.min()) == 1 / 20


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("statistic", ["energy", "mmd"])
def test_every_fault_is_seen(statistic, fault):
    wrong, right = FAULTS[fault]
    sample, reference = wrong(torch.randn(150, 20, 2)), right(torch.randn(100, 20, 2))
    p = permutation_p_values(sample, reference, statistic, num_permutations=99)
    assert (p <= 0.05).double().mean() >= 0.8


def test_standardised_draws_see_a_latent_in_small_units():
    def pair(fault: float) -> tuple[torch.Tensor, torch.Tensor]:
        sample, reference = torch.randn(60, 30, 2), torch.randn(50, 30, 2)
        sample[..., 1] += fault
        units = torch.tensor([1000.0, 1.0])
        return 5 + sample * units, 5 + reference * units

    raw, scaled = pair(2.0), standardised(*pair(2.0))
    assert (permutation_p_values(*raw, num_permutations=99) <= 0.05).double().mean() < 0.5
    assert (permutation_p_values(*scaled, num_permutations=99) <= 0.05).all()
    pooled = torch.cat(scaled)
    torch.testing.assert_close(pooled.mean(0), torch.zeros(30, 2), atol=1e-9, rtol=0)
    torch.testing.assert_close(pooled.std(0, correction=0), torch.ones(30, 2))
    assert torch.cat(standardised(torch.ones(3, 1, 1), torch.ones(2, 1, 1))).unique().tolist() == [
        0
    ]


def test_p_values_follow_the_seed_and_not_the_callers_random_state():
    sample, reference = torch.randn(15, 8, 2), torch.randn(12, 8, 2)
    state = torch.get_rng_state()
    first = permutation_p_values(sample, reference, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, permutation_p_values(sample, reference, seed=3))
    assert not torch.equal(first, permutation_p_values(sample, reference, seed=4))


FUNCTIONS = [energy_distance, squared_mmd, permutation_p_values, wasserstein, moment_errors]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_draw_that_is_not_finite_spoils_its_own_datum_alone(function, bad):
    sample, reference = torch.randn(12, 3, 2), torch.randn(9, 3, 2)
    whole = function(sample, reference)
    sample[4, 1, 0] = bad
    spoilt = function(sample, reference)
    for good, found in zip(
        *(r if isinstance(r, tuple) else [r] for r in (whole, spoilt)), strict=True
    ):
        assert found[1].isnan().all()
        torch.testing.assert_close(found[[0, 2]], good[[0, 2]])
    assert (
        torch.cat(
            [
                torch.atleast_1d(v[1]).flatten()
                for v in (
                    function(reference, sample)
                    if isinstance(spoilt, tuple)
                    else [function(reference, sample)]
                )
            ]
        )
        .isnan()
        .all()
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_single_precision_draws_give_double_precision_results(function):
    sample, reference = torch.randn(12, 3, 2).float(), torch.randn(9, 3, 2).float()
    found, double = function(sample, reference), function(sample.double(), reference.double())
    for a, b in zip(*(r if isinstance(r, tuple) else [r] for r in (found, double)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.float32
def test_results_do_not_depend_on_the_default_dtype():
    x, y = torch.zeros(3, 1, 1), torch.ones(7, 1, 1)
    assert wasserstein(x, y).item() == pytest.approx(1.0, abs=1e-15)
    assert permutation_p_values(x, y).dtype == torch.float64
    assert moment_errors(x, y).covariance.dtype == torch.float64


@pytest.mark.parametrize("function", [*FUNCTIONS[:3], moment_errors])
def test_too_few_draws_are_refused(function):
    for a, b, name in ((1, 5, "sample"), (5, 1, "reference"), (0, 5, "sample")):
        with pytest.raises(ValueError, match=f"{name} has {a if a < 2 else b} draws .* at least 2"):
            function(torch.randn(a, 3, 2), torch.randn(b, 3, 2))


def test_draws_of_unlike_things_are_refused():
    # Shapes in annotations are checked in tests alone; a batch of one would broadcast elsewhere.
    for unlike in (torch.randn(5, 1, 2), torch.randn(5, 3, 1)):
        with pytest.raises(ValueError, match="with the same data and latents"):
            pairs.check_two_samples(torch.randn(4, 3, 2), unlike, least=2)


def test_one_draw_has_a_wasserstein_distance_and_none_has_not():
    one = wasserstein(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 3.0), order=2)
    assert one.item() == 3.0
    with pytest.raises(ValueError, match="sample has 0 draws"):
        wasserstein(torch.zeros(0, 1, 1), torch.zeros(1, 1, 1))


def test_options_that_mean_nothing_are_refused():
    x = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match="order must be 1 or 2, not 3"):
        wasserstein(x, x, order=3)
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        squared_mmd(x, x, bandwidth=0.0)
    with pytest.raises(ValueError, match="num_permutations must be at least 1"):
        permutation_p_values(x, x, num_permutations=0)
    with pytest.raises(ValueError, match="statistic is 'energy' or 'mmd', not 'ks'"):
        permutation_p_values(x, x, "ks")
    with pytest.raises(ValueError, match="no dimension"):
        energy_distance(x[..., :0], x[..., :0])
