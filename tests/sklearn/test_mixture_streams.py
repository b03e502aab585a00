"""Online steps, missing entries and standard errors of the mixture behind scikit-learn's doors."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture
from sklearn.utils import get_tags

from pyro_vae.sklearn import BayesianMixture, GaussianMixtureEM

X = load_iris().data
TYPES = ("full", "tied", "diag", "spherical")
LOCS = np.array([[0.0, 0.0], [6.0, 1.0]])


def batch(rng, number=100):
    z = rng.integers(2, size=number)
    return LOCS[z] + rng.normal(size=(number, 2))


def with_gaps(x, share=0.2, seed=0):
    gone = np.random.default_rng(seed).uniform(size=x.shape) < share
    gone[gone.all(1), 0] = False
    return np.where(gone, np.nan, x)


@pytest.mark.parametrize("kind", TYPES)
def test_one_batch_again_and_again_ends_where_scikit_learn_stays(kind):
    mixture = GaussianMixtureEM(2, covariance_type=kind, random_state=0)
    bounds = [mixture.partial_fit(X).lower_bound_ for _ in range(120)]
    theirs = GaussianMixture(
        2,
        covariance_type=kind,
        weights_init=mixture.weights_,
        means_init=mixture.means_,
        precisions_init=mixture.precisions_,
    ).fit(X)
    assert theirs.n_iter_ <= 2
    for name in ("weights_", "means_", "covariances_"):
        assert np.abs(getattr(theirs, name) - getattr(mixture, name)).max() < 1e-6
    assert bounds[-1] == pytest.approx(theirs.score(X), abs=1e-6)
    assert bounds[0] < bounds[-1] - 1e-3  # it has moved
    assert mixture.n_iter_ == mixture.stream_.num_batches == 120


def test_a_stream_approaches_the_truth():
    rng = np.random.default_rng(1)
    mixture = GaussianMixtureEM(2, random_state=0)
    for _ in range(100):
        mixture.partial_fit(batch(rng))
    means = mixture.means_[np.argsort(mixture.means_[:, 0])]
    # Averages of steps g, at last 0.063, have the variance g / (2 - g) of a batch's mean, which
    # rests on 50 data: five standard errors, a failure rate of 2e-6.
    error = np.sqrt(0.063 / (2 - 0.063) / 50)
    assert np.abs(means - LOCS).max() < 5 * error
    for _ in range(100):
        mixture.partial_fit(batch(rng) + 1.0)
    means = mixture.means_[np.argsort(mixture.means_[:, 0])]
    assert np.abs(means - LOCS).max() > 5 * error


def test_weights_of_a_batch_are_repetitions():
    rng = np.random.default_rng(2)
    start = {"weights_init": [0.4, 0.6], "means_init": LOCS, "precisions_init": [np.eye(2)] * 2}
    weighted, repeated, plain = (GaussianMixtureEM(2, **start) for _ in range(3))
    for _ in range(3):
        x, times = batch(rng, 40), rng.integers(0, 4, size=40)
        weighted.partial_fit(x, sample_weight=times)
        repeated.partial_fit(np.repeat(x, times, axis=0))
        plain.partial_fit(x)
    assert np.abs(weighted.covariances_ - repeated.covariances_).max() < 1e-10
    assert np.abs(weighted.means_ - plain.means_).max() > 1e-3


def test_a_stream_is_pickled_but_not_cloned():
    rng = np.random.default_rng(3)
    batches = [batch(rng, size) for size in (50, 7, 1)]
    mixture = GaussianMixtureEM(2, random_state=0).partial_fit(batches[0]).partial_fit(batches[1])
    kept = mixture.means_
    before = kept.copy()
    other = pickle.loads(pickle.dumps(mixture)).partial_fit(batches[2])
    assert np.array_equal(mixture.partial_fit(batches[2]).means_, other.means_)
    assert np.array_equal(kept, before)
    assert not np.array_equal(mixture.means_, before)
    assert not hasattr(clone(mixture), "stream_")
    assert not hasattr(mixture.fit(batches[0]), "stream_")
    fitted = mixture.means_
    assert np.abs(mixture.partial_fit(batches[0]).means_ - fitted).max() < 0.1  # goes on from it


def test_batches_that_cannot_be_used_change_nothing():
    rng = np.random.default_rng(4)
    with pytest.raises(ValueError, match="3 components need as many data: n_samples = 2"):
        GaussianMixtureEM(3).partial_fit(batch(rng, 2))
    with pytest.raises(ValueError, match="step_exponent must lie above"):
        GaussianMixtureEM(2, step_exponent=0.3).partial_fit(batch(rng))
    mixture = GaussianMixtureEM(2, random_state=0).partial_fit(batch(rng))
    means, state = mixture.means_, mixture.stream_
    for bad, words in ((np.ones((4, 3)), "3 features"), (np.full((4, 2), np.nan), "NaN")):
        with pytest.raises(ValueError, match=words):
            mixture.partial_fit(bad)
    assert mixture.means_ is means
    assert mixture.stream_ is state


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_gaps_are_integrated_out_by_fits_and_by_streams(kind):
    gaps = with_gaps(X)
    settings = {"covariance_type": kind, "missing": "marginalise", "random_state": 0}
    fitted = GaussianMixtureEM(2, tol=1e-9, max_iter=500, **settings).fit(pd.DataFrame(gaps))
    stream = GaussianMixtureEM(2, **settings)
    for _ in range(80):
        stream.partial_fit(gaps)
    order = [np.argsort(one.means_[:, 0]) for one in (fitted, stream)]
    assert np.abs(fitted.means_[order[0]] - stream.means_[order[1]]).max() < 1e-3
    assert fitted.predict_proba(gaps).sum(1) == pytest.approx(np.ones(len(X)))
    assert np.mean((fitted.predict(gaps) == 0) == (fitted.predict(X) == 0)) > 0.9
    stream.partial_fit(X[:5])  # a batch without gaps is none the less one of the stream


@pytest.mark.parametrize("kind", TYPES)
def test_without_gaps_the_path_is_the_usual_one(kind):
    settings = {"covariance_type": kind, "tol": 1e-4, "random_state": 0}
    whole, same = (
        GaussianMixtureEM(2, missing=m, **settings).fit(X) for m in (None, "marginalise")
    )
    assert np.abs(whole.covariances_ - same.covariances_).max() < 1e-10
    assert np.abs(whole.score_samples(X) - same.score_samples(X)).max() < 1e-10


@pytest.mark.parametrize("start", ["kmeans", "k-means++", "random", "random_from_data"])
def test_every_start_takes_gaps_and_the_default_refuses_them(start):
    gaps = with_gaps(X)
    options = {"init_params": start, "random_state": 1, "tol": 1e-2}
    assert GaussianMixtureEM(2, missing="marginalise", **options).fit(gaps).converged_
    with pytest.raises(ValueError, match="NaN: pass missing='marginalise'"):
        GaussianMixtureEM(2, **options).fit(gaps)
    with pytest.raises(ValueError, match="NaN: leave out"):
        BayesianMixture(2).fit(gaps)
    empty = gaps.copy()
    empty[3] = np.nan
    with pytest.raises(ValueError, match=r"rows \[3\] have no entry"):
        GaussianMixtureEM(2, missing="marginalise", **options).fit(empty)
    for missing, allowed in ((None, False), ("marginalise", True)):
        assert get_tags(GaussianMixtureEM(missing=missing)).input_tags.allow_nan is allowed


def test_standard_errors_are_those_of_the_entries_observed():
    gaps = with_gaps(X)
    mixture = GaussianMixtureEM(
        covariance_type="diag", missing="marginalise", reg_covar=0.0, tol=1e-12, max_iter=500
    ).fit(gaps)
    number, variance = (~np.isnan(gaps)).sum(0), np.nanvar(gaps, 0)
    assert mixture.covariances_[0] == pytest.approx(variance, rel=1e-8)
    errors = mixture.standard_errors(gaps).fitted_se.values
    assert errors[1:5] == pytest.approx(np.sqrt(variance / number), rel=1e-6)
    assert errors[5:] == pytest.approx(variance * np.sqrt(2 / number), rel=1e-6)
    weighted = mixture.standard_errors(gaps, sample_weight=np.full(len(X), 4.0)).fitted_se.values
    assert weighted[1:] == pytest.approx(errors[1:] / 2, rel=1e-6)
