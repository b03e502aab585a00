"""Predictive checks: a model that is wrong in a known way is named, the right one is not."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_vae.diagnostics.predictive_check import predictive_check
from pyro_vae.inference.draws import draw_posterior
from pyro_vae.inference.predictive import draw_predictive
from pyro_vae.inference.programs import ProgramError
from pyro_vae.models import LinearGaussian

N, D, H = 40, 3, 2
DRAWS = 200
STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


@pytest.fixture
def linear():
    weight = torch.tensor([[1.0, 0.2], [-0.5, 0.7], [0.3, 0.4]])
    return LinearGaussian.from_parameters(weight, torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.5))


def counts_model(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def counts_guide(x):
    """The conjugate posterior of the rate."""
    pyro.sample("rate", dist.Gamma(2.0 + x.sum(), 0.5 + len(x)))


def notes_of(found):
    return " ".join(found.provenance["verdict"] + found.provenance["notes"])


def p_of(found, statistic, kind="posterior"):
    return float(found.p_value.sel(kind=kind, statistic=statistic))


# --- counts ---------------------------------------------------------------------------------------


def test_overdispersed_counts_under_a_poisson_are_flagged_in_spread_and_not_in_mean():
    x = dist.Poisson(dist.Gamma(1.5, 1.5 / 4).sample((60,))).sample()
    found = predictive_check(counts_model, counts_guide, x, joint=True)
    # The variance is 4 + 16/1.5, nearly four times the mean.
    assert p_of(found, "sd") <= 0.01
    assert p_of(found, "fraction zero") <= 0.01
    assert p_of(found, "mean") > 0.1
    assert found.discrepancy.sel(kind="posterior", statistic="sd") > 5
    assert "posterior predictive does not reproduce" in notes_of(found)
    assert "sd (the data are +" in notes_of(found)
    assert "conservative" in notes_of(found)


def test_counts_from_the_model_are_flagged_as_rarely_as_stated():
    # Of 100 right p-values about 1 or fewer reach 0.01; more than 6 have probability 5e-5.
    flagged = total = 0
    for seed in range(20):
        x = dist.Poisson(4.0).sample((60,))
        found = predictive_check(counts_model, counts_guide, x, joint=True, seed=seed)
        flagged += int((found.p_value <= 0.01).sum())
        total += found.p_value.size
    assert total == 100  # five statistics: a count by itself has no mean within a datum
    assert flagged <= 6
    assert "reproduces all 5 statistics" in notes_of(found)


def test_the_replicates_have_the_moments_of_the_predictive():
    x = torch.tensor([3.0, 5.0, 4.0, 8.0])
    found = predictive_check(
        counts_model, counts_guide, x, joint=True, kind="both", num_draws=4000
    ).replicated.sel(statistic="mean")
    # A mean of n counts has the variance E[rate]/n + var(rate); rates are Gamma(a, b).
    for kind, a, b in (("prior", 2.0, 0.5), ("posterior", 2.0 + 20.0, 0.5 + 4)):
        draws = found.sel(kind=kind).values
        variance = a / b / 4 + a / b**2
        assert abs(draws.mean() - a / b) < STANDARD_ERRORS * (variance / 4000) ** 0.5
        # The kurtosis of either is below 6, so a relative error of the variance sqrt(5/4000).
        assert abs(draws.var() / variance - 1) < STANDARD_ERRORS * (5 / 4000) ** 0.5


def test_the_p_value_is_the_tail_area_and_counts_ties_on_both_sides():
    x = torch.tensor([3.0, 5.0, 4.0, 8.0])
    found = predictive_check(counts_model, counts_guide, x, joint=True)
    for name in found.statistic.values:
        draws = found.replicated.sel(kind="posterior", statistic=name).values
        observed = float(found.observed.sel(statistic=name))
        above = (1 + (draws >= observed).sum()) / (1 + DRAWS)
        below = (1 + (draws <= observed).sum()) / (1 + DRAWS)
        assert p_of(found, name) == pytest.approx(min(1.0, 2 * min(above, below)))
    assert found.observed.sel(statistic="mean") == 5.0
    assert found.observed.sel(statistic="max") == 8.0
    assert found.observed.sel(statistic="sd") == pytest.approx(3.5**0.5)


# --- per datum ------------------------------------------------------------------------------------


def test_a_datum_that_the_model_cannot_make_is_found(linear):
    x = linear.sample(N)
    x[7] = torch.tensor([9.0, 9.0, -9.0])
    found = predictive_check(linear.model, linear.exact_guide, x)
    p = found.likelihood_p_value.sel(kind="posterior")
    assert p.dims == ("datum",)
    assert int(p.values.argmin()) == 7
    assert p[7] == pytest.approx(1 / (1 + DRAWS))
    assert (p.values[np.arange(N) != 7] > 0.01).mean() > 0.9
    assert f"of {N} data are less likely than 99 %" in notes_of(found)


def test_the_likelihood_p_value_is_the_closed_form_one():
    # Latents that do not matter: 2 log p(x_rep) is minus a chi-square plus a constant.
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x), D]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.linspace(-2.5, 2.5, N * D).reshape(N, D)
    found = predictive_check(model, guide, x, kind="both", num_draws=2000)
    exact = 1 - dist.Gamma(D / 2, 0.5).cdf(x.square().sum(-1))
    error = (exact * (1 - exact) / 2000).sqrt() + 1 / 2000
    for kind in ("posterior", "prior"):
        p = torch.as_tensor(found.likelihood_p_value.sel(kind=kind).values)
        assert ((p - exact).abs() < STANDARD_ERRORS * error).all()


def test_data_of_the_right_model_are_not_called_rare_for_lying_far_from_the_prior_s_latents():
    """Data that tell their latents closely are unlikely at latents drawn without them."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.02), obs=x)

    x = torch.randn(N)
    found = predictive_check(model, None, x, kind="prior")
    assert (found.likelihood_p_value <= 0.05).mean() > 0.5  # it has no level, so nothing is said
    assert "less likely" not in notes_of(found)
    assert "prior predictive reproduces all" in notes_of(found)


def test_discrete_data_that_tie_are_as_likely():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(0.5).expand([len(x)]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    found = predictive_check(model, guide, torch.ones(N))
    assert (found.likelihood_p_value == 1).all()
    assert p_of(found, "max") == 1.0
    assert p_of(found, "mean") <= 0.01


# --- arguments ------------------------------------------------------------------------------------


def test_own_statistics_of_one_and_of_several_sites(linear):
    x = linear.sample(N)
    largest = {"largest norm": lambda x: x.norm(dim=-1).max()}
    found = predictive_check(linear.model, linear.exact_guide, x, statistics=largest)
    assert list(found.statistic.values) == ["largest norm"]
    assert found.observed.item() == pytest.approx(float(x.norm(dim=-1).max()))

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y) / 3, 3**-0.5))

    pair = torch.randn(N), 3 + torch.randn(N)
    both = predictive_check(model, guide, pair)
    assert "x: mean" in both.statistic
    assert both.sizes["statistic"] == 10
    distance = {"distance": lambda data: (data["x"] - data["y"]).mean()}
    own = predictive_check(model, guide, pair, statistics=distance)
    assert p_of(own, "distance") <= 0.01


def test_the_prior_needs_no_guide_and_a_regression_has_data(linear):
    x = linear.sample(N)
    found = predictive_check(linear.model, None, x + 50.0, kind="prior")
    assert list(found.kind.values) == ["prior"]
    assert p_of(found, "mean", "prior") <= 0.01
    with pytest.raises(ValueError, match="pass one, or kind='prior'"):
        predictive_check(linear.model, None, x)

    def regression(c, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((c * weight).sum(-1), 0.5), obs=y)

    data = torch.randn(9, 2), torch.randn(9)
    joint = predictive_check(regression, AutoNormal(regression), data, joint=True, kind="both")
    assert joint.likelihood_p_value.shape == (2, 9)


def test_programs_that_cannot_be_vectorised_and_draws_in_parts(linear):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            table = torch.tensor([0.0, 3.0])
            pyro.sample("x", dist.Normal(torch.stack([table[int(i)] for i in z]), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=3 * x - 4.5))

    x = torch.tensor([0.0, 3.1, 2.9, -0.2])
    found = predictive_check(model, guide, x, kind="both", num_draws=20)
    assert found.replicated.shape == (2, 5, 20)
    assert "with 20 draws no p-value can be 0.01" in notes_of(found)
    parts = predictive_check(linear.model, linear.exact_guide, linear.sample(N), max_memory=1e-4)
    assert parts.replicated.shape == (1, 6, DRAWS)
    assert len(np.unique(parts.replicated.sel(statistic="mean"))) == DRAWS


def test_enumerated_latents_have_no_likelihood_per_datum():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(3 * k + z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    found = predictive_check(model, guide, torch.randn(N), kind="both")
    assert "likelihood_p_value" not in found
    assert "k, summed out of the model" in notes_of(found)
    spread = found.replicated.sel(kind="prior", statistic="sd").mean()
    assert abs(float(spread) - (2 + 9 / 4) ** 0.5) < 0.1  # of 40 data, over 200 draws: 0.02


def test_summed_out_latents_are_drawn_from_their_posterior():
    """As `draw_predictive` has them; drawn from the prior the mean would be 3 x 0.2 = 0.6."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.5))
            k = pyro.sample("k", dist.Bernoulli(0.2), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(3 * k + z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 0.5))

    x = torch.tensor([2.0, 2.6, 1.7])
    nodes, weights = (torch.as_tensor(part) for part in hermegauss(40))
    z = 0.5 * nodes[:, None]
    odds = 0.25 * (dist.Normal(3 + z, 1.0).log_prob(x) - dist.Normal(z, 1.0).log_prob(x)).exp()
    exact = (weights @ (3 * odds / (1 + odds))).mean() / weights.sum()
    assert exact > 1.0
    draws = 2000
    found = predictive_check(model, guide, x, num_draws=draws)
    replicated = found.replicated.sel(kind="posterior", statistic="mean").values
    assert abs(replicated.mean() - float(exact)) < STANDARD_ERRORS * replicated.std() / draws**0.5
    drawn = draw_posterior(model, guide, x, num_draws=draws)
    other = draw_predictive(model, drawn, x).values["x"].mean(1)
    assert abs(float(other.mean() - exact)) < STANDARD_ERRORS * float(other.std()) / draws**0.5


def test_a_narrow_guide_flags_a_right_model_and_the_exact_posterior_does_not():
    """What is conservative are p-values of the true posterior: under it x has variance 2 again.

    With the posterior's mean alone it is 1.5; over 500 data sd is 4.3 standard errors too small.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    flagged = {1.0: 0, 0.05: 0}
    for seed in range(4):
        x = 2**0.5 * torch.randn(500)
        for width in flagged:

            def guide(x, width=width):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(x / 2, width * 0.5**0.5))

            found = predictive_check(model, guide, x, seed=seed)
            flagged[width] += p_of(found, "sd") <= 0.01
    assert flagged[1.0] == 0
    assert flagged[0.05] >= 3


def test_the_seed_decides_and_the_random_state_is_kept(linear):
    x = linear.sample(N)
    state = torch.get_rng_state()
    first, again, other = (
        predictive_check(linear.model, linear.exact_guide, x, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert first.replicated.equals(again.replicated)
    assert not first.replicated.equals(other.replicated)
    both = predictive_check(linear.model, linear.exact_guide, x, kind="both", seed=1)
    assert np.array_equal(both.replicated.sel(kind="posterior"), first.replicated[0])


def test_what_cannot_be_checked_is_refused(linear):
    x = linear.sample(N)

    def check(**options):
        return predictive_check(linear.model, linear.exact_guide, x, **options)

    with pytest.raises(ValueError, match="num_draws must be an integer from 20"):
        check(num_draws=19)
    with pytest.raises(ValueError, match="max_memory"):
        check(max_memory=0.0)
    with pytest.raises(ValueError, match="statistics is empty"):
        check(statistics={})
    with pytest.raises(ValueError, match="'rows' does not turn the observed data into one number"):
        check(statistics={"rows": lambda x: x.sum(-1)})
    with pytest.raises(ValueError, match="'log' of the data is nan"):
        check(statistics={"log": lambda x: x.log().mean()})

    def factor(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(H), 1.0).to_event(1))
            pyro.factor("score", -z.square().sum(-1))

    with pytest.raises(ProgramError, match=r"'score' is a pyro\.factor"):
        predictive_check(factor, linear.exact_guide, x)
    scaled = poutine.scale(linear.model, scale=2.0), poutine.scale(linear.exact_guide, scale=2.0)
    with pytest.raises(ProgramError, match="subsample or rescale"):
        predictive_check(*scaled, x)


def test_a_replicate_whose_statistic_is_nan_counts_for_the_model(linear):
    x = linear.sample(N).abs() + 1
    found = predictive_check(
        linear.model, linear.exact_guide, x, statistics={"log": lambda x: x.log().mean()}
    )
    assert p_of(found, "log") == 1.0
    assert "replicates of the posterior predictive gave a statistic that is nan" in notes_of(found)
