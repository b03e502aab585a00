"""Data drawn from a model, against its own law."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from closed_forms import linear_pair

from pyro_vae.inference.programs import ProgramError, program_scope, simulate

D, H = 5, 3
STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


@pytest.fixture
def linear():
    return linear_pair(D, H)


def test_simulated_data_follow_the_model(linear):
    with program_scope(0):
        drawn = simulate(linear.model, torch.zeros(3000, D))
    assert drawn.replaced
    data, z = drawn.arguments[0][0], drawn.latents["z"]
    residual = data - z @ linear.weight.T.detach() - linear.bias.detach()
    # The variance of 15000 draws has a relative standard error of sqrt(2/15000) = 0.0115.
    assert abs(residual.var() / 0.5 - 1) < STANDARD_ERRORS * 0.0115
    assert abs(z.var() - 1) < STANDARD_ERRORS * (2 / 9000) ** 0.5


def test_what_is_missing_from_the_data_is_missing_from_those_simulated(linear):
    x = torch.zeros(3000, D)
    x[::2, 1] = torch.nan

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            features = dist.Normal(z[..., None], torch.ones(D)).mask(~x.isnan())
            pyro.sample("x", features.to_event(1), obs=x)

    with program_scope(0):
        drawn = simulate(model, x)
    data = drawn.arguments[0][0]
    assert drawn.replaced
    assert torch.equal(data.isnan(), x.isnan())
    shown = data[~x.isnan()]  # of variance 2, and mean 0
    assert abs(shown.mean()) < STANDARD_ERRORS * (1 + 1 / D) ** 0.5 / 3000**0.5


def test_a_factor_cannot_be_simulated():
    def with_factor(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("score", -((x - z) ** 2))

    with pytest.raises(ProgramError, match=r"'score' is a pyro\.factor"), program_scope(0):
        simulate(with_factor, torch.zeros(3))


def test_deterministic_sites_stay_as_they_are():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = pyro.deterministic("mean", torch.stack([z, 2 * z], -1), event_dim=1)
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(1), obs=x)

    x = torch.ones(4, 2)
    with program_scope(0):
        drawn = simulate(model, x)
    assert drawn.replaced
    assert drawn.data["x"].shape == x.shape
    z = drawn.latents["z"]
    # Ten standard deviations of the noise.
    assert (drawn.data["x"] - torch.stack([z, 2 * z], -1)).abs().max() < 1.0
