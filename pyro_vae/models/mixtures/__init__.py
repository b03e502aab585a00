"""Mixtures that EM fits in closed form: Gaussian, Bernoulli, Poisson."""

from pyro_vae.models.mixtures.bayes import MixturePosterior
from pyro_vae.models.mixtures.exponential import (
    BernoulliMixture,
    ExponentialMixture,
    PoissonMixture,
)
from pyro_vae.models.mixtures.gaussian import COVARIANCES, GaussianMixture
from pyro_vae.models.mixtures.problem import SingularComponentError

__all__ = [
    "COVARIANCES",
    "BernoulliMixture",
    "ExponentialMixture",
    "GaussianMixture",
    "MixturePosterior",
    "PoissonMixture",
    "SingularComponentError",
]
