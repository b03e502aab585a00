"""Small models against closed forms and a loop over outcomes."""

import itertools
import math

import torch

from pyro_vae.diagnostics.gradients import enumerated_bound
from pyro_vae.inference.log_weights import log_weights
from pyro_vae.models import BinaryLatents, RainforthToy

STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


def test_the_toy_starts_near_its_optimum():
    x = torch.randn(1, 20)
    toy = RainforthToy(x, distance=0.01)
    assert (toy.mu - x[0]).abs().max() < 0.06
    assert (toy.matrix @ x[0] + toy.shift - x[0]).abs().max() < 0.3
    assert not torch.equal(toy.mu.detach(), x[0])


def test_the_toys_gap_at_its_optimum_is_that_of_its_variance_only():
    x = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.0, -0.3]])
    toy = RainforthToy(x, distance=0.0)
    evidence = -0.5 * ((x - x.mean(0)).square() / 2 + math.log(4 * math.pi)).sum(1)
    kl = 3 * 0.5 * ((2 / 3) / 0.5 - 1 - math.log((2 / 3) / 0.5))  # of variances 2/3 and 1/2
    with torch.no_grad():
        drawn = log_weights(toy.model, toy.guide, x, 4000)
    error = drawn.std(0) / 4000**0.5
    away = (drawn.mean(0) - (evidence - kl)).abs()
    assert (away < STANDARD_ERRORS * error).all()
    assert ((drawn.mean(0) - evidence).abs() > STANDARD_ERRORS * error).all()


def test_binary_latents_have_the_elbo_of_a_loop_over_outcomes():
    pair = BinaryLatents()
    x = torch.bernoulli(torch.full((5, 8), 0.4))
    total = torch.zeros(5)
    for bits in itertools.product((0.0, 1.0), repeat=3):
        z = torch.tensor(bits)
        on_prior, on_guide = pair.prior.sigmoid(), pair.encoder(x).sigmoid()
        pixels = pair.decoder(z).sigmoid()
        p = torch.where(z > 0, on_prior, 1 - on_prior).prod()
        p = p * torch.where(x > 0, pixels, 1 - pixels).prod(1)
        q = torch.where(z > 0, on_guide, 1 - on_guide).prod(1)
        total = total + q * (p / q).log()
    found = enumerated_bound(pair.model, pair.guide, x)
    torch.testing.assert_close(found, total, rtol=1e-11, atol=1e-12)
