"""Leave-one-out densities beside those of conjugate models in closed form, and those of R."""

import json
import math
import os
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import Tensor

from pyro_vae import loo
from pyro_vae.diagnostics.comparison import elpd_data, held_out, kfold
from pyro_vae.inference.programs import ProgramError
from pyro_vae.plots import plot_khat, plot_loo_pit
from pyro_vae.results import paired_difference

ERRORS = 4.5  # standard errors: a comparison fails at a rate of 7e-6
NOISE = 0.7
RNG = np.random.default_rng(0)
DESIGN = RNG.normal(size=(31, 3))
DESIGN[0] *= 4.0
Y = DESIGN @ [1.0, -1.0, 0.5] + NOISE * RNG.normal(size=31)
DATA = (torch.tensor(DESIGN), torch.tensor(Y))


def posterior(design: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of b ~ N(0, 1) given y ~ N(design b, NOISE)."""
    covariance = np.linalg.inv(np.eye(design.shape[1]) + design.T @ design / NOISE**2)
    return covariance @ design.T @ y / NOISE**2, covariance


def predictive(design: np.ndarray, y: np.ndarray, new: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Log predictive density of each new datum, and nothing of the code under test."""
    mean, covariance = posterior(design, y)
    variance = NOISE**2 + np.einsum("ni,ij,nj->n", new, covariance, new)
    return stats.norm.logpdf(at, new @ mean, np.sqrt(variance))


def exact_loo(design: np.ndarray = DESIGN, y: np.ndarray = Y) -> np.ndarray:
    others = [np.arange(len(y)) != n for n in range(len(y))]
    one = [slice(n, n + 1) for n in range(len(y))]
    return np.concatenate(
        [predictive(design[k], y[k], design[n], y[n]) for k, n in zip(others, one, strict=True)]
    )


def regression(design: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((design * b).sum(-1), NOISE), obs=y)


def guide_of(scale: float = 1.0, shift: float = 0.0) -> Any:
    """The exact posterior of the data at hand, stretched, and moved by so many of its sds."""

    def guide(design: Tensor, y: Tensor) -> None:
        mean, covariance = (torch.tensor(a) for a in posterior(design.numpy(), y.numpy()))
        mean = mean + shift * covariance.diagonal().sqrt()
        root = scale * torch.linalg.cholesky(covariance)
        pyro.sample("b", dist.MultivariateNormal(mean, scale_tril=root))

    return guide


def check(found: Any, truth: np.ndarray) -> None:
    assert abs(float(found.elpd) - truth.sum()) < ERRORS * float(found.elpd_se)
    away = abs(found.log_predictive.values - truth)
    assert (away < ERRORS * found.log_predictive_se.values).all()


# --- regression -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.3, 0.5)])
def test_each_datum_left_out_is_that_of_the_closed_form(scale: float, shift: float) -> None:
    found = loo(regression, guide_of(scale, shift), DATA, seed=1, progress=False)
    check(found, exact_loo())
    assert float(found.elpd_se) < 0.3
    assert found.reliable.all()
    assert not found.moved.any()
    sd = exact_loo().std(ddof=1) * math.sqrt(31)
    assert sd < float(found.data_standard_error) < 1.3 * sd
    fit = predictive(DESIGN, Y, DESIGN, Y).sum()
    assert float(found.p_loo) == pytest.approx(fit - exact_loo().sum(), abs=0.5)
    assert found.elpd.attrs["reduction"] == "total"
    assert any("posterior of b given the others" in note for note in found.provenance["notes"])


def test_a_guide_off_the_posterior_is_corrected_by_moving_its_draws() -> None:
    guide = guide_of(0.5, 1.5)
    plain = loo(regression, guide, DATA, moment_matching=False, seed=0)
    assert not plain.reliable.any()
    assert any("k-hat is above 0.70 for 31 of 31 data" in n for n in plain.provenance["notes"])
    moved = loo(regression, guide, DATA, seed=0, progress=False)
    assert moved.reliable.all()
    check(moved, exact_loo())
    assert any("moved to the moments" in note for note in moved.provenance["notes"])


def test_a_wild_datum_is_moved_or_fitted_anew() -> None:
    """One far out at high leverage: the posterior of the others is far from that of all."""
    y = Y.copy()
    y[0] += 9.0
    data, truth = (DATA[0], torch.tensor(y)), exact_loo(DESIGN, y)
    plain = loo(regression, guide_of(), data, moment_matching=False, seed=0, progress=False)
    assert plain.khat.values[0] > 0.7
    assert not plain.reliable.values[0]
    wrong = abs(plain.log_predictive.values[0] - truth[0])
    moved = loo(regression, guide_of(), data, seed=0, progress=False)
    assert float(moved.elpd_se) < 0.3
    assert moved.moved.values[0]
    check(moved, truth)
    assert abs(moved.log_predictive.values[0] - truth[0]) < 0.2 * wrong


def test_what_is_not_moved_is_fitted_anew() -> None:
    calls, truth = [], exact_loo()

    def refit(part: Any) -> Any:
        calls.append(len(part[1]))
        return regression, guide_of(1.1)

    found = loo(
        regression, guide_of(0.5, 1.5), DATA, moment_matching=False, refit=refit, max_refits=3,
        num_draws=1000, progress=False,
    )  # fmt: skip
    assert calls == [30] * 3
    again = found.refitted.values
    assert (found.reliable.values == again).all()
    away = abs(found.log_predictive.values - truth)[again]
    assert (away < ERRORS * found.log_predictive_se.values[again]).all()
    assert found.log_predictive_se.values[again].max() < 0.1


def test_a_part_of_the_data_estimates_the_whole() -> None:
    estimates = [
        loo(regression, guide_of(1.2), DATA, subsample=12, seed=s, progress=False) for s in range(6)
    ]
    for found in estimates:
        assert abs(float(found.elpd) - exact_loo().sum()) < ERRORS * float(found.elpd_se)
        rows = found.datum.values
        assert len(set(rows.tolist())) == 12
        check_rows = abs(found.log_predictive.values - exact_loo()[rows])
        assert (check_rows < ERRORS * found.log_predictive_se.values).all()
        whole = exact_loo().std(ddof=1) * math.sqrt(31)
        assert float(found.data_standard_error) == pytest.approx(whole, rel=0.1)
    # WAIC stands for the rest: the sum of 12 data scaled up would scatter by 8 nats.
    assert np.std([float(found.elpd) for found in estimates]) < 1.0
    with pytest.raises(ValueError, match="subsample is 32, but there are 31"):
        loo(regression, guide_of(), DATA, subsample=32)


def exact_pit(y: np.ndarray) -> np.ndarray:
    shares = []
    for n in range(31):
        k = np.arange(31) != n
        mean, covariance = posterior(DESIGN[k], y[k])
        sd = math.sqrt(NOISE**2 + DESIGN[n] @ covariance @ DESIGN[n])
        shares.append(stats.norm.cdf(y[n], DESIGN[n] @ mean, sd))
    return np.array(shares)


def test_where_data_lie_in_their_predictions_is_that_of_the_closed_form() -> None:
    """At most 0.5 / sqrt(effective draws) of an error each, and these are 2000 of 8000 at least."""
    guide = guide_of(1.3, 1.0)
    found = loo(regression, guide, DATA, pit=True, num_draws=8000, seed=0, progress=False)
    assert abs(found.pit.values - exact_pit(Y)).max() < ERRORS * 0.5 / 2000**0.5
    assert float(found.pit_p_value) > 1e-3
    inside = (found.ecdf_lower <= found.pit_ecdf) & (found.pit_ecdf <= found.ecdf_upper)
    assert inside.all()
    shares = np.minimum(np.floor(found.pit.values * 100), 99)
    assert found.pit_ecdf.values == pytest.approx(
        [(shares <= rank).mean() for rank in range(100)], abs=1e-12
    )
    assert plot_loo_pit(found).get_ylabel() == "ECDF - uniform"
    with pytest.raises(ValueError, match="no PITs"):
        plot_loo_pit(loo(regression, guide_of(), DATA, num_draws=100))


def test_a_scale_far_too_small_is_seen_by_the_pits() -> None:
    y = Y + 2.0 * RNG.normal(size=31)
    found = loo(regression, guide_of(), (DATA[0], torch.tensor(y)), pit=True, progress=False)
    assert float(found.pit_p_value) < 1e-3
    assert abs(found.pit.values - exact_pit(y))[found.moved.values].max(initial=0.0) < 0.15
    refitted = loo(
        regression, guide_of(0.5, 1.5), DATA, pit=True, moment_matching=False, num_draws=500,
        refit=lambda _: (regression, guide_of()), max_refits=2, progress=False,
    )  # fmt: skip
    assert (np.isnan(refitted.pit.values) == refitted.refitted.values).all()


def test_counts_are_placed_at_random_among_ties() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(200.0), 100.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("rate", dist.Gamma(200.0 + x.sum(), 100.0 + len(x)))

    x = torch.tensor(RNG.poisson(2.0, 200)).double()
    found = loo(model, guide, x, pit=True, num_draws=500, seed=0, progress=False)
    low, high = (stats.poisson.cdf(x.numpy() - k, 2.0) for k in (1, 0))
    assert ((low - 0.1 < found.pit.values) & (found.pit.values < high + 0.1)).all()
    ties = found.pit.values[x.numpy() == 2]
    assert ties.max() - ties.min() > 0.15
    assert float(found.pit_p_value) > 1e-3


def test_folds_and_held_out_data_are_those_of_the_closed_form() -> None:
    folds = np.arange(31) % 4
    found = kfold(
        regression, guide_of(), DATA, folds=folds.tolist(), seed=0, progress=False,
        refit=lambda _: (regression, guide_of(1.2)),
    )  # fmt: skip
    truth = np.empty(31)
    for fold in range(4):
        inside = folds == fold
        truth[inside] = predictive(DESIGN[~inside], Y[~inside], DESIGN[inside], Y[inside])
    check(found, truth)
    assert (found.fold.values == folds).all()
    split = (tuple(a[:20] for a in DATA), tuple(a[20:] for a in DATA))
    held = held_out(regression, guide_of(0.9, 0.3), *split, seed=0)
    check(held, predictive(DESIGN[:20], Y[:20], DESIGN[20:], Y[20:]))


# --- latents of each datum ------------------------------------------------------------------------

X = torch.tensor([0.3, 1.9, -0.8, 2.2, 0.7, 1.1, -1.5], dtype=torch.float64)


def hierarchy(x: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def amortised(x: Tensor) -> None:
    precision = 1 + len(x) / 2
    theta = pyro.sample("theta", dist.Normal(x.sum() / 2 / precision, 1.1 * precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + theta) / 2, 0.9))


def predicted_by(x: np.ndarray, new: np.ndarray) -> np.ndarray:
    precision = 1 + len(x) / 2
    return stats.norm.logpdf(new, x.sum() / 2 / precision, np.sqrt(2 + 1 / precision))


def test_latents_of_each_datum_are_integrated_out() -> None:
    x = X.numpy()
    truth = np.array([predicted_by(np.delete(x, n), x[n]) for n in range(7)])
    found = loo(hierarchy, amortised, X, seed=3, progress=False)
    check(found, truth)
    assert found.provenance["config"]["num_inner"] == 32
    held = held_out(hierarchy, amortised, X[:4], X[4:], seed=0)
    check(held, predicted_by(x[:4], x[4:]))
    assert float(held.elpd_se) < 0.05


def test_a_guide_with_a_posterior_for_each_datum_knows_nothing_of_new_ones() -> None:
    """Their latents are then drawn from the prior, which bounds their density more tightly."""

    def guide(x: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(X[:4].sum() / 6, 3**-0.5))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal((X[:4] + theta) / 2, 0.6))

    held = held_out(hierarchy, guide, X[:4], X[4:], num_inner=200, seed=0)
    check(held, predicted_by(X[:4].numpy(), X[4:].numpy()))


def test_moving_is_right_with_drawn_latents_too() -> None:
    def narrow(x: Tensor) -> None:
        precision = 1 + len(x) / 2
        theta = pyro.sample("theta", dist.Normal(x.sum() / 2 / precision + 0.7, 0.15))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + theta) / 2, 0.8))

    x = X.numpy()
    truth = np.array([predicted_by(np.delete(x, n), x[n]) for n in range(7)])
    assert not loo(hierarchy, narrow, X, moment_matching=False, progress=False).reliable.all()
    found = loo(hierarchy, narrow, X, seed=0, progress=False)
    assert found.reliable.all()
    check(found, truth)


def test_moving_a_rate_knows_its_jacobian() -> None:
    """Poisson counts with a gamma rate: the predictive is a negative binomial."""
    x = torch.tensor(RNG.poisson(0.8, 9)).double()

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        loc = ((2 + x.sum()) / (1 + len(x))).log() + 0.4
        pyro.sample("rate", dist.LogNormal(loc, 0.1))

    rest = 2 + x.numpy().sum() - x.numpy()
    truth = stats.nbinom.logpmf(x.numpy(), rest, 9 / 10)
    assert not loo(model, guide, x, moment_matching=False, progress=False).reliable.any()
    found = loo(model, guide, x, num_draws=8000, seed=0, progress=False)
    assert found.reliable.all()
    check(found, truth)
    assert float(found.elpd_se) < 0.1


def test_discrete_latents_of_each_datum_are_summed_out() -> None:
    """Pyro's mixture with one free location, beside quadrature over it."""

    @config_enumerate
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(1.0), 2.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(torch.where(k == 0, -1.0, mu), 0.8), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(torch.tensor(1.4), 0.6))

    grid = np.linspace(-9.0, 11.0, 4001)[:, None]
    prior = stats.norm.pdf(grid[:, 0], 1.0, 2.0)

    def density(x: np.ndarray) -> np.ndarray:
        return 0.3 * stats.norm.pdf(x, -1.0, 0.8) + 0.7 * stats.norm.pdf(x, grid, 0.8)

    x = X.numpy()
    of_others = [prior * density(np.delete(x, n)).prod(1) for n in range(7)]
    mean = [w @ density(x[n : n + 1])[:, 0] / w.sum() for n, w in enumerate(of_others)]
    check(loo(model, guide, X, seed=0, progress=False), np.log(mean))
    of_all = prior * density(x).prod(1)
    held = held_out(model, guide, X, X[:3] + 0.4, seed=0)
    check(held, np.log(of_all @ density(x[:3] + 0.4) / of_all.sum()))
    auto = AutoNormal(poutine.block(model, hide=["k"]), init_scale=0.5)
    auto(X)
    check(loo(model, auto, X, seed=0, progress=False), np.log(mean))


# --- without global latents -----------------------------------------------------------------------


def local(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def alone(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + loc) / 2, 0.5**0.5))


def check_folds(found: Any, tolerance: float) -> None:
    fold = found.fold.values
    assert sorted(np.bincount(fold).tolist()) == [3, 4]
    for own in (0, 1):
        mean = X.numpy()[fold != own].mean()  # the maximum of the evidence
        truth = stats.norm.logpdf(X.numpy()[fold == own], mean, 2**0.5)
        assert found.log_predictive.values[fold == own] == pytest.approx(truth, abs=tolerance)


def test_models_without_global_latents_are_fitted_without_each_fold() -> None:
    with pytest.raises(ProgramError, match="no latent is global, so given the parameters data are"):
        loo(local, alone, X)

    def refit(part: Tensor) -> Any:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(part.mean(), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x + part.mean()) / 2, 0.5**0.5))

        return model, guide

    found = kfold(local, alone, X, num_folds=2, refit=refit, seed=0, progress=False)
    check_folds(found, 1e-9)


@pytest.mark.long
def test_without_a_refit_copies_are_fitted() -> None:
    found = kfold(local, alone, X, num_folds=2, seed=0, progress=False)
    check_folds(found, 0.1)
    assert "loc" not in pyro.get_param_store()


# --- R, ArviZ, refusals ---------------------------------------------------------------------------


@pytest.mark.skipif("PYRO_VAE_DATA" not in os.environ, reason="needs posteriordb")
def test_the_numbers_that_r_prints_of_kidiq() -> None:
    """rstanarm's regression of kid_score on mom_hs + mom_iq, by loo of 4000 draws.

    elpd_loo -1876.0, SE 14.2; p_loo 4.0, SE 0.4 (as printed in three public pages).
    Its weak priors move the sum by less than 0.1.
    """
    path = Path(os.environ["PYRO_VAE_DATA"]) / "posteriordb" / "kidiq-kidscore_momhsiq.json"
    if not path.exists():
        pytest.skip("needs posteriordb")
    given = json.loads(path.read_text())["data"]
    y = np.array(given["kid_score"], dtype=float)
    iq = np.array(given["mom_iq"])
    design = np.stack([np.ones(434), given["mom_hs"], (iq - iq.mean()) / 15], 1)
    gram = np.linalg.inv(design.T @ design)
    ols = gram @ design.T @ y
    sd = math.sqrt(((y - design @ ols) ** 2).sum() / 431)

    def model(design: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1000.0).to_event(1))
        scale = pyro.sample("sigma", dist.HalfCauchy(torch.tensor(2.5)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((design * b).sum(-1), scale), obs=y)

    def guide(design: Tensor, y: Tensor) -> None:
        root = 1.1 * sd * torch.linalg.cholesky(torch.tensor(gram))
        pyro.sample("b", dist.MultivariateNormal(torch.tensor(ols), scale_tril=root))
        pyro.sample("sigma", dist.LogNormal(torch.tensor(math.log(sd)), 800**-0.5))

    found = loo(model, guide, (torch.tensor(design), torch.tensor(y)), num_draws=8000, seed=0)
    room = ERRORS * float(found.elpd_se)
    assert room < 0.15
    assert abs(float(found.elpd) + 1876.0) < 0.1 + room
    assert elpd_data(found).se == pytest.approx(14.2, abs=0.06)
    assert float(found.p_loo) == pytest.approx(4.0, abs=0.15)
    # The same with a flat prior of b and 1 / sigma: Student's t with 430 degrees of freedom.
    leverage = np.einsum("ni,ij,nj->n", design, gram, design)
    rest = (y - design @ ols) / (1 - leverage)
    variance = (431 * sd**2 - rest**2 * (1 - leverage)) / 430 / (1 - leverage)
    flat = stats.t.logpdf(rest, 430, 0, np.sqrt(variance)).sum()
    assert abs(float(found.elpd) - flat) < 0.05 + room


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The inplace keyword")
def test_arviz_compares_what_it_is_given() -> None:
    def empty(design: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1e-3).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((design * b).sum(-1), NOISE), obs=y)

    def prior(design: Tensor, y: Tensor) -> None:
        pyro.sample("b", dist.Normal(torch.zeros(3), 1e-3).to_event(1))

    right = loo(regression, guide_of(), DATA, progress=False)
    wrong = loo(empty, prior, DATA, progress=False)
    table = az.compare({"wrong": elpd_data(wrong), "right": elpd_data(right)})
    assert list(table.index) == ["right", "wrong"]
    differences = exact_loo() - stats.norm.logpdf(Y, 0.0, NOISE)
    elpd_diff = abs(table.loc["wrong", "elpd_diff"])  # ArviZ 1 has the other sign
    assert elpd_diff == pytest.approx(differences.sum(), abs=0.6)
    assert table.loc["wrong", "dse"] == pytest.approx(differences.std() * 31**0.5, rel=0.05)
    assert "elpd_loo" in str(elpd_data(right))
    paired = paired_difference(right, wrong, "log_predictive")
    assert 31 * paired.value == pytest.approx(elpd_diff)
    assert paired.data_standard_error == pytest.approx(differences.std() / 31**0.5, rel=0.5)
    assert plot_khat(right).get_xlabel() == "Pareto k-hat"
    part = loo(regression, guide_of(), DATA, subsample=5)
    with pytest.raises(ValueError, match="needs each datum"):
        elpd_data(part)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="num_draws must be an integer from 100"):
        loo(regression, guide_of(), DATA, num_draws=50)
    with pytest.raises(ValueError, match="folds must be 31 integers"):
        kfold(regression, guide_of(), DATA, folds=[0, 1])
    with pytest.raises(TypeError, match="refit returned a int"):
        kfold(regression, guide_of(), DATA, refit=lambda _: 3, progress=False)
    layer = torch.nn.Identity()

    def wide(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b[..., None].expand(*b.shape, 2), 1.0).to_event(1), obs=x)

    def guide_wide(x: Tensor) -> None:
        pyro.sample("b", dist.Normal(torch.tensor(0.0), 0.3))

    def reaches(x: Tensor) -> None:
        local(layer(x))

    with pytest.raises(ProgramError, match="no single number"):
        loo(wide, guide_wide, torch.zeros(5, 2), pit=True)
    auto = AutoNormal(hierarchy)
    auto(X)
    with pytest.raises(ProgramError, match="cannot be fitted to a part of the data"):
        kfold(hierarchy, auto, X, num_folds=2, progress=False)
    with pytest.raises(ProgramError, match="reaches a module, which a new fit would train"):
        kfold(reaches, alone, X)
    with pytest.raises(ProgramError, match="joint log weights need the full data"):
        loo(pyro.poutine.scale(regression, 2.0), pyro.poutine.scale(guide_of(), 2.0), DATA)
