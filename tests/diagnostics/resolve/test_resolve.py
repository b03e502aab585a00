"""The ladder: formulas against closed forms, and what passes against exact posteriors."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad

from pyro_vae import LinearGaussian, to_arviz
from pyro_vae.diagnostics.resolve import RUNGS, resolve
from pyro_vae.inference.log_weights import pareto_khat
from pyro_vae.inference.refit import Normal, WeightedDraws, batch_and_match, match_moments
from pyro_vae.inference.refit.normals import _match
from pyro_vae.inference.tempered import Point

NAMES = [rung.name for rung in RUNGS]


def normal_target(num_data, dim):
    """Normal posteriors of unequal scales, their log joints and scores."""
    root = torch.randn(num_data, dim, dim) * torch.logspace(-2, 1, dim)
    covariance = root @ root.mT + 0.01 * torch.eye(dim)
    loc, precision = 5 * torch.randn(num_data, dim), torch.linalg.inv(covariance)

    def log_joint(u):
        return 3.0 - 0.5 * torch.einsum("cni,nij,cnj->cn", u - loc, precision, u - loc)

    def target(u):
        value = log_joint(u)
        score = -torch.einsum("nij,cnj->cni", precision, u - loc)
        return Point(u, value, score, value, value)

    return loc, covariance, log_joint, target


def standard(num_data, dim):
    return Normal(torch.zeros(num_data, dim), torch.eye(dim).expand(num_data, dim, dim))


def test_a_normal_posterior_is_matched_exactly():
    loc, covariance, log_joint, target = normal_target(num_data=7, dim=5)
    found = batch_and_match(target, standard(7, 5))
    assert torch.allclose(found.loc, loc, rtol=1e-8)
    size = covariance.abs().amax((1, 2))
    assert ((found.chol @ found.chol.mT - covariance).abs().amax((1, 2)) < 1e-9 * size).all()
    u = found.draw(100)
    assert (log_joint(u) - found.log_prob(u)).std(0).max() < 1e-8


def test_an_update_solves_its_equation():
    _, _, _, target = normal_target(num_data=3, dim=4)
    now = Normal(torch.randn(3, 4), torch.linalg.cholesky(torch.eye(4) + torch.ones(3, 4, 4) / 2))
    u, step = now.draw(6), 0.7
    scores = target(u).gradient + torch.randn(6, 3, 4)
    moved = _match(now, u, scores, step)
    share, s = step / (1 + step), moved.chol @ moved.chol.mT
    for n in range(3):
        g, z = scores[:, n], u[:, n]
        big_u = step * torch.cov(g.T, correction=0) + share * torch.outer(g.mean(0), g.mean(0))
        shift = now.loc[n] - z.mean(0)
        big_v = (now.chol @ now.chol.mT)[n] + step * torch.cov(z.T, correction=0)
        big_v = big_v + share * torch.outer(shift, shift)
        assert torch.allclose(s[n] @ big_u @ s[n] + s[n], big_v, rtol=1e-9)
        loc = (1 - share) * now.loc[n] + share * (s[n] @ g.mean(0) + z.mean(0))
        assert torch.allclose(moved.loc[n], loc, rtol=1e-9)


def test_moments_are_matched_with_the_right_density():
    covariance = torch.diag_embed(torch.rand(6, 3) + 0.5) + 0.3
    loc = torch.randn(6, 3)
    exact = Normal(loc, torch.linalg.cholesky(covariance))
    poor = Normal(loc + 1.5, 0.5 * exact.chol)
    u = poor.draw(1000)
    before = WeightedDraws(u, exact.log_prob(u) + 2.0, poor.log_prob(u))
    after = match_moments(lambda at: exact.log_prob(at) + 2.0, before, enough=0.5)
    assert pareto_khat(before.log_weights).median() > 0.7
    assert pareto_khat(after.log_weights).max() <= 0.5
    evidence = after.log_weights.logsumexp(0) - math.log(1000)
    error = (after.log_weights - evidence).exp().std(0) / math.sqrt(1000)
    assert ((evidence - 2.0).abs() < 5 * error).all()


def test_an_exact_guide_stays_on_the_first_rung():
    model = LinearGaussian(data_dim=3, latent_dim=2)
    x = torch.randn(6, 3)
    found = resolve(model.model, model.exact_guide, x, num_draws=600, progress=False)
    assert found.rung.tolist() == [0] * 6
    exact = model.log_evidence(x)
    assert torch.allclose(torch.as_tensor(found.result["log_evidence"].values), exact)
    assert found.latents["z"].shape == (600, 6, 2)
    assert to_arviz(found)["posterior"]["z"].shape[-2:] == (6, 2)


def counts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(z), obs=x)


def poor_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.LogNormal(0.2 * torch.log1p(x), 0.4))


def test_a_poor_guide_is_resolved_to_the_exact_posterior():
    x = torch.tensor([0.0, 1.0, 2.0, 4.0, 9.0])
    found = resolve(counts, poor_guide, x, num_draws=1000, progress=False)
    assert found.unresolved == []
    assert found.rung.max() > 0
    z = found.latents["z"]
    shape = 2 + x  # the posterior is Gamma(2 + x, 2)
    ess = torch.as_tensor(found.result["ess"].values)
    assert ((z.mean(0) - shape / 2).abs() < 4.5 * shape.sqrt() / 2 / ess.sqrt()).all()
    exact = torch.lgamma(2 + x) - torch.lgamma(x + 1) - (2 + x) * math.log(2)
    error = torch.as_tensor(found.result["log_evidence_se"].values)
    assert ((torch.as_tensor(found.result["log_evidence"].values) - exact).abs() < 5 * error).all()


def two_modes(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)


def one_mode(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.sqrt(), 0.05 / x.sqrt()))


def test_a_mode_that_the_guide_never_visits_is_found():
    x = torch.tensor([1.0, 2.0])
    found = resolve(two_modes, one_mode, x, num_draws=1000, progress=False)
    # The weights alone say nothing: the guide is nearly exact on its own side.
    assert NAMES[int(found.rung.min())] not in ("guide", "importance resampling")
    for n in range(2):
        log_p = lambda z, n=n: -0.5 * z**2 - 50 * (float(x[n]) - z**2) ** 2  # noqa: E731
        total = 2 * quad(lambda z, f=log_p: math.exp(f(z)), 0, 4, points=[float(x[n]) ** 0.5])[0]
        exact = math.log(total / (2 * math.pi * 0.1))
        side = (found.latents["z"][:, n] > 0).double().mean()
        assert abs(float(found.result["log_evidence"][n]) - exact) < 0.2
        assert 0.35 < side < 0.65


def test_what_cannot_be_resolved_is_named():
    """With no time for a second rung, a guide that is wrong gives nothing usable."""
    found = resolve(counts, poor_guide, torch.tensor([9.0]), budget=1e-9, progress=False)
    assert found.unresolved == [0]
    assert "no usable draws" in found.table()
    assert "No rung gave usable draws for datum 0" in str(found.result)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_draws": 10}, "num_draws must be an integer from 200"),
        ({"budget": 0.0}, "budget is in seconds"),
        ({"max_memory": 0.0}, "max_memory is in GiB"),
    ],
)
def test_settings_out_of_range_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        resolve(counts, poor_guide, torch.ones(2), **given)
