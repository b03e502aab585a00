"""Draws in ArviZ's containers, under either major, against the tensors and closed forms."""

from dataclasses import replace
from importlib.metadata import version

import arviz as az
import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal

from pyro_vae.inference.draws import draw_posterior
from pyro_vae.inference.log_weights import pareto_khat
from pyro_vae.inference.mcmc import sample_posterior
from pyro_vae.inference.predictive import draw_predictive, draw_prior
from pyro_vae.inference.programs import ProgramError
from pyro_vae.models import LinearGaussian
from pyro_vae.results import label, make_result, to_arviz

NEW = int(version("arviz").split(".")[0]) >= 1
CHAINS = ("chain", "draw")
N, D, H, S = 4, 3, 2, 50
STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


@pytest.fixture
def linear():
    weight = torch.tensor([[1.0, 0.2], [-0.5, 0.7], [0.3, 0.4]])
    return LinearGaussian.from_parameters(weight, torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.5))


@pytest.fixture
def x():
    return torch.linspace(-2, 2, N * D).reshape(N, D)


def groups_of(data):
    return set(data.children) if NEW else set(data.groups())


def same(array, values, dims):
    """Whether an array has these values along these dims; one chain counts as none."""
    assert array.dims == dims
    expected = np.asarray(values)
    return np.array_equal(array.values.reshape(expected.shape), expected)


# ---------------------------------------------------------------- groups, dims, numbers


def test_guide_draws_have_their_groups_dims_and_numbers(linear, x):
    draws = draw_posterior(linear.model, linear.guide, x, num_draws=S, seed=1)
    khat = pareto_khat(draws.log_weights)
    history = make_result(
        {"bound": ("epoch", [-9.0, -8.0, -7.5], label(bound="lower"))},
        function="fit",
        config={},
        seed=0,
        data_sha256=None,
        coords={"epoch": [1, 2, 3]},
    )
    data = to_arviz(
        draws,
        draw_prior(linear.model, x, num_draws=7),
        draw_predictive(linear.model, draws, x),
        history=history,
        khat=khat,
        dims={"z": ["latent"], "x": ["pixel"]},
        coords={"datum": [10, 11, 12, 13], "latent": ["a", "b"]},
    )
    assert groups_of(data) == {
        "posterior",
        "sample_stats",
        "log_likelihood",
        "posterior_predictive",
        "prior",
        "prior_predictive",
        "observed_data",
        "fit",
    }
    assert same(data["posterior"]["z"], draws.latents["z"], (*CHAINS, "datum", "latent"))
    stats = data["sample_stats"]
    assert same(stats["lp"], draws.log_joint.detach(), (*CHAINS, "datum"))
    assert same(stats["log_q"], draws.log_guide.detach(), (*CHAINS, "datum"))
    assert same(stats["log_weight"], draws.log_weights.detach(), (*CHAINS, "datum"))
    likelihood = data["log_likelihood"]["x"]
    assert same(likelihood, draws.log_likelihood["x"].detach(), (*CHAINS, "datum"))
    assert same(data["observed_data"]["x"], x, ("datum", "pixel"))
    assert data["posterior_predictive"]["x"].dims == (*CHAINS, "datum", "pixel")
    assert data["prior"]["z"].sizes[CHAINS[-1]] == 7
    assert data["prior_predictive"]["x"].dims == (*CHAINS, "datum", "pixel")
    assert same(data["fit"]["khat"], khat, ("datum",))
    assert same(data["fit"]["bound"], [-9.0, -8.0, -7.5], ("epoch",))
    weights = draws.log_weights.detach().softmax(0)
    np.testing.assert_allclose(data["fit"]["weights_ess"].values, 1 / (weights**2).sum(0))
    assert data["posterior"]["datum"].values.tolist() == [10, 11, 12, 13]
    assert data["posterior"]["latent"].values.tolist() == ["a", "b"]
    assert data["posterior"].attrs["draws_from"] == "guide"
    assert data["posterior"].attrs["seed"] == 1
    assert list(data["posterior"].attrs["sample_dims"]) == list(CHAINS)


def test_the_dims_of_draws_can_be_chosen_for_both_majors(linear, x):
    draws = draw_posterior(linear.model, linear.guide, x, num_draws=S)
    data = to_arviz(draws)
    assert same(data["posterior"]["z"], draws.latents["z"][None], (*CHAINS, "datum", "z_dim_0"))
    flat = to_arviz(draws, sample_dims=("sample",))
    assert same(flat["posterior"]["z"], draws.latents["z"], ("sample", "datum", "z_dim_0"))
    with pytest.raises(ValueError, match="sample_dims is"):
        to_arviz(draws, sample_dims=("draw",))


def test_chains_stay_chains(linear, x):
    sample = sample_posterior(linear.model, x, num_chains=3, num_warmup=20, num_samples=6)
    predictive = draw_predictive(linear.model, sample, x)
    data = to_arviz(sample, predictive, draw_prior(linear.model, x, num_draws=5))
    z = sample.draws["z"]
    assert same(data["posterior"]["z"], z, (*CHAINS, "datum", "z_dim_0"))
    assert same(data["sample_stats"]["lp"], sample.log_joint, (*CHAINS, "datum"))
    mean = z @ linear.weight.detach().T + linear.bias.detach()
    expected = dist.Normal(mean, 0.5**0.5).log_prob(x).sum(-1)
    np.testing.assert_allclose(data["log_likelihood"]["x"].values, expected, rtol=1e-12)
    assert same(data["fit"]["rhat"], sample.rhat, ("datum",))
    assert data["posterior_predictive"]["x"].shape == (3, 6, N, D)
    assert data["prior"]["z"].shape == (1, 5, N, H)
    with pytest.raises(ValueError, match="come in chains"):
        to_arviz(sample, sample_dims=("sample",))
    with torch.no_grad():
        linear.weight.mul_(2.0)
    with pytest.raises(ProgramError, match="parameters have changed"):
        to_arviz(sample)


def test_data_predicted_at_given_latents_have_the_exact_moments(linear, x):
    draws = draw_posterior(linear.model, linear.exact_guide, x, num_draws=1000, seed=3)
    drawn = draw_predictive(linear.model, draws, x, seed=4).values["x"]
    mean = draws.latents["z"] @ linear.weight.detach().T + linear.bias.detach()
    noise = (drawn - mean) / 0.5**0.5  # standard normal if each is drawn at its own latents
    assert noise.mean((0, 1)).abs().max() < STANDARD_ERRORS * (1000 * N) ** -0.5
    assert (noise.var((0, 1)) - 1).abs().max() < STANDARD_ERRORS * (2 / (1000 * N)) ** 0.5
    prior = draw_prior(linear.model, x, num_draws=1000, seed=5)
    z, made = prior.latents["z"], prior.values["x"]
    assert z.mean((0, 1)).abs().max() < STANDARD_ERRORS * (1000 * N) ** -0.5
    noise = (made - z @ linear.weight.detach().T - linear.bias.detach()) / 0.5**0.5
    assert (noise.var((0, 1)) - 1).abs().max() < STANDARD_ERRORS * (2 / (1000 * N)) ** 0.5


def test_drawing_leaves_the_callers_random_state_alone(linear, x):
    draws = draw_posterior(linear.model, linear.guide, x, num_draws=3)
    before = torch.get_rng_state()
    first, second = (draw_predictive(linear.model, draws, x).values["x"] for _ in range(2))
    assert torch.equal(first, second)
    draw_prior(linear.model, x, num_draws=3)
    draws.resampled()
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- importance resampling


def test_resampling_takes_draws_in_proportion_to_their_weights(linear, x):
    draws = draw_posterior(linear.model, linear.guide, x, num_draws=S, seed=2)
    taken = draws.resampled(1000, seed=5)
    weights = draws.log_weights.detach().softmax(0)
    for n in range(N):
        own = draws.latents["z"][:, n]
        index = (taken.latents["z"][:, n, None] == own).all(-1).double().argmax(1)
        counts = index.bincount(minlength=S)
        assert counts.sum() == 1000
        assert ((counts - 1000 * weights[:, n]).abs() < 1).all()  # systematic: never a whole draw
        assert torch.equal(taken.log_weights[:, n], draws.log_weights[index, n])
        assert torch.equal(taken.log_likelihood["x"][:, n], draws.log_likelihood["x"][index, n])
    data = to_arviz(taken)
    assert data["posterior"].attrs["draws_from"] == "importance resampling"
    np.testing.assert_allclose(data["fit"]["weights_ess"].values, 1 / (weights**2).sum(0))
    assert not torch.equal(taken.latents["z"], draws.resampled(1000, seed=6).latents["z"])


def test_resampling_refuses_what_has_no_weights(linear, x):
    draws = draw_posterior(linear.model, linear.guide, x, num_draws=5)
    lost = draws.log_joint.clone()
    lost[:, 2] = -torch.inf
    with pytest.raises(ValueError, match="datum 2 are all zero"):
        replace(draws, log_joint=lost).resampled()
    lost[0, 2] = torch.nan
    with pytest.raises(ValueError, match="datum 2"):
        replace(draws, log_joint=lost).resampled()
    for wrong in (0, True):
        with pytest.raises(ValueError, match="num_draws must be"):
            draws.resampled(wrong)


# ---------------------------------------------------------------- kinds of models


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("cases", len(y)):
        pyro.sample("y", dist.Normal((x * weight).sum(-1), scale), obs=y)


def test_a_regression_with_an_autoguide():
    inputs = torch.randn(5, 2), torch.randn(5)
    guide = AutoNormal(regression)
    draws = draw_posterior(regression, guide, inputs, num_draws=6, joint=True)
    prior = draw_prior(regression, inputs, num_draws=6, joint=True)
    data = to_arviz(draws, draw_predictive(regression, draws, inputs), prior, khat=[0.3])
    assert same(data["posterior"]["weight"], draws.latents["weight"], (*CHAINS, "weight_dim_0"))
    assert same(data["posterior"]["scale"], draws.latents["scale"], CHAINS)
    assert same(data["sample_stats"]["lp"], draws.log_joint[:, 0].detach(), CHAINS)
    assert data["log_likelihood"]["y"].dims == (*CHAINS, "datum")
    assert data["posterior_predictive"]["y"].dims == (*CHAINS, "datum")
    assert data["prior"]["weight"].dims == (*CHAINS, "weight_dim_0")
    assert same(data["observed_data"]["y"], inputs[1], ("datum",))
    assert data["fit"]["khat"].dims == ()
    again = draws.resampled()
    rows = (again.latents["weight"][:, None] == draws.latents["weight"]).all(-1).double().argmax(1)
    assert torch.equal(again.latents["scale"], draws.latents["scale"][rows])
    assert torch.equal(again.log_likelihood["y"], draws.log_likelihood["y"][rows])
    sample = sample_posterior(regression, inputs, joint=True, num_warmup=20, num_samples=5)
    chains = to_arviz(sample)
    assert chains["log_likelihood"]["y"].shape == (4, 5, 5)
    expected = dist.Normal(
        (inputs[0] * sample.draws["weight"][:, :, None]).sum(-1), sample.draws["scale"][..., None]
    ).log_prob(inputs[1])
    np.testing.assert_allclose(chains["log_likelihood"]["y"].values, expected, rtol=1e-10)


def test_inner_plates_at_any_dim_and_masks():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = torch.randn(2, 3)

    def model(x):
        with pyro.plate("rows", 2, dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("visit", 3, dim=-1), pyro.poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(level, 1.0))
                pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x):
        with pyro.plate("rows", 2, dim=-2):
            pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("visit", 3, dim=-1), pyro.poutine.mask(mask=mask):
                pyro.sample("z", dist.Normal(x, 0.1))

    draws = draw_posterior(model, guide, values, num_draws=5)
    predictive = draw_predictive(model, draws, values)
    data = to_arviz(draws, predictive, draw_prior(model, values, num_draws=3))
    assert data["posterior"]["level"].dims == (*CHAINS, "datum")
    assert same(data["posterior"]["z"], draws.latents["z"], (*CHAINS, "datum", "visit"))
    assert same(data["constant_data"]["x_mask"], mask, ("datum", "visit"))
    assert same(data["constant_data"]["z_mask"], mask, ("datum", "visit"))
    likelihood = data["log_likelihood"]["x"].values.reshape(5, 2, 3)
    assert (likelihood[:, ~mask.numpy()] == 0).all()
    assert (likelihood[:, mask.numpy()] != 0).all()
    made = predictive.values["x"]  # near its own latents: ten standard deviations
    assert ((made - draws.latents["z"]).abs() < 1.0).all()


def test_discrete_latents_and_a_program_run_one_by_one():
    table = [0.0, 30.0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            mean = torch.stack([torch.tensor(table[int(i)]) for i in z])
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.3))

    values = torch.tensor([0.1, 29.0, 31.0])
    draws = draw_posterior(model, guide, values, num_draws=6)
    drawn = draw_predictive(model, draws, values)
    data = to_arviz(draws, drawn)
    assert same(data["posterior"]["z"], draws.latents["z"], (*CHAINS, "datum"))
    # Thirty standard deviations apart: each is drawn at its own latent.
    assert torch.equal(drawn.values["x"] > 15, draws.latents["z"] == 1)


def test_what_is_summed_out_has_no_likelihood_but_predictions():
    def model(x):
        with pyro.plate("data", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 0.1))
            c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(40.0 * c + shift, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("shift", dist.Normal(0.0, 0.1))

    values = torch.tensor([0.3, 39.0, 41.0])
    draws = draw_posterior(model, guide, values, num_draws=8)
    drawn = draw_predictive(model, draws, values)
    data = to_arviz(draws, drawn, draw_prior(model, values, num_draws=60))
    assert "log_likelihood" not in groups_of(data)
    assert "c summed out exactly" in data["posterior"].attrs["notes"]
    # The component of the datum, not one of the prior, which makes both.
    assert torch.equal(drawn.values["x"] > 20, (values > 20).expand(8, 3))
    made = data["prior_predictive"]["x"].values.reshape(60, 3)
    assert 0 < (made[:, 0] > 20).sum() < 60
    sample = sample_posterior(model, values, num_warmup=10, num_samples=4)
    chains = to_arviz(sample, draw_predictive(model, sample, values))
    assert "log_likelihood" not in groups_of(chains)


def test_a_subsample_stays_the_same_and_draws_may_come_in_parts():
    def model(x):
        with pyro.plate("data", 6, subsample_size=3) as i:
            z = pyro.sample("z", dist.Normal(100.0 * i, 1.0))
            pyro.sample("x", dist.Normal(z, 0.01), obs=x[i])

    def guide(x):
        with pyro.plate("data", 6, subsample_size=3) as i:
            pyro.sample("z", dist.Normal(x[i], 1.0))

    values = 100.0 * torch.arange(6.0)
    draws = draw_posterior(model, guide, values, num_draws=5)
    for memory in (1.0, 1e-7):
        drawn = draw_predictive(model, draws, values, seed=9, max_memory=memory)
        assert (drawn.values["x"] - draws.latents["z"]).abs().max() < 0.1  # 10 standard deviations
    seen = to_arviz(draws)["observed_data"]["x"].values
    assert (np.abs(draws.latents["z"].numpy() - seen) < 10).all()


def test_a_factor_has_a_likelihood_and_no_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", -((z - x) ** 2))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    values = torch.tensor([1.0, 2.0])
    draws = draw_posterior(model, guide, values, num_draws=4)
    data = to_arviz(draws)
    assert "observed_data" not in groups_of(data)
    expected = -((draws.latents["z"] - values) ** 2)
    assert same(data["log_likelihood"]["f"], expected, (*CHAINS, "datum"))
    with pytest.raises(ProgramError, match=r"'f' is a pyro\.factor"):
        draw_predictive(model, draws, values)


@pytest.mark.parametrize("name", ["datum", "chain", "draw", "sample"])
def test_a_name_that_is_a_dimension_is_refused(name):
    def program(site, plate):
        def model(x):
            with pyro.plate("data", 2, dim=-2):
                z = pyro.sample(site, dist.Normal(0.0, 1.0))
                with pyro.plate(plate, 3, dim=-1):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", 2, dim=-2):
                pyro.sample(site, dist.Normal(0.0, 1.0))

        return model, guide

    values = torch.zeros(2, 3)
    clash = draw_posterior(*program(name, "inner"), values, num_draws=2)
    with pytest.raises(ValueError, match=f"site '{name}' has the name of a dimension"):
        to_arviz(clash)
    clash = draw_posterior(*program("z", name), values, num_draws=2)
    with pytest.raises(ValueError, match=r"rename|another name"):
        to_arviz(clash)


def test_names_that_do_not_fit_are_refused(linear, x):
    draws = draw_posterior(linear.model, linear.guide, x, num_draws=3)
    for settings, message in (
        ({"dims": {"w": ["latent"]}}, "event of 'w', but no site of that name has one"),
        ({"dims": {"z": ["a", "b"]}}, "names 2 dimensions of z, but its event has 1"),
        ({"dims": {"z": ["datum"]}}, "dimension of z is called 'datum' like another"),
        ({"dims": {"z": ["k"], "x": ["k"]}}, "'k' has 2 entries in z and 3 in x"),
        ({"coords": {"pixel": [1]}}, "coords names 'pixel', but the dimensions are"),
        ({"coords": {"datum": [1]}}, "1 values for 4 of 'datum'"),
    ):
        with pytest.raises(ValueError, match=message):
            to_arviz(draws, **settings)
    with pytest.raises(ValueError, match="two parts have the group posterior"):
        to_arviz(draws, draws)


# ---------------------------------------------------------------- ArviZ at work


def test_a_file_gives_back_what_was_written(linear, x, tmp_path):
    draws = draw_posterior(linear.model, linear.guide, x, num_draws=5)
    for number, data in enumerate(
        (to_arviz(draws, khat=torch.ones(N)), to_arviz(draws, sample_dims=["sample"]))
    ):
        path = tmp_path / f"{number}.nc"
        data.to_netcdf(path, engine="h5netcdf")
        back = az.from_netcdf(path, engine="h5netcdf")
        assert groups_of(back) == groups_of(data)
        for group in groups_of(data):
            written, read = data[group], back[group]
            for name in written.data_vars:
                xr.testing.assert_equal(read[name].load(), written[name])
        assert back["posterior"].attrs["draws_from"] == "guide"
        if NEW:  # which reads the dims of the draws off the attributes
            az.plot_trace(back, backend="none")
        if hasattr(back, "close"):
            back.close()


# ArviZ 0.23 is older than these warnings of matplotlib and pandas, and gets no more releases.
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
def test_summary_and_traces(linear, x):
    draws = draw_posterior(linear.model, linear.guide, x, num_draws=200)
    z = draws.latents["z"].numpy()
    data = to_arviz(draws)
    table = az.summary(data, var_names=["z"], round_to="none")
    assert len(table) == N * H
    np.testing.assert_allclose(table["mean"].astype(float), z.mean(0).ravel(), rtol=1e-10)
    if NEW:
        flat = az.summary(
            to_arviz(draws, sample_dims=["sample"]), kind="stats", sample_dims="sample"
        )
        assert len(flat) == N * H
        az.plot_trace(to_arviz(draws), backend="none")
        az.plot_trace(data, backend="none")
    else:
        with mpl.rc_context({"backend": "agg"}):
            assert az.plot_trace(data, var_names=["z"]).shape[1] == 2
            mpl.pyplot.close("all")


def conjugate(y, spread=1.0):
    """Normal data with a normal mean: its programs, and the moments of its exact posterior."""
    precision = 1 / spread**2 + len(y)
    mean = y.sum() / precision

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, spread))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(mean, precision**-0.5))

    return model, guide


def test_loo_is_the_predictive_density_given_the_others():
    y = torch.tensor([0.3, -1.2, 0.8, 1.9, -0.4, 0.1])
    draws = draw_posterior(*conjugate(y), y, num_draws=4000, joint=True, seed=1)
    found = az.loo(to_arviz(draws), pointwise=True)
    pointwise = found.elpd_i if NEW else found.loo_i
    precision = 1 + len(y) - 1  # of the mean given the others
    mean = (y.sum() - y) / precision
    exact = dist.Normal(mean, (1 + 1 / precision) ** 0.5).log_prob(y)
    # The delta method: the error of the log of a mean of 1 / p(y_n | mu).
    inverse = (-dist.Normal(draws.latents["mu"][:, None], 1.0).log_prob(y)).exp()
    error = inverse.std(0) / inverse.mean(0) / 4000**0.5
    distance = torch.as_tensor(pointwise.values) - exact
    assert (distance.abs() < STANDARD_ERRORS * error).all()
    # A guide that is off by 0.45 standard deviations of the posterior is seen, and mended.
    wrong = draw_posterior(
        conjugate(y)[0], conjugate(y + 0.2)[1], y, num_draws=4000, joint=True, seed=1
    )
    biased = az.loo(to_arviz(wrong), pointwise=True)
    values = (biased.elpd_i if NEW else biased.loo_i).values
    assert (np.abs(values - exact.numpy()) > STANDARD_ERRORS * error.numpy()).any()
    mended = az.loo(to_arviz(wrong.resampled(seed=2)), pointwise=True)
    values = (mended.elpd_i if NEW else mended.loo_i).values
    # Weighting and resampling at most double the error, for the weights are worth half the draws.
    assert float(wrong.resampled().weights_ess) > 4000 / 2
    assert (np.abs(values - exact.numpy()) < 2 * STANDARD_ERRORS * error.numpy()).all()
    if NEW:
        data = to_arviz(wrong)
        stats = data["sample_stats"]
        found = az.loo_approximate_posterior(data, stats["lp"], stats["log_q"], pointwise=True)
        distance = np.abs(found.elpd_i.values - exact.numpy())
        assert (distance < 2 * STANDARD_ERRORS * error.numpy()).all()


@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_compare_ranks_the_model_that_made_the_data_first():
    y = 2.0 + torch.randn(40)
    free, fixed = (
        to_arviz(draw_posterior(*conjugate(y, spread), y, num_draws=500, joint=True))
        for spread in (3.0, 0.05)  # the second can hardly leave zero
    )
    table = az.compare({"fixed": fixed, "free": free})
    assert table.index.tolist() == ["free", "fixed"]
