"""What Gaussian mixtures have of scikit-learn's, whatever fits them."""

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

from pyro_vae.inference.em import EMFit
from pyro_vae.models import GaussianMixture

__all__ = ["MixtureEstimator", "inverse"]

_STARTS = ("kmeans", "k-means++", "random", "random_from_data")


class MixtureEstimator(DensityMixin, BaseEstimator):
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

    def _checked(
        self, X: Any, sample_weight: Any, *, reset: bool = True, fewest: int = 2
    ) -> tuple[ndarray, ndarray | None]:
        """Data and their weights; raises where these or the start cannot be used."""
        X = self._validated(X, ensure_min_samples=fewest, reset=reset)
        if fewest > 1 and len(X) < self.n_components:
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
        if np.isnan(X).any():
            X = np.where(np.isnan(X), np.nanmean(X, 0), X)
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
        self._set_parameters(mixture)
        self.lower_bound_, self.converged_ = bound, end.converged
        self.n_iter_ = int(end.history.iteration[-1])
        if not self.converged_:
            warnings.warn(
                f"EM did not converge in {self.max_iter} iterations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _set_parameters(self, mixture: GaussianMixture) -> None:
        self.mixture_ = mixture
        values = {name: v.detach().clone().numpy() for name, v in mixture.fitted_values().items()}
        self.weights_, self.means_ = values["weights"], values["locs"]
        self.covariances_ = values["covariances"]
        self.precisions_ = inverse(self.covariances_, self.covariance_type)
        if self.covariance_type in ("full", "tied"):
            lower = np.linalg.inv(np.linalg.cholesky(self.covariances_))
            self.precisions_cholesky_ = np.swapaxes(lower, -1, -2)
        else:
            self.precisions_cholesky_ = np.sqrt(self.precisions_)

    def _mixture(self, X: Any) -> GaussianMixture:
        check_is_fitted(self)
        return self.mixture_

    def _x(self, X: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(self._validated(X, reset=False)))

    def _validated(self, X: Any, **options: Any) -> ndarray:
        """Data in double precision, with NaN where an estimator integrates it out."""
        X = validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan", **options)
        if not self._allows_nan and np.isnan(X).any():
            raise ValueError(f"Input X contains NaN: {self._without_nan}")
        return X

    @property
    def _allows_nan(self) -> bool:
        return False

    _without_nan = "leave out or impute missing entries, or fit GaussianMixtureEM"


def inverse(matrices: ndarray, covariance_type: str) -> ndarray:
    """Precisions of covariances, or the other way round, in the shapes of scikit-learn."""
    return np.linalg.inv(matrices) if covariance_type in ("full", "tied") else 1 / matrices
