"""Several runs of `fit` beside posteriors with two modes, and with one that is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import nn
from torch.distributions import constraints

from pyro_vae import VAE, GaussianMixture, fit, fit_em, log_weights
from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.svi import CheckpointError

X = torch.tensor([4.2, 3.7, 4.4, 3.9, 3.3], dtype=torch.float64)
GRID = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])
QUICK = {
    "loss": Trace_ELBO(num_particles=8, vectorize_particles=True),
    "epochs": 300,
    "learning_rate": lambda epoch: 0.2 * 0.98**epoch,
    "evaluate_every": 300,
    "progress": False,
}


def squares(x):
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)


def one_mode(x):
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def test_the_mixture_of_two_modes_has_the_bound_of_quadrature():
    """Beside the integral over a grid; 4.4 standard errors are passed once in 10^5 each."""
    found = fit(squares, one_mode, X, restarts=4, seed=1, **QUICK)
    log_p = dist.Normal(0.0, 2.0).log_prob(GRID)
    log_p = log_p + dist.Normal(GRID[:, None] ** 2, 1.0).log_prob(X).sum(1)
    values = [run.parameters for run in found.restarts.runs]
    log_q = torch.stack([dist.Normal(v["loc"], v["scale"]).log_prob(GRID) for v in values])
    assert {round(float(v["loc"])) for v in values} == {-2, 2}  # both modes are found
    elbos = (log_q.exp() * (log_p - log_q)).sum(1) * STEP
    mixed = log_q.logsumexp(0) - math.log(4)
    exact = float((mixed.exp() * (log_p - mixed)).sum() * STEP)
    draws = log_weights(
        found.model, found.restarts.mixture, X, 4000, joint=True, seed=0
    ).detach()  # fmt: skip
    assert abs(float(draws.mean()) - exact) < 4.4 * float(draws.std()) / math.sqrt(4000)
    table, kept = found.restarts.table, found.restarts.kept
    errors = 4.4 * torch.as_tensor(table.bound_se.values)
    assert (abs(torch.as_tensor(table.bound.values) - elbos) < errors).all()
    gain = exact - float(elbos[kept])
    assert gain > 0.5  # log 2 - KL of the modes' weights from 1/2, less what overlaps
    assert abs(float(table.mixture_gain) - gain) < 4.4 * float(table.mixture_gain_se)
    assert float(table.rhat.sel(quantity="latents")) > 1.3
    assert float(table.rhat.sel(quantity="bound")) < 1.1
    assert "different modes" in table.summary()
    assert table.kept.values.tolist() == [place == kept for place in range(4)]
    assert float(found.parameters["loc"]) == float(values[kept]["loc"])


def test_a_run_that_ends_too_low_is_seen_and_not_kept():
    """A minor mode that a guide cannot leave: bounds differ by the log of the modes' masses."""

    def uneven(x):
        z = pyro.sample("z", dist.Normal(0.5, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)

    found = fit(uneven, one_mode, X, restarts=4, seed=1, **QUICK)
    table = found.restarts.table
    locs = [float(run.parameters["loc"]) for run in found.restarts.runs]
    assert found.parameters["loc"] > 0 > min(locs)
    assert float(table.rhat.sel(quantity="bound")) > 1.3
    lost = float(table.bound.max() - table.bound.min())
    assert abs(lost - 2 * 1.96 * 0.5 / 4) < 0.05  # the ratio of prior densities at +-1.96
    assert "different bounds" in table.summary()


def straight(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_runs_that_agree_say_so_and_gain_nothing():
    found = fit(straight, AutoNormal(straight), X, restarts=2, **QUICK)
    table = found.restarts.table
    assert (table.rhat.values < 1.05).all()
    assert abs(float(table.mixture_gain)) < 4.4 * float(table.mixture_gain_se) + 1e-3
    assert float(table.mixture_gain_se) < 0.01
    assert "all runs agree" in table.summary()
    exact = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + 1).log_prob(X)
    assert (abs(torch.as_tensor(table.bound.values) - exact) < 0.01).all()


def test_each_datum_has_a_mixture_of_its_own():
    """Signs of 6 data at 3 starts: the gain of each datum is that of quadrature, in the mean."""
    x = torch.tensor([4.0, 9.0, 6.0, 5.0, 8.0, 7.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(len(x)) + 0.1)
        scale = pyro.param("scale", torch.ones(len(x)) / 4, constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    found = fit(model, guide, x, restarts=3, seed=2, **QUICK)
    grid = GRID[:, None]
    log_p = dist.Normal(0.0, 2.0).log_prob(grid) + dist.Normal(grid**2, 1.0).log_prob(x)
    values = [run.parameters for run in found.restarts.runs]
    log_q = torch.stack([dist.Normal(v["loc"], v["scale"]).log_prob(grid) for v in values])
    mixed = log_q.logsumexp(0) - math.log(3)
    elbos = (log_q.exp() * (log_p - log_q)).sum(1).mean(1) * STEP
    exact = float(((mixed.exp() * (log_p - mixed)).sum(0) * STEP).mean())
    table = found.restarts.table
    gain = exact - float(elbos[found.restarts.kept])
    assert abs(float(table.mixture_gain) - gain) < 4.4 * float(table.mixture_gain_se)
    assert gain > 0.2
    assert float(table.rhat.sel(quantity="latents")) > 1.3
    assert table.bound.attrs["reduction"] == "per datum"


# --- starts, what is left behind ------------------------------------------------------------------


def test_the_first_run_is_the_single_one_and_the_others_start_elsewhere():
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(0)
    models = [VAE(data_dim=3, latent_dim=2, hidden=(4,), likelihood="gaussian").double()]
    models.append(VAE(data_dim=3, latent_dim=2, hidden=(4,), likelihood="gaussian").double())
    models[1].load_state_dict(models[0].state_dict())
    single = fit(models[0], x, epochs=2, progress=False)
    several = fit(models[1], x, epochs=2, restarts=3, progress=False)
    runs = several.restarts.runs
    for name, value in single.parameters.items():
        assert torch.equal(value, runs[0].parameters[name])
        assert not torch.equal(value, runs[1].parameters[name])
        assert not torch.equal(runs[2].parameters[name], runs[1].parameters[name])
    kept = runs[several.restarts.kept]
    named = dict(models[1].named_parameters())
    assert named
    held = [v for v in kept.parameters.values()]
    assert all(any(torch.equal(p, v) for v in held) for p in named.values())
    assert "the best of 3 runs" in several.summary()


def test_random_starts_of_bare_parameters_are_left_as_they_are_drawn():
    def guide(x):
        loc = pyro.param("loc", lambda: 100 + torch.randn(()))
        fixed = pyro.param("fixed", lambda: torch.tensor(0.5))
        pyro.sample("z", dist.Normal(loc - 100 + fixed, 1.0))

    found = fit(straight, guide, X, restarts=3, epochs=1, learning_rate=1e-9, progress=False)
    locs = [float(run.parameters["loc"]) for run in found.restarts.runs]
    fixed = [float(run.parameters["fixed"]) for run in found.restarts.runs]
    assert all(abs(loc - 100) < 5 for loc in locs)
    assert len({round(loc, 4) for loc in locs}) == 3
    assert abs(fixed[0] - 0.5) < 1e-6
    assert all(0.01 < abs(value - 0.5) < 2 for value in fixed[1:])


def test_zeros_of_a_layer_and_frozen_modules_stay():
    last, frozen = nn.Linear(1, 1).double(), nn.Linear(1, 1).double().requires_grad_(False)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    begun = frozen.weight.clone()

    def guide(x):
        pyro.module("last", last)
        loc = last(torch.ones(1)) + frozen(torch.ones(1)).detach()
        pyro.sample("z", dist.Normal(loc.squeeze(-1), 1.0))

    found = fit(straight, guide, X, restarts=2, epochs=1, learning_rate=1e-9, progress=False)
    assert torch.equal(frozen.weight, begun)
    assert all(abs(v).max() < 1e-6 for r in found.restarts.runs for v in r.parameters.values())


def test_the_folder_has_one_for_each_run_and_resuming_repeats_nothing(tmp_path):
    def run(folder, epochs, **more):
        return fit(
            squares, one_mode, X, restarts=2, epochs=epochs, progress=False,
            checkpoint=tmp_path / folder, **more,
        )  # fmt: skip

    whole = run("whole", 6)
    run("parts", 3)
    parts = run("parts", 6, resume=True)
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"run_0", "run_1"}
    for one, other in zip(whole.restarts.runs, parts.restarts.runs, strict=True):
        for name, value in one.parameters.items():
            assert torch.equal(value, other.parameters[name])
    torch.testing.assert_close(whole.restarts.table.bound.values, parts.restarts.table.bound.values)
    with pytest.raises(CheckpointError, match="run_0"):
        run("parts", 6)
    with pytest.raises(CheckpointError, match="single run"):
        fit(squares, one_mode, X, restarts=2, checkpoint=tmp_path / "whole" / "run_0", resume=True)


def test_guides_without_a_density_keep_the_best_and_say_what_is_missing():
    found = fit(straight, AutoDelta(straight), X, restarts=2, epochs=3, progress=False)
    assert found.restarts.table.sizes["run"] == 2
    assert "rhat" not in found.restarts.table
    with pytest.raises(ProgramError, match="Delta"):
        found.restarts.mixture  # noqa: B018 - it raises
    with pytest.raises(ValueError, match="restarts must be an integer from 1"):
        fit(straight, AutoDelta(straight), X, restarts=0)
    assert fit(straight, AutoDelta(straight), X, epochs=1, progress=False).restarts is None


@pytest.mark.parametrize("method", ["exact", "generalized"])
def test_em_reports_its_starts_in_the_same_table(method):
    x = torch.tensor([[-5.0], [-5.2], [-4.9], [0.1], [0.3], [-0.2], [5.0], [5.3]]).double()
    model = GaussianMixture(3, 1, covariance="spherical").double()
    found = fit_em(
        model, x, method=method, num_restarts=4, initialization="random", max_iterations=5,
        on_singular="restart", hold=("covariances",) * (method == "exact"), progress=False,
    )  # fmt: skip
    table, kept = found.restarts.table, found.restarts.kept
    assert table.sizes["run"] == 4
    assert float(table.bound[kept]) == float(table.bound.max())
    assert float(table.bound[kept]) == pytest.approx(float(found.history.bound[-1]), rel=1e-9)
    assert "Of 4 runs" in table.summary()
    with pytest.raises(ProgramError, match="EM"):
        found.restarts.mixture  # noqa: B018 - it raises
