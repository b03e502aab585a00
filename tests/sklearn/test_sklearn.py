"""The estimators keep scikit-learn's contract, and equal its own where the models coincide."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pyro_vae import LinearGaussian
from pyro_vae.sklearn import (
    BayesianMixture,
    FactorAnalyzer,
    GaussianMixtureEM,
    ProbabilisticPCA,
    VAETransformer,
)

X, Y = load_iris(return_X_y=True)
TYPES = ("full", "tied", "diag", "spherical")


def small_vae(**settings):
    return VAETransformer(**{"hidden": (5,), "epochs": 2, "num_particles": 5, **settings})


ALL = [BayesianMixture(), GaussianMixtureEM(), ProbabilisticPCA(), FactorAnalyzer(), small_vae()]


CONTRACT = """
import json, warnings
warnings.simplefilter("ignore")
from sklearn.utils.estimator_checks import check_estimator
from pyro_vae.sklearn import *
class Unruly(ProbabilisticPCA):
    def transform(self, X):
        return super().transform(X) + len(X)  # of a datum, by how many others there are
small = VAETransformer(hidden=(5,), epochs=2, num_particles=5)
failed = {}
mixtures = (BayesianMixture(), GaussianMixtureEM(), GaussianMixtureEM(missing="marginalise"))
for estimator in (*mixtures, ProbabilisticPCA(), FactorAnalyzer(), small, Unruly()):
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    assert sum(r["status"] == "passed" for r in results) > 40
    wrong = [r["check_name"] for r in results if r["status"] not in ("passed", "skipped")]
    failed.setdefault(type(estimator).__name__, []).extend(wrong)
print(json.dumps(failed))
"""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_no_check_of_scikit_learn_fails():
    # In a process of its own: the checks pass wrong types, which annotations refuse in tests.
    command = [sys.executable, "-c", CONTRACT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    assert "check_methods_subset_invariance" in failed.pop("Unruly")
    assert failed == {type(estimator).__name__: [] for estimator in ALL}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("start", ["kmeans", "random"])
def test_a_mixture_takes_the_path_of_scikit_learn(kind, start):
    settings = {"covariance_type": kind, "init_params": start, "random_state": 3, "tol": 0.0}
    with pytest.warns(ConvergenceWarning):
        theirs = GaussianMixture(3, max_iter=7, **settings).fit(X)
    with pytest.warns(ConvergenceWarning, match="did not converge in 7 iterations"):
        ours = GaussianMixtureEM(3, max_iter=7, **settings).fit(X)
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        wanted = getattr(theirs, name)
        assert np.abs(getattr(ours, name) - wanted).max() < 1e-6 * max(1, np.abs(wanted).max())
    assert np.abs(ours.score_samples(X) - theirs.score_samples(X)).max() < 1e-6
    assert np.abs(ours.predict_proba(X) - theirs.predict_proba(X)).max() < 1e-6
    assert np.array_equal(ours.predict(X), theirs.predict(X))
    assert ours.bic(X) == pytest.approx(theirs.bic(X), abs=1e-6)
    assert ours.aic(X) == pytest.approx(theirs.aic(X), abs=1e-6)
    # Theirs are the bounds before each M step, ours those after.
    assert ours.lower_bounds_[:-1] == pytest.approx(theirs.lower_bounds_[1:], abs=1e-6)
    assert ours.n_iter_ == theirs.n_iter_ == 7


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("start", ["k-means++", "random_from_data"])
def test_a_mixture_from_single_data_ends_where_scikit_learn_does(kind, start):
    # Components as narrow as reg_covar at the start: rounding parts the paths, not the ends.
    settings = {"covariance_type": kind, "init_params": start, "random_state": 3}
    settings |= {"tol": 1e-10, "max_iter": 3000}
    theirs, ours = (c(2, **settings).fit(X) for c in (GaussianMixture, GaussianMixtureEM))
    assert ours.score(X) == pytest.approx(theirs.score(X), abs=1e-6)
    assert ours.converged_


def test_a_mixture_starts_where_it_is_told_and_keeps_the_best():
    given = {
        "weights_init": [0.2, 0.3, 0.5],
        "means_init": X[[0, 60, 120]],
        "precisions_init": np.stack([np.eye(4) * k for k in (1.0, 2.0, 3.0)]),
        "tol": 1e-8,
        "max_iter": 500,
    }
    theirs, ours = (c(3, **given).fit(X) for c in (GaussianMixture, GaussianMixtureEM))
    assert np.abs(ours.means_ - theirs.means_).max() < 1e-4
    assert ours.score(X) == pytest.approx(theirs.score(X), abs=1e-6)
    assert ours.converged_
    one, many = (
        GaussianMixtureEM(4, n_init=n, init_params="random_from_data", random_state=0).fit(X)
        for n in (1, 5)
    )
    assert many.lower_bound_ >= one.lower_bound_
    before = one.lower_bound_
    assert one.set_params(warm_start=True, tol=1e-9, max_iter=1000).fit(X).lower_bound_ > before


@pytest.mark.parametrize("start", ["kmeans", "random", "k-means++"])
def test_a_bayesian_mixture_takes_the_path_of_scikit_learn(start):
    """With full covariances; their `reg_covar` is added at every step, so it is 0 here."""
    settings = {"init_params": start, "random_state": 3, "tol": 0.0, "max_iter": 9}
    settings |= {"mean_precision_prior": 0.7, "reg_covar": 0.0}
    with pytest.warns(ConvergenceWarning):
        theirs = BayesianGaussianMixture(
            n_components=3,
            weight_concentration_prior_type="dirichlet_distribution",
            **settings,
        ).fit(X)
    with pytest.warns(ConvergenceWarning, match="did not converge in 9 iterations"):
        ours = BayesianMixture(3, **settings).fit(X)
    names = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_")
    for name in (*names, "weight_concentration_", "mean_precision_", "degrees_of_freedom_"):
        wanted = getattr(theirs, name)
        assert np.abs(getattr(ours, name) - wanted).max() < 1e-6 * max(1, np.abs(wanted).max())
    assert np.mean(ours.predict(X) == theirs.predict(X)) > 0.98
    assert np.abs(ours.predict_proba(X) - theirs.predict_proba(X)).max() < 0.2
    # Theirs is no density: of expected logarithms, it is less than the predictive one.
    assert ours.score(X) > theirs.score(X)
    assert ours.predict_proba(X).sum(1) == pytest.approx(np.ones(len(X)))
    assert ours.n_iter_ == theirs.n_iter_ == 9
    one, many = (
        BayesianMixture(4, n_init=n, init_params="random_from_data", random_state=0, tol=1.0)
        for n in (1, 4)
    )
    if start == "random":
        assert many.fit(X).lower_bound_ >= one.fit(X).lower_bound_


def test_the_predictive_density_is_one():
    """Its integral over a line, of a component with few data and so wide tails."""
    x = np.array([[0.0], [0.4], [1.0], [5.0], [5.5]])
    grid = np.linspace(-4000, 4000, 2_000_001)[:, None]
    mixture = BayesianMixture(2, random_state=0, degrees_of_freedom_prior=3.0).fit(x)
    mass = np.exp(mixture.score_samples(grid)).sum() * 0.004
    assert mass == pytest.approx(1, abs=1e-4)


def test_weights_of_data_are_repetitions():
    times = np.arange(len(X)) % 3
    settings = {"means_init": X[[0, 60, 120]], "tol": 1e-6, "weights_init": [1 / 3] * 3}
    settings["precisions_init"] = np.stack([np.eye(4)] * 3)
    weighted = GaussianMixtureEM(3, **settings).fit(X, sample_weight=times)
    repeated = GaussianMixtureEM(3, **settings).fit(np.repeat(X, times, axis=0))
    assert np.abs(weighted.means_ - repeated.means_).max() < 1e-9


@pytest.mark.parametrize("number", [1, 2])
def test_factor_analysis_is_that_of_scikit_learn(number):
    theirs, ours = FactorAnalysis(number).fit(X), FactorAnalyzer(number).fit(X)
    signs = np.sign((theirs.components_ * ours.components_).sum(1, keepdims=True))
    signs[signs == 0] = 1
    assert np.abs(ours.components_ - signs * theirs.components_).max() < 1e-6
    assert np.abs(ours.noise_variance_ - theirs.noise_variance_).max() < 1e-6
    assert np.abs(ours.transform(X) - theirs.transform(X) * signs[:, 0]).max() < 1e-6
    assert np.abs(ours.score_samples(X) - theirs.score_samples(X)).max() < 1e-6
    assert ours.n_iter_ == theirs.n_iter_
    assert ours.loglike_[-1] == pytest.approx(ours.score_samples(X).sum(), abs=1e-8)


def test_factor_analysis_knows_the_likelihood_where_factors_fade():
    # Singular values below one: scikit-learn's criterion is then no likelihood, and it stops early.
    theirs, ours = FactorAnalysis().fit(X), FactorAnalyzer().fit(X)
    assert theirs.loglike_[-1] / len(X) > theirs.score(X) + 0.5
    assert ours.loglike_[-1] / len(X) == pytest.approx(ours.score(X), abs=1e-8)
    assert ours.score(X) > theirs.score(X)


def test_factor_analysis_says_when_it_has_not_converged():
    with pytest.warns(ConvergenceWarning, match="did not converge in 3 rounds"):
        FactorAnalyzer(2, max_iter=3, tol=0.0).fit(X)


def test_principal_components_are_those_of_scikit_learn():
    theirs, ours = PCA(2).fit(X), ProbabilisticPCA(2).fit(X)
    divisor = len(X) / (len(X) - 1)  # theirs divides by N - 1
    assert np.abs(ours.get_covariance() * divisor - theirs.get_covariance()).max() < 1e-6
    axes = ours.components_ / np.linalg.norm(ours.components_, axis=1, keepdims=True)
    assert np.abs(np.abs((axes * theirs.components_).sum(1)) - 1).max() < 1e-6
    total = LinearGaussian.ppca_log_likelihood(torch.from_numpy(X), 2)
    assert ours.score(X) == pytest.approx(float(total) / len(X), abs=1e-9)
    assert ours.sample(7, random_state=0).shape == (7, 4)
    # Shrunk towards the mean by the posterior: nearer to it than the data.
    back = ours.inverse_transform(ours.transform(X))
    assert np.linalg.norm(back - ours.mean_) < np.linalg.norm(X - ours.mean_)


def test_an_autoencoder_scores_each_datum_by_itself():
    scaled = StandardScaler().fit_transform(X)
    vae = small_vae(n_components=1, random_state=0, num_particles=500, epochs=30).fit(scaled)
    scores, errors = vae.score_samples(scaled, return_std=True)
    exact = [
        float(torch.logsumexp(part, 0))
        for part in _joint_on_a_grid(vae.vae_, torch.from_numpy(scaled[:9])).mT
    ]
    # Below log p(x) in expectation, and by little: 500 draws on one latent.
    assert np.all(np.abs(scores[:9] - exact) < 5 * errors[:9] + 1e-3)
    assert np.array_equal(vae.score_samples(scaled[::-1]), scores[::-1])
    assert vae.score(scaled) == scores.mean()
    assert vae.bounds_[-1] > vae.bounds_[0]
    assert vae.sample(3).shape == (3, 4)


def _joint_on_a_grid(vae, x):
    """The log of p(x, z) dz on a fine grid of one latent, [grid, data]."""
    z = torch.linspace(-8, 8, 4001)[:, None]
    width = 16 / 4000
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z) + np.log(width)
    given = vae.likelihood.distribution(vae.decoder(z)[:, None])
    return log_p + given.log_prob(x)


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_estimators_work_in_pipelines_and_searches(estimator):
    frame = pd.DataFrame(X, columns=["a", "b", "c", "d"])
    scores = cross_val_score(make_pipeline(StandardScaler(), clone(estimator)), frame, cv=3)
    assert np.isfinite(scores).all()
    search = GridSearchCV(clone(estimator), {"n_components": [1, 2]}, cv=2).fit(frame)
    assert search.best_params_["n_components"] in (1, 2)
    if hasattr(estimator, "transform"):
        named = clone(estimator).set_params(n_components=2).set_output(transform="pandas")
        columns = named.fit_transform(frame).columns
        assert list(columns) == [f"{type(estimator).__name__.lower()}{i}" for i in (0, 1)]
        chain = make_pipeline(StandardScaler(), clone(estimator), LogisticRegression())
        assert chain.fit(frame, Y).score(frame, Y) > 0.3
