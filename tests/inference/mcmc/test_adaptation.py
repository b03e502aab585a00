"""What warm-up adapts: metrics of correlated posteriors, trajectory lengths, starts."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.inference.mcmc import estimated_scale, sample_posterior
from pyro_vae.inference.mcmc.adaptation import TrajectoryLength, is_dense
from pyro_vae.inference.mcmc.hmc import Transition
from pyro_vae.inference.tempered import Point

N, D = 3, 4
STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


def correlated():
    """Scales from 1 to 1000 and a correlation of 0.99, in another order for each datum."""
    correlation = torch.full((D, D), 0.99) + 0.01 * torch.eye(D)
    orders = torch.tensor([[0, 1, 2, 3], [3, 0, 2, 1], [2, 3, 1, 0]])
    scales = torch.tensor([1.0, 10.0, 100.0, 1000.0])[orders]
    covariance = scales[:, :, None] * correlation * scales[:, None, :]
    return torch.randn(N, D) * scales, covariance


def model(x, covariance):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), (D,)))
        pyro.sample("x", dist.MultivariateNormal(z, covariance), obs=x)


def test_strong_correlations_and_scales_apart_are_no_burden():
    x, covariance = correlated()
    short = {"num_warmup": 150, "num_samples": 250, "progress": False}
    found = sample_posterior(model, (x, covariance), **short)
    assert found.config["metric"] == "dense"
    assert (found.rhat < 1.02).all()
    assert (found.ess > 250).all()
    assert found.config["num_leapfrog"] < 8
    z = found.draws["z"].flatten(0, 1)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    error = (variance / found.ess[:, None]).sqrt()
    assert ((z.mean(0) - x).abs() < STANDARD_ERRORS * error).all()
    # Squares mix more slowly than the latents: a third of their ESS.
    spread = (z.var(0) / variance).log()
    assert (spread.abs() < STANDARD_ERRORS * (2 / (found.ess[:, None] / 3)).sqrt()).all()
    diagonal = sample_posterior(
        model, (x, covariance), metric="diagonal", **short | {"num_leapfrog": 3}
    )
    assert (diagonal.ess < found.ess / 4).all()
    assert (diagonal.rhat > 1.05).all()


def test_trajectories_grow_to_the_length_that_moves_squared_distances_most():
    r"""Of standard normals the end is known: z cos t + p sin t, so the criterion is sin^2 t.

    With lengths uniform from 0 to 2 T its mean is 1/2 - sin(4 T) / (8 T), over the root of T.
    """
    grid = torch.linspace(0.1, 3.0, 3000)
    best = float(grid[((0.5 - (4 * grid).sin() / (8 * grid)) / grid.sqrt()).argmax()])
    chains, data, dim = 20, 3, 4
    for start in (0.2, 6.0 / 4):
        adapted = TrajectoryLength(start)
        size = torch.full((data,), 1e-3)
        adapted.most = 10**6
        for _ in range(400):
            average = adapted.num_leapfrog(size) * 1e-3
            elapsed = (2 * average * torch.rand(())).expand(chains, data)
            z, p = torch.randn(2, chains, data, dim)
            sine, cosine = elapsed.sin()[..., None], elapsed.cos()[..., None]
            end = 2 * (z * cosine + p * sine)  # of normals with an sd of 2
            moved = Transition(
                Point(end, end[..., 0], end, end[..., 0], end[..., 0]),
                torch.ones(chains, data),
                torch.zeros(chains, data, dtype=torch.bool),
                end,
                p * cosine - z * sine,
            )
            adapted.update(
                moved, 2 * z, torch.zeros(data, dim), torch.full((data, dim), 2.0), elapsed
            )
        assert adapted.num_leapfrog(size, mean=True) * 1e-3 == pytest.approx(best, rel=0.15)


def test_scales_are_those_of_the_draws_and_latents_that_stand_still_keep_theirs():
    draws = torch.randn(50, 2, 3) @ torch.randn(3, 3)
    draws[:, 1, 2] = 7.0
    before = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 5.0]])
    dense = estimated_scale(draws, before, dense=True)
    np.testing.assert_allclose((dense @ dense.mT)[0], np.cov(draws[:, 0].T.numpy()))
    still = (dense @ dense.mT)[1]
    np.testing.assert_allclose(still[:2, :2], np.cov(draws[:, 1, :2].T.numpy()))
    assert still[2].tolist() == pytest.approx([0, 0, 25])
    diagonal = estimated_scale(draws, before, dense=False)
    assert diagonal[1].tolist() == pytest.approx([*draws[:, 1, :2].std(0).tolist(), 5.0])
    # Too few draws for a covariance of full rank: it is as it was.
    few = estimated_scale(draws[:2, :1], torch.eye(3)[None] * 2.0, dense=True)
    assert torch.equal(few, torch.eye(3)[None] * 2.0)


def test_a_metric_is_dense_where_the_draws_suffice():
    assert [is_dense("auto", dim, 500) for dim in (1, 2, 100, 101)] == [False, True, True, False]
    assert not is_dense("auto", 50, 200)
    assert is_dense("dense", 200, 10)
    assert not is_dense("diagonal", 2, 500)


def test_far_starts_find_the_posterior_and_hopeless_ones_join_the_others():
    """A regression whose prior draws lie up to a million nats below its posterior."""
    rows = torch.randn(60, 2) * torch.tensor([1.0, 100.0]) + torch.tensor([300.0, 0.0])
    y = rows @ torch.tensor([0.3, -0.02]) + 0.1 * torch.randn(60)

    def regression(rows, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        pyro.sample("y", dist.Normal(beta @ rows.T, 0.1).to_event(1), obs=y)

    found = sample_posterior(
        regression, (rows, y), joint=True, num_warmup=100, num_samples=300, progress=False
    )
    precision = rows.T @ rows / 0.01 + torch.eye(2) / 100
    mean = torch.linalg.solve(precision, rows.T @ y / 0.01)
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    beta = found.draws["beta"].flatten(0, 1)
    error = sd / math.sqrt(float(found.ess))
    assert float(found.ess) > 200
    assert ((beta.mean(0) - mean).abs() < STANDARD_ERRORS * error).all()

    def ridge(x):
        """Draws of the prior fall into a far mode of no mass, 60 nats below, every other time."""
        z = pyro.sample("z", dist.Normal(0.0, 20.0))
        near, far = ((z - at) ** 2 for at in (-10.0, 10.0))
        pyro.factor("x", torch.logaddexp(-near / 2, -60 - far / 2))

    found = sample_posterior(
        ridge,
        torch.zeros(1),
        joint=True,
        num_chains=8,
        num_warmup=50,
        num_samples=50,
        progress=False,
    )
    assert (found.draws["z"] < 0).all()
