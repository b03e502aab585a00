"""Generative programs and their guides, as Pyro functions."""

from pyro_vae.models.autoencoder import (
    Autoencoder,
    Contractive,
    Denoising,
    Sparse,
    Undercomplete,
)
from pyro_vae.models.exponential_mixture import (
    BernoulliMixture,
    ExponentialMixture,
    PoissonMixture,
)
from pyro_vae.models.gaussian_mixture import GaussianMixture
from pyro_vae.models.likelihoods import (
    Bernoulli,
    CategoricalLevels,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
    make_likelihood,
)
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.mixture_problem import SingularComponentError
from pyro_vae.models.posteriors import (
    DiagonalPosterior,
    FullPosterior,
    InverseAutoregressivePosterior,
    LowRankPosterior,
    Posterior,
    make_posterior,
)
from pyro_vae.models.priors import (
    FlowPrior,
    MixturePrior,
    Prior,
    StandardNormal,
    VampPrior,
    make_prior,
)
from pyro_vae.models.two_stage import TwoStageVAE
from pyro_vae.models.vae import VAE, TwoLayerVAE

__all__ = [
    "VAE",
    "Autoencoder",
    "Bernoulli",
    "BernoulliMixture",
    "CategoricalLevels",
    "ContinuousBernoulli",
    "Contractive",
    "Denoising",
    "DiagonalPosterior",
    "DiscretizedLogistic",
    "ExponentialMixture",
    "FlowPrior",
    "FullPosterior",
    "Gaussian",
    "GaussianMixture",
    "InverseAutoregressivePosterior",
    "Likelihood",
    "LinearGaussian",
    "LowRankPosterior",
    "MixturePrior",
    "PoissonMixture",
    "Posterior",
    "Prior",
    "SingularComponentError",
    "Sparse",
    "StandardNormal",
    "TwoLayerVAE",
    "TwoStageVAE",
    "Undercomplete",
    "VampPrior",
    "make_likelihood",
    "make_posterior",
    "make_prior",
]
