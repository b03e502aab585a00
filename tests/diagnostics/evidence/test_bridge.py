"""Bridge sampling against closed forms."""

import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from closed_forms import exact_log_evidence, linear_pair
from scipy import optimize

from pyro_vae import log_evidence
from pyro_vae.diagnostics.evidence.bridge import bridge_evidence

N, D, H = 6, 5, 3
STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


@pytest.fixture
def linear():
    return linear_pair(D, H)


@pytest.fixture
def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(2)) * 1.5


def log_ratios(shift, chains, draws, data):
    """Posterior N(0, 1), proposal N(shift, 1), p(x) = e^3: log p(x, z) - log q(z) at both."""

    def ratio(z):
        return 3 - z**2 / 2 + (z - shift) ** 2 / 2

    posterior = ratio(torch.randn(chains, draws, data))
    return posterior, ratio(torch.randn(chains * draws, data) + shift)


def test_standard_errors_are_the_spread_over_data_and_cover_the_truth():
    value, error = bridge_evidence(*log_ratios(1.5, 2, 250, 400))
    scores = (value - 3) / error
    assert scores.abs().max() < STANDARD_ERRORS
    # The variance of 400 scores has a relative standard error of sqrt(2/399) = 0.07.
    assert abs(scores.var() - 1) < STANDARD_ERRORS * 0.07
    assert abs(scores.mean()) < STANDARD_ERRORS / math.sqrt(400)
    assert abs(((value - 3.05) / error).mean()) > STANDARD_ERRORS / math.sqrt(400)


def test_a_proposal_equal_to_the_posterior_is_exact_and_a_far_one_still_converges():
    value, error = bridge_evidence(*log_ratios(0.0, 2, 50, 3))
    assert value.tolist() == pytest.approx([3.0] * 3, abs=1e-10)
    assert (error < 1e-10).all()
    value, error = bridge_evidence(*log_ratios(4.0, 4, 2000, 5))
    assert ((value - 3).abs() < STANDARD_ERRORS * error).all()


def test_the_value_is_the_fixed_point_of_the_optimal_bridge():
    """Meng & Wong's equation, solved by bisection, and its error, with ArviZ's effective sizes."""
    posterior, proposed = log_ratios(1.0, 2, 150, 4)
    posterior = posterior.cumsum(1) / torch.arange(1, 151).sqrt()[:, None]  # chains that are slow
    value, error = bridge_evidence(posterior, proposed)
    for n in range(4):
        p, q = posterior[..., n].flatten().exp().numpy(), proposed[:, n].exp().numpy()
        effective = float(np.clip(az.ess(posterior[..., n].numpy(), method="bulk"), 1, len(p)))
        share = effective / (effective + len(q))

        def excess(log_r, p=p, q=q, share=share):
            r = np.exp(log_r)
            above = (q / (share * q + (1 - share) * r)).mean()
            return above / (r / (share * p + (1 - share) * r)).mean() - 1

        root = optimize.brentq(excess, -20, 20, xtol=1e-12)
        assert float(value[n]) == pytest.approx(root, abs=1e-8)
        assert abs(excess(root + 0.01)) > 1e-4
        r = np.exp(root)
        above, below = q / (share * q + (1 - share) * r), r / (share * p + (1 - share) * r)
        worth = float(az.ess(below.reshape(2, 150), method="bulk"))
        variances = (
            above.var(ddof=1) / above.mean() ** 2 / len(q),
            below.var(ddof=1) / below.mean() ** 2,
        )
        assert worth < 0.7 * len(p)
        assert float(error[n]) == pytest.approx(
            (variances[0] + variances[1] / worth) ** 0.5, rel=1e-4
        )


@pytest.mark.parametrize("proposal", ["guide", "normal"])
def test_linear_gaussian(linear, x, proposal):
    found = log_evidence(
        linear.model,
        linear.best_diagonal_guide,
        x,
        method="bridge",
        proposal=proposal,
        num_samples=150,
        num_warmup=150,
        num_leapfrog=6,
    )
    exact = exact_log_evidence(linear, x).numpy()
    assert (abs(found.log_evidence - exact) < STANDARD_ERRORS * found.log_evidence_se).all()
    assert (abs(found.log_evidence - exact - 0.5) > STANDARD_ERRORS * found.log_evidence_se).all()
    # A fitted normal is nearly the posterior, and its error small, if each draw meets its own.
    assert (found.log_evidence_se < (0.1 if proposal == "guide" else 0.03)).all()
    assert "no bound" in found.summary()


def test_without_a_guide_a_normal_is_fitted_and_bad_chains_are_told(linear, x):
    found = log_evidence(
        linear.model, None, x, method="bridge", num_samples=8, num_warmup=0, num_chains=2
    )
    assert found.provenance["config"]["proposal"] == "normal"
    assert found.log_evidence.notnull().all()
    assert "R-hat is above 1.05" in found.summary()


def test_masked_latents_are_left_out():
    data = torch.randn(3, 2)
    mask = torch.tensor([[True, True], [True, False], [True, True]])

    def model(x):
        with pyro.plate("data", 3, dim=-2), pyro.plate("parts", 2, dim=-1):
            with pyro.poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = log_evidence(
        model, None, data, method="bridge", num_samples=150, num_warmup=100, num_leapfrog=6
    )
    exact = (dist.Normal(0.0, 2**0.5).log_prob(data) * mask).sum(1).numpy()
    assert (abs(found.log_evidence - exact) < STANDARD_ERRORS * found.log_evidence_se).all()


def test_bad_proposal(linear, x):
    with pytest.raises(ValueError, match="'guide' or 'normal'"):
        log_evidence(linear.model, None, x, method="bridge", proposal="flow")
