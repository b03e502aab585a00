"""Hamiltonian Monte Carlo against closed forms and against Pyro's NUTS."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from closed_forms import linear_pair
from pyro.infer import MCMC, NUTS, config_enumerate

from pyro_vae.inference.mcmc import bulk_ess, hmc_step, sample_posterior
from pyro_vae.inference.programs import ProgramError, program_scope, unconstrained_model
from pyro_vae.inference.tempered import Point, Tempered
from pyro_vae.models import VAE, LinearGaussian

N, D, H = 7, 5, 3
STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


@pytest.fixture
def linear():
    return linear_pair(D, H)


@pytest.fixture
def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(2)) * 1.5


def errors_of_means(found, values, expected, variance):
    """Deviations from the expected means in standard errors from the ESS of each datum."""
    mean = values.flatten(0, 1).mean(0)
    ess = found.ess.reshape(-1, *[1] * (mean.dim() - 1))
    return (mean - expected) / (variance / ess).sqrt()


def posterior_of(linear, x):
    precision = torch.eye(H) + linear.weight.T @ linear.weight / 0.5
    covariance = torch.linalg.inv(precision)
    mean = (x - linear.bias) @ linear.weight @ covariance.T / 0.5
    return mean.detach(), covariance.detach()


def test_moments_of_the_linear_gaussian_posterior(linear, x):
    found = sample_posterior(
        linear.model, x, num_chains=5, num_warmup=150, num_samples=200, num_leapfrog=5
    )
    mean, covariance = posterior_of(linear, x)
    z = found.draws["z"]
    assert z.shape == (5, 200, N, H)
    lines = repr(found).splitlines()
    assert lines[0] == f"PosteriorSample: 5 chains x 200 draws of {N} data, seed 0"
    assert lines[1] == f"  latents: z [5, 200, {N}, {H}]"
    assert len(lines) == 4
    scores = errors_of_means(found, z, mean, covariance.diagonal())
    assert scores.abs().max() < STANDARD_ERRORS
    wrong = errors_of_means(
        found, z, mean + covariance.diagonal().sqrt() / 2, covariance.diagonal()
    )
    assert wrong.abs().min() > STANDARD_ERRORS
    products = (z - mean)[..., :, None] * (z - mean)[..., None, :]
    wick = covariance.diagonal()[:, None] * covariance.diagonal() + covariance**2
    # Products of latents mix more slowly than the latents: a third of their ESS.
    slower = wick / (found.ess.min() / 3)
    assert ((products.flatten(0, 2).mean(0) - covariance).abs() < 4.5 * (slower / N).sqrt()).all()
    assert (found.rhat < 1.06).all()
    assert found.divergences.sum() == 0
    assert ((found.acceptance > 0.6) & (found.acceptance < 0.999)).all()


def test_step_sizes_are_those_of_each_datum():
    scales = torch.tensor([0.01, 1.0, 100.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 10 * scales))
            pyro.sample("x", dist.Normal(z, scales), obs=x)

    x = torch.tensor([0.02, -1.0, 50.0])
    found = sample_posterior(model, x, num_chains=5, progress=False)
    variance = scales**2 / 1.01
    scores = errors_of_means(found, found.draws["z"], x / 1.01, variance)
    assert scores.abs().max() < STANDARD_ERRORS
    assert (found.rhat < 1.1).all()


@pytest.mark.long
def test_constrained_sites_hierarchy_and_support_that_moves():
    """Gamma-Poisson with a conjugate posterior, beside a uniform whose end is the other latent."""
    counts = torch.tensor([[2.0, 0.0, 1.0], [6.0, 9.0, 7.0]])

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("below", dist.Uniform(0.0, rate))
            with pyro.plate("repeats", 3, dim=-2):
                pyro.sample("x", dist.Poisson(rate), obs=x.T)

    found = sample_posterior(model, counts, num_chains=5, num_samples=400, num_warmup=200)
    shape = 2.0 + counts.sum(1)
    rate = found.draws["rate"]
    scores = errors_of_means(found, rate, shape / 4, shape / 16)
    assert scores.abs().max() < STANDARD_ERRORS
    share = found.draws["below"] / rate  # uniform on (0, 1), whatever the rate is
    scores = errors_of_means(found, share, torch.tensor(0.5), torch.tensor(1 / 12))
    assert scores.abs().max() < STANDARD_ERRORS
    assert errors_of_means(found, share, 0.6, torch.tensor(1 / 12)).abs().min() > STANDARD_ERRORS


@pytest.mark.long
def test_a_simplex_inside_an_inner_plate_with_a_mask():
    """Dirichlet-multinomial rows; a masked row has no posterior and stays where it is."""
    counts = torch.tensor([[[3.0, 1.0, 0.0], [1.0, 1.0, 5.0]], [[0.0, 2.0, 2.0], [9.0, 9.0, 9.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    prior = torch.tensor([1.0, 2.0, 3.0])

    def model(x):
        with pyro.plate("data", 2, dim=-2), pyro.plate("rows", 2, dim=-1):
            with pyro.poutine.mask(mask=mask):
                p = pyro.sample("p", dist.Dirichlet(prior))
                pyro.factor("counts", (x * p.log()).sum(-1))

    found = sample_posterior(
        model, counts, num_chains=4, num_samples=250, num_warmup=150, progress=False
    )
    p = found.draws["p"]
    assert p.shape == (4, 250, 2, 2, 3)
    concentration = prior + counts
    total = concentration.sum(-1, keepdim=True)
    mean = concentration / total
    variance = mean * (1 - mean) / (total + 1)
    scores = errors_of_means(found, p, mean, variance)
    assert scores[mask].abs().max() < STANDARD_ERRORS
    masked = p[:, :, 1, 1]
    assert torch.equal(masked, masked[:, :1].expand_as(masked))
    assert (found.rhat < 1.1).all()


@pytest.mark.long
def test_the_batch_may_lie_at_an_outer_dim():
    data = torch.randn(4, 3)

    def model(x):
        with pyro.plate("data", 4, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("repeats", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    found = sample_posterior(
        model, data, num_chains=4, num_samples=250, num_warmup=150, progress=False
    )
    assert found.draws["z"].shape == (4, 250, 4)
    assert found.draws["w"].shape == (4, 250, 4, 3)
    # x_j | z ~ N(z, 2), so the posterior of z has precision 1 + 3/2.
    scores = errors_of_means(found, found.draws["z"], data.sum(1) / 2 / 2.5, torch.tensor(1 / 2.5))
    assert scores.abs().max() < STANDARD_ERRORS


def test_enumerated_sites_are_summed_out():
    """A mixture prior: the posterior is a mixture of normals with known mean."""
    weights, locs = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 1.0])

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(locs[c], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([-0.5, 0.3, 2.0])
    found = sample_posterior(
        model, x, num_chains=4, num_samples=250, num_warmup=150, progress=False
    )
    marginal = torch.distributions.Normal(locs, 2**0.5).log_prob(x[:, None]) + weights.log()
    share = marginal.softmax(-1)
    means = (x[:, None] + locs) / 2
    mean = (share * means).sum(-1)
    variance = (share * (means**2 + 0.5)).sum(-1) - mean**2
    scores = errors_of_means(found, found.draws["z"], mean, variance)
    assert scores.abs().max() < STANDARD_ERRORS
    prior_mean_missing = errors_of_means(found, found.draws["z"], x / 2, variance)
    assert prior_mean_missing.abs().max() > STANDARD_ERRORS


@pytest.mark.long
def test_global_latents_are_sampled_jointly():
    x = torch.randn(6) + 1

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ProgramError, match="'mean' is outside"):
        sample_posterior(model, x, joint=False, progress=False)
    found = sample_posterior(model, x, joint=True, num_samples=250, num_warmup=150, progress=False)
    assert found.draws["mean"].shape == (4, 250)
    assert found.draws["z"].shape == (4, 250, 6)
    precision = 1 + 6 / 2
    error = (1 / precision / found.ess[0]) ** 0.5
    assert abs(found.draws["mean"].mean() - x.sum() / 2 / precision) < STANDARD_ERRORS * error


@pytest.mark.long
def test_agrees_with_pyros_nuts_on_a_model_that_is_not_gaussian():
    x = torch.tensor([1.5, -0.3])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
            bent = z[..., 0] ** 2 + z[..., 1].tanh()
            pyro.sample("x", dist.StudentT(4.0, bent, scale), obs=x)

    found = sample_posterior(model, x, num_chains=6, num_samples=700, progress=False)
    mcmc = MCMC(NUTS(model), num_samples=700, warmup_steps=300, disable_progbar=True)
    mcmc.run(x)
    nuts = mcmc.get_samples()
    ess = torch.tensor(
        [d["n_eff"].min() for d in mcmc.diagnostics().values() if "n_eff" in d]
    ).min()
    for ours, theirs in (
        (found.draws["z"][..., 1], nuts["z"][..., 1]),
        (found.draws["z"][..., 0] ** 2, nuts["z"][..., 0] ** 2),
        (found.draws["scale"].log(), nuts["scale"].log()),
    ):
        ours = ours.flatten(0, 1)
        error = (ours.var(0) / found.ess + theirs.var(0) / ess).sqrt()
        # An ESS is itself uncertain, and that of z0 says little of its square: 5 standard errors.
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all()


def test_programs_that_take_one_particle_at_a_time(x):
    weight = torch.tensor([[1.0, 2.0]])

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = (z.reshape(N, 2) @ weight.T).reshape(N)  # knows no particles
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])

    found = sample_posterior(
        model, x, num_chains=2, num_warmup=60, num_samples=60, num_leapfrog=5, progress=False
    )
    assert not found.latent_model.structure.vectorizable
    mean = x[:, :1] * weight / 6
    variance = 1 - weight[0] ** 2 / 6
    assert errors_of_means(found, found.draws["z"], mean, variance).abs().max() < STANDARD_ERRORS


def test_captured_and_plain_programs_agree_and_branches_are_not_captured(x):
    vae = VAE(4, 2, hidden=(3,))
    data = (torch.rand(5, 4) < 0.5).double()
    with torch.no_grad(), program_scope(0):
        latent_model = unconstrained_model(vae.model, vae.guide, data)
        u = latent_model.draw(3)
        for start in ("prior", "guide"):
            captured = Tempered(latent_model, start)
            plain = Tempered(latent_model, start, capture=False)
            for a, b in zip(captured(u, 0.3), plain(u, 0.3), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert captured.is_captured
            for p in vae.decoder.parameters():
                p.add_(0.1)  # a captured program follows its parameters
            for a, b in zip(captured(u, 1.0), plain(u, 1.0), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

        def branching(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                if float(z.sum()) > 1e6:
                    z = z + 1
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        target = Tempered(unconstrained_model(branching, None, x[:, 0]))
        u = target.latent_model.draw(3)
        expected = (
            torch.distributions.Normal(0.0, 1.0)
            .log_prob(torch.stack([u[..., 0], x[:, 0] - u[..., 0]]))
            .sum(0)
        )
        torch.testing.assert_close(target(u).joint, expected)
        assert not target.is_captured


@pytest.mark.long
def test_a_chain_that_diverges_is_reported_and_nothing_is_nan(linear, x):
    with torch.no_grad(), program_scope(0):
        latent_model = unconstrained_model(linear.model, None, x)
        target = Tempered(latent_model, capture=False)
        point = target(latent_model.draw(3))
        step = torch.full((3, N), 0.05)
        step[1, 2], step[0, 0] = 1e9, 1e300
        moved = hmc_step(target, point, step)
    assert moved.diverged.sum() == 2
    assert moved.diverged[1, 2]
    assert moved.diverged[0, 0]
    assert torch.equal(moved.point.u[1, 2], point.u[1, 2])
    assert all(t.isfinite().all() for t in moved.point)
    assert (moved.acceptance[moved.diverged] == 0).all()

    def cliff(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, torch.where(z > 0, 1.0, math.nan)), obs=x)

    def half_line(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.HalfNormal(1.0))

    with pyro.validation_enabled(False):
        found = sample_posterior(
            cliff, torch.randn(2), guide=half_line, num_samples=300, progress=False
        )
    assert (found.draws["z"] > 0).all()
    assert found.divergences.sum() > 0
    assert "diverged" in found.result().summary()
    z = found.draws["z"]  # a half normal: mean sqrt(2/pi)
    scores = errors_of_means(
        found, z, torch.tensor(math.sqrt(2 / math.pi)), torch.tensor(1 - 2 / math.pi)
    )
    assert scores.abs().max() < STANDARD_ERRORS


def test_a_datum_of_zero_density_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", torch.where(x > 100, 0.0 * z, 1.0).log())

    with pytest.raises(ProgramError, match="datum 1 is not finite"):
        sample_posterior(model, torch.tensor([1.0, 200.0, 2.0]), progress=False)


def test_latents_that_hmc_cannot_move_are_refused_by_name(x):
    def discrete(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def point(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Delta(z + 1))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def nothing(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ProgramError, match="'c' is discrete"):
        sample_posterior(discrete, x[:, 0])
    with pytest.raises(ProgramError, match="'y' is a Delta"):
        sample_posterior(point, x[:, 0])
    with pytest.raises(ProgramError, match="no latent site"):
        sample_posterior(nothing, x[:, 0])


@pytest.mark.long
def test_an_improper_prior_with_a_proper_posterior():
    x = torch.tensor([2.0, -1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = sample_posterior(model, x, num_samples=250, num_warmup=150, progress=False)
    scores = errors_of_means(found, found.draws["z"], x, torch.ones(2))
    assert scores.abs().max() < STANDARD_ERRORS


def test_same_seed_same_draws_and_nothing_moves(linear, x):
    state = torch.get_rng_state()
    short: dict[str, Any] = {"num_warmup": 20, "num_samples": 10, "progress": False}
    first = sample_posterior(linear.model, x, guide=linear.guide, seed=5, **short)
    second = sample_posterior(linear.model, x, guide=linear.guide, seed=5, **short)
    other = sample_posterior(linear.model, x, guide=linear.guide, seed=6, **short)
    assert torch.equal(first.unconstrained, second.unconstrained)
    assert (first.unconstrained != other.unconstrained).all()
    assert torch.equal(state, torch.get_rng_state())
    assert not pyro.get_param_store()
    assert not first.draws["z"].requires_grad


@pytest.mark.float32
def test_single_precision_stays_single():
    linear = LinearGaussian(4, 2)
    found = sample_posterior(linear.model, linear.sample(3), num_warmup=100, num_samples=200)
    assert found.draws["z"].dtype == torch.float32
    assert (found.rhat < 1.1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains must be an integer from 1"),
        ({"num_samples": 3}, "num_samples must be an integer from 4"),
        ({"num_leapfrog": True}, "num_leapfrog must be"),
        ({"target_accept": 1.0}, "between 0 and 1"),
        ({"step_size": -1.0}, "step_size must be positive"),
    ],
)
def test_bad_arguments(linear, x, options, message):
    with pytest.raises(ValueError, match=message):
        sample_posterior(linear.model, x, **options)


@pytest.mark.long
def test_no_trajectory_length_resonates_with_the_target():
    """Ten steps of equal number close half a period here: the mean then moves, the spread not."""
    scale_tril = torch.linalg.cholesky(torch.tensor([[1.0, 0.9], [0.9, 1.0]]))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale_tril))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    found = sample_posterior(model, torch.zeros(20), num_samples=500, progress=False)
    spread = bulk_ess(found.unconstrained.abs()).amin(-1)
    # About 700 of 2000 draws; with equal numbers of steps it was about 250.
    assert spread.median() > 450
    assert (found.rhat < 1.02).all()


def test_a_trajectory_is_the_leapfrog_of_the_paper():
    """Neal (2011), eqs. 2.28 to 2.30, by hand on a normal target with momenta drawn again."""
    precision = torch.tensor([[1.0, 0.4], [0.4, 2.0]], dtype=torch.float64)

    def target(u):
        density = -0.5 * (u * (u @ precision)).sum(-1)
        return Point(u, density, -u @ precision, density, density)

    u = torch.randn(3, 1, 2, dtype=torch.float64)
    step = torch.tensor([0.3], dtype=torch.float64)
    scale = torch.tensor([[0.7, 1.3]], dtype=torch.float64)
    state = torch.get_rng_state()
    found = hmc_step(target, target(u), step, num_leapfrog=3, scale=scale)
    torch.set_rng_state(state)
    q, p = u / scale, torch.randn_like(u)  # in units of the scale
    for _ in range(3):
        p = p - 0.5 * 0.3 * scale * ((scale * q) @ precision)
        q = q + 0.3 * p
        p = p - 0.5 * 0.3 * scale * ((scale * q) @ precision)
    assert (found.proposal - scale * q).abs().max() < 1e-12
    assert (found.velocity - p).abs().max() < 1e-12


def test_float64_data_beside_a_prior_of_python_numbers():
    """Such a prior is float32; chains run in the type of the density. Normal-normal, exactly."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.tensor([0.5, 1.5, -0.2, 2.2], dtype=torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        found = sample_posterior(model, x, joint=True, num_chains=4, num_warmup=60, num_samples=100)
    finally:
        torch.set_default_dtype(before)
    draws = found.draws["loc"].double()
    assert found.draws["loc"].dtype == torch.float64
    away = errors_of_means(found, draws, x.sum() / 5, torch.tensor(0.2))
    assert away.abs().max() < STANDARD_ERRORS


def test_where_a_matrix_cannot_be_factorised_the_density_is_zero():
    """z ~ N(0, 0.1), and a matrix with a root for |z| < 1 alone: other rows are what they are."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 0.1))
        one = torch.ones_like(z)
        matrix = torch.stack([torch.stack([one, z], -1), torch.stack([z, one], -1)], -2)
        torch.linalg.cholesky(matrix)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor(0.3, dtype=torch.float64)
    with program_scope(0):
        target = Tempered(unconstrained_model(model, None, x, joint=True))
        u = torch.tensor([0.05, 2.0, -0.2], dtype=torch.float64)[:, None, None]
        found = target(u)
    z = u[:, 0, 0]
    expected = dist.Normal(0.0, 0.1).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    assert found.log_density[1, 0] == -math.inf
    assert (found.log_density[::2, 0] - expected[::2]).abs().max() < 1e-12
    gradient = -z / 0.01 + (x - z)
    assert (found.gradient[::2, 0, 0] - gradient[::2]).abs().max() < 1e-10
    assert not found.gradient[1].any()
