"""Generative programs and their guides, as Pyro functions."""

from pyro_vae.models.exponential_mixture import (
    BernoulliMixture,
    ExponentialMixture,
    PoissonMixture,
    SingularComponentError,
)
from pyro_vae.models.gaussian_mixture import GaussianMixture
from pyro_vae.models.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    Gaussian,
    Likelihood,
    make_likelihood,
)
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.vae import VAE

__all__ = [
    "VAE",
    "Bernoulli",
    "BernoulliMixture",
    "ContinuousBernoulli",
    "ExponentialMixture",
    "Gaussian",
    "GaussianMixture",
    "Likelihood",
    "LinearGaussian",
    "PoissonMixture",
    "SingularComponentError",
    "make_likelihood",
]
