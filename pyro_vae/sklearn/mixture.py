"""EM and variational Bayes on a Gaussian mixture behind the interfaces of scikit-learn's."""

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from numpy import ndarray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from pyro_vae.inference.em import EMFit, fit_em
from pyro_vae.models import GaussianMixture

__all__ = ["BayesianMixture", "GaussianMixtureEM"]

_STARTS = ("kmeans", "k-means++", "random", "random_from_data")


class _MixtureEstimator(DensityMixin, BaseEstimator):
    """What both mixtures have of scikit-learn's."""

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> ndarray:
        """Fits, and returns the most probable component of each datum."""
        return self.fit(X, y, sample_weight).predict(X)

    def predict(self, X: Any) -> Int[ndarray, " samples"]:
        """The most probable component of each datum."""
        return self._mixture(X).predict(self._x(X)).numpy()

    def predict_proba(self, X: Any) -> Float64[ndarray, "samples components"]:
        """The responsibilities p(z = k | x)."""
        return self._mixture(X).predict_proba(self._x(X)).numpy()

    def score_samples(self, X: Any) -> Float64[ndarray, " samples"]:
        """The log-density of each datum, in nats."""
        return self._mixture(X).score_samples(self._x(X)).numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of `score_samples`, in nats per datum; higher is better."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> tuple[ndarray, ndarray]:
        """Draws data and their components, in random order, from `random_state`."""
        check_is_fitted(self)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        x, z = self.mixture_.sample(n_samples, generator=torch.Generator().manual_seed(seed))
        return x.numpy(), z.numpy()

    # -- starts and ends

    def _checked(self, X: Any, sample_weight: Any) -> tuple[ndarray, ndarray | None]:
        """Data and their weights; raises where these or the start cannot be used."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        if len(X) < self.n_components:
            raise ValueError(
                f"{self.n_components} components need as many data: n_samples = {len(X)}"
            )
        if self.init_params not in _STARTS:
            raise ValueError(f"init_params is one of {_STARTS}, not {self.init_params!r}")
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, dtype=np.float64)
        return X, sample_weight

    def _responsibilities(
        self, X: ndarray, weights: ndarray | None, rng: np.random.RandomState
    ) -> Float64[ndarray, "samples components"]:
        """As scikit-learn draws them, in its order."""
        number, length = self.n_components, len(X)
        if self.init_params == "random":
            q = np.asarray(rng.uniform(size=(length, number)))
            return q / q.sum(1, keepdims=True)
        q = np.zeros((length, number))
        if self.init_params == "kmeans":
            means = KMeans(number, n_init=1, random_state=rng).fit(X, sample_weight=weights)
            q[np.arange(length), means.labels_] = 1
        else:
            if self.init_params == "random_from_data":
                rows = rng.choice(length, size=number, replace=False)
            else:
                _, rows = kmeans_plusplus(X, number, random_state=rng)
            q[rows, np.arange(number)] = 1
        return q

    def _set(self, bound: float, mixture: GaussianMixture, end: EMFit) -> None:
        self.mixture_ = mixture
        values = {name: value.detach().numpy() for name, value in mixture.fitted_values().items()}
        self.weights_, self.means_ = values["weights"], values["locs"]
        self.covariances_ = values["covariances"]
        self.precisions_ = _inverse(self.covariances_, self.covariance_type)
        if self.covariance_type in ("full", "tied"):
            lower = np.linalg.inv(np.linalg.cholesky(self.covariances_))
            self.precisions_cholesky_ = np.swapaxes(lower, -1, -2)
        else:
            self.precisions_cholesky_ = np.sqrt(self.precisions_)
        self.lower_bound_, self.converged_ = bound, end.converged
        self.n_iter_ = int(end.history.iteration[-1])
        if not self.converged_:
            warnings.warn(
                f"EM did not converge in {self.max_iter} iterations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _mixture(self, X: Any) -> GaussianMixture:
        check_is_fitted(self)
        return self.mixture_

    def _x(self, X: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(validate_data(self, X, dtype=np.float64, reset=False)))


class GaussianMixtureEM(_MixtureEstimator):
    r"""A Gaussian mixture fitted by this library's EM, in place of scikit-learn's.

    Parameters, attributes, methods and starts are those of `sklearn.mixture.GaussianMixture`, and
    from one `random_state` both take the same path (from "k-means++" and "random_from_data",
    whose components are as narrow as `reg_covar` at first, only as far as rounding lets them).
    `fit` takes `sample_weight` besides, and `mixture_` is the model for every tool of the library.
    EM here stops once the bound of the parameters it returns has gained less than `tol`, which may
    be one iteration earlier.

    Args:
        n_components: Number of components.
        covariance_type: "full", "tied", "diag" or "spherical".
        tol: Stops when an iteration raises the mean log-likelihood by less, in nats per datum.
        reg_covar: Added to the diagonal of the covariances.
        max_iter: Iterations at most.
        n_init: Starts; the best end is kept.
        init_params: "kmeans", "k-means++", "random" or "random_from_data".
        weights_init: Weights to start from, or None.
        means_init: Means to start from, or None.
        precisions_init: Inverse covariances to start from, or None.
        random_state: Of the starts.
        warm_start: Whether a second `fit` goes on from the first.

    Attributes:
        weights_: Shape (n_components,).
        means_: Shape (n_components, n_features).
        covariances_: (n_components, n_features, n_features) if full, (n_features, n_features) if
            tied, (n_components, n_features) if diagonal, (n_components,) if spherical.
        precisions_: Their inverses.
        precisions_cholesky_: The upper roots of these.
        converged_: Whether the last iteration gained less than `tol`.
        n_iter_: Iterations of the best start.
        lower_bound_: Mean log-likelihood that it reached, in nats per datum.
        lower_bounds_: That after each of its iterations.
        mixture_: The fitted `pyro_vae.GaussianMixture`.
        n_features_in_: Number of features.
        feature_names_in_: Their names, where the data had some.

    Example:
        >>> X = np.concatenate([np.zeros((20, 1)), 9 + np.zeros((30, 1))])
        >>> X = X + np.linspace(0, 1, 50)[:, None]
        >>> GaussianMixtureEM(2, random_state=0).fit(X).weights_.round(3).tolist()
        [0.6, 0.4]
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "GaussianMixtureEM":
        """Maximises the likelihood from `n_init` starts and keeps the best end.

        Args:
            X: Data, shape (n_samples, n_features).
            y: Ignored.
            sample_weight: How often each datum counts, shape (n_samples,).

        Raises:
            ValueError: If there are fewer data than components, or a parameter cannot be used.
        """
        X, sample_weight = self._checked(X, sample_weight)
        goes_on = self.warm_start and hasattr(self, "mixture_")
        rng = check_random_state(self.random_state)
        ends = []
        for _ in range(1 if goes_on else self.n_init):
            mixture = self.mixture_ if goes_on else self._start(X, sample_weight, rng)
            end = fit_em(
                mixture,
                X,
                max_iterations=self.max_iter,
                tolerance=self.tol,
                initialization="given",
                sample_weights=sample_weight,
                progress=False,
            )
            ends.append((float(end.history.log_evidence[-1]), mixture, end))
        best = max(ends, key=lambda end: end[0])
        self._set(*best)
        after = best[2].history.isel(step=best[2].history.phase.values == "E")
        self.lower_bounds_ = after.log_evidence.values[1:].tolist()
        return self

    def aic(self, X: Any) -> float:
        """Akaike's criterion; lower is better."""
        return self._mixture(X).aic(self._x(X))

    def bic(self, X: Any) -> float:
        """The Bayesian information criterion; lower is better."""
        return self._mixture(X).bic(self._x(X))

    # -- starts and ends

    def _start(
        self, X: ndarray, weights: ndarray | None, rng: np.random.RandomState
    ) -> GaussianMixture:
        """A mixture after an M step at the start's responsibilities, with what was given put in."""
        mixture = GaussianMixture(
            self.n_components, X.shape[1], self.covariance_type, reg_covar=self.reg_covar
        ).double()
        every = (self.weights_init, self.means_init, self.precisions_init)
        if any(given is None for given in every):
            known = None if weights is None else torch.tensor(weights)
            problem = mixture.prepare(torch.tensor(X), known)  # a copy: X may be read-only
            q = torch.tensor(self._responsibilities(X, weights, rng))
            problem.write(problem.m_step(problem.statistics(q), problem.read()))
        values = {name: value.detach() for name, value in mixture.fitted_values().items()}
        if self.weights_init is not None:
            values["weights"] = torch.as_tensor(np.asarray(self.weights_init, dtype=np.float64))
        if self.means_init is not None:
            values["locs"] = torch.as_tensor(np.asarray(self.means_init, dtype=np.float64))
        if self.precisions_init is not None:
            values["covariances"] = torch.from_numpy(
                _inverse(np.asarray(self.precisions_init, dtype=np.float64), self.covariance_type)
            )
        return GaussianMixture.from_parameters(
            **values, covariance=self.covariance_type, reg_covar=self.reg_covar
        ).requires_grad_(False)


class BayesianMixture(_MixtureEstimator):
    r"""A Gaussian mixture with a posterior over its parameters, by variational Bayes.

    Parameters and attributes are those of `sklearn.mixture.BayesianGaussianMixture` with
    `weight_concentration_prior_type="dirichlet_distribution"`, and with full covariances both take
    the same path. Theirs of the other types take the Wishart's moments where the posterior is
    none; these are conjugate throughout. `lower_bound_` has every constant, so it bounds the log
    evidence. `predict_proba` and `score_samples` integrate the parameters out, where theirs
    take expectations of logarithms.

    Args:
        n_components: Number of components.
        covariance_type: "full", "tied", "diag" or "spherical".
        tol: Stops when an iteration raises the bound by less, in nats.
        reg_covar: Added to the diagonal of the covariance of the data, where that is the prior.
        max_iter: Iterations at most.
        n_init: Starts; the one with the highest bound is kept.
        init_params: "kmeans", "k-means++", "random" or "random_from_data".
        weight_concentration_prior: Of each weight; 1 / n_components if None.
        mean_precision_prior: In units of the component's precision; 1 if None.
        mean_prior: Shape (n_features,); the mean of the data if None.
        degrees_of_freedom_prior: Of the precisions; n_features if None.
        covariance_prior: (n_features, n_features), (n_features,) if diagonal, a number if
            spherical; the covariance of the data if None.
        random_state: Of the starts.

    Attributes:
        weights_: Mean weights, shape (n_components,).
        means_: Mean locations, shape (n_components, n_features).
        covariances_: Inverses of the mean precisions, in the shapes of `GaussianMixtureEM`.
        precisions_: Their inverses.
        precisions_cholesky_: The upper roots of these.
        weight_concentration_: Of the posterior, shape (n_components,).
        mean_precision_: Of the posterior, shape (n_components,).
        degrees_of_freedom_: Of the posterior.
        converged_: Whether the last iteration gained less than `tol`.
        n_iter_: Iterations of the best start.
        lower_bound_: The bound on the log evidence that it reached, a total in nats.
        posterior_: The `MixturePosterior`.
        mixture_: The `pyro_vae.GaussianMixture` at the means.
        n_features_in_: Number of features.
        feature_names_in_: Their names, where the data had some.

    Example:
        >>> X = np.concatenate([np.zeros((20, 1)), 9 + np.zeros((30, 1))])
        >>> X = X + np.linspace(0, 1, 50)[:, None]
        >>> BayesianMixture(2, random_state=0).fit(X).weights_.round(2).tolist()
        [0.6, 0.4]
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
        weight_concentration_prior: Any = None,
        mean_precision_prior: Any = None,
        mean_prior: Any = None,
        degrees_of_freedom_prior: Any = None,
        covariance_prior: Any = None,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weight_concentration_prior = weight_concentration_prior
        self.mean_precision_prior = mean_precision_prior
        self.mean_prior = mean_prior
        self.degrees_of_freedom_prior = degrees_of_freedom_prior
        self.covariance_prior = covariance_prior
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "BayesianMixture":
        """Maximises the bound from `n_init` starts and keeps the highest.

        Args:
            X: Data, shape (n_samples, n_features).
            y: Ignored.
            sample_weight: How often each datum counts, shape (n_samples,).

        Raises:
            ValueError: If there are fewer data than components, a parameter cannot be used, or the
                covariance of the data, as a prior, is singular.
        """
        X, sample_weight = self._checked(X, sample_weight)
        rng = check_random_state(self.random_state)
        ends = []
        for _ in range(self.n_init):
            mixture = GaussianMixture(
                self.n_components, X.shape[1], self.covariance_type, reg_covar=self.reg_covar
            ).double()
            end = fit_em(
                mixture.requires_grad_(False),
                X,
                method="variational_bayes",
                max_iterations=self.max_iter,
                tolerance=self.tol / len(X),
                initialization=self._responsibilities(X, sample_weight, rng),
                sample_weights=sample_weight,
                prior=self._prior(),
                progress=False,
            )
            ends.append((float(end.history.bound_total[-1]), mixture, end))
        best = max(ends, key=lambda end: end[0])
        self._set(*best)
        self.posterior_ = best[2].posterior
        said = self.posterior_.hyperparameters
        self.weight_concentration_ = said["concentration"].numpy()
        self.mean_precision_ = said["loc_precision"].numpy()
        self.degrees_of_freedom_ = said["degrees_of_freedom"].numpy()
        return self

    def predict(self, X: Any) -> Int[ndarray, " samples"]:
        """The most probable component of each datum."""
        return self._log_joint(X).argmax(1).numpy()

    def predict_proba(self, X: Any) -> Float64[ndarray, "samples components"]:
        """The responsibilities p(z = k | x), with the parameters integrated out."""
        return self._log_joint(X).softmax(1).numpy()

    def score_samples(self, X: Any) -> Float64[ndarray, " samples"]:
        """The log posterior predictive density of each datum, in nats."""
        return self._log_joint(X).logsumexp(1).numpy()

    def _log_joint(self, X: Any) -> torch.Tensor:
        check_is_fitted(self)
        return self.posterior_.log_joint(self._x(X))

    def _prior(self) -> dict[str, Any]:
        """What was given, under the names of `fit_em`."""
        given = {
            "concentration": self.weight_concentration_prior,
            "loc_precision": self.mean_precision_prior,
            "loc": self.mean_prior,
            "degrees_of_freedom": self.degrees_of_freedom_prior,
            "inverse_scale": self.covariance_prior,
        }
        return {name: value for name, value in given.items() if value is not None}


def _inverse(matrices: ndarray, covariance_type: str) -> ndarray:
    """Precisions of covariances, or the other way round, in the shapes of scikit-learn."""
    return np.linalg.inv(matrices) if covariance_type in ("full", "tied") else 1 / matrices
