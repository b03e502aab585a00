"""What deep models are put together from: likelihoods, priors, posteriors, networks."""

from pyro_vae.models.parts.likelihoods import (
    Bernoulli,
    CategoricalLevels,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
    check_batch,
    check_finite,
    make_likelihood,
)
from pyro_vae.models.parts.networks import (
    ACTIVATIONS,
    Convolutional,
    Network,
    Perceptron,
    make_network,
    mlp,
)
from pyro_vae.models.parts.posteriors import (
    DiagonalPosterior,
    FullPosterior,
    InverseAutoregressivePosterior,
    LowRankPosterior,
    Posterior,
    make_posterior,
)
from pyro_vae.models.parts.priors import (
    FlowPrior,
    MixturePrior,
    Prior,
    StandardNormal,
    VampPrior,
    make_prior,
)
from pyro_vae.models.parts.registry import Part, make_checked, name_of, parse_part, part_text

__all__ = [
    "ACTIVATIONS",
    "Bernoulli",
    "CategoricalLevels",
    "ContinuousBernoulli",
    "Convolutional",
    "DiagonalPosterior",
    "DiscretizedLogistic",
    "FlowPrior",
    "FullPosterior",
    "Gaussian",
    "InverseAutoregressivePosterior",
    "Likelihood",
    "LowRankPosterior",
    "MixturePrior",
    "Network",
    "Part",
    "Perceptron",
    "Posterior",
    "Prior",
    "StandardNormal",
    "VampPrior",
    "check_batch",
    "check_finite",
    "make_checked",
    "make_likelihood",
    "make_network",
    "make_posterior",
    "make_prior",
    "mlp",
    "name_of",
    "parse_part",
    "part_text",
]
