"""Variational Bayes on mixtures: exact evidences, scikit-learn, and a bound that never falls."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import gammaln, logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture

from pyro_vae.inference.em import fit_em
from pyro_vae.inference.em.history import HalfSteps
from pyro_vae.inference.em.loop import EMSettings, random_stream
from pyro_vae.inference.em.methods import ALGORITHMS
from pyro_vae.models import BernoulliMixture, GaussianMixture, PoissonMixture

KINDS = ("full", "tied", "diag", "spherical")
FAMILIES = (*KINDS, "bernoulli", "poisson")
DIM = 2
PRIOR: dict[str, dict[str, Any]] = {
    "full": {"inverse_scale": [[1.3, 0.4], [0.4, 0.9]]},
    "tied": {"inverse_scale": [[1.3, 0.4], [0.4, 0.9]]},
    "diag": {"inverse_scale": [1.3, 0.9]},
    "spherical": {"inverse_scale": 1.1},
    "bernoulli": {"ones": [0.7, 2.0], "zeros": [1.5, 0.4]},
    "poisson": {"shape": [0.7, 2.0], "rate": [0.2, 0.5]},
}
for _kind in KINDS:
    PRIOR[_kind] |= {"loc": [0.3, -0.2], "loc_precision": 0.6, "degrees_of_freedom": 2.7}
for _prior in PRIOR.values():
    _prior["concentration"] = 0.8


def mixture(family, num_components=2, dim=DIM):
    if family in KINDS:
        return GaussianMixture(num_components, dim, family)
    made = {"bernoulli": BernoulliMixture, "poisson": PoissonMixture}[family]
    return made(num_components, dim)


def data(family, num_data=60, seed=5):
    rng = np.random.default_rng(seed)
    z = rng.integers(2, size=num_data)
    if family == "bernoulli":
        x = rng.random((num_data, DIM)) < np.array([[0.2, 0.9], [0.7, 0.3]])[z]
        return torch.as_tensor(x * 1.0)
    if family == "poisson":
        return torch.as_tensor(rng.poisson(np.array([[2.0, 9.0], [6.0, 1.0]])[z]) * 1.0)
    x = np.array([[0.0, 0.0], [2.5, 1.0]])[z] + rng.normal(size=(num_data, DIM)) * [1.0, 0.7]
    return torch.as_tensor(x)


def run(family, x, num_components=2, **options):
    options = {"max_iterations": 8, "tolerance": 0.0, "seed": 3, "prior": PRIOR[family], **options}
    options = {"method": "variational_bayes", **options}
    return fit_em(mixture(family, num_components, x.shape[1]), x, **options)


# --- exact evidences, one datum after the other ---------------------------------------------------


def log_student(x, locs, scale, df):
    """A multivariate t; SciPy's takes a hundred times as long."""
    dim = len(x)
    square = (x - locs) @ np.linalg.solve(scale, x - locs)
    constant = gammaln((df + dim) / 2) - gammaln(df / 2) - dim / 2 * np.log(df * np.pi)
    return constant - 0.5 * np.linalg.slogdet(scale)[1] - (df + dim) / 2 * np.log1p(square / df)


def test_the_t_is_that_of_scipy():
    scale = np.array([[1.3, 0.4], [0.4, 0.9]])
    wanted = stats.multivariate_t([0.1, 0.2], scale, 2.7).logpdf([1.0, -2.0])
    assert log_student(np.array([1.0, -2.0]), [0.1, 0.2], scale, 2.7) == pytest.approx(wanted)


def log_evidence_given(family, x, z, num_components=2):
    """log p(x | z), by the posterior predictive of each datum given those before it."""
    prior = {name: np.array(value, dtype=float) for name, value in PRIOR[family].items()}
    if family not in KINDS:
        a, b = (np.tile(prior[n], (num_components, 1)) for n in list(PRIOR[family])[:2])
        total = 0.0
        for row, k in zip(x, z, strict=True):
            if family == "bernoulli":
                total += np.log(np.where(row == 1, a[k], b[k]) / (a[k] + b[k])).sum()
                a[k], b[k] = a[k] + row, b[k] + 1 - row
            else:
                chance = b[k] / (b[k] + 1)
                choose = gammaln(a[k] + row) - gammaln(a[k]) - gammaln(row + 1)
                total += (choose + a[k] * np.log(chance) + row * np.log1p(-chance)).sum()
                a[k], b[k] = a[k] + row, b[k] + 1
        return total
    dim = x.shape[1]
    known = np.full(num_components, prior["loc_precision"])
    locs = np.tile(prior["loc"], (num_components, 1))
    number = 1 if family == "tied" else num_components
    dof = np.full(number, prior["degrees_of_freedom"])
    scale = np.stack([prior["inverse_scale"]] * number)
    total = 0.0
    for row, k in zip(x, z, strict=True):
        place, away, wide = (0 if family == "tied" else k), row - locs[k], (known[k] + 1) / known[k]
        if family in ("full", "tied"):
            df = dof[place] - dim + 1
            total += log_student(row, locs[k], scale[place] * wide / df, df)
            scale[place] += np.outer(away, away) / wide
        elif family == "diag":
            spread = scale[k] * wide / dof[k]
            for d in range(dim):
                total += log_student(row[d : d + 1], locs[k, d], spread[d : d + 1, None], dof[k])
            scale[k] += away**2 / wide
        else:
            spread = scale[k] / dof[k] * wide * np.eye(dim)
            total += log_student(row, locs[k], spread, dim * dof[k])
            scale[k] += (away**2).mean() / wide
        dof[place] += 1
        locs[k] += away / (known[k] + 1)
        known[k] += 1
    return total


def log_prior_of(z, num_components, concentration):
    counts = np.bincount(z, minlength=num_components)
    whole = gammaln(num_components * concentration) - gammaln(
        num_components * concentration + len(z)
    )
    return whole + (gammaln(concentration + counts) - gammaln(concentration)).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_of_one_component_the_bound_is_the_evidence(family):
    x = data(family, 23)
    exact = log_evidence_given(family, x.numpy(), np.zeros(23, dtype=int), 1)
    fitted = run(family, x, 1, max_iterations=2)
    np.testing.assert_allclose(fitted.history.bound_total, exact, atol=1e-9)
    longer = torch.cat([x, data(family, 24)[-1:]])
    more = log_evidence_given(family, longer.numpy(), np.zeros(24, dtype=int), 1)
    predicted = float(fitted.posterior.log_predictive(longer[-1:]))
    assert predicted == pytest.approx(more - exact, abs=1e-9)
    weighted = run(family, x, 1, sample_weights=torch.arange(23.0) % 3, max_iterations=1)
    repeated = x.repeat_interleave(torch.arange(23) % 3, 0)
    exact = log_evidence_given(family, repeated.numpy(), np.zeros(len(repeated), dtype=int), 1)
    assert float(weighted.history.bound_total[-1]) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_lies_below_the_evidence_of_all_assignments(family):
    """log p(x) of six data as a sum over 2^6 assignments; the bound is near, and below."""
    x = data(family, 6)
    every = [
        log_evidence_given(family, x.numpy(), z) + log_prior_of(z, 2, 0.8)
        for z in map(np.array, itertools.product(range(2), repeat=6))
    ]
    exact = logsumexp(every)
    bound = run(family, x, max_iterations=50).history.bound_total
    assert (bound <= exact).all()
    # A posterior over z that factorises, for one of two labellings: the gap holds log 2.
    assert 0.3 < exact - float(bound[-1]) < 4


@pytest.mark.parametrize("family", FAMILIES)
def test_no_half_step_lowers_the_bound(family):
    history = run(family, data(family), 3, max_iterations=15).history
    steps = np.diff(history.bound_total)
    assert steps.min() > -1e-10
    for phase in "EM":  # both kinds do gain
        assert (steps[history.phase.values[1:] == phase] > 1e-6).any()
    assert "log_evidence" not in history
    assert "gap" not in history
    np.testing.assert_allclose(history.bound, history.reconstruction - history.kl, atol=1e-12)
    assert history.bound.attrs["bound"] == "lower"


# --- scikit-learn ---------------------------------------------------------------------------------


def left_out(num_data, prior, num_components, dim):
    """What scikit-learn leaves out of its bound: N D / 2 log 2 pi and the prior's normalisers."""
    dof, scale = prior["degrees_of_freedom"], np.reshape(prior["inverse_scale"], (dim, dim))
    alpha = prior["concentration"]
    wishart = dof / 2 * np.linalg.slogdet(scale)[1] - dof * dim / 2 * np.log(2)
    wishart -= gammaln((dof - np.arange(dim)) / 2).sum()
    dirichlet = gammaln(num_components * alpha) - num_components * gammaln(alpha)
    locs = 0.5 * dim * num_components * np.log(prior["loc_precision"])
    return num_components * wishart + dirichlet + locs - num_data * dim / 2 * np.log(2 * np.pi)


@pytest.mark.parametrize(("kind", "dim"), [("full", 2), ("full", 1), ("diag", 1), ("spherical", 1)])
def test_the_path_is_that_of_scikit_learn(kind, dim):
    """Theirs of diagonal, spherical and tied covariances is exact in one dimension only."""
    x = data("full", 90).numpy()[:, :dim]
    prior: dict[str, Any] = {"concentration": 0.4, "loc": [0.3, -0.2][:dim], "loc_precision": 0.6}
    prior |= {"degrees_of_freedom": 2.7, "inverse_scale": np.array([[1.3, 0.4], [0.4, 0.9]])}
    prior["inverse_scale"] = prior["inverse_scale"][:dim, :dim]
    if kind != "full":
        prior["inverse_scale"] = prior["inverse_scale"].ravel() if kind == "diag" else 1.3
    start = np.random.RandomState(4).uniform(size=(90, 3))
    start /= start.sum(1, keepdims=True)
    for num_iterations in (1, 6, 20):
        theirs = BayesianGaussianMixture(
            n_components=3,
            covariance_type=kind,
            weight_concentration_prior_type="dirichlet_distribution",
            weight_concentration_prior=prior["concentration"],
            mean_prior=prior["loc"],
            mean_precision_prior=prior["loc_precision"],
            degrees_of_freedom_prior=prior["degrees_of_freedom"],
            covariance_prior=prior["inverse_scale"],
            init_params="random",
            random_state=4,
            reg_covar=0.0,
            tol=0.0,
            max_iter=num_iterations,
        )
        with pytest.warns(ConvergenceWarning):
            theirs.fit(x)
        ours = run(
            kind, torch.tensor(x), 3, prior=prior, initialization=start,
            max_iterations=num_iterations,
        )  # fmt: skip
        said = ours.posterior.hyperparameters
        np.testing.assert_allclose(said["concentration"], theirs.weight_concentration_, atol=1e-7)
        np.testing.assert_allclose(said["loc"], theirs.means_, atol=1e-7)
        np.testing.assert_allclose(said["loc_precision"], theirs.mean_precision_, atol=1e-7)
        assert np.allclose(said["degrees_of_freedom"].ravel(), theirs.degrees_of_freedom_)
        np.testing.assert_allclose(
            ours.parameters["covariances"].ravel(), theirs.covariances_.ravel(), atol=1e-7
        )
        np.testing.assert_allclose(ours.parameters["weights"], theirs.weights_, atol=1e-8)
        after = ours.history.bound_total[ours.history.phase == "M"]
        wanted = theirs.lower_bound_ + left_out(90, prior, 3, dim)
        assert float(after[-1]) == pytest.approx(wanted, abs=1e-8)


def test_the_default_prior_is_that_of_scikit_learn():
    x = data("full")
    for kind in KINDS:
        theirs = BayesianGaussianMixture(n_components=2, covariance_type=kind, max_iter=300)
        theirs.fit(x.numpy())
        prior = run(kind, x, prior=None, max_iterations=1).posterior.prior
        np.testing.assert_allclose(prior["inverse_scale"], theirs.covariance_prior_, atol=1e-12)
        np.testing.assert_allclose(prior["loc"], theirs.mean_prior_, atol=1e-12)
        assert float(prior["degrees_of_freedom"]) == theirs.degrees_of_freedom_prior_ == DIM
        assert float(prior["loc_precision"]) == theirs.mean_precision_prior_ == 1
        assert float(prior["concentration"]) == theirs.weight_concentration_prior_ == 0.5


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_units_of_the_data_do_not_matter(family):
    x = data(family)
    factor = torch.tensor([3.0, 3.0] if family == "spherical" else [3.0, 0.2])
    prior = dict(PRIOR[family])
    prior["loc"] = torch.tensor(prior["loc"]) * factor
    scale = torch.tensor(prior["inverse_scale"])
    wide = factor.outer(factor) if scale.dim() == 2 else factor**2
    prior["inverse_scale"] = scale * (wide if scale.dim() else 9.0)
    one, other = run(family, x), run(family, x * factor, prior=prior)
    shift = len(x) * float(factor.log().sum())
    np.testing.assert_allclose(
        one.history.bound_total, other.history.bound_total + shift, atol=1e-8
    )
    locs = (fit.posterior.marginals["locs"].variance for fit in (one, other))
    first, second = locs
    np.testing.assert_allclose(first * factor**2, second, rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_marginals_have_the_means_of_the_model(family):
    fitted = run(family, data(family, 200))
    means = {name: d.mean for name, d in fitted.posterior.marginals.items()}
    np.testing.assert_allclose(means["weights"], fitted.parameters["weights"], atol=1e-6)
    name = {"bernoulli": "probs", "poisson": "rates"}.get(family, "locs")
    np.testing.assert_allclose(means[name], fitted.parameters[name], atol=1e-6)
    if family in KINDS:
        precisions = means["precisions"]
        inverse = precisions.inverse() if family in ("full", "tied") else 1 / precisions
        wanted = fitted.parameters["covariances"]
        np.testing.assert_allclose(inverse.reshape(wanted.shape), wanted, rtol=1e-6)
    assert "bound" in fitted.summary()
    assert fitted.config["fit_em"]["prior"]["concentration"] == pytest.approx(0.8)


@pytest.mark.long
def test_components_that_are_not_needed_lose_their_weight():
    """Six components on two clusters, with a sparse prior (Bishop 2006, figure 10.6)."""
    rng = np.random.default_rng(0)
    x = torch.as_tensor(rng.normal(size=(150, 2)) + 9 * rng.integers(2, size=(150, 1)))
    for concentration, kept in ((1e-3, 2), (50.0, 6)):
        prior = {"concentration": concentration}
        fitted = run("full", x, 6, prior=prior, max_iterations=60)
        assert int((fitted.parameters["weights"] > 0.02).sum()) == kept


# --- by mini-batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_step_on_all_data_is_variational_bayes(family):
    x = data(family)
    wanted = run(family, x, max_iterations=3)
    problem: Any = mixture(family).prepare_conjugate(x, prior=PRIOR[family])
    settings = EMSettings(
        method="stochastic_variational_bayes", max_iterations=3, tolerance=0.0, seed=3,
        initialization="k-means++", num_restarts=1, on_singular="raise", batch_size=len(x),
        num_samples=1, step_exponent=0.0, step_delay=0.0, num_held=1, num_gradient_steps=1,
        optimizer=None, record=None, progress=False,
    )  # fmt: skip
    for exponent, same in ((0.0, True), (0.6, False)):
        settings = replace(settings, step_exponent=exponent)
        start = problem.initialize("k-means++", random_stream(3, 0))
        record = HalfSteps(len(x), knows_evidence=False)
        *_, end = ALGORITHMS[settings.method](problem, start, record, settings, random_stream(3, 1))
        found = problem.described(end.parameters).hyperparameters
        away = [
            float((found[name] - value).abs().max())
            for name, value in wanted.posterior.hyperparameters.items()
        ]
        assert (max(away) < 1e-10) == same


def test_mini_batches_reach_the_bound():
    """Within 0.01 nats per datum in ten passes; the start is further away."""
    x = data("full", 600)
    options: dict[str, Any] = {"initialization": "random", "prior": PRIOR["full"], "seed": 1}
    best = float(run("full", x, max_iterations=60, **options).history.bound[-1])
    options |= {"step_exponent": 0.7, "step_delay": 1.0, "batch_size": 60, "record": "passes"}
    method = "stochastic_variational_bayes"
    history = run("full", x, method=method, max_iterations=10, **options).history
    assert best - float(history.bound[-1]) < 1e-2 < best - float(history.bound[0])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": {"alpha": 1.0}}, "prior takes names out of"),
        ({"prior": {"concentration": 0.0}}, r"prior\['concentration'\] must be positive"),
        ({"prior": {"loc": [1.0, 2.0, 3.0]}}, r"has shape \(2,\)"),
        ({"prior": {"degrees_of_freedom": 1.0}}, "lie above 1"),
        ({"prior": {"inverse_scale": [[1.0, 2.0], [2.0, 1.0]]}}, "positive definite"),
        ({"prior": {"loc": [1.0, np.nan]}}, "must be finite"),
        ({"method": "exact"}, "has no prior on parameters"),
        ({"hold": ("weights",)}, "a sharp prior"),
        ({"step_delay": -1.0}, "step_delay"),
        ({"initialization": np.ones((60, 2))}, "sum to 1"),
    ],
)
def test_arguments_that_cannot_be_used(options, message):
    with pytest.raises(ValueError, match=message):
        run("full", data("full"), **options)


def test_data_on_a_line_need_a_floor_or_a_prior():
    x = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0])
    options: dict[str, Any] = {"method": "variational_bayes", "max_iterations": 3}
    with pytest.raises(ValueError, match="reg_covar to the mixture"):
        fit_em(GaussianMixture(1, DIM), x, **options)
    found = fit_em(GaussianMixture(1, DIM, reg_covar=0.3), x, **options)
    wanted = np.cov(x.numpy().T) + 0.3 * np.eye(2)
    np.testing.assert_allclose(found.posterior.prior["inverse_scale"], wanted, atol=1e-12)
    assert np.diff(found.history.bound_total).min() > -1e-10
