"""A variational autoencoder as a scikit-learn transformer with a density."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float64
from numpy import ndarray
from pyro.distributions import Normal
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pyro_vae.diagnostics.evidence import log_evidence
from pyro_vae.inference.programs import keep_random_state
from pyro_vae.inference.svi import fit
from pyro_vae.models import VAE

__all__ = ["VAETransformer"]

_ROWS = 4096  # data scored at once


class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""A variational autoencoder: nonlinear latents, a decoder and a density.

    Computed in float64. With `likelihood="gaussian"` the data should be of order one, such as
    after a `StandardScaler`; with "bernoulli" they are binary.

    Args:
        n_components: Number of latents.
        hidden: Sizes of the encoder's hidden layers; the decoder has them in reverse order.
        likelihood: A name or a mapping, see `pyro_vae.models.make_likelihood`.
        epochs: Passes over the data.
        batch_size: Data in a mini-batch; 128 if None.
        learning_rate: Of Adam.
        num_particles: Draws from the guide for each datum in `score_samples`.
        random_state: Of the initial weights, training, `sample` and `score_samples`.

    Attributes:
        vae_: The fitted `pyro_vae.VAE`, for every tool of the library.
        bounds_: The ELBO of the training data after each epoch, in nats per datum.
        n_features_in_: Number of features.
        feature_names_in_: Their names, where the data had some.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114.
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        hidden: Sequence[int] = (64,),
        likelihood: Any = "gaussian",
        epochs: int = 100,
        batch_size: int | None = None,
        learning_rate: float = 1e-3,
        num_particles: int = 100,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.hidden = hidden
        self.likelihood = likelihood
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.num_particles = num_particles
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "VAETransformer":
        """Trains the autoencoder.

        Raises:
            ValueError: If the data lie off the likelihood's support.
        """
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self.random_seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        with keep_random_state():
            torch.manual_seed(self.random_seed_)
            vae = VAE(X.shape[1], self.n_components, tuple(self.hidden), self.likelihood).double()
        end = fit(
            vae,
            X,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.random_seed_,
            progress=False,
        )
        self.vae_ = vae.requires_grad_(False)
        self.bounds_ = end.history.bound.values
        return self

    def transform(self, X: Any) -> Float64[ndarray, "samples components"]:
        """The posterior mean of the latents of each datum."""
        x = self._read(X)
        return self.vae_.encode(x).mean.numpy()

    def inverse_transform(self, X: Any) -> Float64[ndarray, "samples features"]:
        """The mean of the data given latents."""
        check_is_fitted(self)
        return self.vae_.decode(torch.as_tensor(np.asarray(X, dtype=np.float64))).numpy()

    def sample(self, n_samples: int = 1) -> Float64[ndarray, "samples features"]:
        """Draws data from the model, the same at every call."""
        check_is_fitted(self)
        generator = torch.Generator().manual_seed(self.random_seed_)
        return self.vae_.sample(n_samples, mean=False, generator=generator).numpy()

    def score_samples(self, X: Any, return_std: bool = False) -> Any:
        """The importance-weighted bound on log p(x) of each datum, in nats.

        All data share their noise, so that the score of a datum does not depend on the others; the
        error of their mean is therefore not the errors' over the root of their number.

        Args:
            X: Data, shape (n_samples, n_features).
            return_std: Whether to return the Monte-Carlo standard errors as well.

        Returns:
            The scores, shape (n_samples,), in expectation at most log p(x); or a pair of them and
            their standard errors.
        """
        parts = [
            log_evidence(
                self.vae_.model,
                self._shared_noise_guide,
                rows,
                num_particles=self.num_particles,
                seed=self.random_seed_,
                progress=False,
            )
            for rows in self._read(X).split(_ROWS)
        ]
        scores = np.concatenate([part.log_evidence.values for part in parts])
        if not return_std:
            return scores
        return scores, np.concatenate([part.log_evidence_se.values for part in parts])

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of `score_samples`, in nats per datum; higher is better."""
        return float(self.score_samples(X).mean())

    def _shared_noise_guide(self, x: Tensor) -> None:
        posterior = self.vae_.encode(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", _SharedNoise(posterior.mean, posterior.stddev).to_event(1))

    def _read(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.from_numpy(np.array(validate_data(self, X, dtype=np.float64, reset=False)))

    @property
    def _n_features_out(self) -> int:
        return self.n_components


class _SharedNoise(Normal):
    """Normals `[..., data, latents]` whose draws use the same noise for every datum."""

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "_SharedNoise":
        return _SharedNoise(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = list(self._extended_shape(sample_shape))
        shape[-2] = 1
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + noise * self.scale
