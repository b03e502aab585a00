"""Priors against quadrature, SciPy, and mixtures and flows written out by hand."""

import json
import math
from typing import Any, cast

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_vae.models import (
    VAE,
    FlowPrior,
    MixturePrior,
    Prior,
    StandardNormal,
    VampPrior,
    make_prior,
)

LATENT_DIM, DATA_DIM = 2, 5
LIKE = torch.zeros((), dtype=torch.float64)
FAILURE_RATE = 2e-5
SPECS: dict[str, dict[str, Any]] = {
    "normal": {"name": "normal"},
    "mixture": {"name": "mixture", "num_components": 3},
    "vamp": {"name": "vamp", "num_pseudo_inputs": 4},
    "coupling": {"name": "flow", "num_steps": 3, "hidden": [6]},
    "autoregressive": {"name": "flow", "kind": "autoregressive", "num_steps": 3, "hidden": [6]},
}


def encode(u):
    """Posteriors that a VampPrior can mix; of data in [0, 1]."""
    return dist.Normal(2 * u[..., :LATENT_DIM] - 1, 0.3 + u[..., 2:4] / 2).to_event(1)


def build(name, latent_dim=LATENT_DIM):
    """A prior that is away from its start; a flow less, since its tails soon leave any grid."""
    prior = make_prior(SPECS[name], latent_dim, data_dim=DATA_DIM)
    with torch.no_grad():
        for parameter in prior.parameters():
            size = 0.15 if isinstance(prior, FlowPrior) else 0.4
            parameter.add_(size * torch.randn_like(parameter))
    return prior


def distribution(prior):
    return prior.distribution(encode, LIKE)


@pytest.mark.parametrize("name", SPECS)
def test_priors_are_normalised(name):
    """By the trapezoidal rule on a grid that holds the mass; it errs by rounding alone there."""
    axis = torch.linspace(-12, 12, 601)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = distribution(build(name)).log_prob(grid).exp()
    total = float(density.sum() * (axis[1] - axis[0]) ** 2)
    assert total == pytest.approx(1, abs=1e-5)  # a flow has kinks where its activation has them


@pytest.mark.parametrize("name", SPECS)
def test_draws_follow_the_density(name):
    """Ranks of the first latent's draws, in the cumulated marginal density of the grid."""
    prior = build(name)
    axis = torch.linspace(-12, 12, 601)
    with torch.no_grad():
        log_prob = distribution(prior).log_prob(torch.cartesian_prod(axis, axis))
        draws = distribution(prior).sample((2000,))
    assert draws.shape == (2000, LATENT_DIM)
    marginal = log_prob.exp().reshape(601, 601).sum(1).numpy()
    cdf = np.cumsum(marginal) - marginal / 2
    cdf = cdf / marginal.sum()

    def below(value, shift=0.0):
        return np.interp(value - shift, axis.numpy(), cdf)

    first = draws[:, 0].numpy()
    assert stats.kstest(first, below).pvalue > FAILURE_RATE
    assert stats.kstest(first, lambda v: below(v, 0.5)).pvalue < FAILURE_RATE


@pytest.mark.parametrize("name", SPECS)
def test_densities_broadcast_over_particles_and_data(name):
    prior = build(name, latent_dim=2)
    z = torch.randn(3, 4, LATENT_DIM)
    expanded = distribution(prior).expand((4,))
    assert expanded.batch_shape == (4,)
    assert expanded.event_shape == (LATENT_DIM,)
    values = expanded.log_prob(z)
    assert values.shape == (3, 4)
    alone = distribution(prior).log_prob(z[2, 1])
    torch.testing.assert_close(values[2, 1], alone, rtol=1e-12, atol=1e-12)
    assert expanded.sample((7,)).shape == (7, 4, LATENT_DIM)


def test_the_mixture_by_hand():
    prior, z = build("mixture"), torch.randn(6, LATENT_DIM)
    weights = prior.logits.softmax(0).detach().numpy()
    scales = 1e-3 + prior.raw_scales.exp().detach().numpy()
    locs = prior.locs.detach().numpy()
    densities = [
        stats.norm.pdf(z.numpy(), m, s).prod(-1) for m, s in zip(locs, scales, strict=True)
    ]
    expected = np.log(np.sum(weights[:, None] * densities, 0))
    np.testing.assert_allclose(distribution(prior).log_prob(z).detach(), expected, rtol=1e-12)


@pytest.mark.parametrize("posterior", ["diagonal", "full", "low_rank", "iaf"])
def test_the_vamp_prior_is_the_mean_of_the_models_posteriors(posterior):
    prior = {"name": "vamp", "num_pseudo_inputs": 3}
    vae = VAE(DATA_DIM, LATENT_DIM, (4,), prior=prior, posterior=posterior)
    z = torch.randn(6, LATENT_DIM)
    assert isinstance(vae.prior, VampPrior)
    mixed = vae.prior.distribution(vae.encode, LIKE).log_prob(z)
    terms = []
    for pseudo in vae.prior.pseudo_inputs:  # each on its own, at a copy: nothing is remembered
        terms.append(vae.encode(pseudo.expand(6, -1)).log_prob(z.clone()).exp())
    torch.testing.assert_close(mixed, torch.stack(terms).mean(0).log(), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(mixed, torch.stack(terms)[:2].mean(0).log())


def test_pseudo_inputs_lie_where_data_lie_and_start_from_them():
    prior = make_prior(SPECS["vamp"], LATENT_DIM, data_dim=DATA_DIM)
    assert isinstance(prior, VampPrior)
    assert ((prior.pseudo_inputs > 0) & (prior.pseudo_inputs < 1)).all()
    x = torch.rand(4, DATA_DIM).round()
    prior.initialize(x)
    torch.testing.assert_close(prior.pseudo_inputs.detach(), x.clamp(0.01, 0.99))
    real = VAE(DATA_DIM, LATENT_DIM, (4,), "gaussian", prior=SPECS["vamp"]).prior
    assert isinstance(real, VampPrior)
    real.initialize(10 * x)
    torch.testing.assert_close(real.pseudo_inputs.detach(), 10 * x)
    with pytest.raises(ValueError, match="4 pseudo-inputs"):
        prior.initialize(x[:3])


@pytest.mark.parametrize("name", ["coupling", "autoregressive"])
@pytest.mark.parametrize("latent_dim", [2, 5])
def test_flow_densities_by_the_autograd_jacobian(name, latent_dim):
    prior = build(name, latent_dim)
    flow = distribution(prior)
    start = torch.randn(latent_dim)

    def forward(u):
        for transform in distribution(prior).transforms:
            u = transform(u)
        return u

    jacobian = torch.autograd.functional.jacobian(forward, start)
    expected = stats.norm.logpdf(start.numpy()).sum() - float(jacobian.slogdet().logabsdet)
    value = float(flow.log_prob(forward(start).detach()).detach())
    assert value == pytest.approx(expected, rel=1e-9)
    assert value != pytest.approx(stats.norm.logpdf(start.numpy()).sum(), rel=1e-3)


@pytest.mark.parametrize("name", ["coupling", "autoregressive"])
def test_flows_start_as_the_standard_normal(name):
    prior, z = make_prior(SPECS[name], 5), torch.randn(6, 5)
    normal = stats.norm.logpdf(z.numpy()).sum(-1)
    np.testing.assert_allclose(distribution(prior).log_prob(z).detach(), normal, rtol=1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_a_prior_is_rebuilt_from_its_config(name):
    prior = build(name)
    again = make_prior(json.loads(json.dumps(prior.config)), LATENT_DIM, data_dim=DATA_DIM)
    assert again.config == prior.config
    assert SPECS[name].items() <= prior.config.items()
    again.load_state_dict(prior.state_dict())
    z = torch.randn(3, LATENT_DIM)
    assert torch.equal(distribution(prior).log_prob(z), distribution(again).log_prob(z))
    assert make_prior(prior, LATENT_DIM, data_dim=DATA_DIM) is prior
    floating = [value.is_floating_point() for value in prior.state_dict().values()]
    assert all(floating)  # a run folder holds nothing else


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: make_prior("gaussian", 2), ValueError, "choose one of"),
        (lambda: make_prior({"num_components": 2}, 2), ValueError, "choose one of"),
        (lambda: make_prior({"name": "normal", "scale": 2}, 2), TypeError, "scale"),
        (lambda: make_prior(StandardNormal(3), 2), ValueError, "latent_dim=2"),
        (lambda: make_prior("vamp", 2), ValueError, "'mixture' or 'flow'"),
        (lambda: make_prior(VampPrior(2, 7), 2, data_dim=5), ValueError, "data_dim=5"),
        (lambda: FlowPrior(1), ValueError, "prior='mixture'"),
        (lambda: FlowPrior(2, kind="planar"), ValueError, "'coupling'"),
        (lambda: FlowPrior(2, num_steps=0), ValueError, "num_steps"),
        (lambda: MixturePrior(2, 0), ValueError, "num_components"),
        (lambda: VampPrior(2, 5, 0), ValueError, "num_pseudo_inputs"),
        (lambda: StandardNormal(0), ValueError, "latent_dim"),
        (lambda: cast(Any, Prior)(2), TypeError, "abstract"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_values_off_the_support_are_refused():
    with pytest.raises(ValueError, match="support"):
        distribution(build("mixture")).log_prob(torch.tensor([math.nan, 0.0]))
