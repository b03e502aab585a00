"""At a stationary point the bound is a sum of entropies; away from it, it is not."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Poisson

from pyro_vae import VAE, GaussianMixture, LinearGaussian, fit, fit_em
from pyro_vae.models import BernoulliMixture, PoissonMixture


def clusters(count=90, seed=0):
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)).double()
    return noise + torch.tensor([[0.0, 0.0], [3.0, 1.0], [-2.0, 4.0]]).double().repeat(30, 1)


def counts_of(rate, seed=1):
    torch.manual_seed(seed)
    return torch.poisson(torch.tensor([[2.0, 1.0], [rate, 5.0]]).double().repeat(40, 1))


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("method", ["exact", "hard"])
def test_em_on_gaussians_ends_at_a_sum_of_entropies(covariance, method):
    """Entropies are torch's own; the start is away from it, by much more than what is left."""
    x = clusters()
    mixture = GaussianMixture(3, 2, covariance=covariance).double()
    found = fit_em(
        mixture,
        x,
        method=method,
        initialization="random",
        max_iterations=4000,
        tolerance=1e-16,
        progress=False,
    )
    rows = found.history.entropy_residual.values
    after_e = found.history.phase.values == "E"
    assert math.isnan(rows[~after_e][0])
    assert abs(rows[-1]) < 1e-8
    assert abs(rows[0]) > 1e-3, rows
    q = mixture.predict_proba(x)
    if method == "hard":
        q = torch.zeros_like(q).scatter_(1, q.argmax(1, keepdim=True), 1.0)
    posterior = float(-torch.special.xlogy(q, q).sum(1).mean())
    prior = float(-torch.special.xlogy(mixture.weights, mixture.weights).sum().detach())
    each = MultivariateNormal(mixture.locs, mixture.dense_covariances).entropy()
    exact = posterior - prior - float((q.mean(0) @ each).detach())
    assert float(found.history.bound[-1]) == pytest.approx(exact, abs=1e-8)


def test_away_from_the_fixed_point_it_is_the_difference_from_the_sum():
    """At any parameters, not only stationary ones, beside torch's own entropies."""
    x = clusters()
    mixture = GaussianMixture(3, 2).double()
    found = fit_em(mixture, x, max_iterations=3, tolerance=0.0, progress=False)
    q = mixture.predict_proba(x)
    sums = float(-torch.special.xlogy(q, q).sum(1).mean())
    sums -= float(-torch.special.xlogy(mixture.weights, mixture.weights).sum().detach())
    each = MultivariateNormal(mixture.locs, mixture.dense_covariances).entropy()
    sums -= float((q.mean(0) @ each).detach())
    last = found.history.isel(step=-1)
    assert float(last.entropy_residual) == pytest.approx(float(last.bound) - sums, abs=1e-10)


@pytest.mark.parametrize("kind", [PoissonMixture, BernoulliMixture])
def test_other_families_end_there_as_well(kind):
    x = counts_of(6.0) if kind is PoissonMixture else (counts_of(6.0) > 3).double()
    mixture = kind(2, 2).double()
    found = fit_em(mixture, x, max_iterations=4000, tolerance=1e-17, progress=False)
    rows = found.history.entropy_residual.values
    assert abs(rows[-1]) < 1e-8 < 1e-4 < abs(rows[0])


def test_of_counts_the_carrier_is_left_out():
    """H_k without log x! is A - eta mu: beside a sum over states, of a single component."""
    x = counts_of(6.0)
    mixture = PoissonMixture(1, 2).double()
    found = fit_em(mixture, x, max_iterations=2, tolerance=0.0, progress=False)
    rate = x.mean(0)
    states = torch.arange(80.0).double()[:, None]
    density = Poisson(rate).log_prob(states)
    entropy = float(-(density.exp() * (density + torch.lgamma(states + 1))).sum())
    carrier = float(torch.lgamma(x + 1).sum(1).mean())
    assert float(found.history.bound[-1]) == pytest.approx(-entropy - carrier, abs=1e-8)
    assert abs(float(found.history.entropy_residual[-1])) < 1e-12


@pytest.mark.parametrize(
    ("made", "options"),
    [
        ({}, {"hold": ("weights",)}),
        ({}, {"hold": ("covariances",), "initialization": "given"}),
        ({"reg_covar": 0.1}, {}),
        ({}, {"method": "variational_bayes"}),
    ],
)
def test_where_parameters_are_not_free_there_is_no_column(made, options):
    mixture = GaussianMixture(2, 2, **made).double()
    found = fit_em(mixture, clusters(), max_iterations=3, progress=False, **options)
    assert "entropy_residual" not in found.history


# --- fit ------------------------------------------------------------------------------------------


def plane(count=400):
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(count, 2, generator=generator).double()
    loadings = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.0, 1.5, 0.5, 1.0]]).double()
    return z @ loadings + 0.5 * torch.randn(count, 4, generator=generator).double()


TINY = {"epochs": 1, "learning_rate": 1e-12, "progress": False}


@pytest.mark.parametrize("guide", ["exact_guide", "best_diagonal_guide"])
def test_at_the_optimum_of_ppca_the_residual_is_zero(guide):
    """The maximum is in closed form; 4.4 standard errors are passed once in 10^5."""
    x = plane()
    model = LinearGaussian.ppca_optimum(x, 2)
    found = fit(model.model, getattr(model, guide), x, batch_size=len(x), **TINY).history
    assert "entropy_residual" in found
    assert abs(float(found.entropy_residual[-1])) < 4.4 * float(found.entropy_residual_se[-1])
    assert float(found.entropy_residual_se[-1]) < 0.1
    with torch.no_grad():  # half a nat of a feature too much noise: 4 (1 - 1/2^2) / 2
        model.generative.log_scale += torch.tensor(2.0).log()
    found = fit(model.model, model.guide, x, batch_size=len(x), **TINY).history
    assert float(found.entropy_residual[-1]) > 10 * float(found.entropy_residual_se[-1])


def test_it_is_the_bound_less_entropies_at_any_parameters():
    """Beside the entropies of torch at the same draws: equal but for E log p(z), which is exact."""
    x = plane(4000)
    model = LinearGaussian(4, 2).double()
    found = fit(model, x, batch_size=len(x), **TINY).history.isel(epoch=-1)
    q, scale = model.amortized_posterior(x[:1]), model.noise_variance.sqrt()
    sums = q.entropy().mean() - 2 * 0.5 * math.log(2 * math.pi * math.e)
    sums = sums - torch.distributions.Normal(0.0, scale).entropy().sum()
    apart = float(found.bound) - float(sums.detach()) - float(found.entropy_residual)
    assert abs(apart) < 4.4 * 2 / math.sqrt(1000)  # of log q and log p(z), sds below 1 each


def test_the_residual_of_a_vae_shrinks_while_it_trains():
    model = VAE(4, 2, hidden=(8,), likelihood="gaussian").double()
    rate = {"learning_rate": 0.01, "epochs": 150, "evaluate_every": 50}
    found = fit(model, plane(), batch_size=100, progress=False, **rate).history
    start = fit(VAE(4, 2, hidden=(8,), likelihood="gaussian").double(), plane(), **TINY).history
    assert abs(float(start.entropy_residual[-1])) > 2
    assert abs(float(found.entropy_residual[-1])) < 0.25


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": {"name": "gaussian", "scale": 0.5}},
        {"likelihood": {"name": "gaussian", "scale": "pixel"}},
        {"likelihood": "gaussian", "prior": "mixture"},
    ],
)
def test_a_vae_without_the_free_parameters_has_no_column(options):
    found = fit(VAE(4, 2, hidden=(3,), **options).double(), plane(20), **TINY).history
    assert "entropy_residual" not in found
