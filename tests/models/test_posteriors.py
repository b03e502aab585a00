"""Posteriors against SciPy and the autograd Jacobian of their draws."""

import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vae.models import (
    DiagonalPosterior,
    InverseAutoregressivePosterior,
    LowRankPosterior,
    Posterior,
    make_posterior,
)

LATENT_DIM = 4
SPECS: dict[str, dict[str, Any]] = {
    "diagonal": {"name": "diagonal"},
    "full": {"name": "full"},
    "low_rank": {"name": "low_rank", "rank": 2},
    "iaf": {"name": "iaf", "num_steps": 3, "hidden": [7, 5], "context_dim": 3},
}


def softplus(raw):
    return 1e-6 + np.log1p(np.exp(raw))


def build(name, num=3):
    """A posterior, and outputs of an encoder for so many data."""
    posterior = make_posterior(SPECS[name], LATENT_DIM)
    return posterior, torch.randn(num, posterior.num_parameters)


def covariance(name, output):
    """That of the normal ones, from the encoder's output of one datum."""
    scale = softplus(output[LATENT_DIM : 2 * LATENT_DIM])
    rest = output[2 * LATENT_DIM :]
    if name == "diagonal":
        return np.diag(scale**2)
    if name == "low_rank":
        factor = rest.reshape(LATENT_DIM, 2)
        return factor @ factor.T + np.diag(scale**2)
    lower = np.diag(scale)
    lower[np.tril_indices(LATENT_DIM, -1)] = rest
    return lower @ lower.T


@pytest.mark.parametrize("name", ["diagonal", "full", "low_rank"])
def test_normal_posteriors_by_hand(name):
    posterior, output = build(name)
    z = torch.randn(5, 3, LATENT_DIM)
    found = posterior.distribution(output)
    values = found.log_prob(z)
    for n, row in enumerate(output.numpy()):
        normal = stats.multivariate_normal(row[:LATENT_DIM], covariance(name, row))
        np.testing.assert_allclose(values[:, n], normal.logpdf(z[:, n].numpy()), rtol=1e-9)
    torch.testing.assert_close(posterior.location(output), found.mean)
    assert not np.allclose(covariance(name, output[0].numpy()), np.eye(LATENT_DIM))


@pytest.mark.parametrize("name", ["diagonal", "full", "iaf"])  # low rank has more noise than z
def test_densities_of_draws_by_the_autograd_jacobian(name):
    """log q(z) = log N(eps) - log |dz/d eps|, with the draw as a function of its noise."""
    posterior, output = build(name, num=1)
    z = posterior.distribution(output).rsample()

    def draw(noise):
        return _draw(posterior, output, noise)

    noise = _noise_of(posterior, output, z.detach()[0])
    torch.testing.assert_close(draw(noise), z[0])
    jacobian = torch.autograd.functional.jacobian(draw, noise)
    expected = stats.norm.logpdf(noise.numpy()).sum() - float(jacobian.slogdet().logabsdet)
    value = posterior.distribution(output).log_prob(z.detach().clone())
    assert float(value.detach()) == pytest.approx(expected, rel=1e-9)


def _draw(posterior, output, noise):
    if isinstance(posterior, InverseAutoregressivePosterior):
        loc, raw = output[0, :LATENT_DIM], output[0, LATENT_DIM : 2 * LATENT_DIM]
        z = loc + (1e-6 + torch.log1p(raw.exp())) * noise
        return _flow_by_hand(posterior, z, output[0, 2 * LATENT_DIM :])
    distribution = posterior.distribution(output)
    root = torch.linalg.cholesky(_covariance_of(distribution)[0])
    return distribution.mean[0] + root @ noise


def _noise_of(posterior, output, z):
    distribution: Any = posterior.distribution(output)
    if isinstance(posterior, InverseAutoregressivePosterior):
        for step in reversed(distribution.transforms):
            z = step.inv(z[None])[0].detach()
        base = distribution.base_dist
        return ((z - base.mean[0]) / base.stddev[0]).detach()
    root = torch.linalg.cholesky(_covariance_of(distribution)[0])
    return torch.linalg.solve(root, z - distribution.mean[0])


def _covariance_of(distribution):
    if hasattr(distribution, "covariance_matrix"):
        return distribution.covariance_matrix
    return distribution.variance.diag_embed()


def _flow_by_hand(posterior, z, context):
    """The gated steps of the paper, from the networks' weights alone."""
    for number, step in enumerate(posterior.steps):
        order = list(range(LATENT_DIM))[:: -1 if number % 2 else 1]
        hidden = torch.cat([context, z])
        layers = list(step.nn.layers)
        for layer in layers[:-1]:
            hidden = torch.nn.functional.elu(hidden @ (layer.weight * layer.mask).T + layer.bias)
        last = layers[-1]
        target, raw = (hidden @ (last.weight * last.mask).T + last.bias).split(LATENT_DIM)
        gate = torch.sigmoid(raw + 2)
        jacobian = torch.autograd.functional.jacobian(
            lambda u, step=step: torch.cat(step.nn(u, context)), z.detach()
        )
        for half in jacobian.split(LATENT_DIM):  # strictly triangular in the order
            assert torch.equal(half[order][:, order].triu(), torch.zeros(LATENT_DIM, LATENT_DIM))
        z = gate * z + (1 - gate) * target
    return z


def test_the_flow_depends_on_its_context_and_reverses_its_order():
    posterior, output = build("iaf", num=1)
    assert [step.nn.permutation for step in posterior.steps] == [
        [0, 1, 2, 3],
        [3, 2, 1, 0],
        [0, 1, 2, 3],
    ]
    moved = output.clone()
    moved[:, 2 * LATENT_DIM :] += 1
    assert not torch.allclose(posterior.location(output), posterior.location(moved))
    torch.manual_seed(5)
    z = posterior.distribution(output).rsample()
    assert (z != posterior.location(output)).all()
    narrow = output.clone()
    narrow[:, LATENT_DIM : 2 * LATENT_DIM] = -1e4  # a start without spread lands on the location
    torch.testing.assert_close(
        posterior.distribution(narrow).rsample(), posterior.location(narrow), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", SPECS)
def test_densities_broadcast_over_particles_and_hold_at_any_value(name):
    posterior, output = build(name)
    expanded = posterior.distribution(output).expand((2, 3))
    z = expanded.rsample()
    assert z.shape == (2, 3, LATENT_DIM)
    remembered = expanded.log_prob(z)
    again = posterior.distribution(output).log_prob(z.detach().clone())
    torch.testing.assert_close(remembered, again, rtol=1e-9, atol=1e-9)
    alone = posterior.distribution(output[1]).log_prob(z[1, 1].detach().clone())
    torch.testing.assert_close(again[1, 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SPECS)
def test_scales_are_positive_however_extreme_the_encoder(name):
    posterior, output = build(name)
    for raw in (-1e4, 1e4):
        output[:, LATENT_DIM : 2 * LATENT_DIM] = raw
        z = posterior.distribution(output).rsample()
        assert posterior.distribution(output).log_prob(z.detach().clone()).isfinite().all()


@pytest.mark.float32
def test_a_double_precision_flow_can_be_inverted_under_a_single_precision_default():
    posterior = make_posterior(SPECS["iaf"], LATENT_DIM).double()
    output = torch.randn(2, posterior.num_parameters, dtype=torch.float64)
    z = posterior.distribution(output).rsample()
    remembered = posterior.distribution(output).log_prob(z.detach().clone())
    assert remembered.dtype == torch.float64
    assert remembered.isfinite().all()


@pytest.mark.parametrize("name", SPECS)
def test_a_posterior_is_rebuilt_from_its_config(name):
    posterior, output = build(name)
    again = make_posterior(json.loads(json.dumps(posterior.config)), LATENT_DIM)
    assert again.config == posterior.config == SPECS[name]
    again.load_state_dict(posterior.state_dict())
    assert torch.equal(again.location(output), posterior.location(output))
    assert make_posterior(posterior, LATENT_DIM) is posterior
    assert all(value.is_floating_point() for value in posterior.state_dict().values())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: make_posterior("normal", 2), ValueError, "choose one of"),
        (lambda: make_posterior({"name": "full", "rank": 1}, 2), TypeError, "rank"),
        (lambda: make_posterior(DiagonalPosterior(3), 2), ValueError, "latent_dim=2"),
        (lambda: LowRankPosterior(2, 0), ValueError, "rank"),
        (lambda: make_posterior("iaf", 1), ValueError, "posterior='diagonal'"),
        (lambda: InverseAutoregressivePosterior(2, 0), ValueError, "num_steps"),
        (lambda: InverseAutoregressivePosterior(2, context_dim=0), ValueError, "context_dim"),
        (lambda: DiagonalPosterior(0), ValueError, "latent_dim"),
        (lambda: cast(Any, Posterior)(2), TypeError, "abstract"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_one_more_output_is_not_taken():
    posterior, output = build("full")
    with pytest.raises(RuntimeError):
        posterior.distribution(output[:, 1:])
    assert posterior.num_parameters == 4 + 4 + 6
