"""The kernel Stein discrepancy against closed forms; what it sees, and what it cannot."""

import math

import numpy as np
import pytest
import torch
from closed_forms import z_score
from scipy import integrate, stats

from pyro_vae.diagnostics.posterior import pairs
from pyro_vae.diagnostics.posterior.stein import kernel_stein_discrepancy

KERNELS = {
    "imq": lambda square, h: (1 + square / h**2) ** -0.5,
    "gaussian": lambda square, h: torch.exp(-square / (2 * h**2)),
}


def normal_score(z: torch.Tensor, covariance: torch.Tensor | None = None) -> torch.Tensor:
    """Of the normal with mean 0."""
    return -z if covariance is None else -z @ torch.linalg.inv(covariance)


def mixture_score(z: torch.Tensor, apart: float) -> torch.Tensor:
    """Of two equal modes at -apart and apart in the first dimension, each standard normal."""
    pull = torch.zeros_like(z)
    pull[..., 0] = apart * torch.tanh(apart * z[..., 0])
    return pull - z


def shifted_discrepancy(kernel: str, shift: float, h: float, dim: int) -> float:
    """For N(shift, I) against N(0, I): |shift|^2 E k, where |x - x'|^2 is 2 chi-square(dim)."""
    if kernel == "gaussian":
        mean = (h**2 / (h**2 + 2)) ** (dim / 2)
    else:
        density = stats.chi2(dim).pdf
        mean = integrate.quad(lambda t: density(t) / math.sqrt(1 + 2 * t / h**2), 0, math.inf)[0]
    return dim * shift**2 * mean


def scaled_discrepancy(sd: float, h: float, dim: int) -> float:
    """For N(0, sd^2 I) against N(0, I), Gaussian kernel: (1 - 1/sd^2)^2 E[x x' k]."""
    v = 2 * sd**2  # of x + x' and of x - x', which are independent
    mean = math.sqrt(h**2 / (h**2 + v))
    product = (v - v * h**2 / (h**2 + v)) * mean / 4
    return (1 - sd**-2) ** 2 * dim * product * mean ** (dim - 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_value_is_the_mean_of_the_stein_kernel_by_automatic_derivatives(kernel):
    h, (draws, batch, dim) = 1.7, (5, 2, 3)
    z, s = torch.randn(draws, batch, dim), torch.randn(draws, batch, dim)

    def stein(a, b, score_a, score_b):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        k = KERNELS[kernel]((a - b).square().sum(), h)
        by_a, by_b = torch.autograd.grad(k, (a, b), create_graph=True)
        rows = [torch.autograd.grad(by_a[i], b, retain_graph=True)[0][i] for i in range(dim)]
        return score_a @ score_b * k + score_a @ by_b + score_b @ by_a + sum(rows)

    found = kernel_stein_discrepancy(z, s, kernel=kernel, bandwidth=h, standardise=False).value
    for n in range(batch):
        terms = [
            stein(z[i, n], z[j, n], s[i, n], s[j, n]).item()
            for i in range(draws)
            for j in range(draws)
            if i != j
        ]
        assert float(found[n]) == pytest.approx(np.mean(terms), rel=1e-10)


# 4 standard errors of 2000 repetitions: a right one fails 6e-5 of the time.
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_value_for_a_shifted_normal_is_unbiased(kernel, shift):
    h, dim = 1.3, 3
    z = shift + torch.randn(9, 2000, dim)
    found = kernel_stein_discrepancy(
        z, -z, kernel=kernel, bandwidth=h, standardise=False, num_bootstrap=1
    ).value
    assert z_score(found, shifted_discrepancy(kernel, shift, h, dim)) < 4
    assert z_score(found, shifted_discrepancy(kernel, shift + 0.3, h, dim)) > 4


@pytest.mark.parametrize("sd", [0.5, 2.0])
def test_value_for_a_scaled_normal_is_unbiased(sd):
    h, dim = 1.3, 2
    z = sd * torch.randn(9, 4000, dim)
    found = kernel_stein_discrepancy(
        z, -z, kernel="gaussian", bandwidth=h, standardise=False, num_bootstrap=1
    ).value
    assert z_score(found, scaled_discrepancy(sd, h, dim)) < 4
    assert z_score(found, scaled_discrepancy(1.3 * sd, h, dim)) > 4


def test_standardised_value_does_not_depend_on_units_or_origin():
    z, s, units = torch.randn(30, 4, 3), torch.randn(30, 4, 3), torch.tensor([100.0, 1.0, 0.01])
    found = kernel_stein_discrepancy(z, s)
    moved = kernel_stein_discrepancy(5 + z * units, s / units)
    torch.testing.assert_close(moved.value, found.value)
    torch.testing.assert_close(moved.p_value, found.p_value)
    raw = kernel_stein_discrepancy(z * units, s / units, standardise=False)
    assert not torch.allclose(raw.value, found.value)


def test_default_bandwidth_is_the_median_distance_of_each_datum():
    z = torch.randn(10, 3, 2) * torch.tensor([1.0, 5.0])  # 45 distances, an odd number
    together = kernel_stein_discrepancy(z, -z, standardise=False).value
    for n in range(3):
        one = z[:, n : n + 1]
        h = float(np.median(torch.pdist(one[:, 0]).numpy()))
        alone = kernel_stein_discrepancy(one, -one, bandwidth=h, standardise=False).value
        assert float(together[n]) == pytest.approx(float(alone), rel=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [1, 4])
def test_p_values_are_uniform_where_nothing_is_wrong(kernel, dim):
    z = torch.randn(100, 300, dim)
    p = kernel_stein_discrepancy(z, -z, kernel=kernel, num_bootstrap=199).p_value
    # A Kolmogorov-Smirnov test at 1e-4; the grid of 0.005 shifts a distribution by at most that.
    bound = math.sqrt(-math.log(1e-4 / 2) / (2 * len(p))) + 0.005
    assert stats.kstest(p.numpy(), "uniform").statistic < bound
    assert stats.kstest(p.numpy() ** 2, "uniform").statistic > bound
    # 5 % of 300, and 4 standard errors of a binomial count.
    assert (p <= 0.05).sum() <= 15 + 4 * math.sqrt(300 * 0.05 * 0.95)


def far_apart(z: torch.Tensor, apart: float) -> torch.Tensor:
    """All draws in the mode at `apart`."""
    return z + apart * (torch.arange(z.shape[-1]) == 0)


RHO = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
FAULTS = {
    "mean shifted by 0.5 sd": lambda z: (far_apart(z, 0.5), normal_score),
    "sd halved": lambda z: (0.5 * z, normal_score),
    "sd doubled": lambda z: (2 * z, normal_score),
    "correlation 0.9 dropped": lambda z: (z, lambda y: normal_score(y, RHO)),
    "a mode 1.5 sd from the saddle missing": lambda z: (
        far_apart(z, 1.5),
        lambda y: mixture_score(y, 1.5),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_fault_near_by_is_seen(kernel, fault):
    z, score = FAULTS[fault](torch.randn(200, 20, 2))
    p = kernel_stein_discrepancy(z, score(z), kernel=kernel, num_bootstrap=99).p_value
    assert (p <= 0.05).double().mean() >= 0.8


def test_a_missing_mode_far_away_is_not_seen():
    # The limit that the docstring states; both modes are there in one half of the data.
    z = far_apart(torch.randn(200, 40, 2), 6.0)
    p = kernel_stein_discrepancy(z, mixture_score(z, 6.0), num_bootstrap=99).p_value
    assert (p <= 0.05).double().mean() < 0.3


def test_blocks_change_nothing(monkeypatch):
    z = torch.randn(37, 5, 2)
    whole = kernel_stein_discrepancy(z, -z + 0.2, num_bootstrap=50)
    for entries in (7 * 37, 2 * 37**2):  # blocks of 7 rows, and of 2 data
        monkeypatch.setattr(pairs, "_ENTRIES", entries)
        found = kernel_stein_discrepancy(z, -z + 0.2, num_bootstrap=50)
        torch.testing.assert_close(found.value, whole.value)
        torch.testing.assert_close(found.p_value, whole.p_value)


def test_signs_follow_the_seed_and_not_the_callers_random_state():
    z = torch.randn(20, 10, 2)
    state = torch.get_rng_state()
    first = kernel_stein_discrepancy(z, -z, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.p_value, kernel_stein_discrepancy(z, -z, seed=3).p_value)
    assert not torch.equal(first.p_value, kernel_stein_discrepancy(z, -z, seed=4).p_value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_number_that_is_not_finite_spoils_its_own_datum_alone(bad, which):
    given = [torch.randn(12, 3, 2), torch.randn(12, 3, 2)]
    whole = kernel_stein_discrepancy(*given)
    given[which][4, 1, 0] = bad
    spoilt = kernel_stein_discrepancy(*given)
    for good, found in zip(whole, spoilt, strict=True):
        assert found[1].isnan()
        torch.testing.assert_close(found[[0, 2]], good[[0, 2]])


def test_equal_draws_are_no_draws_from_a_density():
    z = torch.full((50, 2, 3), 0.1)
    found = kernel_stein_discrepancy(z, -z, bandwidth=2.0)
    # Every pair has the same term, |s|^2 + dim / h^2.
    torch.testing.assert_close(found.value, torch.full((2,), 0.03 + 3 / 4))
    assert (found.p_value < 0.01).all()
    assert kernel_stein_discrepancy(z, -z).value.isfinite().all()


@pytest.mark.float32
def test_single_precision_is_computed_in_double():
    z = torch.randn(12, 3, 2)
    found, double = (
        kernel_stein_discrepancy(z, -z),
        kernel_stein_discrepancy(z.double(), -z.double()),
    )
    assert found.value.dtype == found.p_value.dtype == torch.float64
    assert torch.equal(found.value, double.value)


def test_what_makes_no_discrepancy_is_refused():
    z = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match="1 draws of 3 latents make no pair; give at least 2"):
        kernel_stein_discrepancy(z[:1], z[:1])
    with pytest.raises(ValueError, match="5 draws of 0 latents"):
        kernel_stein_discrepancy(z[..., :0], z[..., :0])
    with pytest.raises(ValueError, match="kernel is 'imq' or 'gaussian', not 'linear'"):
        kernel_stein_discrepancy(z, z, kernel="linear")
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        kernel_stein_discrepancy(z, z, bandwidth=-1.0)
    with pytest.raises(ValueError, match="num_bootstrap must be at least 1"):
        kernel_stein_discrepancy(z, z, num_bootstrap=0)


def test_correlation_hides_no_fault_along_the_narrow_direction():
    """A guide with 1.3 times the spread, under a correlation of 0.95."""
    factor = torch.linalg.cholesky(torch.tensor([[1.0, 0.95], [0.95, 1.0]]))
    precision = torch.cholesky_inverse(factor)
    z = torch.randn(250, 30, 2) @ factor.T
    wide = kernel_stein_discrepancy(1.3 * z, -1.3 * z @ precision, num_bootstrap=199)
    assert (wide.p_value <= 0.05).double().mean() > 0.7
    exact = kernel_stein_discrepancy(z, -z @ precision, num_bootstrap=199)
    # Of 30 p-values, 6 or more below 0.05 have a probability of 0.003.
    assert (exact.p_value <= 0.05).sum() < 6


def test_with_fewer_draws_than_latents_each_is_scaled_by_itself():
    z = torch.randn(3, 2, 5)
    found = kernel_stein_discrepancy(z, -z, num_bootstrap=9)
    assert found.value.isfinite().all()
