"""Generative programs and their guides, as Pyro functions."""

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
    "ContinuousBernoulli",
    "Gaussian",
    "Likelihood",
    "LinearGaussian",
    "make_likelihood",
]
