"""Differentiable draws from programs against their closed-form laws."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.extras.f_divergence.generation import prior_predictive
from pyro_vae.inference.programs import ProgramError
from pyro_vae.models import VAE, Autoencoder

STANDARD_ERRORS = 5  # a two-sided failure rate of 6e-7 a number
NUM, DATA_DIM, LATENT_DIM = 20_000, 3, 2


@pytest.mark.parametrize("mean", [None, True])
def test_draws_and_means_have_the_laws_of_a_linear_model(mean):
    vae = VAE(DATA_DIM, LATENT_DIM, (), {"name": "gaussian", "scale": 0.8})
    weight, bias = vae.decoder[0].weight.detach(), vae.decoder[0].bias.detach()
    x = prior_predictive(vae.model, torch.zeros(NUM, DATA_DIM), mean=mean)
    assert x.shape == (NUM, DATA_DIM)
    noise = 0.0 if mean else 0.64
    cov = weight @ weight.T + noise * torch.eye(DATA_DIM)
    assert ((x.mean(0) - bias).abs() < STANDARD_ERRORS * (cov.diag() / NUM).sqrt()).all()
    error = ((cov.square() + cov.diag().outer(cov.diag())) / NUM).sqrt()
    assert ((x.T.cov() - cov).abs() < STANDARD_ERRORS * error).all()
    other = cov + (0.64 - 2 * noise) * torch.eye(DATA_DIM)  # that of the other kind
    assert ((x.T.cov() - other).abs() > STANDARD_ERRORS * error).any()
    (gradient,) = torch.autograd.grad(x.sum(), vae.decoder[0].bias)
    torch.testing.assert_close(gradient, torch.full((DATA_DIM,), float(NUM)))


def test_a_draw_moves_the_learned_scale_and_a_mean_does_not():
    vae = VAE(DATA_DIM, LATENT_DIM, (), "gaussian")
    for mean, moves in ((None, True), (True, False)):
        total = prior_predictive(vae.model, torch.zeros(50, DATA_DIM), mean=mean).square().sum()
        (gradient,) = torch.autograd.grad(total, vae.likelihood.raw_scale, allow_unused=True)
        assert (gradient is not None) == moves


def test_binary_pixels_give_their_means_and_grey_data_serve_for_their_shape():
    vae = VAE(DATA_DIM, LATENT_DIM, (4,))
    x = prior_predictive(vae.model, torch.full((40, DATA_DIM), 0.3))
    assert x.requires_grad
    assert bool(((x > 0) & (x < 1)).all())
    assert len(x.unique()) == x.numel()


def test_the_callers_world_stays_and_bare_parameters_are_reached():
    loc = pyro.param("loc", torch.zeros(2))

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            both = pyro.deterministic("both", torch.stack([z, z], -1))
            pyro.sample("x", dist.Normal(pyro.param("loc") + both, 0.1).to_event(1), obs=x)

    before, state = list(pyro.get_param_store()), torch.get_rng_state()
    first = prior_predictive(model, torch.zeros(5, 2))
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert torch.equal(prior_predictive(model, torch.ones(5, 2)), first)
    (gradient,) = torch.autograd.grad(first.sum(), loc)
    assert gradient.tolist() == [5.0, 5.0]
    prior_predictive(VAE(2, 1, (3,)).model, torch.zeros(4, 2))
    assert list(pyro.get_param_store()) == before


def twice_observed(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)


def subsampling(x):
    with pyro.plate("rows", len(x), subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[rows])


def discrete(x):
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (twice_observed, torch.zeros(5), "this one has 2"),
        (subsampling, torch.zeros(5), "subsampling"),
        (discrete, torch.zeros(5), "'k'"),
        (VAE(3, 2, (4,), prior="mixture").double().model, torch.zeros(5, 3).double(), "'z'"),
        (VAE(3, 2, (4,), "categorical").double().model, torch.zeros(5, 3).double(), "mean of"),
        (
            Autoencoder(3, 2, (4,), "contractive").double().model,
            torch.zeros(5, 3).double(),
            "factor",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(model, x, message):
    with pytest.raises(ProgramError, match=message):
        prior_predictive(model, x)


def test_a_draw_of_binary_pixels_is_refused():
    with pytest.raises(ProgramError, match="mean=True"):
        prior_predictive(VAE(3, 2, (4,)).model, torch.zeros(5, 3), mean=False)
    prior_predictive(VAE(3, 2, (4,)).model, torch.zeros(5, 3), mean=True)
