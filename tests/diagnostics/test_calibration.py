"""Calibration of guides: the exact one passes; a fault shows in the checks that can see it."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_vae.diagnostics.calibration import calibrate
from pyro_vae.diagnostics.calibration.ranks import chi_square_p_value
from pyro_vae.inference.programs import ProgramError
from pyro_vae.models import LinearGaussian

D, H, N = 5, 2, 60  # features, latents, data in the shapes to simulate
SIMULATIONS, DRAWS = 250, 99
FAILURE = 1e-5  # of a check that must not reject


@pytest.fixture
def linear():
    weight = torch.tensor([[1.0, 0.6], [0.8, 0.9], [0.5, 0.7], [0.3, 0.2], [0.6, 0.9]])
    return LinearGaussian.from_parameters(weight, torch.linspace(0, 1, D), torch.tensor(0.5))


def faulty(linear, fault):
    """The exact guide with one fault; the posterior has the correlation -0.78."""

    def guide(x):
        exact = linear.posterior(x)
        mean, covariance = exact.mean, exact.covariance_matrix
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        if fault == "shifted":
            mean = mean + 0.5 * variance.sqrt()
        elif fault == "narrow":
            covariance = covariance / 4
        elif fault == "wide":
            covariance = covariance * 4
        elif fault == "uncorrelated":
            covariance = torch.diag_embed(variance)
        elif fault == "prior":
            mean, covariance = torch.zeros_like(mean), torch.eye(H)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    return guide


def run(model, guide, x, **options):
    options = {"num_simulations": SIMULATIONS, "progress": False, **options}
    return calibrate(model, guide, x, **options)


def notes_of(found):
    return " ".join(found.provenance["verdict"] + found.provenance["notes"])


# --- the exact guide ------------------------------------------------------------------------------


def test_the_exact_guide_passes_every_check(linear):
    found = run(linear.model, linear.exact_guide, torch.zeros(N, D), num_simulations=500)
    for name in ("ecdf_p_value", "chi_square_p_value", "symmetry_p_value", "overall_p_value"):
        assert (found[name] > FAILURE).all()
    assert found.ranks.dims == ("simulation", "latent")
    assert found.ranks.shape == (500, H)
    assert list(found.latent.values) == ["z[0]", "z[1]"]
    assert found.ranks.min() >= 0
    assert found.ranks.max() <= DRAWS
    error = found.coverage_se
    assert (abs(found.coverage - found.level) < 4.5 * error).all()
    assert found.ecdf.sizes == {"latent": H, "rank": DRAWS + 1}
    assert (found.ecdf.isel(rank=-1) == 1).all()
    assert (found.ecdf_lower <= found.ecdf_upper).all()
    assert "no check rejects at level 0.01" in notes_of(found)
    assert "at most 0.01 (4 ECDF tests" in notes_of(found)


def test_the_exact_guide_is_rejected_as_rarely_as_stated(linear):
    # Ten runs at level 0.01: three rejections have probability 1.1e-4, if each is independent.
    rejected = sum(
        float(run(linear.model, linear.exact_guide, torch.zeros(SIMULATIONS, D), seed=s)[name])
        <= 0.01
        for s in range(5)
        for name in ("overall_p_value", "log_joint_p_value")
    )
    assert rejected < 3


def test_the_coverage_of_a_narrow_guide_is_the_normal_one(linear):
    found = run(linear.model, faulty(linear, "narrow"), torch.zeros(N, D), levels=(0.5, 0.9))
    for level, z in ((0.5, 0.6744898), (0.9, 1.6448536)):
        exact = math.erf(z / 2 / 2**0.5)
        error = found.coverage_se.sel(level=level)
        # A hundred draws know their quantiles to about 0.01 of coverage.
        assert (abs(found.coverage.sel(level=level) - exact) < 4.5 * error + 0.01).all()


# --- faults ---------------------------------------------------------------------------------------

# In 20 runs of 250 simulations each of these was rejected at 0.01 every time, and what is said not
# to be seen was rejected in none by the ECDF (one of 20 by VSBC at 0.01, of the exact guide).
SEEN = {
    "shifted": ("ecdf_p_value", "log_joint_p_value", "tarp_p_value", "symmetry_p_value"),
    "narrow": ("ecdf_p_value", "log_joint_p_value", "tarp_p_value", "chi_square_p_value"),
    "wide": ("ecdf_p_value", "log_joint_p_value", "tarp_p_value", "chi_square_p_value"),
    "uncorrelated": ("log_joint_p_value", "tarp_p_value"),
    "prior": ("log_joint_p_value", "tarp_p_value"),
}
WORDS = {
    "shifted": "2 of 2 latents are miscalibrated under the model's own data. ",
    "narrow": "the guide is too narrow (U-shaped ranks)",
    "wide": "the guide is too wide (humped ranks)",
    "uncorrelated": "leaves out correlations",
    "prior": "do not depend on its data",
}


@pytest.mark.parametrize("fault", list(SEEN))
def test_a_fault_shows_in_the_checks_that_can_see_it(linear, fault):
    found = run(linear.model, faulty(linear, fault), torch.zeros(SIMULATIONS, D))
    for name in SEEN[fault]:
        assert float(found[name].min()) < 0.01, name
    assert found.overall_p_value < 0.01
    assert WORDS[fault] in notes_of(found)
    assert "no check rejects" not in notes_of(found)
    if "ecdf_p_value" not in SEEN[fault]:  # no latent by itself is wrong
        assert (found.ecdf_p_value > FAILURE).all()
        assert "latents are miscalibrated" not in notes_of(found)
    if fault == "shifted":
        assert (found.bias_direction == 1).all()
        assert "the guide is too high" in notes_of(found)
    if fault in ("narrow", "wide"):
        assert (np.sign(found.spread) == (1 if fault == "narrow" else -1)).all()
        assert "too low" not in notes_of(found)
        assert "too high" not in notes_of(found)


def bimodal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.3), obs=x)


def test_one_latent_and_a_missing_mode():
    # Given x, z is +-|z|; |z| on a grid of 400 makes the guide exact but for the grid.
    grid = torch.linspace(0.005, 4.995, 500)

    def guide(x, both=True):
        weight = dist.Normal(grid, 0.3).log_prob(x[:, None]) + dist.Normal(0.0, 1.0).log_prob(grid)
        with pyro.plate("data", len(x)):
            cell = pyro.sample("cell", dist.Categorical(logits=weight), infer=AUXILIARY)
            sign = pyro.sample("sign", dist.Bernoulli(0.5 if both else 1.0), infer=AUXILIARY)
            offset = pyro.sample("offset", dist.Uniform(-0.005, 0.005), infer=AUXILIARY)
            value = (2 * sign - 1) * (grid[cell] + offset)
            pyro.sample("z", dist.Delta(value))

    exact = run(bimodal, guide, torch.zeros(N), num_simulations=120, num_draws=39)
    assert exact.overall_p_value > FAILURE
    assert list(exact.latent.values) == ["z"]
    one = partial(guide, both=False)
    missing = run(bimodal, one, torch.zeros(N), num_simulations=120, num_draws=39)
    assert missing.ecdf_p_value.item() < 1e-6
    assert missing.spread.item() > 5
    # Both modes have one density, so the log joint cannot see it.
    assert missing.log_joint_p_value > FAILURE


AUXILIARY = {"is_auxiliary": True}


# --- discrete latents, inner plates, several sites ------------------------------------------------

PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)


def discrete(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR))
        pyro.sample("x", dist.Normal(MEANS[z], 0.7), obs=x)


def discrete_guide(x, power=1.0):
    logits = PRIOR.log() + dist.Normal(MEANS, 0.7).log_prob(x[:, None])
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=power * logits))


def test_discrete_latents():
    exact = run(discrete, discrete_guide, torch.zeros(N), num_simulations=400)
    assert exact.overall_p_value > FAILURE
    # Ties are spread over all ranks, not put at their ends.
    assert (chi_square_p_value(exact.log_joint_ranks.values[:, None], DRAWS) > FAILURE).all()
    sharp = run(
        discrete, lambda x: discrete_guide(x, power=3.0), torch.zeros(N), num_simulations=400
    )
    assert sharp.overall_p_value < 0.01


def test_enumerated_latents_are_summed_out():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PRIOR), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(MEANS[k] + z, 0.7), obs=x)

    def guide(x):
        # Given x, z is a mixture over k of normals: variance 1 + 0.49 of x - MEANS[k].
        weight = PRIOR.log() + dist.Normal(MEANS, 1.49**0.5).log_prob(x[:, None])
        means = (x[:, None] - MEANS) / 1.49
        with pyro.plate("data", len(x)):
            parts = dist.Normal(means, (0.49 / 1.49) ** 0.5)
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=weight), parts))

    assert run(model, guide, torch.zeros(N)).overall_p_value > FAILURE
    shifted = run(model, lambda x: guide(x + 1), torch.zeros(N))
    assert shifted.overall_p_value < 0.01


def test_covariates_and_inner_plates_and_a_second_argument():
    def model(x, scale, options):
        assert options == {"kept": True}
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("inner", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(scale * z, 1.0), obs=x)

    def guide(x, scale, options):
        precision = 1 + scale**2
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("z", dist.Normal(scale * x / precision, precision**-0.5))

    data = torch.zeros(N, 3), torch.linspace(0.1, 3.0, N)[:, None], {"kept": True}
    found = run(model, guide, data, num_simulations=200)
    assert found.overall_p_value > FAILURE
    assert found.sizes["latent"] == 3
    # The same guide without the covariate is wrong.
    blind = run(model, lambda x, s, o: guide(x, s.mean().expand_as(s), o), data)
    assert blind.overall_p_value < 0.01


# --- jointly --------------------------------------------------------------------------------------

NOISE = 0.5


@pytest.fixture
def covariates():
    return torch.stack([torch.ones(8), torch.linspace(-1, 1, 8)], -1)


def regression(c, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((c * weight).sum(-1), NOISE), obs=y)


def conjugate(c, y):
    precision = torch.eye(2) + c.T @ c / NOISE**2
    mean = precision.inverse() @ c.T @ y / NOISE**2
    pyro.sample("weight", dist.MultivariateNormal(mean, precision_matrix=precision))


def test_a_regression_jointly_with_the_conjugate_guide(covariates):
    x = (covariates, torch.zeros(8))
    found = run(regression, conjugate, x, joint=True, num_simulations=60, num_draws=19)
    assert found.overall_p_value > FAILURE
    assert found.ranks.shape == (60, 2)
    assert list(found.latent.values) == ["weight[0]", "weight[1]"]


def test_a_guide_of_one_data_set_is_rejected_and_refitting_mends_it(covariates):
    x = (covariates, torch.linspace(-1, 1, 8))
    guide = AutoNormal(regression)
    guide(*x)
    found = run(regression, guide, x, joint=True, num_simulations=60, num_draws=19)
    assert found.overall_p_value < 0.01
    assert "joint=True with refit" in notes_of(found)

    def refit(model, data):
        assert torch.is_grad_enabled()
        c, y = data
        # Columns of the covariates are orthogonal, so the posterior is of the diagonal family.
        precision = torch.eye(2) + c.T @ c / NOISE**2
        mean = precision.inverse() @ c.T @ y / NOISE**2

        def fitted(c, y):
            scale = precision.diagonal().rsqrt()
            pyro.sample("weight", dist.Normal(mean, scale).to_event(1))

        return fitted

    mended = run(regression, guide, x, joint=True, refit=refit, num_simulations=60, num_draws=19)
    assert mended.overall_p_value > FAILURE
    assert "refit" not in notes_of(mended)


# --- the caller's world, and what is refused ------------------------------------------------------


def test_the_seed_decides_and_the_random_state_is_kept(linear):
    state = torch.get_rng_state()
    first, again, other = (
        run(linear.model, linear.exact_guide, torch.zeros(N, D), seed=s, num_simulations=70)
        for s in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert first.ranks.equals(again.ranks)
    assert first.tarp_ranks.equals(again.tarp_ranks)
    assert not first.ranks.equals(other.ranks)
    assert first.ranks.shape == (70, H)  # 60 and a part of 60


def test_draws_in_parts_and_data_in_chunks(linear):
    found = run(linear.model, linear.exact_guide, torch.zeros(N, D), max_memory=1e-4)
    assert found.overall_p_value > FAILURE
    assert found.ranks.shape == (SIMULATIONS, H)


@pytest.mark.float32
def test_single_precision():
    model = LinearGaussian(data_dim=D, latent_dim=H)
    found = run(model.model, model.exact_guide, torch.zeros(N, D))
    assert found.overall_p_value > FAILURE


def test_the_result_is_saved_and_explains_itself(linear, tmp_path):
    found = run(linear.model, linear.exact_guide, torch.zeros(N, D), num_simulations=60)
    found.save(tmp_path / "calibration.nc")
    assert "says nothing of real data" in found.summary()
    assert found.provenance["config"]["num_simulations"] == 60


def test_what_cannot_be_calibrated_is_refused(linear):
    x = torch.zeros(N, D)
    for wrong in (49, True):
        with pytest.raises(ValueError, match="num_simulations must be an integer from 50"):
            run(linear.model, linear.exact_guide, x, num_simulations=wrong)
    with pytest.raises(ValueError, match="num_draws must be an integer from 9"):
        run(linear.model, linear.exact_guide, x, num_draws=8)
    for levels in ((), (0.5, 1.0)):
        with pytest.raises(ValueError, match="levels are probabilities"):
            run(linear.model, linear.exact_guide, x, levels=levels)
    with pytest.raises(ValueError, match="refit is for joint=True"):
        run(linear.model, linear.exact_guide, x, refit=lambda model, x: linear.exact_guide)

    def halved(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(H), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0] / 2)

    with pytest.raises(ProgramError, match="not among its arguments as they are"):
        run(halved, linear.exact_guide, x)

    def only_zeros(x):
        if x.any():
            raise RuntimeError("I know one data set")
        linear.exact_guide(x)

    with pytest.raises(ProgramError, match=r"cannot be run on data simulated.*I know one data set"):
        run(linear.model, only_zeros, x)

    def subsampled(x):
        with pyro.plate("data", len(x), subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(H), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[index, 0])

    def subsampled_guide(x):
        with pyro.plate("data", len(x), subsample_size=10):
            pyro.sample("z", dist.Normal(torch.zeros(H), 1.0).to_event(1))

    with pytest.raises(ProgramError, match="subsample or rescale"):
        run(subsampled, subsampled_guide, x)
