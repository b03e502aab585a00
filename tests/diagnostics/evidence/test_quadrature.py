"""Quadrature against closed forms."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats

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
    def stepped(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            outside = z.square().sum(-1) > 1
            pyro.sample("x", dist.Normal(torch.where(outside, 1.0, -1.0), 0.3), obs=x)

    found = log_evidence(stepped, None, torch.tensor([0.1]), method="quadrature", progress=False)
    share = torch.tensor(-0.5).exp()
    heights = dist.Normal(torch.tensor([1.0, -1.0]), 0.3).log_prob(torch.tensor(0.1))
    exact = float((heights + torch.stack([share, 1 - share]).log()).logsumexp(0))
    error = abs(float(found.log_evidence[0]) - exact)
    assert 1e-6 < error < float(found.quadrature_error[0]) < 0.05
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


# --- integrands that are hard to find or to resolve, against integrals in SciPy -------------------


def log_integral(log_density, points):
    """Log of an integral over a line, cut at `points` and from there outwards without end."""
    edges = [-math.inf, *sorted(points), math.inf]
    top = max(log_density(point) for point in points)

    def relative(z):
        return math.exp(log_density(z) - top)

    parts = [
        integrate.quad(relative, *ends, epsabs=1e-13, epsrel=1e-12, limit=400)[0]
        for ends in itertools.pairwise(edges)
    ]
    return top + math.log(sum(parts))


def around(modes, width):
    return [mode + step * width for mode in modes for step in (-30, -8, -3, 0, 3, 8, 30)]


def of_one_latent(prior, mean, noise, x, second=False):
    """z ~ prior, x ~ N(mean(z), noise); a second latent has a datum of its own."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            if second:
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(w, 0.5), obs=y)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(mean(z), noise), obs=x)

    x, y = torch.tensor(x), torch.linspace(-1.0, 1.0, len(x))
    found = log_evidence(model, None, (x, y), method="quadrature", progress=False)
    alone = dist.Normal(0.0, 1.25**0.5).log_prob(y).numpy() if second else 0.0
    return found, found.log_evidence.values - alone


def covered(found, values, exact):
    """Every error is within what is claimed of it, and no wrong number is called exact."""
    error = abs(values - np.array(exact))
    assert (error <= found.quadrature_error.values + 1e-9).all(), (error, found.quadrature_error)
    if found.quantity("log_evidence").bound == "exact":
        assert (error < 1e-6 * (1 + abs(values))).all()
    return error


@pytest.mark.parametrize("second", [False, True], ids=["one latent", "two latents"])
@pytest.mark.parametrize("noise", [0.01, 1e-3, 1e-5])
def test_two_narrow_modes(noise, second):
    x = [1.0, 1.7, 2.3, 0.5]
    found, values = of_one_latent(dist.Normal(0.0, 1.0), torch.square, noise, x, second)
    exact = [
        log_integral(
            lambda z, x=x_n: stats.norm.logpdf(z) + stats.norm.logpdf(x, z * z, noise),
            around([-math.sqrt(x_n), math.sqrt(x_n)], noise / 2),
        )
        for x_n in x
    ]
    assert covered(found, values, exact).max() < 1e-7
    assert abs(values - math.log(2) - exact).min() > 0.6  # one mode lost would be seen
    assert found.quantity("log_evidence").bound == "exact"


def test_three_modes_and_unequal_ones():
    def cubic(z):
        return z**3 - 3 * z

    found, values = of_one_latent(dist.Normal(0.0, 1.0), cubic, 1e-3, [0.0, 1.0])
    exact = []
    for x_n in (0.0, 1.0):
        modes = np.roots([1.0, 0.0, -3.0, -x_n]).real
        exact.append(
            log_integral(
                lambda z, x=x_n: stats.norm.logpdf(z) + stats.norm.logpdf(x, cubic(z), 1e-3),
                around(modes, 3e-4),
            )
        )
    assert covered(found, values, exact).max() < 1e-7

    # The wide mode holds the mass and the narrow one the height.
    weights, locs, scales = torch.tensor([0.3, 0.7]), [0.0, 4.0], [1e-4, 2.0]
    mixture = dist.MixtureSameFamily(
        dist.Categorical(weights), dist.Normal(torch.tensor(locs), torch.tensor(scales))
    )
    found, values = of_one_latent(mixture, lambda z: z, 1.5, [0.3, 5.0])
    sides = [
        [stats.norm.logpdf(x, m, math.hypot(s, 1.5)) for m, s in zip(locs, scales, strict=True)]
        for x in (0.3, 5.0)
    ]
    exact = np.logaddexp(*(np.array(sides) + np.log([0.3, 0.7])).T)
    assert covered(found, values, exact).max() < 1e-7


@pytest.mark.parametrize(
    ("prior", "density", "noise"),
    [
        (lambda: dist.StudentT(2.0, 0.0, 1.0), stats.t(2.0).logpdf, 1e-3),
        (lambda: dist.Cauchy(0.0, 1.0), stats.cauchy().logpdf, 1.0),
        (lambda: dist.Cauchy(0.0, 1.0), stats.cauchy().logpdf, 1e-3),
        (lambda: dist.StudentT(0.5, 1.0, 2.0), stats.t(0.5, 1.0, 2.0).logpdf, 1.0),
        (lambda: dist.Laplace(0.0, 1.0), lambda z: -abs(z) - math.log(2), 1.0),
    ],
    ids=["t2", "cauchy", "cauchy-narrow", "t0.5", "laplace"],
)
def test_heavy_tails_and_data_far_out(prior, density, noise):
    x = [0.3, 40.0, -1e3, 1e5]
    found, values = of_one_latent(prior(), lambda z: z, noise, x)
    exact = [
        log_integral(
            lambda z, x=x_n: density(z) + stats.norm.logpdf(x, z, noise),
            [*around([x_n], noise), *around([0.0], 1.0)],
        )
        for x_n in x
    ]
    assert covered(found, values, exact).max() < 1e-5


def test_heavy_tails_of_two_latents():
    """The data say nothing of the second latent, whose tails are a ridge without end."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(1.5, 0.0, 1.0))
            pyro.sample("w", dist.Cauchy(0.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = [0.1, 300.0, -1e5]
    found = log_evidence(model, None, torch.tensor(x), method="quadrature", progress=False)
    exact = [
        log_integral(
            lambda z, x=x_n: stats.t.logpdf(z, 1.5) + stats.norm.logpdf(x, z),
            [*around([x_n], 1.0), *around([0.0], 1.0)],
        )
        for x_n in x
    ]
    assert covered(found, found.log_evidence.values, exact).max() < 1e-5


def test_a_likelihood_with_heavy_tails_far_from_the_prior():
    """Cauchy and Cauchy: two modes of one weight, of which no draw of the prior sees the second."""
    x = [3.0, 50.0, 1e4]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(0.0, 1.0))
            pyro.sample("x", dist.Cauchy(z, 1.0), obs=x)

    found = log_evidence(model, None, torch.tensor(x), method="quadrature", progress=False)
    covered(found, found.log_evidence.values, stats.cauchy(0.0, 2.0).logpdf(x))


def test_a_funnel():
    def model(x):
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            z = pyro.sample("z", dist.Normal(0.0, (v / 2).exp()))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x = [0.05, 2.0, 30.0]
    found = log_evidence(model, None, torch.tensor(x), method="quadrature", progress=False)
    exact = [
        log_integral(
            lambda v, x=x_n: (
                stats.norm.logpdf(v, 0, 3)
                + stats.norm.logpdf(x, 0, math.hypot(math.exp(v / 2), 0.1))
            ),
            around([0.0, 2 * math.log(x_n)], 1.0),
        )
        for x_n in x
    ]
    assert covered(found, found.log_evidence.values, exact).max() < 1e-5


@pytest.mark.parametrize("noise", [0.5, 0.01])
def test_a_ring(noise):
    """A ridge without a mode of its own: x ~ N(z1^2 + z2^2, noise), whose square is exponential."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square().sum(-1), noise), obs=x)

    x = [1.0, 3.0]
    found = log_evidence(model, None, torch.tensor(x), method="quadrature", progress=False)
    exact = [
        math.log(
            integrate.quad(
                lambda r, x=x_n: stats.expon.pdf(r, scale=2) * stats.norm.pdf(x, r, noise),
                *(max(0.0, x_n - 12 * noise), x_n + 12 * noise),
                points=[x_n],
                epsabs=1e-13,
            )[0]
        )
        for x_n in x
    ]
    error = covered(found, found.log_evidence.values, exact).max()
    assert error < (1e-6 if noise > 0.1 else 0.5)
