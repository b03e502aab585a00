"""The verdict on posteriors: the exact one passes, those wrong by stated amounts do not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_vae import load_result, posterior_quality
from pyro_vae.diagnostics.posterior import worst_data
from pyro_vae.diagnostics.posterior.assess import Thresholds
from pyro_vae.inference.mcmc import sample_posterior
from pyro_vae.inference.programs import ProgramError
from pyro_vae.models import LinearGaussian

N, D, H = 9, 5, 2
STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison
FAST = {"num_permutations": 100, "num_test_draws": 150, "progress": False}
RHO = 0.9
NAN_IN_DATUM_4 = torch.zeros(100, N, 2)
NAN_IN_DATUM_4[7, 4, 1] = math.nan


def correlated(x):
    """Given x, z has mean x and, where rho is 0.9, correlated latents of variance 1."""
    covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]])
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), 2 * covariance))
        pyro.sample("x", dist.MultivariateNormal(z, 2 * covariance), obs=2 * x)


def gaussian(shift=0.0, scale=1.0, rho=RHO):
    covariance = scale**2 * torch.tensor([[1.0, rho], [rho, 1.0]])

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = x + shift * torch.tensor([1.0, 0.0])
            pyro.sample("z", dist.MultivariateNormal(loc, covariance))

    return guide


def exact_draws(x, count=1500):
    covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]])
    return dist.MultivariateNormal(x, covariance).sample((count,))


@pytest.fixture
def x():
    return torch.linspace(-2, 2, N * 2).reshape(N, 2)


@pytest.fixture
def linear():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(D, H, generator=generator)
    return LinearGaussian.from_parameters(weight, torch.zeros(D), torch.tensor(0.5))


def notes_of(result):
    provenance = result.provenance
    return "\n".join(provenance["verdict"] + provenance["notes"])


def test_errors_of_exact_draws_are_those_of_normal_samples(x):
    """Of S normal draws a mean has the error sd / sqrt(S), an sd sd / sqrt(2 S), to 10 %."""
    count = 1500
    found = posterior_quality(correlated, gaussian(), x, reference=exact_draws(x, count), **FAST)
    assert abs(found.reference_mean_se * count**0.5 / found.reference_sd - 1).max() < 1e-3
    assert abs(found.reference_sd_se * (2 * count) ** 0.5 / found.reference_sd - 1).max() < 0.1


# --- the exact posterior and faults ---------------------------------------------------------------


def test_the_exact_posterior_passes_everything(linear):
    data = linear.sample(30).detach()
    reference = linear.posterior(data).sample((1500,)).detach()
    found = posterior_quality(linear.model, linear.exact_guide, data, reference=reference, **FAST)
    assert found.trustworthy.all()
    assert (found.khat == -math.inf).all()
    assert torch.allclose(torch.tensor(found.ess.values), torch.tensor(1000.0))
    # Of p-values of an exact guide, one in 100 is below 0.01: 6 or more of 30 at 5e-7.
    for name in ("ksd_p_value", "energy_p_value", "mmd_p_value", "c2st_p_value"):
        assert (found[name] <= 0.01).sum() < 6, name
    text = found.summary()
    assert "The posteriors of 30 of 30 data are trustworthy" in text
    assert "All weights are equal for 30 of 30 data" in text
    assert "= 0.67 at S = 1000 draws" in text
    assert set(found.reason.values) == {"It passes every check that was made"}


def test_exact_posteriors_fail_at_most_at_the_stated_rate(x):
    # With a level of 0.2, at most 20 % of results may hold any exact posterior wrong; the guide is
    # exact but for a spread of weights that keeps k-hat and the corrections at work.
    guide = gaussian(shift=0.02)
    wrong = 0
    for seed in range(20):
        found = posterior_quality(
            correlated,
            guide,
            x,
            reference=exact_draws(x),
            checks=[],
            thresholds=Thresholds(level=0.2),
            seed=seed,
            progress=False,
        )
        wrong += not bool(found.trustworthy.all())
    assert wrong < 13  # 13 of 20 have probability 2e-5 at a rate of 0.2


FAULTS = {
    "shifted by half an sd": ({"shift": 0.5}, "the mean is off"),
    "half as wide": ({"scale": 0.5}, "the spread is off"),
    "twice as wide": ({"scale": 2.0}, "the spread is off"),
    "correlation dropped": ({"rho": 0.0}, "draws are told from the posterior's"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_posterior_that_is_wrong_by_a_stated_amount_fails(x, fault):
    change, reason = FAULTS[fault]
    guide = gaussian(**change)
    options = {**FAST, "num_test_draws": 500}
    alone = posterior_quality(correlated, guide, x, **options)
    assert not alone.trust_guide.any()
    assert not alone.trustworthy.any()
    assert (alone.ksd_p_value <= 0.05).all()
    beside = posterior_quality(correlated, guide, x, reference=exact_draws(x), **options)
    assert not beside.trust_guide.any()
    assert f"{reason} ({N})" in notes_of(beside)
    assert (beside.energy_p_value < 0.05).mean() > 0.5
    assert (beside.c2st_accuracy > 0.5 + 3 * beside.c2st_accuracy_se).all()


def test_the_few_posteriors_that_are_wrong_are_found_among_many():
    """Ten of 100, 0.3 times as wide: with 100 permutations alone none could be reported."""
    size, wrong = 100, 10
    data = torch.zeros(size, 2)
    scale = torch.ones(size, 1)
    scale[:wrong] = 0.3

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5 * scale).to_event(1))

    reference = 0.5**0.5 * torch.randn(500, size, 2)
    checks = ["stein", "energy", "mmd"]
    found = posterior_quality(model, guide, data, reference=reference, checks=checks, **FAST)
    (said,) = [note for note in notes_of(found).split("\n") if "tests of whether" in note]
    for title in ("the kernel Stein discrepancy", "the energy distance", "the kernel two-sample"):
        count = int(said.split(title)[1].split(" for ")[1].split()[0])
        # A false discovery rate of 0.01: two false ones have probability 0.005.
        assert wrong <= count <= wrong + 1, said
    for name in ("ksd_p_value", "energy_p_value", "mmd_p_value"):
        assert (found[name][wrong:] <= 0.01).sum() < 10  # 90 exact ones: 1e-7


def test_weights_mend_a_guide_that_is_too_wide_and_not_one_that_is_too_narrow(x):
    wide = posterior_quality(correlated, gaussian(scale=2.0), x, checks=[], progress=False)
    assert wide.trust_weights.all()
    assert not wide.trust_guide.any()
    score = (wide.corrected_mean - x.numpy()) / wide.corrected_mean_se
    assert abs(score).max() < STANDARD_ERRORS
    score = (wide.corrected_sd - 1) / wide.corrected_sd_se
    assert abs(score).max() < STANDARD_ERRORS
    # With sd 0.4 in both latents the tail of the weights has shape 1 - 0.16 = 0.84.
    narrow = posterior_quality(correlated, gaussian(scale=0.4), x, checks=[], progress=False)
    assert narrow.trust_weights.sum() <= 2
    assert not narrow.trust_guide.any()
    assert "k-hat is above 0.67" in notes_of(narrow)


def bimodal(x):
    """The posterior of z has modes at +-2 of sd 0.5, whatever x is."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pair = torch.stack([dist.Normal(side, 0.5).log_prob(z) for side in (-2.0, 2.0)])
        pyro.factor("pair", pair.logsumexp(0))


def test_a_missing_mode_is_seen_by_the_reference_alone():
    def one_mode(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1.95, 0.49))

    data = torch.zeros(3)
    alone = posterior_quality(bimodal, one_mode, data, **FAST)
    assert alone.trustworthy.all()  # nothing that starts from the guide can tell
    assert "blind to a mode that the guide never visits" in notes_of(alone)
    assert "reference='hmc'" in notes_of(alone)
    short = {"num_samples": 100, "num_warmup": 50, "num_leapfrog": 5}
    beside = posterior_quality(bimodal, one_mode, data, reference="hmc", **FAST, **short)
    assert not beside.trustworthy.any()
    # Draws that do visit both modes say what is wrong.
    sides = torch.where(torch.rand(1500, 3, 1) < 0.5, 2.0, -2.0)
    both = sides + 0.5 * torch.randn(1500, 3, 1)
    seen = posterior_quality(bimodal, one_mode, data, reference=both, **FAST)
    assert not seen.trust_guide.any()
    assert not seen.trust_weights.any()
    assert "the weighted mean of z is" in seen.reason.values[0]


# --- references -----------------------------------------------------------------------------------


@pytest.mark.long
def test_hmc_gives_the_moments_of_the_linear_gaussian_posterior(linear):
    data = linear.sample(4).detach()
    exact = linear.posterior(data)
    found = posterior_quality(
        linear.model,
        linear.exact_guide,
        data,
        reference="hmc",
        num_samples=300,
        num_warmup=100,
        thresholds=Thresholds(
            rhat=1.05, reference_ess=100.0, mean=0.6, scale=0.6, total_variation=2.0
        ),
        **FAST,
    )
    assert found.reference_converged.all()
    assert found.trustworthy.all()
    mean = exact.mean.detach().numpy()
    sd = exact.variance.sqrt().detach().numpy()
    assert abs((found.reference_mean - mean) / found.reference_mean_se).max() < STANDARD_ERRORS
    assert abs((found.reference_sd - sd) / found.reference_sd_se).max() < STANDARD_ERRORS
    assert abs((found.reference_mean - mean - sd) / found.reference_mean_se).min() > STANDARD_ERRORS
    assert found.provenance["config"]["hmc"]["start"] == "prior"


def test_a_reference_that_did_not_converge_is_marked_and_not_averaged(linear, tmp_path):
    data = linear.sample(5).detach()
    sample = sample_posterior(
        linear.model, data, num_warmup=60, num_samples=150, num_leapfrog=5, progress=False
    )
    sample.rhat[:] = 1.0
    sample.rhat[2] = 1.4
    thresholds = Thresholds(reference_ess=30.0, mean=1.0, scale=1.0, total_variation=2.0)
    found = posterior_quality(
        linear.model, linear.exact_guide, data, reference=sample, thresholds=thresholds, **FAST
    )
    assert found.reference_converged.values.tolist() == [True, True, False, True, True]
    assert (
        found.mean_error.isnull().any("latent").values.tolist()
        == [False] * 2 + [True] + [False] * 2
    )
    for name in ("energy_p_value", "c2st_accuracy", "covariance_error", "wasserstein_1"):
        assert found[name].isel(datum=2).isnull().all()
    assert found.trustworthy.values.tolist() == [True, True, False, True, True]
    assert "did not converge (R-hat 1.4" in str(found.reason.values[2])
    assert "The reference converged for 4 of 5 data" in found.summary()
    with pytest.raises(ValueError, match="nan"):
        found.quantity("c2st_accuracy")
    kept = found.isel(datum=found.reference_converged.values)
    assert kept.quantity("c2st_accuracy").num_data == 4
    path = found.save(tmp_path / "quality.nc")
    assert load_result(path).reason.values.tolist() == found.reason.values.tolist()


def test_a_latent_that_a_mask_switches_off_is_not_compared():
    mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.poutine.mask(mask=mask):
                pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x / 2, 0.5**0.5))
            with pyro.poutine.mask(mask=mask):
                pyro.sample("b", dist.Normal(0.0, 1.0))

    data = torch.tensor([1.0, -2.0, 0.5])
    settings = {"num_samples": 200, "num_warmup": 80, "num_leapfrog": 5}
    thresholds = Thresholds(rhat=1.1, reference_ess=50.0, mean=1.0, scale=1.0, total_variation=2.0)
    found = posterior_quality(
        model, guide, data, reference="hmc", thresholds=thresholds, **FAST, **settings
    )
    assert found.trustworthy.all()
    assert found.mean_error.isnull().values.tolist() == [[False] * 2, [False, True], [False] * 2]
    assert found.energy_p_value.notnull().all()
    assert found.ksd.isnull().values.tolist() == [False, True, False]


def test_chunks_of_data_meet_their_own_reference(x, monkeypatch):
    monkeypatch.setattr("pyro_vae.diagnostics.posterior.quality._CHUNK", 4)
    found = posterior_quality(
        correlated, gaussian(), x, reference=exact_draws(x), checks=[], progress=False
    )
    assert found.trustworthy.all()
    assert found.sizes["datum"] == N
    crossed = posterior_quality(
        correlated, gaussian(), x, reference=exact_draws(x.flip(0)), checks=[], progress=False
    )
    assert crossed.trustworthy.sum() <= 1


# --- programs of every kind -----------------------------------------------------------------------


def test_global_latents_jointly():
    covariate = torch.randn(30)
    y = 0.7 * covariate + 0.4 * torch.randn(30)

    def regression(covariate, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(slope * covariate, scale), obs=y)

    guide = AutoNormal(regression)
    data = covariate, y
    guide(*data)
    found = posterior_quality(regression, guide, data, joint=True, **FAST)
    assert found.khat.dims == found.ess.dims == found.trustworthy.dims == ()
    assert found.sd.dims == ("latent",)
    assert found.latent.values.tolist() == ["slope", "scale"]
    assert not bool(found.trustworthy)  # never fitted
    assert "This posterior is not trustworthy as a whole" in found.summary()
    precision = 1 + (covariate**2).sum() / 0.4**2
    mean = (covariate * y).sum() / 0.4**2 / precision

    def fixed_noise(covariate, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(slope * covariate, 0.4), obs=y)

    def exact(covariate, y):
        pyro.sample("slope", dist.Normal(mean, precision**-0.5))

    settings = {"num_samples": 200, "num_warmup": 80, "num_leapfrog": 5}
    thresholds = Thresholds(rhat=1.1, reference_ess=50.0, mean=1.0, scale=1.0, total_variation=2.0)
    found = posterior_quality(
        fixed_noise,
        exact,
        data,
        joint=True,
        reference="hmc",
        thresholds=thresholds,
        **FAST,
        **settings,
    )
    assert bool(found.trustworthy)
    assert bool(found.reference_converged)
    assert "This posterior is trustworthy" in found.summary()
    with pytest.raises(ValueError, match="by is 'khat', but must be one of"):
        worst_data(found)


def test_constrained_latents_are_told_in_their_own_space():
    counts = torch.tensor([3.0, 0.0, 11.0])

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def exact(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0 + x, 2.0))

    def lognormal(x):
        with pyro.plate("data", len(x)):
            mean, variance = (2 + x) / 2, (2 + x) / 4
            width = (1 + variance / mean**2).log().sqrt()
            pyro.sample("rate", dist.LogNormal(mean.log() - width**2 / 2, width))

    found = posterior_quality(model, exact, counts, **FAST)
    assert found.trustworthy.all()
    expected = (2 + counts.numpy()) / 2
    score = (found["mean"].sel(latent="rate") - expected) / found.mean_se.sel(latent="rate")
    assert abs(score).max() < STANDARD_ERRORS
    assert (found.ksd_p_value > 0.01).all()
    near = posterior_quality(model, lognormal, counts, num_particles=4000, **FAST)
    score = (near.corrected_mean.sel(latent="rate") - expected) / near.corrected_mean_se.sel(
        latent="rate"
    )
    assert abs(score).max() < STANDARD_ERRORS
    assert (near.khat > -math.inf).all()


def test_discrete_latents_are_judged_by_their_weights(x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def exact(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x - 0.5))

    def uniform(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.1)))

    data = torch.tensor([0.5, 1.5, 2.0])
    found = posterior_quality(model, exact, data, **FAST)
    assert found.trustworthy.all()
    assert "ksd" not in found
    assert "no kernel Stein discrepancy, which needs gradients" in notes_of(found)
    other = posterior_quality(model, uniform, data, **FAST)
    assert not other.trust_guide.any()
    # There are two weights only, so no tail to fear; of datum 0 the larger fills what would be it.
    assert other.khat[0] == -math.inf
    assert other.trust_weights[0]
    assert "largest weights are equal for 1 of 3 data" in notes_of(other)
    assert "all weights are equal" not in notes_of(other)
    p = torch.special.expit(data - 0.5)
    exact_kl = 0.1 * (0.1 / p).log() + 0.9 * (0.9 / (1 - p)).log()
    z = (other.kl_guide_posterior - exact_kl.numpy()) / other.kl_guide_posterior_se
    assert (abs(z) < 4).all()
    with pytest.raises(ProgramError, match="latent site 'z' is discrete"):
        posterior_quality(model, exact, data, checks=["stein"], **FAST)
    with pytest.raises(ProgramError, match="latent site 'z' is discrete"):
        posterior_quality(model, exact, data, reference="hmc", **FAST)


@pytest.mark.float32
def test_rounding_in_single_precision_is_no_tail():
    linear = LinearGaussian(data_dim=D, latent_dim=H)
    found = posterior_quality(linear.model, linear.exact_guide, torch.randn(40, D), **FAST)
    assert found.trustworthy.all()


# --- what is asked of it --------------------------------------------------------------------------


def test_too_few_draws_are_said(x):
    found = posterior_quality(correlated, gaussian(shift=0.1), x, num_particles=5, **FAST)
    assert not found.trustworthy.any()
    assert (found.khat == math.inf).all()
    assert f"too few draws, or weights that are not finite) ({N})" in notes_of(found)
    some = posterior_quality(
        correlated, gaussian(shift=0.1), x, num_particles=60, checks=[], progress=False
    )
    assert "only 5" in str(some.reason.values[0])
    one = posterior_quality(correlated, gaussian(), x[:1], num_particles=1, checks=[])
    assert not bool(one.trustworthy)


def test_one_datum_and_one_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    found = posterior_quality(model, guide, torch.tensor([1.0]), **FAST)
    assert bool(found.trustworthy.all())
    assert found.latent.values.tolist() == ["z"]
    assert found.khat.shape == (1,)


def test_infinite_weights_are_not_trusted(x):
    def impossible(x):  # a guide of half the posterior's support: the other half is never drawn
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x, torch.eye(2)))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
            height = torch.where(z[..., 0] > 5.0, torch.inf, 0.0)
            pyro.sample("x", dist.Delta(x, log_density=height, event_dim=1), obs=x)

    found = posterior_quality(model, impossible, 4.0 + 0 * x, checks=[], progress=False)
    assert not found.trustworthy.any()
    assert (~(found.khat < math.inf)).all()
    assert "weights that are not finite" in notes_of(found)


def test_draws_outside_the_support_have_no_stein_discrepancy():
    def model(x):  # above 0 only the upper half of the posterior is left
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("above", torch.where((z < x / 2) & (x > 0), -math.inf, 0.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    found = posterior_quality(model, guide, torch.tensor([-1.0, 1.0, 2.0]), **FAST)
    assert found.ksd_p_value.isnull().values.tolist() == [False, True, True]
    assert "latents that have density 0" in notes_of(found)
    # Half of the draws count, all alike: the true divergences are known.
    assert (found.khat == -math.inf).all()
    assert abs(found.total_variation[1:] - 0.5).max() < STANDARD_ERRORS * (0.25 / 1000) ** 0.5
    assert found.kl_guide_posterior[1:].values.tolist() == [math.inf] * 2
    assert found.trust_guide.values.tolist() == [True, False, False]


def test_simulations_and_the_predictive_check_are_added(linear):
    data = linear.sample(50).detach()
    found = posterior_quality(
        linear.model,
        linear.exact_guide,
        data,
        num_simulations=60,
        checks=["predictive"],
        num_particles=100,
        progress=False,
    )
    assert found.ranks.dims == ("simulation", "latent")
    assert found.sizes["simulation"] == 60
    assert found.coverage.dims == ("level", "latent")
    assert "predictive_p_value" in found
    assert "ksd" not in found
    assert "calibration: " in notes_of(found)
    assert "predictive check: " in notes_of(found)
    assert "Not run: comparison with Hamiltonian Monte Carlo (reference='hmc')" in notes_of(found)
    assert "the kernel Stein discrepancy (checks=[..., 'stein'])" in notes_of(found)


def test_the_worst_data_come_first(x):
    found = posterior_quality(
        correlated, gaussian(shift=0.4), x, reference=exact_draws(x), checks=[], progress=False
    )
    worst = worst_data(found, count=3)
    assert worst.khat.values.tolist() == sorted(found.khat.values.tolist())[: -N - 1 : -1][:3]
    assert worst_data(found, by="ess", count=1).datum == found.ess.values.argmin()
    errors = abs(found.mean_error).max("latent")
    assert worst_data(found, by="mean_error").datum[0] == errors.values.argmax()
    assert worst.quantity("ess").num_data == 3
    for by, count in (("nonsense", 3), ("reason", 3), ("khat", 0)):
        with pytest.raises(ValueError, match="must be"):
            worst_data(found, by=by, count=count)


def test_the_seed_decides_and_the_callers_stream_is_left_alone(x):
    options = {"checks": ["stein"], "num_particles": 50, **FAST}
    before = torch.get_rng_state()
    first, again = (posterior_quality(correlated, gaussian(0.3), x, **options) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.equals(again)
    other = posterior_quality(correlated, gaussian(0.3), x, seed=1, **options)
    assert (other.khat != first.khat).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_particles": 0}, "num_particles must be an integer from 1"),
        ({"num_test_draws": 3}, "num_test_draws must be an integer from 10"),
        ({"max_memory": 0.0}, "max_memory is in GiB"),
        ({"checks": ["mmmd"]}, "no check 'mmmd'; there are stein, energy"),
        ({"checks": "stein"}, "put its names in a list"),
        ({"checks": ["mmd"]}, "'mmd' compares with a reference; pass reference='hmc'"),
        ({"reference": "nuts"}, "the only one with a name is 'hmc'"),
        ({"reference": 3}, "a tensor of draws, not of type int"),
        ({"reference": "hmc", "num_chains": 1}, "1 chain, which cannot show"),
        ({"reference": "hmc", "start": "middle"}, "must be 'prior' or 'guide'"),
        ({"num_chains": 3}, "num_chains is for reference='hmc' only"),
        ({"num_chain": 3}, "no argument 'num_chain'"),
        ({"reference": torch.zeros(100, N, 3)}, "9 data of 3 latents and the guide 9 of 2"),
        ({"reference": torch.zeros(1, N, 2)}, "at least 2 draws"),
        ({"reference": NAN_IN_DATUM_4}, "draws of datum 4 that are not finite"),
        ({"num_simulations": 3}, "num_simulations must be an integer from 50"),
    ],
)
def test_what_cannot_be_done_is_refused(x, options, says):
    with pytest.raises(ValueError, match=says):
        posterior_quality(correlated, gaussian(), x, **{"progress": False, **options})


def test_references_of_other_data_chains_and_programs_are_refused(linear):
    data = linear.sample(3).detach()
    short = {"num_samples": 10, "num_warmup": 2, "num_leapfrog": 2, "progress": False}
    guide = linear.exact_guide
    other = sample_posterior(linear.model, data + 1, num_chains=2, **short)
    with pytest.raises(ValueError, match="of other data than x"):
        posterior_quality(linear.model, guide, data, reference=other, checks=[])
    single = sample_posterior(linear.model, data, num_chains=1, **short)
    with pytest.raises(ValueError, match="1 chain, which cannot show"):
        posterior_quality(linear.model, guide, data, reference=single, checks=[])


def test_a_model_without_latents_has_no_posterior(x):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)

    with pytest.raises(ProgramError, match="no latent site"):
        posterior_quality(model, lambda x: None, x)


@pytest.mark.parametrize("field", ["mean", "scale", "total_variation", "ess", "rhat"])
def test_limits_are_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be positive"):
        Thresholds(**{field: 0.0})
    with pytest.raises(ValueError, match="level is a probability"):
        Thresholds(level=1.0)
