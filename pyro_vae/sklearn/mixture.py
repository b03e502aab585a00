"""EM on a Gaussian mixture behind the interface of scikit-learn's."""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.utils import check_random_state

from pyro_vae.inference.em import check_steps, fit_em, online_step, standard_errors
from pyro_vae.models import GaussianMixture
from pyro_vae.results import Result
from pyro_vae.sklearn.mixture_base import MixtureEstimator, inverse

__all__ = ["GaussianMixtureEM"]


class GaussianMixtureEM(MixtureEstimator):
    r"""A Gaussian mixture fitted by this library's EM, in place of scikit-learn's.

    Parameters, attributes, methods and starts are those of `sklearn.mixture.GaussianMixture`, and
    from one `random_state` both take the same path (from "k-means++" and "random_from_data",
    whose components are as narrow as `reg_covar` at first, only as far as rounding lets them).
    `fit` takes `sample_weight` besides, and `mixture_` is the model for every tool of the library.
    EM here stops once the bound of the parameters it returns has gained less than `tol`, which may
    be one iteration earlier. `partial_fit` takes a stream batch by batch, by online EM.

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
        missing: None refuses NaN; "marginalise" integrates such entries out exactly, when fitting
            and when scoring and predicting. Right where they are missing at random.
        step_exponent: Of `partial_fit`: batch t has the share (t + step_delay) ** -step_exponent
            in the averaged statistics; above 0.5, at most 1.
        step_delay: Of `partial_fit`, 0 or positive.

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
        stream_: What `partial_fit` keeps of the batches that it saw.
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
        missing: str | None = None,
        step_exponent: float = 0.6,
        step_delay: float = 0.0,
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
        self.missing = missing
        self.step_exponent = step_exponent
        self.step_delay = step_delay

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self._allows_nan
        return tags

    @property
    def _allows_nan(self) -> bool:
        return self.missing is not None

    _without_nan = "pass missing='marginalise' to integrate missing entries out"

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
        if hasattr(self, "stream_"):
            del self.stream_
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "GaussianMixtureEM":
        """One step of online EM with a batch of a stream (Cappe & Moulines 2009).

        The first batch is taken whole, and gives the start (after `fit`, which a stream goes on
        from, it does not): let it be large. `fit` forgets the stream.

        Args:
            X: The batch, shape (n_samples, n_features); the first has `n_components` rows or more.
            y: Ignored.
            sample_weight: How often each datum counts in its batch, shape (n_samples,).

        Raises:
            ValueError: If the batch or a parameter cannot be used; the estimator is then as it was.
        """
        check_steps(self.step_exponent, self.step_delay)
        state = getattr(self, "stream_", None)
        if state is None:
            X, sample_weight = self._checked(X, sample_weight, reset=not hasattr(self, "mixture_"))
            mixture = getattr(self, "mixture_", None)
            if mixture is None:
                rng = check_random_state(self.random_state)
                mixture = self._start(X, sample_weight, rng)
        else:
            X, sample_weight = self._checked(X, sample_weight, reset=False, fewest=1)
            mixture = self.mixture_
        state, bound = online_step(
            mixture,
            torch.tensor(X),
            state,
            sample_weights=None if sample_weight is None else torch.tensor(sample_weight),
            step_exponent=self.step_exponent,
            step_delay=self.step_delay,
        )
        self._set_parameters(mixture)
        self.stream_, self.lower_bound_, self.converged_ = state, bound, False
        self.n_iter_ = state.num_batches
        return self

    def standard_errors(self, X: Any, sample_weight: Any = None) -> Result:
        """How far the parameters are known, by Oakes' information matrix.

        Args:
            X: The data of `fit`, which must have converged with a small `tol`.
            sample_weight: That of `fit`.

        Returns:
            `fitted` (weights_, means_ and covariances_, in a row) with `fitted_se`; see
            `pyro_vae.standard_errors`.

        Raises:
            ValueError: If data or weights cannot be used.
        """
        return standard_errors(self._mixture(X), self._x(X), sample_weights=sample_weight)

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
            self.n_components,
            X.shape[1],
            self.covariance_type,
            reg_covar=self.reg_covar,
            missing=self.missing,
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
                inverse(np.asarray(self.precisions_init, dtype=np.float64), self.covariance_type)
            )
        return GaussianMixture.from_parameters(
            **values,
            covariance=self.covariance_type,
            reg_covar=self.reg_covar,
            missing=self.missing,
        ).requires_grad_(False)
