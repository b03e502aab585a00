"""Variational Bayes on a Gaussian mixture behind the interface of scikit-learn's."""

from typing import Any

import torch
from jaxtyping import Float64, Int
from numpy import ndarray
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from pyro_vae.inference.em import fit_em
from pyro_vae.models import GaussianMixture
from pyro_vae.sklearn.mixture_base import MixtureEstimator

__all__ = ["BayesianMixture"]


class BayesianMixture(MixtureEstimator):
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
        >>> import numpy as np
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
