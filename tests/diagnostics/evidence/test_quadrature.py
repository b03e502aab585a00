"""Quadrature against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import log_evidence
from pyro_vae.inference.programs import ProgramError
from pyro_vae.models import LinearGaussian

N, D = 6, 5


def linear_gaussian(latent_dim, noise_variance):
    weight, bias = 2 * torch.randn(D, latent_dim), torch.randn(D)
    model = LinearGaussian.from_parameters(weight, bias, torch.tensor(noise_variance))
    covariance = weight @ weight.T + noise_variance * torch.eye(D)
    return model, torch.distributions.MultivariateNormal(bias, covariance)


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("noise_variance", [10.0, 0.5, 1e-3, 1e-5])  # down to narrow posteriors
def test_equal_to_the_closed_form_without_a_guide(latent_dim, noise_variance):
    linear, marginal = linear_gaussian(latent_dim, noise_variance)
    x = marginal.sample((N,))
    found = log_evidence(linear.model, None, x, method="quadrature", progress=False)
    exact = marginal.log_prob(x).numpy()
    assert found.log_evidence.values == pytest.approx(exact, rel=1e-8, abs=1e-8)
    assert (found.quadrature_error < 1e-6).all()
    assert found.quantity("log_evidence").bound == "exact"
    coarse = exact + 1e-4
    assert found.log_evidence.values != pytest.approx(coarse, rel=1e-8, abs=1e-8)


def test_constrained_latents():
    """Gamma-Poisson and beta-binomial: both have closed forms."""
    counts, successes = torch.tensor([0.0, 3.0, 40.0]), torch.tensor([0.0, 2.0, 7.0])

    def model(counts, successes):
        with pyro.plate("data", len(counts)):
            rate = pyro.sample("rate", dist.Gamma(2.5, 0.7))
            p = pyro.sample("p", dist.Beta(1.5, 2.0))
            pyro.sample("counts", dist.Poisson(rate), obs=counts)
            pyro.sample("successes", dist.Binomial(7, p), obs=successes)

    found = log_evidence(
        model, None, (counts, successes), method="quadrature", progress=False
    ).log_evidence.values
    gamma_poisson = dist.GammaPoisson(2.5, 0.7).log_prob(counts)
    beta_binomial = dist.BetaBinomial(1.5, 2.0, 7).log_prob(successes)
    assert found == pytest.approx((gamma_poisson + beta_binomial).numpy(), abs=1e-6)


def test_two_modes_far_apart():
    """A prior of two components, each seen by the likelihood alone in turn."""
    locs, weights = torch.tensor([-20.0, 20.0]), torch.tensor([0.25, 0.75])

    def model(x):
        with pyro.plate("data", len(x)):
            mixture = dist.MixtureSameFamily(
                dist.Categorical(weights), dist.Normal(locs, torch.tensor([0.1, 2.0]))
            )
            z = pyro.sample("z", mixture)
            pyro.sample("x", dist.Normal(z.abs(), 3.0), obs=x)

    x = torch.tensor([20.0, 18.0])
    # |z| is z or -z at each mode: both components are normal there to 20 standard deviations.
    sides = dist.Normal(20.0, (9.0 + torch.tensor([0.01, 4.0])).sqrt()).log_prob(x[:, None])
    exact = (sides + weights.log()).logsumexp(-1)
    found = log_evidence(model, None, x, method="quadrature", progress=False)
    assert found.log_evidence.values == pytest.approx(exact.numpy(), abs=1e-6)


def test_an_edge_is_seen_in_the_error_and_an_impossible_datum_is_infinite():
    def kinked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.where(z[..., 0] > 0.123, 1.0, -1.0), 0.3), obs=x)

    found = log_evidence(kinked, None, torch.tensor([0.1]), method="quadrature", progress=False)
    share = 1 - dist.Normal(0.0, 1.0).cdf(torch.tensor(0.123))
    heights = dist.Normal(torch.tensor([1.0, -1.0]), 0.3).log_prob(torch.tensor(0.1))
    exact = float((heights + torch.stack([share, 1 - share]).log()).logsumexp(0))
    error = abs(float(found.log_evidence[0]) - exact)
    assert 1e-6 < error < 3 * float(found.quadrature_error[0])
    assert found.quantity("log_evidence").bound == "none"
    assert "raise max_points" in found.summary()

    def impossible(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", torch.where(x > 100, 0.0 * z, 1.0).log())

    x = torch.tensor([1.0, 200.0])
    found = log_evidence(impossible, None, x, method="quadrature", progress=False)
    assert found.log_evidence.values == pytest.approx([0.0, -math.inf], abs=1e-8)
    assert found.quantity("log_evidence").value == -math.inf


def test_three_latents_are_refused():
    linear, marginal = linear_gaussian(3, 1.0)
    with pytest.raises(ProgramError, match="at most 2 latents per datum, and here are 3"):
        log_evidence(linear.model, None, marginal.sample((2,)), method="quadrature")


def test_a_global_latent_is_integrated_jointly():
    x = torch.randn(6) + 1
    marginal = torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6) + 1.0)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    found = log_evidence(model, None, x, method="quadrature", joint=True, progress=False)
    assert float(found.log_evidence) == pytest.approx(float(marginal.log_prob(x)), abs=1e-9)
    assert found.quantity("log_evidence").reduction == "total"
