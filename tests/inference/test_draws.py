"""Draws from the guide and from its predictive distribution, against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_vae import log_weights
from pyro_vae.inference.draws import draw_posterior, flat_latents, latent_names
from pyro_vae.inference.predictive import draw_predictive
from pyro_vae.models import LinearGaussian

N, D, H = 4, 3, 2
STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


@pytest.fixture
def linear():
    weight = torch.tensor([[1.0, 0.2], [-0.5, 0.7], [0.3, 0.4]])
    return LinearGaussian.from_parameters(weight, torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.5))


@pytest.fixture
def x():
    return torch.linspace(-2, 2, N * D).reshape(N, D)


def test_draws_of_the_exact_guide_have_the_exact_moments(linear, x):
    found = draw_posterior(linear.model, linear.exact_guide, x, num_draws=4000, seed=3)
    weight, noise = linear.weight.detach(), 0.5
    precision = weight.T @ weight + noise * torch.eye(H)
    mean = (x - linear.bias.detach()) @ weight @ precision.inverse()
    covariance = noise * precision.inverse()
    z = found.latents["z"]
    assert z.shape == (4000, N, H)
    error = (covariance.diagonal() / 4000).sqrt()
    assert ((z.mean(0) - mean).abs() < STANDARD_ERRORS * error).all()
    # Constant weights: the log evidence, which is also log p(x | z) + log p(z) - log q(z | x).
    law = dist.MultivariateNormal(linear.bias.detach(), weight @ weight.T + noise * torch.eye(D))
    assert torch.allclose(found.log_weights, law.log_prob(x).expand(4000, N), atol=1e-10)
    likelihood = dist.Normal(z @ weight.T + linear.bias.detach(), noise**0.5).log_prob(x).sum(-1)
    assert torch.allclose(found.log_likelihood["x"], likelihood, atol=1e-10)


def test_draws_in_parts_have_all_draws(linear, x):
    found = draw_posterior(
        linear.model, linear.exact_guide, x, num_draws=7, max_memory=1e-9, seed=3
    )
    assert found.latents["z"].shape == (7, N, H)
    assert found.log_likelihood["x"].shape == (7, N)
    assert found.latents["z"].unique().numel() == 7 * N * H


def test_the_log_weights_are_those_of_the_primitive(linear, x):
    found = draw_posterior(linear.model, linear.guide, x, num_draws=5, seed=3)
    assert torch.equal(
        found.log_weights.detach(),
        log_weights(linear.model, linear.guide, x, num_particles=5, seed=3).detach(),
    )


def test_the_predictive_has_the_variance_of_posterior_and_noise(linear, x):
    draws = draw_posterior(linear.model, linear.exact_guide, x, num_draws=4000, seed=3)
    drawn = draw_predictive(linear.model, draws, x, seed=4).values["x"]
    assert drawn.shape == (4000, N, D)
    weight, noise = linear.weight.detach(), 0.5
    posterior = noise * (weight.T @ weight + noise * torch.eye(H)).inverse()
    variance = (weight @ posterior @ weight.T).diagonal() + noise
    relative = drawn.var(0) / variance - 1
    assert (relative.abs() < STANDARD_ERRORS * (2 / 4000) ** 0.5).all()
    # Draws, not the data: the observed values would have no variance at all.
    assert (drawn[0] != x).all()


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        mean = pyro.deterministic("mean", x @ weight.mT if weight.dim() > 1 else x @ weight)
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def flat_regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * weight).sum(-1), scale), obs=y)


@pytest.mark.parametrize("model", [regression, flat_regression])
def test_global_latents_jointly(model):
    guide = AutoNormal(model)
    data = torch.randn(5, 2), torch.randn(5)
    found = draw_posterior(model, guide, data, num_draws=6, joint=True)
    assert found.latents["weight"].shape == (6, 2)
    assert found.latents["scale"].shape == (6,)
    assert found.log_weights.shape == (6, 1)
    assert found.log_likelihood["y"].shape == (6, 5)
    flat = flat_latents(found.latents, joint=True)
    assert flat.shape == (6, 1, 3)
    assert latent_names(found.latents, joint=True) == ["weight[0]", "weight[1]", "scale"]
    weight, scale = found.latents["weight"], found.latents["scale"]
    expected = dist.Normal(weight @ data[0].T, scale[:, None]).log_prob(data[1])
    assert torch.allclose(found.log_likelihood["y"], expected, atol=1e-10)
    assert draw_predictive(model, found, data).values["y"].shape == (6, 5)


def test_inner_plates_stand_behind_the_data():
    x = torch.randn(N, 3)

    def model(x):
        with pyro.plate("data", N, dim=-2), pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", N, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("z", dist.Normal(x, 1e-9))

    found = draw_posterior(model, guide, x, num_draws=5)
    assert found.latents["z"].shape == (5, N, 3)
    assert torch.allclose(found.latents["z"], x.expand(5, N, 3), atol=1e-7)
    assert latent_names(found.latents, joint=False) == ["z[0]", "z[1]", "z[2]"]
    expected = dist.Normal(found.latents["z"], 1.0).log_prob(x)
    assert torch.allclose(found.log_likelihood["x"], expected)


def test_one_draw_of_a_program_that_cannot_be_vectorised_and_bad_numbers(linear, x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            table = torch.tensor([0.0, 3.0])
            pyro.sample("x", dist.Normal(torch.stack([table[int(i)] for i in z]), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.3))

    found = draw_posterior(model, guide, x[:, 0], num_draws=3)
    assert found.latents["z"].shape == (3, N)
    assert flat_latents(found.latents, joint=False).shape == (3, N, 1)
    one = draw_posterior(linear.model, linear.exact_guide, x, num_draws=1)
    assert one.latents["z"].shape == (1, N, H)
    for wrong in (0, -1, True):
        with pytest.raises(ValueError, match="num_draws must be an integer from 1"):
            draw_posterior(linear.model, linear.exact_guide, x, num_draws=wrong)
    with pytest.raises(ValueError, match="max_memory"):
        draw_posterior(linear.model, linear.exact_guide, x, max_memory=0)


def test_draws_print_short_whatever_their_number(linear, x):
    drawn = draw_posterior(linear.model, linear.exact_guide, x, num_draws=500, seed=3)
    lines = repr(drawn).splitlines()
    assert lines[0] == f"PosteriorDraws: 500 draws for each of {N} data, from the guide, seed 3"
    assert lines[1:3] == [f"  latents: z [500, {N}, {H}]", f"  data: x [{N}, {D}]"]
    # The exact posterior has constant weights, so that every draw counts in full.
    assert lines[3] == "  effective draws by the weights: 500 to 500 of a datum"
    assert len(lines) == 4
    assert "resampled by their weights" in repr(drawn.resampled(7))
    predicted = draw_predictive(linear.model, drawn, x)
    assert repr(predicted).startswith(f"PredictiveDraws(values={{x: [500, {N}, {D}]}}, ")
    assert "tensor" not in repr(predicted)


def test_joint_draws_have_one_posterior(x):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    drawn = draw_posterior(model, AutoNormal(model), x, num_draws=6, joint=True)
    assert repr(drawn).startswith("PosteriorDraws: 6 joint draws, from the guide, seed 0\n")
