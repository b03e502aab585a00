"""Fitting methods other than noisy gradients, beside closed forms and quadrature."""

import math
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch.distributions import constraints

from pyro_vae import fit
from pyro_vae.inference.mcmc import sample_posterior
from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.svi import METHODS, CheckpointError
from pyro_vae.inference.svi.methods.batch_and_match import BatchAndMatchRule
from pyro_vae.inference.svi.methods.deterministic import DeterministicRule, balanced_noise

N, D = 20, 3


def design(rows, columns, noise):
    return torch.randn(rows, 1) + noise * torch.randn(rows, columns)


def regression():
    """A normal posterior whose sds are three times those of its mean-field approximation."""
    x = design(N, D, 0.25)
    y = x @ torch.tensor([1.0, -0.5, 0.2]) + torch.randn(N)

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(D), 2.0).to_event(1))
        w = w[..., 0, :] if w.dim() > 1 else w
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(w @ x.T, 1.0), obs=y)

    precision = x.T @ x + torch.eye(D) / 4
    covariance = precision.inverse()
    return model, y, covariance @ x.T @ y, covariance, precision


def counts():
    """A posterior that is not normal, of two latents, with its moments by quadrature."""
    x = design(60, 2, 0.2)
    y = torch.poisson((0.3 + x @ torch.tensor([0.4, 0.3])).exp())

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        w = w[..., 0, :] if w.dim() > 1 else w
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Poisson((0.3 + w @ x.T).exp()), obs=y)

    line = torch.linspace(-4.0, 4.0, 401)
    grid = torch.cartesian_prod(line, line)
    logits = 0.3 + grid @ x.T
    log_p = (logits * y - logits.exp()).sum(-1) - 0.125 * grid.square().sum(-1)
    mass = (log_p - log_p.logsumexp(0)).exp()
    mean = mass @ grid
    sd = (mass @ (grid - mean).square()).sqrt()
    return model, y, mean, sd


def column(found, name):
    return torch.tensor(found.posterior[name].values)


# --- deterministic --------------------------------------------------------------------------------


def test_a_normal_posterior_is_exact_and_linear_response_knows_its_covariance():
    model, y, mean, covariance, precision = regression()
    found = fit(model, AutoNormal(model), y, method="deterministic")
    exact = covariance.diagonal().sqrt()
    assert found.convergence.converged
    assert found.convergence.gain_nats < 1e-20
    torch.testing.assert_close(column(found, "mean"), mean)
    torch.testing.assert_close(column(found, "sd"), precision.diagonal().rsqrt())
    assert (exact / column(found, "sd")).min() > 2.5  # what mean field loses
    torch.testing.assert_close(column(found, "linear_response_covariance"), covariance)
    torch.testing.assert_close(column(found, "linear_response_sd"), exact)
    assert column(found, "mean_se").max() < 1e-8
    locs = found.parameters["AutoNormal.locs.w"]
    torch.testing.assert_close(locs, mean)
    assert found.config["fit"]["method"] == "deterministic"
    assert found.config["fit"]["num_draws"] == 30
    assert found.config["fit"]["optimizer"] is None
    assert len(found.history.epoch) == found.convergence.steps


def test_a_full_covariance_is_exact_with_more_draws_than_latents():
    model, y, mean, covariance, _ = regression()
    found = fit(model, AutoMultivariateNormal(model), y, method="deterministic", num_draws=D + 1)
    torch.testing.assert_close(column(found, "mean"), mean)
    torch.testing.assert_close(column(found, "sd"), covariance.diagonal().sqrt())
    torch.testing.assert_close(column(found, "linear_response_covariance"), covariance)


def test_linear_response_mends_sds_that_mean_field_gets_wrong():
    model, y, mean, sd = counts()
    starts = [
        AutoNormal(model),
        AutoNormal(
            model, init_scale=2.0, init_loc_fn=init_to_value(values={"w": torch.tensor([2.0, -3])})
        ),
    ]
    found, other = (fit(model, guide, y, method="deterministic") for guide in starts)
    assert (column(found, "mean") - column(other, "mean")).abs().max() < 1e-12
    assert (column(found, "sd") - column(other, "sd")).abs().max() < 1e-12
    assert (sd / column(found, "sd")).min() > 3
    assert (column(found, "linear_response_sd") / sd - 1).abs().max() < 0.05
    assert ((column(found, "mean") - mean) / sd).abs().max() < 0.1


def test_a_hand_written_guide_and_the_model_s_own_parameter():
    """E log N(x; z, s) N(z; 0, 1) under N(m, v): z | x is normal, and s maximises the evidence."""
    x = torch.tensor([0.7, -1.9, 2.4, 3.0, -0.2])

    def model(x):
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, s))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(5))
        scale = pyro.param("scale", torch.ones(5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    found = fit(model, guide, x, method="deterministic")
    variance = float(x.square().mean()) - 0.25  # of the evidence N(0, s^2 + 0.25)
    shrink = variance / (variance + 0.25)
    torch.testing.assert_close(found.parameters["s"], torch.tensor(math.sqrt(variance)))
    torch.testing.assert_close(column(found, "mean"), shrink * x)
    expected = torch.full((5,), math.sqrt(shrink * 0.25))
    torch.testing.assert_close(column(found, "sd"), expected)
    torch.testing.assert_close(column(found, "linear_response_sd"), expected)  # given s


def log_normal_pair(family):
    def model(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("rate", family(loc, scale))

    return model, guide


@pytest.mark.float32
def test_a_log_normal_in_single_precision_reaches_its_optimum():
    """Of Gamma(12, 4) by LogNormal(m, s): with k = 12, k = 4 exp(m + s^2 / 2) and s^2 = 1 / k."""
    model, guide = log_normal_pair(dist.LogNormal)
    found = fit(model, guide, torch.tensor([3.0, 4.0, 3.0]), method="deterministic", num_draws=2000)
    assert found.convergence.converged
    assert float(found.parameters["scale"]) == pytest.approx(12**-0.5, rel=0.02)
    expected = math.log(3.0) - 1 / 24
    assert float(found.parameters["loc"]) == pytest.approx(expected, abs=0.01)
    assert float(column(found, "mean")) == pytest.approx(3.0, abs=0.02)


def dependent(x):
    loc = pyro.param("loc", torch.zeros(2))
    a = pyro.sample("a", dist.Normal(loc[0], 1.0))
    pyro.sample("b", dist.Normal(loc[1] + pyro.param("slope", torch.tensor(0.0)) * a, 1.0))


def two(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


@pytest.mark.parametrize(
    ("guide", "options", "says"),
    [
        (AutoMultivariateNormal(two), {"num_draws": 2}, "no optimum on 2 fixed draws of 2 latents"),
        (AutoLowRankMultivariateNormal(two), {}, "is LowRankMultivariateNormal and no"),
        (AutoIAFNormal(two), {}, "it is a flow, or a support"),
        (dependent, {}, "too expressive for fixed draws"),
        (AutoNormal(two), {"num_draws": 1}, "num_draws must be an integer from 2"),
        (AutoNormal(two), {"epochs": 5}, "has no use for epochs"),
        (AutoNormal(two), {"batch_size": 2}, "has no use for batch_size"),
        (AutoNormal(two), {"num_paths": 2}, "num_paths is of method='pathfinder'"),
        (None, {}, "method='deterministic' needs a guide"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_what_fixed_draws_refuse(guide, options, says):
    with pytest.raises((ProgramError, ValueError), match=says):
        fit(two, guide, torch.ones(3), method="deterministic", **options)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="must be one of svi, deterministic, pathfinder, batch"):
        fit(two, AutoNormal(two), torch.ones(3), method="advi")
    with pytest.raises(ValueError, match="pass a loss with as many particles"):
        fit(two, AutoNormal(two), torch.ones(3), num_draws=30)


@pytest.mark.parametrize(("count", "dim"), [(30, 4), (6, 5), (4, 9)])
def test_fixed_draws_are_balanced(count, dim):
    noise = balanced_noise(count, dim, 3)
    torch.testing.assert_close(noise.mean(0), torch.zeros(dim))
    second = noise.T @ noise / count
    expected = torch.eye(dim) if count > dim else second - second.diagonal().diag() + torch.eye(dim)
    torch.testing.assert_close(second, expected)


# --- pathfinder, batch and match ------------------------------------------------------------------


@pytest.mark.parametrize("guide", [None, AutoNormal, AutoDiagonalNormal])
def test_batch_and_match_meets_a_normal_posterior(guide):
    model, y, mean, covariance, _ = regression()
    made = guide and guide(model)
    found = fit(model, made, y, method="batch_and_match")
    sd = covariance.diagonal().sqrt()
    assert found.convergence.converged
    torch.testing.assert_close(column(found, "mean"), mean)
    torch.testing.assert_close(column(found, "sd"), sd)
    parameters = {name.rpartition("Normal.")[2]: v for name, v in found.parameters.items()}
    if guide is None:  # the whole covariance is in the guide
        chol = parameters["scale"][:, None] * parameters["scale_tril"]
        torch.testing.assert_close(chol @ chol.T, covariance)
    else:
        torch.testing.assert_close(parameters.get("scale", parameters.get("scales.w")), sd)


@pytest.mark.parametrize("num_paths", [1, 6])
def test_pathfinder_meets_a_normal_posterior(num_paths):
    model, y, mean, covariance, _ = regression()
    found = fit(model, None, y, method="pathfinder", num_paths=num_paths)
    sd = covariance.diagonal().sqrt()
    draws = column(found, "draws")
    assert draws.shape == (1000, D)
    # Five standard errors of a thousand draws; L-BFGS has seen no more than a dozen gradients.
    assert ((column(found, "mean") - mean) / sd).abs().max() < 0.2
    if num_paths > 1:
        assert ((column(found, "mean") - mean) / sd).abs().max() < 5 / math.sqrt(1000)
        assert (column(found, "sd") / sd - 1).abs().max() < 5 / math.sqrt(2000)
        assert float(found.posterior.khat) < 0.5
    assert len(found.posterior.elbo) == num_paths


def test_what_they_find_starts_svi_and_chains():
    model, y, mean, sd = counts()
    first = fit(model, None, y, method="pathfinder")
    second = fit(first.model, first.guide, y, method="batch_and_match")
    third = fit(second.model, second.guide, y, epochs=1, learning_rate=1e-6)
    before, after = second.parameters, third.parameters
    moved = {name: float((before[name] - after[name]).abs().max()) for name in before}
    assert max(moved.values()) < 1e-5  # it went on from there
    assert ((column(second, "mean") - mean) / sd).abs().max() < 0.15
    chains = sample_posterior(
        second.model, y, guide=second.guide, num_warmup=50, num_samples=50, progress=False
    )
    found = chains.draws["w"].flatten(0, 1).mean(0)
    assert ((found - mean) / sd).abs().max() < 1.0


def test_priors_without_draws_have_a_place_to_start():
    """A flat mean of normal data."""
    x = 3.0 + 2.0 * torch.randn(30)

    def model(x):
        mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), (1,)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean[..., 0], 2.0), obs=x)

    found = fit(model, None, x, method="batch_and_match")
    torch.testing.assert_close(column(found, "mean"), x.mean()[None])
    torch.testing.assert_close(column(found, "sd"), torch.tensor([2.0 / math.sqrt(30)]))


def test_other_guides_are_refused():
    model, guide = log_normal_pair(dist.LogNormal)
    with pytest.raises(ProgramError, match="must be one of AutoMultivariateNormal, AutoDiagonal"):
        fit(model, guide, torch.ones(3), method="pathfinder")


# --- the loop around them -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["deterministic", "pathfinder", "batch_and_match"])
def test_a_run_goes_on_from_its_folder(method, tmp_path, monkeypatch):
    model, y, _, _ = counts()
    whole = fit(model, AutoNormal(model), y, method=method)
    if method != "pathfinder":  # which makes one step
        stop_at(METHODS[method], 4, monkeypatch)
        cut = fit(model, AutoNormal(model), y, method=method, checkpoint=tmp_path)
        assert (cut.status, cut.convergence.steps) == (
            "interrupted",
            3,
        )  # the fourth is made, and noted on
        monkeypatch.undo()
    for _ in range(2):  # the second time there is nothing left to do
        again = fit(model, AutoNormal(model), y, method=method, checkpoint=tmp_path, resume=True)
        assert again.convergence.steps == whole.convergence.steps
        for name, value in whole.posterior.data_vars.items():
            assert (again.posterior[name].values == value.values).all()
    with pytest.raises(CheckpointError, match="resume with the same setting"):
        fit(model, AutoNormal(model), y, checkpoint=tmp_path, resume=True)


def stop_at(row, count, monkeypatch):
    """Presses Ctrl-C in a step of a method."""
    rule = {"deterministic": DeterministicRule, "batch_and_match": BatchAndMatchRule}[row.name]
    advance = rule.advance

    def stopping(self, *args, **kwargs):
        if self.state.steps == count - 1:
            signal.raise_signal(signal.SIGINT)
        return advance(self, *args, **kwargs)

    monkeypatch.setattr(rule, "advance", stopping)


def test_every_row_says_what_it_is():
    for name, row in METHODS.items():
        assert row.name == name
        assert all((row.reference, row.requirement, row.refusal))
