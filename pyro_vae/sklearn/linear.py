"""Probabilistic PCA and factor analysis as scikit-learn transformers with an exact density."""

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from pyro_vae.models import LinearGaussian

__all__ = ["FactorAnalyzer", "ProbabilisticPCA"]


class _LinearEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What both share: everything but the fit."""

    model_: LinearGaussian

    def transform(self, X: Any) -> Float64[ndarray, "samples components"]:
        """The posterior mean of the latents of each datum."""
        return self.model_.posterior(self._read(X)).mean.detach().numpy()

    def inverse_transform(self, X: Any) -> Float64[ndarray, "samples features"]:
        """The mean of the data given latents."""
        check_is_fitted(self)
        latents = torch.as_tensor(np.asarray(X, dtype=np.float64))
        return (latents @ self.model_.weight.mT + self.model_.bias).detach().numpy()

    def score_samples(self, X: Any) -> Float64[ndarray, " samples"]:
        """The exact log p(x) of each datum, in nats."""
        return self.model_.log_evidence(self._read(X)).detach().numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of `score_samples`, in nats per datum; higher is better."""
        return float(self.score_samples(X).mean())

    def sample(
        self, n_samples: int = 1, random_state: Any = None
    ) -> Float64[ndarray, "samples features"]:
        """Draws data from the fitted density."""
        check_is_fitted(self)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        return self.model_.sample(n_samples, generator=torch.Generator().manual_seed(seed)).numpy()

    def get_covariance(self) -> Float64[ndarray, "features features"]:
        """The covariance W W^T + Psi of the data under the model."""
        check_is_fitted(self)
        weight = self.components_.T
        return weight @ weight.T + np.diag(self.model_.noise_variance.detach().numpy())

    def _data(self, X: Any) -> torch.Tensor:
        """Data to fit, of which each feature must be seen twice."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        return torch.from_numpy(np.array(X))

    def _read(self, X: Any) -> torch.Tensor:
        check_is_fitted(self)
        return torch.from_numpy(np.array(validate_data(self, X, dtype=np.float64, reset=False)))

    def _set(self, model: LinearGaussian) -> None:
        self.model_ = model.requires_grad_(False)
        self.mean_ = model.bias.numpy()
        self.components_ = model.weight.mT.numpy()

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)


class ProbabilisticPCA(_LinearEstimator):
    r"""Probabilistic PCA: principal axes with a density, fitted in closed form.

    The density is that of scikit-learn's `PCA`, up to the divisor of the covariance: here it is
    the maximum likelihood one, the number of data. `transform` gives posterior means, which lie
    nearer to zero than PCA's scores and are in units of the prior's standard deviation.

    Args:
        n_components: Number of latents, less than the number of features.

    Attributes:
        components_: Loadings W^T, shape (n_components, n_features).
        mean_: Shape (n_features,).
        noise_variance_: The variance of each feature that the latents leave.
        model_: The `LinearGaussian`, for every tool of the library.
        n_features_in_: Number of features.
        feature_names_in_: Their names, where the data had some.

    References:
        Tipping & Bishop (1999), Probabilistic principal component analysis, JRSS B 61, 611-622.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(50, 3))
        >>> ProbabilisticPCA(n_components=2).fit_transform(X).shape
        (50, 2)
    """

    def __init__(self, n_components: int = 1) -> None:
        self.n_components = n_components

    def fit(self, X: Any, y: Any = None) -> "ProbabilisticPCA":
        """Fits by the eigenvalues of the covariance.

        Raises:
            ValueError: If there are as many latents as features, or no variance is left for noise.
        """
        x = self._data(X)
        if x.shape[1] == 1:
            raise ValueError("probabilistic PCA needs two features or more; found 1 feature(s)")
        self._set(LinearGaussian.ppca_optimum(x, self.n_components))
        self.noise_variance_ = float(self.model_.noise_variance[0])
        return self


class FactorAnalyzer(_LinearEstimator):
    r"""Factor analysis, the fit of scikit-learn's `FactorAnalysis` with an exact density.

    Args:
        n_components: Number of factors; as many as features if None.
        tol: Stops when a round raises the total log-likelihood by less, in nats.
        max_iter: Rounds at most.

    Attributes:
        components_: Loadings W^T, shape (n_components, n_features).
        mean_: Shape (n_features,).
        noise_variance_: Of each feature, shape (n_features,).
        loglike_: The total log-likelihood after each round, in nats.
        n_iter_: Rounds.
        model_: The `LinearGaussian`, for every tool of the library.
        n_features_in_: Number of features.
        feature_names_in_: Their names, where the data had some.

    References:
        Barber (2012), Bayesian Reasoning and Machine Learning, section 21.2.
    """

    def __init__(
        self, n_components: int | None = None, *, tol: float = 1e-2, max_iter: int = 1000
    ) -> None:
        self.n_components = n_components
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any = None) -> "FactorAnalyzer":
        """Fits by alternating loadings and noise.

        Raises:
            ValueError: If there are more factors than features.
        """
        x = self._data(X)
        number = x.shape[1] if self.n_components is None else self.n_components
        model, self.loglike_ = LinearGaussian.factor_analysis(
            x, number, tolerance=self.tol, max_iterations=self.max_iter
        )
        self._set(model)
        self.noise_variance_ = model.noise_variance.numpy()
        self.n_iter_ = len(self.loglike_)
        if self.n_iter_ == self.max_iter:
            warnings.warn(
                f"factor analysis did not converge in {self.max_iter} rounds; raise max_iter",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self
